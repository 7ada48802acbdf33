//! Descriptors that we were started with, as places to write to.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    path::Path,
    sync::OnceLock,
};

/// Descriptors that we open for ourselves start after stdin, stdout and stderr.
const FIRST_OWN_DESCRIPTOR: RawFd = 3;

/// Descriptors that we were started with. All others are our own, and nobody's output.
#[derive(Clone, Debug, Default)]
pub(super) struct Inherited(pub(super) Vec<RawFd>);

static INHERITED: OnceLock<Inherited> = OnceLock::new();

/// Remembers which descriptors are open, so that those alone can be named as outputs. To be called
/// before anything else is opened; without it stdin, stdout and stderr are all there is.
pub fn remember_inherited() {
    INHERITED.get_or_init(|| Inherited::open_now().unwrap_or_default());
}

impl Inherited {
    pub(super) fn ours() -> Self {
        INHERITED.get().cloned().unwrap_or_default()
    }

    pub(super) fn open_now() -> io::Result<Self> {
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

    pub(super) fn has(&self, number: RawFd) -> bool {
        number < FIRST_OWN_DESCRIPTOR || self.0.contains(&number)
    }
}

/// A copy of the open descriptor that a path names, if it names one.
///
/// Opening such a path opens the file anew, which fails for sockets, and for what sudo's caller has
/// opened and we as that user may not (proc(5), `/proc/PID/fd`).
pub(super) fn inherited(path: &Path, open: &Inherited) -> io::Result<Option<File>> {
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
pub(super) fn descriptor(path: &Path) -> Option<RawFd> {
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
