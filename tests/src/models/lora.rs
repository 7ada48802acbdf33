//! LoRA adapters of the models.

use std::path::Path;

use anyhow::{Context, Result};

use super::{
    ModelSpec,
    file::{Data, GgufFile, Tensor},
    rng::Rng,
};

/// Rows of an adapter's first matrix.
const RANK: u32 = 4;

/// Writes an adapter for a model of `spec` to `path`: it changes queries, routers and experts of every
/// layer, each expert in its own way.
///
/// # Errors
///
/// A failure to write.
pub fn write_lora(path: &Path, spec: &ModelSpec) -> Result<()> {
    let ModelSpec {
        n_expert,
        n_embd,
        n_ff,
        ..
    } = *spec;
    let mut file = GgufFile::default();
    file.string("general.type", "adapter");
    file.string("general.architecture", spec.architecture.name());
    file.string("adapter.type", "lora");
    file.f32("adapter.lora.alpha", RANK as f32);
    for layer in 0..spec.layers {
        for (part, n_in, n_out, stack) in [
            ("attn_q", n_embd, n_embd, None),
            ("ffn_gate_inp", n_embd, n_expert, None),
            ("ffn_gate_exps", n_embd, n_ff, Some(n_expert)),
            ("ffn_up_exps", n_embd, n_ff, Some(n_expert)),
            ("ffn_down_exps", n_ff, n_embd, Some(n_expert)),
        ] {
            for (end, rows, columns) in [("lora_a", n_in, RANK), ("lora_b", RANK, n_out)] {
                let shape = [Some(rows), Some(columns), stack].into_iter().flatten();
                file.tensor(Tensor {
                    name: format!("blk.{layer}.{part}.weight.{end}"),
                    shape: shape.map(u64::from).collect(),
                    // Together they change a normalised input about as much as the weights do.
                    data: Data::NormalF32 { std: 0.2 },
                });
            }
        }
    }
    file.write(path, &mut Rng::new(spec.seed))
        .with_context(|| format!("write {}", path.display()))
}
