//! What the BPF programs and the program agree on: the records that cross the ring buffer, the
//! counters, and the candidate layouts of ggml's structs.
//!
//! All integers are in the byte order of the machine. Every record starts with a [`Header`] and is
//! followed by a payload whose meaning depends on [`Kind`]; the reserved payload may be longer than
//! the part that counts, which the header gives.
#![no_std]

use core::mem::{align_of, offset_of, size_of};

/// Whose hits count; the value at [`CONTROL_FOLLOW`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follow {
    /// All that the kernel lets through, which are those of one process.
    Nobody = 0,
    /// Those of the tracer's first child.
    FirstChild = 1,
    /// Those of the tracer's first child, and of all that it forks.
    Forks = 2,
}

/// What a record reports; the value of [`Header::kind`].
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Routed rows of one layer. Payload: `rows × k` expert ids, `i32`, row after row, each row in
    /// router order (`ffn_moe_topk-N` without its stride).
    Rows = 1,
    /// A pass of a scheduler begins (`first_row == 0`), or goes on. Payload: `rows` × [`RowInfo`] of
    /// the pass' ubatch; none when the ubatch could not be read.
    Pass = 2,
    /// Token ids of a pass: of one of at most [`MAX_WARMUP_TOKENS`] tokens, for the recognition of warm-up
    /// passes, and of all where [`CONTROL_TOKENS`] asks for them. Payload: `rows` × `i32`.
    Tokens = 3,
    /// The context is being freed: no pass of it follows.
    ContextEnd = 4,
    /// The target's dynamic linker has changed its list of libraries.
    Libraries = 5,
    /// The context uses this `ggml_backend_sched`. Payload: its address, `u64`.
    Owner = 6,
    /// The main thread of a process that is followed ends, or another one by a signal. Payload: `exit_code` of its `task_struct`,
    /// `u32`, which is what waitpid tells as the process' status.
    ProcessEnd = 7,
    /// A process that is followed has been forked; it has not run yet.
    ProcessStart = 8,
    /// Router logits of one layer, from which the experts are still to be chosen
    /// (`ffn_moe_logits-N`). Payload: `rows × k` `f32`, where k is the number of experts.
    Logits = 9,
    /// The same, with the router's bias added (`ffn_moe_logits_biased-N`).
    BiasedLogits = 10,
    /// The same, with the gating function applied (`ffn_moe_probs-N`).
    Probs = 11,
    /// The same, with the selection bias added (`ffn_moe_probs_biased-N`).
    Selection = 12,
    /// The process computes graphs with an eval callback of its own. Payload: the function's address,
    /// `u64`.
    EvalCallback = 13,
    /// Routed rows of the second block of experts that a layer has (GroveMoE). Payload as of
    /// [`Kind::Rows`].
    SecondBlock = 14,
    /// As [`Kind::Rows`], with the router's weights, where [`CONTROL_WEIGHTS`] asks for them. Payload:
    /// `rows × k` expert ids as there, then `rows × k` `f32` in the same order: what GET_ROWS gathers
    /// to `ffn_moe_weights-N`.
    WeightedRows = 15,
    /// The same of a second block of experts.
    WeightedSecondBlock = 16,
}

impl Kind {
    /// The kind with this number, if there is one.
    pub const fn from_u8(kind: u8) -> Option<Self> {
        Some(match kind {
            1 => Self::Rows,
            2 => Self::Pass,
            3 => Self::Tokens,
            4 => Self::ContextEnd,
            5 => Self::Libraries,
            6 => Self::Owner,
            7 => Self::ProcessEnd,
            8 => Self::ProcessStart,
            9 => Self::Logits,
            10 => Self::BiasedLogits,
            11 => Self::Probs,
            12 => Self::Selection,
            13 => Self::EvalCallback,
            14 => Self::SecondBlock,
            15 => Self::WeightedRows,
            16 => Self::WeightedSecondBlock,
            _ => return None,
        })
    }
}

/// Whether a pass works on a prompt or generates; the value of [`Header::phase`].
///
/// In the kernel this is one value for the whole ubatch: decode when no sequence has more than one
/// token in it. The program refines it row by row.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The ubatch could not be read.
    Unknown = 0,
    /// A sequence has more than one token in the pass.
    Prefill = 1,
    /// No sequence has more than one token in the pass.
    Decode = 2,
}

/// How the boundary between passes was found; the value of [`Header::pass_source`].
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassSource {
    /// `ggml_backend_sched_graph_compute_async` was entered on the thread.
    Scheduler = 1,
    /// No scheduler was seen on the thread: a pass begins where the layer number does not increase.
    LayerOrder = 2,
}

