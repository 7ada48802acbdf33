//! Starting a program that waits: probes are in place before its first instruction.
//!
//! The child is forked, installs the filter of the [`crate::gate`], waits on a pipe, and execs when
//! told to, as the user it is to run as. A second pipe, closed by a successful exec, carries the error
//! of a failed one. If the tracer dies first, the child reads the end of the pipe and exits.

use std::{
    env,
    ffi::{CStr, CString, OsStr, OsString, c_void},
    fs::File,
    io::{self, Read as _, Write as _},
    num::NonZeroUsize,
    os::{
        fd::{AsFd as _, AsRawFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    ptr::NonNull,
    sync::atomic::Ordering,
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::mman::{MapFlags, ProtFlags, mmap, munmap},
    sys::signal::{SigHandler, Signal, signal},
    sys::wait::waitpid,
    unistd::{
        AccessFlags, ForkResult, Pid, execve, faccessat, fork, geteuid, pipe2, setgroups,
        setresgid, setresuid, setsid,
    },
};
use thiserror::Error;

use crate::{
    bounded::{self, Bounded},
    caller::{Account, Environment},
    gate::{self, Gate},
    signals,
    symbols::{self, SymbolError},
    target::{open_regular, printable, script_interpreter},
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
    /// The kernel refused the filter.
    #[error(
        "the kernel refused a seccomp filter ({}), by which new libraries of the program are seen: {}. \
         Start the program, and attach to it",
        .0,
        why_no_filter(*.0)
    )]
    Gate(Errno),
    /// The program cannot be run as the user it is to run as.
    #[error("cannot become user {user}: {errno}")]
    User {
        /// The user.
        user: String,
        /// The kernel's answer.
        errno: Errno,
    },
}

fn why_no_filter(errno: Errno) -> &'static str {
    match errno {
        Errno::EBUSY => "we run under a program that has one, such as another `expert-trace run`",
        _ => "it takes CONFIG_SECCOMP_FILTER and CAP_SYS_ADMIN",
    }
}

impl LaunchError {
    /// Exit status a shell would give.
    pub fn exit_code(&self) -> u8 {
        match self {
            LaunchError::NotFound(_) => 127,
            LaunchError::NotExecutable { .. } | LaunchError::Argument(_) => 126,
            LaunchError::System(_) | LaunchError::Gate(_) | LaunchError::User { .. } => 125,
        }
    }
}

/// What is to be started.
#[derive(Clone, Copy, Debug)]
pub struct Program<'a> {
    /// Its file.
    pub path: &'a Path,
    /// Its arguments, the first one being its name.
    pub arguments: &'a [OsString],
    /// Its environment.
    pub environment: &'a Environment,
    /// Who runs it.
    pub account: &'a Account,
    /// Whether it begins a session, and so a process group, of its own: without the terminal.
    pub own_session: bool,
}

/// A forked child that has not exec'd yet.
#[derive(Debug)]
pub struct Suspended {
    pid: Pid,
    release: OwnedFd,
    report: OwnedFd,
    gate: Gate,
}

/// Finds a command the way `execvp` does, in the directories of `path`, with the rights that our
/// thread has.
///
/// # Errors
/// When there is no such file, or it is not executable.
pub fn find(command: &OsStr, path: Option<&OsStr>) -> Result<PathBuf, LaunchError> {
    let shown = command.to_string_lossy().into_owned();
    let refused = |reason: &str| {
        Err(LaunchError::NotExecutable {
            path: shown.clone(),
            reason: reason.to_owned(),
        })
    };
    if command.as_bytes().contains(&b'/') {
        let path = PathBuf::from(command);
        return match path.metadata() {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                refused("permission denied")
            }
            Err(_) => Err(LaunchError::NotFound(shown)),
            Ok(metadata) if metadata.is_dir() => refused("is a directory"),
            Ok(_) if !is_executable(&path) => refused("is not executable (`chmod +x` makes it so)"),
            Ok(_) => Ok(path),
        };
    }
    // What execvp takes without PATH.
    let path = path.unwrap_or(OsStr::new("/bin:/usr/bin"));
    env::split_paths(path)
        .map(|directory| directory.join(command))
        .find(|path| is_executable(path))
        .ok_or(LaunchError::NotFound(shown))
}

fn is_executable(path: &Path) -> bool {
    let may = || faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS);
    path.is_file() && may().is_ok()
}

