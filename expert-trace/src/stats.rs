//! The document of a capture: what `-o` writes, and what the summary on the terminal reads.
//!
//! `layers` has exactly the shape of the original specification's statistics; all that we know
//! beyond it stands beside. docs/json-schema.md explains every key.

use expert_trace_common::{Counter, Route};
use serde::Serialize;

use crate::{
    attach::Counters,
    gguf::ModelShape,
    model::{CloseCall, Context, Coverage, Excluded, Exclusion, FromLogits, Layer, Received},
    probes::Probe,
};

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
    pub hooks: Vec<Probe>,
    /// Layout of `ggml_tensor` in each library that showed expert ids, by the builds that have it;
    /// `null` when no hit has shown it.
    pub tensor_layouts: Vec<Option<&'static str>>,
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
    /// Layers with experts, by the model file, of which no routing was seen in any pass.
    pub layers_not_visible: Vec<u32>,
    /// Counts by layer.
    pub layers: Vec<LayerStats>,
}

/// A context of which nothing was seen: its model is dense, or its routing stayed on a device.
#[derive(Debug, Serialize)]
pub struct NotVisible {
    /// Its process.
    pub pid: u32,
    /// Its passes, and their tokens.
    #[serde(flatten)]
    pub count: Excluded,
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
    /// Where its routing was read: see [`route_name`].
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

/// Name of a route in the document.
pub fn route_name(route: Route) -> &'static str {
    match route {
        Route::Router => "router",
        Route::SplitInput => "split_input",
        Route::Fetch => "fetch",
        Route::DeviceCopy => "device_copy",
        Route::Logits => "logits",
    }
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

/// The kernel's counters, what arrived of it, and whether the sums are right.
#[derive(Debug, Serialize)]
pub struct Integrity {
    /// Whether all that was seen is counted: the sums are right and nothing was lost.
    pub complete: bool,
    /// What is wrong, if anything, in words.
    pub problems: Vec<String>,
    /// Entries of `ggml_compute_forward_get_rows`.
    pub hits: Hits,
    /// What the other ways to read routing have shown.
    pub routes: Routes,
    /// Choices made from router logits.
    pub logits: Logits,
    /// Records: `seen = emitted + dropped`.
    pub events: Flow,
    /// Rows: `seen = emitted + dropped`.
    pub rows: Flow,
    /// Entries for expert ids of which not even the number of rows is known.
    pub unknown_rows: UnknownRows,
    /// What the program read from the ring buffer.
    pub received: Received,
    /// Size of the ring buffer, in bytes.
    pub ring_buffer_bytes: u32,
}

/// Entries of `ggml_compute_forward_get_rows`, by what became of them.
#[derive(Debug, Serialize)]
pub struct Hits {
    /// All.
    pub entered: u64,
    /// On another thread than the first of its pool.
    pub filtered_thread: u64,
    /// For another tensor.
    pub filtered_tensor: u64,
    /// For the embedding lookup.
    pub token_lookup: u64,
    /// Parameters or tensors could not be read.
    pub unreadable: u64,
    /// Before the layout was known, and for no tensor that would have shown it.
    pub layout_unknown: u64,
    /// For expert ids.
    pub routed: u64,
    /// Passes begun by a scheduler, of all graphs.
    pub passes: u64,
    /// Passes whose ubatch was to be read and could not be.
    pub ubatch_unreadable: u64,
    /// Times a kernel map was full.
    pub state_lost: u64,
}

/// What was seen where a router does not run on the CPU, or not all of it.
#[derive(Debug, Serialize)]
pub struct Routes {
    /// Entries of `ggml_graph_compute`: the CPU's parts of graphs.
    pub splits: u64,
    /// Those of them with expert ids among their inputs.
    pub split_inputs: u64,
    /// Those of them that computed router logits which were read.
    pub split_logits: u64,
    /// Copies of expert ids to the host that a device was asked for.
    pub ids_copies: u64,
    /// Those of them that were read, for the scheduler.
    pub fetches: u64,
    /// Those of them that were read, for the device.
    pub device_copies: u64,
    /// Those of them whose arrival was not seen.
    pub copies_lost: u64,
    /// Ids that were seen again in the same pass, for another weight of the layer.
    pub repeated: u64,
}

/// Choices made from router logits.
#[derive(Debug, Serialize)]
pub struct Logits {
    /// Rows for which the choice was made.
    pub rows: u64,
    /// Rows for which it could not be made.
    pub refused: u64,
    /// Time in which the host computed logits, in milliseconds; the device had to wait for it.
    pub host_ms: f64,
}

/// A balance.
#[derive(Debug, Serialize)]
pub struct Flow {
    /// What was there.
    pub seen: u64,
    /// What was given to the ring buffer.
    pub emitted: u64,
    /// What was not, by reason.
    pub dropped: Dropped,
}

/// Losses by reason.
#[derive(Debug, Serialize)]
pub struct Dropped {
    /// The ring buffer was full.
    pub ring_full: u64,
    /// The target's memory could not be read.
    pub unreadable: u64,
}

/// Entries for expert ids of which not even the number of rows is known.
#[derive(Debug, Serialize)]
pub struct UnknownRows {
    /// The tensor made no sense.
    pub malformed: u64,
    /// The tensor could not be read.
    pub unreadable: u64,
}

impl Integrity {
    /// Draws up the balance.
    pub fn new(
        counters: &Counters,
        received: Received,
        from_logits: &FromLogits,
        ring_buffer_bytes: u32,
    ) -> Self {
        let get = |counter| counters.get(counter);
        let mut integrity = Self {
            complete: true,
            problems: Vec::new(),
            hits: Hits {
                entered: get(Counter::Entered),
                filtered_thread: get(Counter::FilteredThread),
                filtered_tensor: get(Counter::FilteredTensor),
                token_lookup: get(Counter::TokenLookup),
                unreadable: get(Counter::HitUnreadable),
                layout_unknown: get(Counter::LayoutUnknown),
                routed: get(Counter::Routed),
                passes: get(Counter::Passes),
                ubatch_unreadable: get(Counter::UbatchUnreadable),
                state_lost: get(Counter::StateLost),
            },
            routes: Routes {
                splits: get(Counter::CpuSplits),
                split_inputs: get(Counter::SplitIds),
                split_logits: get(Counter::SplitLogits),
                ids_copies: get(Counter::IdsCopies),
                fetches: get(Counter::FetchedIds),
                device_copies: get(Counter::DeviceIds),
                copies_lost: get(Counter::IdsCopiesLost),
                repeated: get(Counter::RepeatedIds),
            },
            logits: Logits {
                rows: from_logits.rows,
                refused: 0,
                host_ms: get(Counter::SplitLogitsNs) as f64 / 1e6,
            },
            events: Flow {
                seen: get(Counter::EventsSeen),
                emitted: get(Counter::EventsEmitted),
                dropped: Dropped {
                    ring_full: get(Counter::EventsRingFull),
                    unreadable: get(Counter::EventsUnreadable),
                },
            },
            rows: Flow {
                seen: get(Counter::RowsSeen),
                emitted: get(Counter::RowsEmitted),
                dropped: Dropped {
                    ring_full: get(Counter::RowsRingFull),
                    unreadable: get(Counter::RowsUnreadable),
                },
            },
            unknown_rows: UnknownRows {
                malformed: get(Counter::RoutedMalformed),
                unreadable: get(Counter::RoutedUnreadable),
            },
            received,
            ring_buffer_bytes,
        };
        integrity.problems = integrity.find_problems();
        integrity.complete = integrity.problems.is_empty();
        integrity
    }

