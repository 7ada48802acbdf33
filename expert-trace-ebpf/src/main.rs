//! BPF programs: they sit on the entry of a few ggml functions of an unmodified llama.cpp, read the
//! ids of the experts that its router has chosen, and pass them on through a ring buffer.
//!
//! | program | function under it | why |
//! |---|---|---|
//! | `get_rows` | `ggml_compute_forward_get_rows(params, dst)` | `dst->src[1]` holds the ids, complete |
//! | `cpu_split` | `ggml_graph_compute(cgraph, cplan)` | ids that a device has chosen for the CPU |
//! | `cpu_split_done` | the same, on return | router logits that the CPU has computed for a device |
//! | `fetch` | `ggml_backend_tensor_get_async(backend, tensor, data, …)` | the scheduler wants ids |
//! | `weights_follow` | `ggml_backend_tensor_set_async(…)` | … and has them |
//! | `tensor_get` | `ggml_backend_tensor_get(tensor, data, …)` | the target's own code wants ids |
//! | `tensor_get_done` | the same, on return | … and has them |
//! | `eval_callback` | `ggml_backend_sched_set_eval_callback(sched, callback, …)` | … and who that is |
//! | `device_mul_mat_id` | `ggml_cuda_mul_mat_id(context, dst)` | `dst->src[2]` holds the ids, on the device |
//! | `device_memcpy` | `cudaMemcpyAsync(dst, src, count, kind, …)` | … and a copy of them on the host |
//! | `process_ubatch` | `llama_context::process_ubatch(ubatch, …)` | a pass begins: whose, and positions and sequences of its tokens |
//! | `graph_compute` | `ggml_backend_sched_graph_compute_async(sched, graph)` | a pass begins, where the above has not begun it |
//! | `set_inputs` | `llm_graph_result::set_inputs(ubatch)` | … and the same of its tokens |
//! | `leave_context` | `llama_free(ctx)`, `ggml_backend_sched_free(sched)` | a context ends |
//! | `libraries` | `_dl_debug_state()` of the dynamic linker | the target has mapped libraries |
//! | `new_task` | tracepoint `task_newtask` | a process that is followed forks |
//! | `end_task` | tracepoint `sched_process_exit` | a process that is followed ends |
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

mod copies;
mod follow;
mod get_rows;
mod maps;
mod pass;
mod rows;
mod split;
mod target;
mod tensor;
mod weights;

use aya_ebpf::{
    helpers::bpf_ktime_get_ns,
    macros::{raw_tracepoint, uprobe, uretprobe},
    programs::{ProbeContext, RawTracePointContext, RetProbeContext},
};
use expert_trace_common::{Counter, Header, Kind};

use crate::{
    maps::{count, hit, hit_of_ids},
    target::Address,
};

#[uprobe]
fn get_rows(ctx: ProbeContext) -> u32 {
    let Some(hit) = hit_of_ids(&ctx) else {
        return 0;
    };
    let (Some(params), Some(dst)) = (ctx.arg::<u64>(0), ctx.arg::<u64>(1)) else {
        count(Counter::HitUnreadable, 1);
        return 0;
    };
    get_rows::on_get_rows(&ctx, hit.site.source, Address(params), Address(dst));
    0
}

#[uprobe]
fn cpu_split(ctx: ProbeContext) -> u32 {
    if let Some(hit) = hit(&ctx)
        && let Some(cgraph) = ctx.arg::<u64>(0)
    {
        split::on_split(&ctx, hit.site.source, Address(cgraph));
    }
    0
}

#[uretprobe]
fn cpu_split_done(ctx: RetProbeContext) -> u32 {
    if let Some(hit) = hit(&ctx) {
        split::on_split_done(&ctx, hit.site.source, ctx.ret());
    }
    0
}

#[uprobe]
fn fetch(ctx: ProbeContext) -> u32 {
    if let Some(_hit) = hit(&ctx)
        && let (Some(tensor), Some(data), Some(offset)) =
            (ctx.arg::<u64>(1), ctx.arg::<u64>(2), ctx.arg::<u64>(3))
    {
        copies::on_fetch(Address(tensor), data, offset);
    }
    0
}

#[uprobe]
fn weights_follow(ctx: ProbeContext) -> u32 {
    if let Some(hit) = hit(&ctx) {
        copies::on_weights_follow(&ctx, hit.site.source);
    }
    0
}

