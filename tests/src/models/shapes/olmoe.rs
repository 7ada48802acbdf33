//! OLMoE.

use super::{LOGIT_STD, Layer, N_EMBD, N_FF, N_HEAD, Shape, Writer, attention_keys};

pub const WRITER: Writer = Writer {
    name: "olmoe",
    keys: |model, _| {
        attention_keys(model, N_HEAD);
        model.keys(&[("feed_forward_length", N_FF)]);
    },
    layer,
};

fn layer(layer: &mut Layer, shape: &Shape) {
    layer.norm("attn_norm", N_EMBD);
    // Over all heads together, so that there are as many for keys as for queries.
    layer.norm("attn_q_norm", N_EMBD);
    layer.norm("attn_k_norm", N_EMBD);
    layer.attention(N_EMBD, N_HEAD);
    layer.norm("ffn_norm", N_EMBD);
    layer.experts(shape, N_FF, LOGIT_STD);
}
