//! Hook A: expert ids at the entry of `ggml_compute_forward_get_rows`.
//!
//! llama.cpp gathers the weights of the chosen experts with GET_ROWS (`ffn_moe_weights-N`), whose
//! `src[1]` is the ids tensor `ffn_moe_topk-N` (llama-graph.cpp, `build_moe_ffn`). A barrier between
//! graph nodes guarantees that the ids are complete when the function is entered. Every thread of
//! the pool enters it; the one with `ith == 0` is the one that entered the scheduler.

use core::ptr;

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_get_attach_cookie, bpf_loop},
    programs::ProbeContext,
};
use aya_log_ebpf::debug;
use expert_trace_common::{
    Counter, Header, Kind, MAX_EXPERTS, MAX_LAYERS, MAX_ROWS, MAX_WARMUP_PASSES, MAX_WARMUP_TOKENS,
    PassSource, TENSOR_LAYOUTS, TensorLayout, payload,
};

use crate::{
    maps::{EVENTS, LAYOUT, Record, THREADS, ThreadState, count},
    pass::{NEW_THREAD, header, insert_thread},
    target::{Address, process_and_thread, thread},
};

/// `GGML_TYPE_I32` (ggml.h).
const TYPE_I32: u32 = 26;
const TOPK: &[u8; 13] = b"ffn_moe_topk-";
const TOKENS: &[u8; 11] = b"inp_tokens\0";
/// Start of the names of the rows whose output is wanted; tells a dense model from an unknown layout.
const OUTPUT_ROWS: [&[u8; 7]; 2] = [b"inp_out", b"out_ids"];
/// `nb[0]` of a plain I32 tensor.
const ID_SIZE: u64 = 4;
/// Rows one record can hold; bounds the loop that the verifier has to walk through.
const MAX_CHUNK_ROWS: u32 = 512;

/// `data` and the start of `name`, which follow each other in `ggml_tensor`.
#[repr(C)]
struct DataAndName {
    data: u64,
    name: [u8; 24],
}

/// `type` to `nb` of `ggml_tensor`.
#[repr(C)]
struct Shape {
    kind: u32,
    padding: u32,
    buffer: u64,
    ne: [i64; 4],
    nb: [u64; 4],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    ExpertIds { layer: u16 },
    Tokens,
    OutputRows,
}

#[inline(always)]
pub fn on_get_rows(ctx: &ProbeContext, params: Address, dst: Address) {
    // `ith` is the first field of `ggml_compute_params` since b3209 (ggml-cpu-impl.h).
    let Some(ith) = params.read::<i32>() else {
        return count(Counter::HitUnreadable, 1);
    };
    if ith != 0 {
        return count(Counter::FilteredThread, 1);
    }
    // After the filter: most hits end there.
    // SAFETY: the context is the one the program was called with.
    let source = unsafe { bpf_get_attach_cookie(ctx.as_ptr()) } as u32;
    let Some(known_layout) = LAYOUT.get_ptr_mut(source) else {
        return count(Counter::HitUnreadable, 1);
    };
    // SAFETY: the map's value is alive during the program.
    let layout_number = unsafe { ptr::read_volatile(known_layout) };

    let (index, tensor) = match layout_number {
        0 => match find_layout(dst) {
            Some((number, index, tensor)) => {
                // SAFETY: as above. Racing hits of one library write the same number.
                unsafe { ptr::write_volatile(known_layout, number) };
                (index, tensor)
            }
            None => return count(Counter::LayoutUnknown, 1),
        },
        1 => match read_index(dst, &TENSOR_LAYOUTS[0]) {
            Some(read) => read,
            None => return count(Counter::HitUnreadable, 1),
        },
        _ => match read_index(dst, &TENSOR_LAYOUTS[1]) {
            Some(read) => read,
            None => return count(Counter::HitUnreadable, 1),
        },
    };
    match recognise(&tensor.name) {
        Some(Known::ExpertIds { layer }) => on_expert_ids(ctx, source, index, tensor.data, layer),
        Some(Known::Tokens) => {
            count(Counter::TokenLookup, 1);
            on_tokens(index, tensor.data, source);
        }
        Some(Known::OutputRows) | None => count(Counter::FilteredTensor, 1),
    }
}

