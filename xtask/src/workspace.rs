//! Where the workspace and its build products are, and the Cargo that builds them.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

/// The workspace's root directory.
pub fn root() -> Result<PathBuf> {
    // Asked at run time: a build directory may be shared by several checkouts.
    let manifest = env::var_os("CARGO_MANIFEST_DIR")
        .context("CARGO_MANIFEST_DIR is not set: run this as `cargo xtask`")?;
    let root = Path::new(&manifest)
        .parent()
        .context("CARGO_MANIFEST_DIR has no parent directory: run this as `cargo xtask`")?;
    Ok(root.to_owned())
}

/// The directory of build products: this program is `<it>/<profile>/xtask`.
pub fn target() -> Result<PathBuf> {
    let program = env::current_exe().context("cannot tell the path of this program")?;
    let target = program.ancestors().nth(2);
    Ok(target
        .context("this program is in no build directory: run it as `cargo xtask`")?
        .to_owned())
}

/// The Cargo that runs us, in the workspace.
pub fn cargo(root: &Path) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root);
    cargo
}

/// Builds the program as users run it.
pub fn release_build(root: &Path) -> Command {
    let mut cargo = cargo(root);
    cargo.args(["build", "--release", "--package", "expert-trace"]);
    cargo
}

/// What [`release_build`] builds.
pub fn release_program() -> Result<PathBuf> {
    Ok(target()?.join("release/expert-trace"))
}
