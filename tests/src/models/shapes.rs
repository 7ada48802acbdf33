//! Small models of random weights in the shapes of the models that are traced in the field: same
//! architecture, same kind of router, same numbers of experts; few layers and narrow ones.
//!
//! Which experts a token gets is known only to an oracle that runs the model; what is known beforehand
//! is the [`Shape`].

mod deepseek2;
mod gemma4;
mod gpt_oss;
mod grovemoe;
mod mixtral;
mod nemotron_h_moe;
mod olmoe;
mod qwen3next;

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Result, ensure};

use super::{
    ModelSpec, N_HEAD, N_HEAD_KV, PlainArchitecture, file::Data, file::WeightType, model::Model,
    rng::Rng, write_random,
};

/// Width of the residual.
const N_EMBD: u32 = 64;
const HEAD_DIM: u32 = N_EMBD / N_HEAD;
/// Width of one expert, unless an architecture has reasons for another.
const N_FF: u32 = 32;
/// Standard deviation of the logits of a softmax router, enough to keep neighbouring ones apart.
const LOGIT_STD: f32 = 3.0;

/// An architecture of llama.cpp, with the kind of router it stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `deepseek2`: sigmoid of the logits, plus a bias that counts for the selection only; the experts
    /// come from the best groups. The first layer is dense, the others have a shared expert.
    /// Multi-head latent attention.
    DeepSeek2,
    /// `gemma4`: softmax; the router has a norm and scales of its own, and one tensor holds gate and up
    /// projections of the experts. A dense network beside them. Every other layer sees a sliding window.
    Gemma4,
    /// `gpt-oss`: biased logits, softmax over the chosen; experts with biases. Every other layer sees
    /// a sliding window; attention sinks.
    GptOss,
    /// `grovemoe`: softmax. A second block of experts in each layer, fewer and larger ones, which the same
    /// choice stands for.
    GroveMoe,
    /// `llama` with experts: softmax.
    Mixtral,
    /// `nemotron_h_moe`: sigmoid of the logits, plus a bias that counts for the selection only; another k
    /// in each layer. Experts without a gate, and a shared one. Other layers are recurrent (Mamba 2) or
    /// have attention.
    NemotronHMoe,
    /// `olmoe`: softmax.
    Olmoe,
    /// `qwen3moe`: softmax. What [`write_random`] writes.
    Qwen3Moe,
    /// `qwen3next`: softmax; a shared expert with a gate of its own. Three of four layers are recurrent
    /// (gated delta net), the others have full attention.
    Qwen3Next,
}

/// A model to write, and what a trace must tell of it.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Decides all that the other fields do not.
    pub architecture: Architecture,
    /// All layers that an ordinary decode goes through, dense ones included.
    pub layers: u32,
    /// Blocks after them that predict further tokens.
    pub nextn: u32,
    /// Experts in a layer that has experts, shared ones not counted.
    pub n_expert: u32,
    /// Experts chosen per token; the most, where layers differ.
    pub k: u32,
    /// Models that differ only in this differ in all weights, and in routing.
    pub seed: u64,
}

