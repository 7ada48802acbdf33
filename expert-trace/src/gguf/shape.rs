//! What of a model the tracer has to know, put together from all files the model is split into.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::{Gguf, GgufError, LayerBytes, Value, sizes::layer_bytes};

/// Twice `LLAMA_MAX_LAYERS` of llama.cpp b11434.
const MAX_LAYERS: u64 = 1024;
/// Four times `LLAMA_MAX_EXPERTS` of llama.cpp b11434.
const MAX_EXPERTS: u64 = 4096;

/// Experts chosen per token (k).
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(untagged)]
pub enum ExpertsUsed {
    /// The same number in every layer.
    Uniform(u32),
    /// One number per layer, 0 for layers without experts.
    PerLayer(Vec<u32>),
}

impl ExpertsUsed {
    /// k of `layer`; 0 for a layer that the model does not have.
    pub fn of(&self, layer: u32) -> u32 {
        match self {
            ExpertsUsed::Uniform(k) => *k,
            ExpertsUsed::PerLayer(ks) => ks.get(layer as usize).copied().unwrap_or(0),
        }
    }
}

/// Layers and experts of a model. Numbers are bounded: at most 1024 layers, 4096 experts, and no
/// k above the number of experts.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ModelShape {
    /// `general.architecture`, such as `qwen3moe`.
    pub arch: String,
    /// `general.name`, for people.
    pub name: Option<String>,
    /// `<arch>.block_count`: all layers, NextN blocks included.
    pub layers: u32,
    /// `<arch>.expert_count`, shared experts not included; 0 for a dense model.
    pub n_expert: u32,
    /// `<arch>.expert_used_count`, which may be one number or one per layer.
    pub n_expert_used: ExpertsUsed,
    /// `<arch>.nextn_predict_layers`: how many of the last layers are NextN blocks, which only predict
    /// further tokens, and do not run unless llama.cpp is asked to speculate with them.
    pub nextn_predict_layers: u32,
    /// Layers with both a router and routed experts, ascending.
    pub moe_layers: Vec<u32>,
    /// What those layers take, ascending; without those of which it is not known.
    pub layer_bytes: Vec<LayerBytes>,
    /// `<arch>.expert_gating_func`: what turns the router's logits into weights, as llama.cpp numbers
    /// it; `None` where the architecture alone decides.
    pub expert_gating_func: Option<u32>,
    /// `<arch>.expert_group_count`: groups the experts are in; 0 when they are in none.
    pub expert_group_count: u32,
    /// `<arch>.expert_group_used_count`: groups that are kept before experts are chosen.
    pub expert_group_used_count: u32,
    /// Experts of the second block that each layer has (`ffn_down_chexps`, GroveMoE); `None` for other
    /// models.
    pub second_block_experts: Option<u32>,
    /// Layers whose router has a bias (`ffn_gate_inp.bias`).
    #[serde(skip)]
    pub router_bias: BTreeSet<u32>,
    /// Layers that choose by other values than they weigh with (`exp_probs_b`).
    #[serde(skip)]
    pub selection_bias: BTreeSet<u32>,
    /// Layers that choose by token (`ffn_gate_tid2eid`).
    #[serde(skip)]
    pub chosen_by_token: BTreeSet<u32>,
}

impl ModelShape {
    /// Takes keys from the first file, as llama.cpp does, and tensors from all of them.
    ///
    /// # Errors
    ///
    /// [`GgufError::Key`] when a key is missing or its value is beyond the limits of this type, or when
    /// these are not all the files of the model, in order.
    pub fn from_ggufs(shards: &[Gguf]) -> Result<ModelShape, GgufError> {
        let missing = |key: &str| GgufError::Key {
            key: key.to_owned(),
            problem: "is missing",
        };
        let first = shards
            .first()
            .ok_or_else(|| missing("general.architecture"))?;
        let arch = first
            .arch()
            .ok_or_else(|| missing("general.architecture"))?;
        check_split(shards)?;
        let keys = ArchKeys { gguf: first, arch };
        let layers = keys
            .number("block_count", MAX_LAYERS)?
            .ok_or_else(|| missing(&keys.name("block_count")))?;
        let n_expert = keys.number("expert_count", MAX_EXPERTS)?.unwrap_or(0);
        let moe_layers = moe_layers(shards, layers);
        Ok(ModelShape {
            arch: arch.to_owned(),
            name: first.string("general.name").map(str::to_owned),
            layers,
            n_expert,
            n_expert_used: keys.experts_used(layers, n_expert)?,
            nextn_predict_layers: keys
                .number("nextn_predict_layers", layers.into())?
                .unwrap_or(0),
            layer_bytes: layer_bytes(shards, &moe_layers, n_expert),
            moe_layers,
            expert_gating_func: keys.number("expert_gating_func", u32::MAX.into())?,
            expert_group_count: keys.number("expert_group_count", MAX_EXPERTS)?.unwrap_or(0),
            expert_group_used_count: keys
                .number("expert_group_used_count", MAX_EXPERTS)?
                .unwrap_or(0),
            second_block_experts: second_block_experts(shards),
            router_bias: layers_with(shards, layers, |part| part == "ffn_gate_inp.bias"),
            selection_bias: layers_with(shards, layers, |part| {
                part == "exp_probs_b" || part.starts_with("exp_probs_b.")
            }),
            chosen_by_token: layers_with(shards, layers, |part| {
                part.starts_with("ffn_gate_tid2eid")
            }),
        })
    }

