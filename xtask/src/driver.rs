//! The programs that have a libllama of any version decode tokens: `tests/oracle/driver.c`, and
//! `driver.py` beside it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::llama::Compiler;
use crate::{cache, command};

/// The one in C.
pub fn source(root: &Path) -> PathBuf {
    root.join("tests/oracle/driver.c")
}

/// The one in Python.
pub fn script(root: &Path) -> PathBuf {
    root.join("tests/oracle/driver.py")
}

/// The one in C as a program that opens a shared libllama at run time.
pub fn build(root: &Path) -> Result<PathBuf> {
    let source = source(root);
    let text =
        fs::read_to_string(&source).with_context(|| format!("cannot read {}", source.display()))?;
    let key = cache::key(&[&text, &Compiler::System.version()?]);
    cache::entry(&format!("driver-{key}"), |partial| {
        command::run(
            Command::new(Compiler::System.c())
                .args(["-O2", "-o"])
                .arg(partial)
                .arg(&source)
                .arg("-ldl"),
        )
    })
}
