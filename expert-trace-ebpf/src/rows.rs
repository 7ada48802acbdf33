//! Rows of expert ids or of router logits: from a tensor in the target to records.

use core::ptr;

use aya_ebpf::{EbpfContext, helpers::generated::bpf_loop, macros::map, maps::PerCpuArray};
use aya_log_ebpf::debug;
use expert_trace_common::{Counter, Header, Kind, MAX_EXPERTS, PassSource, Route, payload};

use crate::{
    maps::{
        EVENTS, Record, THREADS, ThreadState, add, count, count_each, is_read, wake_up,
        wake_up_in_time,
    },
    pass::{NEW_THREAD, header, insert_thread},
    target::{Address, process_and_thread, thread},
    tensor::{ELEMENT_SIZE, Shape, TYPE_F32, TYPE_I32},
    weights::{Gathered, emit_weighted},
};

/// A tensor that tells the routing of a layer.
pub struct Routed {
    /// What its elements are.
    pub kind: Kind,
    pub route: Route,
    pub layer: u16,
    /// Library that the probe belongs to.
    pub source: u32,
    pub tensor: Address,
    /// Where its elements are on the host; for a tensor on a device not its own `data`.
    pub data: Address,
    /// What the ids gather, where that is wanted, too.
    pub weights: Option<Gathered>,
}

/// Emits all rows of a tensor.
#[inline(always)]
pub fn emit_routed<C: EbpfContext>(ctx: &C, routed: &Routed) {
    let Routed {
        kind,
        route,
        layer,
        source,
        tensor,
        data,
        weights,
    } = *routed;
    if !is_read(route) {
        return;
    }
    let Some(shape) = tensor.read::<Shape>() else {
        count(Counter::RoutedUnreadable, 1);
        return debug!(ctx, "layer {}: tensor {:x} is unreadable", layer, tensor.0);
    };
    let [k, rows, ..] = shape.ne;
    let [element_stride, row_stride, ..] = shape.nb;
    let is_second = kind as u8 == Kind::SecondBlock as u8;
    let element = if is_second || kind as u8 == Kind::Rows as u8 {
        TYPE_I32
    } else {
        TYPE_F32
    };
    if !shape.is_sane(element) {
        count(Counter::RoutedMalformed, 1);
        return debug!(
            ctx,
            "layer {}: tensor {:x} makes no sense: type {}, ne {} {}, nb {} {}",
            layer,
            tensor.0,
            shape.kind,
            k,
            rows,
            element_stride,
            row_stride
        );
    }
    let rows = rows as u32;
    count(Counter::RowsSeen, u64::from(rows));

    // A second block is shown beside its layer, as if by a route of its own.
    let sight = if is_second {
        SECOND_BLOCK
    } else {
        1 << route as u8
    };
    let state = current_pass(layer, sight);
    let mut walk = RowsWalk {
        header: Header {
            kind: kind as u8,
            route: route as u8,
            layer,
            k: k as u16,
            total_rows: rows,
            row_stride: if element_stride == ELEMENT_SIZE {
                (row_stride / ELEMENT_SIZE) as u32
            } else {
                0
            },
            source,
            ..header(&state)
        },
        data,
        row_bytes: k as u32 * ELEMENT_SIZE as u32,
        chunk_rows: 0,
        element_stride,
        row_stride,
    };
    if element_stride != ELEMENT_SIZE {
        walk.chunk_rows = 1;
        run_chunks(rows.max(1), scattered_chunk, &mut walk);
    } else if let Some(gathered) = weights {
        emit_weighted(&mut walk, gathered);
    } else if rows <= 1 && walk.row_bytes as usize <= payload::SMALL {
        // One row of a decoded token, or a record without a row.
        emit_rows::<{ payload::SMALL }>(&walk, (0, rows), |to| {
            copy_together::<{ payload::SMALL }>(&walk, 0, rows, to)
        });
    } else if row_stride == u64::from(walk.row_bytes) {
        contiguous(&mut walk);
    } else if !strided(&mut walk) {
        one_by_one(&mut walk);
    }
}

