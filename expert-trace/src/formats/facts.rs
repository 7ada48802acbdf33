//! What a trace has, found by reading it once: what formats need before their first row, and counts.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read,
};

use anyhow::{Context as _, ensure};
use expert_trace_common::Phase;
use serde_json::Value;

use super::{MAX_EXPERTS, MAX_LAYERS, progress::Progress};
use crate::{
    profile::{ContextProfile, ExpertProfile, LayerProfile, MAX_CONTEXTS, Profile},
    trace::{ContextDetail, Ending, Kind, Reader, Reason, Row},
};

/// Counters of experts, over all layers and contexts: 64 MiB of them.
const MAX_COUNTERS: usize = 4 << 20;
/// Descriptions of contexts, in bytes.
const MAX_DESCRIPTIONS: usize = 4 << 20;

/// What a trace has.
#[derive(Debug)]
pub struct Facts {
    /// Batches that could be read.
    pub batches: u64,
    /// How it ends.
    pub ending: Ending,
    /// What was routed, by context.
    pub contexts: BTreeMap<u32, ContextFacts>,
    /// Gaps of which not even the context is known.
    pub gaps_elsewhere: u64,
    /// Whether the capture has said that it ended.
    has_summary: bool,
    counters: usize,
    described: usize,
}

/// What a trace has of one context.
#[derive(Debug, Default)]
pub struct ContextFacts {
    /// Model files that it can have.
    models: Vec<Value>,
    /// Layers that have routed.
    pub layers: BTreeMap<u16, LayerFacts>,
    /// Rows of second blocks of experts.
    pub second_block_rows: u64,
    /// Gaps.
    pub gaps: u64,
    /// Rows whose position is not known.
    pub rows_without_position: u64,
    /// Whether there is more than one sequence.
    pub several_sequences: bool,
    sequence: Option<u16>,
    /// Layers that were missing in a pass.
    not_seen: BTreeSet<u16>,
}

/// What a trace has of one layer of one context.
#[derive(Debug, Default)]
pub struct LayerFacts {
    /// Tokens, of prompts and generated.
    tokens: [u64; 2],
    /// Experts per token; the largest number seen.
    pub k: u16,
    /// Activations by expert, of prompts and of generated tokens.
    activations: Vec<[u64; 2]>,
}

/// What a description of a context says of its model.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ModelFacts {
    /// The file.
    pub path: Option<String>,
    /// Architecture.
    pub arch: Option<String>,
    /// Layers, those without experts too.
    pub layers: Option<u64>,
    /// Experts to choose from.
    pub n_expert: Option<u32>,
    /// Bytes of an expert, and of all else, by layer.
    pub layer_bytes: BTreeMap<u16, (u64, u64)>,
}

impl Facts {
    /// Reads a trace to its end, or to where it cannot be read on.
    ///
    /// # Errors
    /// When the file cannot be read, or has numbers that no model has.
    pub fn collect<R: Read>(
        reader: &mut Reader<R>,
        progress: &mut Progress,
    ) -> anyhow::Result<Self> {
        let mut facts = Self {
            batches: 0,
            ending: Ending::Cut,
            contexts: BTreeMap::new(),
            gaps_elsewhere: 0,
            has_summary: false,
            counters: 0,
            described: 0,
        };
        while let Some(batch) = reader.next()? {
            for row in batch.rows() {
                facts
                    .add(&row)
                    .with_context(|| format!("batch {} of the trace", facts.batches))?;
            }
            facts.batches += 1;
            progress.update(reader.position());
        }
        progress.end_round(reader.position());
        if let Some(ending) = reader.ending() {
            facts.ending = ending.clone();
        }
        Ok(facts)
    }

