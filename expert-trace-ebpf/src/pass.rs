//! Passes: one for each ubatch, and what the ubatch says about its tokens.
//!
//! | what is entered | found in | begins a pass of |
//! |---|---|---|
//! | `llama_context::process_ubatch` | llama.cpp of about b5922 and newer | a `llama_context` |
//! | the scheduler, where the other has not begun the pass | ggml | a scheduler, or its `llama_context` where that is known |
//!
//! The scheduler is probed only where some process can come to it in no other way. Where it is, it is
//! entered for each pass that a `llama_context` has begun as well.

use core::ptr;

use aya_ebpf::helpers::bpf_ktime_get_ns;
use expert_trace_common::{
    CONTROL_SCHEDULERS, CONTROL_TOKENS, Counter, Header, Kind, MAX_ROWS, MAX_WARMUP_PASSES,
    PassSource, Phase, ROW_OUTPUT, RowInfo, UBATCH_UNREADABLE, payload,
};

use crate::{
    copies::on_pass_begin,
    maps::{
        CALLBACKS, CONTEXTS, ContextKey, ContextState, EVENTS, OWNERS, Record, THREADS,
        ThreadState, control, count, emit, emit_header, note_early, wake_up_for,
    },
    rows::run_chunks,
    target::{Address, process, process_and_thread},
};

/// Offsets in `llama_ubatch` (llama-batch.h, since b5713; `set_inputs`, which gives it to us, exists
/// since b5922).
mod ubatch {
    /// `n_tokens`, `n_seq_tokens`, `n_seqs`, `n_seqs_unq`, each `u32`.
    pub const COUNTS: u64 = 4;
    /// `token`: null where embeddings take the place of tokens.
    pub const TOKENS: u64 = 24;
    /// `pos`: up to b11434; with another member before it, as b11549 has.
    pub const POSITIONS: [u64; 2] = [40, 48];
    /// `n_seq_id`, from `pos` on.
    pub const SEQUENCES: u64 = 8;
    /// `seq_id`, likewise.
    pub const SEQUENCE_IDS: u64 = 16;
    /// `output`, likewise.
    pub const OUTPUTS: u64 = 40;
}

/// Sequences above this are not believed (`LLAMA_MAX_SEQ` has been at most 256 up to now).
const MAX_SEQUENCES: u32 = 1 << 12;

pub const NEW_THREAD: ThreadState = ThreadState {
    context: 0,
    ubatch: 0,
    last_ids: 0,
    generation: 0,
    pass: 0,
    ubatch_tokens: 0,
    last_layer: -1,
    phase: Phase::Unknown as u8,
    pass_source: 0,
    last_routes: 0,
    no_callback: 0,
    early: 0,
    of_llama_context: 0,
    awaits_scheduler: 0,
    padding: [0; 1],
};

/// Every pass of a `llama_context` begins here, by whatever function of llama.cpp's API it came.
///
/// The scheduler, which is entered later in the pass, does not identify the context: it is made anew
/// when the shape of the graphs changes (`sched_reserve` in llama-context.cpp: samplers, LoRA, control
/// vectors).
#[inline(always)]
pub fn on_process_ubatch(llama_context: u64, ubatch: u64) {
    let schedulers_are_probed = control(CONTROL_SCHEDULERS) != 0;
    begin(Beginning {
        context: llama_context,
        ubatch,
        of_llama_context: 1,
        awaits_scheduler: u8::from(schedulers_are_probed),
    });
}

/// `set_inputs` is entered before the scheduler, on the same thread: the ubatch is remembered until
/// then. A null pointer says that the graph to come has no tokens (a shift of the KV cache).
#[inline(always)]
pub fn on_set_inputs(ubatch: u64) {
    let key = process_and_thread();
    let Some(state) = THREADS.get_ptr_mut(key) else {
        let state = ThreadState {
            ubatch,
            ..NEW_THREAD
        };
        return insert_thread(key, &state);
    };
    // SAFETY: the map's value is alive during the program, and belongs to this thread.
    let state = unsafe { &mut *state };
    // Else its pass has begun with it.
    if state.awaits_scheduler == 0 {
        state.ubatch = ubatch;
    }
}

/// The scheduler is entered: for the pass that a `llama_context` has begun on this thread; or for one of
/// which nothing was seen before, because the program uses ggml without llama.cpp, compilers have put
/// `process_ubatch` into its callers, or the graph has no tokens.
#[inline(always)]
pub fn on_graph_compute(sched: u64) {
    let mut ubatch = 0;
    if let Some(state) = THREADS.get_ptr_mut(process_and_thread()) {
        // SAFETY: the map's value is alive during the program, and belongs to this thread.
        let state = unsafe { &mut *state };
        if state.awaits_scheduler != 0 {
            state.awaits_scheduler = 0;
            let state = *state;
            return note_owner(sched, &state);
        }
        ubatch = state.ubatch;
    }
    let owner = OWNERS.get_ptr_mut(context_key(sched));
    // SAFETY: the map's value is alive during the program.
    let owner = owner.map(|owner| unsafe { *owner });
    begin(Beginning {
        context: owner.unwrap_or(sched),
        ubatch,
        of_llama_context: 0,
        awaits_scheduler: 0,
    });
}

