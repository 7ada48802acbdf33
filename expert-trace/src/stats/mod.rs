//! The document of a capture: what `-o` writes, and what the summary on the terminal reads.
//!
//! `layers` has exactly the shape of the original specification's statistics; all that we know
//! beyond it stands beside. docs/json-schema.md explains every key.

mod integrity;

use std::collections::BTreeSet;

use serde::Serialize;

use crate::{
    eval_callback::EvalCallback,
    gguf::ModelShape,
    layout::Layout,
    model::{CloseCall, Context, Coverage, Ends, Excluded, Exclusion, Layer},
    probes::Probe,
    routes, visibility,
};

pub use self::integrity::{Dropped, Flow, Hits, Integrity, Logits, Routes, UnknownRows};

impl Stats {
    /// The same, with the reason why routing was not seen, where that was so.
    pub fn explained(mut self) -> Self {
        let unseen = |context: &ContextStats| {
            context.passes_not_visible.passes > 0
                || context.passes_not_known > 0
                || context
                    .layers_not_visible
                    .as_ref()
                    .is_some_and(|layers| !layers.is_empty())
                || context
                    .layers
                    .iter()
                    .any(|layer| layer.coverage != Coverage::Observed)
        };
        if self.contexts.iter().any(unseen) || !self.not_visible.is_empty() {
            self.why_not_visible = Some(visibility::explain(&self));
        }
        self
    }
}

/// Name of the document's schema.
pub const SCHEMA_NAME: &str = "expert-trace-stats";
/// Its version: raised when a key changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

/// The whole document.
#[derive(Debug, Serialize)]
pub struct Stats {
    /// What this is.
    pub schema: Schema,
    /// Who wrote it.
    pub tool: Tool,
    /// What was traced.
    pub target: Target,
    /// The models it maps.
    pub models: Vec<ModelFile>,
    /// When, and how it ended.
    pub capture: Capture,
    /// Processes that have computed something.
    pub processes: Vec<Process>,
    /// Index in `contexts` of the one that `layers` shows; `null` when none routed anything.
    pub layers_context: Option<usize>,
    /// Counts of one context, as the original specification has them.
    pub layers: Vec<SpecifiedLayer>,
    /// Counts of every context of which a pass is counted. They are never summed.
    pub contexts: Vec<ContextStats>,
    /// Contexts that computed tokens, and of which no routing was seen at all.
    pub not_visible: Vec<NotVisible>,
    /// Why routing was not seen, and what to change; `null` when all was.
    pub why_not_visible: Option<visibility::NotVisible>,
    /// Passes that are in no count.
    pub excluded: Vec<ExcludedPasses>,
    /// Proof that nothing was lost, or what was.
    pub integrity: Integrity,
}

/// Name and version of the document's format.
#[derive(Debug, Serialize)]
pub struct Schema {
    /// [`SCHEMA_NAME`].
    pub name: &'static str,
    /// [`SCHEMA_VERSION`].
    pub version: u32,
}

/// Program that wrote the document.
#[derive(Debug, Serialize)]
pub struct Tool {
    /// Its name.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
}

/// A process.
#[derive(Debug, Serialize)]
pub struct Process {
    /// Process id, in our PID namespace.
    pub pid: u32,
    /// Its executable.
    pub exe: Option<String>,
    /// Build id of the executable.
    pub build_id: Option<String>,
    /// Command line, redacted.
    pub command: Vec<String>,
}

/// What was started or attached to.
#[derive(Debug, Serialize)]
pub struct Target {
    /// Its first process.
    #[serde(flatten)]
    pub process: Process,
    /// Probes that were set.
    pub hooks: Vec<HookStats>,
    /// Layouts of each library that defines the function with expert ids.
    pub tensor_layouts: Vec<Layout>,
    /// Eval callbacks that its processes have set.
    pub eval_callbacks: Vec<EvalCallback>,
}

