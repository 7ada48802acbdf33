//! Writing a document where the user wants it.
//!
//! The place is opened before tracing, so that a bad path fails at once; a file appears under its
//! name only when it is complete; and what was collected is saved elsewhere when that fails. All is
//! done with the rights of an account, so that root's are never used on a path that a user chose.

use std::{
    env,
    ffi::OsString,
    fmt::{self, Display, Formatter},
    fs::{self, File, Metadata, OpenOptions},
    io::{self, BufWriter, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::{
            ffi::OsStrExt as _,
            fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
        },
    },
    path::{Path, PathBuf},
    sync::OnceLock,
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, openat, renameat},
    sys::stat::Mode,
    unistd::{Gid, UnlinkatFlags, fchown, geteuid, linkat, unlinkat},
};
use serde::Serialize;
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

    fn write(&self, document: &impl Serialize) -> io::Result<()> {
        match &self.place {
            Place::Special(file) => to_json(file, document),
            Place::Kept(file) => {
                file.set_len(0)?;
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

/// What a path leads to.
enum Found {
    /// No regular file, open.
    Special(File),
    /// A regular file, or a name that is free.
    File(Location),
}

/// A name in a directory that is kept open: what becomes of the directory's path does not matter.
#[derive(Debug)]
struct Location {
    directory: File,
    shown_directory: PathBuf,
    name: OsString,
    /// The file of that name, open for writing.
    existing: Option<File>,
}

/// Looks at what a path leads to, and opens what is there. Nothing is created or changed.
fn find(path: &Path) -> io::Result<Found> {
    let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidInput, text);
    if path.as_os_str().is_empty() {
        return Err(invalid("is empty; name a file".to_owned()));
    }
    // A link is followed, so that the file it leads to is replaced and not the link.
    let real = match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => {
            return Ok(Found::Special(open_special(path, &metadata)?));
        }
        Ok(_) if path.is_symlink() => fs::canonicalize(path)?,
        Ok(_) => path.to_owned(),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound => {
                if let Ok(goal) = fs::read_link(path) {
                    let text = format!(
                        "is a link to {}, which is not there; name that file",
                        printable(&goal)
                    );
                    return Err(io::Error::new(error.kind(), text));
                }
                path.to_owned()
            }
            io::ErrorKind::NotADirectory => return Err(no_directory(path, &error)),
            _ => return Err(error),
        },
    };
    let bytes = real.as_os_str().as_bytes();
    let name = match real.file_name() {
        Some(name) if !bytes.ends_with(b"/") && !bytes.ends_with(b"/.") => name.to_owned(),
        _ => return Err(invalid("names a directory; name a file in it".to_owned())),
    };
    let shown_directory = match real.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let directory = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(&shown_directory)
        .map_err(|error| no_file_in(&shown_directory, &error))?;
    // The directory's owner could replace any file in it, and still is not to do so by mistake: what
    // may not be written is not replaced. Something else can have taken the file's place meanwhile.
    let flags = OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let existing = match openat(&directory, name.as_os_str(), flags, Mode::empty()) {
        Ok(file) => Some(File::from(file)),
        Err(Errno::ENOENT) => None,
        Err(error) => return Err(error.into()),
    };
    Ok(Found::File(Location {
        directory,
        shown_directory,
        name,
        existing,
    }))
}

impl Location {
    /// Whether something is mounted on this file, as on those that are handed to a container.
    fn is_mount_point(&self, existing: &File) -> io::Result<bool> {
        Ok(mount(existing)? != mount(&self.directory)?)
    }

    /// What can be written and not replaced would fail at the end (rename(2): EPERM).
    fn check_replaceable(&self, existing: &Metadata) -> io::Result<()> {
        let directory = self.directory.metadata()?;
        let user = geteuid();
        let sticky = directory.mode() & libc::S_ISVTX != 0;
        if !sticky || user.is_root() || [existing.uid(), directory.uid()].contains(&user.as_raw()) {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "belongs to another user, and {} is sticky, so that it cannot be replaced; name \
                 another place",
                printable(&self.shown_directory)
            ),
        ))
    }

    fn remove(&self, name: &OsString) -> io::Result<()> {
        Ok(unlinkat(
            &self.directory,
            name.as_os_str(),
            UnlinkatFlags::NoRemoveDir,
        )?)
    }

    /// Does something with a name in the directory that nothing has.
    fn with_free_name<T>(
        &self,
        mut f: impl FnMut(&OsString) -> nix::Result<T>,
    ) -> io::Result<(OsString, T)> {
        let made = tempfile::Builder::new()
            .prefix(".expert-trace-")
            // It would be done by path, and as root.
            .disable_cleanup(true)
            .make_in("/", |path| {
                let name = path.file_name().unwrap_or_default().to_owned();
                Ok(f(&name).map(|result| (name, result))?)
            })?;
        Ok(made.into_parts().0)
    }
}

