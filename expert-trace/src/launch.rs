//! Starting a program that waits: probes are in place before its first instruction.
//!
//! The child is forked, waits on a pipe, and execs when told to. A second pipe, closed by a
//! successful exec, carries the error of a failed one. If the tracer dies first, the child reads the
//! end of the pipe and exits.

use std::{
    env,
    ffi::{CString, OsStr, OsString, c_void},
    fs::File,
    io::{self, Read as _, Write as _},
    num::NonZeroUsize,
    os::{
        fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd},
        unix::{
            ffi::OsStrExt as _,
            fs::{FileTypeExt as _, PermissionsExt as _},
        },
    },
    path::{Path, PathBuf},
    ptr::NonNull,
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::mman::{MapFlags, ProtFlags, mmap, munmap},
    sys::signal::{SigHandler, Signal, signal},
    sys::wait::waitpid,
    unistd::{ForkResult, Pid, execv, fork, pipe2},
};
use thiserror::Error;

use object::read::ReadCache;

use crate::{
    symbols::{self, Bounded},
    target::{open_regular, printable},
};

/// Why a program could not be started.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// Nothing of that name.
    #[error("{0}: command not found; give its path, or check PATH")]
    NotFound(String),
    /// Found, and not to be executed.
    #[error("{path}: {reason}")]
    NotExecutable {
        /// The file.
        path: String,
        /// What exec, or a look at the file, said.
        reason: String,
    },
    /// An argument with a NUL byte.
    #[error("argument {0:?} contains a NUL byte")]
    Argument(OsString),
    /// The system refused a pipe or a process.
    #[error("cannot start a process: {0}")]
    System(#[from] Errno),
}

impl LaunchError {
    /// Exit status a shell would give.
    pub fn exit_code(&self) -> u8 {
        match self {
            LaunchError::NotFound(_) => 127,
            LaunchError::NotExecutable { .. } | LaunchError::Argument(_) => 126,
            LaunchError::System(_) => 125,
        }
    }
}

/// A forked child that has not exec'd yet.
#[derive(Debug)]
pub struct Suspended {
    pid: Pid,
    release: OwnedFd,
    exec_error: OwnedFd,
}

/// Finds a command the way `execvp` does.
///
/// # Errors
/// When there is no such file, or it is not executable.
pub fn find(command: &OsStr) -> Result<PathBuf, LaunchError> {
    let shown = command.to_string_lossy().into_owned();
    if command.as_bytes().contains(&b'/') {
        let path = PathBuf::from(command);
        let metadata = path
            .metadata()
            .map_err(|_| LaunchError::NotFound(shown.clone()))?;
        let refused = |reason: &str| {
            Err(LaunchError::NotExecutable {
                path: shown.clone(),
                reason: reason.to_owned(),
            })
        };
        if metadata.is_dir() {
            return refused("is a directory");
        }
        if metadata.file_type().is_fifo() || metadata.permissions().mode() & 0o111 == 0 {
            return refused("is not executable");
        }
        return Ok(path);
    }
    let path = env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
    env::split_paths(&path)
        .map(|directory| directory.join(command))
        .find(|path| {
            path.metadata().is_ok_and(|metadata| {
                metadata.is_file() && metadata.permissions().mode() & 0o111 != 0
            })
        })
        .ok_or(LaunchError::NotFound(shown))
}

/// The ELF file that the kernel will really load for a command: a script's interpreter, or the
/// command itself (fs/binfmt_script.c follows at most five levels).
pub fn loaded_program(command: &Path) -> PathBuf {
    let mut program = command.to_owned();
    for _ in 0..5 {
        let mut start = Vec::new();
        let read = open_regular(&program).and_then(|file| file.take(256).read_to_end(&mut start));
        let Some(line) = start.strip_prefix(b"#!").filter(|_| read.is_ok()) else {
            break;
        };
        let interpreter = line
            .split(|byte| *byte == b'\n')
            .next()
            .unwrap_or_default()
            .trim_ascii_start()
            .split(|byte| byte.is_ascii_whitespace())
            .next()
            .unwrap_or_default();
        program = OsStr::from_bytes(interpreter).into();
    }
    program
}

