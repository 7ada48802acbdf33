//! What the tests need from outside, as environment variables name it.

use std::env;
use std::path::PathBuf;

use anyhow::{Result, ensure};

/// The path in a variable that `task` prepares; exists.
pub fn existing(variable: &str, task: &str) -> Result<PathBuf> {
    let path = PathBuf::from(env::var_os(variable).unwrap_or_default());
    ensure!(
        !path.as_os_str().is_empty(),
        "{variable} is not set: run `{task}`, which prepares what it names"
    );
    ensure!(
        path.exists(),
        "{variable} names {}, which does not exist: run `{task}`",
        path.display()
    );
    Ok(path)
}
