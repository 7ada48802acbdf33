//! gpt-oss.

use super::{
    HEAD_DIM, LOGIT_STD, Layer, N_EMBD, N_FF, N_HEAD, N_HEAD_KV, Shape, Writer, attention_keys,
};

/// Shorter than the prompts of the tests, so that it matters.
const SLIDING_WINDOW: u32 = 16;
/// Standard deviation of the router's bias, against [`LOGIT_STD`].
const ROUTER_BIAS_STD: f32 = 2.0;
/// Standard deviation of the other biases.
const BIAS_STD: f32 = 0.2;

pub const WRITER: Writer = Writer {
    name: "gpt-oss",
    keys: |model, _| {
        attention_keys(model, N_HEAD_KV);
        model.keys(&[
            ("attention.sliding_window", SLIDING_WINDOW),
            ("feed_forward_length", N_FF),
            ("expert_feed_forward_length", N_FF),
        ]);
    },
    layer,
};

fn layer(layer: &mut Layer, shape: &Shape) {
    let kv = HEAD_DIM * N_HEAD_KV;
    layer.norm("attn_norm", N_EMBD);
    layer.attention(N_EMBD, N_HEAD_KV);
    for (part, n) in [
        ("attn_q", N_EMBD),
        ("attn_k", kv),
        ("attn_v", kv),
        ("attn_output", N_EMBD),
    ] {
        layer.normal_f32(&format!("{part}.bias"), &[n], BIAS_STD);
    }
    // One logit per head that takes its share of the softmax and gives nothing.
    layer.normal_f32("attn_sinks.weight", &[N_HEAD], 1.0);
    layer.norm("post_attention_norm", N_EMBD);
    layer.experts(shape, N_FF, LOGIT_STD);
    layer.normal_f32("ffn_gate_inp.bias", &[shape.n_expert], ROUTER_BIAS_STD);
    for (part, n) in [
        ("ffn_gate_exps", N_FF),
        ("ffn_up_exps", N_FF),
        ("ffn_down_exps", N_EMBD),
    ] {
        layer.normal_f32(&format!("{part}.bias"), &[n, shape.n_expert], BIAS_STD);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Rng,
        selection::{normal, sum, top},
    };
    use super::*;

    #[test]
    fn the_bias_changes_most_selections_and_does_not_make_them_all_the_same() {
        for Shape { n_expert, k, .. } in [Shape::GPT_OSS_20B, Shape::GPT_OSS_120B] {
            let mut rng = Rng::new(1);
            let bias = normal(&mut rng, n_expert, ROUTER_BIAS_STD);
            let (mut changed, mut distinct) = (0, std::collections::BTreeSet::new());
            for _ in 0..100 {
                let logits = normal(&mut rng, n_expert, LOGIT_STD);
                let biased = top(&sum(&logits, &bias), k);
                changed += u32::from(biased != top(&logits, k));
                distinct.insert(biased);
            }
            assert!(
                changed > 50 && distinct.len() > 90,
                "{changed} {distinct:?}"
            );
        }
    }
}