    /// Layers that every decode goes through: all before the NextN blocks.
    pub fn main_layers(&self) -> u32 {
        self.layers.saturating_sub(self.nextn_predict_layers)
    }

    /// The first NextN block, if there is one.
    pub fn first_nextn(&self) -> Option<u16> {
        let first = (self.nextn_predict_layers > 0).then(|| self.main_layers())?;
        u16::try_from(first).ok()
    }
}

/// The keys of one architecture.
struct ArchKeys<'a> {
    gguf: &'a Gguf,
    arch: &'a str,
}

impl ArchKeys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn invalid(&self, key: &str, problem: &'static str) -> GgufError {
        GgufError::Key {
            key: self.name(key),
            problem,
        }
    }

    fn number(&self, key: &str, max: u64) -> Result<Option<u32>, GgufError> {
        let Some(value) = self.gguf.kv.get(&self.name(key)) else {
            return Ok(None);
        };
        value
            .as_u64()
            .filter(|n| *n <= max)
            .and_then(|n| u32::try_from(n).ok())
            .map(Some)
            .ok_or_else(|| self.invalid(key, "is not a number in its range"))
    }

    /// Mirrors `llama_model_loader::get_key_or_arr`: one number, or as many as there are layers.
    fn experts_used(&self, layers: u32, n_expert: u32) -> Result<ExpertsUsed, GgufError> {
        let key = "expert_used_count";
        let Some(Value::Ints(ks)) = self.gguf.kv.get(&self.name(key)) else {
            let k = self.number(key, n_expert.into())?.unwrap_or(0);
            return Ok(ExpertsUsed::Uniform(k));
        };
        if ks.len() != layers as usize {
            return Err(self.invalid(key, "does not have one entry per layer"));
        }
        ks.iter()
            .map(|k| u32::try_from(*k).ok().filter(|k| *k <= n_expert))
            .collect::<Option<Vec<u32>>>()
            .map(ExpertsUsed::PerLayer)
            .ok_or_else(|| self.invalid(key, "has an entry that is not a number of experts"))
    }
}

/// Makes sure that no file of the model is missing, as `llama_model_loader` does: a layer whose tensors
/// are in it would look like one without experts.
fn check_split(shards: &[Gguf]) -> Result<(), GgufError> {
    let invalid = |key: &str, problem| GgufError::Key {
        key: key.to_owned(),
        problem,
    };
    let count = |gguf: &Gguf| gguf.u64("split.count").unwrap_or(0).max(1);
    if shards.first().map(count) != Some(shards.len() as u64) {
        let problem = "is not the number of files that the name tells of";
        return Err(invalid("split.count", problem));
    }
    let in_order = |(index, shard): (u64, &Gguf)| shard.u64("split.no") == Some(index);
    if shards.len() > 1 && !(0..).zip(shards).all(in_order) {
        return Err(invalid("split.no", "is not that of the file's name"));
    }
    Ok(())
}

