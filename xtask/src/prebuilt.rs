//! Builds of llama.cpp that others publish, for the tests: of other versions, with other compilers and
//! options than ours, stripped, or for hardware that is not here.
//!
//! They are kept in the [cache], less what the tests have no use for.

mod cpu;
mod cuda;
mod vulkan;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use expert_trace_tests::prebuilt::Prebuilt;

use crate::cache::{self, remove_directory};
use crate::{command, npm};

pub use cpu::{all, some};
pub use vulkan::{ensure_device, shader_cache};

/// Directory of what is downloaded and not kept.
const DOWNLOAD: &str = "download";

/// What the tests know by name.
pub fn provision() -> Result<Prebuilt> {
    Ok(Prebuilt {
        vulkan_server: vulkan::server()?,
        shader_cache: shader_cache()?,
        cuda_libraries: cuda::libraries()?,
        cuda_runtimes: cuda::runtimes()?,
    })
}

fn entry_name(what: &str, version: &str, parts: &[&str]) -> String {
    format!("{what}-{version}-{}", cache::key(parts))
}

/// Removes what an interrupted run has left; returns the directory to download to.
fn start(partial: &Path) -> Result<PathBuf> {
    remove_directory(partial)?;
    let download = partial.join(DOWNLOAD);
    fs::create_dir_all(&download)
        .with_context(|| format!("cannot create {}", download.display()))?;
    Ok(download)
}

/// Moves a file to where it is kept. Directories that lead there are made.
fn keep(from: &Path, to: &Path) -> Result<()> {
    let directory = to.parent().context("a file is in a directory")?;
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    fs::rename(from, to)
        .with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))
}

fn make_executable(program: &Path) -> Result<()> {
    fs::set_permissions(program, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {} executable", program.display()))
}

/// Downloads a package, and unpacks some of the files in one of its directories.
fn unpack(
    package: &npm::Package,
    directory: &str,
    files: &[&str],
    download: &Path,
    into: &Path,
) -> Result<()> {
    let archive = package.download(download)?;
    let depth = Path::new(directory).components().count();
    command::run(
        Command::new("tar")
            .args(["--extract", "--gzip", "--no-same-owner", "--file"])
            .arg(&archive)
            .arg("--directory")
            .arg(into)
            .arg(format!("--strip-components={depth}"))
            .args(files.iter().map(|name| format!("{directory}/{name}"))),
    )
}
