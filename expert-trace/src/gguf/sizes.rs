//! How many bytes tensors take, and what of a layer each of its experts.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{
    Gguf, TensorInfo,
    shape::{layer_part, of_one_expert},
};

/// What a layer with experts takes in the model's files, in bytes. Padding between tensors is in neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LayerBytes {
    /// Layer of the model.
    pub layer_id: u32,
    /// One of its experts: its share of all tensors that have a part for each expert, biases and scales
    /// among them.
    pub expert_bytes: u64,
    /// All other tensors of the layer: attention, norms, router, shared experts, a second block of experts.
    pub dense_bytes: u64,
}

impl TensorInfo {
    /// Bytes of its data; `None` when its type is not known, or its shape cannot be.
    pub fn bytes(&self) -> Option<u64> {
        let (block, bytes) = block(self.ggml_type)?;
        let row = self.shape.first().copied().unwrap_or(1);
        let mut others = self.shape.iter().skip(1);
        let rows = others.try_fold(1_u64, |product, n| product.checked_mul(*n))?;
        let blocks = row.is_multiple_of(block).then_some(row / block)?;
        blocks.checked_mul(bytes)?.checked_mul(rows)
    }
}

/// Elements that a type stores together, and the bytes they take, by `enum ggml_type`: `ggml.h` and
/// `ggml-common.h` of llama.cpp b11434.
fn block(ggml_type: u32) -> Option<(u64, u64)> {
    Some(match ggml_type {
        // F32, F16, BF16, F64
        0 => (1, 4),
        1 | 30 => (1, 2),
        28 => (1, 8),
        // I8, I16, I32, I64
        24 => (1, 1),
        25 => (1, 2),
        26 => (1, 4),
        27 => (1, 8),
        // Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1
        2 => (32, 18),
        3 => (32, 20),
        6 => (32, 22),
        7 => (32, 24),
        8 => (32, 34),
        9 => (32, 36),
        // Q2_K to Q6_K, Q8_K
        10 => (256, 84),
        11 => (256, 110),
        12 => (256, 144),
        13 => (256, 176),
        14 => (256, 210),
        15 => (256, 292),
        // IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S, IQ4_NL, IQ3_S, IQ2_S, IQ4_XS, IQ1_M
        16 => (256, 66),
        17 => (256, 74),
        18 => (256, 98),
        19 => (256, 50),
        20 => (32, 18),
        21 => (256, 110),
        22 => (256, 82),
        23 => (256, 136),
        29 => (256, 56),
        // TQ1_0, TQ2_0
        34 => (256, 54),
        35 => (256, 66),
        // MXFP4, NVFP4, Q1_0, Q2_0
        39 => (32, 17),
        40 => (64, 36),
        41 => (128, 18),
        42 => (64, 18),
        _ => return None,
    })
}

/// What these layers take, which have so many experts; those without of which a tensor's size is not known.
pub(super) fn layer_bytes(shards: &[Gguf], layers: &[u32], n_expert: u32) -> Vec<LayerBytes> {
    #[derive(Default)]
    struct Sums {
        experts: u64,
        dense: u64,
    }
    let mut sums: BTreeMap<u32, Sums> = layers.iter().map(|id| (*id, Sums::default())).collect();
    let mut unknown = BTreeSet::new();
    for tensor in shards.iter().flat_map(|shard| &shard.tensors) {
        let Some((layer, part)) = layer_part(&tensor.name) else {
            continue;
        };
        let Some(of_layer) = sums.get_mut(&layer) else {
            continue;
        };
        let sum = match is_of_experts(tensor, part, n_expert) {
            true => &mut of_layer.experts,
            false => &mut of_layer.dense,
        };
        match tensor.bytes().and_then(|bytes| sum.checked_add(bytes)) {
            Some(all) => *sum = all,
            None => {
                unknown.insert(layer);
            }
        }
    }
    let known = sums.into_iter().filter(|(layer, sums)| {
        let has_experts = n_expert > 0 && sums.experts > 0;
        has_experts && !unknown.contains(layer)
    });
    known
        .map(|(layer_id, Sums { experts, dense })| LayerBytes {
            layer_id,
            expert_bytes: experts / u64::from(n_expert),
            dense_bytes: dense,
        })
        .collect()
}

