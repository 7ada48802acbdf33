//! Following forks: which processes are traced.
//!
//! A process is in `FOLLOWED` if, and only if, it is the tracer's first child, or the one that forked it
//! is in it and forks are followed. No entry is removed when a
//! process ends, since its id comes back by a fork alone, which is seen.

use aya_ebpf::{
    bindings::bpf_pidns_info,
    helpers::{bpf_probe_read_kernel, generated::bpf_get_ns_current_pid_tgid},
};
use expert_trace_common::{
    CONTROL_EXIT_CODE_OFFSET, CONTROL_FIRST_CHILD, CONTROL_FOLLOW, CONTROL_NAMESPACE,
    CONTROL_TGID_OFFSET, CONTROL_TRACER, Counter, Follow, Header, Kind,
};

use crate::{
    maps::{CONTROL, FOLLOWED, active, control, count, emit, emit_header, is_followed},
    target::{process, thread},
};

/// include/uapi/linux/sched.h
const CLONE_THREAD: u64 = 0x10000;

#[inline(always)]
pub fn on_new_task(task: u64, clone_flags: u64) {
    let follow = control(CONTROL_FOLLOW);
    if follow == Follow::Nobody as u32 || clone_flags & CLONE_THREAD != 0 {
        return;
    }
    let tgid = task.wrapping_add(u64::from(control(CONTROL_TGID_OFFSET))) as *const u32;
    // SAFETY: the helper checks the address, which the kernel and its own type information gave.
    let Ok(child) = (unsafe { bpf_probe_read_kernel(tgid) }) else {
        count(Counter::StateLost, 1);
        return;
    };
    let inherits = follow == Follow::Forks as u32 && is_followed(process());
    if inherits || is_first_child_of_the_tracer(child) {
        if FOLLOWED.insert(child, 1, 0).is_err() {
            count(Counter::StateLost, 1);
        }
        emit_header(Header {
            kind: Kind::ProcessStart as u8,
            process: child,
            thread: child,
            ..Header::default()
        });
    } else {
        // It fails only when there is no such entry.
        let _ = FOLLOWED.remove(child);
    }
}

#[inline(always)]
pub fn on_end_task(task: u64) {
    if !active() || control(CONTROL_FOLLOW) == Follow::Nobody as u32 {
        return;
    }
    let exit_code = task.wrapping_add(u64::from(control(CONTROL_EXIT_CODE_OFFSET))) as *const u32;
    // SAFETY: as above.
    let Ok(exit_code) = (unsafe { bpf_probe_read_kernel(exit_code) }) else {
        return;
    };
    // A main thread can end long before the others. What they die of counts, too.
    let killed = exit_code & 0x7f != 0;
    if !killed && process() != thread() {
        return;
    }
    emit(
        Header {
            kind: Kind::ProcessEnd as u8,
            process: process(),
            thread: thread(),
            ..Header::default()
        },
        exit_code,
    );
}

#[inline(always)]
fn is_first_child_of_the_tracer(child: u32) -> bool {
    let Some(first_child) = CONTROL.get_ptr_mut(CONTROL_FIRST_CHILD) else {
        return false;
    };
    // SAFETY: the map's value is alive during the program.
    let first_child = unsafe { &mut *first_child };
    if *first_child != 0 || process_in_tracers_namespace() != control(CONTROL_TRACER) {
        return false;
    }
    *first_child = child;
    true
}

/// The current process as the tracer would name it; 0 in another PID namespace than the tracer's.
#[inline(always)]
fn process_in_tracers_namespace() -> u32 {
    let [device, inode] = CONTROL_NAMESPACE.map(|index| u64::from(control(index)));
    let mut ids = bpf_pidns_info { pid: 0, tgid: 0 };
    // SAFETY: the destination is as large as the size says.
    let result = unsafe {
        bpf_get_ns_current_pid_tgid(
            device,
            inode,
            &raw mut ids,
            size_of::<bpf_pidns_info>() as u32,
        )
    };
    if result == 0 { ids.tgid } else { 0 }
}
