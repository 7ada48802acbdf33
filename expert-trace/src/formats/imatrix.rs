//! `imatrix-counts`: counts as llama-imatrix has them in its GGUF files.
//!
//! `imatrix.cpp` (b11434) stores, for every weight that it has seen, `<weight>.counts`: F32 `[1, n]` with
//! the rows that each of its n matrices was used for. Weights of experts have as many as there are
//! experts, so that the same counts are there for each of a layer's weights; others have one.

use std::{
    collections::BTreeMap,
    io::{Read, Seek, SeekFrom, Write},
};

use anyhow::{Context as _, ensure};

use super::{MAX_EXPERTS, MAX_LAYERS, counts, csv::tokens, facts::experts};
use crate::{
    gguf::{Gguf, TensorInfo},
    profile::{ContextProfile, LayerProfile, Profile},
};

/// Above this, an F32 cannot tell neighbouring integers apart.
pub const EXACT: u64 = 1 << 24;

/// Weights of experts that get counts.
const WRITTEN: [&str; 3] = ["ffn_down_exps", "ffn_gate_exps", "ffn_up_exps"];
/// Weights of experts whose counts are read: the first of these that a layer has.
const READ: [&str; 4] = [
    "ffn_down_exps",
    "ffn_up_exps",
    "ffn_gate_exps",
    "ffn_gate_up_exps",
];

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
        .map(|layer| (layer, counts::width(layer)))
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
        let counts = counts::activations(layer, width);
        let mut bytes: Vec<u8> = counts
            .iter()
            .flat_map(|count| (*count as f32).to_le_bytes())
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
/// When it is no such file, or has no exact counts of experts.
pub fn read<R: Read + Seek>(
    input: &mut R,
    source: String,
    k: Option<u32>,
) -> anyhow::Result<Profile> {
    let gguf = Gguf::read(input).context("it cannot be read as GGUF")?;
    ensure!(
        gguf.string("general.type") == Some("imatrix"),
        "its general.type is not imatrix: name a file that llama-imatrix has written as GGUF"
    );
    let mut found: BTreeMap<u16, Vec<Option<&TensorInfo>>> = BTreeMap::new();
    let mut routers: BTreeMap<u16, &TensorInfo> = BTreeMap::new();
    for tensor in &gguf.tensors {
        let Some((layer, weight)) = layer_and_weight(&tensor.name) else {
            continue;
        };
        if weight == "ffn_gate_inp" {
            routers.insert(layer, tensor);
        }
        if let Some(index) = READ.iter().position(|known| *known == weight) {
            found.entry(layer).or_insert_with(|| vec![None; READ.len()])[index] = Some(tensor);
        }
    }
    ensure!(
        !found.is_empty(),
        "it has no counts of experts (such as {})",
        name(0, READ[0])
    );
    let mut layers = Vec::new();
    for (layer_id, tensors) in found {
        ensure!(
            layer_id < MAX_LAYERS,
            "layer {layer_id}: models have at most {MAX_LAYERS}"
        );
        let Some(tensor) = tensors.into_iter().flatten().next() else {
            continue;
        };
        let counts = values(input, &gguf, tensor)?;
        let activations: u64 = counts.iter().sum();
        let rows = match routers.get(&layer_id) {
            Some(router) => values(input, &gguf, router)?.first().copied(),
            None => None,
        };
        let most = counts.iter().copied().max().unwrap_or(0);
        let k = k.or_else(|| k_of(activations, most, rows?, counts.len()));
        let tokens = tokens(activations, k).with_context(|| format!("layer {layer_id}"))?;
        let counts: Vec<[u64; 2]> = counts.iter().map(|count| [*count, 0]).collect();
        layers.push(LayerProfile {
            layer_id,
            n_expert: Some(counts.len() as u32),
            k,
            coverage: None,
            total_tokens: tokens,
            prefill_tokens: tokens,
            decode_tokens: 0,
            experts: experts(&counts),
        });
    }
    let context = ContextProfile {
        layers,
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

fn layer_and_weight(name: &str) -> Option<(u16, &str)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest.strip_suffix(".weight.counts")?))
}

