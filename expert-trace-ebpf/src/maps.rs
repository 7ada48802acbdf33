//! The maps, and the few things that are done with each.

use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    ptr,
};

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_F_NO_PREALLOC, BPF_RB_AVAIL_DATA, BPF_RB_RING_SIZE},
    helpers::bpf_ktime_get_ns,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use expert_trace_common::{
    CONTROL_ACTIVE, CONTROL_ENTRIES, CONTROL_FOLLOW, CONTROL_LONE_SITE, CONTROL_ROUTES,
    CONTROL_WAKE_UP, CONTROL_ZERO, COUNTERS, Counter, DeclaredLayout, Follow, Header, Kind,
    MAX_PROBES, MAX_SOURCES, ProbeCounts, Route, Site, TIMED_EVERY, WakeUp, payload,
};

use crate::target::{process, site};

/// The loader sets the size.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(8 << 20, 0);

#[map]
static COUNTS: PerCpuArray<[u64; COUNTERS]> = PerCpuArray::with_max_entries(1, 0);

#[map]
pub static CONTROL: Array<u32> = Array::with_max_entries(CONTROL_ENTRIES, 0);

/// Processes whose hits count: the one the tracer has started, and those it forked. Room for one in
/// four process ids that 64-bit Linux has; entries take memory when they are made.
#[map]
pub static FOLLOWED: HashMap<u32, u8> = HashMap::with_max_entries(1 << 20, BPF_F_NO_PREALLOC);

/// By library: 1 + index in `TENSOR_LAYOUTS`, `LAYOUT_DECLARED`, or 0 while it is not known.
#[map]
pub static LAYOUT: Array<u32> = Array::with_max_entries(MAX_SOURCES, 0);

/// By library: the layout that it declares. The loader writes it before the library is probed.
#[map]
pub static DECLARED: Array<DeclaredLayout> = Array::with_max_entries(MAX_SOURCES, 0);

/// By probe: how often it was hit while tracing was on.
#[map]
static HITS: PerCpuArray<ProbeCounts> = PerCpuArray::with_max_entries(MAX_PROBES, 0);

/// How many threads are in one of the first passes of a context, of which the tokens are wanted. It can
/// stay too high, when a thread has ended in one, and is never too low.
#[map]
static EARLY: Array<u64> = Array::with_max_entries(1, 0);

/// What a thread is working on. LRU: of threads that are gone nothing needs to be kept.
#[map]
pub static THREADS: LruHashMap<u64, ThreadState> = LruHashMap::with_max_entries(4096, 0);

/// Not LRU: a context that fell out would come back as another one, unnoticed.
#[map]
pub static CONTEXTS: HashMap<ContextKey, ContextState> = HashMap::with_max_entries(4096, 0);

/// By scheduler: the `llama_context` that uses it, where schedulers are probed.
#[map]
pub static OWNERS: LruHashMap<ContextKey, u64> = LruHashMap::with_max_entries(4096, 0);

/// By context: the eval callback that was last set, 0 for none.
#[map]
pub static CALLBACKS: LruHashMap<ContextKey, u64> = LruHashMap::with_max_entries(4096, 0);