/// What is known of a pass when it begins.
struct Beginning {
    context: u64,
    /// 0 without one.
    ubatch: u64,
    of_llama_context: u8,
    awaits_scheduler: u8,
}

#[inline(always)]
fn begin(beginning: Beginning) {
    let Beginning {
        context,
        ubatch: address,
        of_llama_context,
        awaits_scheduler,
    } = beginning;
    on_pass_begin();
    let key = context_key(context);
    let (pass, generation) = if let Some(context) = CONTEXTS.get_ptr_mut(key) {
        // SAFETY: the map's value is alive during the program; one thread at a time computes with a
        // context.
        let context = unsafe { &mut *context };
        let pass = context.passes;
        context.passes = pass.wrapping_add(1);
        (pass, context.generation)
    } else {
        // SAFETY: the helper takes no argument.
        let generation = (unsafe { bpf_ktime_get_ns() } >> 10) as u32;
        let context = ContextState {
            passes: 1,
            generation,
        };
        if CONTEXTS.insert(key, context, 0).is_err() {
            count(Counter::StateLost, 1);
        }
        (0, generation)
    };
    count(Counter::Passes, 1);
    let early = u8::from(pass < MAX_WARMUP_PASSES);
    let thread_key = process_and_thread();
    let before = THREADS.get_ptr(thread_key);
    // SAFETY: the map's value is alive during the program.
    note_early(before.map_or(0, |before| unsafe { (*before).early }), early);

    let ubatch = Ubatch::read(Address(address));
    let unreadable = ubatch.is_none() && address != 0;
    if unreadable {
        count(Counter::UbatchUnreadable, 1);
    }
    let callback = CALLBACKS.get_ptr(key);
    // SAFETY: the map's value is alive during the program.
    let has_none = callback.is_some_and(|callback| unsafe { *callback } == 0);
    let state = ThreadState {
        context,
        generation,
        pass,
        no_callback: u8::from(has_none),
        early,
        ubatch_tokens: ubatch.as_ref().map_or(0, |ubatch| ubatch.tokens),
        phase: ubatch.as_ref().map_or(Phase::Unknown, Ubatch::phase) as u8,
        pass_source: PassSource::Scheduler as u8,
        of_llama_context,
        awaits_scheduler,
        ..NEW_THREAD
    };
    insert_thread(thread_key, &state);

    let header = Header {
        kind: Kind::Pass as u8,
        k: if unreadable { UBATCH_UNREADABLE } else { 0 },
        ..header(&state)
    };
    match ubatch {
        None => emit_header(header),
        Some(ubatch) => {
            let total_rows = ubatch.tokens;
            emit_pass(header, ubatch);
            if control(CONTROL_TOKENS) != 0 {
                emit_tokens(
                    Header {
                        kind: Kind::Tokens as u8,
                        k: 0,
                        total_rows,
                        ..header
                    },
                    Address(address),
                );
            }
        }
    }
}

/// Tells, once for each scheduler, whose it is: passes that were under way before the context could
/// be seen were numbered by their scheduler.
#[inline(always)]
fn note_owner(sched: u64, state: &ThreadState) {
    let (key, owner) = (context_key(sched), state.context);
    if let Some(known) = OWNERS.get_ptr_mut(key)
        // SAFETY: the map's value is alive during the program.
        && unsafe { *known } == owner
    {
        return;
    }
    if OWNERS.insert(key, owner, 0).is_err() {
        count(Counter::StateLost, 1);
    }
    emit(
        Header {
            kind: Kind::Owner as u8,
            ..header(state)
        },
        sched,
    );
}

/// A scheduler is given an eval callback, or none: llama.cpp does that in a pass, for every graph it
/// allocates, and before anything is computed. One that is new to the context is told of.
#[inline(always)]
pub fn on_eval_callback(sched: u64, callback: u64) {
    let mut context = sched;
    if let Some(state) = THREADS.get_ptr_mut(process_and_thread()) {
        // SAFETY: the map's value is alive during the program, and belongs to this thread.
        let state = unsafe { &mut *state };
        // Behind the first layer, it is for other graphs than those of the pass.
        if state.of_llama_context != 0 && state.last_layer < 0 {
            context = state.context;
            state.no_callback = u8::from(callback == 0);
        }
    }
    let key = context_key(context);
    if let Some(known) = CALLBACKS.get_ptr(key)
        // SAFETY: the map's value is alive during the program.
        && unsafe { *known } == callback
    {
        return;
    }
    if CALLBACKS.insert(key, callback, 0).is_err() {
        count(Counter::StateLost, 1);
    }
    if callback == 0 {
        return;
    }
    emit(
        Header {
            kind: Kind::EvalCallback as u8,
            ..header(&NEW_THREAD)
        },
        callback,
    );
}

