//! Counts of one context as rows of numbers.

use crate::profile::{ContextProfile, LayerProfile};

/// Experts of a layer; where that is not known, those up to the last that was chosen.
pub fn width(layer: &LayerProfile) -> usize {
    let seen = layer.experts.iter().map(|expert| expert.expert_id + 1);
    let seen = seen.max().unwrap_or(0);
    layer.n_expert.unwrap_or(0).max(seen) as usize
}

/// The layer with most experts decides how wide a table is.
pub fn widest(context: &ContextProfile) -> usize {
    context.layers.iter().map(width).max().unwrap_or(0)
}

/// Layers of which it is not known how many experts they have.
pub fn of_unknown_width(context: &ContextProfile) -> Vec<u16> {
    let layers = context.layers.iter();
    layers
        .filter(|layer| layer.n_expert.is_none())
        .map(|layer| layer.layer_id)
        .collect()
}

/// Activations by expert, of prompts and of generated tokens.
pub fn by_expert(layer: &LayerProfile, width: usize) -> Vec<[u64; 2]> {
    let mut counts = vec![[0; 2]; width];
    for expert in &layer.experts {
        counts[expert.expert_id as usize] = [expert.prefill, expert.decode];
    }
    counts
}

/// Activations by expert.
pub fn activations(layer: &LayerProfile, width: usize) -> Vec<u64> {
    let mut counts = vec![0; width];
    for expert in &layer.experts {
        counts[expert.expert_id as usize] = expert.activations;
    }
    counts
}

/// The largest number of experts per token.
pub fn k(context: &ContextProfile) -> u32 {
    let ks = context.layers.iter().filter_map(|layer| layer.k);
    ks.max().unwrap_or(0)
}
