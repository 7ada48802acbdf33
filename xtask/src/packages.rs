//! Installing what is missing, as far as the distribution has it: packages of Debian and Ubuntu.

use std::env;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};

use crate::{command, system};

/// Installs those of the packages that are missing. `purpose` says in an error what needs them.
pub fn ensure(packages: &[&str], purpose: &str) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|package| !installed(package))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !on_path("apt-get") {
        bail!(
            "{purpose} needs what Debian packages as: {names}; there is no apt-get on this system \
             ({}) to install it with: install it by the system's own means",
            system::distribution()
        );
    }
    if !system::is_root() {
        bail!(
            "{purpose} needs packages that are not installed: run \
             `sudo apt-get install --no-install-recommends {names}`, or this command as root"
        );
    }
    update_lists()?;
    command::run(
        apt_get()
            .args(["install", "--yes", "--no-install-recommends"])
            .args(&missing),
    )
    .with_context(|| format!("{purpose} needs the packages {names}, which apt cannot install"))
}

/// A package of Debian that is downloaded and not installed: one of another release than is here.
pub struct Pinned {
    pub version: &'static str,
    /// In Debian's archive.
    pub path: &'static str,
    pub sha256: &'static str,
}

impl Pinned {
    /// Downloads it from where this system's own packages come from.
    pub fn download(&self, to: &Path) -> Result<()> {
        const HELPER: &str = "/usr/lib/apt/apt-helper";
        let Self { path, sha256, .. } = self;
        command::run(
            Command::new(HELPER)
                .args(["download-file", &format!("{}{path}", debian_archive()?)])
                .arg(to)
                .arg(format!("SHA256:{sha256}"))
                .stdin(Stdio::null()),
        )
        .with_context(|| format!("{path} cannot be had from Debian's archive"))
    }
}

/// Address of Debian's archive, as apt knows it, with a slash at its end.
fn debian_archive() -> Result<String> {
    let found = command::output(Command::new("apt-get").args([
        "indextargets",
        "--format=$(REPO_URI)",
        "Origin: Debian",
        "Label: Debian",
    ]))?;
    let address = found.lines().next().map(str::to_owned);
    address.with_context(|| {
        format!(
            "apt has no list of Debian's packages on this system ({}): run `apt-get update` if it is \
             Debian; else install newer packages by the system's own means",
            system::distribution()
        )
    })
}

/// Whether a program can be run by its name.
pub fn on_path(program: &str) -> bool {
    env::var_os("PATH").is_some_and(|path| {
        env::split_paths(&path).any(|directory| directory.join(program).is_file())
    })
}

fn installed(package: &str) -> bool {
    let status = Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}", package])
        .stderr(Stdio::null())
        .output();
    status.is_ok_and(|query| query.status.success() && query.stdout == b"installed")
}

/// Once per process: the lists may be old, or not there at all.
fn update_lists() -> Result<()> {
    static UPDATED: OnceLock<()> = OnceLock::new();
    if UPDATED.get().is_none() {
        command::run(apt_get().arg("update"))?;
        let _ = UPDATED.set(());
    }
    Ok(())
}

fn apt_get() -> Command {
    let mut apt_get = Command::new("apt-get");
    apt_get
        .args(["--quiet", "--option", "DPkg::Lock::Timeout=300"])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null());
    apt_get
}