impl Shape {
    /// 64 experts in 8 groups, 6 of them chosen from 4 groups, after one dense layer. As in
    /// DeepSeek-V3, with fewer experts.
    pub const DEEPSEEK2: Shape = Shape::new(Architecture::DeepSeek2, 64, 6);
    /// 128 experts, 8 of them chosen, as in Gemma 4 26B-A4B.
    pub const GEMMA4: Shape = Shape::new(Architecture::Gemma4, 128, 8);
    /// 32 experts, 4 of them chosen.
    pub const GPT_OSS_20B: Shape = Shape::new(Architecture::GptOss, 32, 4);
    /// 128 experts, 4 of them chosen.
    pub const GPT_OSS_120B: Shape = Shape::new(Architecture::GptOss, 128, 4);
    /// 128 experts, 8 of them chosen, and 64 of the second block, as in GroveMoE-Inst.
    pub const GROVEMOE: Shape = Shape::new(Architecture::GroveMoe, 128, 8);
    /// 8 experts, 2 of them chosen.
    pub const MIXTRAL: Shape = Shape::new(Architecture::Mixtral, 8, 2);
    /// 32 experts, 2, 6 and 3 of them chosen.
    pub const NEMOTRON_H_MOE: Shape = Shape {
        layers: nemotron_h_moe::LAYERS,
        ..Shape::new(Architecture::NemotronHMoe, 32, nemotron_h_moe::MAX_K)
    };
    /// 64 experts, 8 of them chosen.
    pub const OLMOE: Shape = Shape::new(Architecture::Olmoe, 64, 8);
    /// 128 experts, 8 of them chosen, as in Qwen3-30B-A3B.
    pub const QWEN3MOE: Shape = Shape::new(Architecture::Qwen3Moe, 128, 8);
    /// 512 experts, 10 of them chosen, and a block that predicts a further token, as in
    /// Qwen3-Next-80B-A3B.
    pub const QWEN3NEXT: Shape = Shape {
        nextn: 1,
        ..Shape::new(Architecture::Qwen3Next, 512, 10)
    };

    const fn new(architecture: Architecture, n_expert: u32, k: u32) -> Shape {
        Shape {
            architecture,
            layers: 4,
            nextn: 0,
            n_expert,
            k,
            seed: 1,
        }
    }

    /// The layers with experts that an ordinary decode goes through.
    pub fn layers_with_experts(&self) -> Vec<u32> {
        (0..self.layers)
            .filter(|layer| self.k_of(*layer) > 0)
            .collect()
    }

    /// Experts that a layer chooses per token; 0 for one without experts.
    pub fn k_of(&self, layer: u32) -> u32 {
        match self.architecture {
            Architecture::DeepSeek2 if layer < deepseek2::DENSE_LAYERS => 0,
            Architecture::NemotronHMoe => nemotron_h_moe::k(layer),
            _ => self.k,
        }
    }

    /// Layers that are recurrent, of those that an ordinary decode goes through.
    pub fn recurrent_layers(&self) -> u32 {
        match self.architecture {
            Architecture::NemotronHMoe => nemotron_h_moe::RECURRENT_LAYERS,
            Architecture::Qwen3Next => qwen3next::recurrent_layers(self.layers),
            _ => 0,
        }
    }

    /// Layers that choose groups of experts first.
    pub fn grouped_layers(&self) -> usize {
        match self.architecture {
            Architecture::DeepSeek2 => self.layers_with_experts().len(),
            _ => 0,
        }
    }

    /// Experts of the second block that each layer has.
    pub fn second_experts(&self) -> Option<u32> {
        (self.architecture == Architecture::GroveMoe).then(|| grovemoe::second_experts(self))
    }

    fn check(&self) -> Result<()> {
        ensure!(
            0 < self.k && self.k < self.n_expert,
            "cannot choose {} of {} experts",
            self.k,
            self.n_expert
        );
        ensure!(
            !self.layers_with_experts().is_empty(),
            "no layer of {} has experts",
            self.layers
        );
        ensure!(
            self.nextn == 0 || self.architecture == Architecture::Qwen3Next && self.nextn == 1,
            "{:?} is not written with {} NextN blocks",
            self.architecture,
            self.nextn
        );
        match self.architecture {
            Architecture::DeepSeek2 => deepseek2::check(self),
            Architecture::NemotronHMoe => nemotron_h_moe::check(self),
            _ => Ok(()),
        }
    }

    fn qwen3moe(&self) -> ModelSpec {
        ModelSpec {
            architecture: PlainArchitecture::Qwen3Moe,
            layers: self.layers,
            n_expert: self.n_expert,
            k: self.k,
            n_embd: N_EMBD,
            n_ff: N_FF,
            experts: WeightType::F16,
            seed: self.seed,
            scales: false,
        }
    }
}

