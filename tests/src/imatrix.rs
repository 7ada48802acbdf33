//! Counts of routed rows from `llama-imatrix`, an oracle that comes with llama.cpp.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use expert_trace::gguf::Gguf;

/// Above this, an F32 cannot tell neighbouring integers apart.
const EXACT_F32: f32 = 16_777_216.0;
const MAX_EXPERTS: u64 = 65_536;

/// By layer, for every expert: how many rows were routed to it, as `llama-imatrix` counted them.
///
/// `imatrix.cpp` (b11434) adds 1 to an expert's count for every row and rank with its id in the `ids`
/// of a `MUL_MAT_ID`, and stores the counts of each weight as `<weight>.counts`, F32 `[1, n_expert]`.
/// Read are those of `ffn_down_exps`, which every architecture has.
///
/// # Errors
///
/// If the file cannot be read, or has counts of another form, or ones too large for an F32 to be
/// exact.
pub fn read_counts(path: &Path) -> Result<BTreeMap<u32, Vec<u64>>> {
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let gguf = Gguf::read(&mut file).with_context(|| format!("read {}", path.display()))?;
    let mut counts = BTreeMap::new();
    for tensor in &gguf.tensors {
        let Some(layer) = layer_of(&tensor.name) else {
            continue;
        };
        ensure!(
            tensor.ggml_type == 0 && matches!(tensor.shape[..], [1, 1..=MAX_EXPERTS]),
            "{} is not F32 [1, n_expert]",
            tensor.name
        );
        let mut bytes = vec![0; 4 * tensor.shape[1] as usize];
        file.seek(SeekFrom::Start(gguf.data_offset + tensor.offset))?;
        file.read_exact(&mut bytes)
            .with_context(|| format!("read {}", tensor.name))?;
        let (values, _) = bytes.as_chunks::<4>();
        let of_layer = values.iter().map(|value| count(f32::from_le_bytes(*value)));
        let of_layer = of_layer.collect::<Option<_>>();
        counts.insert(
            layer,
            of_layer.with_context(|| format!("{} holds no exact counts", tensor.name))?,
        );
    }
    Ok(counts)
}

fn layer_of(name: &str) -> Option<u32> {
    let layer = name.strip_prefix("blk.")?;
    layer
        .strip_suffix(".ffn_down_exps.weight.counts")?
        .parse()
        .ok()
}

fn count(value: f32) -> Option<u64> {
    ((0.0..EXACT_F32).contains(&value) && value.fract() == 0.0).then_some(value as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_layer() {
        assert_eq!(layer_of("blk.12.ffn_down_exps.weight.counts"), Some(12));
        assert_eq!(layer_of("blk.12.ffn_down_exps.weight.in_sum2"), None);
        assert_eq!(layer_of("blk.12.ffn_up_exps.weight.counts"), None);
    }

    #[test]
    fn counts_are_exact_or_refused() {
        assert_eq!(count(3.0), Some(3));
        for value in [-1.0, 0.5, EXACT_F32, f32::NAN, f32::INFINITY] {
            assert_eq!(count(value), None);
        }
    }
}
