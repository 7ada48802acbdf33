//! Hook A: expert ids at the entry of `ggml_compute_forward_get_rows`.
//!
//! llama.cpp gathers the weights of the chosen experts with GET_ROWS (`ffn_moe_weights-N`), whose
//! `src[1]` is the ids tensor `ffn_moe_topk-N` (llama-graph.cpp, `build_moe_ffn`). A barrier between
//! graph nodes guarantees that the ids are complete when the function is entered. Every thread of
//! the pool enters it; the one with `ith == 0` is the one that entered the scheduler.
//!
//! GroveMoE has a second block of experts in each layer, of which the nodes have the same names. Its ids
//! are the router's, divided by the number of experts that share one of its own, and have no name.

use core::ptr;

use aya_ebpf::programs::ProbeContext;
use expert_trace_common::{
    CONTROL_WEIGHTS, Counter, Header, Kind, LAYOUT_DECLARED, MAX_WARMUP_PASSES, MAX_WARMUP_TOKENS,
    Route, TENSOR_LAYOUTS, TensorLayout, payload,
};

use crate::{
    maps::{
        DECLARED, EVENTS, LAYOUT, Record, THREADS, any_is_early, control, count, is_read, wake_up,
    },
    pass::header,
    rows::{Routed, emit_routed},
    target::{Address, process_and_thread},
    tensor::{DataAndName, Gather, Name, Shape, TYPE_I32, ids_layer, layer_behind, source},
    weights::Gathered,
};

const TOKENS: &[u8; 11] = b"inp_tokens\0";
/// Start of the names that ggml gives to nodes without one (`ggml_visit_parents` in ggml.c).
const UNNAMED: &[u8; 5] = b"node_";
/// What `ggml_cast` (ggml.c) makes of the name of a tensor without one.
const UNNAMED_CAST: &[u8; 8] = b" (copy)\0";
/// Name of the embeddings that are looked up (`build_inp_embd` in llama-graph.cpp). Some builds (b6673,
/// b6751) do not name the tokens.
const EMBEDDINGS: &[u8; 9] = b"inp_embd\0";
/// Start of the names of the rows whose output is wanted; tells a dense model from an unknown layout.
const OUTPUT_ROWS: [&[u8; 7]; 2] = [b"inp_out", b"out_ids"];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    ExpertIds { layer: u16 },
    Tokens,
    OutputRows,
}

#[inline(always)]
pub fn on_get_rows(ctx: &ProbeContext, source: u32, params: Address, dst: Address) {
    let Some(known_layout) = LAYOUT.get_ptr_mut(source) else {
        return count(Counter::HitUnreadable, 1);
    };
    // SAFETY: the map's value is alive during the program.
    let number = unsafe { ptr::read_volatile(known_layout) };
    let declared = match number {
        LAYOUT_DECLARED => DECLARED.get(source),
        _ => None,
    };
    let ith = declared.map_or(0, |declared| declared.ith);
    let Some(ith) = params.offset(u64::from(ith)).read::<i32>() else {
        return count(Counter::HitUnreadable, 1);
    };
    if ith != 0 {
        return count(Counter::FilteredThread, 1);
    }
    let layout = match (number, declared) {
        (_, Some(declared)) => declared.tensor,
        (0, None) => match find_layout(dst) {
            Some((number, layout)) => {
                // SAFETY: as above. Racing hits of one library write the same number.
                unsafe { ptr::write_volatile(known_layout, number) };
                layout
            }
            None => return count(Counter::LayoutUnknown, 1),
        },
        (1, None) => TENSOR_LAYOUTS[0],
        (_, None) => TENSOR_LAYOUTS[1],
    };
    let Some(Gather { index, name }) = Gather::read(dst, &layout) else {
        return count(Counter::HitUnreadable, 1);
    };
    // Experts with scales gather those by the router's ids, too, once for each of their weights
    // (`build_lora_mm_id` in llama-graph.cpp), and recurrent layers their states, in nodes that nobody has
    // named. So does the look-up of embeddings that are scaled; tokens are of interest in first passes alone.
    let unnamed = name.starts_with(UNNAMED);
    if (unnamed || name.starts_with(EMBEDDINGS)) && !any_is_early() {
        return count(Counter::FilteredTensor, 1);
    }
    let Some(tensor) = DataAndName::read(index, &layout) else {
        return count(Counter::HitUnreadable, 1);
    };
    let (kind, layer) = match recognise(&tensor.name) {
        Some(Known::ExpertIds { layer }) if !unnamed => (Kind::Rows, layer),
        Some(Known::Tokens) => {
            count(Counter::TokenLookup, 1);
            return on_tokens(index, tensor.data, source);
        }
        None if tensor.name.starts_with(UNNAMED_CAST)
            && let Some(layer) = layer_behind(&name, b"ffn_moe_weights-", 0) =>
        {
            (Kind::SecondBlock, layer)
        }
        _ => return count(Counter::FilteredTensor, 1),
    };
    if !is_read(Route::Router) {
        return count(Counter::FilteredTensor, 1);
    }
    count(Counter::Routed, 1);
    emit_routed(
        ctx,
        &Routed {
            kind,
            route: Route::Router,
            layer,
            source,
            tensor: index,
            data: Address(tensor.data),
            weights: weights_of(dst, &layout),
        },
    );
}