/// Writes a model of `shape` with random weights to `path`, with the tokenizer of the
/// vocabulary-only GGUF file `vocab`. The same shape and vocabulary give the same bytes on every
/// machine.
///
/// # Errors
///
/// A `shape` that makes no model, a `vocab` without tokenizer, or a failure to read or write.
pub fn write_shape(path: &Path, vocab: &Path, shape: &Shape) -> Result<()> {
    shape.check()?;
    let writer = match shape.architecture {
        Architecture::DeepSeek2 => &deepseek2::WRITER,
        Architecture::Gemma4 => &gemma4::WRITER,
        Architecture::GptOss => &gpt_oss::WRITER,
        Architecture::GroveMoe => &grovemoe::WRITER,
        Architecture::Mixtral => &mixtral::WRITER,
        Architecture::NemotronHMoe => &nemotron_h_moe::WRITER,
        Architecture::Olmoe => &olmoe::WRITER,
        Architecture::Qwen3Moe => return write_random(path, vocab, &shape.qwen3moe()),
        Architecture::Qwen3Next => &qwen3next::WRITER,
    };
    writer.write(path, vocab, shape)
}

/// What is different in an architecture.
struct Writer {
    /// `general.architecture`.
    name: &'static str,
    /// Adds the keys.
    keys: fn(&mut Model, &Shape),
    /// Adds a layer, or a NextN block.
    layer: fn(&mut Layer, &Shape),
}

impl Writer {
    fn write(&self, path: &Path, vocab: &Path, shape: &Shape) -> Result<()> {
        let mut model = Model::new(vocab, self.name, "expert-trace test model", N_EMBD)?;
        let all = shape.layers + shape.nextn;
        model.keys(&[("block_count", all), ("expert_count", shape.n_expert)]);
        if shape.nextn > 0 {
            model.keys(&[("nextn_predict_layers", shape.nextn)]);
        }
        let ks: Vec<u32> = (0..shape.layers).map(|layer| shape.k_of(layer)).collect();
        let different: BTreeSet<u32> = ks.iter().copied().filter(|k| *k > 0).collect();
        if different.len() > 1 {
            model.of_layers("expert_used_count", &ks);
        } else {
            model.keys(&[("expert_used_count", shape.k)]);
        }
        (self.keys)(&mut model, shape);
        model.embedding(weights(N_EMBD));
        for index in 0..all {
            let model = &mut model;
            (self.layer)(&mut Layer { model, index }, shape);
        }
        model.output(weights(N_EMBD));
        model.write(path, &mut Rng::new(shape.seed))
    }
}

/// Weights that keep the variance of an input of length `n`.
fn weights(n: u32) -> Data {
    Data::NormalF16 {
        std: 1.0 / (n as f32).sqrt(),
    }
}

/// Adds the keys of ordinary attention.
fn attention_keys(model: &mut Model, n_head_kv: u32) {
    model.keys(&[
        ("attention.head_count", N_HEAD),
        ("attention.head_count_kv", n_head_kv),
        ("attention.key_length", HEAD_DIM),
        ("attention.value_length", HEAD_DIM),
        ("rope.dimension_count", HEAD_DIM),
    ]);
}

/// The tensors of one layer while they are being added.
struct Layer<'a> {
    model: &'a mut Model,
    index: u32,
}

