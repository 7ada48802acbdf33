//! The BPF toolchain on stable Rust: Debian's compiler, which comes with the sources of `core`, and
//! bpf-linker built with the LLVM of the same archive.
//!
//! rustup offers neither the sources nor an LLVM library to link with, except with nightly
//! components; Debian 12's security archive has both, in versions that match. The Cargo is the
//! user's own.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::recipe::{self, LLVM_MAJOR};
use crate::{cache, command, packages, system};

/// The compiler of the package rustc-web.
pub const RUSTC: &str = "/usr/bin/rustc";

const PURPOSE: &str = "building the BPF objects";
const PACKAGES: [&str; 5] = [
    "rustc-web",
    "rust-web-src",
    "llvm-22-dev",
    "libpolly-22-dev",
    "clang-22",
];
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

/// All that a build needs.
pub struct Toolchain {
    /// bpf-linker.
    pub linker: PathBuf,
    /// llvm-objcopy.
    pub objcopy: PathBuf,
    /// Names under which the sources of `core` may appear.
    pub rust_sources: Vec<PathBuf>,
    /// The compiler's release, if it is not that of the recipe.
    pub other_rustc: Option<String>,
}

impl Toolchain {
    /// Installs what is missing, where that is possible.
    pub fn provision() -> Result<Self> {
        if system::is_debian_12() {
            packages::ensure(&PACKAGES, PURPOSE)?;
        }
        let bin = Path::new(LLVM_PREFIX).join("bin");
        let objcopy = bin.join("llvm-objcopy");
        let llvm_config = bin.join("llvm-config");
        for file in [Path::new(RUSTC), &objcopy, &llvm_config] {
            ensure_file(file)?;
        }

        let rustc = command::output(Command::new(RUSTC).arg("-vV"))?;
        let llvm = command::output(Command::new(&llvm_config).arg("--version"))?;
        ensure_llvm_not_newer(&rustc, &llvm)?;
        let release = field(&rustc, "release")?;
        Ok(Self {
            linker: linker(llvm.trim(), &bin)?,
            objcopy,
            rust_sources: rust_sources()?,
            other_rustc: (release != recipe::RUSTC).then(|| release.to_owned()),
        })
    }
}

/// The user's Cargo, without what it, or the user, has set for other builds.
pub fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(is_of_other_builds) {
            cargo.env_remove(name);
        }
    }
    cargo
}

/// Everything of Cargo's and rustc's but how to reach registries; libraries of rustup's toolchain,
/// which `cargo run` puts before the system's.
fn is_of_other_builds(variable: &str) -> bool {
    const KEPT: [&str; 5] = [
        "CARGO_HOME",
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTR",
        "CARGO_TERM_",
    ];
    let of_cargo = variable == "CARGO" || variable.starts_with("CARGO_");
    (of_cargo && !KEPT.iter().any(|kept| variable.starts_with(kept)))
        || variable.starts_with("RUSTC")
        || ["RUSTFLAGS", "LD_LIBRARY_PATH"].contains(&variable)
}

fn ensure_file(file: &Path) -> Result<()> {
    ensure!(
        file.is_file(),
        "{PURPOSE} needs {}, which is not there: the toolchain is that of Debian 12's security \
         archive (packages {}), and this is {}",
        file.display(),
        PACKAGES.join(" "),
        system::distribution()
    );
    Ok(())
}

/// bpf-linker reads LLVM bitcode, which older versions of LLVM cannot.
fn ensure_llvm_not_newer(rustc: &str, linker_llvm: &str) -> Result<()> {
    let of_rustc = major(field(rustc, "LLVM version")?)?;
    let of_linker = major(linker_llvm)?;
    ensure!(
        of_rustc <= of_linker,
        "{RUSTC} has LLVM {of_rustc}, and bpf-linker would be built with LLVM {of_linker}, which \
         cannot read what it writes: move xtask/src/ebpf/{{recipe,toolchain}}.rs to LLVM {of_rustc}"
    );
    Ok(())
}

/// A line of `rustc -vV`.
fn field<'a>(version: &'a str, name: &str) -> Result<&'a str> {
    version
        .lines()
        .filter_map(|line| line.split_once(": "))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value.trim())
        .with_context(|| format!("`{RUSTC} -vV` does not tell its {name}"))
}

fn major(version: &str) -> Result<u32> {
    let (major, _) = version.trim().split_once('.').unwrap_or((version, ""));
    major
        .trim()
        .parse()
        .with_context(|| format!("{version:?} is no version of LLVM"))
}

fn rust_sources() -> Result<Vec<PathBuf>> {
    let sysroot = command::output(Command::new(RUSTC).args(["--print", "sysroot"]))?;
    let sources = Path::new(sysroot.trim()).join("lib/rustlib/src/rust");
    ensure_file(&sources.join("library/core/src/lib.rs"))?;
    let real = fs::canonicalize(&sources)
        .with_context(|| format!("cannot resolve {}", sources.display()))?;
    Ok(vec![sources, real])
}

/// bpf-linker, which uses the shared LLVM of exactly the version it was built with.
fn linker(llvm: &str, llvm_bin: &Path) -> Result<PathBuf> {
    let version = recipe::BPF_LINKER;
    let architecture = env::consts::ARCH;
    let name = format!("bpf-linker-{version}-llvm-{llvm}-{architecture}");
    let installed = cache::entry(&name, |partial| {
        eprintln!("Building bpf-linker, once: about 1 minute on 2 cores.");
        let inherited = env::var_os("PATH").unwrap_or_default();
        let path = env::join_paths(
            std::iter::once(llvm_bin.to_owned()).chain(env::split_paths(&inherited)),
        )
        .context("cannot extend PATH")?;
        command::run(
            cargo()
                .args(["install", "bpf-linker", "--version", version, "--locked"])
                .arg("--no-default-features")
                .args(["--features", &format!("llvm-{LLVM_MAJOR}"), "--root"])
                .arg(partial)
                .env("LLVM_PREFIX", LLVM_PREFIX)
                .env("PATH", path),
        )
    })?;
    Ok(installed.join("bin/bpf-linker"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUSTC_VV: &str = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\n\
        binary: rustc\nhost: x86_64-unknown-linux-gnu\nrelease: 1.96.0\nLLVM version: 22.1.8\n";

    #[test]
    fn the_linker_may_have_the_newer_llvm_but_not_the_compiler() {
        ensure_llvm_not_newer(RUSTC_VV, "22.1.2\n").unwrap();
        ensure_llvm_not_newer(RUSTC_VV, "23.0.0\n").unwrap();
        let error = ensure_llvm_not_newer(RUSTC_VV, "21.1.0\n").unwrap_err();
        assert!(error.to_string().contains("LLVM 22"), "{error}");
    }

    #[test]
    fn only_the_way_to_registries_is_kept() {
        for kept in ["CARGO_HOME", "CARGO_HTTP_PROXY", "RUSTUP_HOME", "PATH"] {
            assert!(!is_of_other_builds(kept), "{kept}");
        }
        for removed in [
            "CARGO",
            "CARGO_TARGET_DIR",
            "CARGO_BUILD_TARGET",
            "RUSTC_WRAPPER",
            "RUSTFLAGS",
        ] {
            assert!(is_of_other_builds(removed), "{removed}");
        }
    }

    #[test]
    fn packages_are_of_the_llvm_of_the_recipe() {
        assert!(LLVM_PREFIX.ends_with(&format!("-{LLVM_MAJOR}")));
        assert!(PACKAGES.contains(&format!("llvm-{LLVM_MAJOR}-dev").as_str()));
    }
}