#[inline(always)]
pub fn on_leave_context(address: u64) {
    let key = context_key(address);
    // They fail only when there is no such entry.
    let _ = OWNERS.remove(key);
    let _ = CALLBACKS.remove(key);
    let Some(context) = CONTEXTS.get_ptr_mut(key) else {
        return;
    };
    // SAFETY: the map's value is alive during the program.
    let ContextState { passes, generation } = unsafe { *context };
    let state = ThreadState {
        context: address,
        generation,
        pass: passes,
        ..NEW_THREAD
    };
    emit_header(Header {
        kind: Kind::ContextEnd as u8,
        ..header(&state)
    });
    let _ = CONTEXTS.remove(key);
}

#[inline(always)]
fn context_key(address: u64) -> ContextKey {
    ContextKey {
        process: u64::from(process()),
        address,
    }
}

/// Header of a record about the pass that the current thread is in.
#[inline(always)]
pub fn header(state: &ThreadState) -> Header {
    let key = process_and_thread();
    Header {
        phase: state.phase,
        pass_source: state.pass_source,
        context: state.context,
        // SAFETY: the helper takes no argument.
        time_ns: unsafe { bpf_ktime_get_ns() },
        generation: state.generation,
        pass: state.pass,
        process: (key >> 32) as u32,
        thread: key as u32,
        ubatch_tokens: state.ubatch_tokens,
        ..Header::default()
    }
}

#[inline(always)]
pub fn insert_thread(key: u64, state: &ThreadState) {
    if THREADS.insert(key, state, 0).is_err() {
        count(Counter::StateLost, 1);
    }
}

/// The part of a `llama_ubatch` that is read.
struct Ubatch {
    tokens: u32,
    unique_sequences: u32,
    positions: Address,
    sequence_ids: Address,
    outputs: Address,
}

impl Ubatch {
    #[inline(always)]
    fn read(address: Address) -> Option<Self> {
        if address.0 == 0 {
            return None;
        }
        let [tokens, _, _, unique_sequences] = address.offset(ubatch::COUNTS).read::<[u32; 4]>()?;
        if tokens == 0 || u64::from(tokens) > MAX_ROWS {
            return None;
        }
        let at = |positions: u64| {
            let member = |offset| address.offset(positions + offset).read().map(Address);
            let ubatch = Self {
                tokens,
                unique_sequences,
                positions: member(0)?,
                sequence_ids: member(ubatch::SEQUENCE_IDS)?,
                outputs: member(ubatch::OUTPUTS)?,
            };
            ubatch
                .makes_sense(member(ubatch::SEQUENCES)?)
                .then_some(ubatch)
        };
        at(ubatch::POSITIONS[0]).or_else(|| at(ubatch::POSITIONS[1]))
    }

    /// Whether the first token looks like one. With the offsets of another build its sequences would be
    /// a number in place of a pointer, and their number half a pointer.
    #[inline(always)]
    fn makes_sense(&self, sequences: Address) -> bool {
        let Some(sequences) = sequences.read::<u32>() else {
            return false;
        };
        let Some(ids) = self.sequence_ids.read::<u64>() else {
            return false;
        };
        let Some(first) = Address(ids).read::<u32>() else {
            return false;
        };
        let has_outputs = self.outputs.read::<u8>().is_some();
        (1..=MAX_SEQUENCES).contains(&sequences) && first < MAX_SEQUENCES && has_outputs
    }

    #[inline(always)]
    fn phase(&self) -> Phase {
        if self.tokens <= self.unique_sequences {
            Phase::Decode
        } else {
            Phase::Prefill
        }
    }

    #[inline(always)]
    fn row(&self, i: u64) -> Option<RowInfo> {
        let position = self.positions.offset(i * 4).read::<i32>()?;
        let sequences = self.sequence_ids.offset(i * 8).read::<u64>()?;
        let output = self.outputs.offset(i).read::<u8>()?;
        Some(RowInfo {
            position,
            sequence: Address(sequences).read::<i32>()? as u16,
            flags: if output == 0 { 0 } else { ROW_OUTPUT },
        })
    }
}

struct PassWalk {
    header: Header,
    ubatch: Ubatch,
}

