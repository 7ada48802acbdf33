//! BPF programs: they sit on the entry of a few ggml functions of an unmodified llama.cpp, read the
//! ids of the experts that its router has chosen, and pass them on through a ring buffer.
//!
//! | program | function under it | why |
//! |---|---|---|
//! | `get_rows` | `ggml_compute_forward_get_rows(params, dst)` | `dst->src[1]` holds the ids, complete |
//! | `graph_compute` | `ggml_backend_sched_graph_compute_async(sched, graph)` | a pass begins |
//! | `set_inputs` | `llm_graph_result::set_inputs(ubatch)` | positions and sequences of the pass |
//! | `process_ubatch` | `llama_context::process_ubatch(ubatch, …)` | whose pass it is, and the same |
//! | `leave_context` | `llama_free(ctx)`, `ggml_backend_sched_free(sched)` | a context ends |
//! | `libraries` | `_dl_debug_state()` of the dynamic linker | a child of ours has mapped libraries |
//!
//! Memory is never shared between two hits: since Linux 6.0 a uprobe program can be preempted by
//! another hit on the same CPU (`bpf_prog_run_array_uprobe`, include/linux/bpf.h), which rules out
//! per-CPU scratch space. Records are written in place in the ring buffer, and counters are added
//! to atomically.
#![no_std]
#![no_main]
// `core::sync::atomic` has no read-modify-write operations on this target: it does not offer
// compare-and-swap, while an atomic add is one BPF instruction.
#![allow(internal_features)]
#![feature(core_intrinsics)]

mod maps;
mod pass;
mod rows;
mod target;

use aya_ebpf::{helpers::generated::bpf_send_signal, macros::uprobe, programs::ProbeContext};
use expert_trace_common::{CONTROL_STOPS, CONTROL_TARGET, Counter, Header, Kind};

use crate::{
    maps::{CONTROL, active, count},
    target::Address,
};

#[uprobe]
fn get_rows(ctx: ProbeContext) -> u32 {
    if !active() {
        return 0;
    }
    count(Counter::Entered, 1);
    let (Some(params), Some(dst)) = (ctx.arg::<u64>(0), ctx.arg::<u64>(1)) else {
        count(Counter::HitUnreadable, 1);
        return 0;
    };
    rows::on_get_rows(&ctx, Address(params), Address(dst));
    0
}

#[uprobe]
fn graph_compute(ctx: ProbeContext) -> u32 {
    if active()
        && let Some(sched) = ctx.arg::<u64>(0)
    {
        pass::on_graph_compute(sched);
    }
    0
}

#[uprobe]
fn set_inputs(ctx: ProbeContext) -> u32 {
    if active()
        && let Some(ubatch) = ctx.arg::<u64>(1)
    {
        pass::on_set_inputs(ubatch);
    }
    0
}

#[uprobe]
fn process_ubatch(ctx: ProbeContext) -> u32 {
    if active()
        && let (Some(llama_context), Some(ubatch)) = (ctx.arg::<u64>(0), ctx.arg::<u64>(1))
    {
        pass::on_process_ubatch(llama_context, ubatch);
    }
    0
}

#[uprobe]
fn leave_context(ctx: ProbeContext) -> u32 {
    if active()
        && let Some(context) = ctx.arg::<u64>(0)
    {
        pass::on_leave_context(context);
    }
    0
}

/// SIGSTOP, the same number on all architectures that Linux' BPF JITs support.
const SIGSTOP: u32 = 19;

#[uprobe]
fn libraries(_ctx: ProbeContext) -> u32 {
    // A child of the target that shares its memory (vfork) would stop, and nobody continue it.
    let Some(target) = CONTROL.get_ptr_mut(CONTROL_TARGET) else {
        return 0;
    };
    let process = target::process();
    // SAFETY: the map's value is alive during the program. The first hit is of the target itself,
    // before it runs any code of its own.
    let target = unsafe { &mut *target };
    if *target == 0 {
        *target = process;
    }
    if *target != process {
        return 0;
    }
    // The signal is delivered on the way back to user space, so that the process stops before it
    // runs a single instruction of a library that has just been mapped.
    // SAFETY: the helper takes a plain number.
    if unsafe { bpf_send_signal(SIGSTOP) } == 0 {
        if let Some(stops) = CONTROL.get_ptr_mut(CONTROL_STOPS) {
            maps::add(stops.cast(), 1);
        }
        maps::emit_header(Header {
            kind: Kind::Libraries as u8,
            process,
            thread: target::thread(),
            ..Header::default()
        });
    }
    0
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

// `bpf_probe_read_user` and `bpf_send_signal` are open to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
