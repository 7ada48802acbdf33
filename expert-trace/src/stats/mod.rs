//! The document of a capture: what `-o` writes, and what the summary on the terminal reads.
//!
//! `layers` has exactly the shape of the original specification's statistics; all that we know
//! beyond it stands beside. docs/json-schema.md explains every key.

pub mod cost;
mod integrity;
pub mod unseen;

use std::collections::BTreeSet;

use expert_trace_common::Route;
use serde::Serialize;
use serde_json::Value;

use crate::{
    eval_callback::EvalCallback,
    gguf::ModelShape,
    layout::Layout,
    model::{
        CloseCall, Context, Coverage, Ends, Excluded, Exclusion, Layer, PhasePasses, SecondBlock,
    },
    placement::Options,
    probes::Probe,
    routes,
    tally::{ExpertStats, SpecifiedLayer, expert_stats, never_activated},
    visibility::{Evidence, Gap, Reason},
};

pub use self::integrity::{Dropped, Flow, Hits, Integrity, Logits, Routes, UnknownRows};

impl Stats {
    /// The same, with the reason why routing was not seen, where that was so, and what to change.
    /// `options` gives those of a process.
    pub fn explained(mut self, options: &dyn Fn(u32) -> Options) -> Self {
        let why = Evidence::of(&self);
        let models = &self.models;
        let of_model = |index: Option<usize>, options: &Options| {
            let model = index.map(|index| &models[index]);
            let role = options.role_of(model.map(|model| &*model.path));
            (model.map(|model| &model.shape), role)
        };
        for context in &mut self.contexts {
            let options = options(context.pid);
            let (shape, role) = of_model(context.model, &options);
            let unread = context.passes_not_known > 0;
            context.gaps = why.explain(&mut context.layers, unread, shape, &options, role);
        }
        for context in &mut self.not_visible {
            let options = options(context.pid);
            let (shape, role) = of_model(context.model, &options);
            let unread = context.passes_not_known > 0;
            context.gaps = match shape {
                Some(_) => why.explain(&mut context.layers, unread, shape, &options, role),
                None => vec![why.explain_unknown(context.by_phase, &options)],
            };
        }
        self
    }

    /// The document as JSON without what follows from a trace: the counts of experts.
    pub fn without_counts(&self) -> String {
        // A structure that is written to files as it is becomes JSON.
        let mut document = serde_json::to_value(self).unwrap_or_default();
        if let Some(document) = document.as_object_mut() {
            document.remove("layers");
        }
        let contexts = document["contexts"].as_array_mut();
        let layers = contexts
            .into_iter()
            .flatten()
            .filter_map(|context| context["layers"].as_array_mut());
        for layer in layers.flatten().filter_map(Value::as_object_mut) {
            layer.retain(|key, _| !OF_EXPERTS.contains(&key.as_str()));
            if let Some(second) = layer.get_mut("second_block").and_then(Value::as_object_mut) {
                second.retain(|key, _| !OF_EXPERTS.contains(&key.as_str()));
            }
        }
        document.to_string()
    }

    /// Why routing was not seen, of the context of which least was seen.
    pub fn worst_gap(&self) -> Option<&Gap> {
        let unseen = self.not_visible.iter().flat_map(|context| &context.gaps);
        unseen
            .chain(self.contexts.iter().flat_map(|context| &context.gaps))
            .next()
    }
}

/// Members of a layer, or of its second block, that grow with the number of its experts, or of its rows.
const OF_EXPERTS: [&str; 3] = ["experts", "experts_never_activated", "close_calls"];

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
    /// Passes that are in no count.
    pub excluded: Vec<ExcludedPasses>,
    /// The full trace, if one was recorded.
    pub trace: Option<Trace>,
    /// Proof that nothing was lost, or what was.
    pub integrity: Integrity,
    /// What it has cost.
    pub cost: cost::Cost,
}

/// A full trace that was recorded beside the document.
#[derive(Clone, Debug, Serialize)]
pub struct Trace {
    /// Its files, in order.
    pub files: Vec<String>,
    /// Routed rows in them.
    pub rows: u64,
    /// Gaps in them.
    pub gaps: u64,
    /// Whether they have token ids.
    pub tokens: bool,
    /// Routed rows in them whose weights could not be read; `None` where none were asked for.
    pub rows_without_weights: Option<u64>,
}

