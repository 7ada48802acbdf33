//! The gate: our child, and all that it forks, waits for us whenever it is about to map code, so that
//! probes are in place before the first instruction of a library or a program runs.
//!
//! It is a seccomp filter with user notification (seccomp_unotify(2)), which the child installs
//! before it execs. `execve`, and `mmap` of a file as code, wait for our answer, which is always that
//! the call goes on. Parents see nothing of it: unlike a stop by a signal, it cannot disturb a shell's
//! job control, and unlike ptrace, it leaves the process free for a debugger. All other calls go
//! through, for most of them by a table look-up in the kernel.
//!
//! A call that waits fails when nobody holds the listening end, and waits for ever when who has
//! received it dies. Therefore a guardian process holds that end. It tells us who has come, and lets
//! them pass when we say so; when we have ended, it lets everybody pass at once, until the last process
//! has ended.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    mem::zeroed,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::{ffi::OsStringExt as _, fs::FileExt as _},
    },
    path::{Path, PathBuf},
    ptr,
};

use libc::{
    AT_FDCWD, BPF_ABS, BPF_JEQ, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W, MAP_ANONYMOUS,
    PROT_EXEC, SECCOMP_FILTER_FLAG_NEW_LISTENER, SECCOMP_FILTER_FLAG_SPEC_ALLOW,
    SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND,
    SECCOMP_RET_ALLOW, SECCOMP_RET_USER_NOTIF, SECCOMP_SET_MODE_FILTER,
    SECCOMP_USER_NOTIF_FLAG_CONTINUE, SYS_execve, SYS_execveat, SYS_mmap, c_int, c_long, c_ulong,
    seccomp_notif, seccomp_notif_resp, sock_filter, sock_fprog,
};
use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair},
    unistd::{ForkResult, Pid, chdir, fork, setsid},
};

use crate::target::{open_regular, read_regular, script_interpreter};

/// The gate, as seen by the tracer: a line to the guardian.
#[derive(Debug)]
pub struct Gate {
    line: OwnedFd,
}

/// A thread that waits for us.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// The thread, in our PID namespace; 0 when it is not in it.
    pub thread: u32,
    id: u64,
    call: Call,
}

#[derive(Clone, Copy, Debug)]
enum Call {
    /// `mmap` of this descriptor.
    Map(RawFd),
    /// `execve` of the path at this address, from this directory.
    Exec { directory: RawFd, path: u64 },
}

/// What is at the gate.
#[derive(Clone, Copy, Debug)]
pub enum Next {
    /// A thread that waits.
    Arrival(Arrival),
    /// Nobody.
    Nobody,
    /// Nobody, and nobody will come: all processes have ended.
    Over,
}

/// A file that is about to be run.
#[derive(Debug)]
pub struct Code {
    /// The file.
    pub file: File,
    /// Its path, for people.
    pub path: PathBuf,
}

impl Code {
    /// Path by which the kernel finds the file, for as long as it is open.
    pub fn own_path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }
}

/// Installs the filter on the calling thread, for it and all that it forks. Gives the number of the
/// listening descriptor, which an exec closes.
///
/// Calls nothing that is not async-signal-safe, so that a forked child can use it.
///
/// # Errors
/// When the kernel lacks CONFIG_SECCOMP_FILTER or we lack CAP_SYS_ADMIN.
pub fn install() -> Result<RawFd, Errno> {
    let mut filter = filter();
    let program = sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    let seccomp = |flags: c_ulong| {
        // SAFETY: the program and its instructions live during the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                SECCOMP_SET_MODE_FILTER,
                flags,
                &raw const program,
            )
        };
        Errno::result(result).map(|fd| fd as RawFd)
    };
    // SPEC_ALLOW: before Linux 5.16 a filter switched on mitigations that cost the program speed.
    let flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // WAIT_KILLABLE_RECV, since Linux 5.19: a signal does not make the program come to the gate twice.
    match seccomp(flags | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV) {
        Err(Errno::EINVAL) => seccomp(flags),
        result => result,
    }
}

/// Offsets in `seccomp_data` (include/uapi/linux/seccomp.h). The arguments' lower halves come first:
/// both architectures are little-endian.
mod data {
    pub const NUMBER: u32 = 0;
    pub const ARCHITECTURE: u32 = 4;
    pub const fn argument(index: u32) -> u32 {
        16 + 8 * index
    }
}

/// `AUDIT_ARCH_*` of this machine (include/uapi/linux/audit.h): calls of other ABIs go through.
const ARCHITECTURE: u32 = 0xc000_0000
    | if cfg!(target_arch = "x86_64") {
        libc::EM_X86_64 as u32
    } else {
        libc::EM_AARCH64 as u32
    };

const FILTER_LENGTH: usize = 12;

