//! Profiles: counts by context, layer and expert, of one capture or of several.
//!
//! ```text
//! statistics, profile, trace ─ read ─▶ Profile ─▶ merge ─▶ document
//!                                         └─────▶ diff, verify ─▶ stdout
//! ```
//!
//! Nothing here needs root, or the program that was traced. docs/profile.md explains the format, and what
//! is computed from it.

pub mod command;
pub mod counting;
pub mod diff;
pub mod document;
pub mod imatrix;
pub mod merge;
pub mod model;
pub mod read;
#[cfg(test)]
pub(crate) mod tests;
pub mod verify;

use std::cmp::Reverse;

use expert_trace_common::{MAX_EXPERTS, MAX_LAYERS};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

/// Name of the document's schema.
pub const SCHEMA_NAME: &str = "expert-trace-profile";
/// Its version: raised when a key changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;
/// Most contexts of a profile.
pub const MAX_CONTEXTS: usize = 4096;

/// Counts of one capture, or of several that were merged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// What this is.
    pub schema: Schema,
    /// Files that the counts come from.
    #[serde(default)]
    pub sources: Vec<String>,
    /// Model files, as `models` in the statistics has them.
    #[serde(default)]
    pub models: Vec<Value>,
    /// Index in `contexts` of the main context: that with most tokens, or of a merged profile the sum of
    /// such. `None` when no context routed a token.
    #[serde(default)]
    pub layers_context: Option<usize>,
    /// Counts of every context.
    pub contexts: Vec<ContextProfile>,
}

/// Name and version of a document's format.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schema {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: u32,
}

impl Default for Schema {
    fn default() -> Self {
        Self {
            name: SCHEMA_NAME.to_owned(),
            version: SCHEMA_VERSION,
        }
    }
}

/// Counts of one context, or the sum of several.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextProfile {
    /// Its index.
    pub id: usize,
    /// Index in `sources`; of a sum, that of its first context.
    #[serde(default)]
    pub source: usize,
    /// Index in `models`; `None` when it is not known.
    #[serde(default)]
    pub model: Option<usize>,
    /// Contexts that this is the sum of, ascending; empty for a context that was traced.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub summed: Vec<usize>,
    /// Counts by layer, ascending.
    pub layers: Vec<LayerProfile>,
}

/// Counts of one layer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerProfile {
    /// Layer of the model.
    pub layer_id: u16,
    /// Experts to choose from.
    #[serde(default)]
    pub n_expert: Option<u32>,
    /// Experts chosen per token; the largest seen.
    #[serde(default)]
    pub k: Option<u32>,
    /// Whether its routing was seen in every pass, as in the statistics.
    #[serde(default)]
    pub coverage: Option<String>,
    /// Tokens routed: the sum of the next two.
    pub total_tokens: u64,
    /// Those of prompts.
    pub prefill_tokens: u64,
    /// Those generated.
    pub decode_tokens: u64,
    /// Activated experts, most activations first, then by ascending id.
    pub experts: Vec<ExpertProfile>,
}

/// Counts of one expert.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertProfile {
    /// Expert.
    pub expert_id: u32,
    /// Tokens it was chosen for: the sum of the next two.
    pub activations: u64,
    /// Those of prompts.
    pub prefill: u64,
    /// Those generated.
    pub decode: u64,
}

/// Why a profile does not have the context that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ContextError {
    /// There is none.
    #[error("it has no contexts: nothing was routed")]
    Empty,
    /// Its contexts have other numbers.
    #[error("it has no context {id}: its contexts are 0 to {last}")]
    Missing {
        /// The number that was asked for.
        id: usize,
        /// The last one that there is.
        last: usize,
    },
    /// No context is the main one.
    #[error("no context of it routed a token that is counted")]
    NoMain,
}

impl Profile {
    /// That of these contexts, of which the one with most tokens is the main one.
    pub fn new(sources: Vec<String>, models: Vec<Value>, contexts: Vec<ContextProfile>) -> Self {
        Self {
            schema: Schema::default(),
            sources,
            models,
            layers_context: main_context(&contexts),
            contexts,
        }
    }

    /// The context of that number, by default the main one.
    ///
    /// # Errors
    /// When there is none.
    pub fn context(&self, id: Option<usize>) -> Result<&ContextProfile, ContextError> {
        let last = self
            .contexts
            .len()
            .checked_sub(1)
            .ok_or(ContextError::Empty)?;
        let id = id.or(self.layers_context).ok_or(ContextError::NoMain)?;
        self.contexts
            .get(id)
            .ok_or(ContextError::Missing { id, last })
    }

    /// The file that a context comes from.
    pub fn source_of(&self, context: &ContextProfile) -> &str {
        self.sources.get(context.source).map_or("", String::as_str)
    }

    /// Puts layers and experts in their order, and leaves out experts without activation.
    pub fn put_in_order(&mut self) {
        for context in &mut self.contexts {
            context.layers.sort_by_key(|layer| layer.layer_id);
            for layer in &mut context.layers {
                layer.put_in_order();
            }
        }
    }

