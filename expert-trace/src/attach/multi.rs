//! Uprobes by links of the kind `uprobe_multi`.
//!
//! Perf events are closed one after the other: each waits for grace periods of the kernel under a lock that
//! all share (`perf_uprobe_destroy` in kernel/trace/trace_event_perf.c). These links share no lock while
//! they wait (`bpf_uprobe_unregister` in kernel/trace/bpf_trace.c), so that many are closed in the time of
//! one.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::Place;
use crate::bpf::{self, Command, ProgLoad};

/// BPF_TRACE_UPROBE_MULTI
pub const ATTACH_TYPE: u32 = 48;
/// BPF_F_UPROBE_MULTI_RETURN
const ON_RETURN: u32 = 1;

/// `bpf_attr` for BPF_LINK_CREATE with this attach type.
#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    path: u64,
    offsets: u64,
    reference_counters: u64,
    cookies: u64,
    count: u32,
    multi_flags: u32,
    process: i32,
    _padding: u32,
}

/// Whether the kernel has such links (since Linux 6.6), and those of one process mean all of its threads.
///
/// Before Linux 6.10 a process' number was taken for that of a thread. The change that mended it (to
/// `bpf_uprobe_multi_link_attach` in kernel/trace/bpf_trace.c, carried back to stable kernels) also
/// refuses negative numbers, and does so before it looks at the path: others look at that first, and find
/// no regular file.
pub fn is_supported() -> bool {
    let load = ProgLoad {
        expected_attach_type: ATTACH_TYPE,
        ..ProgLoad::nothing()
    };
    // SAFETY: the attributes are complete.
    let Ok(program) = (unsafe { bpf::descriptor(Command::ProgLoad, &load) }) else {
        return false;
    };
    let create = |process| {
        let place = Place {
            path: c"/",
            offset: 0,
            cookie: 0,
            process,
            on_return: false,
        };
        link(program.as_fd(), place)
    };
    matches!(create(0), Err(Errno::EBADF)) && matches!(create(-1), Err(Errno::EINVAL))
}

/// Makes a link, for which the program must have been loaded. The probe is there until all descriptors of
/// the link are closed; the last one to be closed waits until the program runs nowhere.
///
/// # Errors
/// When the kernel refuses.
pub fn link(program: BorrowedFd, place: Place) -> Result<OwnedFd, Errno> {
    let Place {
        path,
        offset,
        cookie,
        process,
        on_return,
    } = place;
    let create = LinkCreate {
        program: program.as_raw_fd() as u32,
        attach_type: ATTACH_TYPE,
        path: path.as_ptr() as u64,
        offsets: (&raw const offset) as u64,
        cookies: (&raw const cookie) as u64,
        count: 1,
        multi_flags: if on_return { ON_RETURN } else { 0 },
        process,
        ..LinkCreate::default()
    };
    // SAFETY: there is one offset and one cookie, and the path ends with a zero.
    unsafe { bpf::descriptor(Command::LinkCreate, &create) }
}