/// A probe that was set.
#[derive(Debug, Serialize)]
pub struct HookStats {
    /// Where.
    #[serde(flatten)]
    pub probe: Probe,
    /// How often it was hit while tracing was on. A function whose symbol is there need never run:
    /// compilers copy its code into its callers.
    pub hits: u64,
}

/// A model file, all shards of it.
#[derive(Debug, Serialize)]
pub struct ModelFile {
    /// First shard, as the target sees it.
    pub path: String,
    /// How it was found: `mapped` by the process, or named on the `command_line` or in the
    /// `environment`.
    pub found: &'static str,
    /// What its header says.
    #[serde(flatten)]
    pub shape: ModelShape,
}

/// Time and manner of a capture.
#[derive(Debug, Serialize)]
pub struct Capture {
    /// `run` or `attach`.
    pub mode: &'static str,
    /// When the probes were switched on: RFC 3339, UTC.
    pub started: String,
    /// How long they were on, in seconds.
    pub duration_s: f64,
    /// Why it ended: `target_exited`, `duration`, `interrupted`.
    pub ended: &'static str,
    /// Whether warm-up passes are counted.
    pub include_warmup: bool,
    /// Ways in which routing was to be read.
    pub routes: Vec<&'static str>,
    /// Libraries that a process we attached to has loaded since.
    pub late_libraries: Vec<LateLibraries>,
}

/// Libraries that were probed some time after they were loaded.
#[derive(Debug, Serialize)]
pub struct LateLibraries {
    /// The files.
    pub files: Vec<String>,
    /// How long they were not probed, in milliseconds.
    pub blind_ms: f64,
    /// Passes that began in this time; `null` when passes could not be seen yet.
    pub passes: Option<u64>,
}

/// A layer as the original specification has it.
#[derive(Debug, Serialize)]
pub struct SpecifiedLayer {
    /// Layer of the model.
    pub layer_id: u16,
    /// Tokens routed in the layer.
    pub total_tokens: u64,
    /// Activated experts, most activations first.
    pub experts: Vec<SpecifiedExpert>,
}

/// An expert as the original specification has it.
#[derive(Debug, Serialize)]
pub struct SpecifiedExpert {
    /// Expert.
    pub expert_id: usize,
    /// Tokens it was chosen for.
    pub activations: u64,
    /// 100 × activations / tokens of the layer: sums to 100 × k over a layer.
    pub percentage: f64,
}

/// Counts of one context.
#[derive(Debug, Serialize)]
pub struct ContextStats {
    /// Its index.
    pub id: usize,
    /// Its process.
    pub pid: u32,
    /// Index in `models`; `null` when more than one fits, or none.
    pub model: Option<usize>,
    /// Passes counted.
    pub passes: u64,
    /// `scheduler`, or `layer_order` where no scheduler was seen.
    pub pass_source: &'static str,
    /// How prefill and decode were told apart: by the `ubatch`, or by the number of `rows`; `mixed`.
    pub phase_source: &'static str,
    /// Passes left out.
    pub excluded: Vec<ExcludedPasses>,
    /// Passes that computed tokens, and of which no routing was seen: it stayed on a device.
    pub passes_not_visible: Excluded,
    /// Passes of which neither the routing nor the ubatch was seen: whether they computed tokens is not
    /// known. 0 where ubatches are read.
    pub passes_not_known: u64,
    /// Layers with experts, by the model file, of which no routing was seen in any pass; `null` when no
    /// model fits, or several that differ in their layers. NextN blocks
    /// that did not run are not among them.
    pub layers_not_visible: Option<Vec<u32>>,
    /// Counts by layer.
    pub layers: Vec<LayerStats>,
}

/// A context of which nothing was seen: its model is dense, or its routing stayed on a device.
#[derive(Debug, Serialize)]
pub struct NotVisible {
    /// Its process.
    pub pid: u32,
    /// Its passes that computed tokens, and those.
    #[serde(flatten)]
    pub count: Excluded,
    /// Its passes of which it is not known whether they did.
    pub passes_not_known: u64,
}