/// Makes sure that a command can be traced, as far as its file can be read: neither it nor, for a
/// script, its interpreter is built for another machine.
///
/// # Errors
/// When it is.
pub fn check(command: &Path) -> Result<(), LaunchError> {
    let mut path = command.to_owned();
    // fs/exec.c follows so many scripts.
    for _ in 0..5 {
        let Ok(file) = open_regular(&path) else {
            break;
        };
        let Some(interpreter) = script_interpreter(&file) else {
            let cache = bounded::cache(&file);
            return match symbols::check_executable(Bounded(&cache)) {
                Err(error @ SymbolError::ForeignArchitecture { .. }) => {
                    Err(LaunchError::NotExecutable {
                        path: printable(&path),
                        reason: error.to_string(),
                    })
                }
                // What is no ELF file is for exec to judge.
                _ => Ok(()),
            };
        };
        path = interpreter;
    }
    Ok(())
}

/// Replaces us by the program.
///
/// # Errors
/// When that fails; else it does not return.
pub fn replace(program: &Program<'_>) -> Result<std::convert::Infallible, LaunchError> {
    let prepared = Prepared::new(program)?;
    prepared
        .become_user()
        .map_err(|errno| prepared.refused(errno))?;
    let errno = prepared.exec();
    Err(prepared.failed(errno))
}

/// All that a forked child needs: it must not allocate.
struct Prepared<'a> {
    program: Program<'a>,
    path: CString,
    arguments: Vec<CString>,
    /// The same for a shell that runs the file as a script.
    for_shell: Vec<CString>,
    environment: Vec<CString>,
    changes_user: bool,
}

const SHELL: &CStr = c"/bin/sh";

impl<'a> Prepared<'a> {
    fn new(program: &Program<'a>) -> Result<Self, LaunchError> {
        let c_string = |text: &OsStr| {
            CString::new(text.as_bytes()).map_err(|_| LaunchError::Argument(text.to_owned()))
        };
        let path = c_string(program.path.as_os_str())?;
        let arguments = program
            .arguments
            .iter()
            .map(|argument| c_string(argument))
            .collect::<Result<Vec<_>, _>>()?;
        let rest = arguments.iter().skip(1);
        let for_shell = [SHELL.to_owned(), path.clone()];
        Ok(Self {
            program: *program,
            for_shell: for_shell.into_iter().chain(rest.cloned()).collect(),
            path,
            arguments,
            environment: program
                .environment
                .entries()
                .map(|entry| c_string(OsStr::from_bytes(&entry)))
                .collect::<Result<_, _>>()?,
            changes_user: geteuid().is_root() && !program.account.uid.is_root(),
        })
    }

    fn become_user(&self) -> Result<(), Errno> {
        if !self.changes_user {
            return Ok(());
        }
        let Account {
            uid, gid, groups, ..
        } = self.program.account;
        setgroups(groups)?;
        setresgid(*gid, *gid, *gid)?;
        setresuid(*uid, *uid, *uid)
    }

    fn exec(&self) -> Errno {
        if !signals::SIGPIPE_WAS_IGNORED.load(Ordering::Relaxed) {
            // Rust ignores it, and ignored signals survive exec.
            // SAFETY: restores the default, installs no handler.
            let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
        }
        if signals::SIGCHLD_WAS_IGNORED.load(Ordering::Relaxed) {
            // SAFETY: as above.
            let _ = unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) };
        }
        match execve(&self.path, &self.arguments, &self.environment).unwrap_err() {
            // A script without a first line that says so: what execvp does.
            Errno::ENOEXEC => execve(SHELL, &self.for_shell, &self.environment).unwrap_err(),
            errno => errno,
        }
    }

    fn refused(&self, errno: Errno) -> LaunchError {
        LaunchError::User {
            user: self.program.account.uid.to_string(),
            errno,
        }
    }

    fn failed(&self, errno: Errno) -> LaunchError {
        let shown = printable(self.program.path);
        LaunchError::NotExecutable {
            reason: io::Error::from(errno).to_string(),
            path: shown,
        }
    }
}

/// What a child that fails to exec tells: at which step, and the error.
#[repr(i32)]
#[derive(Clone, Copy)]
enum Step {
    User = 1,
    Exec = 2,
}