/// Tries the candidates until a tensor shows a name that is only there when the offsets are right.
#[inline(always)]
fn find_layout(dst: Address) -> Option<(u32, Address, DataAndName)> {
    if let Some((index, tensor)) = read_index(dst, &TENSOR_LAYOUTS[0])
        && recognise(&tensor.name).is_some()
    {
        return Some((1, index, tensor));
    }
    if let Some((index, tensor)) = read_index(dst, &TENSOR_LAYOUTS[1])
        && recognise(&tensor.name).is_some()
    {
        return Some((2, index, tensor));
    }
    None
}

/// Reads what `dst->src[1]`, the rows to gather, points to.
#[inline(always)]
fn read_index(dst: Address, layout: &TensorLayout) -> Option<(Address, DataAndName)> {
    let index = Address(dst.offset(u64::from(layout.src) + 8).read()?);
    let tensor = index.offset(u64::from(layout.data)).read()?;
    Some((index, tensor))
}

#[inline(always)]
fn recognise(name: &[u8; 24]) -> Option<Known> {
    if starts_with(name, TOPK) {
        return layer_number(name).map(|layer| Known::ExpertIds { layer });
    }
    if starts_with(name, TOKENS) {
        return Some(Known::Tokens);
    }
    if starts_with(name, OUTPUT_ROWS[0]) || starts_with(name, OUTPUT_ROWS[1]) {
        return Some(Known::OutputRows);
    }
    None
}

#[inline(always)]
fn starts_with<const N: usize>(name: &[u8; 24], prefix: &[u8; N]) -> bool {
    let mut i = 0;
    while i < N {
        if name[i] != prefix[i] {
            return false;
        }
        i += 1;
    }
    true
}

/// The number behind `ffn_moe_topk-`, which must be all there is until the NUL.
///
/// The scheduler renames tensors it copies (`CPU#ffn_moe_topk-N#0`); those do not start that way.
#[inline(always)]
fn layer_number(name: &[u8; 24]) -> Option<u16> {
    let mut layer = 0u16;
    let mut digits = 0;
    let mut i = TOPK.len();
    while i < TOPK.len() + 5 {
        let byte = name[i];
        if byte == 0 {
            break;
        }
        if !byte.is_ascii_digit() || digits == 4 {
            return None;
        }
        layer = layer * 10 + u16::from(byte - b'0');
        digits += 1;
        i += 1;
    }
    (digits > 0 && layer < MAX_LAYERS).then_some(layer)
}

#[inline(always)]
fn on_expert_ids(ctx: &ProbeContext, source: u32, ids: Address, data: u64, layer: u16) {
    count(Counter::Routed, 1);
    let Some(shape) = ids.read::<Shape>() else {
        count(Counter::RoutedUnreadable, 1);
        return debug!(ctx, "layer {}: ids tensor {:x} is unreadable", layer, ids.0);
    };
    let [k, rows, planes, volumes] = shape.ne;
    let [id_stride, row_stride, ..] = shape.nb;
    let sane = shape.kind == TYPE_I32
        && k >= 1
        && k <= MAX_EXPERTS as i64
        && rows >= 0
        && rows <= MAX_ROWS as i64
        && planes == 1
        && volumes == 1
        && id_stride >= ID_SIZE
        && id_stride <= ID_SIZE * MAX_EXPERTS as u64
        && row_stride >= ID_SIZE
        && row_stride <= ID_SIZE * (MAX_EXPERTS * MAX_EXPERTS) as u64;
    if !sane {
        count(Counter::RoutedMalformed, 1);
        return debug!(
            ctx,
            "layer {}: ids tensor {:x} makes no sense: type {}, ne {} {}, nb {} {}",
            layer,
            ids.0,
            shape.kind,
            k,
            rows,
            id_stride,
            row_stride
        );
    }
    let rows = rows as u32;
    count(Counter::RowsSeen, u64::from(rows));

    let state = current_pass(layer);
    let mut walk = RowsWalk {
        header: Header {
            kind: Kind::Rows as u8,
            layer,
            k: k as u16,
            total_rows: rows,
            row_stride: if id_stride == ID_SIZE {
                (row_stride / ID_SIZE) as u32
            } else {
                0
            },
            source,
            ..header(&state)
        },
        data: Address(data),
        row_bytes: k as u32 * ID_SIZE as u32,
        chunk_rows: 0,
        id_stride,
        row_stride,
    };
    if id_stride != ID_SIZE {
        walk.chunk_rows = 1;
        run_chunks(rows.max(1), scattered_chunk, &mut walk);
    } else if walk.row_bytes as usize > ROW_NARROW {
        chunked::<{ payload::LARGE }, ROW_WIDE>(&mut walk);
    } else if u64::from(rows) * u64::from(walk.row_bytes) <= payload::SMALL as u64 && rows <= 1 {
        walk.chunk_rows = 1;
        rows_chunk::<{ payload::SMALL }, { payload::SMALL }>(0, &mut walk);
    } else if u64::from(rows) * u64::from(walk.row_bytes) <= (payload::MEDIUM - ROW_NARROW) as u64 {
        chunked::<{ payload::MEDIUM }, ROW_NARROW>(&mut walk);
    } else {
        chunked::<{ payload::LARGE }, ROW_NARROW>(&mut walk);
    }
}