/// Emits rows that have no other of many within reach, each with a read of its own.
#[inline(always)]
fn one_by_one(walk: &mut RowsWalk) {
    let bytes = u64::from(walk.header.total_rows) * u64::from(walk.row_bytes);
    if walk.row_bytes as usize > ROW_NARROW {
        chunked::<{ payload::LARGE }, ROW_WIDE>(walk);
    } else if bytes <= (payload::MEDIUM - ROW_NARROW) as u64 {
        chunked::<{ payload::MEDIUM }, ROW_NARROW>(walk);
    } else {
        chunked::<{ payload::LARGE }, ROW_NARROW>(walk);
    }
}

/// Emits a record of rows, with room for `PAYLOAD` bytes of them, which `fill` puts there. Returns 0 (for
/// `bpf_loop`: to go on).
#[inline(always)]
pub fn emit_rows<const PAYLOAD: usize>(
    walk: &RowsWalk,
    (first_row, rows): (u32, u32),
    fill: impl FnOnce(*mut u8) -> Option<()>,
) -> i64 {
    count(Counter::EventsSeen, 1);
    let Some(mut entry) = EVENTS.reserve::<Record<PAYLOAD>>(0) else {
        return walk.lost(rows, Counter::EventsRingFull, Counter::RowsRingFull);
    };
    let record = entry.as_mut_ptr();
    // SAFETY: the entry is as large as the record.
    let payload = unsafe {
        (&raw mut (*record).header).write(Header {
            first_row,
            rows,
            ..walk.header
        });
        (&raw mut (*record).payload).cast()
    };
    if fill(payload).is_none() {
        entry.discard(0);
        return walk.lost(rows, Counter::EventsUnreadable, Counter::RowsUnreadable);
    }
    entry.submit(match PAYLOAD {
        // Such ones fill the buffer slowly: it is looked at when their pass begins.
        payload::SMALL => wake_up(),
        _ => wake_up_in_time(),
    });
    count_each([
        (Counter::EventsEmitted, 1),
        (Counter::RowsEmitted, u64::from(rows)),
    ]);
    0
}

/// Copies so many rows, which follow each other without a gap, to a payload of `PAYLOAD` bytes.
#[inline(always)]
fn copy_together<const PAYLOAD: usize>(
    walk: &RowsWalk,
    first_row: u32,
    rows: u32,
    to: *mut u8,
) -> Option<()> {
    let from = walk.data.offset(u64::from(first_row) * walk.row_stride);
    let bytes = u64::from(rows) * u64::from(walk.row_bytes);
    // Volatile: the verifier has to see the bound here.
    // SAFETY: a read of a live variable.
    let bytes = unsafe { ptr::read_volatile(&bytes) };
    if bytes > PAYLOAD as u64 {
        return None;
    }
    // SAFETY: the payload has room for so many bytes by the check before.
    unsafe { from.read_to(to, bytes as u32) }
}

/// Whether the current pass shows these ids for the first time: one tensor of ids serves all weights
/// of a layer, and a split or a copy for each of them shows it anew.
#[inline(always)]
pub fn is_first_sight(ids: Address) -> bool {
    let key = process_and_thread();
    let Some(state) = THREADS.get_ptr_mut(key) else {
        // A pass that was under way when tracing began.
        let state = ThreadState {
            last_ids: ids.0,
            ..NEW_THREAD
        };
        insert_thread(key, &state);
        return true;
    };
    // SAFETY: the map's value is alive during the program, and belongs to this thread.
    let state = unsafe { &mut *state };
    if state.last_ids == ids.0 {
        count(Counter::RepeatedIds, 1);
        return false;
    }
    state.last_ids = ids.0;
    true
}

/// In the place of a route's bit in [`ThreadState::last_routes`]: a second block of experts.
const SECOND_BLOCK: u8 = 1 << 7;