/// The weights that `dst` gathers, where they are wanted.
#[inline(always)]
fn weights_of(dst: Address, layout: &TensorLayout) -> Option<Gathered> {
    if control(CONTROL_WEIGHTS) == 0 {
        return None;
    }
    Some(Gathered {
        tensor: source(dst, layout, 0)?,
        data: layout.data,
    })
}

/// Tries the candidates until a tensor shows a name that is only there when the offsets are right.
#[inline(always)]
fn find_layout(dst: Address) -> Option<(u32, TensorLayout)> {
    let shows_a_name = |layout| {
        read_index(dst, layout).is_some_and(|(_, tensor)| recognise(&tensor.name).is_some())
            || DataAndName::read(dst, layout).is_some_and(|dst| dst.name.starts_with(EMBEDDINGS))
    };
    if shows_a_name(&TENSOR_LAYOUTS[0]) {
        return Some((1, TENSOR_LAYOUTS[0]));
    }
    if shows_a_name(&TENSOR_LAYOUTS[1]) {
        return Some((2, TENSOR_LAYOUTS[1]));
    }
    None
}

/// Reads what `dst->src[1]`, the rows to gather, points to.
#[inline(always)]
fn read_index(dst: Address, layout: &TensorLayout) -> Option<(Address, DataAndName)> {
    let index = source(dst, layout, 1)?;
    Some((index, DataAndName::read(index, layout)?))
}

#[inline(always)]
fn recognise(name: &Name) -> Option<Known> {
    if let Some(layer) = ids_layer(name) {
        return Some(Known::ExpertIds { layer });
    }
    if name.starts_with(TOKENS) {
        return Some(Known::Tokens);
    }
    if name.starts_with(OUTPUT_ROWS[0]) || name.starts_with(OUTPUT_ROWS[1]) {
        return Some(Known::OutputRows);
    }
    None
}

/// Passes on the tokens of the passes among which a warm-up can be. All others are not looked at.
#[inline(always)]
fn on_tokens(index: Address, data: u64, source: u32) {
    let Some(state) = THREADS.get_ptr_mut(process_and_thread()) else {
        return;
    };
    // SAFETY: the map's value is alive during the program, and belongs to this thread.
    let state = unsafe { *state };
    if state.pass >= MAX_WARMUP_PASSES || state.context == 0 {
        return;
    }
    let Some(shape) = index.read::<Shape>() else {
        return;
    };
    let tokens = shape.ne[0];
    if shape.kind != TYPE_I32 || tokens < 1 || tokens > i64::from(MAX_WARMUP_TOKENS) {
        return;
    }
    count(Counter::EventsSeen, 1);
    let Some(mut entry) = EVENTS.reserve::<Record<{ payload::SMALL }>>(0) else {
        return count(Counter::EventsRingFull, 1);
    };
    let record = entry.as_mut_ptr();
    // SAFETY: the entry is as large as the record.
    unsafe {
        (&raw mut (*record).header).write(Header {
            kind: Kind::Tokens as u8,
            rows: tokens as u32,
            total_rows: tokens as u32,
            source,
            ..header(&state)
        })
    };
    let ids = unsafe { (&raw mut (*record).payload).cast::<u8>() };
    let len = if tokens == 1 { 4 } else { 8 };
    // SAFETY: the payload has room for more than two tokens.
    if unsafe { Address(data).read_to(ids, len) }.is_none() {
        entry.discard(0);
        return count(Counter::EventsUnreadable, 1);
    }
    entry.submit(wake_up());
    count(Counter::EventsEmitted, 1);
}