    /// Adds the rows of logits that told no experts: the last passes are judged when all has arrived.
    pub fn with_refusals(mut self, from_logits: &FromLogits) -> Self {
        self.logits.refused = from_logits.refused.values().sum();
        let problems = from_logits.refused.iter().map(|(refusal, rows)| {
            format!(
                "{rows} rows of router logits tell no experts: {}",
                refusal.text()
            )
        });
        self.with_problems(problems.collect())
    }

    /// Adds problems that the counters do not show.
    pub fn with_problems(mut self, problems: Vec<String>) -> Self {
        self.problems.extend(problems);
        self.complete = self.problems.is_empty();
        self
    }

    /// Counts the copies that are still awaited as lost: nobody is left who could have them.
    pub fn without_target(mut self) -> Self {
        let Routes {
            ids_copies,
            fetches,
            device_copies,
            copies_lost,
            ..
        } = self.routes;
        let awaited = ids_copies.saturating_sub(fetches + device_copies + copies_lost);
        if awaited > 0 {
            self.routes.copies_lost += awaited;
            self.problems.push(format!(
                "{awaited} copies of expert ids to the host were awaited when the target ended"
            ));
            self.complete = false;
        }
        self
    }

    /// Whether the sums are right: they are not while a probe is running.
    pub fn adds_up(&self) -> bool {
        self.imbalances().is_empty()
    }