impl Suspended {
    /// Forks a child that will run the program.
    ///
    /// # Errors
    /// When an argument holds a NUL byte or the system refuses.
    pub fn spawn(program: &Program<'_>) -> Result<Self, LaunchError> {
        let prepared = Prepared::new(program)?;
        let (wait, release) = pipe2(OFlag::O_CLOEXEC)?;
        let (report, reporter) = pipe2(OFlag::O_CLOEXEC)?;

        // SAFETY: the child calls async-signal-safe functions alone until it execs or exits; all
        // memory it needs has been allocated above.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => {
                drop((wait, reporter));
                let listener = numbers(&report).map_err(|_| LaunchError::System(Errno::EIO));
                let gate = listener.and_then(|[listener, errno]| {
                    if errno != 0 {
                        return Err(LaunchError::Gate(Errno::from_raw(errno)));
                    }
                    Ok(Gate::open(child, listener)?)
                });
                match gate {
                    Ok(gate) => Ok(Self {
                        pid: child,
                        release,
                        report,
                        gate,
                    }),
                    Err(error) => {
                        // The child exits when nobody can release it any more.
                        drop(release);
                        waitpid(child, None)?;
                        Err(error)
                    }
                }
            }
            ForkResult::Child => {
                drop((release, report));
                let mut reporter = File::from(reporter);
                let mut tell = |numbers: [i32; 2]| {
                    let [[a, b, c, d], [e, f, g, h]] = numbers.map(i32::to_ne_bytes);
                    let _ = reporter.write_all(&[a, b, c, d, e, f, g, h]);
                };
                if prepared.program.own_session {
                    // It leads no group, as only that would have it fail.
                    let _ = setsid();
                }
                match gate::install() {
                    Ok(listener) => tell([listener, 0]),
                    Err(errno) => tell([-1, errno as i32]),
                }
                let mut go = [0];
                let mut wait = File::from(wait);
                if !matches!(wait.read(&mut go), Ok(1)) {
                    // SAFETY: ends the process without running the parent's handlers.
                    unsafe { libc::_exit(125) };
                }
                match prepared.become_user() {
                    Err(errno) => tell([Step::User as i32, errno as i32]),
                    Ok(()) => tell([Step::Exec as i32, prepared.exec() as i32]),
                }
                // SAFETY: as above.
                unsafe { libc::_exit(125) }
            }
        }
    }

    /// The child's process id, which exec does not change.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Lets the child exec, and waits until it has. It comes to the gate on its way, where `serve` has
    /// to look after it.
    ///
    /// # Errors
    /// The error of exec; the child has then exited and been waited for.
    pub fn release(
        self,
        program: &Program<'_>,
        mut serve: impl FnMut(&Gate),
    ) -> Result<Gate, LaunchError> {
        let Self {
            pid,
            release,
            report,
            gate,
        } = self;
        // It fails when the child has been killed, which its end will tell.
        let _ = File::from(release).write_all(b"g");
        loop {
            let mut fds = [
                PollFd::new(report.as_fd(), PollFlags::POLLIN),
                PollFd::new(gate.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                result => result?,
            };
            if fds[0].any() == Some(true) {
                break;
            }
            serve(&gate);
        }
        let Ok([step, errno]) = numbers(&report) else {
            return Ok(gate);
        };
        waitpid(pid, None)?;
        let prepared = Prepared::new(program)?;
        let errno = Errno::from_raw(errno);
        Err(if step == Step::User as i32 {
            prepared.refused(errno)
        } else {
            prepared.failed(errno)
        })
    }
}

