//! Uprobes by perf events, for kernels without `uprobe_multi` links.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
};

use super::Place;
use crate::{
    bpf::{self, Command},
    uprobe_event::{self, Processes},
};

/// BPF_PERF_EVENT
const ATTACH_TYPE: u32 = 41;

/// Start of `bpf_attr` for BPF_LINK_CREATE with this attach type.
#[repr(C)]
struct LinkCreate {
    program: u32,
    event: u32,
    attach_type: u32,
    flags: u32,
    cookie: u64,
}

/// Makes an event, and a link that has it run the program (since Linux 5.15). The link keeps the event, and so
/// the probe.
///
/// # Errors
/// When the kernel refuses.
pub fn link(program: BorrowedFd, place: Place) -> io::Result<OwnedFd> {
    let Place {
        path,
        offset,
        cookie,
        process,
        on_return,
    } = place;
    let processes = match process {
        0 => Processes::All,
        process => Processes::One(process),
    };
    let event = uprobe_event::open(path, offset, on_return, processes)?;
    let create = LinkCreate {
        program: program.as_raw_fd() as u32,
        event: event.as_fd().as_raw_fd() as u32,
        attach_type: ATTACH_TYPE,
        flags: 0,
        cookie,
    };
    // SAFETY: the attributes have no addresses.
    Ok(unsafe { bpf::descriptor(Command::LinkCreate, &create) }?)
}
