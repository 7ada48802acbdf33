//! Names in directories: opened with the rights of the calling thread, and kept open, so that what
//! becomes of their paths does not matter.

use std::{
    ffi::OsString,
    fs::{self, File, Metadata, OpenOptions},
    io,
    mem::MaybeUninit,
    os::{
        fd::AsRawFd as _,
        unix::{
            ffi::OsStrExt as _,
            fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, openat, renameat},
    sys::stat::Mode,
    unistd::{AccessFlags, Gid, UnlinkatFlags, faccessat, fchown, geteuid, linkat, unlinkat},
};

use crate::target::printable;

/// What a path leads to.
pub(super) enum Found {
    /// No regular file, open.
    Special(File),
    /// A regular file, or a name that is free.
    File(Location),
}

/// A name in a directory that is kept open: what becomes of the directory's path does not matter.
#[derive(Debug)]
pub(super) struct Location {
    pub(super) directory: File,
    pub(super) shown_directory: PathBuf,
    pub(super) name: OsString,
    /// The file of that name, open for writing.
    pub(super) existing: Option<File>,
}

/// Looks at what a path leads to, and opens what is there. Nothing is created or changed.
pub(super) fn find(path: &Path) -> io::Result<Found> {
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
    pub(super) fn is_mount_point(&self, existing: &File) -> io::Result<bool> {
        Ok(mount(existing)? != mount(&self.directory)?)
    }

    /// What can be written and not replaced would fail at the end (rename(2): EPERM).
    pub(super) fn check_replaceable(&self, existing: &Metadata) -> io::Result<()> {
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

    /// Whether a file can be created here.
    pub(super) fn check_writable(&self) -> io::Result<()> {
        let directory = format!("/proc/self/fd/{}", self.directory.as_raw_fd());
        let flags = AccessFlags::W_OK | AccessFlags::X_OK;
        // With the rights of the calling thread, which are not those of the process.
        faccessat(AT_FDCWD, directory.as_str(), flags, AtFlags::AT_EACCESS)
            .map_err(|error| no_file_in(&self.shown_directory, &error.into()))
    }

    pub(super) fn remove(&self, name: &OsString) -> io::Result<()> {
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
pub(super) struct Draft {
    pub(super) file: File,
    /// Its own name. None, where the file system can do without one: nothing is left of it then,
    /// however we end.
    pub(super) name: Option<OsString>,
}

impl Draft {
    pub(super) fn create(location: &Location) -> io::Result<Self> {
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

    pub(super) fn unnamed(location: &Location) -> io::Result<Self> {
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

    pub(super) fn named(location: &Location) -> io::Result<Self> {
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
    pub(super) fn publish(&self, location: &Location) -> io::Result<()> {
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
pub(super) const NEW_FILE: Mode = Mode::from_bits_truncate(0o666);

pub(super) fn no_file_in(directory: &Path, error: &io::Error) -> io::Error {
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
