//! Files that appear under their names when they are complete.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
};

use anyhow::Context as _;

/// Writes a file beside its place, and renames it; what is no regular file is written as it is, and `-` is
/// stdout.
///
/// # Errors
/// When it cannot be written; what was there is unchanged then.
pub fn write(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    if path == Path::new("-") {
        return print(content);
    }
    write_file(path, content)
        .with_context(|| format!("cannot write {}", super::printable(&path.to_string_lossy())))
}

/// Writes to stdout. A reader that is gone has read enough.
///
/// # Errors
/// When stdout cannot be written for another reason.
pub fn print(content: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(content).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to stdout"),
    }
}

fn write_file(path: &Path, content: &[u8]) -> io::Result<()> {
    // What may not be written is not replaced.
    let existing = match File::options().write(true).open(path) {
        Ok(file) => Some(file.metadata()?).map(|metadata| (file, metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let (place, permissions) = match existing {
        Some((mut special, metadata)) if !metadata.is_file() => {
            return special.write_all(content);
        }
        // A link is followed, so that the file it leads to is replaced and not the link.
        Some((_, metadata)) => (fs::canonicalize(path)?, Some(metadata.permissions())),
        None => (path.to_owned(), None),
    };
    let directory = match place.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // Made as any other file is, since tempfile's own are for their user alone.
    let mut draft = tempfile::Builder::new()
        .prefix(".expert-trace-")
        .make_in(directory, |path| File::create_new(path))?;
    draft.as_file_mut().write_all(content)?;
    if let Some(permissions) = permissions {
        draft.as_file().set_permissions(permissions)?;
    }
    draft.as_file().sync_all()?;
    draft.persist(&place).map_err(|error| error.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("profile.json");
        for content in ["longer than the next", "short"] {
            write(&path, content.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
        let names = fs::read_dir(directory.path()).unwrap();
        assert_eq!(names.count(), 1, "nothing else is left");
    }

    #[test]
    fn what_may_not_be_written_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let error = write(directory.path(), b"x").unwrap_err();
        assert!(format!("{error:#}").contains("cannot write"), "{error:#}");
        let path = directory.path().join("missing").join("profile.json");
        assert!(write(&path, b"x").is_err());
    }
}