    fn add(&mut self, row: &Row<'_>) -> anyhow::Result<()> {
        if row.kind == Kind::Summary {
            self.has_summary = true;
            return Ok(());
        }
        let Some(id) = row.context else {
            ensure!(row.kind == Kind::Gap, "a row of no context");
            self.gaps_elsewhere += 1;
            return Ok(());
        };
        ensure!(
            (id as usize) < MAX_CONTEXTS,
            "context {id}: no process has more than {MAX_CONTEXTS}"
        );
        let context = self.contexts.entry(id).or_default();
        match row.kind {
            Kind::Routed => self.counters += context.add(row)?,
            Kind::SecondBlock => context.second_block_rows += 1,
            Kind::Gap => {
                context.gaps += 1;
                if let (Some(Reason::LayerNotSeen), Some(layer)) = (row.reason, row.layer) {
                    context.not_seen.insert(layer);
                }
            }
            Kind::Context => {
                let detail = row.detail.unwrap_or_default();
                self.described += detail.len();
                ensure!(
                    self.described <= MAX_DESCRIPTIONS,
                    "it describes contexts in more than {MAX_DESCRIPTIONS} bytes"
                );
                // What a newer program says in another way is not known here.
                if let Ok(detail) = serde_json::from_str::<ContextDetail>(detail) {
                    context.models = detail.models;
                }
            }
            Kind::Excluded | Kind::Summary => {}
        }
        ensure!(
            self.counters <= MAX_COUNTERS,
            "it has more than {MAX_COUNTERS} experts, over all contexts and layers, as no model has"
        );
        Ok(())
    }

    /// Gaps that concern a context: its own, and those that can be anybody's.
    pub fn gaps_of(&self, context: u32) -> u64 {
        self.contexts
            .get(&context)
            .map_or(0, |context| context.gaps)
            + self.gaps_elsewhere
    }

    /// The counts as a document that names its source. Contexts keep their numbers: one that routed nothing
    /// has no layers.
    pub fn profile(&self, source: String) -> Profile {
        let mut models: Vec<Value> = Vec::new();
        let nothing = ContextFacts::default();
        let end = self.contexts.keys().next_back().map_or(0, |last| last + 1);
        let contexts = (0..end)
            .map(|id| (id, self.contexts.get(&id).unwrap_or(&nothing)))
            .map(|(id, context)| {
                let model = match context.models.as_slice() {
                    [only] => Some(only),
                    _ => None,
                };
                let model = model.map(|model| {
                    let known = models.iter().position(|known| known == model);
                    known.unwrap_or_else(|| {
                        models.push(model.clone());
                        models.len() - 1
                    })
                });
                let lost_nothing =
                    self.ending == Ending::Whole && self.has_summary && self.gaps_of(id) == 0;
                ContextProfile {
                    id: id as usize,
                    source: 0,
                    model,
                    layers: context.layer_profiles(lost_nothing),
                    summed: Vec::new(),
                }
            })
            .collect();
        Profile::new(vec![source], models, contexts)
    }
}

impl ContextFacts {
    /// Gives the number of experts that were not known before.
    fn add(&mut self, row: &Row<'_>) -> anyhow::Result<usize> {
        let layer = row.layer.context("a routed row of no layer")?;
        ensure!(
            layer < MAX_LAYERS,
            "a row of layer {layer}: models have at most {MAX_LAYERS}"
        );
        let facts = self.layers.entry(layer).or_default();
        let phase = usize::from(row.phase != Some(Phase::Prefill));
        facts.tokens[phase] += 1;
        facts.k = facts
            .k
            .max(row.experts.len().min(usize::from(u16::MAX)) as u16);
        let before = facts.activations.len();
        for expert in row.experts {
            let index = usize::from(*expert);
            if index >= facts.activations.len() {
                ensure!(
                    u32::from(*expert) < MAX_EXPERTS,
                    "expert {expert} in layer {layer}: models have at most {MAX_EXPERTS}"
                );
                facts.activations.resize(index + 1, [0; 2]);
            }
            facts.activations[index][phase] += 1;
        }
        self.rows_without_position += u64::from(row.position.is_none());
        if let Some(sequence) = row.sequence {
            let first = *self.sequence.get_or_insert(sequence);
            self.several_sequences |= first != sequence;
        }
        Ok(facts.activations.len() - before)
    }

