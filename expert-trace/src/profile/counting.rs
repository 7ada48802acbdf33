//! A trace, counted.

use std::{collections::BTreeMap, io::Read, path::Path};

use expert_trace_common::{MAX_EXPERTS, MAX_LAYERS, Phase};
use serde::Deserialize;
use serde_json::Value;

use super::{
    ContextProfile, ExpertProfile, LayerProfile, MAX_CONTEXTS, Profile,
    read::{Found, ReadError},
};
use crate::trace::{ContextDetail, Ending, Kind, Row, reader::Reader};

/// Most experts of which a trace is believed to have counts, over all layers and contexts: those of 1,000
/// contexts of the largest models. They take 256 MiB.
const MAX_COUNTS: usize = 16 << 20;
/// Most model files.
const MAX_MODELS: usize = 256;

/// Counts of a layer. Index 0 is prefill, 1 is decode.
#[derive(Debug, Default)]
struct Tally {
    k: u32,
    tokens: [u64; 2],
    experts: Vec<[u64; 2]>,
    n_expert: Option<u32>,
    coverage: Option<String>,
}

#[derive(Debug, Default)]
struct Context {
    /// Index in the models, and what that model says of its layers.
    model: Option<(usize, Option<u32>)>,
    layers: BTreeMap<u16, Tally>,
}

/// What is read of a summary: the document of statistics.
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

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct SummaryLayer {
    layer_id: u16,
    n_expert: Option<u32>,
    k: Option<u32>,
    coverage: Option<String>,
}

#[derive(Debug, Default)]
struct Counter {
    contexts: Vec<Context>,
    models: Vec<Value>,
    /// Experts of which there are counts.
    counts: usize,
    gaps: u64,
}

/// Counts all rows that can be read. Contexts keep their numbers: one that routed nothing has no layers.
///
/// # Errors
/// When the file cannot be read, or has numbers that no trace has.
pub fn count<R: Read>(reader: &mut Reader<R>, path: &Path) -> Result<Found, ReadError> {
    let mut counter = Counter::default();
    while let Some(batch) = reader.next()? {
        for row in batch.rows() {
            counter.add(&row).map_err(|why| ReadError::Damaged {
                path: path.to_owned(),
                why,
            })?;
        }
    }
    let shown = super::printable(&path.to_string_lossy());
    let mut notes = Vec::new();
    match reader.ending() {
        Some(Ending::Whole) | None => {}
        Some(Ending::Cut) => notes.push(format!(
            "{shown} has no end: it is still being written, or was cut; what stands before is counted"
        )),
        Some(Ending::Damaged(why)) => notes.push(format!(
            "{shown} is damaged: {}; what stands before is counted",
            super::printable(why)
        )),
    }
    if counter.gaps > 0 {
        notes.push(format!(
            "{shown} has {} gaps: its counts are lower bounds",
            counter.gaps
        ));
    }
    let profile = counter.finish(path.to_string_lossy().into_owned());
    Ok(Found { profile, notes })
}

impl Counter {
    fn add(&mut self, row: &Row<'_>) -> Result<(), String> {
        match row.kind {
            Kind::Routed => self.add_routed(row),
            Kind::Gap => {
                self.gaps += 1;
                Ok(())
            }
            Kind::Context => {
                let id = row.context.ok_or("a context without a number")?;
                let detail = row.detail.unwrap_or_default();
                self.add_models(id, serde_json::from_str(detail).unwrap_or_default())
            }
            Kind::Summary => {
                let detail = row.detail.unwrap_or_default();
                self.add_summary(serde_json::from_str(detail).unwrap_or_default());
                Ok(())
            }
            Kind::SecondBlock | Kind::Excluded => Ok(()),
        }
    }