/// Counts of one layer of one context.
#[derive(Debug, Serialize)]
pub struct LayerStats {
    /// Layer of the model.
    pub layer_id: u16,
    /// Experts to choose from; `null` when neither the tensors nor the model file show it.
    pub n_expert: Option<u32>,
    /// Experts chosen per token (the largest seen).
    pub k: u16,
    /// Whether its routing was seen in every pass.
    pub coverage: Coverage,
    /// Passes in which it was seen.
    pub passes: u64,
    /// Where its routing was read: see [`routes::name`](crate::routes::name).
    pub routes: Vec<&'static str>,
    /// Rows in which the choice was made from logits, and the target, rounding in its own way, may have
    /// chosen otherwise.
    pub close_calls: Vec<CloseCall>,
    /// Experts never chosen; `null` when their number is not known.
    pub experts_never_chosen: Option<u64>,
    /// Tokens routed.
    pub total_tokens: u64,
    /// Those of prompts.
    pub prefill_tokens: u64,
    /// Those generated.
    pub decode_tokens: u64,
    /// (token, expert) pairs.
    pub activations: u64,
    /// Activated experts, most activations first.
    pub experts: Vec<ExpertStats>,
}

/// Counts of one expert.
#[derive(Debug, Serialize)]
pub struct ExpertStats {
    /// Expert.
    pub expert_id: usize,
    /// Tokens it was chosen for.
    pub activations: u64,
    /// Those of prompts.
    pub prefill: u64,
    /// Those generated.
    pub decode: u64,
    /// 100 × activations / tokens of the layer.
    pub percentage: f64,
    /// Activations / activations of the layer: sums to 1 over a layer.
    pub share: f64,
}

/// Passes that are in no count.
#[derive(Debug, Serialize)]
pub struct ExcludedPasses {
    /// Why.
    pub kind: Exclusion,
    /// Passes and their tokens.
    #[serde(flatten)]
    pub count: Excluded,
}

/// Index of the context that routed most tokens; of equals the first.
pub fn main_context(contexts: &[&Context]) -> Option<usize> {
    (0..contexts.len())
        .rev()
        .max_by_key(|index| contexts[*index].tokens())
}

/// The excluded passes as a list.
pub fn excluded_list<'a>(
    excluded: impl IntoIterator<Item = (&'a Exclusion, &'a Excluded)>,
) -> Vec<ExcludedPasses> {
    excluded
        .into_iter()
        .map(|(kind, count)| ExcludedPasses {
            kind: *kind,
            count: *count,
        })
        .collect()
}

/// Counts of a context, with the model it runs where that is known.
///
/// `of_process` are the indices of those that its process has.
pub fn context_stats(
    id: usize,
    context: &Context,
    models: &[ModelFile],
    of_process: &[usize],
    pid: u32,
) -> ContextStats {
    let fitting = fitting_models(context, models, of_process);
    let model = match fitting.as_slice() {
        [only] => Some(*only),
        _ => None,
    };
    let shape = common_shape(fitting.iter().map(|index| &models[*index].shape));
    let n_expert = shape.map(|shape| shape.n_expert);
    let ends = shape.map_or_else(Ends::default, ends);
    ContextStats {
        id,
        pid,
        model,
        passes: context.passes,
        pass_source: if context.layer_order {
            "layer_order"
        } else {
            "scheduler"
        },
        phase_source: match context.passes_with_ubatch {
            0 => "rows",
            passes if passes == context.passes => "ubatch",
            _ => "mixed",
        },
        excluded: excluded_list(&context.excluded),
        passes_not_visible: context.not_visible(ends),
        passes_not_known: context.passes_not_known(),
        layers_not_visible: shape.map(|shape| layers_not_visible(context, shape)),
        layers: context
            .layers
            .iter()
            .map(|(layer_id, layer)| LayerStats {
                coverage: context.coverage(*layer_id, ends),
                ..layer_stats(*layer_id, layer, n_expert)
            })
            .collect(),
    }
}

