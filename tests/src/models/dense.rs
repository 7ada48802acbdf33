//! A model without experts.

use std::path::Path;

use anyhow::{Context, Result};

use super::{
    CONTEXT_LENGTH, N_HEAD, N_HEAD_KV, Vocabulary,
    file::{Data, GgufFile, Tensor},
    rng::Rng,
};

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
    let vocabulary = Vocabulary::read(vocab)?;
    let head_dim = N_EMBD / N_HEAD;
    let mut file = GgufFile::default();
    file.string("general.architecture", "llama");
    file.string("general.name", "expert-trace dense test model");
    for (key, value) in [
        ("block_count", LAYERS),
        ("context_length", CONTEXT_LENGTH),
        ("embedding_length", N_EMBD),
        ("feed_forward_length", N_FF),
        ("attention.head_count", N_HEAD),
        ("attention.head_count_kv", N_HEAD_KV),
        ("rope.dimension_count", head_dim),
    ] {
        file.u32(&format!("llama.{key}"), value);
    }
    file.f32("llama.attention.layer_norm_rms_epsilon", 1e-6);
    vocabulary.copy(&mut file);

    let kv = head_dim * N_HEAD_KV;
    let mut tensor = |name: &str, shape: &[u32]| {
        let data = match shape {
            [n] => Data::F32(vec![1.0; *n as usize]),
            _ => Data::NormalF16 { std: 0.05 },
        };
        file.tensor(Tensor {
            name: format!("{name}.weight"),
            shape: shape.iter().map(|n| u64::from(*n)).collect(),
            data,
        });
    };
    tensor("token_embd", &[N_EMBD, vocabulary.tokens]);
    for layer in 0..LAYERS {
        for (part, shape) in [
            ("attn_norm", &[N_EMBD][..]),
            ("attn_q", &[N_EMBD, N_EMBD]),
            ("attn_k", &[N_EMBD, kv]),
            ("attn_v", &[N_EMBD, kv]),
            ("attn_output", &[N_EMBD, N_EMBD]),
            ("ffn_norm", &[N_EMBD]),
            ("ffn_gate", &[N_EMBD, N_FF]),
            ("ffn_up", &[N_EMBD, N_FF]),
            ("ffn_down", &[N_FF, N_EMBD]),
        ] {
            tensor(&format!("blk.{layer}.{part}"), shape);
        }
    }
    tensor("output_norm", &[N_EMBD]);
    tensor("output", &[N_EMBD, vocabulary.tokens]);
    file.write(path, &mut Rng::new(3))
        .with_context(|| format!("write {}", path.display()))
}