    fn add_routed(&mut self, row: &Row<'_>) -> Result<(), String> {
        let (Some(context), Some(layer)) = (row.context, row.layer) else {
            return Err("a token was routed in no context or layer".into());
        };
        if layer >= MAX_LAYERS {
            return Err(format!("layer {layer} is beyond the limit of {MAX_LAYERS}"));
        }
        let context = self.context(context)?;
        let tally = context.layers.entry(layer).or_default();
        let phase = usize::from(row.phase != Some(Phase::Prefill));
        let before = tally.experts.len();
        tally.add(phase, row.experts)?;
        self.counts += tally.experts.len() - before;
        if self.counts > MAX_COUNTS {
            return Err(format!("more than {MAX_COUNTS} experts have counts"));
        }
        Ok(())
    }

    fn context(&mut self, id: u32) -> Result<&mut Context, String> {
        let index = id as usize;
        if index >= MAX_CONTEXTS {
            return Err(format!(
                "context {id} is beyond the limit of {MAX_CONTEXTS}"
            ));
        }
        if self.contexts.len() <= index {
            self.contexts.resize_with(index + 1, Context::default);
        }
        Ok(&mut self.contexts[index])
    }

    /// Of a context that can have several models, none is believed.
    fn add_models(&mut self, id: u32, detail: ContextDetail) -> Result<(), String> {
        let only = <[Value; 1]>::try_from(detail.models).ok();
        let model = only.and_then(|[model]| {
            let n_expert = number(&model["n_expert"]);
            Some((self.model_index(model)?, n_expert))
        });
        self.context(id)?.model = model;
        Ok(())
    }

    fn model_index(&mut self, model: Value) -> Option<usize> {
        let known = self.models.iter().position(|known| *known == model);
        known.or_else(|| {
            let index = self.models.len();
            (index < MAX_MODELS).then(|| self.models.push(model))?;
            Some(index)
        })
    }

    /// Layers that were not seen are in the summary alone.
    fn add_summary(&mut self, summary: Summary) {
        for told in summary.contexts {
            let Some(context) = self.contexts.get_mut(told.trace_context as usize) else {
                continue;
            };
            for layer in told.layers {
                if layer.layer_id >= MAX_LAYERS {
                    continue;
                }
                let tally = context.layers.entry(layer.layer_id).or_default();
                tally.n_expert = believed(layer.n_expert);
                tally.coverage = layer.coverage;
                tally.k = tally.k.max(believed(layer.k).unwrap_or(0));
            }
        }
    }

    fn finish(self, source: String) -> Profile {
        let contexts = self.contexts.into_iter().enumerate();
        let contexts: Vec<ContextProfile> = contexts
            .map(|(id, context)| {
                let n_expert = context.model.and_then(|(_, n_expert)| n_expert);
                let layers = context.layers.into_iter();
                ContextProfile {
                    id,
                    source: 0,
                    model: context.model.map(|(index, _)| index),
                    summed: Vec::new(),
                    layers: layers
                        .map(|(layer_id, tally)| tally.finish(layer_id, n_expert))
                        .collect(),
                }
            })
            .collect();
        Profile::new(vec![source], self.models, contexts)
    }
}

impl Tally {
    fn add(&mut self, phase: usize, experts: &[u16]) -> Result<(), String> {
        self.tokens[phase] += 1;
        self.k = self.k.max(experts.len() as u32);
        for id in experts {
            let index = usize::from(*id);
            if index >= self.experts.len() {
                if index >= MAX_EXPERTS {
                    return Err(format!("expert {id} is beyond the limit of {MAX_EXPERTS}"));
                }
                self.experts.resize(index + 1, [0; 2]);
            }
            self.experts[index][phase] += 1;
        }
        Ok(())
    }

    fn finish(self, layer_id: u16, n_expert: Option<u32>) -> LayerProfile {
        let needed = self.experts.len() as u32;
        let n_expert = self.n_expert.or(n_expert);
        let [prefill_tokens, decode_tokens] = self.tokens;
        let experts = (0..).zip(self.experts);
        LayerProfile {
            layer_id,
            // A model file that the program did not follow is not believed.
            n_expert: n_expert.filter(|n_expert| *n_expert >= needed),
            k: (self.k > 0).then_some(self.k),
            coverage: self.coverage,
            total_tokens: prefill_tokens + decode_tokens,
            prefill_tokens,
            decode_tokens,
            experts: experts
                .map(|(expert_id, [prefill, decode])| ExpertProfile {
                    expert_id,
                    activations: prefill + decode,
                    prefill,
                    decode,
                })
                .collect(),
        }
    }
}

