//! DeepSeek-V3: the `deepseek2` architecture with sigmoid gating, a selection bias and groups.

use anyhow::{Result, ensure};

use super::{Layer, Model, N_EMBD, N_FF, N_HEAD, Shape, Writer};

/// Layers at the start that have no experts.
pub const DENSE_LAYERS: u32 = 1;
const DENSE_N_FF: u32 = 128;
const N_EXPERT_SHARED: u32 = 1;

/// Groups of experts; those with the largest sums of their two best scores are used.
const N_GROUP: u32 = 8;
const N_GROUP_USED: u32 = 4;
/// Standard deviation of the logits: with larger ones the sigmoid leaves no distance between the best.
const LOGIT_STD: f32 = 1.0;
/// Standard deviation of the selection bias. The sigmoids of the logits have one of about 0.2.
const SELECTION_BIAS_STD: f32 = 0.1;
/// `LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID`.
const SIGMOID: u32 = 2;

/// Multi-head latent attention: ranks that queries, and keys with values, are compressed to.
const Q_LORA_RANK: u32 = 48;
const KV_LORA_RANK: u32 = 32;
/// A head's dimensions with and without rotary position embedding, and of its values.
const ROPE_DIM: u32 = 16;
const NOPE_DIM: u32 = 16;
const VALUE_DIM: u32 = 16;

pub const WRITER: Writer = Writer {
    name: "deepseek2",
    keys,
    layer,
};

pub fn check(shape: &Shape) -> Result<()> {
    let Shape { n_expert, k, .. } = *shape;
    ensure!(
        n_expert.is_multiple_of(N_GROUP) && n_expert >= 2 * N_GROUP,
        "{n_expert} experts do not make {N_GROUP} groups of at least two"
    );
    ensure!(
        k <= n_expert / N_GROUP * N_GROUP_USED,
        "{N_GROUP_USED} groups of {N_GROUP} do not have {k} of {n_expert} experts"
    );
    Ok(())
}

fn keys(model: &mut Model, _: &Shape) {
    model.keys(&[
        ("attention.head_count", N_HEAD),
        // What is cached is shared by all heads: the compressed keys and values, and the rotated part
        // of the keys.
        ("attention.head_count_kv", 1),
        ("attention.key_length", KV_LORA_RANK + ROPE_DIM),
        ("attention.value_length", KV_LORA_RANK),
        ("attention.key_length_mla", NOPE_DIM + ROPE_DIM),
        ("attention.value_length_mla", VALUE_DIM),
        ("attention.q_lora_rank", Q_LORA_RANK),
        ("attention.kv_lora_rank", KV_LORA_RANK),
        ("rope.dimension_count", ROPE_DIM),
        ("feed_forward_length", DENSE_N_FF),
        ("leading_dense_block_count", DENSE_LAYERS),
        ("expert_feed_forward_length", N_FF),
        ("expert_shared_count", N_EXPERT_SHARED),
        ("expert_group_count", N_GROUP),
        ("expert_group_used_count", N_GROUP_USED),
        ("expert_gating_func", SIGMOID),
    ]);
    model.f32("expert_weights_scale", 2.5);
    model.bool("expert_weights_norm", true);
}

fn layer(layer: &mut Layer, shape: &Shape) {
    attention(layer);
    layer.norm("ffn_norm", N_EMBD);
    if layer.index < DENSE_LAYERS {
        layer.feed_forward("", DENSE_N_FF);
    } else {
        layer.experts(shape, N_FF, LOGIT_STD);
        layer.normal_f32("exp_probs_b.bias", &[shape.n_expert], SELECTION_BIAS_STD);
        layer.feed_forward("_shexp", N_FF * N_EXPERT_SHARED);
    }
}

fn attention(layer: &mut Layer) {
    layer.norm("attn_norm", N_EMBD);
    layer.norm("attn_q_a_norm", Q_LORA_RANK);
    layer.norm("attn_kv_a_norm", KV_LORA_RANK);
    let queries = N_HEAD * (NOPE_DIM + ROPE_DIM);
    layer.weights("attn_q_a", &[N_EMBD, Q_LORA_RANK]);
    layer.weights("attn_q_b", &[Q_LORA_RANK, queries]);
    layer.weights("attn_kv_a_mqa", &[N_EMBD, KV_LORA_RANK + ROPE_DIM]);
    layer.weights("attn_k_b", &[NOPE_DIM, KV_LORA_RANK, N_HEAD]);
    layer.weights("attn_v_b", &[KV_LORA_RANK, VALUE_DIM, N_HEAD]);
    layer.weights("attn_output", &[N_HEAD * VALUE_DIM, N_EMBD]);
}

#[cfg(test)]
mod tests {
    use super::super::{
        Rng,
        selection::{normal, sum, top},
    };
    use super::*;

    /// The selection as DeepSeek-V3 defines it.
    fn grouped(scores: &[f32], k: u32) -> Vec<usize> {
        let size = scores.len() / N_GROUP as usize;
        let group_scores: Vec<f32> = scores
            .chunks(size)
            .map(|group| top(group, 2).iter().map(|e| group[*e]).sum())
            .collect();
        let used = top(&group_scores, N_GROUP_USED);
        let masked: Vec<f32> = (0..)
            .zip(scores)
            .map(|(e, score)| {
                let is_used = used.contains(&(e / size));
                if is_used { *score } else { f32::NEG_INFINITY }
            })
            .collect();
        top(&masked, k)
    }

    #[test]
    fn bias_and_groups_change_many_selections_and_do_not_make_them_all_the_same() {
        let Shape { n_expert, k, .. } = Shape::DEEPSEEK2;
        let mut rng = Rng::new(1);
        let bias = normal(&mut rng, n_expert, SELECTION_BIAS_STD);
        let (mut by_bias, mut by_groups) = (0, 0);
        let mut distinct = std::collections::BTreeSet::new();
        for _ in 0..100 {
            let logits = normal(&mut rng, n_expert, LOGIT_STD);
            let gates: Vec<f32> = logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
            let biased = sum(&gates, &bias);
            let chosen = grouped(&biased, k);
            by_bias += u32::from(chosen != grouped(&gates, k));
            by_groups += u32::from(chosen != top(&biased, k));
            distinct.insert(chosen);
        }
        assert!(
            by_bias > 50 && by_groups > 30 && distinct.len() > 90,
            "{by_bias} {by_groups} {distinct:?}"
        );
    }

    #[test]
    fn shapes_that_groups_do_not_fit_are_refused() {
        for (n_expert, k) in [(60, 6), (8, 2), (64, 33)] {
            let shape = Shape {
                n_expert,
                k,
                ..Shape::DEEPSEEK2
            };
            assert!(check(&shape).is_err(), "{shape:?}");
        }
    }
}