/// Where the routing of a layer was read; the value of [`Header::route`].
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Route {
    /// The router ran on the CPU: its ids at the entry of `ggml_compute_forward_get_rows`.
    Router = 0,
    /// The router ran on a device, the experts on the CPU: the scheduler has copied the ids to the
    /// host for the CPU's part of the graph.
    SplitInput = 1,
    /// Expert weights are streamed to a device: the scheduler has fetched the ids to see which.
    Fetch = 2,
    /// Everything is on a device, which has copied the ids to the host to sort tokens by expert.
    DeviceCopy = 3,
    /// The router's logits were computed on the host: the choice was made from them by the program.
    Logits = 4,
    /// The target has asked for the ids itself, as an eval callback does.
    Callback = 5,
}

impl Route {
    /// All routes, in the order of their numbers.
    pub const ALL: [Route; 6] = [
        Route::Router,
        Route::SplitInput,
        Route::Fetch,
        Route::DeviceCopy,
        Route::Logits,
        Route::Callback,
    ];
}

/// Start of every record.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// A [`Kind`].
    pub kind: u8,
    /// A [`Phase`].
    pub phase: u8,
    /// A [`PassSource`].
    pub pass_source: u8,
    /// A [`Route`], for rows.
    pub route: u8,
    /// Layer of the model, from the tensor's name.
    pub layer: u16,
    /// Experts per row (`ne[0]` of the ids tensor). For [`Kind::Pass`]: [`UBATCH_UNREADABLE`] or 0.
    pub k: u16,
    /// Address of the `llama_context` whose pass this is; of the `ggml_backend_sched` when no
    /// `llama_context` is known to use it; 0 when no scheduler was seen.
    pub context: u64,
    /// When the record was made: `CLOCK_MONOTONIC`, ns.
    pub time_ns: u64,
    /// Tells contexts apart that had the same address one after the other: when the context was
    /// first seen, in units of 1024 ns, truncated.
    pub generation: u32,
    /// Number of the pass within the context (within the thread when there is no scheduler), from 0.
    pub pass: u32,
    /// Process, as the initial PID namespace numbers it.
    pub process: u32,
    /// Thread on which the pass runs, as the initial PID namespace numbers it.
    pub thread: u32,
    /// Number, within the pass and layer, of the first row in this record.
    pub first_row: u32,
    /// Rows in this record.
    pub rows: u32,
    /// Rows of the pass in this layer (`ne[1]` of the ids tensor), of the ubatch for
    /// [`Kind::Pass`].
    pub total_rows: u32,
    /// Distance between rows in the target, in elements. The ids are a view of the argsort of all
    /// experts, so this is the number of experts; not so in a second block. 0 when the ids of a row do
    /// not lie side by side.
    pub row_stride: u32,
    /// Tokens of the pass' ubatch; 0 when it could not be read.
    pub ubatch_tokens: u32,
    /// Attach cookie of the probe that made the record: which library it sits in.
    pub source: u32,
}

/// In [`Header::k`] of a [`Kind::Pass`]: there was a ubatch, and it could not be read.
pub const UBATCH_UNREADABLE: u16 = 1;

/// One token of a ubatch, as far as it holds no text (`llama_ubatch` in llama-batch.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowInfo {
    /// Position in its sequence (the temporal one where positions have several sections).
    pub position: i32,
    /// First sequence the token belongs to.
    pub sequence: u16,
    /// [`ROW_OUTPUT`] or 0.
    pub flags: u16,
}

/// In [`RowInfo::flags`]: the last layers keep this row because its output is wanted.
pub const ROW_OUTPUT: u16 = 1;

/// Payload sizes of records, in bytes: the smallest that fits is reserved.
pub mod payload {
    /// One decoded token of up to 16 experts.
    pub const SMALL: usize = 64;
    /// A few sequences decoded together.
    pub const MEDIUM: usize = 1024;
    /// Prompts.
    pub const LARGE: usize = 8192;
}

/// Largest k, and largest number of experts, that is believed (llama.cpp's `LLAMA_MAX_EXPERTS` has
/// been at most 1024 up to now).
pub const MAX_EXPERTS: usize = 1024;
/// Largest number of rows of one pass that is believed.
pub const MAX_ROWS: u64 = 1 << 20;
/// Layers above this are not believed (`LLAMA_MAX_LAYERS` is 512).
pub const MAX_LAYERS: u16 = 1024;
/// A warm-up pass has at most this many tokens ([BOS, EOS]).
pub const MAX_WARMUP_TOKENS: u32 = 2;
/// Warm-up is looked for in so many first passes of a context.
pub const MAX_WARMUP_PASSES: u32 = 8;

/// Where the fields of `ggml_tensor` are, in bytes from its start (ggml.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TensorLayout {
    /// `src[0]`.
    pub src: u32,
    /// `data`; `name` follows it.
    pub data: u32,
}