/// Layers of the model that do not work on all rows of all passes.
fn ends(shape: &ModelShape) -> Ends {
    let last = shape.main_layers().checked_sub(1);
    let last = last.filter(|last| shape.moe_layers.contains(last));
    Ends {
        known: true,
        last: last.and_then(|last| u16::try_from(last).ok()),
        nextn: shape.first_nextn(),
    }
}

/// Layers with experts that have run, and of which no routing was seen. NextN blocks run when llama.cpp
/// is asked to speculate with them, in a context of their own, where no other layer does.
fn layers_not_visible(context: &Context, shape: &ModelShape) -> Vec<u32> {
    let seen: BTreeSet<u32> = context.layers.keys().map(|id| u32::from(*id)).collect();
    let main = shape.main_layers();
    if seen.first().is_some_and(|first| *first >= main) {
        return Vec::new();
    }
    let expected = shape.moe_layers.iter().copied();
    expected
        .filter(|id| *id < main && !seen.contains(id))
        .collect()
}

/// The layers of a context in the shape of the original specification.
pub fn specified_layers(context: &Context) -> Vec<SpecifiedLayer> {
    context
        .layers
        .iter()
        .map(|(layer_id, layer)| {
            let stats = layer_stats(*layer_id, layer, None);
            SpecifiedLayer {
                layer_id: *layer_id,
                total_tokens: stats.total_tokens,
                experts: stats
                    .experts
                    .into_iter()
                    .map(|expert| SpecifiedExpert {
                        expert_id: expert.expert_id,
                        activations: expert.activations,
                        percentage: expert.percentage,
                    })
                    .collect(),
            }
        })
        .collect()
}

fn layer_stats(layer_id: u16, layer: &Layer, model_experts: Option<u32>) -> LayerStats {
    let total_tokens = layer.total_tokens();
    let activations = layer.activations();
    let mut experts: Vec<ExpertStats> = layer
        .experts
        .iter()
        .enumerate()
        .map(|(expert_id, [prefill, decode])| ExpertStats {
            expert_id,
            activations: prefill + decode,
            prefill: *prefill,
            decode: *decode,
            percentage: 100.0 * (prefill + decode) as f64 / total_tokens as f64,
            share: (prefill + decode) as f64 / activations as f64,
        })
        .filter(|expert| expert.activations > 0)
        .collect();
    experts.sort_by_key(|expert| (std::cmp::Reverse(expert.activations), expert.expert_id));
    let seen = (layer.n_expert > 0).then_some(layer.n_expert);
    let n_expert = seen.or(model_experts);
    LayerStats {
        layer_id,
        n_expert,
        k: layer.k,
        coverage: Coverage::Observed,
        passes: layer.passes,
        close_calls: layer.close_calls.clone(),
        routes: layer.routes.iter().copied().map(routes::name).collect(),
        experts_never_chosen: n_expert
            .map(|n_expert| u64::from(n_expert).saturating_sub(experts.len() as u64)),
        total_tokens,
        prefill_tokens: layer.tokens[0],
        decode_tokens: layer.tokens[1],
        activations,
        experts,
    }
}

/// Models of its process whose layers and number of experts fit what the context did.
fn fitting_models(context: &Context, models: &[ModelFile], of_process: &[usize]) -> Vec<usize> {
    let fits = |model: &ModelFile| {
        context.layers.iter().all(|(id, layer)| {
            model.shape.moe_layers.contains(&u32::from(*id))
                && (layer.n_expert == 0 || layer.n_expert == model.shape.n_expert)
        })
    };
    let of_process = of_process.iter().copied();
    of_process.filter(|index| fits(&models[*index])).collect()
}

/// The shape of models that do not differ in what layers they have.
fn common_shape<'a>(mut shapes: impl Iterator<Item = &'a ModelShape>) -> Option<&'a ModelShape> {
    let first = shapes.next()?;
    let layers = |shape: &'a ModelShape| {
        (
            &shape.moe_layers,
            shape.main_layers(),
            shape.nextn_predict_layers,
            shape.n_expert,
        )
    };
    shapes
        .all(|other| layers(other) == layers(first))
        .then_some(first)
}
