//! Begin- and end-of-text tokens as llama.cpp sees them.

use super::{Gguf, Value};

/// Token ids that llama.cpp treats specially; `None` when the vocabulary has no such token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct SpecialTokens {
    /// Begin of text.
    pub bos: Option<u32>,
    /// End of text.
    pub eos: Option<u32>,
}

/// Follows `llama_vocab::impl::load` (`src/llama-vocab.cpp`, b11434): a default per tokenizer model,
/// dropped when it lies outside the vocabulary, replaced by the key when that lies inside.
pub fn special_tokens(gguf: &Gguf) -> SpecialTokens {
    let model = gguf.string("tokenizer.ggml.model").unwrap_or("none");
    if matches!(model, "no_vocab" | "none") {
        // llama.cpp returns here, before it looks at any key.
        return SpecialTokens {
            bos: None,
            eos: None,
        };
    }
    let (bos, eos) = match model {
        "llama" | "plamo2" => (Some(1), Some(2)),
        "bert" => (Some(101), None),
        "gpt2" | "hybriddna" | "whitespace" => {
            let pre = gguf.string("tokenizer.ggml.pre");
            let without_bos = matches!(pre, Some("chatglm-bpe" | "glm4" | "glm5"));
            ((!without_bos).then_some(11), Some(11))
        }
        "t5" => (None, Some(1)),
        _ => (None, None),
    };
    let n_vocab = match gguf.kv.get("tokenizer.ggml.tokens") {
        Some(Value::Skipped { len, .. }) => *len,
        _ => 0,
    };
    let resolve = |key, default: Option<u32>| {
        gguf.u64(key)
            .and_then(|id| u32::try_from(id).ok())
            .filter(|id| u64::from(*id) < n_vocab)
            .or(default.filter(|id| u64::from(*id) < n_vocab))
    };
    SpecialTokens {
        bos: resolve("tokenizer.ggml.bos_token_id", bos),
        eos: resolve("tokenizer.ggml.eos_token_id", eos),
    }
}
