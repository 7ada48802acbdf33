//! `analyze`: whether caching, pinning or splitting experts pays, from what a workload has routed.
//!
//! ```text
//! file ─ input ─▶ counts ─▶ balance ──────────────┐
//!            └──▶ routing ─▶ time, structure ─────┼─▶ Analysis ─▶ text, JSON, the HTML report
//!                     └────▶ lookups ─▶ cache ────┴─▶ verdict
//! ```
//!
//! All but [`input`] and [`command`] is pure: the same file and options give the same answers.
//! docs/analyze.md explains every figure.

pub mod balance;
pub mod budget;
pub mod cache;
pub mod command;
pub mod input;
pub mod lookups;
pub mod pairs;
pub mod routing;
pub mod sequences;
pub mod structure;
#[cfg(test)]
mod tests;
pub mod text;
pub mod time;
pub mod tokens;
pub mod verdict;

use serde::Serialize;

use self::{
    balance::Balance,
    cache::Cache,
    input::{FileKind, Input},
    routing::Layer,
    structure::Structure,
    time::Time,
    verdict::Verdict,
};
use crate::profile::Schema;

/// Name of the document's schema.
pub const SCHEMA_NAME: &str = "expert-trace-analysis";
/// Its version: raised when a key changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

/// All that is answered of one context.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Analysis {
    /// What this is.
    pub schema: Schema,
    /// What was analyzed.
    pub source: Source,
    /// What is to be said of the file, a sentence each.
    pub notes: Vec<String>,
    /// How evenly experts are used.
    pub balance: Balance,
    /// What changes from token to token; `None` of counts.
    pub time: Option<Time>,
    /// What goes together.
    pub structure: Structure,
    /// Caches of experts; `None` where it is not known how many bytes an expert takes.
    pub cache: Option<Cache>,
    /// Questions that this file does not answer, and why.
    pub unanswered: Vec<Unanswered>,
    /// What follows for a cache of experts.
    pub verdict: Verdict,
    /// What the answers have taken; empty unless somebody has measured it.
    pub cost: Vec<Cost>,
}

/// Time that a part of the work has taken.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cost {
    /// What was done.
    pub work: &'static str,
    /// Seconds.
    pub seconds: f64,
}

/// What was analyzed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Source {
    /// The file.
    pub file: String,
    /// What it is.
    pub kind: FileKind,
    /// Its context.
    pub context: usize,
    /// Model file, where that is known.
    pub model: Option<String>,
    /// Architecture, where that is known.
    pub arch: Option<String>,
    /// Layers with experts that have routed.
    pub layers: usize,
    /// Experts to choose from, in the layer that has most.
    pub n_expert: u32,
    /// Experts chosen per token, in the layer that chooses most.
    pub k: u32,
    /// Tokens of prompts, in the layer that has most.
    pub prefill_tokens: u64,
    /// Generated tokens, in the layer that has most.
    pub decode_tokens: u64,
    /// (token, expert) pairs over all layers.
    pub activations: u64,
    /// Gaps of the trace.
    pub gaps: usize,
}

/// A question that has no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unanswered {
    /// Member of the document that is empty: `time`, `cache`.
    pub question: &'static str,
    /// Why, and what would answer it.
    pub why: String,
}

/// Parts of the work that can take long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Tokens that follow each other.
    Time,
    /// Distances between uses.
    Reuse,
    /// Pairs of experts.
    Structure,
    /// LRU over the whole trace.
    Lru,
    /// The other policies.
    Policies,
}

impl Stage {
    /// For people: what is being done.
    pub fn name(self) -> &'static str {
        match self {
            Self::Time => "comparing tokens",
            Self::Reuse => "looking for reuse",
            Self::Structure => "counting pairs of experts",
            Self::Lru => "computing stack distances",
            Self::Policies => "simulating caches",
        }
    }
}

impl Analysis {
    /// Answers what a file can answer. `file` is its name; `progress` gets the stage, what is done of it and how
    /// much there is.
    pub fn of(
        file: &str,
        input: &Input,
        options: &cache::Options,
        progress: &mut dyn FnMut(Stage, u64, u64),
    ) -> Self {
        let sizes = sizes(&input.layers);
        let routing = input.routing.as_ref();
        let time = routing.map(|routing| Time::of(routing, sizes.as_deref(), progress));
        let structure = Structure::of(&input.context, &input.layers, routing, progress);
        let cache = sizes.as_deref().map(|sizes| match routing {
            Some(routing) => Cache::of(routing, sizes, options, progress),
            None => Cache::of_counts(&decode_counts(input), sizes, options),
        });
        let mut unanswered = Vec::new();
        if time.is_none() {
            unanswered.push(Unanswered {
                question: "time",
                why: "counts do not tell the order of tokens: record a trace (--trace)".to_owned(),
            });
        }
        if cache.is_none() {
            unanswered.push(Unanswered {
                question: "cache",
                why: without_sizes(&input.layers),
            });
        } else if routing.is_none() {
            unanswered.push(Unanswered {
                question: "cache",
                why: "of counts, a static pin alone is known: record a trace (--trace) for the other policies"
                    .to_owned(),
            });
        }
        let balance = Balance::of(&input.context);
        let verdict = Verdict::of(input, &balance, cache.as_ref());
        Self {
            schema: Schema {
                name: SCHEMA_NAME.to_owned(),
                version: SCHEMA_VERSION,
            },
            source: Source::of(file, input),
            notes: input.notes.clone(),
            balance,
            time,
            structure,
            cache,
            unanswered,
            verdict,
            cost: Vec::new(),
        }
    }
}

impl Source {
    fn of(file: &str, input: &Input) -> Self {
        let context = &input.context;
        let most = |of: fn(&crate::profile::LayerProfile) -> u64| {
            context.layers.iter().map(of).max().unwrap_or(0)
        };
        let layers = &input.layers;
        Self {
            file: file.to_owned(),
            kind: input.kind,
            context: context.id,
            model: input.model.path.clone(),
            arch: input.model.arch.clone(),
            layers: layers.len(),
            n_expert: layers.iter().map(|layer| layer.n_expert).max().unwrap_or(0),
            k: layers.iter().map(|layer| layer.k).max().unwrap_or(0),
            prefill_tokens: most(|layer| layer.prefill_tokens),
            decode_tokens: most(|layer| layer.decode_tokens),
            activations: context.layers.iter().map(|layer| layer.activations()).sum(),
            gaps: input.routing.as_ref().map_or(0, routing::Routing::gaps),
        }
    }
}

/// Bytes of every expert of every layer, where those of all layers are known.
fn sizes(layers: &[Layer]) -> Option<Vec<u64>> {
    let mut sizes = Vec::new();
    for layer in layers {
        let of_layer = vec![layer.expert_bytes?; layer.n_expert as usize];
        sizes.extend(of_layer);
    }
    Some(sizes)
}

fn without_sizes(layers: &[Layer]) -> String {
    let unknown: Vec<u16> = layers
        .iter()
        .filter(|layer| layer.expert_bytes.is_none())
        .map(|layer| layer.id)
        .collect();
    format!(
        "how many bytes an expert takes is not known of layers {}: name the model's file (--model)",
        crate::formats::listed(&unknown)
    )
}

/// Decode activations by expert of all layers.
fn decode_counts(input: &Input) -> Vec<u64> {
    let mut counts = Vec::new();
    for layer in &input.context.layers {
        let first = counts.len();
        counts.resize(first + layer.width(), 0);
        for expert in &layer.experts {
            counts[first + expert.expert_id as usize] = expert.decode;
        }
    }
    counts
}
