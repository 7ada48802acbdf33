//! The llama.cpp that the end-to-end tests trace: `cargo xtask test` builds it once, and tells the
//! tests by environment variables where it is.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

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
            bin: existing(BIN)?,
            vocab: existing(VOCAB)?,
            oracle: existing(ORACLE)?,
            models_cache: existing(MODELS_CACHE)?,
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

fn existing(variable: &str) -> Result<PathBuf> {
    let path = PathBuf::from(env::var_os(variable).unwrap_or_default());
    ensure!(
        !path.as_os_str().is_empty(),
        "{variable} is not set: run `cargo xtask test`, which builds llama.cpp and sets it"
    );
    ensure!(
        path.exists(),
        "{variable} names {}, which does not exist: run `cargo xtask test`",
        path.display()
    );
    Ok(path)
}
