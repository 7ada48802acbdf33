//! Copies of what tests need, in a place where every user can read and run them.
//!
//! The llama.cpp under test may be in root's home, which other users cannot enter.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::llama::LlamaCpp;

/// Names of the libraries that the driver needs begin with one of these.
const LIBRARIES: [&str; 2] = ["libllama.so", "libggml"];

/// A directory that everybody can read and only we can write. Dropping it removes it.
pub struct Reachable(TempDir);

/// The test driver, which starts only with the path of its libraries in `LD_LIBRARY_PATH`.
pub struct Driver {
    /// The program.
    pub program: PathBuf,
    /// The directory of its libraries.
    pub libraries: PathBuf,
}

impl Reachable {
    /// An empty one.
    pub fn new() -> Result<Reachable> {
        let directory = tempfile::Builder::new()
            .prefix("expert-trace-test-")
            .permissions(Permissions::from_mode(0o755))
            .tempdir()?;
        // Whatever our umask has taken away.
        open_to_all(directory.path())?;
        Ok(Reachable(directory))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Copies a file, a program or not, and returns the copy's path.
    pub fn copy(&self, file: &Path) -> Result<PathBuf> {
        copy_into(self.path(), file)
    }

    /// Copies the driver and the libraries of llama.cpp that it needs, to separate directories.
    ///
    /// # Errors
    ///
    /// If something cannot be copied, or the driver's library path is not found in it.
    pub fn copy_driver(&self, llama: &LlamaCpp) -> Result<Driver> {
        let program = self.copy(&llama.oracle)?;
        forget_library_path(&program, &llama.bin)?;
        let libraries = self.path().join("lib");
        fs::create_dir(&libraries)?;
        open_to_all(&libraries)?;
        for entry in fs::read_dir(&llama.bin)? {
            let entry = entry?;
            let name = entry.file_name();
            let name_text = name.to_string_lossy();
            if !LIBRARIES.iter().any(|prefix| name_text.starts_with(prefix)) {
                continue;
            }
            if entry.file_type()?.is_symlink() {
                let target = fs::read_link(entry.path())?;
                std::os::unix::fs::symlink(target, libraries.join(&name))?;
            } else {
                copy_into(&libraries, &entry.path())?;
            }
        }
        Ok(Driver { program, libraries })
    }
}

fn copy_into(directory: &Path, file: &Path) -> Result<PathBuf> {
    let name = file
        .file_name()
        .with_context(|| format!("{} names no file", file.display()))?;
    let copy = directory.join(name);
    fs::copy(file, &copy).with_context(|| format!("copy {}", file.display()))?;
    open_to_all(&copy)?;
    Ok(copy)
}

fn open_to_all(path: &Path) -> Result<()> {
    fs::set_permissions(path, Permissions::from_mode(0o755))
        .with_context(|| format!("change the mode of {}", path.display()))
}

/// Takes the library path, a string in the file, from a program that was linked with it. An empty one
/// is no path to the dynamic linker.
fn forget_library_path(program: &Path, library_path: &Path) -> Result<()> {
    let mut bytes = fs::read(program)?;
    let path = library_path.as_os_str().as_encoded_bytes();
    let found: Vec<usize> = (0..bytes.len())
        .filter(|at| bytes[*at..].starts_with(path))
        .collect();
    ensure!(
        !found.is_empty(),
        "{} has no library path {}",
        program.display(),
        library_path.display()
    );
    for at in found {
        bytes[at..at + path.len()].fill(0);
    }
    fs::write(program, bytes)?;
    Ok(())
}
