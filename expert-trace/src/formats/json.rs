//! Counts as JSON: reading statistics and profiles, and writing a profile.

use std::{
    collections::BTreeSet,
    io::{BufReader, Read, Write},
};

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{MAX_EXPERTS, MAX_LAYERS};
use crate::{
    profile::{ContextProfile, LayerProfile, Profile, SCHEMA_NAME, SCHEMA_VERSION, Schema},
    stats::{self, SpecifiedExpert, SpecifiedLayer},
};

/// Longest document that is read, in bytes.
const MAX_DOCUMENT: u64 = 256 << 20;

/// What statistics and profiles have in common.
#[derive(Deserialize)]
struct Document {
    schema: Schema,
    #[serde(default)]
    sources: Vec<String>,
    #[serde(default)]
    models: Vec<Value>,
    #[serde(default)]
    layers_context: Option<usize>,
    contexts: Vec<DocumentContext>,
}

#[derive(Deserialize)]
struct DocumentContext {
    id: usize,
    #[serde(default)]
    source: usize,
    #[serde(default)]
    model: Option<usize>,
    #[serde(default)]
    summed: Vec<usize>,
    layers: Vec<LayerProfile>,
}

/// Reads statistics or a profile; `name` is the source of statistics.
///
/// # Errors
/// When it is neither, was written by a newer program, or has numbers that no model has.
pub fn read(input: impl Read, name: &str) -> anyhow::Result<Profile> {
    let mut input = input.take(MAX_DOCUMENT + 1);
    let document: Result<Document, _> = serde_json::from_reader(BufReader::new(&mut input));
    ensure!(
        input.limit() > 0,
        "it is longer than {} MiB: these are no statistics",
        MAX_DOCUMENT >> 20
    );
    let document = document.context("these are no statistics of expert-trace, nor a profile")?;
    let known = [
        (stats::SCHEMA_NAME, stats::SCHEMA_VERSION),
        (SCHEMA_NAME, SCHEMA_VERSION),
    ];
    let Schema {
        name: schema,
        version,
    } = &document.schema;
    match known.iter().find(|(name, _)| name == schema) {
        Some((_, newest)) if version > newest => bail!(
            "it has version {version} of the format {schema}, and this program reads {newest}: use a \
             newer expert-trace"
        ),
        Some(_) => {}
        None => bail!(
            "its schema is '{schema}', and not {} or {SCHEMA_NAME}",
            stats::SCHEMA_NAME
        ),
    }
    let mut sources = document.sources;
    if sources.is_empty() {
        sources.push(name.to_owned());
    }
    let contexts: Vec<ContextProfile> = document
        .contexts
        .into_iter()
        .map(|context| ContextProfile {
            id: context.id,
            source: context.source,
            model: context.model.filter(|index| *index < document.models.len()),
            layers: context.layers,
            summed: context.summed,
        })
        .collect();
    for context in &contexts {
        check(context).with_context(|| format!("context {}", context.id))?;
        ensure!(
            context.source < sources.len(),
            "context {} has no source",
            context.id
        );
    }
    let main = document
        .layers_context
        .filter(|index| *index < contexts.len());
    let mut profile = profile(sources, document.models, contexts);
    profile.layers_context = main.or(profile.layers_context);
    Ok(profile)
}

fn check(context: &ContextProfile) -> anyhow::Result<()> {
    let mut layers = BTreeSet::new();
    for layer in &context.layers {
        let id = layer.layer_id;
        ensure!(
            id < MAX_LAYERS,
            "layer {id}: models have at most {MAX_LAYERS}"
        );
        ensure!(layers.insert(id), "layer {id} is there twice");
        let limit = layer.n_expert.unwrap_or(MAX_EXPERTS);
        ensure!(
            limit <= MAX_EXPERTS,
            "layer {id} has {limit} experts: models have at most {MAX_EXPERTS}"
        );
        let mut experts = BTreeSet::new();
        for expert in &layer.experts {
            let expert = expert.expert_id;
            ensure!(
                expert < limit,
                "expert {expert} in layer {id}, which has {limit}"
            );
            ensure!(
                experts.insert(expert),
                "expert {expert} of layer {id} is there twice"
            );
        }
    }
    Ok(())
}

/// A profile of these counts. Its main context is the one with most tokens; of equals the first.
pub fn profile(sources: Vec<String>, models: Vec<Value>, contexts: Vec<ContextProfile>) -> Profile {
    let tokens = |index: &usize| {
        let layers = &contexts[*index].layers;
        layers.iter().map(|layer| layer.total_tokens).max()
    };
    Profile {
        schema: Schema {
            name: SCHEMA_NAME.to_owned(),
            version: SCHEMA_VERSION,
        },
        sources,
        models,
        layers_context: (0..contexts.len()).rev().max_by_key(tokens),
        contexts,
    }
}