    /// Whether it is what [`put_in_order`](Self::put_in_order) leaves, all numbers are those of things that
    /// are there, and all sums are right. Gives what is wrong.
    ///
    /// # Errors
    /// When it is not.
    pub fn check(&self) -> Result<(), String> {
        let contexts = self.contexts.len();
        if contexts > MAX_CONTEXTS {
            return Err(format!(
                "it has {contexts} contexts, and not more than {MAX_CONTEXTS} are read"
            ));
        }
        if self.layers_context.is_some_and(|main| main >= contexts) {
            return Err("layers_context is no context".into());
        }
        for (index, context) in self.contexts.iter().enumerate() {
            let known = context.id == index
                && context.source < self.sources.len()
                && context.model.is_none_or(|model| model < self.models.len())
                && context.summed.is_sorted_by(|a, b| a < b)
                && context.summed.iter().all(|part| {
                    let part = self.contexts.get(*part);
                    part.is_some_and(|part| part.summed.is_empty() && part.id != index)
                });
            if !known {
                return Err(format!(
                    "context {index} has another id, or names a source, model or context that is not there"
                ));
            }
            context
                .check()
                .map_err(|why| format!("context {index}: {why}"))?;
        }
        Ok(())
    }
}

impl ContextProfile {
    /// The layer of that number.
    pub fn layer(&self, id: u16) -> Option<&LayerProfile> {
        let index = self
            .layers
            .binary_search_by_key(&id, |layer| layer.layer_id);
        self.layers.get(index.ok()?)
    }

    /// Tokens of the layer that has most of them.
    pub fn tokens(&self) -> u64 {
        let tokens = self.layers.iter().map(|layer| layer.total_tokens);
        tokens.max().unwrap_or(0)
    }

    fn check(&self) -> Result<(), String> {
        let mut before = None;
        for layer in &self.layers {
            let id = layer.layer_id;
            if id >= MAX_LAYERS {
                return Err(format!("layer {id} is beyond the limit of {MAX_LAYERS}"));
            }
            if before == Some(id) {
                return Err(format!("layer {id} is there twice"));
            }
            layer.check().map_err(|why| format!("layer {id}: {why}"))?;
            before = Some(id);
        }
        Ok(())
    }
}

impl LayerProfile {
    /// (token, expert) pairs. Those of a profile that was checked have a sum.
    pub fn activations(&self) -> u64 {
        self.experts.iter().map(|expert| expert.activations).sum()
    }

    /// How many experts it has, or where that is not known, as many as the last one that was activated needs.
    pub fn width(&self) -> usize {
        let needed = self.experts.iter().map(|expert| expert.expert_id + 1).max();
        self.n_expert.max(needed).unwrap_or(0) as usize
    }

    /// Activations of every expert, by its number.
    pub fn dense(&self) -> Vec<u64> {
        let mut dense = vec![0; self.width()];
        for expert in &self.experts {
            dense[expert.expert_id as usize] = expert.activations;
        }
        dense
    }

    fn put_in_order(&mut self) {
        self.experts.retain(|expert| expert.activations > 0);
        self.experts
            .sort_by_key(|expert| (Reverse(expert.activations), expert.expert_id));
    }

    fn check(&self) -> Result<(), String> {
        let limit = u32::try_from(MAX_EXPERTS).unwrap_or(u32::MAX);
        let sum_is = |parts: [u64; 2], sum| parts[0].checked_add(parts[1]) == Some(sum);
        if let Some(n_expert) = self.n_expert.filter(|n_expert| *n_expert > limit) {
            return Err(format!(
                "{n_expert} experts are beyond the limit of {limit}"
            ));
        }
        if !sum_is([self.prefill_tokens, self.decode_tokens], self.total_tokens) {
            return Err("total_tokens is not the sum of prefill_tokens and decode_tokens".into());
        }
        let end = self.n_expert.unwrap_or(limit);
        let mut seen = vec![false; end as usize];
        let mut activations = 0_u64;
        for expert in &self.experts {
            let id = expert.expert_id;
            match seen.get_mut(id as usize) {
                None => return Err(format!("expert {id} is none of its {end}")),
                Some(true) => return Err(format!("expert {id} is there twice")),
                Some(seen) => *seen = true,
            }
            if !sum_is([expert.prefill, expert.decode], expert.activations) {
                return Err(format!(
                    "the activations of expert {id} are not the sum of its prefill and decode"
                ));
            }
            activations = activations
                .checked_add(expert.activations)
                .ok_or("its activations have no sum of 64 bits")?;
        }
        Ok(())
    }
}

impl ExpertProfile {
    /// Those of activations by expert, of prompts and of generated tokens, that are there: most activations
    /// first.
    pub fn list(activations: &[[u64; 2]]) -> Vec<Self> {
        let mut experts: Vec<Self> = (0..)
            .zip(activations)
            .map(|(expert_id, [prefill, decode])| Self {
                expert_id,
                activations: prefill + decode,
                prefill: *prefill,
                decode: *decode,
            })
            .filter(|expert| expert.activations > 0)
            .collect();
        experts.sort_by_key(|expert| (Reverse(expert.activations), expert.expert_id));
        experts
    }
}

/// Index of the context with most tokens, of equals the first; none when no context has counts. Where no
/// tokens are known, as of an import, the first one with counts.
pub fn main_context(contexts: &[ContextProfile]) -> Option<usize> {
    let counted = |context: &&ContextProfile| {
        let mut layers = context.layers.iter();
        layers.any(|layer| layer.total_tokens > 0 || !layer.experts.is_empty())
    };
    let counted = contexts.iter().rev().filter(counted);
    let main = counted.max_by_key(|context| context.tokens());
    main.map(|context| context.id)
}

/// Text that others have written, fit for a terminal: control characters replaced.
pub fn printable(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}
