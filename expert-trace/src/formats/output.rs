//! Where an export goes: a file that appears under its name when it is complete, or stdout.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use tempfile::NamedTempFile;

use super::text::printable;

/// Bytes that are collected before they are written.
const BUFFER: usize = 256 << 10;

/// An output that could be opened.
#[derive(Debug)]
pub enum Output {
    /// A file beside its place.
    Draft {
        /// The file.
        draft: NamedTempFile<File>,
        /// Its place.
        path: PathBuf,
    },
    /// A pipe or a device, which nothing can replace.
    InPlace(File),
    /// Standard output.
    Stdout,
}

impl Output {
    /// Opens it. `-` is stdout.
    ///
    /// # Errors
    /// When it cannot be written, or is `input`, which has to stay until it was read.
    pub fn create(path: &Path, input: &Path) -> anyhow::Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::Stdout);
        }
        let shown = printable(&path.to_string_lossy());
        let Ok(metadata) = fs::metadata(path) else {
            return Self::draft(path).with_context(|| format!("cannot write {shown}"));
        };
        if metadata.is_dir() {
            bail!("{shown} is a directory: name a file");
        }
        // What may not be written is not replaced.
        let file = File::options().write(true).open(path);
        let file = file.with_context(|| format!("cannot write {shown}"))?;
        if !metadata.is_file() {
            return Ok(Self::InPlace(file));
        }
        // What a link leads to is replaced, and not the link.
        let place = fs::canonicalize(path).with_context(|| format!("cannot write {shown}"))?;
        if fs::canonicalize(input).is_ok_and(|input| input == place) {
            bail!("{shown} is the input as well: name another file to write");
        }
        let output = Self::draft(&place).with_context(|| format!("cannot write {shown}"))?;
        if let Self::Draft { draft, .. } = &output {
            fs::set_permissions(draft.path(), metadata.permissions())
                .with_context(|| format!("cannot give {shown} its rights"))?;
        }
        Ok(output)
    }

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

    /// Has it written; the file gets its name at the end.
    ///
    /// # Errors
    /// Those of `write`, and when the disk is full, or the like.
    pub fn write<T>(
        self,
        write: impl FnOnce(&mut (dyn Write + Send)) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        fn buffered<T>(
            file: impl Write + Send,
            write: impl FnOnce(&mut (dyn Write + Send)) -> anyhow::Result<T>,
        ) -> anyhow::Result<T> {
            let mut file = BufWriter::with_capacity(BUFFER, file);
            let result = write(&mut file)?;
            file.flush()?;
            Ok(result)
        }
        match self {
            Self::Stdout => buffered(io::stdout(), write),
            Self::InPlace(file) => buffered(file, write),
            Self::Draft { draft, path } => {
                let result = buffered(draft.as_file(), write)?;
                draft.as_file().sync_all()?;
                draft
                    .persist(&path)
                    .map_err(|error| error.error)
                    .with_context(|| {
                        format!("cannot rename to {}", printable(&path.to_string_lossy()))
                    })?;
                Ok(result)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_when_it_is_complete() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        fs::write(&path, "before").unwrap();
        let names = || fs::read_dir(directory.path()).unwrap().count();
        let input = Path::new("in");

        let output = Output::create(&path, input).unwrap();
        let failed = output.write(|out| -> anyhow::Result<()> {
            out.write_all(b"half")?;
            bail!("stop")
        });
        assert!(failed.is_err());
        assert_eq!((fs::read(&path).unwrap(), names()), (b"before".into(), 1));

        let output = Output::create(&path, input).unwrap();
        output.write(|out| Ok(out.write_all(b"whole")?)).unwrap();
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
        let output = Output::create(&path, Path::new("in")).unwrap();
        output.write(|out| Ok(out.write_all(b"x")?)).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn bad_places_fail_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "").unwrap();
        for (path, input) in [
            (directory.path(), path.as_path()),
            (&path, &path),
            (&path.join("below"), Path::new("in")),
            (&directory.path().join("none/file"), Path::new("in")),
        ] {
            assert!(Output::create(path, input).is_err(), "{}", path.display());
        }
    }
}