fn filter() -> [sock_filter; FILTER_LENGTH] {
    let load = |offset| statement(BPF_LD | BPF_W | BPF_ABS, offset);
    // Jumps are given by the index of their targets.
    let jump = |at: usize, test: u32, value: u32, yes: usize, no: usize| sock_filter {
        code: (BPF_JMP | test | BPF_K) as u16,
        jt: (yes - at - 1) as u8,
        jf: (no - at - 1) as u8,
        k: value,
    };
    const ALLOW: usize = 10;
    const WAIT: usize = 11;
    [
        load(data::ARCHITECTURE),
        jump(1, BPF_JEQ, ARCHITECTURE, 2, ALLOW),
        load(data::NUMBER),
        jump(3, BPF_JEQ, SYS_execve as u32, WAIT, 4),
        jump(4, BPF_JEQ, SYS_execveat as u32, WAIT, 5),
        jump(5, BPF_JEQ, SYS_mmap as u32, 6, ALLOW),
        load(data::argument(2)),
        jump(7, BPF_JSET, PROT_EXEC as u32, 8, ALLOW),
        load(data::argument(3)),
        jump(9, BPF_JSET, MAP_ANONYMOUS as u32, ALLOW, WAIT),
        statement(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        statement(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
    ]
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

/// On the line, in place of an arrival's id, which the kernel draws from 64 random bits: a question
/// whether anybody is left to come.
const ANYBODY_LEFT: u64 = 0;

impl Gate {
    /// Starts the guardian, with the listening end of the child that has installed the filter.
    ///
    /// # Errors
    /// When the system refuses a descriptor or a process.
    pub fn open(child: Pid, listener: RawFd) -> Result<Self, Errno> {
        // SAFETY: the calls take plain numbers.
        let process = unsafe { libc::syscall(libc::SYS_pidfd_open, child.as_raw(), 0) };
        let process = descriptor(process)?;
        // SAFETY: as above.
        let listener =
            unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), listener, 0) };
        let listener = descriptor(listener)?;
        let (line, guardians) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        // SAFETY: the child calls async-signal-safe functions alone, and never returns.
        match unsafe { fork() }? {
            ForkResult::Parent { .. } => Ok(Self { line }),
            ForkResult::Child => {
                Guardian::new(&listener, &guardians).guard();
                // SAFETY: ends the process without running the parent's handlers.
                unsafe { libc::_exit(0) }
            }
        }
    }

    /// Who has come, without waiting.
    ///
    /// # Errors
    /// When the line breaks.
    pub fn next(&self) -> io::Result<Next> {
        let mut message = [0; ARRIVAL_BYTES];
        match recv(self.line.as_raw_fd(), &mut message, MsgFlags::MSG_DONTWAIT) {
            Ok(ARRIVAL_BYTES) => Ok(Next::Arrival(Arrival::from_bytes(&message))),
            Ok(_) | Err(Errno::ECONNRESET) => Ok(Next::Over),
            Err(Errno::EAGAIN) => Ok(Next::Nobody),
            Err(error) => Err(error.into()),
        }
    }

    /// Lets the thread's call go on.
    pub fn let_pass(&self, arrival: Arrival) {
        // It fails when the guardian has ended, which the next look will show.
        let _ = send(
            self.line.as_raw_fd(),
            &arrival.id.to_ne_bytes(),
            MsgFlags::MSG_NOSIGNAL,
        );
    }

    /// Leaves the gate to the guardian. Gives whether there are processes left that could come.
    pub fn leave(self) -> bool {
        let question = ANYBODY_LEFT.to_ne_bytes();
        if send(self.line.as_raw_fd(), &question, MsgFlags::MSG_NOSIGNAL).is_err() {
            return false;
        }
        let mut message = [0; ARRIVAL_BYTES];
        loop {
            match recv(self.line.as_raw_fd(), &mut message, MsgFlags::empty()) {
                // The guardian lets them pass when the line is closed.
                Ok(ARRIVAL_BYTES) | Err(Errno::EINTR) => {}
                Ok(0) | Err(_) => return false,
                Ok(_) => return true,
            }
        }
    }
}

impl AsFd for Gate {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.line.as_fd()
    }
}

impl AsRawFd for Gate {
    fn as_raw_fd(&self) -> RawFd {
        self.line.as_raw_fd()
    }
}

const ARRIVAL_BYTES: usize = size_of::<seccomp_notif>();