/// Pass of this thread; without a scheduler, a new one when the layer number has not increased.
#[inline(always)]
fn current_pass(layer: u16) -> ThreadState {
    let key = process_and_thread();
    let Some(state) = THREADS.get_ptr_mut(key) else {
        let state = ThreadState {
            // Two server threads are two contexts; addresses are never this small.
            context: 0,
            generation: thread(),
            last_layer: i32::from(layer),
            pass_source: PassSource::LayerOrder as u8,
            ..NEW_THREAD
        };
        insert_thread(key, &state);
        return state;
    };
    // SAFETY: the map's value is alive during the program, and belongs to this thread.
    let state = unsafe { &mut *state };
    if state.context == 0 {
        if state.pass_source != PassSource::LayerOrder as u8 {
            state.pass_source = PassSource::LayerOrder as u8;
            state.generation = thread();
        } else if i32::from(layer) <= state.last_layer {
            state.pass = state.pass.wrapping_add(1);
        }
    }
    state.last_layer = i32::from(layer);
    *state
}

#[repr(C)]
struct RowsWalk {
    header: Header,
    data: Address,
    /// Bytes of one row that count: k ids.
    row_bytes: u32,
    chunk_rows: u32,
    id_stride: u64,
    row_stride: u64,
}

impl RowsWalk {
    /// First row and number of rows of the `index`th record.
    #[inline(always)]
    fn chunk(&self, index: u32) -> (u32, u32) {
        let first_row = index * self.chunk_rows;
        let rows = self
            .chunk_rows
            .min(self.header.total_rows.saturating_sub(first_row));
        (first_row, rows)
    }

    #[inline(always)]
    fn lost(&self, rows: u32, event: Counter, row: Counter) -> i64 {
        count(event, 1);
        count(row, u64::from(rows));
        0
    }
}

/// Rows of up to so many bytes (64 ids) waste little of a record.
const ROW_NARROW: usize = 256;
const ROW_WIDE: usize = MAX_EXPERTS * ID_SIZE as usize;

#[inline(always)]
fn chunked<const PAYLOAD: usize, const ROW: usize>(walk: &mut RowsWalk) {
    // The last row must begin at or before PAYLOAD - ROW, so that the verifier sees it end inside.
    let fit = ((PAYLOAD - ROW) as u32 / walk.row_bytes.max(1)) + 1;
    walk.chunk_rows = fit.min(MAX_CHUNK_ROWS);
    run_chunks(
        walk.header.total_rows.div_ceil(walk.chunk_rows).max(1),
        rows_chunk::<PAYLOAD, ROW>,
        walk,
    );
}

