//! Where a result goes: a file that appears under its name when it is complete, or stdout.
//!
//! Nothing here needs more than every system has. What a capture writes is written with the rights of
//! somebody else, and has a module of its own (`export`).

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use tempfile::NamedTempFile;

use crate::profile::printable;

/// Bytes that are collected before they are written.
const BUFFER: usize = 256 << 10;

/// An output that could be opened.
#[derive(Debug)]
pub struct Output {
    place: Place,
    /// Its name, for messages.
    shown: String,
}

#[derive(Debug)]
enum Place {
    /// A file beside its place.
    Draft {
        draft: NamedTempFile<File>,
        path: PathBuf,
    },
    /// A pipe or a device, which nothing can replace.
    Special(File),
    Stdout,
}

/// Writes what is there as a whole; `-` is stdout, of which a reader that is gone has read enough.
///
/// # Errors
/// When it cannot be written; what was there is unchanged then.
pub fn write(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let output = Output::create(path, None)?;
    match output.write(|out| Ok(out.write_all(content)?)) {
        Err(error) if path == Path::new("-") && reader_is_gone(&error) => Ok(()),
        result => result,
    }
}

/// The same to stdout.
///
/// # Errors
/// When stdout cannot be written, and somebody reads it.
pub fn print(content: &[u8]) -> anyhow::Result<()> {
    write(Path::new("-"), content)
}

/// Whether something could not be written because nobody reads it any more.
pub fn reader_is_gone(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let cause = cause.downcast_ref::<io::Error>();
        cause.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
    })
}

impl Output {
    /// Opens it. `-` is stdout.
    ///
    /// # Errors
    /// When it cannot be written, or is `input`, which has to stay until it was read.
    pub fn create(path: &Path, input: Option<&Path>) -> anyhow::Result<Self> {
        if path == Path::new("-") {
            return Ok(Self {
                place: Place::Stdout,
                shown: "stdout".to_owned(),
            });
        }
        let shown = printable(&path.to_string_lossy());
        let failed = || format!("cannot write {shown}");
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let place = Place::draft(path).with_context(failed)?;
                return Ok(Self { place, shown });
            }
            Err(error) => return Err(error).with_context(failed),
        };
        if metadata.is_dir() {
            bail!("cannot write {shown}: it is a directory: name a file");
        }
        // What may not be written is not replaced.
        let file = File::options().write(true).open(path);
        let file = file.with_context(failed)?;
        if !metadata.is_file() {
            let place = Place::Special(file);
            return Ok(Self { place, shown });
        }
        // What a link leads to is replaced, and not the link.
        let real = fs::canonicalize(path).with_context(failed)?;
        let input = input.and_then(|input| fs::canonicalize(input).ok());
        if input.is_some_and(|input| input == real) {
            bail!("{shown} is the input as well: name another file to write");
        }
        let place = Place::draft(&real).with_context(failed)?;
        if let Place::Draft { draft, .. } = &place {
            // Before anything is in it that others may not read.
            draft
                .as_file()
                .set_permissions(metadata.permissions())
                .with_context(|| format!("cannot give {shown} its rights"))?;
        }
        Ok(Self { place, shown })
    }

    /// Has it written; the file gets its name at the end.
    ///
    /// # Errors
    /// Those of `write`, and when the disk is full, or the like.
    pub fn write<T>(
        self,
        write: impl FnOnce(&mut (dyn Write + Send)) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let Self { place, shown } = self;
        match place {
            Place::Stdout => buffered(io::stdout(), &shown, write),
            Place::Special(file) => buffered(file, &shown, write),
            Place::Draft { draft, path } => {
                let result = buffered(draft.as_file(), &shown, write)?;
                let failed = || format!("cannot write {shown}");
                draft.as_file().sync_all().with_context(failed)?;
                draft
                    .persist(&path)
                    .map_err(|error| error.error)
                    .with_context(failed)?;
                Ok(result)
            }
        }
    }
}

impl Place {
    fn draft(path: &Path) -> io::Result<Self> {
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        // Not as private as temporary files are: the file is to have the rights that others get.
        let draft = tempfile::Builder::new()
            .prefix(".expert-trace-")
            .make_in(directory, |path| File::create_new(path))?;
        let path = path.to_owned();
        Ok(Self::Draft { draft, path })
    }
}

fn buffered<T>(
    out: impl Write + Send,
    shown: &str,
    write: impl FnOnce(&mut (dyn Write + Send)) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let mut out = BufWriter::with_capacity(BUFFER, Named { out, shown });
    let result = write(&mut out)?;
    out.flush()?;
    Ok(result)
}

/// Says in its errors what could not be written: others come from what is read meanwhile.
struct Named<'a, W> {
    out: W,
    shown: &'a str,
}

impl<W> Named<'_, W> {
    fn named(&self, error: io::Error) -> io::Error {
        let text = format!("cannot write {}: {error}", self.shown);
        io::Error::new(error.kind(), text)
    }
}

impl<W: Write> Write for Named<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes).map_err(|error| self.named(error))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush().map_err(|error| self.named(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_when_it_is_complete() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        fs::write(&path, "longer than the next").unwrap();
        let names = || fs::read_dir(directory.path()).unwrap().count();

        let output = Output::create(&path, None).unwrap();
        let failed = output.write(|out| -> anyhow::Result<()> {
            out.write_all(b"half")?;
            bail!("stop")
        });
        assert!(failed.is_err());
        let before = b"longer than the next".to_vec();
        assert_eq!((fs::read(&path).unwrap(), names()), (before, 1));

        write(&path, b"whole").unwrap();
        assert_eq!((fs::read(&path).unwrap(), names()), (b"whole".into(), 1));
    }

    #[cfg(unix)]
    #[test]
    fn a_file_keeps_its_rights() {
        use std::{fs::Permissions, os::unix::fs::PermissionsExt as _};

        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        write(&path, b"x").unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[cfg(unix)]
    #[test]
    fn what_a_link_leads_to_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let [real, link] = ["real", "link"].map(|name| directory.path().join(name));
        fs::write(&real, "before").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        write(&link, b"after").unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&real).unwrap(), b"after");
    }

    #[test]
    fn bad_places_fail_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "").unwrap();
        for (path, input) in [
            (directory.path(), None),
            (&path, Some(path.as_path())),
            (&path.join("below"), None),
            (&directory.path().join("none/file"), None),
        ] {
            let error = Output::create(path, input).unwrap_err();
            let file = path.file_name().unwrap().to_string_lossy();
            assert!(format!("{error:#}").contains(&*file), "{error:#}");
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    /// Of what is full, the name is said, and not that of what is read meanwhile.
    #[cfg(target_os = "linux")]
    #[test]
    fn what_cannot_be_written_is_named() {
        let full = Path::new("/dev/full");
        let error = format!("{:#}", write(full, b"x").unwrap_err());
        assert!(error.starts_with("cannot write /dev/full: "), "{error}");
        assert!(write(Path::new("/dev/null"), b"x").is_ok());
    }

    #[test]
    fn a_reader_that_is_gone_is_told_from_other_errors() {
        let of = |kind: io::ErrorKind| {
            let named = Named {
                out: io::sink(),
                shown: "stdout",
            };
            let error = anyhow::Error::from(named.named(kind.into()));
            reader_is_gone(&error.context("while it was exported"))
        };
        assert!(of(io::ErrorKind::BrokenPipe));
        assert!(!of(io::ErrorKind::StorageFull));
    }
}
