//! The model files of a target: found among what it maps, else by its command line.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
};

use crate::{
    gguf::{Gguf, ModelShape, shard_paths, special_tokens},
    model::ModelFacts,
    stats::ModelFile,
    target::{self, MappedFile, printable},
};

/// Model files that have been read.
#[derive(Debug, Default)]
pub struct KnownModels {
    files: Vec<ModelFile>,
    warmup_tokens: Vec<Vec<i32>>,
}

/// Reads the model files a process maps, but for those that are known.
pub fn mapped(pid: u32, files: &[MappedFile], known: &KnownModels) -> KnownModels {
    let mut models = KnownModels::default();
    let mapped = target::mapped_ggufs(pid, files);
    let mut of_known: BTreeSet<PathBuf> = BTreeSet::new();
    for (reachable, path) in &mapped {
        if of_known.contains(path) {
            continue;
        }
        let shards = shard_paths(path);
        let reachable_shards: Vec<PathBuf> = if shards.len() == 1 {
            vec![reachable.clone()]
        } else {
            shards
                .iter()
                .map(|shard| {
                    let mapping = mapped.iter().find(|(_, path)| path == shard);
                    mapping.map_or_else(
                        || PathBuf::from(format!("/proc/{pid}/root{}", shard.display())),
                        |(reachable, _)| reachable.clone(),
                    )
                })
                .collect()
        };
        of_known.extend(shards.iter().cloned());
        let first = shards.first().unwrap_or(path);
        let name = first.to_string_lossy();
        if known.files.iter().any(|file| file.path == name) {
            continue;
        }
        models.add(first, &reachable_shards, "mapped");
    }
    models
}

/// Reads the model that a command line or `LLAMA_ARG_MODEL` names, for a process that does not map it
/// (`--load-mode`), or has ended before we could look.
pub fn named(command: &[OsString], variable: Option<&OsStr>, directory: &Path) -> KnownModels {
    let mut models = KnownModels::default();
    let by_variable = || {
        let path = directory.join(variable?);
        target::is_gguf(&path).then_some((path, "environment"))
    };
    let by_argument = target::model_argument(command, directory);
    let by_argument = by_argument.map(|path| (path, "command_line"));
    if let Some((path, found)) = by_argument.or_else(by_variable) {
        models.add(&path, &shard_paths(&path), found);
    }
    models
}

impl KnownModels {
    /// Whether none was found.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Adds those of `others` that are not known yet.
    pub fn merge(&mut self, others: KnownModels) {
        for file in others.files {
            if self.files.iter().all(|known| known.path != file.path) {
                self.files.push(file);
            }
        }
        self.warmup_tokens.extend(others.warmup_tokens);
        self.warmup_tokens.sort();
        self.warmup_tokens.dedup();
    }

    /// What passes are judged by.
    pub fn facts(&self) -> ModelFacts {
        let layers = match self.files.as_slice() {
            // NextN blocks run only when the program asks for them.
            [model] if model.shape.nextn_predict_layers == 0 => Some(
                model
                    .shape
                    .moe_layers
                    .iter()
                    .filter_map(|layer| u16::try_from(*layer).ok())
                    .collect(),
            ),
            _ => None,
        };
        ModelFacts {
            warmup_tokens: self.warmup_tokens.clone(),
            moe_layers: layers.filter(|layers: &BTreeSet<u16>| !layers.is_empty()),
            selective: (!self.files.is_empty()).then(|| {
                self.files
                    .iter()
                    .map(|model| &model.shape)
                    .filter(|shape| {
                        let mut layers = shape.moe_layers.iter();
                        layers.all(|layer| shape.n_expert_used.of(*layer) < shape.n_expert)
                    })
                    .map(|shape| shape.n_expert)
                    .collect()
            }),
        }
    }

    /// The files, for the document.
    pub fn into_files(self) -> Vec<ModelFile> {
        self.files
    }

    fn add(&mut self, path: &Path, shards: &[PathBuf], found: &'static str) {
        let read = || -> Result<_, crate::gguf::GgufError> {
            let ggufs = shards
                .iter()
                .map(|shard| Gguf::open(shard))
                .collect::<Result<Vec<_>, _>>()?;
            Ok((ModelShape::from_ggufs(&ggufs)?, special_tokens(&ggufs[0])))
        };
        match read() {
            Ok((shape, special)) => {
                // common_init_from_params (common.cpp) decodes one token where the vocabulary has
                // only one of the two; that can be a user's, too, and counts.
                if let (Some(bos), Some(eos)) = (special.bos, special.eos) {
                    self.warmup_tokens.push(vec![bos as i32, eos as i32]);
                }
                self.files.push(ModelFile {
                    path: path.to_string_lossy().into_owned(),
                    found,
                    shape,
                });
            }
            Err(error) => say!("warning: {}: {error}", printable(path)),
        }
    }
}
