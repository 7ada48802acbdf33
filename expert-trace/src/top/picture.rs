//! What is shown of a document: the counts of a context by layer and expert, and how far they are to be
//! believed.

use crate::{
    model::Coverage,
    stats::{ContextStats, LayerStats, Stats},
    summary,
};

/// A document, as far as it is shown.
#[derive(Clone, Debug, Default)]
pub struct Picture {
    /// Contexts that have routed.
    pub contexts: Vec<ContextPicture>,
    /// Which of them routed most.
    pub main: usize,
    /// Whether nothing was lost.
    pub complete: bool,
    /// That, in words.
    pub integrity: String,
    /// What hits took, in percent of the time.
    pub cost_percent: Option<f64>,
    /// The same for each token, in nanoseconds.
    pub ns_per_token: Option<f64>,
    /// Contexts that computed tokens, and showed no routing.
    pub not_visible: usize,
}

/// Counts of a context.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ContextPicture {
    /// Its process.
    pub pid: u32,
    /// Its model, if that is known.
    pub model: Option<String>,
    /// Passes counted.
    pub passes: u64,
    /// Layers, also those that were not seen.
    pub layers: Vec<LayerPicture>,
    /// Layers whose routing was not seen, or not always.
    pub unseen_layers: usize,
}

/// Counts of a layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerPicture {
    /// Layer of the model.
    pub number: u16,
    /// Experts chosen per token, if known.
    pub k: Option<u32>,
    /// Tokens of prompts, and generated ones.
    pub tokens: [u64; 2],
    /// The same of activations, by expert.
    pub experts: Vec<[u64; 2]>,
    /// Whether its routing was seen in no pass.
    pub unseen: bool,
}

/// Which tokens are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phases {
    /// All.
    #[default]
    All,
    /// Those of prompts.
    Prefill,
    /// Generated ones.
    Decode,
}

impl Phases {
    /// The next one.
    pub fn next(self) -> Self {
        match self {
            Self::All => Self::Prefill,
            Self::Prefill => Self::Decode,
            Self::Decode => Self::All,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all tokens",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }

    /// The part of two counts that is shown.
    pub fn of(self, [prefill, decode]: [u64; 2]) -> u64 {
        match self {
            Self::All => prefill + decode,
            Self::Prefill => prefill,
            Self::Decode => decode,
        }
    }
}

impl Picture {
    /// That of a document.
    pub fn of(stats: &Stats) -> Self {
        let model = |context: &ContextStats| {
            let path = &stats.models[context.model?].path;
            Some(path.rsplit('/').next().unwrap_or(path).to_owned())
        };
        let contexts = stats.contexts.iter().map(|context| ContextPicture {
            pid: context.pid,
            model: model(context),
            passes: context.passes,
            layers: context.layers.iter().map(LayerPicture::of).collect(),
            unseen_layers: context
                .layers
                .iter()
                .filter(|layer| layer.coverage != Coverage::Observed)
                .count(),
        });
        Self {
            contexts: contexts.collect(),
            main: stats.layers_context.unwrap_or(0),
            complete: stats.integrity.complete,
            integrity: summary::integrity_line(stats),
            cost_percent: stats.cost.window_percent,
            ns_per_token: stats.cost.ns_per_token,
            not_visible: stats.not_visible.len(),
        }
    }

    /// Tokens of all contexts.
    pub fn tokens(&self) -> u64 {
        let contexts = self.contexts.iter();
        contexts.map(|of| of.tokens().iter().sum::<u64>()).sum()
    }
}

impl ContextPicture {
    /// Tokens of prompts, and generated ones, of the layer that has most.
    pub fn tokens(&self) -> [u64; 2] {
        let layers = self.layers.iter().map(|layer| layer.tokens);
        layers
            .max_by_key(|tokens| tokens.iter().sum::<u64>())
            .unwrap_or_default()
    }

    /// Experts of the layer that has most.
    pub fn width(&self) -> usize {
        let widths = self.layers.iter().map(|layer| layer.experts.len());
        widths.max().unwrap_or(0)
    }
}

impl LayerPicture {
    fn of(layer: &LayerStats) -> Self {
        let ids = layer.experts.iter().map(|expert| expert.expert_id + 1);
        let known = layer.n_expert.map_or(0, |n| n as usize);
        let mut experts = vec![[0; 2]; ids.max().unwrap_or(0).max(known)];
        for expert in &layer.experts {
            experts[expert.expert_id] = [expert.prefill, expert.decode];
        }
        Self {
            number: layer.layer_id,
            k: layer.k,
            tokens: [layer.prefill_tokens, layer.decode_tokens],
            experts,
            unseen: layer.coverage == Coverage::NotVisible,
        }
    }

    /// Activations of the experts, by id.
    pub fn counts(&self, phases: Phases) -> Vec<u64> {
        let experts = self.experts.iter();
        experts.map(|counts| phases.of(*counts)).collect()
    }
}
