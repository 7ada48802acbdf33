//! A model while its keys and tensors are being added in the order of the file.

use std::path::Path;

use anyhow::{Context, Result, bail};
use expert_trace::gguf::{Gguf, Value, shard_paths};

use super::{
    file::{Data, GgufFile, Tensor},
    rng::Rng,
};

/// Above any prompt of the tests; costs nothing in the file.
const CONTEXT_LENGTH: u32 = 8192;
/// `<role>: <content>` per line, enough for llama-cli and llama-server to chat.
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ message['role'] }}: \
    {{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";

pub struct Model {
    file: GgufFile,
    architecture: &'static str,
    n_embd: u32,
    vocabulary: Vocabulary,
}

impl Model {
    /// A model without layers, with the tokenizer of the vocabulary-only GGUF file `vocab`.
    pub fn new(vocab: &Path, architecture: &'static str, name: &str, n_embd: u32) -> Result<Model> {
        let vocabulary = Vocabulary::read(vocab)?;
        let mut file = GgufFile::default();
        file.string("general.architecture", architecture);
        file.string("general.name", name);
        let mut model = Model {
            file,
            architecture,
            n_embd,
            vocabulary,
        };
        model.keys(&[
            ("context_length", CONTEXT_LENGTH),
            ("embedding_length", n_embd),
        ]);
        model.f32("attention.layer_norm_rms_epsilon", 1e-6);
        Ok(model)
    }

    /// Number of tokens in the vocabulary.
    pub fn n_vocab(&self) -> u32 {
        self.vocabulary.tokens
    }

    /// Adds keys of the architecture.
    pub fn keys(&mut self, keys: &[(&str, u32)]) {
        for (key, value) in keys {
            self.file.u32(&self.key(key), *value);
        }
    }

    /// Adds a key of the architecture with one value for each layer.
    pub fn of_layers(&mut self, key: &str, values: &[u32]) {
        self.file.u32s(&self.key(key), values);
    }

    pub fn f32(&mut self, key: &str, value: f32) {
        self.file.f32(&self.key(key), value);
    }

    pub fn bool(&mut self, key: &str, value: bool) {
        self.file.bool(&self.key(key), value);
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    pub fn tensor(&mut self, name: String, shape: &[u32], data: Data) {
        let shape = shape.iter().map(|n| u64::from(*n)).collect();
        self.file.tensor(Tensor { name, shape, data });
    }

    /// Adds the weights of an RMS norm that scales nothing.
    pub fn norm(&mut self, name: String, n: u32) {
        self.tensor(name, &[n], Data::F32(vec![1.0; n as usize]));
    }

    pub fn embedding(&mut self, data: Data) {
        let shape = [self.n_embd, self.n_vocab()];
        self.tensor("token_embd.weight".to_owned(), &shape, data);
    }

    pub fn output(&mut self, data: Data) {
        let shape = [self.n_embd, self.n_vocab()];
        self.norm("output_norm.weight".to_owned(), self.n_embd);
        self.tensor("output.weight".to_owned(), &shape, data);
    }

    /// Writes everything; random tensors take their draws from `rng` in the order of the file. Where
    /// `path` names a shard, all shards are written.
    pub fn write(mut self, path: &Path, rng: &mut Rng) -> Result<()> {
        self.vocabulary.copy(&mut self.file);
        let paths = shard_paths(path);
        let files = match paths.len() {
            1 => vec![self.file],
            n => self.file.split(u16::try_from(n)?),
        };
        for (path, file) in paths.iter().zip(files) {
            file.write(path, rng)
                .with_context(|| format!("write {}", path.display()))?;
        }
        Ok(())
    }
}

/// The tokenizer of a vocabulary-only GGUF file.
struct Vocabulary {
    bytes: Vec<u8>,
    gguf: Gguf,
    tokens: u32,
}

impl Vocabulary {
    fn read(path: &Path) -> Result<Vocabulary> {
        let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let gguf = Gguf::read(&mut std::io::Cursor::new(&bytes))
            .with_context(|| format!("{} is no vocabulary", path.display()))?;
        let tokens = match gguf.kv.get("tokenizer.ggml.tokens") {
            Some(Value::Skipped { len, .. }) => u32::try_from(*len)?,
            _ => bail!("{} has no tokens", path.display()),
        };
        Ok(Vocabulary {
            bytes,
            gguf,
            tokens,
        })
    }

    fn copy(&self, file: &mut GgufFile) {
        for (key, span) in &self.gguf.kv_spans {
            if key.starts_with("tokenizer.") {
                file.copied(&self.bytes[span.start as usize..span.end as usize]);
            }
        }
        if !self.gguf.kv.contains_key("tokenizer.chat_template") {
            file.string("tokenizer.chat_template", CHAT_TEMPLATE);
        }
    }
}