/// Calls `chunk` for 0 to `chunks` - 1, once when there is nothing but must be a record.
#[inline(always)]
pub fn run_chunks<W>(chunks: u32, chunk: extern "C" fn(u32, *mut W) -> i64, walk: &mut W) {
    // SAFETY: callback and context fit each other by their types.
    unsafe { bpf_loop(chunks, chunk as *mut _, ptr::from_mut(walk).cast(), 0) };
}

/// Emits one record of rows that lie together. Returns 0 to go on (the contract of `bpf_loop`).
#[inline(never)]
extern "C" fn rows_chunk<const PAYLOAD: usize, const ROW: usize>(
    index: u32,
    walk: *mut RowsWalk,
) -> i64 {
    // SAFETY: the caller keeps the walk on its stack during the loop.
    let walk = unsafe { &*walk };
    let (first_row, rows) = walk.chunk(index);

    count(Counter::EventsSeen, 1);
    let Some(mut entry) = EVENTS.reserve::<Record<PAYLOAD>>(0) else {
        return walk.lost(rows, Counter::EventsRingFull, Counter::RowsRingFull);
    };
    let record = entry.as_mut_ptr();
    // SAFETY: the entry is as large as the record.
    unsafe {
        (&raw mut (*record).header).write(Header {
            first_row,
            rows,
            ..walk.header
        })
    };
    let ids = unsafe { (&raw mut (*record).payload).cast::<u8>() };
    let mut end = 0u32;
    for i in 0..MAX_CHUNK_ROWS {
        // Volatile: the compiler knows these bounds from the caller and would drop the checks that
        // the verifier, which does not, needs to see.
        // SAFETY: reads of a live reference.
        let len = unsafe { ptr::read_volatile(&walk.row_bytes) };
        if i >= rows || len as usize > ROW || end as usize > PAYLOAD - ROW {
            break;
        }
        let row = walk
            .data
            .offset((u64::from(first_row) + u64::from(i)) * walk.row_stride);
        // SAFETY: `end + len` is within the payload by the check above.
        if unsafe { row.read_to(ids.add(end as usize), len) }.is_none() {
            entry.discard(0);
            return walk.lost(rows, Counter::EventsUnreadable, Counter::RowsUnreadable);
        }
        end += len;
    }
    entry.submit(0);
    count(Counter::EventsEmitted, 1);
    count(Counter::RowsEmitted, u64::from(rows));
    0
}

/// Emits one row whose ids do not lie side by side (`nb[0]` is not 4).
///
/// llama.cpp's own ids tensors never look so; a strided read is what their `nb` would ask for.
#[inline(never)]
extern "C" fn scattered_chunk(index: u32, walk: *mut RowsWalk) -> i64 {
    // SAFETY: the caller keeps the walk on its stack during the loop.
    let walk = unsafe { &*walk };
    let (first_row, rows) = walk.chunk(index);

    count(Counter::EventsSeen, 1);
    let Some(mut entry) = EVENTS.reserve::<Record<{ payload::LARGE }>>(0) else {
        return walk.lost(rows, Counter::EventsRingFull, Counter::RowsRingFull);
    };
    let record = entry.as_mut_ptr();
    // SAFETY: the entry is as large as the record.
    unsafe {
        (&raw mut (*record).header).write(Header {
            first_row,
            rows,
            ..walk.header
        })
    };
    let ids = unsafe { (&raw mut (*record).payload).cast::<u32>() };
    let row = walk.data.offset(u64::from(first_row) * walk.row_stride);
    let k = if rows == 0 { 0 } else { walk.header.k };
    for i in 0..MAX_EXPERTS {
        if i >= usize::from(k) {
            break;
        }
        let Some(id) = row.offset(i as u64 * walk.id_stride).read::<u32>() else {
            entry.discard(0);
            return walk.lost(rows, Counter::EventsUnreadable, Counter::RowsUnreadable);
        };
        // SAFETY: `i` is below MAX_EXPERTS, and the payload has room for twice as many.
        unsafe { ids.add(i).write(id) };
    }
    entry.submit(0);
    count(Counter::EventsEmitted, 1);
    count(Counter::RowsEmitted, u64::from(rows));
    0
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
    entry.submit(0);
    count(Counter::EventsEmitted, 1);
}