/// Candidate layouts; the probe finds out which is true by the tensor's own name.
///
/// In all of them, and in all that are read: `type` is at 0, `ne` at [`TENSOR_NE`], `nb` at
/// [`TENSOR_NB`]; `view_src`, `view_offs`, `data` and `name` follow each other.
pub const TENSOR_LAYOUTS: [TensorLayout; 2] = [
    // b4106 (2024-11-17) to today.
    TensorLayout {
        src: 152,
        data: 248,
    },
    // b3209 to b4105, with `grad` before `src`.
    TensorLayout {
        src: 160,
        data: 256,
    },
];

/// The layout that a library declares for itself, in its DWARF.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeclaredLayout {
    /// Of `ggml_tensor`.
    pub tensor: TensorLayout,
    /// `ith` in `ggml_compute_params`, in bytes from its start (ggml-cpu-impl.h). It is the first field
    /// since b3209.
    pub ith: u32,
}

/// Value in the map `LAYOUT` of a library whose layout is in the map `DECLARED`. Others are 0 while the
/// layout is not known, and 1 + the index in [`TENSOR_LAYOUTS`].
pub const LAYOUT_DECLARED: u32 = u32::MAX;

/// llama.cpp builds that have the layout of the same index in [`TENSOR_LAYOUTS`].
pub const TENSOR_LAYOUT_BUILDS: [&str; 2] = ["b4106 or newer", "b3209 to b4105"];

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Kernel counters, one array per CPU.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Counter { $($(#[$doc])* $name),* }

        impl Counter {
            /// All counters in the order of their numbers.
            pub const ALL: &'static [Counter] = &[$(Counter::$name),*];
        }
    };
}

counters! {
    /// `ggml_compute_forward_get_rows` was entered while tracing was on (how often in all, the map `HITS`
    /// says), by a thread other than the first of its thread pool.
    FilteredThread,
    /// … for a tensor that is neither expert ids nor tokens.
    FilteredTensor,
    /// … for the embedding lookup (`inp_tokens`).
    TokenLookup,
    /// … and its parameters or tensors could not be read.
    HitUnreadable,
    /// … and no candidate layout has given a known name up to then.
    LayoutUnknown,
    /// … for expert ids.
    Routed,
    /// … of which the tensor made no sense: rows unknown.
    RoutedMalformed,
    /// … of which the tensor could not be read: rows unknown.
    RoutedUnreadable,
    /// Rows of expert ids seen.
    RowsSeen,
    /// Rows given to the ring buffer.
    RowsEmitted,
    /// Rows lost because the ring buffer was full.
    RowsRingFull,
    /// Rows whose ids could not be read from the target.
    RowsUnreadable,
    /// Records that were to be made, of all kinds.
    EventsSeen,
    /// Records given to the ring buffer.
    EventsEmitted,
    /// Records lost because the ring buffer was full.
    EventsRingFull,
    /// Records given up because the target's memory could not be read.
    EventsUnreadable,
    /// Passes begun by a scheduler.
    Passes,
    /// Passes whose ubatch was to be read and could not be.
    UbatchUnreadable,
    /// A kernel map was full: pass or context of following records is not known.
    StateLost,
    /// `ggml_graph_compute` was entered: the CPU's part of a graph.
    CpuSplits,
    /// … with expert ids among its inputs, not seen before in the pass.
    SplitIds,
    /// … that computes router logits, which were read when it returned.
    SplitLogits,
    /// Time that those took, in ns.
    SplitLogitsNs,
    /// Expert ids that a device was asked for, to be read when they are there.
    IdsCopies,
    /// … and were read, for the scheduler (`ggml_backend_tensor_get_async`).
    FetchedIds,
    /// … and were read, for the device itself (`cudaMemcpyAsync`).
    DeviceIds,
    /// … and were read, for the target's own code (`ggml_backend_tensor_get`).
    CallbackIds,
    /// … and whose arrival was never seen.
    IdsCopiesLost,
    /// Expert ids seen again in the same pass, for another weight of the layer.
    RepeatedIds,
    /// Expert ids of which the target's own code has asked for a part, which is not read.
    PartialIds,
}

/// Number of counters.
pub const COUNTERS: usize = Counter::ALL.len();

/// Whether the probes do anything; index 0 of the map `CONTROL`.
pub const CONTROL_ACTIVE: u32 = 0;
/// Whose hits count, a [`Follow`]; index 1 of the map `CONTROL`.
pub const CONTROL_FOLLOW: u32 = 1;
/// Offset of `tgid` in the running kernel's `task_struct`, in bytes; index 2 of the map `CONTROL`.
pub const CONTROL_TGID_OFFSET: u32 = 2;
/// Offset of `exit_code` there; index 7 of the map `CONTROL`.
pub const CONTROL_EXIT_CODE_OFFSET: u32 = 7;
/// The tracer's process id in its own PID namespace; index 3 of the map `CONTROL`.
pub const CONTROL_TRACER: u32 = 3;
/// Device and inode number of the tracer's PID namespace (`/proc/self/ns/pid`); indices 4 and 5 of
/// the map `CONTROL`.
pub const CONTROL_NAMESPACE: [u32; 2] = [4, 5];
/// First process that the tracer has forked since it follows, as the initial PID namespace numbers
/// it; index 6 of the map `CONTROL`.
pub const CONTROL_FIRST_CHILD: u32 = 6;
/// Which routes are read, by the bits of a [`Route`]'s number; index 8 of the map `CONTROL`.
pub const CONTROL_ROUTES: u32 = 8;
/// Whether records wake the tracer, a [`WakeUp`]; index 9 of the map `CONTROL`.
pub const CONTROL_WAKE_UP: u32 = 9;
/// Whether schedulers are probed, which passes enter that a `llama_context` has begun; index 10 of the map
/// `CONTROL`.
pub const CONTROL_SCHEDULERS: u32 = 10;
/// The probe for expert ids while there is no other, by [`Site::lone`]; index 11 of the map `CONTROL`.
pub const CONTROL_LONE_SITE: u32 = 11;
/// Nobody sets it; index 12 of the map `CONTROL`.
pub const CONTROL_ZERO: u32 = 12;
/// Whether token ids of all passes are read; index 13 of the map `CONTROL`.
pub const CONTROL_TOKENS: u32 = 13;
/// Whether router weights are read beside expert ids; index 14 of the map `CONTROL`.
pub const CONTROL_WEIGHTS: u32 = 14;
/// Entries of the map `CONTROL`.
pub const CONTROL_ENTRIES: u32 = 15;

/// Whether a record wakes the tracer: the flags of `bpf_ringbuf_submit` (include/uapi/linux/bpf.h).
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WakeUp {
    /// If it has taken all before it.
    IfCaughtUp = 0,
    /// No: it comes by itself (BPF_RB_NO_WAKEUP).
    Never = 1,
    /// Yes (BPF_RB_FORCE_WAKEUP).
    Always = 2,
}

/// `ne` in `ggml_tensor`, in bytes from its start.
pub const TENSOR_NE: u32 = 16;
/// `nb` there.
pub const TENSOR_NB: u32 = 48;

/// Entries of the maps `LAYOUT` and `DECLARED`: libraries told apart in one session.
pub const MAX_SOURCES: u32 = 1024;
/// Entries of the map `HITS`: probes told apart in one session.
pub const MAX_PROBES: u32 = 4096;

/// What a probe is called by: its attach cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Which library with expert ids it belongs to: index in the maps `LAYOUT` and `DECLARED`.
    pub source: u32,
    /// Which probe it is: index in the map `HITS`.
    pub probe: u32,
}

