//! Nemotron-H with experts: the `nemotron_h_moe` architecture, with another k in each layer that has
//! experts, as Nemotron 3 Puzzle has it.

use anyhow::{Result, ensure};

use super::{Data, HEAD_DIM, Layer, Model, N_EMBD, N_FF, N_HEAD, N_HEAD_KV, Shape, Writer};

/// A layer does one thing.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Mamba 2, which is recurrent.
    Mamba,
    Attention,
    /// So many of the experts are chosen.
    Experts(u32),
}

const KINDS: [Kind; 6] = [
    Kind::Mamba,
    Kind::Experts(2),
    Kind::Attention,
    Kind::Experts(6),
    Kind::Mamba,
    Kind::Experts(3),
];
/// All layers.
pub const LAYERS: u32 = KINDS.len() as u32;
/// Those with Mamba 2.
pub const RECURRENT_LAYERS: u32 = {
    let (mut number, mut layer) = (0, 0);
    while layer < KINDS.len() {
        number += matches!(KINDS[layer], Kind::Mamba) as u32;
        layer += 1;
    }
    number
};
/// The largest k.
pub const MAX_K: u32 = 6;

const SHARED_N_FF: u32 = 32;
/// Width that the experts work in; the router does not.
const LATENT: u32 = 32;
/// Standard deviation of the logits: with larger ones the sigmoid leaves no distance between the best.
const LOGIT_STD: f32 = 1.0;
/// Standard deviation of the selection bias. The sigmoids of the logits have one of about 0.2.
const SELECTION_BIAS_STD: f32 = 0.1;

/// Mamba 2: width, heads, groups of heads, width of the state, and the tokens that its convolution sees.
const INNER: u32 = 64;
const N_MAMBA_HEAD: u32 = 4;
const N_GROUP: u32 = 2;
const STATE: u32 = 16;
const CONV_KERNEL: u32 = 4;

pub const WRITER: Writer = Writer {
    name: "nemotron_h_moe",
    keys,
    layer,
};

/// Experts that are chosen in a layer; 0 in one without.
pub fn k(index: u32) -> u32 {
    match KINDS.get(index as usize) {
        Some(Kind::Experts(k)) => *k,
        _ => 0,
    }
}

pub fn check(shape: &Shape) -> Result<()> {
    ensure!(
        shape.layers == LAYERS && shape.k == MAX_K,
        "nemotron_h_moe has {LAYERS} layers and chooses up to {MAX_K} experts, not {} and {}",
        shape.layers,
        shape.k
    );
    Ok(())
}

fn keys(model: &mut Model, _: &Shape) {
    // The kind of a layer follows from these two.
    let n_head_kv = KINDS.map(|kind| u32::from(kind == Kind::Attention) * N_HEAD_KV);
    let n_ff = KINDS.map(|kind| u32::from(matches!(kind, Kind::Experts(_))) * N_FF);
    model.of_layers("attention.head_count_kv", &n_head_kv);
    model.of_layers("feed_forward_length", &n_ff);
    model.keys(&[
        ("attention.head_count", N_HEAD),
        ("attention.key_length", HEAD_DIM),
        ("attention.value_length", HEAD_DIM),
        ("rope.dimension_count", HEAD_DIM),
        ("ssm.conv_kernel", CONV_KERNEL),
        ("ssm.inner_size", INNER),
        ("ssm.state_size", STATE),
        ("ssm.time_step_rank", N_MAMBA_HEAD),
        ("ssm.group_count", N_GROUP),
        ("expert_feed_forward_length", N_FF),
        ("expert_shared_feed_forward_length", SHARED_N_FF),
        ("expert_shared_count", 1),
        ("moe_latent_size", LATENT),
    ]);
    model.f32("attention.layer_norm_epsilon", 1e-6);
    model.f32("expert_weights_scale", 2.5);
    model.bool("expert_weights_norm", true);
}

fn layer(layer: &mut Layer, shape: &Shape) {
    layer.norm("attn_norm", N_EMBD);
    match KINDS[layer.index as usize] {
        Kind::Mamba => mamba(layer),
        Kind::Attention => layer.attention(HEAD_DIM * N_HEAD, N_HEAD_KV),
        Kind::Experts(_) => experts(layer, shape),
    }
}

fn mamba(layer: &mut Layer) {
    let convolved = INNER + 2 * N_GROUP * STATE;
    layer.weights("ssm_in", &[N_EMBD, INNER + convolved + N_MAMBA_HEAD]);
    layer.normal_f32("ssm_conv1d.weight", &[CONV_KERNEL, convolved], 0.5);
    layer.normal_f32("ssm_conv1d.bias", &[convolved], 0.2);
    layer.normal_f32("ssm_dt.bias", &[N_MAMBA_HEAD], 1.0);
    layer.rates("ssm_a", &[1, N_MAMBA_HEAD]);
    layer.normal_f32("ssm_d", &[1, N_MAMBA_HEAD], 1.0);
    let norm = layer.name("ssm_norm.weight");
    let ones = Data::F32(vec![1.0; INNER as usize]);
    layer.model.tensor(norm, &[INNER / N_GROUP, N_GROUP], ones);
    layer.weights("ssm_out", &[INNER, N_EMBD]);
}

/// Experts without a gate, and a shared one.
fn experts(layer: &mut Layer, shape: &Shape) {
    layer.router(shape, LOGIT_STD);
    layer.normal_f32("exp_probs_b.bias", &[shape.n_expert], SELECTION_BIAS_STD);
    layer.weights("ffn_latent_down", &[N_EMBD, LATENT]);
    layer.weights("ffn_up_exps", &[LATENT, N_FF, shape.n_expert]);
    layer.weights("ffn_down_exps", &[N_FF, LATENT, shape.n_expert]);
    layer.weights("ffn_latent_up", &[LATENT, N_EMBD]);
    layer.weights("ffn_up_shexp", &[N_EMBD, SHARED_N_FF]);
    layer.weights("ffn_down_shexp", &[SHARED_N_FF, N_EMBD]);
}
