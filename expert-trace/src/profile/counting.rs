//! A trace, read once: its counts, and what else is to be known of it before it is written in another form.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read,
    path::Path,
};

use expert_trace_common::{MAX_EXPERTS, MAX_LAYERS, Phase};
use serde::Deserialize;
use serde_json::Value;

use super::{
    ContextProfile, ExpertProfile, LayerProfile, MAX_CONTEXTS, Profile, Schema, model::ModelFacts,
    printable, read::ReadError,
};
use crate::{
    stats_schema,
    tally::Tally,
    trace::{ContextDetail, Ending, Kind, Reader, Reason, Row, parts::Parts},
};

/// Most experts of which a trace is believed to have counts, over all layers and contexts: those of 80
/// contexts of the largest models. They take 64 MiB.
const MAX_COUNTERS: usize = 4 << 20;
/// Longest description of a context that is looked into, in bytes.
const MAX_DETAIL: usize = 4 << 20;
/// Descriptions of models that differ, in bytes together.
const MAX_MODELS: usize = 8 << 20;
/// Longest summary that is looked into, in bytes: 25,000 layers.
const MAX_SUMMARY: usize = 8 << 20;

/// What a trace has.
#[derive(Debug)]
pub struct Counted {
    /// Batches that could be read.
    pub batches: u64,
    /// How it ends.
    pub ending: Ending,
    /// What was routed, by context.
    pub contexts: BTreeMap<u32, ContextCounts>,
    /// Gaps of which not even the context is known.
    pub gaps_elsewhere: u64,
    /// The document of statistics that stands at the end, without counts; none when the trace has no end, is
    /// a part of several, or that is nothing that this program knows.
    pub summary: Option<Value>,
    /// Files that were read.
    parts: Parts,
    /// Model files, each once.
    models: Vec<Value>,
    /// Bytes of their descriptions.
    described: usize,
    /// Experts of which there are counts.
    counters: usize,
}

/// What a trace has of one context.
#[derive(Debug, Default)]
pub struct ContextCounts {
    /// Model files that it can have: indices.
    models: Vec<usize>,
    /// Layers that have routed.
    pub layers: BTreeMap<u16, Tally>,
    /// Their second blocks of experts, as far as they have routed.
    pub second_blocks: BTreeMap<u16, Tally>,
    /// Gaps.
    pub gaps: u64,
    /// Rows whose position is not known.
    pub rows_without_position: u64,
    /// Rows that have weights.
    pub rows_with_weights: u64,
    /// Rows of either block.
    pub rows: u64,
    /// Whether there is more than one sequence.
    pub several_sequences: bool,
    sequence: Option<u16>,
    /// Layers that were missing in a pass.
    not_seen: BTreeSet<u16>,
}