fn numbers(pipe: &OwnedFd) -> io::Result<[i32; 2]> {
    let mut bytes = [0; 8];
    File::from(pipe.try_clone()?).read_exact(&mut bytes)?;
    let [a, b, c, d, e, f, g, h] = bytes;
    Ok([[a, b, c, d], [e, f, g, h]].map(i32::from_ne_bytes))
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
    use crate::gate::Next;
    use nix::sys::wait::WaitStatus;
    use std::{fs, sync::Mutex};

    fn arguments(text: &[&str]) -> Vec<OsString> {
        text.iter().map(Into::into).collect()
    }

    /// Calls `test` with a way to describe programs, if a child can install a filter.
    fn with_gate(test: impl FnOnce(&Account, &Environment)) {
        // A child of one test would hold the pipes of another one open.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _lock = ONE_AT_A_TIME.lock();
        if geteuid().is_root() {
            test(&Account::current().unwrap(), &Environment::default());
        } else {
            println!("not tested: needs root");
        }
    }

    fn serve(gate: &Gate) {
        while let Next::Arrival(arrival) = gate.next().unwrap() {
            gate.let_pass(arrival);
        }
    }

    /// Lets a child through until it has ended.
    fn wait(pid: Pid, gate: &Gate) -> WaitStatus {
        loop {
            match gate.next().unwrap() {
                Next::Arrival(arrival) => gate.let_pass(arrival),
                Next::Over => return waitpid(pid, None).unwrap(),
                Next::Nobody => {
                    let mut fds = [PollFd::new(gate.as_fd(), PollFlags::POLLIN)];
                    poll(&mut fds, PollTimeout::NONE).unwrap();
                }
            }
        }
    }

    #[test]
    fn a_child_runs_when_released_and_not_before() {
        with_gate(|account, environment| {
            let directory = tempfile::tempdir().unwrap();
            let witness = directory.path().join("ran");
            let path = find(OsStr::new("touch"), None).unwrap();
            let program = Program {
                path: &path,
                arguments: &arguments(&["touch", witness.to_str().unwrap()]),
                environment,
                account,
                own_session: false,
            };
            let child = Suspended::spawn(&program).unwrap();
            let pid = child.pid();
            // It is our fork, and still is until released: the link names the same executable.
            let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
            assert_eq!(exe, env::current_exe().unwrap());
            assert!(!witness.exists());
            let mut came = Vec::new();
            let gate = child
                .release(&program, |gate| {
                    while let Next::Arrival(arrival) = gate.next().unwrap() {
                        came.push(arrival.code().unwrap().path);
                        gate.let_pass(arrival);
                    }
                })
                .unwrap();
            assert_eq!(came.first(), Some(&fs::canonicalize(&path).unwrap()));
            assert_eq!(wait(pid, &gate), WaitStatus::Exited(pid, 0));
            assert!(witness.exists());
        });
    }

    #[test]
    fn an_unreleased_child_exits_with_its_tracer() {
        with_gate(|account, environment| {
            let program = Program {
                path: Path::new("/bin/true"),
                arguments: &arguments(&["true"]),
                environment,
                account,
                own_session: false,
            };
            let child = Suspended::spawn(&program).unwrap();
            let pid = child.pid();
            drop(child);
            assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 125));
        });
    }

    #[test]
    fn errors_of_exec_come_back() {
        with_gate(|account, environment| {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), "no program").unwrap();
            let program = Program {
                path: file.path(),
                arguments: &arguments(&["x"]),
                environment,
                account,
                own_session: false,
            };
            let child = Suspended::spawn(&program).unwrap();
            let error = child.release(&program, serve).unwrap_err();
            assert_eq!(error.exit_code(), 126);
            assert!(error.to_string().contains("Permission denied"), "{error}");
        });
    }

    #[test]
    fn commands_are_found_as_a_shell_would() {
        let path = env::var_os("PATH");
        let find = |command: &str| find(OsStr::new(command), path.as_deref());
        assert!(find("sh").unwrap().is_absolute());
        assert_eq!(find("no-such-command").unwrap_err().exit_code(), 127);
        assert_eq!(find("/no/such").unwrap_err().exit_code(), 127);
        assert_eq!(find("/tmp").unwrap_err().exit_code(), 126);
    }

    #[test]
    fn scripts_are_judged_by_their_interpreter() {
        let script = tempfile::NamedTempFile::new().unwrap();
        fs::write(script.path(), "#! /bin/sh -e\ntrue\n").unwrap();
        check(script.path()).unwrap();
        let mut foreign = vec![0; 64];
        foreign[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        // e_type 2: a program; e_machine 243: RISC-V; e_version 1; e_ehsize 64.
        foreign[16..24].copy_from_slice(&[2, 0, 243, 0, 1, 0, 0, 0]);
        foreign[52] = 64;
        let interpreter = tempfile::NamedTempFile::new().unwrap();
        fs::write(interpreter.path(), foreign).unwrap();
        fs::write(
            script.path(),
            format!("#!{}\n", interpreter.path().display()),
        )
        .unwrap();
        let error = check(script.path()).unwrap_err();
        assert_eq!(error.exit_code(), 126);
        assert!(error.to_string().contains("Riscv64"), "{error}");
    }
}