/// The mount that an open file was reached by. None where the kernel does not tell.
fn mount(file: &File) -> io::Result<Option<u64>> {
    let mut status = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is a C string, and the kernel writes a `statx` where there is room for one.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_MNT_ID,
            status.as_mut_ptr(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all of it is numbers, and was zero before the kernel wrote to it.
    let status = unsafe { status.assume_init() };
    let told = status.stx_mask & libc::STATX_MNT_ID != 0;
    Ok(told.then_some(status.stx_mnt_id))
}

/// What becomes a file of a location.
#[derive(Debug)]
struct Draft {
    file: File,
    /// Its own name. None, where the file system can do without one: nothing is left of it then,
    /// however we end.
    name: Option<OsString>,
}

impl Draft {
    fn create(location: &Location) -> io::Result<Self> {
        let draft = match Self::unnamed(location) {
            Ok(draft) => draft,
            // Network file systems and old kernels; or there is no procfs.
            Err(_) => Self::named(location)?,
        };
        if let Some(existing) = &location.existing
            && let Err(error) = draft.look_like(&existing.metadata()?)
        {
            if let Some(name) = &draft.name {
                let _ = location.remove(name);
            }
            return Err(error);
        }
        Ok(draft)
    }

    fn unnamed(location: &Location) -> io::Result<Self> {
        let flags = OFlag::O_TMPFILE | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let file = openat(&location.directory, ".", flags, NEW_FILE)?;
        let draft = Self {
            file: file.into(),
            name: None,
        };
        // Procfs can be missing, or be another one.
        let (seen, ours) = (fs::metadata(draft.in_proc())?, draft.file.metadata()?);
        match (seen.dev(), seen.ino()) == (ours.dev(), ours.ino()) {
            true => Ok(draft),
            false => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn named(location: &Location) -> io::Result<Self> {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        // Nobody else reads it before it has the rights of what it replaces.
        let mode = match location.existing {
            Some(_) => Mode::S_IRUSR | Mode::S_IWUSR,
            None => NEW_FILE,
        };
        let (name, file) = location
            .with_free_name(|name| openat(&location.directory, name.as_os_str(), flags, mode))?;
        Ok(Self {
            file: file.into(),
            name: Some(name),
        })
    }

    /// Takes the permissions of the file that is to be replaced, and its owners as far as we may.
    fn look_like(&self, existing: &Metadata) -> io::Result<()> {
        const ALL: u32 = 0o777;
        const OF_GROUP: u32 = 0o070;
        let ours = self.file.metadata()?;
        let mut mode = existing.mode() & ALL;
        let group = Some(Gid::from_raw(existing.gid()));
        if ours.gid() != existing.gid() && fchown(&self.file, None, group).is_err() {
            // They were given to another group.
            mode &= !OF_GROUP;
        }
        self.file
            .set_permissions(fs::Permissions::from_mode(mode))?;
        if ours.uid() != existing.uid() && geteuid().is_root() {
            let _ = fchown(&self.file, Some(existing.uid().into()), None);
        }
        Ok(())
    }

    /// The file as procfs names it. Also with an account's rights it is ours: the kernel lets a
    /// process through to its own descriptors (fs/proc/fd.c, `proc_fd_permission`).
    fn in_proc(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }

    /// Gives the file its place.
    fn publish(&self, location: &Location) -> io::Result<()> {
        let directory = &location.directory;
        let place = location.name.as_os_str();
        let link = |name: &OsString| {
            let follow = AtFlags::AT_SYMLINK_FOLLOW;
            linkat(
                AT_FDCWD,
                &self.in_proc(),
                directory,
                name.as_os_str(),
                follow,
            )
        };
        match &self.name {
            Some(name) => Ok(renameat(directory, name.as_os_str(), directory, place)?),
            None => match link(&location.name) {
                // A link does not replace, a name does.
                Err(Errno::EEXIST) => {
                    let (name, ()) = location.with_free_name(link)?;
                    let renamed = renameat(directory, name.as_os_str(), directory, place);
                    if renamed.is_err() {
                        let _ = location.remove(&name);
                    }
                    Ok(renamed?)
                }
                linked => Ok(linked?),
            },
        }
    }
}

/// Permissions of a new file, of which the umask takes some.
const NEW_FILE: Mode = Mode::from_bits_truncate(0o666);

fn no_file_in(directory: &Path, error: &io::Error) -> io::Error {
    let kind = error.kind();
    let shown = directory.display();
    let text = if kind == io::ErrorKind::NotFound && !directory.is_dir() {
        format!("there is no directory {shown}; create it first")
    } else {
        format!("no file can be created in {shown} ({kind}); name another place")
    };
    io::Error::new(kind, text)
}

/// Names what stands where a directory should.
fn no_directory(path: &Path, error: &io::Error) -> io::Error {
    // Without a slash at the end.
    let path = path.components().as_path();
    let is_in_the_way = |path: &&Path| fs::metadata(path).is_ok_and(|metadata| !metadata.is_dir());
    match path.ancestors().find(is_in_the_way) {
        Some(file) => {
            let text = format!("{} is no directory; name another place", printable(file));
            io::Error::new(error.kind(), text)
        }
        None => io::Error::from(error.kind()),
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
            let location = match find(path)? {
                Found::Special(file) => return Ok(Err(file)),
                Found::File(location) => location,
            };
            if let Some(output) = output
                && output.is_at(&location)?
            {
                return Err(same_as_output());
            }
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
        "the log and the JSON (-o) would be in one file; name two",
    )
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

/// Descriptors that we were started with. All others are our own, and nobody's output.
#[derive(Clone, Debug, Default)]
struct Inherited(Vec<RawFd>);

static INHERITED: OnceLock<Inherited> = OnceLock::new();

/// Remembers which descriptors are open, so that those alone can be named as outputs. To be called
/// before anything else is opened; without it stdin, stdout and stderr are all there is.
pub fn remember_inherited() {
    INHERITED.get_or_init(|| Inherited::open_now().unwrap_or_default());
}

impl Inherited {
    fn ours() -> Self {
        INHERITED.get().cloned().unwrap_or_default()
    }

    fn open_now() -> io::Result<Self> {
        let mut numbers = Vec::new();
        for entry in fs::read_dir("/proc/self/fd")? {
            numbers.extend(
                entry?
                    .file_name()
                    .to_str()
                    .and_then(|name| name.parse::<RawFd>().ok()),
            );
        }
        // That of the directory itself is closed again.
        // SAFETY: the call takes plain numbers.
        numbers.retain(|number| unsafe { libc::fcntl(*number, libc::F_GETFD) } >= 0);
        Ok(Self(numbers))
    }

    fn has(&self, number: RawFd) -> bool {
        number < FIRST_OWN_DESCRIPTOR || self.0.contains(&number)
    }
}

/// A copy of the open descriptor that a path names, if it names one.
///
/// Opening such a path opens the file anew, which fails for sockets, and for what sudo's caller has
/// opened and we as that user may not (proc(5), `/proc/PID/fd`).
fn inherited(path: &Path, open: &Inherited) -> io::Result<Option<File>> {
    if path == Path::new("-") {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "stdout is not meant by -; name a file, or an open descriptor such as /dev/fd/1",
        ));
    }
    let Some(number) = descriptor(path) else {
        return Ok(None);
    };
    let refused = |reason: &str| {
        let reason = format!("descriptor {number} {reason}");
        Err(io::Error::new(io::ErrorKind::InvalidInput, reason))
    };
    let copy = match open.has(number) {
        // SAFETY: the call takes plain numbers.
        true => unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, FIRST_OWN_DESCRIPTOR) },
        false => -1,
    };
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

/// Number of the descriptor that a path names.
fn descriptor(path: &Path) -> Option<RawFd> {
    for (name, number) in [
        ("/dev/stdin", libc::STDIN_FILENO),
        ("/dev/stdout", libc::STDOUT_FILENO),
        ("/dev/stderr", libc::STDERR_FILENO),
    ] {
        if path == Path::new(name) {
            return Some(number);
        }
    }
    let number = ["/dev/fd", "/proc/self/fd"]
        .iter()
        .find_map(|directory| path.strip_prefix(directory).ok())?;
    let number = number.to_str()?.parse().ok();
    number.filter(|number| *number >= 0)
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
            unix::fs::{chown, symlink},
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
        let path = directory.path().join("stats.json");
        let output = Output::create(&path, &ours()).unwrap();
        drop(output);
        assert!(names(directory.path()).is_empty());

        let output = with_named_draft(&path);
        assert_eq!(names(directory.path()).len(), 1);
        drop(output);
        assert!(names(directory.path()).is_empty());
    }

    /// As on a file system that has no files without names.
    fn with_named_draft(path: &Path) -> Output {
        let Ok(Found::File(location)) = find(path) else {
            panic!("{path:?}");
        };
        let draft = Draft::named(&location).unwrap();
        Output {
            place: Place::Atomic { location, draft },
            account: ours(),
        }
    }

    fn open_log(path: &Path, account: &Account) -> io::Result<LogFile> {
        LogFile::open(path, account, None)
    }

    #[test]
    fn files_are_replaced_whatever_the_draft() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("stats.json");
        for existing in [false, true] {
            let outputs: [fn(&Path) -> Output; 2] = [with_named_draft, |path| {
                let output = Output::create(path, &ours()).unwrap();
                let Place::Atomic { draft, .. } = &output.place else {
                    panic!("{output:?}");
                };
                assert_eq!(draft.name, None, "needs a file system with O_TMPFILE");
                output
            }];
            for create in outputs {
                let _ = fs::remove_file(&path);
                if existing {
                    fs::write(&path, "old").unwrap();
                }
                let output = create(&path);
                assert_eq!(path.exists(), existing);
                output.write_json(&1).unwrap();
                assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
                assert_eq!(names(directory.path()), ["stats.json"]);
            }
        }
        // What has come meanwhile is replaced, too, and a directory is not.
        fs::remove_file(&path).unwrap();
        let (first, second) = (
            Output::create(&path, &ours()).unwrap(),
            Output::create(&path, &ours()).unwrap(),
        );
        fs::write(&path, "new").unwrap();
        first.write_json(&1).unwrap();
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let saved = second.write_json(&2).unwrap_err().saved.unwrap();
        fs::remove_file(saved).unwrap();
        assert_eq!(names(directory.path()), ["stats.json"]);
    }

    #[test]
    fn permissions_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("stats.json");
        for mode in [0o600, 0o640, 0o666, 0o755] {
            fs::write(&path, "old").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let output = Output::create(&path, &ours()).unwrap();
            output.write_json(&1).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, mode);
        }
        // As the umask has it for any file.
        let usual = directory.path().join("usual");
        fs::write(&usual, "").unwrap();
        fs::remove_file(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode();
        for create in [with_named_draft, |path: &Path| {
            Output::create(path, &ours()).unwrap()
        }] {
            create(&path).write_json(&1).unwrap();
            assert_eq!(mode(&path), mode(&usual));
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn a_file_in_a_sticky_directory_stays_its_owners() {
        let Some((account, theirs, roots)) = stranger() else {
            return;
        };
        let all = fs::Permissions::from_mode(0o1777);
        fs::set_permissions(roots.path(), all).unwrap();
        let file = roots.path().join("file");
        fs::write(&file, "kept").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
        let error = Output::create(&file, &account).unwrap_err();
        assert!(error.to_string().contains("is sticky"), "{error}");
        Output::create(&file, &ours()).unwrap();
        let own = roots.path().join("own");
        Output::create(&own, &account)
            .unwrap()
            .write_json(&1)
            .unwrap();
        Output::create(&own, &account)
            .unwrap()
            .write_json(&2)
            .unwrap();
        assert_eq!(fs::read_to_string(&own).unwrap(), "2\n");
        drop(theirs);
    }

    #[test]
    fn one_file_for_both_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let both = |output: &Path, log: &Path| {
            let output = Output::create(output, &ours()).unwrap();
            LogFile::open(log, &ours(), Some(&output)).map(drop)
        };
        let refused = |output: &Path, log: &Path| {
            let error = both(output, log).unwrap_err().to_string();
            assert!(error.contains("one file"), "{error}");
        };
        refused(&path("new"), &path("new"));
        refused(&path("new"), &path("./new"));
        symlink(directory.path(), path("here")).unwrap();
        refused(&path("new"), &path("here/new"));
        assert!(!path("new").exists());
        fs::write(path("file"), "kept").unwrap();
        fs::hard_link(path("file"), path("hard")).unwrap();
        symlink("file", path("soft")).unwrap();
        for (output, log) in [("file", "file"), ("soft", "file"), ("file", "hard")] {
            refused(&path(output), &path(log));
        }
        assert_eq!(fs::read_to_string(path("file")).unwrap(), "kept");
        both(&path("new"), &path("file")).unwrap();
        let null = Path::new("/dev/null");
        both(null, null).unwrap();
    }

    #[test]
    fn what_nobody_gave_us_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let path = format!("/dev/fd/{}", file.as_raw_fd());
        let error = inherited(Path::new(&path), &Inherited::default()).unwrap_err();
        assert!(error.to_string().contains("is not open"), "{error}");
        let open = Inherited::open_now().unwrap();
        assert!(open.has(file.as_raw_fd()) && open.has(2));
        assert!(inherited(Path::new(&path), &open).unwrap().is_some());
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
        let file = directory.path().join("file");
        fs::write(&file, "kept").unwrap();
        let in_file = directory.path().join("file/x/y");
        let with_slash = directory.path().join("file/");
        let nothing = directory.path().join("nodir/");
        let dot = directory.path().join("nodir/.");
        let long = directory.path().join("x".repeat(256));
        for (path, reason) in [
            (directory.path(), "is a directory"),
            (&missing, "create it first"),
            (&dangling, "is a link to nowhere"),
            (&in_file, "file is no directory"),
            (&with_slash, "file is no directory"),
            (&nothing, "names a directory"),
            (&dot, "names a directory"),
            (&long, "too long"),
            (Path::new(""), "is empty"),
        ] {
            let output = Output::create(path, &ours()).unwrap_err().to_string();
            assert!(output.contains(reason), "{path:?}: {output}");
            let log = open_log(path, &ours()).unwrap_err().to_string();
            assert_eq!(log, output);
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "kept");
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
        assert!(matches!(output.place, Place::Special(_)));
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
        let copy = |number: RawFd| {
            let path = format!("/proc/self/fd/{number}");
            inherited(Path::new(&path), &Inherited(vec![number]))
        };
        let in_place = |number| Output {
            place: Place::Special(copy(number).unwrap().unwrap()),
            account: ours(),
        };
        let (reader, writer) = pipe().unwrap();
        let output = in_place(writer.as_raw_fd());
        drop(writer);
        output.write_json(&1).unwrap();
        let mut text = String::new();
        File::from(reader.as_fd().try_clone_to_owned().unwrap())
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "1\n");

        let error = copy(reader.as_raw_fd()).unwrap_err();
        assert!(error.to_string().contains("for writing"), "{error}");

        let (mut here, there) = UnixStream::pair().unwrap();
        let output = in_place(there.as_raw_fd());
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
            ("/dev//fd/./63", Some(63)),
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
        mkfifo(&path, Mode::S_IRWXU).unwrap();
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
        let log = open_log(&path, &ours()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "old and long");
        log.begin().unwrap();
        log.writer().unwrap().write_all(b"new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        open_log(Path::new("/dev/null"), &ours())
            .unwrap()
            .begin()
            .unwrap();
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
        // Whoever owns the directory above can do so meanwhile.
        let moved = theirs.path().join("moved");
        fs::rename(&directory, &moved).unwrap();
        symlink(roots.path(), &directory).unwrap();

        output.write_json(&1).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "kept");
        assert_eq!(names(roots.path()), ["stats"]);
        assert_eq!(fs::read_to_string(moved.join("stats")).unwrap(), "1\n");
    }

    #[test]
    fn a_right_that_is_lost_meanwhile_is_not_used() {
        let Some((account, theirs, _)) = stranger() else {
            return;
        };
        let output = Output::create(&theirs.path().join("stats"), &account).unwrap();
        chown(theirs.path(), Some(0), Some(0)).unwrap();
        let saved = output.write_json(&1).unwrap_err().saved.unwrap();
        assert!(names(theirs.path()).is_empty());
        fs::remove_file(saved).unwrap();
    }
}