/// What a summary tells of layers beyond their counts.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Summary {
    contexts: Vec<SummaryContext>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct SummaryContext {
    trace_context: u32,
    layers: Vec<SummaryLayer>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct SummaryLayer {
    layer_id: u16,
    n_expert: Option<u32>,
    k: Option<u32>,
    coverage: Option<String>,
}

impl Counted {
    /// Reads a trace to its end, or to where it cannot be read on. `progress` gets the bytes that are done;
    /// `path` is for messages.
    ///
    /// # Errors
    /// When the file cannot be read, or has numbers that no trace has.
    pub fn read<R: Read>(
        reader: &mut Reader<R>,
        path: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, ReadError> {
        let mut counted = Self::nothing();
        counted.read_on(reader, path, progress)?;
        Ok(counted)
    }

    /// Reads the next file of a trace that is divided into several, as [`read`](Self::read) does.
    ///
    /// # Errors
    /// The same.
    pub fn read_on<R: Read>(
        &mut self,
        reader: &mut Reader<R>,
        path: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), ReadError> {
        self.parts.begin(reader.capture());
        let before = self.batches;
        while let Some(batch) = reader.next()? {
            for row in batch.rows() {
                self.add(&row).map_err(|why| ReadError::Damaged {
                    path: path.to_owned(),
                    why: format!("{why}, in batch {} of the trace", self.batches - before),
                })?;
            }
            self.batches += 1;
            progress(reader.position());
        }
        self.ending = reader.ending().cloned().unwrap_or(Ending::Cut);
        Ok(())
    }

    /// That of a trace of which nothing was read yet.
    pub fn nothing() -> Self {
        Self {
            batches: 0,
            ending: Ending::Cut,
            contexts: BTreeMap::new(),
            gaps_elsewhere: 0,
            summary: None,
            parts: Parts::default(),
            models: Vec::new(),
            described: 0,
            counters: 0,
        }
    }

    fn add(&mut self, row: &Row<'_>) -> Result<(), String> {
        if row.kind == Kind::Summary {
            self.parts.end();
            self.summary = summary(row.detail.unwrap_or_default());
            return Ok(());
        }
        let Some(id) = row.context else {
            if row.kind != Kind::Gap {
                return Err(format!("a row ({}) of no context", row.kind.name()));
            }
            self.gaps_elsewhere += 1;
            return Ok(());
        };
        if id as usize >= MAX_CONTEXTS {
            return Err(format!(
                "context {id} is beyond the limit of {MAX_CONTEXTS}"
            ));
        }
        let context = self.contexts.entry(id).or_default();
        match row.kind {
            Kind::Routed => {
                self.counters += add(&mut context.layers, row)?;
                context.note(row);
            }
            Kind::SecondBlock => self.counters += add(&mut context.second_blocks, row)?,
            Kind::Gap => {
                context.gaps += 1;
                if let (Some(Reason::LayerNotSeen), Some(layer)) = (row.reason, row.layer) {
                    context.not_seen.insert(layer);
                }
            }
            Kind::Context => {
                let detail = row.detail.unwrap_or_default();
                let models = self.models_in(detail)?;
                self.contexts.entry(id).or_default().models = models;
            }
            Kind::Excluded | Kind::Summary => {}
        }
        if self.counters > MAX_COUNTERS {
            return Err(format!("more than {MAX_COUNTERS} experts have counts"));
        }
        Ok(())
    }

    /// What a newer program says in another way is not known here.
    fn models_in(&mut self, detail: &str) -> Result<Vec<usize>, String> {
        if detail.len() > MAX_DETAIL {
            return Ok(Vec::new());
        }
        let detail_bytes = detail.len();
        let detail: ContextDetail = serde_json::from_str(detail).unwrap_or_default();
        let mut indices = Vec::new();
        for model in detail.models {
            let known = self.models.iter().position(|known| *known == model);
            indices.push(known.unwrap_or(self.models.len()));
            if known.is_none() {
                self.models.push(model);
                self.described += detail_bytes;
            }
            if self.described > MAX_MODELS {
                return Err(format!(
                    "models are described in more than {MAX_MODELS} bytes"
                ));
            }
        }
        Ok(indices)
    }

    /// Gaps, over all contexts.
    pub fn gaps(&self) -> u64 {
        let contexts = self.contexts.values();
        contexts.map(|context| context.gaps).sum::<u64>() + self.gaps_elsewhere
    }

    /// Gaps that concern a context: its own, and those that can be anybody's.
    pub fn gaps_of(&self, context: u32) -> u64 {
        let context = self.contexts.get(&context);
        context.map_or(0, |context| context.gaps) + self.gaps_elsewhere
    }

    /// What is known of the model that a context runs.
    pub fn model_of(&self, context: &ContextCounts) -> ModelFacts {
        let models = context.models.iter();
        ModelFacts::of_any(&models.map(|index| &self.models[*index]).collect::<Vec<_>>())
    }

    /// The counts as a document that names its source. Contexts keep their numbers: one that routed nothing
    /// has no layers.
    pub fn profile(&self, source: String) -> Profile {
        let mut told = self.told();
        let mut models: Vec<Value> = Vec::new();
        let nothing = ContextCounts::default();
        let end = self.contexts.keys().next_back().map_or(0, |last| last + 1);
        let contexts = (0..end)
            .map(|id| {
                let context = self.contexts.get(&id).unwrap_or(&nothing);
                let model = match context.models.as_slice() {
                    [only] => Some(&self.models[*only]),
                    _ => None,
                };
                let model = model.map(|model| {
                    let known = models.iter().position(|known| known == model);
                    known.unwrap_or_else(|| {
                        models.push(model.clone());
                        models.len() - 1
                    })
                });
                let n_expert = self.model_of(context).n_expert;
                ContextProfile {
                    id: id as usize,
                    source: 0,
                    model,
                    layers: context.layer_profiles(told.remove(&id).unwrap_or_default(), n_expert),
                    summed: Vec::new(),
                }
            })
            .collect();
        Profile::new(vec![source], models, contexts)
    }

    /// What the summary tells, by context and layer.
    fn told(&self) -> BTreeMap<u32, BTreeMap<u16, SummaryLayer>> {
        let summary = self.summary.as_ref().map(Summary::deserialize);
        let summary = summary.and_then(Result::ok).unwrap_or_default();
        let contexts = summary.contexts.into_iter();
        contexts
            .map(|context| {
                let layers = context.layers.into_iter();
                let layers = layers.filter(|layer| layer.layer_id < MAX_LAYERS);
                let layers = layers.map(|layer| (layer.layer_id, layer));
                (context.trace_context, layers.collect())
            })
            .collect()
    }

    /// What is missing because it stands in other files, a sentence each; `shown` names those that were read.
    pub fn missing(&self, shown: &str) -> Vec<String> {
        self.parts.missing(shown, self.ending == Ending::Whole)
    }

    /// What is to be said of the file that was read last, when it is not whole.
    pub fn note_of_end(&self, path: &Path) -> Option<String> {
        let shown = printable(&path.to_string_lossy());
        match &self.ending {
            Ending::Whole => None,
            Ending::Cut => Some(format!(
                "{shown} has no end: it is still being written, or was cut; what stands before is counted"
            )),
            Ending::Damaged(why) => Some(format!(
                "{shown} is damaged: {}; what stands before is counted",
                printable(why)
            )),
        }
    }

    /// What is to be said of all that was read, a sentence each.
    pub fn notes(&self, shown: &str) -> Vec<String> {
        let mut notes = self.missing(shown);
        let gaps = self.gaps();
        if gaps > 0 {
            notes.push(format!(
                "{shown} has {gaps} gaps: its counts are lower bounds"
            ));
        }
        notes
    }
}

/// A document of statistics, of a version that is known.
fn summary(detail: &str) -> Option<Value> {
    let document = (detail.len() <= MAX_SUMMARY).then(|| serde_json::from_str::<Value>(detail));
    let document = document?.ok()?;
    let schema = Schema::deserialize(document.get("schema")?).ok()?;
    let is_known = schema.name == stats_schema::NAME && schema.version == stats_schema::VERSION;
    is_known.then_some(document)
}

/// Counts a row. Gives the number of experts that were not known before.
fn add(layers: &mut BTreeMap<u16, Tally>, row: &Row<'_>) -> Result<usize, String> {
    let layer = row.layer.ok_or("a token was routed in no layer")?;
    if layer >= MAX_LAYERS {
        return Err(format!("layer {layer} is beyond the limit of {MAX_LAYERS}"));
    }
    let mut experts = row.experts.iter();
    if let Some(id) = experts.find(|id| usize::from(**id) >= MAX_EXPERTS) {
        return Err(format!(
            "expert {id} of layer {layer} is beyond the limit of {MAX_EXPERTS}"
        ));
    }
    let tally = layers.entry(layer).or_default();
    let before = tally.experts.len();
    let k = u16::try_from(row.experts.len()).unwrap_or(u16::MAX);
    tally.k = tally.k.max(k);
    tally.count(row.phase.unwrap_or(Phase::Decode), 1, row.experts);
    Ok(tally.experts.len() - before)
}

impl ContextCounts {
    fn note(&mut self, row: &Row<'_>) {
        self.rows_without_position += u64::from(row.position.is_none());
        self.rows_with_weights += u64::from(row.weights.is_some());
        self.rows += 1;
        if let Some(sequence) = row.sequence {
            let first = *self.sequence.get_or_insert(sequence);
            self.several_sequences |= first != sequence;
        }
    }

    /// Rows of second blocks of experts.
    pub fn second_block_rows(&self) -> u64 {
        let blocks = self.second_blocks.values();
        blocks.map(Tally::total_tokens).sum()
    }

    /// Counts by layer; `told` is what the summary says of layers, those that were never seen among them.
    fn layer_profiles(
        &self,
        mut told: BTreeMap<u16, SummaryLayer>,
        n_expert: Option<u32>,
    ) -> Vec<LayerProfile> {
        let ids: BTreeSet<u16> = self.layers.keys().chain(told.keys()).copied().collect();
        let nothing = Tally::default();
        let of_layer = |layer_id: u16| {
            let tally = self.layers.get(&layer_id).unwrap_or(&nothing);
            let told = told.remove(&layer_id).unwrap_or_default();
            let missing = self.not_seen.contains(&layer_id);
            let [prefill_tokens, decode_tokens] = tally.tokens;
            let k = u32::from(tally.k).max(believed(told.k).unwrap_or(0));
            let n_expert = believed(told.n_expert).or(n_expert);
            LayerProfile {
                layer_id,
                // A number that rows contradict is that of another layer or model.
                n_expert: n_expert.filter(|n| *n as usize >= tally.experts.len()),
                k: (k > 0).then_some(k),
                coverage: told
                    .coverage
                    .or_else(|| missing.then(|| "partly_observed".to_owned())),
                total_tokens: tally.total_tokens(),
                prefill_tokens,
                decode_tokens,
                experts: ExpertProfile::list(&tally.experts),
            }
        };
        ids.into_iter().map(of_layer).collect()
    }
}

fn believed(number: Option<u32>) -> Option<u32> {
    number.filter(|number| (1..=MAX_EXPERTS).contains(&(*number as usize)))
}

#[cfg(test)]
pub mod tests {
    use serde_json::json;

    use super::*;

    /// A generated token.
    pub fn routed(context: u32, layer: u16, experts: &[u16]) -> Row<'_> {
        Row {
            context: Some(context),
            layer: Some(layer),
            phase: Some(Phase::Decode),
            experts,
            ..Row::of(Kind::Routed)
        }
    }

    fn counted(rows: &[Row<'_>]) -> Result<Counted, String> {
        let mut counted = Counted::nothing();
        rows.iter().try_for_each(|row| counted.add(row))?;
        counted.ending = Ending::Whole;
        Ok(counted)
    }

    fn profile(rows: &[Row<'_>]) -> Profile {
        let mut profile = counted(rows).unwrap().profile("a.arrows".into());
        let as_it_was = profile.clone();
        profile.put_in_order();
        assert_eq!(profile, as_it_was);
        profile.check().unwrap();
        profile
    }

    fn described(detail: &str) -> Row<'_> {
        Row {
            context: Some(2),
            detail: Some(detail),
            ..Row::of(Kind::Context)
        }
    }

    fn statistics(contexts: Value) -> String {
        json!({
            "schema": {"name": stats_schema::NAME, "version": stats_schema::VERSION},
            "contexts": contexts,
        })
        .to_string()
    }

    fn summary_of(detail: &str) -> Row<'_> {
        Row {
            detail: Some(detail),
            ..Row::of(Kind::Summary)
        }
    }

    #[test]
    fn rows_are_counted_by_context_layer_phase_and_expert() {
        let prompt = |experts| Row {
            phase: Some(Phase::Prefill),
            ..routed(2, 3, experts)
        };
        let detail = json!({"pid": 7, "models": [{"arch": "a", "n_expert": 8}]}).to_string();
        let summary = statistics(json!([{"trace_context": 2, "layers": [
            {"layer_id": 3, "coverage": "observed", "n_expert": 8, "k": 2},
            {"layer_id": 4, "coverage": "not_visible", "n_expert": 8, "k": 2},
        ]}]));
        let rows = [
            described(&detail),
            prompt(&[7, 1]),
            prompt(&[1]),
            routed(0, 3, &[300]),
            routed(2, 3, &[1, 2]),
            Row {
                kind: Kind::SecondBlock,
                ..routed(2, 3, &[1, 1])
            },
            summary_of(&summary),
        ];
        let counted = counted(&rows).unwrap();
        let main = &counted.contexts[&2];
        assert_eq!(main.second_blocks[&3].experts, [[0, 0], [0, 2]]);
        assert_eq!(main.second_block_rows(), 1);
        assert!(counted.summary.is_some());

        let profile = profile(&rows);
        assert_eq!(profile.layers_context, Some(2));
        assert_eq!(profile.contexts.len(), 3);
        assert!(profile.contexts[1].layers.is_empty());
        assert_eq!(profile.contexts[0].layers[0].n_expert, None);
        let main = &profile.contexts[2];
        assert_eq!(main.model, Some(0));
        let [layer, unseen] = &main.layers[..] else {
            panic!("{main:?}");
        };
        let expert = |expert_id, prefill, decode| ExpertProfile {
            expert_id,
            activations: prefill + decode,
            prefill,
            decode,
        };
        let expected = LayerProfile {
            layer_id: 3,
            n_expert: Some(8),
            k: Some(2),
            coverage: Some("observed".into()),
            total_tokens: 3,
            prefill_tokens: 2,
            decode_tokens: 1,
            experts: vec![expert(1, 2, 1), expert(2, 0, 1), expert(7, 1, 0)],
        };
        assert_eq!(*layer, expected);
        assert_eq!((unseen.layer_id, unseen.total_tokens), (4, 0));
        assert_eq!(unseen.coverage.as_deref(), Some("not_visible"));
    }

    #[test]
    fn gaps_are_those_of_a_context_or_of_any() {
        let gap = |context, layer| Row {
            context,
            layer,
            reason: Some(Reason::LayerNotSeen),
            ..Row::of(Kind::Gap)
        };
        let rows = [
            routed(0, 3, &[5]),
            routed(0, 4, &[5]),
            gap(Some(0), Some(4)),
            gap(Some(1), None),
            gap(None, None),
        ];
        let counted = counted(&rows).unwrap();
        assert_eq!((counted.gaps(), counted.gaps_of(0)), (3, 2));
        assert_eq!((counted.gaps_of(1), counted.gaps_of(7)), (2, 1));
        let coverage = profile(&rows).contexts[0]
            .layers
            .iter()
            .map(|layer| layer.coverage.clone())
            .collect::<Vec<_>>();
        assert_eq!(coverage, [None, Some("partly_observed".into())]);
        let notes = counted.notes("a");
        assert_eq!(notes, ["a has 3 gaps: its counts are lower bounds"]);
    }

    #[test]
    fn hostile_rows_are_refused() {
        let row = routed(0, 0, &[1]);
        for (row, reason) in [
            (routed(u32::MAX, 0, &[1]), "context 4294967295 is beyond"),
            (routed(0, 1024, &[1]), "layer 1024 is beyond"),
            (routed(0, 0, &[1024]), "expert 1024 of layer 0 is beyond"),
            (Row { layer: None, ..row }, "no layer"),
            (
                Row {
                    context: None,
                    ..row
                },
                "a row (routed) of no context",
            ),
            (
                Row {
                    kind: Kind::SecondBlock,
                    ..routed(0, 0, &[u16::MAX])
                },
                "expert 65535 of layer 0 is beyond",
            ),
        ] {
            let error = counted(&[row]).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
        let many: Vec<Row<'_>> = (0..=MAX_CONTEXTS as u32)
            .map(|context| routed(context, 0, &[0]))
            .collect();
        assert!(counted(&many).is_err());
        assert!(counted(&many[..MAX_CONTEXTS]).is_ok());
        let wide: Vec<Row<'_>> = (0..8192)
            .map(|i| routed(i / 1024, (i % 1024) as u16, &[1023]))
            .collect();
        assert!(counted(&wide).is_err(), "8 Mi counters");
        assert!(counted(&wide[4096..]).is_ok(), "4 Mi counters");
    }

    #[test]
    fn details_that_say_nothing_are_ignored() {
        let newer = statistics(json!([])).replace("\"version\":2", "\"version\":3");
        let hostile = statistics(json!([{"trace_context": 0, "layers": [
            {"layer_id": 9999, "n_expert": 5}, {"layer_id": 0, "n_expert": 9999},
        ]}]));
        let huge = "9".repeat(MAX_SUMMARY + 1);
        for row in [
            described("{"),
            described(r#"{"pid": 1, "models": [{"n_expert": 4000000000}]}"#),
            summary_of("[]"),
            summary_of(&huge),
            summary_of(&newer),
            summary_of(&hostile),
        ] {
            let of_two = Row {
                context: row.context.map(|_| 0),
                ..row
            };
            let rows = [routed(0, 0, &[1]), of_two];
            let profile = profile(&rows);
            let [layer] = &profile.contexts[0].layers[..] else {
                panic!("{profile:?}");
            };
            assert_eq!((layer.n_expert, layer.total_tokens), (None, 1));
        }
        assert!(
            counted(&[summary_of(&newer)]).unwrap().summary.is_none(),
            "what it means is not known"
        );
    }

    #[test]
    fn a_model_is_kept_once() {
        let detail = r#"{"pid": 1, "models": [{"n_expert": 16}, {"n_expert": 32}]}"#;
        let rows: Vec<Row<'_>> = (0..100)
            .map(|context| Row {
                context: Some(context),
                ..described(detail)
            })
            .collect();
        let same = counted(&rows).unwrap();
        assert_eq!(same.models.len(), 2);
        assert_eq!(same.model_of(&same.contexts[&99]).n_expert, None);
        assert_eq!(same.profile("a".into()).models.len(), 0, "it can be either");

        let long = "x".repeat(MAX_DETAIL / 2);
        let details: Vec<String> = (0..5)
            .map(|number| format!(r#"{{"pid": 1, "models": [{{"path": "{number}{long}"}}]}}"#))
            .collect();
        let rows: Vec<Row<'_>> = details.iter().map(|detail| described(detail)).collect();
        assert!(counted(&rows[..3]).is_ok());
        assert!(counted(&rows).is_err(), "more than 8 MiB of models");
    }
}