/// Name and version of the document's format.
#[derive(Debug, Serialize)]
pub struct Schema {
    /// [`stats_schema::NAME`](crate::stats_schema::NAME).
    pub name: &'static str,
    /// [`stats_schema::VERSION`](crate::stats_schema::VERSION).
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
#[derive(Clone, Debug, Serialize)]
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
    /// Why it ended: `target_exited`, `duration`, `interrupted`, `stopped`; `running`: it has not.
    pub ended: &'static str,
    /// When counting began anew: RFC 3339, UTC; `null` when it began with the capture.
    pub counted_since: Option<String>,
    /// Whether warm-up passes are counted.
    pub include_warmup: bool,
    /// What keeps the probes in their places: `uprobe_multi`, `perf_event`.
    pub attached_by: &'static str,
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

/// Counts of one context.
#[derive(Debug, Serialize)]
pub struct ContextStats {
    /// Its index.
    pub id: usize,
    /// Its number in a trace: the order in which contexts were first seen.
    pub trace_context: usize,
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
    /// Why layers were not seen, or not always, and what to change.
    pub gaps: Vec<Gap>,
    /// Counts by layer; also of layers that were not seen, by the model file.
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
    /// Index in `models`; `null` when its process has several, or none.
    pub model: Option<usize>,
    /// Why nothing was seen, and what to change; empty when its model is dense.
    pub gaps: Vec<Gap>,
    /// Its layers, by the model file.
    pub layers: Vec<LayerStats>,
    /// Passes that computed tokens.
    #[serde(skip)]
    pub by_phase: PhasePasses,
}

/// Where a number of a layer comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// What was read of the target shows it.
    Target,
    /// The model file says it.
    ModelFile,
}

/// Counts of one layer of one context.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerStats {
    /// Layer of the model.
    pub layer_id: u16,
    /// Whether its routing was seen in every pass.
    pub coverage: Coverage,
    /// Why not; `null` where it was. The context's `gaps` have it in words.
    pub reason: Option<Reason>,
    /// Experts to choose from; `null` when neither the tensors nor the model file show it.
    pub n_expert: Option<u32>,
    /// Where that comes from.
    pub n_expert_source: Option<Source>,
    /// Experts chosen per token (the largest seen); `null` when nothing shows it.
    pub k: Option<u32>,
    /// Where that comes from.
    pub k_source: Option<Source>,
    /// Passes in which it was seen.
    pub passes: u64,
    /// Passes in which it had something to do, and was not seen.
    pub passes_not_seen: PhasePasses,
    /// Where its routing was read: see [`routes::name`](crate::routes::name).
    pub routes: Vec<&'static str>,
    /// Rows in which the choice was made from logits, and the target, rounding in its own way, may have
    /// chosen otherwise.
    pub close_calls: Vec<CloseCall>,
    /// Experts without activation in what was seen, ascending; `null` when the layer was not seen, or
    /// the number of its experts is not known.
    pub experts_never_activated: Option<Vec<u32>>,
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
    /// Counts of the layer's second block of experts (GroveMoE), which are in no other; `null` when none
    /// was seen.
    pub second_block: Option<SecondBlockStats>,
}

/// Counts of the second block of experts that one layer of one context has.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SecondBlockStats {
    /// Its experts; `null` when no model file shows it.
    pub n_expert: Option<u32>,
    /// Experts activated per token, one that is activated twice counted twice (the largest seen).
    pub k: u16,
    /// Whether it was seen in every pass.
    pub coverage: Coverage,
    /// Passes in which it was seen.
    pub passes: u64,
    /// Experts never activated, ascending; `null` when their number is not known.
    pub experts_never_activated: Option<Vec<u32>>,
    /// Tokens routed.
    pub total_tokens: u64,
    /// Those of prompts.
    pub prefill_tokens: u64,
    /// Those generated.
    pub decode_tokens: u64,
    /// (token, expert) pairs; the same pair can be there several times.
    pub activations: u64,
    /// Activated experts, most activations first.
    pub experts: Vec<ExpertStats>,
}

impl LayerStats {
    /// One of which nothing is known.
    pub fn unseen(layer_id: u16) -> Self {
        Self {
            layer_id,
            coverage: Coverage::NotVisible,
            reason: None,
            n_expert: None,
            n_expert_source: None,
            k: None,
            k_source: None,
            passes: 0,
            passes_not_seen: PhasePasses::default(),
            routes: Vec::new(),
            close_calls: Vec::new(),
            experts_never_activated: None,
            total_tokens: 0,
            prefill_tokens: 0,
            decode_tokens: 0,
            activations: 0,
            experts: Vec::new(),
            second_block: None,
        }
    }
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
    let ends = shape.map_or_else(Ends::default, ends);
    let layers = layers(context, shape, ends);
    ContextStats {
        id,
        trace_context: context.number,
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
        layers_not_visible: shape.map(|_| not_visible(&layers)),
        gaps: Vec::new(),
        layers,
    }
}