/// The dynamic linker that will load a program; `None` when it is static.
///
/// # Errors
/// When the file cannot be read, or is no ELF file for this machine.
pub fn dynamic_linker(program: &Path) -> Result<Option<PathBuf>, LaunchError> {
    let refused = |reason: String| LaunchError::NotExecutable {
        path: printable(program),
        reason,
    };
    let file = open_regular(program).map_err(|error| refused(error.to_string()))?;
    let cache = ReadCache::new(file);
    symbols::interpreter(Bounded(&cache)).map_err(|error| refused(error.to_string()))
}

impl Suspended {
    /// Forks a child that will run `path` with these arguments (the first one being its name).
    ///
    /// # Errors
    /// When an argument holds a NUL byte or the system refuses.
    pub fn spawn(path: &Path, arguments: &[OsString]) -> Result<Self, LaunchError> {
        let c_string = |text: &OsStr| {
            CString::new(text.as_bytes()).map_err(|_| LaunchError::Argument(text.to_owned()))
        };
        let c_path = c_string(path.as_os_str())?;
        let c_arguments = arguments
            .iter()
            .map(|argument| c_string(argument))
            .collect::<Result<Vec<_>, _>>()?;
        let (wait, release) = pipe2(OFlag::O_CLOEXEC)?;
        let (exec_error, report) = pipe2(OFlag::O_CLOEXEC)?;

        // SAFETY: the child calls async-signal-safe functions alone until it execs or exits; all
        // memory it needs has been allocated above.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Self {
                pid: child,
                release,
                exec_error,
            }),
            ForkResult::Child => {
                drop((release, exec_error));
                let mut go = [0];
                let mut wait = File::from(wait);
                if !matches!(wait.read(&mut go), Ok(1)) {
                    // SAFETY: ends the process without running the parent's handlers.
                    unsafe { libc::_exit(125) };
                }
                // Rust ignores SIGPIPE, and ignored signals survive exec.
                // SAFETY: restores the default, installs no handler.
                let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
                let error = execv(&c_path, &c_arguments).unwrap_err();
                let _ = File::from(report).write_all(&(error as i32).to_ne_bytes());
                // SAFETY: as above.
                unsafe { libc::_exit(127) }
            }
        }
    }

    /// The child's process id, which exec does not change.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Lets the child exec, and waits until it has.
    ///
    /// # Errors
    /// The error of exec; the child has then exited and been waited for.
    pub fn release(self, path: &Path) -> Result<Pid, LaunchError> {
        let released = File::from(self.release).write_all(b"g");
        let mut errno = [0; 4];
        let failed = File::from(self.exec_error).read_exact(&mut errno);
        if failed.is_err() && released.is_ok() {
            return Ok(self.pid);
        }
        waitpid(self.pid, None)?;
        let reason = io::Error::from_raw_os_error(i32::from_ne_bytes(errno));
        Err(LaunchError::NotExecutable {
            path: printable(path),
            reason: reason.to_string(),
        })
    }
}

