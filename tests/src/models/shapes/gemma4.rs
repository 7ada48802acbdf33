//! Gemma 4 with experts, as the 26B-A4B.

use super::{
    HEAD_DIM, LOGIT_STD, Layer, N_EMBD, N_FF, N_HEAD, N_HEAD_KV, Shape, Writer, attention_keys,
};

/// What the router's input is multiplied by, after a norm of its own and a division by the root of its
/// length.
const ROUTER_SCALE_STD: f32 = 8.0;
/// Every so many layers, one has full attention. The others see a sliding window.
const FULL_ATTENTION_INTERVAL: u32 = 2;
/// Shorter than the prompts of the tests, so that it matters.
const SLIDING_WINDOW: u32 = 16;
/// Width of the network that each layer has beside its experts.
const DENSE_N_FF: u32 = 64;

pub const WRITER: Writer = Writer {
    name: "gemma4",
    keys: |model, shape| {
        attention_keys(model, N_HEAD_KV);
        model.keys(&[
            ("attention.sliding_window", SLIDING_WINDOW),
            ("attention.key_length_swa", HEAD_DIM),
            ("attention.value_length_swa", HEAD_DIM),
            ("embedding_length_per_layer_input", 0),
            ("feed_forward_length", DENSE_N_FF),
            ("expert_feed_forward_length", N_FF),
        ]);
        let windows: Vec<u32> = (0..shape.layers)
            .map(|index| u32::from(!has_full_attention(index)))
            .collect();
        model.of_layers("attention.sliding_window_pattern", &windows);
    },
    layer,
};

fn has_full_attention(index: u32) -> bool {
    (index + 1).is_multiple_of(FULL_ATTENTION_INTERVAL)
}

fn layer(layer: &mut Layer, shape: &Shape) {
    if layer.index == 0 {
        // One for all layers of full attention.
        let name = "rope_freqs.weight".to_owned();
        layer.model.norm(name, HEAD_DIM / 2);
    }
    layer.norm("attn_norm", N_EMBD);
    layer.attention(HEAD_DIM * N_HEAD, N_HEAD_KV);
    layer.norm("attn_q_norm", HEAD_DIM);
    layer.norm("attn_k_norm", HEAD_DIM);
    layer.norm("post_attention_norm", N_EMBD);
    layer.norm("ffn_norm", N_EMBD);
    layer.feed_forward("", DENSE_N_FF);
    layer.norm("post_ffw_norm_1", N_EMBD);
    layer.norm("pre_ffw_norm_2", N_EMBD);
    layer.norm("post_ffw_norm_2", N_EMBD);
    layer.norm("post_ffw_norm", N_EMBD);
    layer.normal_f32("ffn_gate_inp.scale", &[N_EMBD], ROUTER_SCALE_STD);
    layer.router(shape, LOGIT_STD);
    let n_expert = shape.n_expert;
    layer.weights("ffn_gate_up_exps", &[N_EMBD, 2 * N_FF, n_expert]);
    layer.weights("ffn_down_exps", &[N_FF, N_EMBD, n_expert]);
    layer.normal_f32("ffn_down_exps.scale", &[n_expert], 1.0);
}