/// Pass of this thread; without a scheduler, a new one when the layer number has not increased, unless
/// another route shows the same layer. `route` is the route's bit.
#[inline(always)]
fn current_pass(layer: u16, route: u8) -> ThreadState {
    let key = process_and_thread();
    let Some(state) = THREADS.get_ptr_mut(key) else {
        let state = ThreadState {
            // Two server threads are two contexts; addresses are never this small.
            context: 0,
            generation: thread(),
            last_layer: i32::from(layer),
            last_routes: route,
            pass_source: PassSource::LayerOrder as u8,
            ..NEW_THREAD
        };
        insert_thread(key, &state);
        return state;
    };
    // SAFETY: the map's value is alive during the program, and belongs to this thread.
    let state = unsafe { &mut *state };
    let layer = i32::from(layer);
    let is_same_layer = layer == state.last_layer;
    if state.context == 0 {
        if state.pass_source != PassSource::LayerOrder as u8 {
            state.pass_source = PassSource::LayerOrder as u8;
            state.generation = thread();
        } else if layer < state.last_layer || (is_same_layer && state.last_routes & route != 0) {
            state.pass = state.pass.wrapping_add(1);
            state.last_routes = 0;
        }
    }
    state.last_routes = if is_same_layer {
        state.last_routes | route
    } else {
        route
    };
    state.last_layer = layer;
    *state
}

/// Rows of a tensor on their way to records.
#[repr(C)]
pub struct RowsWalk {
    pub header: Header,
    pub data: Address,
    /// Bytes of one row that count: k elements.
    pub row_bytes: u32,
    /// Rows of a record.
    pub chunk_rows: u32,
    element_stride: u64,
    pub row_stride: u64,
}

impl RowsWalk {
    /// First row and number of rows of the `index`th record.
    #[inline(always)]
    pub fn chunk(&self, index: u32) -> (u32, u32) {
        let first_row = index * self.chunk_rows;
        let rows = self
            .chunk_rows
            .min(self.header.total_rows.saturating_sub(first_row));
        (first_row, rows)
    }

    /// Emits the records, of so many rows each as is set.
    #[inline(always)]
    fn run(&mut self, chunk: extern "C" fn(u32, *mut RowsWalk) -> i64) {
        let chunks = self.header.total_rows.div_ceil(self.chunk_rows.max(1));
        run_chunks(chunks.max(1), chunk, self);
    }

    #[inline(always)]
    fn lost(&self, rows: u32, event: Counter, row: Counter) -> i64 {
        count_each([(event, 1), (row, u64::from(rows))]);
        0
    }
}

/// Pieces of the target's memory that go to a record side by side.
#[repr(C)]
pub struct Copy {
    pub to: *mut u8,
    pub from: Address,
    /// Bytes from the start of a piece to the start of the next.
    pub stride: u64,
    /// Bytes of a piece.
    pub bytes: u32,
    /// Not 0 when one could not be copied.
    pub failed: u32,
}

impl Copy {
    #[inline(always)]
    pub fn run(&mut self, pieces: u32, copy: extern "C" fn(u32, *mut Copy) -> i64) -> Option<()> {
        if pieces > 0 {
            run_chunks(pieces, copy, self);
        }
        // Volatile: the compiler does not see that the callback writes there.
        // SAFETY: a read of a live reference.
        (unsafe { ptr::read_volatile(&self.failed) } == 0).then_some(())
    }
}

/// Copies the `index`th piece, of at most `PIECE` bytes, to a payload of `PAYLOAD` bytes. A callback,
/// which the verifier looks at once, where it would walk through each turn of a loop.
#[inline(never)]
pub extern "C" fn copy_piece<const PAYLOAD: usize, const PIECE: usize>(
    index: u32,
    copy: *mut Copy,
) -> i64 {
    // SAFETY: the caller keeps the copy on its stack during the loop.
    let copy = unsafe { &mut *copy };
    // Volatile: the compiler knows these bounds from the caller and would drop the checks that the
    // verifier, which does not, needs to see.
    // SAFETY: reads of a live reference.
    let (to, len) = unsafe {
        (
            ptr::read_volatile(&copy.to),
            ptr::read_volatile(&copy.bytes),
        )
    };
    let offset = u64::from(index) * u64::from(len);
    let from = copy.from.offset(u64::from(index) * copy.stride);
    if len as usize <= PIECE
        && offset <= (PAYLOAD - PIECE) as u64
        // SAFETY: `offset + len` is within the payload by the checks before.
        && unsafe { from.read_to(to.add(offset as usize), len) }.is_some()
    {
        return 0;
    }
    // SAFETY: a write to a live reference.
    unsafe { ptr::write_volatile(&mut copy.failed, 1) };
    1
}

