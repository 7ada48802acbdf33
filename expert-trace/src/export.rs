//! Writing a document where the user wants it.
//!
//! The place is opened before tracing, so that a bad path fails at once; a file appears under its
//! name only when it is complete.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use serde::Serialize;
use tempfile::NamedTempFile;

/// An output that is certain to be writable.
#[derive(Debug)]
pub enum Output {
    /// A file: written beside its place, then renamed.
    Atomic {
        /// The place.
        path: PathBuf,
        /// What becomes the file.
        file: NamedTempFile,
    },
    /// A pipe or a device: written in place.
    InPlace(File),
}

impl Output {
    /// Makes sure that `path` can be written.
    ///
    /// # Errors
    /// When it cannot.
    pub fn create(path: &Path) -> io::Result<Self> {
        // A link is followed, so that the file it leads to is replaced and not the link.
        let path = match fs::canonicalize(path) {
            Ok(path) => path,
            Err(error) if path.is_symlink() => return Err(error),
            Err(_) => path.to_owned(),
        };
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => Err(io::Error::new(
                io::ErrorKind::IsADirectory,
                "is a directory; name a file in it",
            )),
            Ok(metadata) if !metadata.is_file() => {
                Ok(Self::InPlace(OpenOptions::new().write(true).open(&path)?))
            }
            _ => {
                let directory = match path.parent() {
                    Some(parent) if !parent.as_os_str().is_empty() => parent,
                    _ => Path::new("."),
                };
                let file = tempfile::Builder::new()
                    .prefix(".expert-trace-")
                    .permissions(fs::Permissions::from_mode(0o644))
                    .tempfile_in(directory)
                    .map_err(|error| no_file_in(directory, &error))?;
                Ok(Self::Atomic { path, file })
            }
        }
    }

    /// Writes the document as JSON.
    ///
    /// # Errors
    /// When the disk is full, or the like.
    pub fn write_json(self, document: &impl Serialize) -> io::Result<()> {
        let write = |file: &File| -> io::Result<()> {
            let mut writer = BufWriter::new(file);
            serde_json::to_writer_pretty(&mut writer, document)?;
            writer.write_all(b"\n")?;
            writer.flush()
        };
        match self {
            Self::InPlace(file) => write(&file),
            Self::Atomic { path, file } => {
                write(file.as_file())?;
                file.as_file().sync_all()?;
                file.persist(path)?;
                Ok(())
            }
        }
    }
}

/// The error says nothing of the file that the user named, and is about one that he did not name.
fn no_file_in(directory: &Path, error: &io::Error) -> io::Error {
    let kind = error.kind();
    let shown = directory.display();
    let text = if directory.is_dir() {
        format!("no file can be created in {shown} ({kind}); name another place")
    } else {
        format!("there is no directory {shown}; create it first")
    };
    io::Error::new(kind, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_when_it_is_complete() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("stats.json");
        let output = Output::create(&path).unwrap();
        assert!(!path.exists());
        output.write_json(&[1, 2]).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "[\n  1,\n  2\n]\n");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn nothing_is_left_behind_when_it_is_not_written() {
        let directory = tempfile::tempdir().unwrap();
        drop(Output::create(&directory.path().join("stats.json")).unwrap());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn bad_places_are_refused_at_once() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Output::create(directory.path()).is_err());
        assert!(Output::create(&directory.path().join("no/such/file")).is_err());
        let dangling = directory.path().join("dangling");
        std::os::unix::fs::symlink("nowhere", &dangling).unwrap();
        assert!(Output::create(&dangling).is_err());
    }

    #[test]
    fn devices_are_written_in_place() {
        let output = Output::create(Path::new("/dev/null")).unwrap();
        assert!(matches!(output, Output::InPlace(_)));
        output.write_json(&1).unwrap();
    }
}
