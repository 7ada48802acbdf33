//! The program without what traces: what reads and writes files, for any system.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::steps::Steps;
use crate::{command, workspace};

/// Systems that it is checked for. A C compiler for them is not asked for, so there is no zstd.
const TARGETS: [&str; 2] = ["aarch64-apple-darwin", "x86_64-pc-windows-msvc"];

/// Builds it for this system, and gives where it is.
pub fn build(root: &Path) -> Result<PathBuf> {
    let mut cargo = workspace::cargo(root);
    cargo.args(["build", "--package", "expert-trace"]);
    command::run(cargo.args(["--no-default-features", "--features", "zstd"]))?;
    let target = workspace::target()?;
    let built = target.join("debug/expert-trace");
    // The next build of the whole program takes its place.
    let kept = target.join("offline");
    fs::create_dir_all(&kept).with_context(|| format!("cannot create {}", kept.display()))?;
    let kept = kept.join("expert-trace");
    fs::copy(&built, &kept).with_context(|| format!("cannot copy {}", built.display()))?;
    Ok(kept)
}

/// Checks that it compiles for other systems.
pub fn check(root: &Path, filter: Option<&str>, steps: &mut Steps) {
    const STEP: &str = "Compiles for macOS and Windows";
    if filter.is_some() {
        steps.skip(STEP, "only tests with a certain name were asked for");
        return;
    }
    let added = Command::new("rustup")
        .args(["target", "add"])
        .args(TARGETS)
        .output();
    let why = match added {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Some(format!("rustup cannot be run: {error}")),
    };
    if let Some(why) = why {
        steps.skip(STEP, &format!("the targets cannot be installed ({why})"));
        return;
    }
    steps.run(STEP, |_| {
        let mut cargo = workspace::cargo(root);
        cargo.args([
            "check",
            "--package",
            "expert-trace",
            "--no-default-features",
        ]);
        for target in TARGETS {
            cargo.args(["--target", target]);
        }
        command::run(&mut cargo)
    });
}