/// Whether each expert has a part of it, or it is that of one expert.
fn is_of_experts(tensor: &TensorInfo, part: &str, n_expert: u32) -> bool {
    let name = part.split('.').next().unwrap_or_default();
    let stacked = name.starts_with("ffn_") && name.ends_with("_exps");
    (stacked && tensor.shape.last() == Some(&n_expert.into())) || of_one_expert(part).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{
        ModelShape,
        tests::{Builder, moe},
    };

    fn tensor(ggml_type: u32, shape: &[u64]) -> TensorInfo {
        TensorInfo {
            name: "t".to_owned(),
            shape: shape.to_vec(),
            ggml_type,
            offset: 0,
        }
    }

    #[test]
    fn tensors_have_whole_blocks_in_a_row() {
        for (ggml_type, shape, bytes) in [
            (0, &[128, 8][..], Some(4096)),
            (0, &[], Some(4)),
            (1, &[2048, 768, 128], Some(2 * 2048 * 768 * 128)),
            (12, &[2048, 768], Some(2048 / 256 * 144 * 768)),
            (14, &[768, 2048], Some(768 / 256 * 210 * 2048)),
            (39, &[64, 3], Some(102)),
            (12, &[128, 2], None),
            (4, &[32], None),
            (1000, &[32], None),
            (0, &[u64::MAX], None),
            (8, &[32, 1 << 40, 1 << 40], None),
            (0, &[4, 0], Some(0)),
        ] {
            assert_eq!(
                tensor(ggml_type, shape).bytes(),
                bytes,
                "{ggml_type} {shape:?}"
            );
        }
    }

    #[test]
    fn experts_share_what_is_stacked() {
        let shape = |builder: Builder| ModelShape::from_ggufs(&[builder.gguf()]).unwrap();
        let of = |layer_id, expert_bytes, dense_bytes| LayerBytes {
            layer_id,
            expert_bytes,
            dense_bytes,
        };
        let model = moe()
            // Weights of 8 experts, with a bias and scales, and what all tokens go through.
            .tensor("blk.0.ffn_gate_inp.weight", &[64, 8])
            .tensor("blk.0.ffn_up_exps.weight", &[64, 32, 8])
            .typed("blk.0.ffn_down_exps.weight", &[32, 64, 8], 8)
            .tensor("blk.0.ffn_up_exps.bias", &[32, 8])
            .tensor("blk.0.ffn_down_exps.scale", &[8])
            .tensor("blk.0.ffn_up_shexp.weight", &[64, 16])
            .tensor("blk.0.ffn_down_chexps.weight", &[16, 64, 2])
            // A tensor for each of two of 8 experts.
            .tensor("blk.1.ffn_gate_inp.weight", &[64, 8])
            .tensor("blk.1.ffn_up.0.weight", &[64, 32])
            .tensor("blk.1.ffn_up.7.weight", &[64, 32])
            // A type of tomorrow.
            .tensor("blk.2.ffn_gate_inp.weight", &[64, 8])
            .tensor("blk.2.ffn_down_exps.weight", &[32, 64, 8])
            .typed("blk.2.ffn_up_exps.weight", &[64, 32, 8], 1000);
        let expert = 64 * 32 * 4 + 64 * 34 + 32 * 4 + 4;
        let dense = 64 * 8 * 4 + 64 * 16 * 4 + 16 * 64 * 2 * 4;
        assert_eq!(
            shape(model).layer_bytes,
            [of(0, expert, dense), of(1, 2 * 64 * 32 * 4 / 8, 64 * 8 * 4)]
        );
        assert_eq!(shape(moe()).layer_bytes, []);
    }

    #[test]
    fn files_of_a_model_count_together() {
        let shard = |no| Builder::default().u32("split.no", no);
        let shards = [
            moe().u32("split.no", 0).u32("split.count", 3),
            shard(1).tensor("blk.1.ffn_gate_inp.weight", &[64, 8]),
            shard(2).tensor("blk.1.ffn_up_exps.weight", &[64, 32, 8]),
        ];
        let shards = shards.map(Builder::gguf);
        let expected = LayerBytes {
            layer_id: 1,
            expert_bytes: 64 * 32 * 4,
            dense_bytes: 64 * 8 * 4,
        };
        let shape = ModelShape::from_ggufs(&shards).unwrap();
        assert_eq!(shape.layer_bytes, [expected]);
    }
}
