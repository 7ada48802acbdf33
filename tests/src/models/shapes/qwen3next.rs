//! Qwen3-Next.

use super::{HEAD_DIM, LOGIT_STD, Layer, N_EMBD, N_HEAD, N_HEAD_KV, Shape, Writer, attention_keys};

/// Every so many layers, one has full attention. The others are recurrent: gated delta nets.
const FULL_ATTENTION_INTERVAL: u32 = 4;
/// Width of one expert: there are many, and the file is to stay small.
const N_FF: u32 = 16;
const SHARED_N_FF: u32 = 32;

/// A gated delta net: heads of keys and queries, heads of values, the dimensions of each, and the
/// tokens that its convolution sees.
const N_KEY_HEAD: u32 = 2;
const N_VALUE_HEAD: u32 = 4;
const STATE_DIM: u32 = 16;
const CONV_KERNEL: u32 = 4;
const KEYS: u32 = N_KEY_HEAD * STATE_DIM;
const VALUES: u32 = N_VALUE_HEAD * STATE_DIM;

pub const WRITER: Writer = Writer {
    name: "qwen3next",
    keys: |model, _| {
        attention_keys(model, N_HEAD_KV);
        model.keys(&[
            ("full_attention_interval", FULL_ATTENTION_INTERVAL),
            ("ssm.conv_kernel", CONV_KERNEL),
            ("ssm.inner_size", VALUES),
            ("ssm.state_size", STATE_DIM),
            ("ssm.time_step_rank", N_VALUE_HEAD),
            ("ssm.group_count", N_KEY_HEAD),
            ("feed_forward_length", SHARED_N_FF),
            ("expert_feed_forward_length", N_FF),
            ("expert_shared_feed_forward_length", SHARED_N_FF),
        ]);
    },
    layer,
};

fn has_full_attention(layer: u32) -> bool {
    (layer + 1).is_multiple_of(FULL_ATTENTION_INTERVAL)
}

/// Of so many first layers, those that are recurrent.
pub fn recurrent_layers(layers: u32) -> u32 {
    let recurrent = (0..layers).filter(|layer| !has_full_attention(*layer));
    recurrent.count() as u32
}

fn layer(layer: &mut Layer, shape: &Shape) {
    layer.norm("attn_norm", N_EMBD);
    let is_nextn = layer.index >= shape.layers;
    if is_nextn || has_full_attention(layer.index) {
        full_attention(layer);
    } else {
        gated_delta_net(layer);
    }
    layer.norm("post_attention_norm", N_EMBD);
    layer.experts(shape, N_FF, LOGIT_STD);
    // The gate of the shared expert has one row, and no dimension for it.
    layer.weights("ffn_gate_inp_shexp", &[N_EMBD]);
    layer.feed_forward("_shexp", SHARED_N_FF);
    if is_nextn {
        // Put together from a token and what the model made of those before it.
        layer.norm("nextn.enorm", N_EMBD);
        layer.norm("nextn.hnorm", N_EMBD);
        layer.weights("nextn.eh_proj", &[2 * N_EMBD, N_EMBD]);
        layer.norm("nextn.shared_head_norm", N_EMBD);
    }
}

fn full_attention(layer: &mut Layer) {
    // Each head has a query and a gate for what it gives.
    layer.attention(2 * HEAD_DIM * N_HEAD, N_HEAD_KV);
    layer.norm("attn_q_norm", HEAD_DIM);
    layer.norm("attn_k_norm", HEAD_DIM);
}

fn gated_delta_net(layer: &mut Layer) {
    let convolved = 2 * KEYS + VALUES;
    layer.weights("attn_qkv", &[N_EMBD, convolved]);
    layer.weights("attn_gate", &[N_EMBD, VALUES]);
    layer.normal_f32("ssm_conv1d.weight", &[CONV_KERNEL, convolved], 0.5);
    layer.normal_f32("ssm_dt.bias", &[N_VALUE_HEAD], 1.0);
    layer.rates("ssm_a", &[N_VALUE_HEAD]);
    layer.weights("ssm_ba", &[N_EMBD, 2 * N_VALUE_HEAD]);
    layer.norm("ssm_norm", STATE_DIM);
    layer.weights("ssm_out", &[VALUES, N_EMBD]);
}