/// Rows of up to so many bytes (64 elements) waste little of a record.
const ROW_NARROW: usize = 256;
const ROW_WIDE: usize = MAX_EXPERTS * ELEMENT_SIZE as usize;

#[inline(always)]
fn chunked<const PAYLOAD: usize, const ROW: usize>(walk: &mut RowsWalk) {
    // The last row must begin at or before PAYLOAD - ROW, so that the verifier sees it end inside.
    let fit = ((PAYLOAD - ROW) as u32 / walk.row_bytes.max(1)) + 1;
    walk.chunk_rows = fit;
    walk.run(rows_chunk::<PAYLOAD, ROW>);
}

/// Emits rows that follow each other without a gap.
#[inline(always)]
fn contiguous(walk: &mut RowsWalk) {
    let bytes = u64::from(walk.header.total_rows) * u64::from(walk.row_bytes);
    if bytes <= payload::MEDIUM as u64 {
        walk.chunk_rows = walk.header.total_rows;
        walk.run(contiguous_chunk::<{ payload::MEDIUM }>);
    } else {
        walk.chunk_rows = payload::LARGE as u32 / walk.row_bytes.max(1);
        walk.run(contiguous_chunk::<{ payload::LARGE }>);
    }
}

/// Emits one record of rows that follow each other without a gap. Returns 0 to go on (the contract of
/// `bpf_loop`).
#[inline(never)]
extern "C" fn contiguous_chunk<const PAYLOAD: usize>(index: u32, walk: *mut RowsWalk) -> i64 {
    // SAFETY: the caller keeps the walk on its stack during the loop.
    let walk = unsafe { &*walk };
    let (first_row, rows) = walk.chunk(index);
    emit_rows::<PAYLOAD>(walk, (first_row, rows), |to| {
        copy_together::<PAYLOAD>(walk, first_row, rows, to)
    })
}

/// Rows that are read with what is between them. A read costs as much as some hundred bytes of it.
const STRIDED_ROWS: usize = 31;
/// Most bytes from the start of such a row to that of the next: 128 experts.
const MAX_STRIDE: usize = 512;
/// Most bytes of such a row: 16 experts.
const STRIDED_ROW: usize = 64;

/// Room for rows and what is between them.
///
/// One for each CPU, where a hit can be preempted by another one. So it is used by the hit that finds
/// nobody else in it, and the other one does without.
#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

#[repr(C)]
struct Scratch {
    users: u64,
    /// All rows, and room behind the last one to read it as if it were of the largest size.
    bytes: [u8; STRIDED_ROWS * MAX_STRIDE + STRIDED_ROW],
}

/// Emits rows that are so near to each other that they are read together, if they are, and there is
/// somewhere to put them. Gives whether it has.
#[inline(always)]
fn strided(walk: &mut RowsWalk) -> bool {
    if walk.row_bytes as usize > STRIDED_ROW
        || walk.row_stride < u64::from(walk.row_bytes)
        || walk.row_stride > MAX_STRIDE as u64
    {
        return false;
    }
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: the map's value is alive during the program.
    let users = unsafe { &raw mut (*scratch).users };
    add(users, 1);
    // SAFETY: as above.
    let alone = unsafe { ptr::read_volatile(users) } == 1;
    if alone {
        let fit = (payload::MEDIUM - STRIDED_ROW) as u32 / walk.row_bytes.max(1) + 1;
        walk.chunk_rows = fit.min(STRIDED_ROWS as u32);
        walk.run(strided_chunk);
    }
    add(users, 1u64.wrapping_neg());
    alone
}

