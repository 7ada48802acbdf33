//! Mixtral: the `llama` architecture with experts.

use super::{LOGIT_STD, Layer, N_EMBD, N_FF, N_HEAD_KV, Shape, Writer, attention_keys};

pub const WRITER: Writer = Writer {
    name: "llama",
    keys: |model, _| {
        attention_keys(model, N_HEAD_KV);
        model.keys(&[("feed_forward_length", N_FF)]);
    },
    layer,
};

fn layer(layer: &mut Layer, shape: &Shape) {
    layer.norm("attn_norm", N_EMBD);
    layer.attention(N_EMBD, N_HEAD_KV);
    layer.norm("ffn_norm", N_EMBD);
    layer.experts(shape, N_FF, LOGIT_STD);
}