/// Pass that runs on a thread.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ThreadState {
    /// What the pass belongs to: a `llama_context`, or a scheduler; 0 without either.
    pub context: u64,
    /// `llama_ubatch` that `set_inputs` was last called with and that no pass has used yet.
    pub ubatch: u64,
    /// Tensor of expert ids last read in the pass, where the same one can come again.
    pub last_ids: u64,
    pub generation: u32,
    pub pass: u32,
    pub ubatch_tokens: u32,
    /// Last layer seen; -1 before the first.
    pub last_layer: i32,
    pub phase: u8,
    pub pass_source: u8,
    /// Routes that have shown that layer, by their numbers' bits.
    pub last_routes: u8,
    /// 1 when the context is known to have no eval callback.
    pub no_callback: u8,
    /// 1 in one of the first passes of a context.
    pub early: u8,
    /// 1 when a `llama_context` has begun the pass.
    pub of_llama_context: u8,
    /// 1 when it has, and the scheduler's entry for the pass is to come.
    pub awaits_scheduler: u8,
    pub padding: [u8; 1],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct ContextKey {
    pub process: u64,
    /// A `llama_context` or a `ggml_backend_sched`.
    pub address: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct ContextState {
    pub passes: u32,
    pub generation: u32,
}

/// Whether tracing is on, and for the current process. All probes are switched at once, whenever each
/// was attached.
#[inline(always)]
pub fn active() -> bool {
    control(CONTROL_ACTIVE) != 0
        && (control(CONTROL_FOLLOW) == Follow::Nobody as u32 || is_followed(process()))
}

/// A hit that counts, until its program ends, which takes its own time now and then.
pub struct Hit {
    /// Where it is.
    pub site: Site,
    counts: *mut ProbeCounts,
    /// 0 when it is not timed.
    begin_ns: u64,
}

impl Drop for Hit {
    #[inline(always)]
    fn drop(&mut self) {
        let Self {
            counts, begin_ns, ..
        } = *self;
        if begin_ns == 0 {
            return;
        }
        // SAFETY: the helper takes no argument.
        let ns = unsafe { bpf_ktime_get_ns() }.saturating_sub(begin_ns);
        // SAFETY: the map's value is alive during the program.
        let (timed, timed_ns) = unsafe { (&raw mut (*counts).timed, &raw mut (*counts).timed_ns) };
        add(timed, 1);
        add(timed_ns, ns);
    }
}

/// Counts a hit for its probe, if it counts: see [`active`].
#[inline(always)]
pub fn hit<C: EbpfContext>(ctx: &C) -> Option<Hit> {
    if !active() {
        return None;
    }
    count_hit(site(ctx))
}

/// The same of a probe for expert ids, which are hit most often.
#[inline(always)]
pub fn hit_of_ids<C: EbpfContext>(ctx: &C) -> Option<Hit> {
    if !active() {
        return None;
    }
    let site = match Site::of_lone(control(CONTROL_LONE_SITE)) {
        Some(site) => site,
        None => site(ctx),
    };
    count_hit(site)
}

#[inline(always)]
fn count_hit(site: Site) -> Option<Hit> {
    let counts = HITS.get_ptr_mut(site.probe)?;
    // SAFETY: the map's value is alive during the program.
    let hits = unsafe { &raw mut (*counts).hits };
    // Volatile: others count there, too.
    // SAFETY: as above.
    let is_timed = unsafe { ptr::read_volatile(hits) } % TIMED_EVERY == 0;
    add(hits, 1);
    let begin_ns = if is_timed {
        // SAFETY: the helper takes no argument.
        unsafe { bpf_ktime_get_ns() }
    } else {
        // A zero that the verifier does not know: else it would follow all that comes twice.
        u64::from(control(CONTROL_ZERO))
    };
    Some(Hit {
        site,
        counts,
        begin_ns,
    })
}

/// Whether the capture takes this route.
#[inline(always)]
pub fn is_read(route: Route) -> bool {
    control(CONTROL_ROUTES) & 1 << route as u32 != 0
}

/// Whether a record wakes the tracer: the flags with which it is submitted.
#[inline(always)]
pub fn wake_up() -> u64 {
    u64::from(control(CONTROL_WAKE_UP))
}

/// The same for records that come before others: they wake the tracer in any case once a quarter of the
/// buffer is full, so that it can leave them for longer than a burst takes to fill it.
#[inline(always)]
pub fn wake_up_in_time() -> u64 {
    let [filled, size] = [BPF_RB_AVAIL_DATA, BPF_RB_RING_SIZE].map(|of| EVENTS.query(of.into()));
    if filled > size / 4 {
        WakeUp::Always as u64
    } else {
        wake_up()
    }
}

/// The same for records that tell of passes, contexts and processes. But for later passes they are rare,
/// and have the tracer look at the process while it is there.
#[inline(always)]
pub fn wake_up_for(kind: u8, pass: u32) -> u64 {
    if kind == Kind::Pass as u8 && pass != 0 {
        wake_up_in_time()
    } else {
        WakeUp::Always as u64
    }
}

#[inline(always)]
pub fn control(index: u32) -> u32 {
    CONTROL.get(index).copied().unwrap_or(0)
}

#[inline(always)]
pub fn is_followed(process: u32) -> bool {
    FOLLOWED.get_ptr(process).is_some()
}

#[inline(always)]
pub fn count(counter: Counter, n: u64) {
    count_each([(counter, n)]);
}

/// Several at once, for one look-up.
#[inline(always)]
pub fn count_each<const N: usize>(of_each: [(Counter, u64); N]) {
    if let Some(counts) = COUNTS.get_ptr_mut(0) {
        for (counter, n) in of_each {
            // SAFETY: counters are numbered from 0 to COUNTERS - 1.
            add(unsafe { counts.cast::<u64>().add(counter as usize) }, n);
        }
    }
}

/// Whether tokens are wanted in the pass of any thread.
#[inline(always)]
pub fn any_is_early() -> bool {
    // SAFETY: the map's value is alive during the program.
    EARLY
        .get_ptr(0)
        .is_none_or(|threads| unsafe { ptr::read_volatile(threads) } != 0)
}

/// A thread goes from a pass that was early, or not, to one that is, or is not.
#[inline(always)]
pub fn note_early(was: u8, is: u8) {
    if was != is
        && let Some(threads) = EARLY.get_ptr_mut(0)
    {
        add(threads, u64::from(is).wrapping_sub(u64::from(was)));
    }
}

/// Adds to a value of a map. Atomic because another hit may preempt this one on the same CPU.
#[inline(always)]
pub fn add(value: *mut u64, n: u64) {
    // SAFETY: the map keeps the value aligned and alive.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(value, n) };
}

/// Record with a payload of `N` bytes, as it lies in the ring buffer.
#[repr(C, align(8))]
pub struct Record<const N: usize> {
    pub header: Header,
    pub payload: [u8; N],
}

/// Emits a record that has no payload.
#[inline(always)]
pub fn emit_header(header: Header) {
    emit(header, ());
}

/// Emits a record with a small value as its payload.
#[inline(always)]
pub fn emit<T: Copy>(header: Header, value: T) {
    const { assert!(size_of::<T>() <= payload::SMALL && align_of::<T>() <= 8) };
    count(Counter::EventsSeen, 1);
    let Some(mut entry) = EVENTS.reserve::<Record<{ payload::SMALL }>>(0) else {
        count(Counter::EventsRingFull, 1);
        return;
    };
    let record = entry.as_mut_ptr();
    // SAFETY: the entry is as large as the record, and its payload, which is aligned to 8 bytes, as
    // large as the value.
    unsafe {
        (&raw mut (*record).header).write(header);
        (&raw mut (*record).payload).cast::<T>().write(value);
    }
    entry.submit(wake_up_for(header.kind, header.pass));
    count(Counter::EventsEmitted, 1);
}