/// What is counted of a probe: values of the map `HITS`, one for each CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProbeCounts {
    /// How often it was hit while tracing was on.
    pub hits: u64,
    /// Hits of which the program took its own time: every [`TIMED_EVERY`]th on a CPU, from the first on.
    pub timed: u64,
    /// What it took for those, in nanoseconds.
    pub timed_ns: u64,
}

/// A prime: graphs have other numbers of nodes, so that no node is always timed, and none never.
pub const TIMED_EVERY: u64 = 61;

impl Site {
    /// The attach cookie.
    pub const fn cookie(self) -> u64 {
        (self.probe as u64) << 32 | self.source as u64
    }

    /// Back from the attach cookie.
    pub const fn of_cookie(cookie: u64) -> Self {
        Self {
            source: cookie as u32,
            probe: (cookie >> 32) as u32,
        }
    }

    /// In 32 bits, never 0. Where there is one probe, to ask for the cookie costs a tenth of a hit.
    pub const fn lone(self) -> u32 {
        (1 << 31) | (self.probe * MAX_SOURCES) | self.source
    }

    /// Back from that; none from 0.
    pub const fn of_lone(value: u32) -> Option<Self> {
        if value == 0 {
            return None;
        }
        Some(Self {
            source: value % MAX_SOURCES,
            probe: (value & !(1 << 31)) / MAX_SOURCES,
        })
    }
}

const _: () = {
    assert!(MAX_SOURCES.is_power_of_two() && MAX_PROBES <= (1 << 31) / MAX_SOURCES);
    assert!(size_of::<Header>() == 64);
    assert!(align_of::<Header>() == 8);
    assert!(offset_of!(Header, context) == 8);
    assert!(offset_of!(Header, generation) == 24);
    assert!(offset_of!(Header, first_row) == 40);
    assert!(offset_of!(Header, row_stride) == 52);
    assert!(size_of::<RowInfo>() == 8);
    assert!(payload::LARGE >= 2 * 4 * MAX_EXPERTS);
};