impl Arrival {
    fn from_bytes(bytes: &[u8; ARRIVAL_BYTES]) -> Self {
        // SAFETY: the source has the size of the type, which is made of integers.
        let arrival: seccomp_notif = unsafe { ptr::read_unaligned(bytes.as_ptr().cast()) };
        let arguments = arrival.data.args;
        let number = c_long::from(arrival.data.nr);
        let call = if number == SYS_mmap {
            Call::Map(arguments[4] as RawFd)
        } else if number == SYS_execveat {
            Call::Exec {
                directory: arguments[0] as RawFd,
                path: arguments[1],
            }
        } else {
            Call::Exec {
                directory: AT_FDCWD,
                path: arguments[0],
            }
        };
        Self {
            thread: arrival.pid,
            id: arrival.id,
            call,
        }
    }

    /// Whether the thread maps a file that it has opened, rather than execs one that need not be there.
    pub fn maps(&self) -> bool {
        matches!(self.call, Call::Map(_))
    }

    /// The file that the thread is about to run code of: for a script, its interpreter.
    ///
    /// # Errors
    /// When there is no such file, as when a shell tries the directories of its path in turn, or we
    /// cannot open it.
    pub fn code(&self) -> io::Result<Code> {
        let thread = PathBuf::from(format!("/proc/{}", self.thread));
        let code = |path: PathBuf| -> io::Result<Code> {
            let file = open_regular(&path)?;
            let path = fs::read_link(&path)?;
            Ok(Code { file, path })
        };
        let (directory, path) = match self.call {
            Call::Map(fd) => return code(thread.join(format!("fd/{fd}"))),
            Call::Exec { directory, path } => (directory, read_path(&thread, path)?),
        };
        if path.as_os_str().is_empty() {
            return code(thread.join(format!("fd/{directory}")));
        }
        let directory = match directory {
            AT_FDCWD => thread.join("cwd"),
            directory => thread.join(format!("fd/{directory}")),
        };
        let mut code = open_as(&thread, &directory, &path)?;
        // fs/exec.c follows so many scripts.
        for _ in 0..5 {
            let Some(interpreter) = script_interpreter(&code.file) else {
                break;
            };
            code = open_as(&thread, &thread.join("cwd"), &interpreter)?;
        }
        Ok(code)
    }
}

/// Reads a string of the target, as long as a path can be.
fn read_path(thread: &Path, address: u64) -> io::Result<PathBuf> {
    let memory = File::open(thread.join("mem"))?;
    let mut path = Vec::new();
    let mut page = [0; 4096];
    // Reads end with a page: the next one need not be mapped.
    while path.len() < libc::PATH_MAX as usize {
        let at = address + path.len() as u64;
        let left = page.len() - (at as usize % page.len());
        let read = memory.read_at(&mut page[..left], at)?;
        let bytes = &page[..read];
        if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
            path.extend(&bytes[..end]);
            return Ok(OsString::from_vec(path).into());
        }
        if read == 0 {
            break;
        }
        path.extend(bytes);
    }
    Err(io::ErrorKind::InvalidFilename.into())
}

/// Opens a regular file for reading by the path that a process has for it. The path is that program's
/// choice: what else it leads to is not opened, which could have effects with our rights.
fn open_as(thread: &Path, directory: &Path, path: &Path) -> io::Result<Code> {
    let own = path
        .strip_prefix("/proc/self")
        .or_else(|_| path.strip_prefix("/proc/thread-self"));
    let descriptor = path.strip_prefix("/dev/fd");
    let file = if let Ok(of_thread) = own {
        open_regular(&thread.join(of_thread))?
    } else if let Ok(number) = descriptor {
        open_regular(&thread.join("fd").join(number))?
    } else if path.starts_with("/proc") {
        // Its links lead to files and not to paths, which the call below refuses to follow.
        open_regular(path)?
    } else if path.is_absolute() {
        // Links in another root directory than ours lead to places below it.
        let root = File::open(thread.join("root"))?;
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT);
        read_regular(&openat2(&root, path, how)?.into())?
    } else {
        open_regular(&directory.join(path))?
    };
    let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    Ok(Code { file, path })
}

/// So many threads can wait at a time; more are received when some of them have passed.
const MAX_WAITING: usize = 1024;

/// What the guardian knows.
struct Guardian<'a> {
    listener: &'a OwnedFd,
    line: &'a OwnedFd,
    tracer_lives: bool,
    /// Ids of those that wait for the tracer.
    waiting: [u64; MAX_WAITING],
    waiting_count: usize,
}

impl<'a> Guardian<'a> {
    fn new(listener: &'a OwnedFd, line: &'a OwnedFd) -> Self {
        Self {
            listener,
            line,
            tracer_lives: true,
            waiting: [0; MAX_WAITING],
            waiting_count: 0,
        }
    }