    fn find_problems(&self) -> Vec<String> {
        let mut problems = self.imbalances();
        let Hits {
            entered,
            filtered_thread,
            token_lookup,
            unreadable,
            layout_unknown,
            routed,
            ..
        } = self.hits;
        let mut loss = |count: u64, text: &str| {
            if count > 0 {
                problems.push(format!("{count} {text}"));
            }
        };
        loss(
            self.rows.dropped.ring_full,
            "rows lost: ring buffer full (use a larger --buffer-size)",
        );
        loss(
            self.events.dropped.ring_full,
            "records lost: ring buffer full (use a larger --buffer-size)",
        );
        loss(
            self.rows.dropped.unreadable,
            "rows lost: ids could not be read",
        );
        loss(
            self.events.dropped.unreadable,
            "records lost: memory could not be read",
        );
        if routed == 0 && filtered_thread == entered {
            loss(
                entered,
                "hits, none of them on the first thread of its pool: ggml_compute_params has a \
                 layout that is not known (it is older than b3209, or changed)",
            );
        }
        if routed == 0 && token_lookup == 0 {
            loss(
                layout_unknown,
                "hits in a ggml whose tensors have a layout that is not known: nothing was read \
                 (it is older than b3209, or changed)",
            );
        }
        loss(unreadable, "hits whose tensors could not be read");
        loss(
            self.unknown_rows.malformed,
            "ids tensors that make no sense",
        );
        loss(
            self.unknown_rows.unreadable,
            "ids tensors that could not be read",
        );
        loss(
            self.received.rejected,
            "records with impossible contents, not counted",
        );
        loss(
            self.received.differing_rows,
            "rows that were read in two ways, and differ",
        );
        loss(
            self.routes.copies_lost,
            "copies of expert ids to the host whose arrival was not seen",
        );
        loss(
            self.hits.state_lost,
            "times a kernel map was full: passes may be mixed up",
        );
        problems
    }

    fn imbalances(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut balance = |what: &str, left: u64, right: u64| {
            if left != right {
                problems.push(format!("{what} do not add up: {left} is not {right}"));
            }
        };
        let Hits {
            entered,
            filtered_thread,
            filtered_tensor,
            token_lookup,
            unreadable,
            layout_unknown,
            routed,
            ..
        } = self.hits;
        let hits =
            filtered_thread + filtered_tensor + token_lookup + unreadable + layout_unknown + routed;
        balance("hits", entered, hits);
        balance("events", self.events.seen, self.events.total());
        balance("rows", self.rows.seen, self.rows.total());
        balance("events received", self.events.emitted, self.received.events);
        if self.received.rejected == 0 {
            balance("rows received", self.rows.emitted, self.received.rows);
        }
        problems
    }
}

impl Flow {
    /// Whether what was seen is what was emitted and what was dropped.
    pub fn balances(&self) -> bool {
        self.seen == self.total()
    }

    fn total(&self) -> u64 {
        self.emitted + self.dropped.ring_full + self.dropped.unreadable
    }
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
pub fn context_stats(id: usize, context: &Context, models: &[ModelFile], pid: u32) -> ContextStats {
    let model = matching_model(context, models);
    let n_expert = model.map(|model| models[model].shape.n_expert);
    let last = model.and_then(|model| last_layer(context, &models[model].shape));
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
        passes_not_visible: context.not_visible(last),
        layers_not_visible: model.map_or_else(Vec::new, |model| {
            let expected = models[model].shape.moe_layers.iter().copied();
            expected
                .filter(|id| context.layers.keys().all(|seen| u32::from(*seen) != *id))
                .collect()
        }),
        layers: context
            .layers
            .iter()
            .map(|(layer_id, layer)| LayerStats {
                coverage: context.coverage(*layer_id, last),
                ..layer_stats(*layer_id, layer, n_expert)
            })
            .collect(),
    }
}

/// The last layer of a model, if it has experts: it works on output rows alone. Blocks that predict
/// further tokens come after it, and need not run.
fn last_layer(context: &Context, shape: &ModelShape) -> Option<u16> {
    let main = shape.layers.saturating_sub(shape.nextn_predict_layers);
    let mut seen = context.layers.keys().map(|layer| u32::from(*layer));
    let last = if seen.any(|layer| layer >= main) {
        shape.layers.checked_sub(1)?
    } else {
        main.checked_sub(1)?
    };
    let has_experts = shape.moe_layers.contains(&last);
    has_experts.then(|| u16::try_from(last).ok())?
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
        routes: layer.routes.iter().copied().map(route_name).collect(),
        experts_never_chosen: n_expert
            .map(|n_expert| u64::from(n_expert).saturating_sub(experts.len() as u64)),
        total_tokens,
        prefill_tokens: layer.tokens[0],
        decode_tokens: layer.tokens[1],
        activations,
        experts,
    }
}

/// The one model whose layers and number of experts fit what the context did.
fn matching_model(context: &Context, models: &[ModelFile]) -> Option<usize> {
    let fits = |model: &ModelFile| {
        context.layers.iter().all(|(id, layer)| {
            model.shape.moe_layers.contains(&u32::from(*id))
                && (layer.n_expert == 0 || layer.n_expert == model.shape.n_expert)
        })
    };
    let mut fitting = models.iter().enumerate().filter(|(_, model)| fits(model));
    match (fitting.next(), fitting.next()) {
        (Some((index, _)), None) => Some(index),
        _ => None,
    }
}
