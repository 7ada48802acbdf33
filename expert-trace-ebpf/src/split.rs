//! Hooks B and F: the CPU's part of a graph, at the entry and the return of `ggml_graph_compute`.
//!
//! The scheduler cuts a graph in splits, each for one backend, and the CPU backend computes its own
//! with `ggml_graph_compute(cgraph, cplan)`, on the thread that entered the scheduler. Where the
//! router runs on a device and the experts on the CPU, the ids are an input of the split, complete on
//! the host when it begins. Where only the router's logits are computed on the CPU, they are what the
//! split ends with.

use core::ptr;

use aya_ebpf::{
    EbpfContext, helpers::bpf_ktime_get_ns, macros::map, maps::LruHashMap, programs::ProbeContext,
};
use expert_trace_common::{Counter, Kind, Route, TENSOR_LAYOUTS, TensorLayout};

use crate::{
    maps::{count, is_read},
    rows::{Routed, emit_routed, is_first_sight, run_chunks},
    target::{Address, process_and_thread},
    tensor::{DataAndName, Name, copied_ids_layer, is_view, layer_behind, source},
};

/// Weights can be kept on the CPU while their layer is on a device since `--override-tensor` (2025),
/// when this layout was in place.
const LAYOUT: &TensorLayout = &TENSOR_LAYOUTS[0];

/// Ids are an input of the first expert weight, and the split begins where the first weight is that
/// the CPU has: with it, or a few nodes before.
const NODES_LOOKED_AT: u32 = 64;

/// Views of the last node can follow it: the grouped choice looks at it in two other shapes.
const VIEWS_BEHIND: u32 = 6;

/// Start of `ggml_cgraph` (ggml-impl.h).
#[repr(C)]
struct Graph {
    size: i32,
    n_nodes: i32,
    n_leafs: i32,
    padding: i32,
    nodes: u64,
}

const BIASED_LOGITS: u16 = Kind::BiasedLogits as u16;
const PROBS: u16 = Kind::Probs as u16;
const SELECTION: u16 = Kind::Selection as u16;

/// By thread: the logits that the split it is in will have computed when it returns.
#[map]
static AHEAD: LruHashMap<u64, Ahead> = LruHashMap::with_max_entries(4096, 0);

#[repr(C)]
#[derive(Clone, Copy)]
struct Ahead {
    tensor: u64,
    data: u64,
    entered_ns: u64,
    layer: u16,
    kind: u16,
    padding: u32,
}

#[inline(always)]
pub fn on_split(ctx: &ProbeContext, source: u32, cgraph: Address) {
    count(Counter::CpuSplits, 1);
    let Some(graph) = cgraph.read::<Graph>() else {
        return;
    };
    if graph.n_nodes <= 0 {
        return;
    }
    let n_nodes = graph.n_nodes as u32;
    if is_read(Route::Logits) {
        // A return that was missed would pass for the next one. It fails only when there is no entry.
        let _ = AHEAD.remove(process_and_thread());
        look_ahead(Address(graph.nodes), n_nodes);
    }
    if !is_read(Route::SplitInput) {
        return;
    }
    let mut walk = NodeWalk {
        nodes: Address(graph.nodes),
        found: Address(0),
        data: 0,
        layer: 0,
    };
    run_chunks(n_nodes.min(NODES_LOOKED_AT), look_at_node, &mut walk);
    // Volatile: the compiler does not see that the callback writes there.
    // SAFETY: reads of a live variable.
    let (found, data, layer) = unsafe {
        (
            ptr::read_volatile(&walk.found),
            ptr::read_volatile(&walk.data),
            ptr::read_volatile(&walk.layer),
        )
    };
    if found.0 == 0 || !is_first_sight(found) {
        return;
    }
    count(Counter::SplitIds, 1);
    emit_routed(
        ctx,
        &Routed {
            kind: Kind::Rows,
            route: Route::SplitInput,
            layer,
            source,
            tensor: found,
            data: Address(data),
            weights: None,
        },
    );
}

#[repr(C)]
struct NodeWalk {
    nodes: Address,
    found: Address,
    data: u64,
    layer: u16,
}

