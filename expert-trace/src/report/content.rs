//! All that a report shows.

use serde::Serialize;

use super::{colour, facts::Facts};
use crate::{
    analyze::{Analysis, input::Input},
    profile::LayerProfile,
};

/// A report's content, as the page's script reads it.
#[derive(Debug, Serialize)]
pub struct Content {
    /// Name of the file.
    pub file: String,
    /// Version of the program that makes the report.
    pub tool: String,
    /// Of the capture.
    pub facts: Facts,
    /// Layers, ascending.
    pub layers: Vec<LayerContent>,
    /// What `analyze` says.
    pub analysis: Analysis,
    /// Colours from cold to hot, at equal distances.
    pub scale: Vec<String>,
}

/// Counts of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LayerContent {
    /// Layer of the model.
    pub id: u16,
    /// Whether its routing was seen in every pass, where that is known.
    pub coverage: Option<String>,
    /// Tokens of prompts, and generated ones.
    pub tokens: [u64; 2],
    /// Activations of prompts, by expert.
    pub prefill: Vec<u64>,
    /// The same of generated tokens.
    pub decode: Vec<u64>,
}

impl Content {
    /// That of a file which was read and analyzed.
    pub fn new(file: String, input: &Input, analysis: Analysis, facts: Facts) -> Self {
        Self {
            file,
            tool: format!("expert-trace {}", env!("CARGO_PKG_VERSION")),
            facts,
            layers: input.context.layers.iter().map(LayerContent::of).collect(),
            analysis,
            scale: colour::scale(),
        }
    }
}

impl LayerContent {
    /// That of counts.
    pub fn of(layer: &LayerProfile) -> Self {
        let ids = layer.experts.iter().map(|expert| expert.expert_id + 1);
        let n = ids.max().unwrap_or(0).max(layer.n_expert.unwrap_or(0)) as usize;
        let (mut prefill, mut decode) = (vec![0; n], vec![0; n]);
        for expert in &layer.experts {
            let id = expert.expert_id as usize;
            (prefill[id], decode[id]) = (expert.prefill, expert.decode);
        }
        Self {
            id: layer.layer_id,
            coverage: layer.coverage.clone(),
            tokens: [layer.prefill_tokens, layer.decode_tokens],
            prefill,
            decode,
        }
    }

    /// Activations by expert.
    pub fn activations(&self) -> impl Iterator<Item = u64> {
        self.prefill
            .iter()
            .zip(&self.decode)
            .map(|(prefill, decode)| prefill + decode)
    }
}