#[uprobe]
fn tensor_get(ctx: ProbeContext) -> u32 {
    if let Some(_hit) = hit(&ctx)
        && let (Some(tensor), Some(data), Some(offset), Some(bytes)) = (
            ctx.arg::<u64>(0),
            ctx.arg::<u64>(1),
            ctx.arg::<u64>(2),
            ctx.arg::<u64>(3),
        )
    {
        copies::on_tensor_get(Address(tensor), data, offset, bytes);
    }
    0
}

#[uretprobe]
fn tensor_get_done(ctx: RetProbeContext) -> u32 {
    if let Some(hit) = hit(&ctx) {
        copies::on_tensor_get_done(&ctx, hit.site.source);
    }
    0
}

#[uprobe]
fn eval_callback(ctx: ProbeContext) -> u32 {
    if let Some(_hit) = hit(&ctx)
        && let (Some(sched), Some(callback)) = (ctx.arg::<u64>(0), ctx.arg::<u64>(1))
    {
        pass::on_eval_callback(sched, callback);
    }
    0
}

#[uprobe]
fn device_mul_mat_id(ctx: ProbeContext) -> u32 {
    if let Some(_hit) = hit(&ctx)
        && let Some(dst) = ctx.arg::<u64>(1)
    {
        copies::on_device_mul_mat_id(Address(dst));
    }
    0
}

#[uprobe]
fn device_memcpy(ctx: ProbeContext) -> u32 {
    if let Some(hit) = hit(&ctx)
        && let (Some(to), Some(from), Some(bytes), Some(kind), Some(stream)) = (
            ctx.arg::<u64>(0),
            ctx.arg::<u64>(1),
            ctx.arg::<u64>(2),
            ctx.arg::<u64>(3),
            ctx.arg::<u64>(4),
        )
    {
        let copy = copies::Memcpy {
            to,
            from,
            bytes,
            kind,
            stream,
        };
        copies::on_device_memcpy(&ctx, hit.site.source, copy);
    }
    0
}

#[uprobe]
fn graph_compute(ctx: ProbeContext) -> u32 {
    if let Some(_hit) = hit(&ctx)
        && let Some(sched) = ctx.arg::<u64>(0)
    {
        pass::on_graph_compute(sched);
    }
    0
}

#[uprobe]
fn set_inputs(ctx: ProbeContext) -> u32 {
    if let Some(_hit) = hit(&ctx)
        && let Some(ubatch) = ctx.arg::<u64>(1)
    {
        pass::on_set_inputs(ubatch);
    }
    0
}

#[uprobe]
fn process_ubatch(ctx: ProbeContext) -> u32 {
    if let Some(_hit) = hit(&ctx)
        && let (Some(llama_context), Some(ubatch)) = (ctx.arg::<u64>(0), ctx.arg::<u64>(1))
    {
        pass::on_process_ubatch(llama_context, ubatch);
    }
    0
}

#[uprobe]
fn leave_context(ctx: ProbeContext) -> u32 {
    if let Some(_hit) = hit(&ctx)
        && let Some(context) = ctx.arg::<u64>(0)
    {
        pass::on_leave_context(context);
    }
    0
}

#[uprobe]
fn libraries(ctx: ProbeContext) -> u32 {
    if let Some(_hit) = hit(&ctx) {
        maps::emit_header(Header {
            kind: Kind::Libraries as u8,
            process: target::process(),
            thread: target::thread(),
            // SAFETY: the helper takes no argument.
            time_ns: unsafe { bpf_ktime_get_ns() },
            ..Header::default()
        });
    }
    0
}

/// Arguments of the tracepoint: `task_struct *task, unsigned long clone_flags`
/// (include/trace/events/task.h). It is hit by the parent, before the child can run.
#[raw_tracepoint(tracepoint = "task_newtask")]
fn new_task(ctx: RawTracePointContext) -> i32 {
    follow::on_new_task(ctx.arg(0), ctx.arg(1));
    0
}

/// First argument of the tracepoint: `task_struct *task`, the current one
/// (include/trace/events/sched.h).
#[raw_tracepoint(tracepoint = "sched_process_exit")]
fn end_task(ctx: RawTracePointContext) -> i32 {
    follow::on_end_task(ctx.arg(0));
    0
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

// `bpf_probe_read_user` and `bpf_probe_read_kernel` are open to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
