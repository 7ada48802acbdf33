//! Uprobes as perf events (perf_event_open(2)).

use std::{
    ffi::CStr,
    fs, io,
    os::fd::{FromRawFd as _, OwnedFd},
};

use nix::errno::Errno;

/// What the kernel shows of them.
pub const UPROBE: &str = "/sys/bus/event_source/devices/uprobe";

/// Start of `perf_event_attr`, as long as its third version (include/uapi/linux/perf_event.h).
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    before_path: [u64; 5],
    /// `config1`
    path: u64,
    /// `config2`
    offset: u64,
    rest: [u64; 2],
}

/// Whose hits an event is for.
#[derive(Clone, Copy, Debug)]
pub enum Processes {
    /// Those of all that map the file.
    All,
    /// Those of one, by its number; 0 is our own.
    One(i32),
}

/// Makes an event of the hits of an instruction, or of the returns of the function that begins there.
///
/// # Errors
/// The kernel's; that there are no uprobes is a file that was not found.
pub fn open(
    path: &CStr,
    offset: u64,
    on_return: bool,
    processes: Processes,
) -> io::Result<OwnedFd> {
    /// PERF_PROBE_CONFIG_IS_RETPROBE (kernel/events/core.c)
    const ON_RETURN: u64 = 1;
    const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
    const NO_GROUP: i32 = -1;
    let kind = fs::read_to_string(format!("{UPROBE}/type"))?;
    let kind = kind.trim().parse().map_err(io::Error::other)?;
    let attributes = Attributes {
        kind,
        size: size_of::<Attributes>() as u32,
        config: if on_return { ON_RETURN } else { 0 },
        path: path.as_ptr() as u64,
        offset,
        ..Attributes::default()
    };
    // An event of all processes is one of a CPU; the breakpoint is there for all of them.
    let (process, cpu) = match processes {
        Processes::All => (-1, 0),
        Processes::One(process) => (process, -1),
    };
    // SAFETY: the attributes are as large as they say, and live during the call, as does the path.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            process,
            cpu,
            NO_GROUP,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    let fd = Errno::result(fd)?;
    // SAFETY: the descriptor is new and ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