#[inline(always)]
fn emit_pass(header: Header, ubatch: Ubatch) {
    const SMALL_ROWS: u32 = (payload::SMALL / size_of::<RowInfo>()) as u32;
    let tokens = ubatch.tokens;
    let mut walk = PassWalk {
        header: Header {
            total_rows: tokens,
            ..header
        },
        ubatch,
    };
    if tokens <= SMALL_ROWS {
        pass_chunk::<{ payload::SMALL }>(0, &mut walk);
    } else {
        run_chunks(
            tokens.div_ceil(payload::MEDIUM as u32 / size_of::<RowInfo>() as u32),
            pass_chunk::<{ payload::MEDIUM }>,
            &mut walk,
        );
    }
}

/// Emits the `index`th record of a pass' rows. Returns 0 to go on (the contract of `bpf_loop`).
#[inline(never)]
extern "C" fn pass_chunk<const PAYLOAD: usize>(index: u32, walk: *mut PassWalk) -> i64 {
    // SAFETY: the caller keeps the walk on its stack during the loop.
    let PassWalk { header, ubatch } = unsafe { &*walk };
    let capacity = (PAYLOAD / size_of::<RowInfo>()) as u32;
    let first_row = index * capacity;
    let rows = capacity.min(header.total_rows.saturating_sub(first_row));

    count(Counter::EventsSeen, 1);
    let Some(mut entry) = EVENTS.reserve::<Record<PAYLOAD>>(0) else {
        count(Counter::EventsRingFull, 1);
        return 0;
    };
    let record = entry.as_mut_ptr();
    // SAFETY: the entry is as large as the record.
    unsafe {
        (&raw mut (*record).header).write(Header {
            first_row,
            rows,
            ..*header
        })
    };
    let infos = unsafe { (&raw mut (*record).payload).cast::<RowInfo>() };
    for i in 0..PAYLOAD / size_of::<RowInfo>() {
        if i as u32 >= rows {
            break;
        }
        let Some(info) = ubatch.row(u64::from(first_row) + i as u64) else {
            entry.discard(0);
            count(Counter::EventsUnreadable, 1);
            return 0;
        };
        // SAFETY: `i` is below the number of infos that fit in the payload.
        unsafe { infos.add(i).write(info) };
    }
    entry.submit(wake_up_for(header.kind, header.pass));
    count(Counter::EventsEmitted, 1);
    0
}

struct TokensWalk {
    header: Header,
    /// Of token ids, `i32`.
    data: Address,
}

/// Emits the token ids of a pass.
#[inline(always)]
fn emit_tokens(header: Header, ubatch: Address) {
    let Some(data) = ubatch.offset(ubatch::TOKENS).read().map(Address) else {
        return count(Counter::UbatchUnreadable, 1);
    };
    if data.0 == 0 {
        return;
    }
    let records = header.total_rows.div_ceil(TOKENS_OF_RECORD);
    run_chunks(records, tokens_chunk, &mut TokensWalk { header, data });
}

const TOKENS_OF_RECORD: u32 = (payload::MEDIUM / size_of::<i32>()) as u32;

/// Emits the `index`th record of a pass' tokens. Returns 0 to go on (the contract of `bpf_loop`).
#[inline(never)]
extern "C" fn tokens_chunk(index: u32, walk: *mut TokensWalk) -> i64 {
    // SAFETY: the caller keeps the walk on its stack during the loop.
    let TokensWalk { header, data } = unsafe { &*walk };
    let first_row = index * TOKENS_OF_RECORD;
    let rows = TOKENS_OF_RECORD.min(header.total_rows.saturating_sub(first_row));

    count(Counter::EventsSeen, 1);
    let Some(mut entry) = EVENTS.reserve::<Record<{ payload::MEDIUM }>>(0) else {
        count(Counter::EventsRingFull, 1);
        return 0;
    };
    let record = entry.as_mut_ptr();
    let bytes = rows * size_of::<i32>() as u32;
    // Volatile: the verifier has to see the bound here.
    // SAFETY: a read of a live variable.
    let bytes = unsafe { ptr::read_volatile(&bytes) };
    let from = data.offset(u64::from(first_row) * size_of::<i32>() as u64);
    // SAFETY: the entry is as large as the record, and so many bytes fit in its payload.
    let copied = unsafe {
        (&raw mut (*record).header).write(Header {
            first_row,
            rows,
            ..*header
        });
        match bytes <= payload::MEDIUM as u32 {
            true => from.read_to((&raw mut (*record).payload).cast(), bytes),
            false => None,
        }
    };
    if copied.is_none() {
        entry.discard(0);
        count(Counter::EventsUnreadable, 1);
        return 0;
    }
    entry.submit(wake_up_for(Kind::Pass as u8, header.pass));
    count(Counter::EventsEmitted, 1);
    0
}
