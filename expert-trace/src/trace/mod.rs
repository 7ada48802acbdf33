//! Full traces: every routed token of every layer, in the order in which they were computed.
//!
//! A trace is an [Arrow IPC stream](https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format)
//! of one schema ([`schema`]), whose rows are of several kinds ([`Kind`]). It is written in constant memory
//! ([`writer`]; [`file`](mod@file) where no capture has to go on meanwhile), and can be read while it grows, and
//! when it was cut ([`reader`]).
//!
//! ```text
//! model ── Finished ─▶ recorder ─▶ columns ─▶ writer ─▶ file ─▶ reader ─▶ Row
//! ```
//!
//! docs/trace-format.md explains every column.

pub mod columns;
pub mod file;
pub mod frames;
pub mod parts;
pub mod reader;
#[cfg(can_trace)]
pub mod recorder;
pub mod schema;
#[cfg(can_trace)]
pub mod writer;

use expert_trace_common::Phase;
use serde::{Deserialize, Serialize};

pub use self::{
    reader::{Batch, Ending, Reader},
    schema::{Capture, Weights},
};

/// What a row of a trace tells. Its number is the key in the dictionary of the column `record`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// A token was routed in a layer.
    Routed = 0,
    /// The same, to the second block of experts that the layer has (GroveMoE).
    SecondBlock = 1,
    /// Something is missing here.
    Gap = 2,
    /// A pass that is in no count.
    Excluded = 3,
    /// A context begins: `detail` says which process and models it can have.
    Context = 4,
    /// The capture has ended: `detail` is the document of statistics without its counts.
    Summary = 5,
}

impl Kind {
    /// All of them, in the order of their numbers.
    pub const ALL: [Kind; 6] = [
        Kind::Routed,
        Kind::SecondBlock,
        Kind::Gap,
        Kind::Excluded,
        Kind::Context,
        Kind::Summary,
    ];

    /// Its name in files.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Routed => "routed",
            Kind::SecondBlock => "second_block",
            Kind::Gap => "gap",
            Kind::Excluded => "excluded",
            Kind::Context => "context",
            Kind::Summary => "summary",
        }
    }
}

/// Why rows are missing, or left out. Its number is the key in the dictionary of the column `reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Reason {
    /// Rows of a layer of which others were seen: they were lost on their way.
    RowsLost = 0,
    /// A layer that other passes have gone through was not seen in this one: it was lost, or stayed on a
    /// device.
    LayerNotSeen = 1,
    /// A pass that computed tokens, and of which no layer was seen.
    PassNotSeen = 2,
    /// Passes of which not even the beginning was seen.
    PassesLost = 3,
    /// Rows that the kernel counted as lost, and of which it is not known where they belong.
    NotKnownWhere = 4,
    /// A pass that warms up.
    Warmup = 5,
    /// A pass that was seen in part, at an edge of the capture.
    Partial = 6,
    /// Rows of a layer's second block of experts, of which others were seen: they were lost on their way.
    SecondRowsLost = 7,
    /// The second block of a layer that has shown one in other passes: it was lost, or came by a route that
    /// does not show it.
    SecondBlockNotSeen = 8,
}

impl Reason {
    /// All of them, in the order of their numbers.
    pub const ALL: [Reason; 9] = [
        Reason::RowsLost,
        Reason::LayerNotSeen,
        Reason::PassNotSeen,
        Reason::PassesLost,
        Reason::NotKnownWhere,
        Reason::Warmup,
        Reason::Partial,
        Reason::SecondRowsLost,
        Reason::SecondBlockNotSeen,
    ];

    /// Its name in files.
    pub const fn name(self) -> &'static str {
        match self {
            Reason::RowsLost => "rows_lost",
            Reason::LayerNotSeen => "layer_not_seen",
            Reason::PassNotSeen => "pass_not_seen",
            Reason::PassesLost => "passes_lost",
            Reason::NotKnownWhere => "not_known_where",
            Reason::Warmup => "warmup",
            Reason::Partial => "partial",
            Reason::SecondRowsLost => "second_rows_lost",
            Reason::SecondBlockNotSeen => "second_block_not_seen",
        }
    }
}

/// Phases by name; the index is the key in the dictionary of the column `phase`.
pub const PHASES: [&str; 2] = ["prefill", "decode"];

/// The key of a phase. What is not known to be prefill counts as decode, as in the statistics.
pub fn phase_key(phase: Phase) -> u8 {
    u8::from(phase != Phase::Prefill)
}

/// One row of a trace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row<'a> {
    /// What it tells.
    pub kind: Kind,
    /// Context, by the order in which contexts were first seen.
    pub context: Option<u32>,
    /// Pass of the context, from 0, without holes but where passes were lost, or
    /// computed no tokens.
    pub pass: Option<u32>,
    /// Prefill or decode.
    pub phase: Option<Phase>,
    /// Layer of the model.
    pub layer: Option<u16>,
    /// Row within the pass and layer: the first one of a gap.
    pub row: Option<u32>,
    /// Rows that are missing, tokens that were left out; `None` when their number is not known.
    pub rows: Option<u32>,
    /// First sequence of the token, where the ubatch was read.
    pub sequence: Option<u16>,
    /// Position in it.
    pub position: Option<i32>,
    /// Token id, where token ids were asked for.
    pub token: Option<i32>,
    /// When it was read (when the pass began, of gaps): nanoseconds since 1970, UTC.
    pub time_ns: i64,
    /// Chosen experts in router order; empty where none were chosen.
    pub experts: &'a [u16],
    /// The router's weight of each of them, where weights were asked for and could be read: see
    /// [`Weights`](schema::Weights).
    pub weights: Option<&'a [f32]>,
    /// Why something is missing.
    pub reason: Option<Reason>,
    /// JSON.
    pub detail: Option<&'a str>,
}

impl Row<'_> {
    /// One that tells nothing but its kind.
    pub const fn of(kind: Kind) -> Self {
        Self {
            kind,
            context: None,
            pass: None,
            phase: None,
            layer: None,
            row: None,
            rows: None,
            sequence: None,
            position: None,
            token: None,
            time_ns: 0,
            experts: &[],
            weights: None,
            reason: None,
            detail: None,
        }
    }
}

/// What a `context` row says in its `detail`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ContextDetail {
    /// Its process.
    pub pid: u32,
    /// Model files of the process that the context can have, as `models` in the statistics has them: one,
    /// unless several fit.
    pub models: Vec<serde_json::Value>,
}

/// Rows of a trace, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Rows of [`Kind::Routed`] and [`Kind::SecondBlock`].
    pub routed: u64,
    /// Those of them that have no weights.
    pub without_weights: u64,
    /// Rows of [`Kind::Gap`].
    pub gaps: u64,
}

#[cfg(all(test, can_trace))]
mod tests;
