//! A model without experts.

use std::path::Path;

use anyhow::Result;

use super::{N_HEAD, N_HEAD_KV, file::Data, model::Model, rng::Rng};

const LAYERS: u32 = 2;
const N_EMBD: u32 = 128;
const N_FF: u32 = 64;

/// Writes a `llama` model of two dense layers with random weights to `path`, with the tokenizer of
/// the vocabulary-only GGUF file `vocab`. It has the tensors and keys that `src/models/llama.cpp` of
/// llama.cpp asks for.
///
/// # Errors
///
/// A `vocab` without tokenizer, or a failure to read or write.
pub fn write_dense(path: &Path, vocab: &Path) -> Result<()> {
    let head_dim = N_EMBD / N_HEAD;
    let mut model = Model::new(vocab, "llama", "expert-trace dense test model", N_EMBD)?;
    model.keys(&[
        ("block_count", LAYERS),
        ("feed_forward_length", N_FF),
        ("attention.head_count", N_HEAD),
        ("attention.head_count_kv", N_HEAD_KV),
        ("rope.dimension_count", head_dim),
    ]);
    let kv = head_dim * N_HEAD_KV;
    let weights = || Data::NormalF16 { std: 0.05 };
    model.embedding(weights());
    for layer in 0..LAYERS {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        model.norm(name("attn_norm"), N_EMBD);
        model.norm(name("ffn_norm"), N_EMBD);
        for (part, shape) in [
            ("attn_q", [N_EMBD, N_EMBD]),
            ("attn_k", [N_EMBD, kv]),
            ("attn_v", [N_EMBD, kv]),
            ("attn_output", [N_EMBD, N_EMBD]),
            ("ffn_gate", [N_EMBD, N_FF]),
            ("ffn_up", [N_EMBD, N_FF]),
            ("ffn_down", [N_FF, N_EMBD]),
        ] {
            model.tensor(name(part), &shape, weights());
        }
    }
    model.output(weights());
    model.write(path, &mut Rng::new(3))
}
