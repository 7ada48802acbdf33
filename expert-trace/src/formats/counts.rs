//! Counts of one context as rows of numbers.

use crate::profile::{ContextProfile, LayerProfile};

/// The layer with most experts decides how wide a table is.
pub fn widest(context: &ContextProfile) -> usize {
    let widths = context.layers.iter().map(LayerProfile::width);
    widths.max().unwrap_or(0)
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
pub fn by_phase(layer: &LayerProfile, width: usize) -> Vec<[u64; 2]> {
    let mut counts = vec![[0; 2]; width];
    for expert in &layer.experts {
        counts[expert.expert_id as usize] = [expert.prefill, expert.decode];
    }
    counts
}

/// The largest number of experts per token.
pub fn k(context: &ContextProfile) -> u32 {
    let ks = context.layers.iter().filter_map(|layer| layer.k);
    ks.max().unwrap_or(0)
}