fn values<R: Read + Seek>(
    input: &mut R,
    gguf: &Gguf,
    tensor: &TensorInfo,
) -> anyhow::Result<Vec<u64>> {
    let name = &tensor.name;
    let n = match tensor.shape[..] {
        // ggml leaves out what ends a shape and is 1.
        [1] if tensor.ggml_type == TYPE_F32 => 1,
        [1, n] if tensor.ggml_type == TYPE_F32 && (1..=MAX_EXPERTS.into()).contains(&n) => n,
        _ => anyhow::bail!("{name:?} is not F32 [1, n] with n up to {MAX_EXPERTS}"),
    };
    let mut bytes = vec![0; 4 * n as usize];
    let place = gguf.data_offset.checked_add(tensor.offset);
    let place = place.with_context(|| format!("{name:?} lies nowhere"))?;
    input
        .seek(SeekFrom::Start(place))
        .and_then(|_| input.read_exact(&mut bytes))
        .with_context(|| format!("cannot read {name:?}"))?;
    let (values, _) = bytes.as_chunks::<4>();
    let counts = values.iter().map(|value| count(f32::from_le_bytes(*value)));
    let counts: Option<Vec<u64>> = counts.collect();
    counts.with_context(|| format!("{name:?} has values that are no exact counts"))
}

fn count(value: f32) -> Option<u64> {
    let is_exact = (0.0..=EXACT as f32).contains(&value) && value.fract() == 0.0;
    is_exact.then_some(value as u64)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::formats::tests::small_profile;

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
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(2u64.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        push_text(&mut bytes, "general.type");
        bytes.extend(TYPE_STRING.to_le_bytes());
        push_text(&mut bytes, "imatrix");
        let tensors = [
            ("ffn_gate_inp", &[1][..], 0),
            ("ffn_down_exps", &[1, 4], 32),
        ];
        for (weight, shape, offset) in tensors {
            push_text(&mut bytes, &name(0, weight));
            bytes.extend((shape.len() as u32).to_le_bytes());
            for n in shape {
                bytes.extend(u64::to_le_bytes(*n));
            }
            bytes.extend(TYPE_F32.to_le_bytes());
            bytes.extend(u64::to_le_bytes(offset));
        }
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes.extend(3f32.to_le_bytes());
        bytes.extend([0; 28]);
        bytes.extend(
            [3f32, 2.0, 0.0, 1.0]
                .iter()
                .flat_map(|count| count.to_le_bytes()),
        );
        let profile = profile_of(&bytes, None).unwrap();
        let layer = &profile.contexts[0].layers[0];
        assert_eq!(
            (layer.k, layer.total_tokens, layer.n_expert),
            (Some(2), 3, Some(4))
        );
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
        // What stands last: 24 bytes after the counts that are read, and the same for two other weights.
        for length in 0..good.len() - 24 - 2 * 32 {
            assert!(profile_of(&good[..length], None).is_err(), "{length}");
        }
        let replaced = |from: &[u8], to: &[u8]| {
            let mut bytes = good.clone();
            let at = bytes.windows(from.len()).position(|part| part == from);
            bytes[at.unwrap()..][..to.len()].copy_from_slice(to);
            bytes
        };
        let error = |bytes: &[u8]| format!("{:#}", profile_of(bytes, None).unwrap_err());
        assert!(error(&replaced(b"imatrix", b"imatrax")).contains("general.type"));
        let three = replaced(&3f32.to_le_bytes(), &0.5f32.to_le_bytes());
        assert!(error(&three).contains("no exact counts"));
        assert!(
            profile_of(&good, Some(2)).is_err(),
            "5 activations are not 2 per token"
        );
        let no_experts = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0";
        let key = [&good[24..24 + 8 + 12 + 4 + 8 + 7], &[0; 32]].concat();
        let empty = [&no_experts[..], &key].concat();
        assert!(
            error(&empty).contains("no counts of experts"),
            "{}",
            error(&empty)
        );
    }
}
