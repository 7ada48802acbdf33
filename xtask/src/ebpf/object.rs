//! From what the linker writes to what is committed: no debug information but BTF, nothing of the
//! machine it was built on, and the fingerprint of its sources.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use object::{Object, ObjectSection};

use crate::command;

/// Section with the fingerprint; loaders ignore it.
const FINGERPRINT: &str = ".expert_trace.src";

/// The finished object's bytes. `private` are directories that must not be found in it.
pub fn finish(
    objcopy: &Path,
    linked: &Path,
    fingerprint: &str,
    private: &[PathBuf],
) -> Result<Vec<u8>> {
    let section = linked.with_extension("fingerprint");
    fs::write(&section, fingerprint)
        .with_context(|| format!("cannot write {}", section.display()))?;
    let finished = linked.with_extension("finished");
    command::run(
        Command::new(objcopy)
            .args(["--strip-debug", "--add-section"])
            .arg(format!("{FINGERPRINT}={}", section.display()))
            .arg(linked)
            .arg(&finished),
    )?;
    let bytes =
        fs::read(&finished).with_context(|| format!("cannot read {}", finished.display()))?;
    verify(&bytes, private).with_context(|| format!("{} is not fit", finished.display()))?;
    Ok(bytes)
}

/// The fingerprint in an object.
pub fn fingerprint(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file = object::File::parse(&*bytes)
        .with_context(|| format!("{} is no ELF file", path.display()))?;
    let section = file
        .section_by_name(FINGERPRINT)
        .with_context(|| format!("{} has no section {FINGERPRINT}", path.display()))?;
    let data = section
        .data()
        .with_context(|| format!("cannot read {FINGERPRINT} of {}", path.display()))?;
    Ok(String::from_utf8_lossy(data).into_owned())
}

fn verify(bytes: &[u8], private: &[PathBuf]) -> Result<()> {
    let file = object::File::parse(bytes).context("it is no ELF file")?;
    for wanted in [".BTF", ".BTF.ext", FINGERPRINT] {
        ensure!(
            file.section_by_name(wanted).is_some(),
            "it has no section {wanted}"
        );
    }
    for section in file.sections() {
        let name = section.name().context("a section has no name")?;
        ensure!(!name.starts_with(".debug_"), "it still has {name}");
    }
    if let Some(path) = private.iter().find(|path| contains(bytes, path)) {
        bail!(
            "it contains a path below {}: it would not be the same when built elsewhere; add the \
             directory to remapped_paths in xtask/src/ebpf.rs",
            path.display()
        );
    }
    Ok(())
}

/// Whether a path below the directory occurs.
fn contains(bytes: &[u8], directory: &Path) -> bool {
    // Everything is below the root directory.
    if directory.parent().is_none() {
        return false;
    }
    let below = format!("{}/", directory.display());
    bytes
        .windows(below.len())
        .any(|window| window == below.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_below_a_directory_are_found() {
        let bytes = b"\0/home/someone/clone/src/main.rs\0";
        assert!(contains(bytes, Path::new("/home/someone")));
        assert!(!contains(bytes, Path::new("/home/some")));
        assert!(!contains(bytes, Path::new("/")));
    }
}