    fn layer_profiles(&self, lost_nothing: bool) -> Vec<LayerProfile> {
        let n_expert = self.model().n_expert;
        let of_layer = |(id, layer): (&u16, &LayerFacts)| {
            let [prefill_tokens, decode_tokens] = layer.tokens;
            let coverage = if self.not_seen.contains(id) {
                Some("partly_observed")
            } else {
                lost_nothing.then_some("observed")
            };
            LayerProfile {
                layer_id: *id,
                // A number that rows contradict is that of another layer or model.
                n_expert: n_expert.filter(|n| *n as usize >= layer.activations.len()),
                k: Some(layer.k.into()),
                coverage: coverage.map(str::to_owned),
                total_tokens: prefill_tokens + decode_tokens,
                prefill_tokens,
                decode_tokens,
                experts: experts(&layer.activations),
            }
        };
        self.layers.iter().map(of_layer).collect()
    }

    /// What is said of the model: of the only one that it can be, or what all have in common.
    pub fn model(&self) -> ModelFacts {
        match self.models.as_slice() {
            [only] => ModelFacts::of(only),
            several => {
                let facts: Vec<ModelFacts> = several.iter().map(ModelFacts::of).collect();
                let same = facts
                    .windows(2)
                    .all(|pair| pair[0].n_expert == pair[1].n_expert);
                ModelFacts {
                    n_expert: facts
                        .first()
                        .filter(|_| same)
                        .and_then(|facts| facts.n_expert),
                    ..ModelFacts::default()
                }
            }
        }
    }
}

impl ModelFacts {
    /// Takes what is there, and of the right kind.
    fn of(model: &Value) -> Self {
        let text = |key: &str| Some(model.get(key)?.as_str()?.to_owned());
        let bytes_of = |layer: &Value| {
            let number = |key: &str| layer.get(key)?.as_u64();
            let id = u16::try_from(number("layer_id")?).ok()?;
            Some((id, (number("expert_bytes")?, number("dense_bytes")?)))
        };
        let layers = model.get(LAYER_BYTES).and_then(Value::as_array);
        Self {
            path: text("path"),
            arch: text("arch"),
            layers: model.get("layers").and_then(Value::as_u64),
            n_expert: model
                .get("n_expert")
                .and_then(Value::as_u64)
                .and_then(|n| u32::try_from(n).ok())
                .filter(|n| (1..=MAX_EXPERTS).contains(n)),
            layer_bytes: layers.into_iter().flatten().filter_map(bytes_of).collect(),
        }
    }
}

/// Key of what layers weigh, in a model's description: a list of `layer_id`, `expert_bytes` and
/// `dense_bytes`. Only traces that were made from a `route_trace` have it.
pub const LAYER_BYTES: &str = "layer_bytes";

