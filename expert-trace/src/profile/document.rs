//! A profile as a JSON document.

use serde::Serialize;

use super::{ContextProfile, Profile, Schema};

/// The document: the profile, and the main context again in the shape of the original specification.
#[derive(Debug, Serialize)]
struct Document<'a> {
    schema: &'a Schema,
    sources: &'a [String],
    models: &'a [serde_json::Value],
    layers_context: Option<usize>,
    layers: Vec<SpecifiedLayer>,
    contexts: &'a [ContextProfile],
}

#[derive(Debug, Serialize)]
struct SpecifiedLayer {
    layer_id: u16,
    total_tokens: u64,
    experts: Vec<SpecifiedExpert>,
}

#[derive(Debug, Serialize)]
struct SpecifiedExpert {
    expert_id: u32,
    activations: u64,
    percentage: f64,
}

/// The profile as JSON, with `layers`: the layers of the context `layers_context` that routed a token, in
/// the shape of the original specification, so that what reads statistics reads it.
///
/// # Errors
/// None that a profile is known to have.
pub fn to_json(profile: &Profile) -> serde_json::Result<Vec<u8>> {
    let main = profile
        .layers_context
        .and_then(|main| profile.contexts.get(main));
    let document = Document {
        schema: &profile.schema,
        sources: &profile.sources,
        models: &profile.models,
        layers_context: profile.layers_context,
        layers: main.map(specified_layers).unwrap_or_default(),
        contexts: &profile.contexts,
    };
    let mut json = serde_json::to_vec_pretty(&document)?;
    json.push(b'\n');
    Ok(json)
}

fn specified_layers(context: &ContextProfile) -> Vec<SpecifiedLayer> {
    let routed = context.layers.iter().filter(|layer| layer.total_tokens > 0);
    routed
        .map(|layer| SpecifiedLayer {
            layer_id: layer.layer_id,
            total_tokens: layer.total_tokens,
            experts: layer
                .experts
                .iter()
                .map(|expert| SpecifiedExpert {
                    expert_id: expert.expert_id,
                    activations: expert.activations,
                    percentage: 100.0 * expert.activations as f64 / layer.total_tokens as f64,
                })
                .collect(),
        })
        .collect()
}
