//! `imatrix-counts`: counts as llama-imatrix has them in its GGUF files.
//!
//! `imatrix.cpp` (b11434) stores, for every weight that it has seen, `<weight>.counts`: F32 `[1, n]` with
//! the rows that each of its n matrices was used for. Weights of experts have as many as there are
//! experts, so that the same counts are there for each of a layer's weights; others have one.

use std::io::{Read, Seek, Write};

use anyhow::{Context as _, anyhow, ensure};

use super::csv::tokens;
use crate::profile::{ContextProfile, ExpertProfile, LayerProfile, Profile, imatrix};

/// From here on, an F32 cannot tell neighbouring integers apart.
pub const EXACT: u64 = imatrix::EXACT_F32 as u64;

/// Weights of experts that get counts.
const WRITTEN: [&str; 3] = ["ffn_down_exps", "ffn_gate_exps", "ffn_up_exps"];
/// `GGUF_DEFAULT_ALIGNMENT`.
const ALIGNMENT: usize = 32;

/// Numbers of `enum gguf_type` and `enum ggml_type`.
const TYPE_STRING: u32 = 8;
const TYPE_F32: u32 = 0;

/// Writes the counts of a context. A layer without known experts has none.
///
/// # Errors
/// When it cannot be written.
pub fn write(context: &ContextProfile, out: &mut dyn Write) -> anyhow::Result<()> {
    let layers: Vec<(&LayerProfile, usize)> = context
        .layers
        .iter()
        .map(|layer| (layer, layer.width()))
        .filter(|(_, width)| *width > 0)
        .collect();
    let size = |width: usize| (4 * width).next_multiple_of(ALIGNMENT);

    let mut head = b"GGUF".to_vec();
    head.extend(3u32.to_le_bytes());
    head.extend(((WRITTEN.len() * layers.len()) as u64).to_le_bytes());
    head.extend(1u64.to_le_bytes());
    push_text(&mut head, "general.type");
    head.extend(TYPE_STRING.to_le_bytes());
    push_text(&mut head, "imatrix");
    let mut offset = 0;
    for (layer, width) in &layers {
        for weight in WRITTEN {
            push_text(&mut head, &name(layer.layer_id, weight));
            head.extend(2u32.to_le_bytes());
            head.extend(1u64.to_le_bytes());
            head.extend((*width as u64).to_le_bytes());
            head.extend(TYPE_F32.to_le_bytes());
            head.extend((offset as u64).to_le_bytes());
            offset += size(*width);
        }
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
    out.write_all(&head)?;
    for (layer, width) in layers {
        let counts = layer.dense().into_iter();
        let mut bytes: Vec<u8> = counts
            .flat_map(|count| (count as f32).to_le_bytes())
            .collect();
        bytes.resize(size(width), 0);
        for _ in WRITTEN {
            out.write_all(&bytes)?;
        }
    }
    Ok(())
}

fn push_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn name(layer: u16, weight: &str) -> String {
    format!("blk.{layer}.{weight}.weight.counts")
}

/// Reads counts that llama-imatrix has written. It computes prompts alone, and so all is prefill.
///
/// How many experts a token has is `k`, or else what the counts of the router tell, which is used once
/// for every token; where that tells nothing, the number of tokens stays 0.
///
/// # Errors
/// When it is no such file, or has no exact counts of experts, or these are not `k` per token.
pub fn read<R: Read + Seek>(
    input: &mut R,
    source: String,
    k: Option<u32>,
) -> anyhow::Result<Profile> {
    let imatrix = imatrix::read_from(input).map_err(|error| anyhow!("it {error}"))?;
    let layers = imatrix.layers.into_iter().map(|(layer_id, weights)| {
        let mut weights = weights.into_values();
        let counts = weights.next().unwrap_or_default();
        ensure!(
            weights.all(|of_other| of_other == counts),
            "the weights of layer {layer_id} have different counts, and a run counts the same for all of them: it was \
             put together from others, or is damaged"
        );
        let activations: u64 = counts.iter().sum();
        let most = counts.iter().copied().max().unwrap_or(0);
        let rows = imatrix.routers.get(&layer_id).copied();
        let k = k.or_else(|| k_of(activations, most, rows?, counts.len()));
        let tokens = tokens(activations, k).with_context(|| format!("layer {layer_id}"))?;
        let counts: Vec<[u64; 2]> = counts.iter().map(|count| [*count, 0]).collect();
        Ok(LayerProfile {
            layer_id,
            n_expert: Some(counts.len() as u32),
            k,
            coverage: None,
            total_tokens: tokens,
            prefill_tokens: tokens,
            decode_tokens: 0,
            experts: ExpertProfile::list(&counts),
        })
    });
    let context = ContextProfile {
        layers: layers.collect::<anyhow::Result<_>>()?,
        ..ContextProfile::default()
    };
    Ok(Profile::new(vec![source], Vec::new(), vec![context]))
}

/// Experts per token, when each of so many tokens can have had the same number of different ones.
fn k_of(activations: u64, most: u64, tokens: u64, n_expert: usize) -> Option<u32> {
    let is_whole = tokens > 0 && activations.is_multiple_of(tokens);
    let k = activations.checked_div(tokens)?;
    (is_whole && most <= tokens && (1..=n_expert as u64).contains(&k)).then_some(k as u32)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::{formats::tests::small_profile, gguf::Gguf, profile::imatrix::tests::file};

    fn written() -> Vec<u8> {
        let mut out = Vec::new();
        write(&small_profile().contexts[0], &mut out).unwrap();
        out
    }

    fn profile_of(bytes: &[u8], k: Option<u32>) -> anyhow::Result<Profile> {
        read(&mut Cursor::new(bytes), "a".into(), k)
    }

    #[test]
    fn counts_come_back() {
        let before = &small_profile().contexts[0];
        let after = &profile_of(&written(), Some(1)).unwrap().contexts[0];
        for (before, after) in before.layers.iter().zip(&after.layers) {
            let counts = |layer: &LayerProfile| -> Vec<(u32, u64)> {
                let experts = layer.experts.iter();
                experts
                    .map(|expert| (expert.expert_id, expert.activations))
                    .collect()
            };
            assert_eq!(counts(before), counts(after));
            assert_eq!(before.total_tokens, after.prefill_tokens);
        }
        assert_eq!(after.layers.len(), 2);
        assert_eq!(after.layers[0].n_expert, Some(4));
        assert_eq!(
            after.layers[1].n_expert,
            Some(2),
            "up to the last that was chosen"
        );
    }

    #[test]
    fn the_file_is_as_others_are() {
        let bytes = written();
        let gguf = Gguf::read(&mut Cursor::new(&bytes)).unwrap();
        let names: Vec<&str> = gguf.tensors.iter().map(|tensor| &*tensor.name).collect();
        assert_eq!(names.len(), 6);
        assert_eq!(names[0], "blk.1.ffn_down_exps.weight.counts");
        assert_eq!(names[4], "blk.4.ffn_gate_exps.weight.counts");
        let last = &gguf.tensors[5];
        assert_eq!(last.shape, [1, 2]);
        assert_eq!(gguf.data_offset + last.offset + 32, bytes.len() as u64);
    }

    /// A file of llama-imatrix has the router's rows, in a shape of one dimension.
    #[test]
    fn rows_of_the_router_are_read() {
        let [router, experts] = ["ffn_gate_inp", "ffn_down_exps"].map(|weight| name(0, weight));
        let bytes = file(
            "imatrix",
            &[
                (&router, &[1], 0, &[3.0]),
                (&experts, &[1, 4], 0, &[3.0, 2.0, 0.0, 1.0]),
            ],
        );
        let profile = profile_of(&bytes, None).unwrap();
        let layer = &profile.contexts[0].layers[0];
        assert_eq!(
            (layer.k, layer.total_tokens, layer.n_expert),
            (Some(2), 3, Some(4))
        );
    }

    #[test]
    fn weights_that_disagree_are_refused() {
        let bytes = file(
            "imatrix",
            &[
                ("blk.0.ffn_down_exps.weight.counts", &[1, 2], 0, &[3.0, 1.0]),
                ("blk.0.ffn_up_exps.weight.counts", &[1, 2], 0, &[3.0, 2.0]),
            ],
        );
        let error = profile_of(&bytes, None).unwrap_err().to_string();
        assert!(error.contains("layer 0 have different counts"), "{error}");
    }

    #[test]
    fn k_follows_from_rows_of_the_router() {
        assert_eq!(k_of(12, 5, 6, 8), Some(2));
        assert_eq!(k_of(13, 5, 6, 8), None);
        assert_eq!(k_of(12, 7, 6, 8), None, "an expert is chosen once at most");
        assert_eq!(k_of(12, 5, 0, 8), None);
        assert_eq!(k_of(0, 0, 6, 8), None);
        assert_eq!(k_of(60, 5, 6, 8), None);
    }

    #[test]
    fn bad_files_are_refused() {
        let good = written();
        // 24 bytes behind the last counts are padding.
        for length in 0..good.len() - 24 {
            assert!(profile_of(&good[..length], None).is_err(), "{length}");
        }
        let replaced = |from: &[u8], to: &[u8]| {
            let mut bytes = good.clone();
            let at = bytes.windows(from.len()).position(|part| part == from);
            bytes[at.unwrap()..][..to.len()].copy_from_slice(to);
            bytes
        };
        let error = |bytes: &[u8]| format!("{:#}", profile_of(bytes, None).unwrap_err());
        let other = error(&replaced(b"imatrix", b"imatrax"));
        assert!(
            other.starts_with("it is a GGUF of type 'imatrax'"),
            "{other}"
        );
        let half = error(&replaced(&3f32.to_le_bytes(), &0.5f32.to_le_bytes()));
        assert!(
            half.starts_with("it is damaged: blk.1.ffn_down_exps"),
            "{half}"
        );
        assert!(
            profile_of(&good, Some(2)).is_err(),
            "5 activations are not 2 per token"
        );
        let empty = error(&file("imatrix", &[]));
        assert!(empty.starts_with("it has no counts of experts"), "{empty}");
    }
}