/// Counts by expert as a list of those that are there: most activations first.
pub fn experts(activations: &[[u64; 2]]) -> Vec<ExpertProfile> {
    let mut experts: Vec<ExpertProfile> = (0..)
        .zip(activations)
        .map(|(expert_id, [prefill, decode])| ExpertProfile {
            expert_id,
            activations: prefill + decode,
            prefill: *prefill,
            decode: *decode,
        })
        .filter(|expert| expert.activations > 0)
        .collect();
    experts.sort_by_key(|expert| (u64::MAX - expert.activations, expert.expert_id));
    experts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::tests::{read, routed, trace};

    fn facts(rows: &[Row<'_>]) -> anyhow::Result<Facts> {
        let bytes = trace(rows);
        Facts::collect(&mut read(&bytes), &mut Progress::new(0, 1))
    }

    #[test]
    fn counts_by_context_layer_and_phase() {
        let facts = facts(&[
            Row {
                phase: Some(Phase::Prefill),
                ..routed(0, 3, &[5, 1])
            },
            routed(0, 3, &[5, 2]),
            routed(1, 3, &[7]),
            Row {
                kind: Kind::SecondBlock,
                ..routed(0, 3, &[1])
            },
            Row::of(Kind::Gap),
            Row::of(Kind::Summary),
        ])
        .unwrap();
        let profile = facts.profile("a".into());
        assert_eq!(profile.contexts.len(), 2);
        assert_eq!(profile.layers_context, Some(0));
        let layer = &profile.contexts[0].layers[0];
        assert_eq!(
            (layer.layer_id, layer.k, layer.n_expert),
            (3, Some(2), None)
        );
        assert_eq!((layer.prefill_tokens, layer.decode_tokens), (1, 1));
        assert_eq!(layer.coverage, None, "a gap can be anywhere");
        let expert = |expert_id, prefill, decode| ExpertProfile {
            expert_id,
            activations: prefill + decode,
            prefill,
            decode,
        };
        assert_eq!(
            layer.experts,
            [expert(5, 1, 1), expert(1, 1, 0), expert(2, 0, 1)]
        );
        assert_eq!(facts.contexts[&0].second_block_rows, 1);
        assert_eq!(facts.gaps_of(1), 1);
    }

    #[test]
    fn coverage_is_known_when_the_trace_is_whole() {
        let coverage = |rows: &[Row<'_>]| {
            let profile = facts(rows).unwrap().profile("a".into());
            profile.contexts[0].layers[0].coverage.clone()
        };
        let row = routed(0, 3, &[5]);
        let end = Row::of(Kind::Summary);
        assert_eq!(coverage(&[row, end]).as_deref(), Some("observed"));
        assert_eq!(coverage(&[row]), None);
        let gap = Row {
            kind: Kind::Gap,
            reason: Some(Reason::LayerNotSeen),
            ..routed(0, 3, &[])
        };
        assert_eq!(
            coverage(&[row, gap, end]).as_deref(),
            Some("partly_observed")
        );
        let elsewhere = Row {
            layer: Some(4),
            ..gap
        };
        assert_eq!(coverage(&[row, elsewhere, end]), None);
    }

    #[test]
    fn numbers_that_no_model_has_are_refused() {
        let no_layer = Row {
            layer: None,
            ..routed(0, 0, &[1])
        };
        let no_context = Row {
            context: None,
            ..routed(0, 0, &[1])
        };
        for row in [
            routed(0, 0, &[1024]),
            routed(0, 1024, &[1]),
            no_layer,
            no_context,
        ] {
            assert!(facts(&[row]).is_err(), "{row:?}");
        }
        let many: Vec<Row<'_>> = (0..=MAX_CONTEXTS as u32)
            .map(|context| routed(context, 0, &[0]))
            .collect();
        assert!(facts(&many).is_err());
        assert!(facts(&many[..MAX_CONTEXTS]).is_ok());
        let wide: Vec<Row<'_>> = (0..8192)
            .map(|i| routed(i / 1024, (i % 1024) as u16, &[1023]))
            .collect();
        assert!(facts(&wide).is_err(), "8 Mi counters");
        assert!(facts(&wide[4096..]).is_ok(), "4 Mi counters");
    }

    #[test]
    fn models_that_differ_leave_the_number_of_experts_open() {
        let described = |models: &str| {
            let detail = format!(r#"{{"pid": 1, "models": {models}}}"#);
            let context = Row {
                kind: Kind::Context,
                detail: Some(&detail),
                ..routed(0, 0, &[])
            };
            let facts = facts(&[context, routed(0, 0, &[9])]).unwrap();
            let layer = facts.profile("a".into()).contexts[0].layers[0].clone();
            layer.n_expert
        };
        assert_eq!(described(r#"[{"n_expert": 16}]"#), Some(16));
        assert_eq!(
            described(r#"[{"n_expert": 16}, {"n_expert": 16}]"#),
            Some(16)
        );
        assert_eq!(described(r#"[{"n_expert": 16}, {"n_expert": 32}]"#), None);
        assert_eq!(described(r#"[{"n_expert": 8}]"#), None, "expert 9 is there");
        assert_eq!(described(r#"[{"n_expert": -1}]"#), None);
        assert_eq!(described("[7]"), None);
    }
}