/// A context of which nothing was seen, with the model it runs where that is certain ([`unseen::model`]).
pub fn unseen_context(
    context: &Context,
    passes_not_known: u64,
    models: &[ModelFile],
    model: Option<usize>,
    pid: u32,
) -> NotVisible {
    let shape = model.map(|index| &models[index].shape);
    let ends = shape.map_or_else(Ends::default, ends);
    NotVisible {
        pid,
        count: context.not_visible(Ends::default()),
        passes_not_known,
        model,
        gaps: Vec::new(),
        layers: layers(context, shape, ends),
        by_phase: context.unseen_by_phase.all(),
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

/// Layers that were seen, and those that have run without being seen: all with experts, but NextN blocks,
/// which run when llama.cpp is asked to speculate with them, in a context of their own, where no other
/// layer does.
fn layers(context: &Context, shape: Option<&ModelShape>, ends: Ends) -> Vec<LayerStats> {
    let mut ids: BTreeSet<u16> = context.layers.numbers().collect();
    if let Some(shape) = shape {
        let main = shape.main_layers();
        let is_main = |id: &u32| *id < main;
        let runs_main = ids.first().is_none_or(|first| is_main(&u32::from(*first)));
        let expected = shape
            .moe_layers
            .iter()
            .filter(|id| runs_main && is_main(id));
        ids.extend(expected.filter_map(|id| u16::try_from(*id).ok()));
    }
    let layers = ids.into_iter().map(|id| {
        let seen = context.layers.get(id);
        let stats = seen.map_or_else(|| LayerStats::unseen(id), |layer| layer_stats(id, layer));
        LayerStats {
            coverage: context.coverage(id, ends),
            passes_not_seen: context.passes_not_seen(id, ends),
            ..stats.with_model(shape)
        }
        .with_second_coverage()
    });
    layers.collect()
}

fn not_visible(layers: &[LayerStats]) -> Vec<u32> {
    let layers = layers.iter();
    layers
        .filter(|layer| layer.coverage == Coverage::NotVisible)
        .map(|layer| u32::from(layer.layer_id))
        .collect()
}

/// The layers of a context that were counted, in the shape of the original specification.
pub fn specified_layers(context: &Context) -> Vec<SpecifiedLayer> {
    let layers = context.layers.iter();
    layers
        .filter(|(_, layer)| layer.passes.sum() > 0)
        .map(|(layer_id, layer)| SpecifiedLayer::of(layer_id, &layer.tally))
        .collect()
}

fn layer_stats(layer_id: u16, layer: &Layer) -> LayerStats {
    let n_expert = (layer.n_expert > 0).then_some(layer.n_expert);
    // A choice from logits is as wide as the model file says.
    let chosen = layer.routes.iter().all(|route| route == Route::Logits);
    let [prefill_tokens, decode_tokens] = layer.tally.tokens;
    LayerStats {
        layer_id,
        coverage: Coverage::Observed,
        reason: None,
        n_expert,
        n_expert_source: n_expert.map(|_| Source::Target),
        k: Some(layer.tally.k.into()),
        k_source: Some(match chosen {
            true => Source::ModelFile,
            false => Source::Target,
        }),
        passes: layer.passes.sum(),
        passes_not_seen: PhasePasses::default(),
        close_calls: layer.close_calls.clone(),
        routes: layer.routes.iter().map(routes::name).collect(),
        experts_never_activated: None,
        total_tokens: layer.tally.total_tokens(),
        prefill_tokens,
        decode_tokens,
        activations: layer.tally.activations(),
        experts: expert_stats(&layer.tally),
        second_block: layer.second_block.as_ref().map(second_block_stats),
    }
}

/// The same of a second block; what it shares with its layer is added there.
fn second_block_stats(SecondBlock { passes, tally }: &SecondBlock) -> SecondBlockStats {
    let [prefill_tokens, decode_tokens] = tally.tokens;
    SecondBlockStats {
        n_expert: None,
        k: tally.k,
        coverage: Coverage::Observed,
        passes: *passes,
        experts_never_activated: None,
        total_tokens: tally.total_tokens(),
        prefill_tokens,
        decode_tokens,
        activations: tally.activations(),
        experts: expert_stats(tally),
    }
}

impl LayerStats {
    /// The second block is seen at most as its layer is.
    fn with_second_coverage(mut self) -> Self {
        if let Some(second) = &mut self.second_block {
            second.coverage = match second.passes < self.passes {
                true => Coverage::PartlyObserved,
                false => self.coverage,
            };
        }
        self
    }

    /// What the target did not show, as the model file says it.
    fn with_model(mut self, shape: Option<&ModelShape>) -> Self {
        if let (None, Some(shape)) = (self.n_expert, shape) {
            self.n_expert = Some(shape.n_expert);
            self.n_expert_source = Some(Source::ModelFile);
        }
        if let (None, Some(shape)) = (self.k, shape) {
            self.k = Some(shape.n_expert_used.of(self.layer_id.into()));
            self.k_source = Some(Source::ModelFile);
        }
        if self.passes > 0 {
            self.experts_never_activated = self
                .n_expert
                .map(|n_expert| never_activated(n_expert, &self.experts));
        }
        if let Some(second) = &mut self.second_block {
            second.n_expert = shape.and_then(|shape| shape.second_block_experts);
            second.experts_never_activated = second
                .n_expert
                .map(|n_expert| never_activated(n_expert, &second.experts));
        }
        self
    }
}

/// Models of its process whose layers and number of experts fit what the context did.
pub fn fitting_models(context: &Context, models: &[ModelFile], of_process: &[usize]) -> Vec<usize> {
    let fits = |model: &ModelFile| {
        context.layers.iter().all(|(id, layer)| {
            model.shape.moe_layers.contains(&u32::from(id))
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
            shape.second_block_experts,
        )
    };
    shapes
        .all(|other| layers(other) == layers(first))
        .then_some(first)
}