/// A descriptor that becomes readable when a process ends.
///
/// # Errors
/// When there is no such process.
pub fn exit_descriptor(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes plain numbers.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A descriptor that hangs up when a thread ends, also while others of its process go on.
///
/// It is that of a perf event which counts nothing. A pidfd with PIDFD_THREAD would be the obvious
/// one, but on Linux 6.18 that of a main thread stays silent until the last thread has ended.
#[derive(Debug)]
pub struct ThreadExit {
    event: OwnedFd,
    ring: NonNull<c_void>,
}

/// The event's header page and one of data.
const RING_PAGES: usize = 2;

impl ThreadExit {
    /// Watches a thread.
    ///
    /// # Errors
    /// When there is no such thread, or we may not look at it.
    pub fn watch(tid: u32) -> io::Result<Self> {
        let event = dummy_event(tid)?;
        // Only an event with a ring buffer wakes who polls it (`ring_buffer_wakeup` in
        // kernel/events/core.c).
        // SAFETY: a new mapping, of the size that is unmapped.
        let ring = unsafe {
            mmap(
                None,
                ring_bytes(),
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                &event,
                0,
            )
        }?;
        Ok(Self { event, ring })
    }
}

impl AsRawFd for ThreadExit {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl Drop for ThreadExit {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing points into it.
        let _ = unsafe { munmap(self.ring, ring_bytes().get()) };
    }
}

fn ring_bytes() -> NonZeroUsize {
    // SAFETY: the call takes a plain number.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    NonZeroUsize::new(RING_PAGES * page).unwrap_or(NonZeroUsize::MIN)
}

fn dummy_event(tid: u32) -> io::Result<OwnedFd> {
    /// Start of `perf_event_attr`, as long as its first version (include/uapi/linux/perf_event.h).
    #[repr(C)]
    struct Attributes {
        kind: u32,
        size: u32,
        config: u64,
        rest: [u64; 6],
    }
    const PERF_TYPE_SOFTWARE: u32 = 1;
    const PERF_COUNT_SW_DUMMY: u64 = 9;
    const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
    const ANY_CPU: i32 = -1;
    const NO_GROUP: i32 = -1;
    let attributes = Attributes {
        kind: PERF_TYPE_SOFTWARE,
        size: size_of::<Attributes>() as u32,
        config: PERF_COUNT_SW_DUMMY,
        rest: [0; 6],
    };
    // SAFETY: the attributes are as large as they say, and live during the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            tid,
            ANY_CPU,
            NO_GROUP,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    owned(fd)
}

/// Result of a system call that gives a new descriptor.
fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::WaitStatus;
    use std::fs;

    fn arguments(text: &[&str]) -> Vec<OsString> {
        text.iter().map(Into::into).collect()
    }

    #[test]
    fn a_child_runs_when_released_and_not_before() {
        let directory = tempfile::tempdir().unwrap();
        let witness = directory.path().join("ran");
        let command = find(OsStr::new("touch")).unwrap();
        let child =
            Suspended::spawn(&command, &arguments(&["touch", witness.to_str().unwrap()])).unwrap();
        // It is our fork, and still is until released: the link names the same executable.
        let exe = fs::read_link(format!("/proc/{}/exe", child.pid())).unwrap();
        assert_eq!(exe, env::current_exe().unwrap());
        assert!(!witness.exists());
        let pid = child.release(&command).unwrap();
        assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 0));
        assert!(witness.exists());
    }

    #[test]
    fn an_unreleased_child_exits_with_its_tracer() {
        let child = Suspended::spawn(Path::new("/bin/true"), &arguments(&["true"])).unwrap();
        let pid = child.pid();
        drop(child);
        assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 125));
    }

    #[test]
    fn errors_of_exec_come_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "no program").unwrap();
        let child = Suspended::spawn(file.path(), &arguments(&["x"])).unwrap();
        let error = child.release(file.path()).unwrap_err();
        assert_eq!(error.exit_code(), 126);
        assert!(error.to_string().contains("Permission denied"), "{error}");
    }

    #[test]
    fn commands_are_found_as_a_shell_would() {
        assert!(find(OsStr::new("sh")).unwrap().is_absolute());
        assert_eq!(
            find(OsStr::new("no-such-command")).unwrap_err().exit_code(),
            127
        );
        assert_eq!(find(OsStr::new("/no/such")).unwrap_err().exit_code(), 127);
        assert_eq!(find(OsStr::new("/tmp")).unwrap_err().exit_code(), 126);
    }

    #[test]
    fn scripts_lead_to_their_interpreter() {
        let script = tempfile::NamedTempFile::new().unwrap();
        fs::write(script.path(), "#! /bin/sh -e\ntrue\n").unwrap();
        assert_eq!(loaded_program(script.path()), Path::new("/bin/sh"));
        assert!(dynamic_linker(Path::new("/bin/sh")).unwrap().is_some());
    }
}
