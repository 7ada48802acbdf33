//! Python with the tools that others analyse our files with, in an environment of its own: tests read
//! back with them what we write.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::cache::{self, remove_directory};
use crate::{command, pip};

/// From the Python registry; what they need themselves comes with them.
const TOOLS: [&str; 7] = [
    "axe-playwright-python==0.1.8",
    "duckdb==2.0.0",
    "pandas==3.1.1",
    "pillow==13.0.0",
    "playwright==1.65.2",
    "polars==2.1.0",
    "pyarrow==26.0.1",
];

/// The interpreter that has them.
pub fn provision() -> Result<PathBuf> {
    let name = format!("python-tools-{}", cache::key(&TOOLS));
    let environment = cache::entry(&name, |partial| {
        remove_directory(partial)?;
        fs::create_dir_all(partial)
            .with_context(|| format!("cannot create {}", partial.display()))?;
        pip::ensure_python("reading our files back")?;
        command::run(Command::new("python3").args(["-m", "venv"]).arg(partial))?;
        command::run(
            Command::new(partial.join("bin/python"))
                .args(["-m", "pip", "--disable-pip-version-check", "install"])
                .args(["--no-cache-dir", "--only-binary=:all:"])
                .args(TOOLS)
                .stdin(Stdio::null())
                .stdout(io::stderr()),
        )
        .context("cannot install tools that read our files back from the Python registry")
    })?;
    Ok(environment.join("bin/python"))
}