/// Layers below `layers` with a router and with routed experts. A router alone is no proof: a shard
/// can be missing, and some architectures keep one in layers that run dense.
fn moe_layers(shards: &[Gguf], layers: u32) -> Vec<u32> {
    #[derive(Default)]
    struct Seen {
        router: bool,
        experts: bool,
    }
    let mut seen: BTreeMap<u32, Seen> = BTreeMap::new();
    for tensor in shards.iter().flat_map(|shard| &shard.tensors) {
        let Some((layer, part)) = layer_part(&tensor.name).filter(|(layer, _)| *layer < layers)
        else {
            continue;
        };
        match part {
            "ffn_gate_inp.weight" => seen.entry(layer).or_default().router = true,
            "ffn_gate_exps.weight"
            | "ffn_up_exps.weight"
            | "ffn_down_exps.weight"
            | "ffn_gate_up_exps.weight" => seen.entry(layer).or_default().experts = true,
            _ if of_one_expert(part).is_some() => seen.entry(layer).or_default().experts = true,
            _ => {}
        }
    }
    seen.retain(|_, seen| seen.router && seen.experts);
    seen.into_keys().collect()
}

/// What the experts of a second block are stacked to.
fn second_block_experts(shards: &[Gguf]) -> Option<u32> {
    let mut tensors = shards.iter().flat_map(|shard| &shard.tensors);
    let stacked = tensors.find(|tensor| {
        layer_part(&tensor.name).is_some_and(|(_, part)| part == "ffn_down_chexps.weight")
    })?;
    let experts = stacked.shape.get(2).filter(|n| **n <= MAX_EXPERTS)?;
    u32::try_from(*experts).ok()
}

/// The expert of `ffn_{gate,up,down}.<expert>.weight`, as files have it that were made before a layer's
/// experts were one tensor (Mixtral, 2023 and early 2024).
pub(super) fn of_one_expert(part: &str) -> Option<u32> {
    ["ffn_gate.", "ffn_up.", "ffn_down."]
        .iter()
        .filter_map(|prefix| part.strip_prefix(prefix)?.strip_suffix(".weight"))
        .find_map(|expert| expert.parse().ok())
}

/// Layers below `layers` that have a tensor of this kind.
fn layers_with(shards: &[Gguf], layers: u32, is_it: impl Fn(&str) -> bool) -> BTreeSet<u32> {
    let tensors = shards.iter().flat_map(|shard| &shard.tensors);
    tensors
        .filter_map(|tensor| layer_part(&tensor.name))
        .filter(|(layer, part)| *layer < layers && is_it(part))
        .map(|(layer, _)| layer)
        .collect()
}

/// Splits `blk.<layer>.<part>`.
pub(super) fn layer_part(name: &str) -> Option<(u32, &str)> {
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((layer.parse().ok()?, part))
}

/// All files of the model that `path` belongs to, in order: its siblings when `path` is named
/// `<prefix>-<number>-of-<total>.gguf` with five digits each (`llama_split_path` in llama.cpp), and
/// `path` alone otherwise. Does not look whether the files exist.
pub fn shard_paths(path: &Path) -> Vec<PathBuf> {
    let total = path.file_name().and_then(|name| {
        let (prefix, total) = split_name(name.to_str()?)?;
        Some((prefix.to_owned(), total))
    });
    match total {
        None => vec![path.to_owned()],
        Some((prefix, total)) => (1..=total)
            .map(|i| path.with_file_name(format!("{prefix}-{i:05}-of-{total:05}.gguf")))
            .collect(),
    }
}

/// Splits the name of a shard into its prefix and the number of shards.
fn split_name(name: &str) -> Option<(&str, u32)> {
    fn five_digits(s: &str) -> Option<u32> {
        (s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse().ok())?
    }
    let (rest, total) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (prefix, number) = rest.rsplit_once('-')?;
    let (number, total) = (five_digits(number)?, five_digits(total)?);
    (1..=total).contains(&number).then_some((prefix, total))
}

#[cfg(test)]
impl ModelShape {
    /// A model of so many layers, of which these have 8 experts, 2 of them chosen per token.
    pub fn with_experts_in(layers: u32, moe_layers: &[u32]) -> Self {
        let is_moe = u32::from(!moe_layers.is_empty());
        Self {
            arch: "qwen3moe".to_owned(),
            name: None,
            layers,
            n_expert: 8 * is_moe,
            n_expert_used: ExpertsUsed::Uniform(2 * is_moe),
            nextn_predict_layers: 0,
            moe_layers: moe_layers.to_vec(),
            layer_bytes: Vec::new(),
            expert_gating_func: None,
            expert_group_count: 0,
            expert_group_used_count: 0,
            second_block_experts: None,
            router_bias: BTreeSet::new(),
            selection_bias: BTreeSet::new(),
            chosen_by_token: BTreeSet::new(),
        }
    }
}