/// Looks whether a node has copied expert ids for its `src[2]`, as MUL_MAT_ID and ADD_ID do. Returns 0
/// to go on, 1 to stop (the contract of `bpf_loop`).
#[inline(never)]
extern "C" fn look_at_node(index: u32, walk: *mut NodeWalk) -> i64 {
    // SAFETY: the caller keeps the walk on its stack during the loop.
    let walk = unsafe { &mut *walk };
    let Some(node) = walk.nodes.offset(8 * u64::from(index)).read() else {
        return 1;
    };
    let Some(ids) = source(Address(node), LAYOUT, 2) else {
        return 1;
    };
    if ids.0 == 0 {
        return 0;
    }
    if let Some(tensor) = DataAndName::read(ids, LAYOUT)
        && let Some(layer) = copied_ids_layer(&tensor.name)
    {
        walk.found = ids;
        walk.data = tensor.data;
        walk.layer = layer;
        return 1;
    }
    0
}

/// Remembers the last node that computes something, if it is what experts are chosen by. All before it
/// can be overwritten before the split returns.
#[inline(always)]
fn look_ahead(nodes: Address, n_nodes: u32) {
    let mut node = 0u64;
    let mut back = 1;
    while back <= VIEWS_BEHIND && back <= n_nodes {
        let Some(next) = nodes.offset(8 * u64::from(n_nodes - back)).read() else {
            return;
        };
        node = next;
        match is_view(Address(node), LAYOUT) {
            Some(true) => back += 1,
            Some(false) => break,
            None => return,
        }
    }
    let Some(tensor) = DataAndName::read(Address(node), LAYOUT) else {
        return;
    };
    let Some((kind, layer)) = scores(&tensor.name) else {
        return;
    };
    let ahead = Ahead {
        tensor: node,
        data: tensor.data,
        // SAFETY: the helper takes no argument.
        entered_ns: unsafe { bpf_ktime_get_ns() },
        layer,
        kind: kind as u16,
        padding: 0,
    };
    if AHEAD.insert(process_and_thread(), ahead, 0).is_err() {
        count(Counter::StateLost, 1);
    }
}

/// Names in `build_moe_ffn` (llama-graph.cpp).
#[inline(always)]
fn scores(name: &Name) -> Option<(Kind, u16)> {
    if let Some(layer) = layer_behind(name, b"ffn_moe_logits-", 0) {
        return Some((Kind::Logits, layer));
    }
    if let Some(layer) = layer_behind(name, b"ffn_moe_logits_biased-", 0) {
        return Some((Kind::BiasedLogits, layer));
    }
    if let Some(layer) = layer_behind(name, b"ffn_moe_probs-", 0) {
        return Some((Kind::Probs, layer));
    }
    if let Some(layer) = layer_behind(name, b"ffn_moe_probs_biased-", 0) {
        return Some((Kind::Selection, layer));
    }
    None
}

/// `status` is what `ggml_graph_compute` returns: other than 0 (`GGML_STATUS_SUCCESS`), it has not
/// computed everything.
#[inline(always)]
pub fn on_split_done<C: EbpfContext>(ctx: &C, source: u32, status: i32) {
    let key = process_and_thread();
    let Some(ahead) = AHEAD.get_ptr(key) else {
        return;
    };
    // SAFETY: the map's value is alive during the program, and belongs to this thread.
    let ahead = unsafe { *ahead };
    // It fails only when there is no such entry.
    let _ = AHEAD.remove(key);
    if status != 0 {
        return;
    }
    count(Counter::SplitLogits, 1);
    // SAFETY: the helper takes no argument.
    let now = unsafe { bpf_ktime_get_ns() };
    count(Counter::SplitLogitsNs, now.saturating_sub(ahead.entered_ns));
    emit_routed(
        ctx,
        &Routed {
            kind: match ahead.kind {
                PROBS => Kind::Probs,
                SELECTION => Kind::Selection,
                BIASED_LOGITS => Kind::BiasedLogits,
                _ => Kind::Logits,
            },
            route: Route::Logits,
            layer: ahead.layer,
            source,
            tensor: Address(ahead.tensor),
            data: Address(ahead.data),
            weights: None,
        },
    );
}
