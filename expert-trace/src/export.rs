//! Writing a document where the user wants it.
//!
//! The place is opened before tracing, so that a bad path fails at once; a file appears under its
//! name only when it is complete; and what was collected is saved elsewhere when that fails. All is
//! done with the rights of an account, so that root's are never used on a path that a user chose.

use std::{
    env,
    fmt::{self, Display, Formatter},
    fs::{self, File, Metadata, OpenOptions},
    io::{self, BufWriter, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::fs::{FileTypeExt as _, OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use serde::Serialize;
use tempfile::NamedTempFile;
use thiserror::Error;

use crate::{caller::Account, target::printable};

/// An output that is certain to be writable.
#[derive(Debug)]
pub struct Output {
    place: Place,
    account: Account,
}

#[derive(Debug)]
enum Place {
    /// A file: written beside its place, then renamed.
    Atomic {
        path: PathBuf,
        /// What becomes the file. We remove it ourselves: `tempfile` would do it as root.
        draft: NamedTempFile,
    },
    /// A pipe, a device or an open descriptor: written in place.
    InPlace(File),
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
        let place = match inherited(path)? {
            Some(file) => Place::InPlace(file),
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

    fn write(&self, document: &impl Serialize) -> io::Result<()> {
        match &self.place {
            Place::InPlace(file) => to_json(file, document),
            Place::Atomic { path, draft } => {
                to_json(draft.as_file(), document)?;
                draft.as_file().sync_all()?;
                self.account.with_rights(|| fs::rename(draft, path))
            }
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Place::Atomic { draft, .. } = &self.place {
            // Once renamed, there is nothing of that name.
            let _ = self.account.with_rights(|| fs::remove_file(draft));
        }
    }
}

impl Place {
    fn create(path: &Path) -> io::Result<Self> {
        // A link is followed, so that the file it leads to is replaced and not the link.
        let path = match fs::canonicalize(path) {
            Ok(path) => path,
            Err(error) if path.is_symlink() => return Err(error),
            Err(_) => path.to_owned(),
        };
        match fs::metadata(&path) {
            Ok(metadata) if !metadata.is_file() => {
                return Ok(Self::InPlace(open_special(&path, &metadata)?));
            }
            // The directory's owner could replace any file in it, and still is not to do so by
            // mistake: what may not be written is not replaced.
            Ok(_) => drop(OpenOptions::new().write(true).open(&path)?),
            Err(_) => {}
        }
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let draft = tempfile::Builder::new()
            .prefix(".expert-trace-")
            .permissions(fs::Permissions::from_mode(0o644))
            .disable_cleanup(true)
            .tempfile_in(directory)
            .map_err(|error| no_file_in(directory, &error))?;
        Ok(Self::Atomic { path, draft })
    }
}

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

/// Opens what lines are written to as they come, with the rights of an account. A file is emptied.
///
/// # Errors
/// When the account cannot write it, or when the path is `-`: stdout is not ours.
pub fn open_log(path: &Path, account: &Account) -> io::Result<File> {
    if let Some(file) = inherited(path)? {
        return Ok(file);
    }
    account.with_rights(|| match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => open_special(path, &metadata),
        _ => File::create(path),
    })
}

/// Opens something that is there and no regular file.
fn open_special(path: &Path, metadata: &Metadata) -> io::Result<File> {
    if metadata.is_dir() {
        return Err(io::Error::new(
            io::ErrorKind::IsADirectory,
            "is a directory; name a file in it",
        ));
    }
    let mut options = OpenOptions::new();
    options.write(true);
    if !metadata.file_type().is_fifo() {
        return options.open(path);
    }
    // A FIFO opens when somebody reads it. Who waits for that is to know (fifo(7): ENXIO).
    let probe = options.clone().custom_flags(libc::O_NONBLOCK).open(path);
    if matches!(&probe, Err(error) if error.raw_os_error() == Some(libc::ENXIO)) {
        say!("waiting for somebody to read {}", printable(path));
    }
    // The probe, which makes no difference to a reader, keeps it until we have opened it ourselves.
    options.open(path)
}

/// Descriptors that we open for ourselves start after stdin, stdout and stderr.
const FIRST_OWN_DESCRIPTOR: RawFd = 3;

/// A copy of the open descriptor that a path names, if it names one.
///
/// Opening such a path opens the file anew, which fails for sockets, and for what sudo's caller has
/// opened and we as that user may not (proc(5), `/proc/PID/fd`).
fn inherited(path: &Path) -> io::Result<Option<File>> {
    if path == Path::new("-") {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "stdout belongs to the program; name a file, or an open descriptor such as /dev/fd/2",
        ));
    }
    let Some(number) = descriptor(path) else {
        return Ok(None);
    };
    let refused = |reason: &str| {
        let reason = format!("descriptor {number} {reason}");
        Err(io::Error::new(io::ErrorKind::InvalidInput, reason))
    };
    // SAFETY: the call takes plain numbers.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, FIRST_OWN_DESCRIPTOR) };
    if copy < 0 {
        return refused("is not open; sudo hands on 0, 1 and 2 alone");
    }
    // SAFETY: the descriptor is new and ours.
    let copy = unsafe { OwnedFd::from_raw_fd(copy) };
    // SAFETY: the call takes plain numbers.
    let flags = unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 || flags & libc::O_ACCMODE == libc::O_RDONLY {
        return refused("is not open for writing");
    }
    Ok(Some(copy.into()))
}

fn descriptor(path: &Path) -> Option<RawFd> {
    let path = path.to_str()?;
    match path {
        "/dev/stdin" => return Some(libc::STDIN_FILENO),
        "/dev/stdout" => return Some(libc::STDOUT_FILENO),
        "/dev/stderr" => return Some(libc::STDERR_FILENO),
        _ => {}
    }
    let number = path
        .strip_prefix("/dev/fd/")
        .or_else(|| path.strip_prefix("/proc/self/fd/"))?;
    number.parse().ok().filter(|number| *number >= 0)
}

fn to_json(file: &File, document: &impl Serialize) -> io::Result<()> {
    let mut writer = BufWriter::new(file);
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
mod tests {
    use super::*;
    use nix::unistd::{Gid, Uid, geteuid, mkfifo, pipe};
    use std::{
        io::Read as _,
        os::{
            fd::AsFd as _,
            unix::fs::{MetadataExt as _, chown, symlink},
            unix::net::UnixStream,
        },
    };

    fn ours() -> Account {
        Account::current().unwrap()
    }

    /// Somebody with a directory, beside one of root's. None when we are not root.
    fn stranger() -> Option<(Account, tempfile::TempDir, tempfile::TempDir)> {
        if !geteuid().is_root() {
            eprintln!("not tested: needs root");
            return None;
        }
        const ID: u32 = 54321;
        let account = Account::by_ids(Uid::from_raw(ID), Gid::from_raw(ID)).unwrap();
        let theirs = tempfile::tempdir().unwrap();
        chown(theirs.path(), Some(ID), Some(ID)).unwrap();
        let roots = tempfile::tempdir().unwrap();
        fs::set_permissions(roots.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Some((account, theirs, roots))
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let name = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
        entries.map(|entry| name(entry.unwrap())).collect()
    }

    #[test]
    fn a_file_appears_when_it_is_complete() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("stats.json");
        let output = Output::create(&path, &ours()).unwrap();
        assert!(!path.exists());
        output.write_json(&[1, 2]).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "[\n  1,\n  2\n]\n");
        assert_eq!(names(directory.path()), ["stats.json"]);
    }

    #[test]
    fn nothing_is_left_behind_when_it_is_not_written() {
        let directory = tempfile::tempdir().unwrap();
        let output = Output::create(&directory.path().join("stats.json"), &ours()).unwrap();
        assert_eq!(names(directory.path()).len(), 1);
        drop(output);
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn bad_places_are_refused_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let dangling = directory.path().join("dangling");
        symlink("nowhere", &dangling).unwrap();
        let missing = directory.path().join("no/such/file");
        for path in [directory.path(), &missing, &dangling] {
            assert!(Output::create(path, &ours()).is_err(), "{path:?}");
        }
        for path in [directory.path(), &missing] {
            assert!(open_log(path, &ours()).is_err(), "{path:?}");
        }
        for (path, reason) in [
            ("-", "/dev/fd/"),
            ("/dev/fd/1000000", "is not open"),
            ("/proc/self/fd/1000000", "is not open"),
        ] {
            let output = Output::create(Path::new(path), &ours()).unwrap_err();
            let log = open_log(Path::new(path), &ours()).unwrap_err();
            assert!(output.to_string().contains(reason), "{output}");
            assert_eq!(output.to_string(), log.to_string());
        }
    }

    #[test]
    fn devices_are_written_in_place() {
        let output = Output::create(Path::new("/dev/null"), &ours()).unwrap();
        assert!(matches!(output.place, Place::InPlace(_)));
        output.write_json(&1).unwrap();
    }

    #[test]
    fn symbolic_links_are_followed_and_hard_ones_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("file"), "old").unwrap();
        fs::hard_link(path("file"), path("hard")).unwrap();
        symlink("file", path("soft")).unwrap();
        let output = Output::create(&path("soft"), &ours()).unwrap();
        output.write_json(&1).unwrap();
        assert!(path("soft").is_symlink());
        assert_eq!(fs::read_to_string(path("file")).unwrap(), "1\n");
        assert_eq!(fs::read_to_string(path("hard")).unwrap(), "old");
    }

    #[test]
    fn descriptors_are_copied() {
        let (reader, writer) = pipe().unwrap();
        let path = format!("/dev/fd/{}", writer.as_raw_fd());
        let output = Output::create(Path::new(&path), &ours()).unwrap();
        let mut log = open_log(Path::new(&path), &ours()).unwrap();
        drop(writer);
        output.write_json(&1).unwrap();
        log.write_all(b"line").unwrap();
        drop(log);
        let mut text = String::new();
        File::from(reader.as_fd().try_clone_to_owned().unwrap())
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "1\nline");

        let path = format!("/proc/self/fd/{}", reader.as_raw_fd());
        let error = Output::create(Path::new(&path), &ours()).unwrap_err();
        assert!(error.to_string().contains("for writing"), "{error}");

        let (mut here, there) = UnixStream::pair().unwrap();
        let path = format!("/proc/self/fd/{}", there.as_raw_fd());
        let output = Output::create(Path::new(&path), &ours()).unwrap();
        drop(there);
        output.write_json(&2).unwrap();
        text.clear();
        here.read_to_string(&mut text).unwrap();
        assert_eq!(text, "2\n");
    }

    #[test]
    fn paths_of_descriptors() {
        for (path, expected) in [
            ("/dev/stdin", Some(0)),
            ("/dev/stdout", Some(1)),
            ("/dev/stderr", Some(2)),
            ("/dev/fd/63", Some(63)),
            ("/proc/self/fd/4", Some(4)),
            ("/dev/fd/-1", None),
            ("/dev/fd/x", None),
            ("/dev/fd/99999999999", None),
            ("/dev/fd", None),
            ("2", None),
        ] {
            assert_eq!(descriptor(Path::new(path)), expected, "{path}");
        }
    }

    #[test]
    fn a_fifo_waits_for_its_reader() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let from = path.clone();
        let reader = std::thread::spawn(move || fs::read_to_string(from).unwrap());
        let output = Output::create(&path, &ours()).unwrap();
        output.write_json(&1).unwrap();
        assert_eq!(reader.join().unwrap(), "1\n");
        assert_eq!(names(directory.path()), ["fifo"]);
    }

    #[test]
    fn logs_are_emptied_and_written_in_place() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        fs::write(&path, "old and long").unwrap();
        let mut log = open_log(&path, &ours()).unwrap();
        log.write_all(b"new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        open_log(Path::new("/dev/null"), &ours()).unwrap();
    }

    #[test]
    fn what_cannot_be_written_is_saved() {
        let directory = tempfile::tempdir().unwrap();
        let removed = Output::create(&directory.path().join("file"), &ours()).unwrap();
        directory.close().unwrap();
        let full = Output::create(Path::new("/dev/full"), &ours()).unwrap();
        for (output, kind) in [
            (removed, io::ErrorKind::NotFound),
            (full, io::ErrorKind::StorageFull),
        ] {
            let error = output.write_json(&1).unwrap_err();
            assert_eq!(error.error.kind(), kind);
            let text = error.to_string();
            let path = error.saved.unwrap();
            assert!(text.contains(path.to_str().unwrap()), "{text}");
            assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
            fs::remove_file(path).unwrap();
        }
    }

    #[test]
    fn files_belong_to_the_account() {
        let Some((account, theirs, _)) = stranger() else {
            return;
        };
        let owner = |path: &Path| {
            let metadata = fs::metadata(path).unwrap();
            (metadata.uid(), metadata.gid())
        };
        let expected = (account.uid.as_raw(), account.gid.as_raw());
        let (stats, log) = (theirs.path().join("stats"), theirs.path().join("log"));
        let output = Output::create(&stats, &account).unwrap();
        output.write_json(&1).unwrap();
        assert_eq!(owner(&stats), expected);
        open_log(&log, &account).unwrap();
        assert_eq!(owner(&log), expected);

        let full = Output::create(Path::new("/dev/full"), &account).unwrap();
        let saved = full.write_json(&1).unwrap_err().saved.unwrap();
        assert_eq!(owner(&saved), expected);
        fs::remove_file(saved).unwrap();
    }

    #[test]
    fn what_the_account_may_not_write_is_refused() {
        let Some((account, theirs, roots)) = stranger() else {
            return;
        };
        let victim = roots.path().join("victim");
        fs::write(&victim, "kept").unwrap();
        let (soft, hard) = (theirs.path().join("soft"), theirs.path().join("hard"));
        symlink(&victim, &soft).unwrap();
        fs::hard_link(&victim, &hard).unwrap();
        for path in [&soft, &hard, &victim, &roots.path().join("new")] {
            let output = Output::create(path, &account).unwrap_err();
            assert_eq!(output.kind(), io::ErrorKind::PermissionDenied, "{path:?}");
            let log = open_log(path, &account).unwrap_err();
            assert_eq!(log.kind(), io::ErrorKind::PermissionDenied, "{path:?}");
        }
        assert_eq!(fs::read_to_string(&victim).unwrap(), "kept");
        assert_eq!(names(roots.path()), ["victim"]);
    }

    #[test]
    fn a_directory_that_becomes_a_link_leads_nowhere() {
        let Some((account, theirs, roots)) = stranger() else {
            return;
        };
        let victim = roots.path().join("stats");
        fs::write(&victim, "kept").unwrap();
        let directory = theirs.path().join("directory");
        fs::create_dir(&directory).unwrap();
        chown(&directory, Some(account.uid.as_raw()), None).unwrap();
        let output = Output::create(&directory.join("stats"), &account).unwrap();
        // Whoever owns the directory above can do so meanwhile, and copy the draft's name.
        let draft = names(&directory).remove(0);
        fs::write(roots.path().join(&draft), "").unwrap();
        fs::rename(&directory, theirs.path().join("moved")).unwrap();
        symlink(roots.path(), &directory).unwrap();

        let saved = output.write_json(&1).unwrap_err().saved.unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "kept");
        assert!(roots.path().join(draft).exists());
        fs::remove_file(saved).unwrap();
    }
}