/// A profile with the counts of its main context as the original specification has them.
#[derive(Serialize)]
struct Written<'a> {
    #[serde(flatten)]
    profile: &'a Profile,
    layers: Vec<SpecifiedLayer>,
}

/// Writes a profile.
///
/// # Errors
/// When it cannot be written.
pub fn write(profile: &Profile, out: &mut dyn Write) -> anyhow::Result<()> {
    let main = profile.layers_context.map(|index| &profile.contexts[index]);
    let layers = main.into_iter().flat_map(|context| &context.layers);
    let layers = layers
        .filter(|layer| layer.total_tokens > 0 || !layer.experts.is_empty())
        .map(specified)
        .collect();
    serde_json::to_writer_pretty(&mut *out, &Written { profile, layers })?;
    out.write_all(b"\n")?;
    Ok(())
}

fn specified(layer: &LayerProfile) -> SpecifiedLayer {
    let percentage = |activations: u64| match layer.total_tokens {
        0 => 0.0,
        tokens => 100.0 * activations as f64 / tokens as f64,
    };
    SpecifiedLayer {
        layer_id: layer.layer_id,
        total_tokens: layer.total_tokens,
        experts: layer
            .experts
            .iter()
            .map(|expert| SpecifiedExpert {
                expert_id: expert.expert_id as usize,
                activations: expert.activations,
                percentage: percentage(expert.activations),
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::formats::tests::small_profile;

    fn read_value(value: &Value) -> anyhow::Result<Profile> {
        read(value.to_string().as_bytes(), "name")
    }

    fn stats() -> Value {
        json!({
            "schema": {"name": "expert-trace-stats", "version": 2},
            "tool": {"name": "expert-trace", "version": "0.1.0"},
            "models": [{"path": "/m.gguf", "n_expert": 8}],
            "layers_context": 0,
            "layers": [],
            "contexts": [{
                "id": 0, "pid": 7, "model": 0, "passes": 2,
                "layers": [{
                    "layer_id": 1, "coverage": "observed", "reason": null, "n_expert": 8, "k": 2,
                    "total_tokens": 3, "prefill_tokens": 2, "decode_tokens": 1, "activations": 6,
                    "experts": [
                        {"expert_id": 2, "activations": 3, "prefill": 2, "decode": 1,
                         "percentage": 100.0, "share": 0.5},
                        {"expert_id": 0, "activations": 3, "prefill": 2, "decode": 1,
                         "percentage": 100.0, "share": 0.5},
                    ],
                    "second_block": null,
                }],
            }],
        })
    }

    #[test]
    fn statistics_are_read() {
        let profile = read_value(&stats()).unwrap();
        assert_eq!(profile.sources, ["name"]);
        let layer = &profile.contexts[0].layers[0];
        assert_eq!((layer.layer_id, layer.n_expert), (1, Some(8)));
        assert_eq!(layer.experts[1].expert_id, 0);
        assert_eq!(layer.coverage.as_deref(), Some("observed"));
    }

    #[test]
    fn a_profile_survives() {
        let profile = small_profile();
        let mut out = Vec::new();
        write(&profile, &mut out).unwrap();
        assert_eq!(read(&*out, "other").unwrap(), profile);
        let value: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(
            value["layers"][0],
            json!({"layer_id": 1, "total_tokens": 4, "experts": [
                {"expert_id": 2, "activations": 3, "percentage": 75.0},
                {"expert_id": 0, "activations": 1, "percentage": 25.0},
            ]})
        );
    }

    #[test]
    fn bad_documents_are_refused() {
        let change = |pointer: &str, value: Value| {
            let mut stats = stats();
            *stats.pointer_mut(pointer).unwrap() = value;
            stats
        };
        let layer = "/contexts/0/layers/0";
        let expert = format!("{layer}/experts/0/expert_id");
        let twice = json!([
            stats()["contexts"][0]["layers"][0],
            stats()["contexts"][0]["layers"][0]
        ]);
        for (value, expected) in [
            (json!(7), "no statistics"),
            (json!({}), "no statistics"),
            (change("/schema/name", json!("x")), "its schema is 'x'"),
            (change("/schema/version", json!(3)), "newer"),
            (change(&expert, json!(8)), "expert 8 in layer 1"),
            (change(&expert, json!(0)), "twice"),
            (change(&expert, json!(-1)), "no statistics"),
            (
                change(&format!("{layer}/layer_id"), json!(1024)),
                "layer 1024",
            ),
            (change(&format!("{layer}/n_expert"), json!(4097)), "4097"),
            (
                change("/contexts/0/layers", twice),
                "layer 1 is there twice",
            ),
        ] {
            let error = format!("{:#}", read_value(&value).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
        assert!(read(&br#"{"schema""#[..], "cut").is_err());
    }
}
