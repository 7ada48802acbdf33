//! Writing a document where the user wants it.
//!
//! The place is opened before tracing, so that a bad path fails at once; a file appears under its
//! name only when it is complete; and what was collected is saved elsewhere when that fails. All is
//! done with the rights of an account, so that root's are never used on a path that a user chose.

mod inherited;
mod location;
pub mod pattern;

use std::{
    env,
    fmt::{self, Display, Formatter},
    fs::{File, Metadata},
    io::{self, BufWriter, Seek as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::fcntl::{OFlag, openat};
use serde::Serialize;
use thiserror::Error;

pub use self::inherited::remember_inherited;
use self::{
    inherited::{Inherited, inherited},
    location::{Draft, Found, Location, NEW_FILE, find, no_file_in},
};
use crate::{caller::Account, target::printable};

/// An output that is certain to be writable.
#[derive(Debug)]
pub struct Output {
    place: Place,
    account: Account,
}

#[derive(Debug)]
enum Place {
    /// A file: it appears in its directory when it is complete.
    Atomic { location: Location, draft: Draft },
    /// A file that cannot be replaced: it is emptied and written when the document is there.
    Kept(File),
    /// A pipe, a device or an open descriptor.
    Special(File),
}

/// A document could not be written to its place.
#[derive(Debug, Error)]
pub struct WriteError {
    /// Why.
    pub error: io::Error,
    /// The file that has it instead, or why there is none.
    pub saved: io::Result<PathBuf>,
}

impl Display for WriteError {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self { error, saved } = self;
        match saved {
            Ok(path) => write!(formatter, "{error}; saved as {} instead", printable(path)),
            Err(second) => write!(
                formatter,
                "{error}; nor could it be saved in {}: {second}",
                printable(&env::temp_dir())
            ),
        }
    }
}

impl Output {
    /// Makes sure that this account can write `path`.
    ///
    /// # Errors
    /// When it cannot, or when the path is `-`: stdout is not ours.
    pub fn create(path: &Path, account: &Account) -> io::Result<Self> {
        let place = match inherited(path, &Inherited::ours())? {
            Some(file) => Place::Special(file),
            None => account.with_rights(|| Place::create(path))?,
        };
        Ok(Self {
            place,
            account: account.clone(),
        })
    }

    /// Writes the document as JSON.
    ///
    /// # Errors
    /// When the disk is full, or the like; the error tells where the document is instead.
    pub fn write_json(self, document: &impl Serialize) -> Result<(), WriteError> {
        let Err(error) = self.write(document) else {
            return Ok(());
        };
        let account = self.account.clone();
        // What there is of the file can be what has filled the disk.
        drop(self);
        let saved = save(document, &account);
        Err(WriteError { error, saved })
    }

    /// Writes what is known up to now. The document at the end takes its place, or follows it in a pipe.
    ///
    /// # Errors
    /// When the disk is full, or the like.
    pub fn write_so_far(&self, document: &impl Serialize) -> io::Result<()> {
        let Place::Atomic { location, .. } = &self.place else {
            return self.write(document);
        };
        let draft = self.account.with_rights(|| Draft::create(location))?;
        let written = to_json(&draft.file, document)
            .and_then(|()| self.account.with_rights(|| draft.publish(location)));
        if written.is_err()
            && let Some(name) = &draft.name
        {
            let _ = self.account.with_rights(|| location.remove(name));
        }
        written
    }

    fn write(&self, document: &impl Serialize) -> io::Result<()> {
        match &self.place {
            Place::Special(file) => to_json(file, document),
            Place::Kept(file) => {
                file.set_len(0)?;
                let mut begin = file;
                begin.rewind()?;
                to_json(file, document)
            }
            Place::Atomic { location, draft } => {
                to_json(&draft.file, document)?;
                draft.file.sync_all()?;
                self.account.with_rights(|| draft.publish(location))
            }
        }
    }

    /// Whether this is the file at that location, or a link to it.
    fn is_at(&self, other: &Location) -> io::Result<bool> {
        let same =
            |one: &Metadata, other: &Metadata| (one.dev(), one.ino()) == (other.dev(), other.ino());
        let existing = match &self.place {
            Place::Atomic { location, .. } => {
                let directories = (location.directory.metadata()?, other.directory.metadata()?);
                if location.name == other.name && same(&directories.0, &directories.1) {
                    return Ok(true);
                }
                location.existing.as_ref().map(File::metadata)
            }
            Place::Kept(file) | Place::Special(file) => Some(file.metadata()),
        };
        Ok(match (existing.transpose()?, &other.existing) {
            (Some(ours), Some(theirs)) => ours.is_file() && same(&ours, &theirs.metadata()?),
            _ => false,
        })
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Place::Atomic { location, draft } = &self.place
            && let Some(name) = &draft.name
        {
            // Once renamed, there is nothing of that name.
            let _ = self.account.with_rights(|| location.remove(name));
        }
    }
}

impl Place {
    fn create(path: &Path) -> io::Result<Self> {
        let location = match find(path)? {
            Found::Special(file) => return Ok(Self::Special(file)),
            Found::File(location) => location,
        };
        if let Some(existing) = &location.existing {
            if location.is_mount_point(existing)? {
                // The kernel does not let it be replaced (rename(2): EBUSY).
                return Ok(Self::Kept(existing.try_clone()?));
            }
            location.check_replaceable(&existing.metadata()?)?;
        }
        let draft = Draft::create(&location)
            .map_err(|error| no_file_in(&location.shown_directory, &error))?;
        Ok(Self::Atomic { location, draft })
    }
}

/// Where lines are written to as they come.
#[derive(Debug)]
pub struct LogFile {
    file: File,
    /// What the file had before is to go.
    replaces: bool,
}

impl LogFile {
    /// Opens it with the rights of an account. What a file has stays until [`begin`](Self::begin).
    ///
    /// # Errors
    /// When the account cannot write it, when it is the place of the output, or when the path is `-`:
    /// stdout is not ours.
    pub fn open(path: &Path, account: &Account, output: Option<&Output>) -> io::Result<Self> {
        if let Some(file) = inherited(path, &Inherited::ours())? {
            return Self::in_place(file, output);
        }
        let file = account.with_rights(|| {
            let location = match Self::find(path, output)? {
                Found::Special(file) => return Ok(Err(file)),
                Found::File(location) => location,
            };
            let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let name = location.name.as_os_str();
            let file = openat(&location.directory, name, flags, NEW_FILE)
                .map_err(|error| no_file_in(&location.shown_directory, &error.into()))?;
            Ok(Ok(File::from(file)))
        })?;
        match file {
            Ok(file) => Ok(Self {
                file,
                replaces: true,
            }),
            Err(file) => Self::in_place(file, output),
        }
    }

    /// Whether it could be opened, without creating it.
    ///
    /// # Errors
    /// Those of [`open`](Self::open).
    pub fn check(path: &Path, account: &Account, output: Option<&Output>) -> io::Result<()> {
        if let Some(file) = inherited(path, &Inherited::ours())? {
            return Self::in_place(file, output).map(drop);
        }
        account.with_rights(|| match Self::find(path, output)? {
            Found::Special(file) => Self::in_place(file, output).map(drop),
            Found::File(location) if location.existing.is_some() => Ok(()),
            Found::File(location) => location.check_writable(),
        })
    }

    fn find(path: &Path, output: Option<&Output>) -> io::Result<Found> {
        let found = find(path)?;
        if let Found::File(location) = &found
            && let Some(output) = output
            && output.is_at(location)?
        {
            return Err(same_as_output());
        }
        Ok(found)
    }

    fn in_place(file: File, output: Option<&Output>) -> io::Result<Self> {
        // Two descriptors of one file are how a shell joins outputs, and no mistake.
        if let Some(Place::Atomic { location, .. }) = output.map(|output| &output.place)
            && let Some(existing) = &location.existing
        {
            let (one, other) = (existing.metadata()?, file.metadata()?);
            if (one.dev(), one.ino()) == (other.dev(), other.ino()) {
                return Err(same_as_output());
            }
        }
        Ok(Self {
            file,
            replaces: false,
        })
    }

    /// Whether both are one file, in which they would write over each other.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn is_same(&self, other: &LogFile) -> io::Result<bool> {
        let (one, other) = (self.file.metadata()?, other.file.metadata()?);
        Ok(one.is_file() && (one.dev(), one.ino()) == (other.dev(), other.ino()))
    }

    /// Something that writes to it.
    ///
    /// # Errors
    /// When there are too many open files.
    pub fn writer(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Removes what the file had before. Pipes, devices and descriptors that we were handed have
    /// nothing to remove.
    ///
    /// # Errors
    /// When the file cannot be emptied.
    pub fn begin(&self) -> io::Result<()> {
        match self.replaces {
            true => self.file.set_len(0),
            false => Ok(()),
        }
    }
}

fn same_as_output() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        "this and the JSON (-o) would be in one file; name two",
    )
}

/// Writes a document as it stands in files.
///
/// # Errors
/// When it cannot be written.
pub fn to_json(out: impl io::Write, document: &impl Serialize) -> io::Result<()> {
    let mut writer = BufWriter::new(out);
    serde_json::to_writer_pretty(&mut writer, document)?;
    writer.write_all(b"\n")?;
    writer.flush()
}

/// Writes the document to a new file among the temporary ones.
fn save(document: &impl Serialize, account: &Account) -> io::Result<PathBuf> {
    account.with_rights(|| {
        let file = tempfile::Builder::new()
            .prefix("expert-trace-")
            .suffix(".json")
            .tempfile()?;
        to_json(file.as_file(), document)?;
        file.as_file().sync_all()?;
        let (_, path) = file.keep()?;
        Ok(path)
    })
}

#[cfg(test)]
mod tests;
