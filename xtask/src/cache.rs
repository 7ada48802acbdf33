//! Things that take long to make and are kept from one run to the next, in
//! `$XDG_CACHE_HOME/expert-trace`.
//!
//! The name of an entry says what it was made from, so an entry never changes: whatever would make
//! it different gives it another name. It is made under a name of its own and renamed when it is
//! complete, so an entry that is there is whole. A lock keeps two runs from making it at once.

use std::env;
use std::fmt::Write;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256, Sha512};

/// The cache's directory, which exists.
pub fn directory() -> Result<PathBuf> {
    let absolute = |variable| {
        env::var_os(variable)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let cache = absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .context("no place for the cache: set HOME or XDG_CACHE_HOME to an absolute path")?
        .join("expert-trace");
    fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
    Ok(cache)
}

/// The entry of this name. If there is none, `make` makes it at the path it is given, where it may
/// find what an interrupted run has left.
pub fn entry(name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    entry_in(&directory()?, name, make)
}

fn entry_in(cache: &Path, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let entry = cache.join(name);
    if entry.exists() {
        return Ok(entry);
    }
    let _lock = lock(&cache.join(format!("{name}.lock")))?;
    if !entry.exists() {
        let partial = cache.join(format!("{name}.partial"));
        make(&partial)?;
        fs::rename(&partial, &entry)
            .with_context(|| format!("cannot rename {} to {name}", partial.display()))?;
    }
    Ok(entry)
}

/// Waits for other runs; the lock lasts until the file is dropped, or the process ends.
fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        eprintln!("waiting for another run that holds {}", path.display());
    }
    file.lock()
        .with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// Removes a directory and all it contains, if it is there.
pub fn remove_directory(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Identifies what an entry is made from, as a part of its name.
pub fn key(parts: &[&str]) -> String {
    let mut key = sha256_hex(format!("{parts:?}").as_bytes());
    key.truncate(12);
    key
}

/// SHA-256 in hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// SHA-512 in hexadecimal.
pub fn sha512_hex(bytes: &[u8]) -> String {
    hex(&Sha512::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An empty directory, removed at the end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(test: &str) -> Self {
            let path = env::temp_dir().join(format!("xtask-{}-{test}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn an_entry_is_made_once() {
        let cache = Scratch::new("once");
        let make = |path: &Path| Ok(fs::write(path, "made")?);
        let entry = entry_in(&cache.0, "thing", make).unwrap();
        let again = entry_in(&cache.0, "thing", |_| panic!("it is already there")).unwrap();
        assert_eq!(entry, again);
        assert_eq!(fs::read_to_string(entry).unwrap(), "made");
    }

    #[test]
    fn an_interrupted_entry_is_not_taken_as_made_and_can_be_continued() {
        let cache = Scratch::new("interrupted");
        let interrupted = entry_in(&cache.0, "thing", |path| {
            fs::write(path, "half")?;
            anyhow::bail!("interrupted")
        });
        assert!(interrupted.is_err());
        assert!(!cache.0.join("thing").exists());
        let entry = entry_in(&cache.0, "thing", |path| {
            assert_eq!(fs::read_to_string(path)?, "half");
            Ok(fs::write(path, "whole")?)
        });
        assert_eq!(fs::read_to_string(entry.unwrap()).unwrap(), "whole");
    }

    #[test]
    fn runs_that_want_the_same_entry_make_it_once() {
        let cache = Scratch::new("race");
        let made = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    entry_in(&cache.0, "thing", |path| {
                        made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        std::thread::sleep(std::time::Duration::from_millis(50));
                        Ok(fs::write(path, "made")?)
                    })
                    .unwrap();
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }

    #[test]
    fn keys_tell_the_parts_apart() {
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(key(&["a", "b"]), key(&["ab"]));
        assert_ne!(key(&["a", "b"]), key(&["b", "a"]));
    }

    #[test]
    fn sha256_is_written_in_hexadecimal() {
        assert_eq!(
            sha256_hex(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