impl Layer<'_> {
    fn name(&self, part: &str) -> String {
        format!("blk.{}.{part}", self.index)
    }

    fn norm(&mut self, part: &str, n: u32) {
        self.model.norm(self.name(&format!("{part}.weight")), n);
    }

    /// Adds weights that are multiplied with inputs as long as the first dimension.
    fn weights(&mut self, part: &str, shape: &[u32]) {
        let name = self.name(&format!("{part}.weight"));
        self.model.tensor(name, shape, weights(shape[0]));
    }

    /// Adds a tensor that llama.cpp takes in F32 only, such as a bias. `part` is its whole name within
    /// the layer.
    fn normal_f32(&mut self, part: &str, shape: &[u32], std: f32) {
        let name = self.name(part);
        self.model.tensor(name, shape, Data::NormalF32 { std });
    }

    /// Adds the projections of ordinary attention; `queries` is what that of the queries gives.
    fn attention(&mut self, queries: u32, n_head_kv: u32) {
        let kv = HEAD_DIM * n_head_kv;
        self.weights("attn_q", &[N_EMBD, queries]);
        self.weights("attn_k", &[N_EMBD, kv]);
        self.weights("attn_v", &[N_EMBD, kv]);
        self.weights("attn_output", &[N_EMBD, N_EMBD]);
    }

    /// Adds the rates by which heads of a recurrent layer forget: negative, and different for each.
    /// `part` is the tensor's whole name within the layer.
    fn rates(&mut self, part: &str, shape: &[u32]) {
        let heads: u32 = shape.iter().product();
        let rates = (1..=heads).map(|head| -0.25 * head as f32).collect();
        let name = self.name(part);
        self.model.tensor(name, shape, Data::F32(rates));
    }

    /// Adds a router whose logits have the standard deviation `logit_std`.
    fn router(&mut self, shape: &Shape, logit_std: f32) {
        // The router's input has an RMS of 1.
        let std = logit_std / (N_EMBD as f32).sqrt();
        self.normal_f32("ffn_gate_inp.weight", &[N_EMBD, shape.n_expert], std);
    }

    /// Adds a router whose logits have the standard deviation `logit_std`, and the experts.
    fn experts(&mut self, shape: &Shape, n_ff: u32, logit_std: f32) {
        self.router(shape, logit_std);
        let n_expert = shape.n_expert;
        self.weights("ffn_gate_exps", &[N_EMBD, n_ff, n_expert]);
        self.weights("ffn_up_exps", &[N_EMBD, n_ff, n_expert]);
        self.weights("ffn_down_exps", &[n_ff, N_EMBD, n_expert]);
    }

    /// Adds a feed-forward network without experts, or a shared expert: `suffix` ends the names of its
    /// tensors.
    fn feed_forward(&mut self, suffix: &str, n_ff: u32) {
        self.weights(&format!("ffn_gate{suffix}"), &[N_EMBD, n_ff]);
        self.weights(&format!("ffn_up{suffix}"), &[N_EMBD, n_ff]);
        self.weights(&format!("ffn_down{suffix}"), &[n_ff, N_EMBD]);
    }
}

/// What routers make of random logits, to see what their parts are good for.
#[cfg(test)]
mod selection {
    use super::*;

    /// `n` draws of a normal distribution.
    pub fn normal(rng: &mut Rng, n: u32, std: f32) -> Vec<f32> {
        (0..n).map(|_| rng.normal() * std).collect()
    }

    /// Element by element.
    pub fn sum(a: &[f32], b: &[f32]) -> Vec<f32> {
        a.iter().zip(b).map(|(a, b)| a + b).collect()
    }

    /// Indices of the `k` largest, in ascending order.
    pub fn top(scores: &[f32], k: u32) -> Vec<usize> {
        let mut ids: Vec<usize> = (0..scores.len()).collect();
        ids.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        ids.truncate(k as usize);
        ids.sort_unstable();
        ids
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_that_are_not_written_are_refused() {
        for shape in [
            Shape {
                nextn: 1,
                ..Shape::MIXTRAL
            },
            Shape {
                nextn: 2,
                ..Shape::QWEN3NEXT
            },
            Shape {
                layers: 8,
                ..Shape::NEMOTRON_H_MOE
            },
            Shape {
                layers: 1,
                ..Shape::DEEPSEEK2
            },
        ] {
            assert!(shape.check().is_err(), "{shape:?}");
        }
    }

    #[test]
    fn k_may_differ_by_layer() {
        let ks = |shape: Shape| -> Vec<u32> { (0..shape.layers).map(|l| shape.k_of(l)).collect() };
        assert_eq!(ks(Shape::DEEPSEEK2), [0, 6, 6, 6]);
        assert_eq!(ks(Shape::NEMOTRON_H_MOE), [0, 2, 0, 6, 0, 3]);
        assert_eq!(Shape::NEMOTRON_H_MOE.layers_with_experts(), [1, 3, 5]);
    }
}