    /// Guards until the last process has ended.
    fn guard(mut self) {
        // Whoever ends the tracer by its name does not mean the guardian.
        // SAFETY: the name is a string that the call copies.
        unsafe { libc::prctl(libc::PR_SET_NAME, c"trace-guardian".as_ptr()) };
        // A terminal, a pipe or a directory that we held would keep others waiting.
        let _ = setsid();
        let _ = chdir(c"/");
        close_all_but(self.listener, self.line);
        loop {
            let interest = |is: bool| match is {
                true => PollFlags::POLLIN,
                false => PollFlags::empty(),
            };
            let mut fds = [
                PollFd::new(
                    self.listener.as_fd(),
                    interest(self.waiting_count < MAX_WAITING),
                ),
                PollFd::new(self.line.as_fd(), interest(true)),
            ];
            let polled = if self.tracer_lives { 2 } else { 1 };
            match poll(&mut fds[..polled], PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                Err(_) => return,
                Ok(_) => {}
            }
            let [came, told] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
            if self.tracer_lives && !told.is_empty() {
                self.listen_to_tracer();
            }
            if came.contains(PollFlags::POLLIN) {
                match receive(self.listener) {
                    Ok(Some(arrival)) => self.announce(&arrival),
                    Ok(None) => {}
                    Err(_) => return,
                }
            } else if came.contains(PollFlags::POLLHUP) {
                return;
            }
        }
    }

    fn listen_to_tracer(&mut self) {
        let mut id = [0; 8];
        match recv(self.line.as_raw_fd(), &mut id, MsgFlags::empty()) {
            Ok(8) => {}
            Err(Errno::EINTR) => return,
            _ => return self.lose_tracer(),
        }
        let id = u64::from_ne_bytes(id);
        if id != ANYBODY_LEFT {
            let waiting = &mut self.waiting[..self.waiting_count];
            if let Some(index) = waiting.iter().position(|waiting| *waiting == id) {
                waiting[index] = waiting[self.waiting_count - 1];
                self.waiting_count -= 1;
            }
            return let_pass(self.listener, id);
        }
        let left =
            look(self.listener.as_fd()).is_ok_and(|state| !state.contains(PollFlags::POLLHUP));
        // Without an answer the line ends with us.
        if left {
            let _ = send(self.line.as_raw_fd(), b"y", MsgFlags::MSG_NOSIGNAL);
        }
    }

    fn announce(&mut self, arrival: &seccomp_notif) {
        if self.tracer_lives {
            self.waiting[self.waiting_count] = arrival.id;
            self.waiting_count += 1;
            // SAFETY: the structure is made of integers, without gaps between them.
            let bytes: &[u8; ARRIVAL_BYTES] = unsafe { &*ptr::from_ref(arrival).cast() };
            if send(self.line.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL).is_err() {
                self.lose_tracer();
            }
        } else {
            let_pass(self.listener, arrival.id);
        }
    }

    fn lose_tracer(&mut self) {
        self.tracer_lives = false;
        for id in &self.waiting[..self.waiting_count] {
            let_pass(self.listener, *id);
        }
        self.waiting_count = 0;
    }
}

fn close_all_but(one: &OwnedFd, other: &OwnedFd) {
    let [one, other] = [one.as_raw_fd() as u32, other.as_raw_fd() as u32];
    let (low, high) = (one.min(other), one.max(other));
    for (first, end) in [(0, low), (low + 1, high), (high + 1, u32::MAX)] {
        if first < end {
            // SAFETY: the guardian never uses the descriptors that are closed.
            unsafe { libc::syscall(libc::SYS_close_range, first, end - 1, 0) };
        }
    }
}

fn look(listener: BorrowedFd<'_>) -> Result<PollFlags, Errno> {
    let mut fds = [PollFd::new(listener, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].revents().unwrap_or(PollFlags::empty()))
}

/// Takes the next arrival; none when it was killed, or a signal came in between.
fn receive(listener: &OwnedFd) -> Result<Option<seccomp_notif>, Errno> {
    // SAFETY: the structure is made of integers.
    let mut arrival: seccomp_notif = unsafe { zeroed() };
    // SAFETY: the structure is of the size that the request's number tells.
    let result = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            SECCOMP_IOCTL_NOTIF_RECV,
            &raw mut arrival,
        )
    };
    match Errno::result(result) {
        Ok(_) => Ok(Some(arrival)),
        Err(Errno::ENOENT | Errno::EINTR) => Ok(None),
        Err(error) => Err(error),
    }
}

fn let_pass(listener: &OwnedFd, id: u64) {
    let answer = seccomp_notif_resp {
        id,
        val: 0,
        error: 0,
        flags: SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
    };
    // It fails only when the thread has been killed.
    // SAFETY: the structure is of the size that the request's number tells.
    unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            SECCOMP_IOCTL_NOTIF_SEND,
            &raw const answer,
        )
    };
}

/// Result of a system call that gives a new descriptor.
fn descriptor(result: c_long) -> Result<OwnedFd, Errno> {
    let fd = Errno::result(result)? as c_int;
    // SAFETY: the descriptor is new and ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
