//! A profile as a JSON document.

use serde::Serialize;

use super::{ContextProfile, Profile, Schema};
use crate::tally::SpecifiedLayer;

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
        .map(|layer| {
            let experts = layer.experts.iter();
            let experts = experts.map(|expert| (expert.expert_id as usize, expert.activations));
            SpecifiedLayer::new(layer.layer_id, layer.total_tokens, experts)
        })
        .collect()
}
