//! GroveMoE.

use super::{HEAD_DIM, LOGIT_STD, Layer, N_EMBD, N_FF, N_HEAD_KV, Shape, Writer, attention_keys};

/// Experts that share one of the second block.
const PER_GROUP: u32 = 2;
/// Width of an expert of the second block.
const SECOND_N_FF: u32 = 64;

pub const WRITER: Writer = Writer {
    name: "grovemoe",
    keys: |model, _| {
        attention_keys(model, N_HEAD_KV);
        model.keys(&[
            ("feed_forward_length", N_FF),
            ("expert_feed_forward_length", N_FF),
            ("expert_chunk_feed_forward_length", SECOND_N_FF),
            ("experts_per_group", PER_GROUP),
        ]);
        model.f32("expert_group_scale", 0.05);
    },
    layer,
};

/// Experts of the second block.
pub fn second_experts(shape: &Shape) -> u32 {
    shape.n_expert / PER_GROUP
}

fn layer(layer: &mut Layer, shape: &Shape) {
    layer.norm("attn_norm", N_EMBD);
    layer.attention(N_EMBD, N_HEAD_KV);
    layer.norm("attn_q_norm", HEAD_DIM);
    layer.norm("attn_k_norm", HEAD_DIM);
    layer.norm("ffn_norm", N_EMBD);
    layer.experts(shape, N_FF, LOGIT_STD);
    let n_expert = second_experts(shape);
    layer.weights("ffn_gate_chexps", &[N_EMBD, SECOND_N_FF, n_expert]);
    layer.weights("ffn_up_chexps", &[N_EMBD, SECOND_N_FF, n_expert]);
    layer.weights("ffn_down_chexps", &[SECOND_N_FF, N_EMBD, n_expert]);
}