fn number(value: &Value) -> Option<u32> {
    believed(u32::try_from(value.as_u64()?).ok())
}

fn believed(number: Option<u32>) -> Option<u32> {
    number.filter(|number| (1..=MAX_EXPERTS).contains(&(*number as usize)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const EMPTY: Row<'static> = Row {
        kind: Kind::Routed,
        context: Some(0),
        pass: Some(0),
        phase: Some(Phase::Decode),
        layer: Some(0),
        row: Some(0),
        rows: None,
        sequence: None,
        position: None,
        token: None,
        time_ns: 0,
        experts: &[],
        reason: None,
        detail: None,
    };

    fn counted(rows: &[Row<'_>]) -> Result<Profile, String> {
        let mut counter = Counter::default();
        rows.iter().try_for_each(|row| counter.add(row))?;
        let mut profile = counter.finish("a.arrows".into());
        profile.put_in_order();
        profile.check()?;
        Ok(profile)
    }

    #[test]
    fn rows_are_counted_by_context_layer_phase_and_expert() {
        let detail = json!({"pid": 7, "models": [{"arch": "a", "n_expert": 8}]}).to_string();
        let summary = json!({"contexts": [{"trace_context": 2, "layers": [
            {"layer_id": 3, "coverage": "observed", "n_expert": 8, "k": 2},
            {"layer_id": 4, "coverage": "not_visible", "n_expert": 8, "k": 2},
        ]}]})
        .to_string();
        let of = |context, layer, phase, experts| Row {
            context: Some(context),
            layer: Some(layer),
            phase: Some(phase),
            experts,
            ..EMPTY
        };
        let profile = counted(&[
            Row {
                kind: Kind::Context,
                context: Some(2),
                detail: Some(&detail),
                ..EMPTY
            },
            of(2, 3, Phase::Prefill, &[7, 1]),
            of(2, 3, Phase::Prefill, &[1]),
            of(0, 3, Phase::Decode, &[300]),
            of(2, 3, Phase::Decode, &[1, 2]),
            Row {
                kind: Kind::SecondBlock,
                ..of(2, 3, Phase::Decode, &[1, 1])
            },
            Row {
                kind: Kind::Summary,
                detail: Some(&summary),
                ..EMPTY
            },
        ])
        .unwrap();
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
    fn hostile_rows_are_refused_and_their_details_ignored() {
        let row = Row {
            experts: &[1],
            ..EMPTY
        };
        for (row, reason) in [
            (
                Row {
                    context: Some(u32::MAX),
                    ..row
                },
                "context 4294967295 is beyond",
            ),
            (
                Row {
                    layer: Some(1024),
                    ..row
                },
                "layer 1024 is beyond",
            ),
            (Row { layer: None, ..row }, "no context or layer"),
            (
                Row {
                    experts: &[1024],
                    ..row
                },
                "expert 1024 is beyond",
            ),
        ] {
            let error = counted(&[row]).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
        for (kind, detail) in [
            (Kind::Context, "{"),
            (
                Kind::Context,
                r#"{"pid": 1, "models": [{"n_expert": 4000000000}]}"#,
            ),
            (Kind::Summary, "[]"),
            (
                Kind::Summary,
                r#"{"contexts": [{"trace_context": 0, "layers":
                    [{"layer_id": 9999, "n_expert": 5}, {"layer_id": 0, "n_expert": 9999}]}]}"#,
            ),
        ] {
            let detail = Row {
                kind,
                detail: Some(detail),
                ..EMPTY
            };
            let profile = counted(&[row, detail]).unwrap();
            let [layer] = &profile.contexts[0].layers[..] else {
                panic!("{profile:?}");
            };
            assert_eq!((layer.n_expert, layer.total_tokens), (None, 1));
        }
    }
}
