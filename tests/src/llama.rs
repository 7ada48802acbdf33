//! The llama.cpp that the end-to-end tests trace: `cargo xtask test` builds it once, and tells the
//! tests by environment variables where it is.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::environment::existing;

/// What sets the variables.
const TASK: &str = "cargo xtask test";

const BIN: &str = "EXPERT_TRACE_TEST_LLAMA_BIN";
const VOCAB: &str = "EXPERT_TRACE_TEST_VOCAB";
const ORACLE: &str = "EXPERT_TRACE_TEST_ORACLE";
const MODELS_CACHE: &str = "EXPERT_TRACE_TEST_MODELS_CACHE";

/// A llama.cpp that is ready to be traced, and what goes with it.
#[derive(Debug, Clone)]
pub struct LlamaCpp {
    /// Directory of its programs and shared libraries.
    pub bin: PathBuf,
    /// GGUF file with a tokenizer and no tensors, from its sources.
    pub vocab: PathBuf,
    /// `tests/oracle/oracle.cpp`, linked with its libraries.
    pub oracle: PathBuf,
    /// Directory for models that are worth keeping from one run to the next; exists.
    pub models_cache: PathBuf,
}

impl LlamaCpp {
    /// The one that `cargo xtask test` has prepared.
    pub fn from_env() -> Result<Self> {
        Ok(Self {
            bin: existing(BIN, TASK)?,
            vocab: existing(VOCAB, TASK)?,
            oracle: existing(ORACLE, TASK)?,
            models_cache: existing(MODELS_CACHE, TASK)?,
        })
    }

    /// The variables that [`LlamaCpp::from_env`] reads.
    pub fn to_env(&self) -> [(&'static str, &Path); 4] {
        let Self {
            bin,
            vocab,
            oracle,
            models_cache,
        } = self;
        [
            (BIN, bin),
            (VOCAB, vocab),
            (ORACLE, oracle),
            (MODELS_CACHE, models_cache),
        ]
    }

    /// Directory of ggml's headers, in the sources that the tokenizer is from.
    pub fn ggml_headers(&self) -> PathBuf {
        let sources = self.vocab.ancestors().nth(2).unwrap_or(Path::new("/"));
        sources.join("ggml/include")
    }

    /// One of the programs in [`LlamaCpp::bin`], such as `llama-cli`.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }
}