/// Emits one record of rows that are read together. Returns 0 to go on (the contract of `bpf_loop`).
#[inline(never)]
extern "C" fn strided_chunk(index: u32, walk: *mut RowsWalk) -> i64 {
    const WORDS: usize = STRIDED_ROW / 8;
    /// The last row begins so far from the end that it could be of the largest size.
    const LAST_FROM: u64 = (STRIDED_ROWS * MAX_STRIDE) as u64;
    const LAST_TO: u64 = (payload::MEDIUM - STRIDED_ROW) as u64;
    // SAFETY: the caller keeps the walk on its stack during the loop.
    let walk = unsafe { &*walk };
    let (first_row, rows) = walk.chunk(index);
    emit_rows::<{ payload::MEDIUM }>(walk, (first_row, rows), |to| {
        // Volatile: the verifier has to see bounds where they are checked.
        // SAFETY: reads of live references.
        let (stride, row_bytes) = unsafe {
            (
                ptr::read_volatile(&walk.row_stride),
                u64::from(ptr::read_volatile(&walk.row_bytes)),
            )
        };
        let bytes = u64::from(rows.saturating_sub(1)) * stride + row_bytes;
        // SAFETY: a read of a live variable.
        let bytes = unsafe { ptr::read_volatile(&bytes) };
        let scratch = SCRATCH.get_ptr_mut(0);
        // SAFETY: the map's value is alive during the program.
        let scratch = scratch.map(|scratch| unsafe { (&raw mut (*scratch).bytes).cast::<u8>() });
        let from = walk.data.offset(u64::from(first_row) * stride);
        let read = scratch.filter(|scratch| {
            // SAFETY: there is room for so many bytes by the check before.
            bytes <= LAST_FROM && unsafe { from.read_to(*scratch, bytes as u32) }.is_some()
        });
        let scratch = read?;
        let mut row = 0;
        while row < STRIDED_ROWS as u64 && row < u64::from(rows) {
            let (at, put) = (row * stride, row * row_bytes);
            if at > LAST_FROM || put > LAST_TO {
                return None;
            }
            // What is too much of it the next row overwrites, and what is behind the last one is not of
            // the record.
            // SAFETY: both have room for a row of the largest size by the check before.
            unsafe {
                let at = scratch.add(at as usize).cast::<[u64; WORDS]>();
                let put = to.add(put as usize).cast::<[u64; WORDS]>();
                put.write_unaligned(at.read_unaligned());
            }
            row += 1;
        }
        Some(())
    })
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
    emit_rows::<PAYLOAD>(walk, (first_row, rows), |to| {
        let mut copy = Copy {
            to,
            from: walk.data.offset(u64::from(first_row) * walk.row_stride),
            stride: walk.row_stride,
            bytes: walk.row_bytes,
            failed: 0,
        };
        copy.run(rows, copy_piece::<PAYLOAD, ROW>)
    })
}

/// Emits one row whose ids do not lie side by side (`nb[0]` is not 4).
///
/// llama.cpp's own ids tensors never look so; a strided read is what their `nb` would ask for.
#[inline(never)]
extern "C" fn scattered_chunk(index: u32, walk: *mut RowsWalk) -> i64 {
    // SAFETY: the caller keeps the walk on its stack during the loop.
    let walk = unsafe { &*walk };
    let (first_row, rows) = walk.chunk(index);
    emit_rows::<{ payload::LARGE }>(walk, (first_row, rows), |to| {
        let k = if rows == 0 { 0 } else { walk.header.k };
        let mut copy = Copy {
            to,
            from: walk.data.offset(u64::from(first_row) * walk.row_stride),
            stride: walk.element_stride,
            bytes: ELEMENT_SIZE as u32,
            failed: 0,
        };
        copy.run(
            u32::from(k),
            copy_piece::<{ payload::LARGE }, { ELEMENT_SIZE as usize }>,
        )
    })
}
