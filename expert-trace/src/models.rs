//! The model files of a target: found among what it maps, else by its command line.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    fs::File,
    io,
    path::{Path, PathBuf},
};

use crate::{
    gguf::{ExpertsUsed, Gguf, GgufError, ModelShape, shard_paths, special_tokens},
    model::ModelFacts,
    selection::{Gating, Layer, Router, Stage},
    stats::ModelFile,
    target::{self, MappedFile, Reach, is_gguf, printable},
};

/// Model files that have been read.
#[derive(Debug, Default)]
pub struct KnownModels {
    files: Vec<ModelFile>,
    warmup_tokens: Vec<Vec<i32>>,
    /// First shards that one process has, whether they were known or not.
    seen: BTreeSet<String>,
    of_process: BTreeMap<u32, OfProcess>,
}

/// What one process has.
#[derive(Debug, Default)]
struct OfProcess {
    /// First shards.
    paths: BTreeSet<String>,
    overrides: Overrides,
}

/// Values that a command line sets in the place of a file's, by their keys (`--override-kv`).
type Overrides = BTreeMap<String, u32>;

/// The overrides that concern experts.
fn overrides(command: &[OsString]) -> Overrides {
    let mut overrides = Overrides::new();
    for argument in command {
        let argument = argument.to_string_lossy();
        let argument = argument.trim_start_matches("--override-kv=");
        for item in argument.split(|c: char| c == ',' || c.is_whitespace()) {
            if let Some((key, value)) = item.split_once("=int:")
                && key.contains(".expert_")
                && let Ok(value) = value.parse()
            {
                overrides.insert(key.to_owned(), value);
            }
        }
    }
    overrides
}

/// What a file says of experts, as a command line overrides it.
fn overridden(shape: &ModelShape, overrides: &Overrides) -> ModelShape {
    let mut shape = shape.clone();
    let arch = shape.arch.clone();
    let value = |key: &str| overrides.get(&format!("{arch}.{key}")).copied();
    if let Some(k) = value("expert_used_count") {
        shape.n_expert_used = ExpertsUsed::Uniform(k);
    }
    if let Some(groups) = value("expert_group_count") {
        shape.expert_group_count = groups;
    }
    if let Some(groups) = value("expert_group_used_count") {
        shape.expert_group_used_count = groups;
    }
    if let Some(gating) = value("expert_gating_func") {
        shape.expert_gating_func = Some(gating);
    }
    if let Some(n_expert) = value("expert_count") {
        shape.n_expert = n_expert;
    }
    shape
}

/// Reads the model files a process maps, but for those that are known. Shards that it does not map are
/// opened by what is in its `reach`: their names alone do not show that it could read them.
pub fn mapped(
    pid: u32,
    files: &[MappedFile],
    reach: Option<&Reach>,
    known: &KnownModels,
) -> KnownModels {
    let mut models = KnownModels::default();
    let mapped: Vec<(&MappedFile, File)> = files
        .iter()
        .filter(|file| !file.is_executable())
        .filter_map(|file| Some((file, open_mapped(pid, file, reach).ok()?)))
        .filter(|(_, open)| is_gguf(open))
        .collect();
    let mut of_known: BTreeSet<PathBuf> = BTreeSet::new();
    for (MappedFile { path, .. }, own) in &mapped {
        if of_known.contains(path) {
            continue;
        }
        let shards = shard_paths(path);
        of_known.extend(shards.iter().cloned());
        let first = shards.first().unwrap_or(path);
        let name = first.to_string_lossy();
        if known.files.iter().any(|file| file.path == name) {
            models.seen.insert(name.into_owned());
            continue;
        }
        let open = |shard: &Path| {
            let mut mapped = mapped.iter();
            match mapped.find(|(file, _)| file.path == *shard) {
                _ if shards.len() == 1 => own.try_clone(),
                Some((_, open)) => open.try_clone(),
                None => open_named(shard, reach),
            }
        };
        models.add(first, &shards, open, "mapped");
    }
    models
}

/// Reads the model that a command line or `LLAMA_ARG_MODEL` names, for a process that does not map it
/// (`--load-mode`), or has ended before we could look at what it maps. Its directory is `directory`,
/// for people; it could read what is in its `reach`.
pub fn named(
    command: &[OsString],
    variable: Option<&OsStr>,
    directory: &Path,
    reach: Option<&Reach>,
) -> KnownModels {
    let mut models = KnownModels::default();
    let by_argument = target::model_argument(command).map(|name| (name, "command_line"));
    // The command line wins, also where it names what we cannot read.
    let named = by_argument.or_else(|| Some((variable?, "environment")));
    let draft = target::draft_argument(command).map(|name| (name, "command_line"));
    for (name, found) in named.into_iter().chain(draft) {
        let name = Path::new(name);
        if open_named(name, reach).is_ok_and(|file| is_gguf(&file)) {
            let shards = shard_paths(name);
            let open = |shard: &Path| open_named(shard, reach);
            models.add(&directory.join(name), &shards, open, found);
        }
    }
    models
}

/// How a model chooses its experts; `None` when it has none.
fn router(shape: &ModelShape) -> Option<Router> {
    let groups = u16::try_from(shape.expert_group_count).ok()?;
    let groups_used = u16::try_from(shape.expert_group_used_count).ok()?;
    let layer = |number: &u32| {
        let stage = if shape.chosen_by_token.contains(number) {
            None
        } else if shape.selection_bias.contains(number) {
            Some(Stage::Selection)
        } else if shape.router_bias.contains(number) {
            Some(Stage::BiasedLogits)
        } else {
            Some(Stage::Logits)
        };
        let k = u16::try_from(shape.n_expert_used.of(*number)).ok()?;
        let number = u16::try_from(*number).ok()?;
        let layer = Layer {
            k,
            stage,
            gating: shape.expert_gating_func.and_then(Gating::from_number),
            groups,
            groups_used,
        };
        (k > 0).then_some((number, layer))
    };
    let layers: BTreeMap<u16, Layer> = shape.moe_layers.iter().filter_map(layer).collect();
    (!layers.is_empty()).then_some(Router {
        n_expert: u16::try_from(shape.n_expert).ok()?,
        layers,
    })
}

fn open_named(name: &Path, reach: Option<&Reach>) -> io::Result<File> {
    reach.ok_or(io::ErrorKind::NotFound)?.open(name)
}

fn open_mapped(pid: u32, file: &MappedFile, reach: Option<&Reach>) -> io::Result<File> {
    // The kernel's links to mappings are not for everybody who may trace.
    file.open(pid).or_else(|_| open_named(&file.path, reach))
}

impl KnownModels {
    /// Whether the process that was looked at has none.
    pub fn has_none(&self) -> bool {
        self.seen.is_empty()
    }

    /// Whether none was found.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Whether a process has a model that is known.
    pub fn knows(&self, process: u32) -> bool {
        let of_process = self.of_process.get(&process);
        of_process.is_some_and(|of_process| !of_process.paths.is_empty())
    }

    /// Takes in what was found in a process, which has this command line.
    pub fn add_process(&mut self, process: u32, command: &[OsString], found: KnownModels) {
        let of_process = self.of_process.entry(process).or_default();
        of_process.paths.extend(found.seen.iter().cloned());
        if !command.is_empty() {
            of_process.overrides = overrides(command);
        }
        self.merge(found);
    }

    /// Adds those of `others` that are not known yet.
    fn merge(&mut self, others: KnownModels) {
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
        let only = match self.files.as_slice() {
            [model] => Some(&model.shape),
            _ => None,
        };
        let layers = only.map(|shape| {
            let main = shape.moe_layers.iter().copied();
            main.filter(|layer| *layer < shape.main_layers())
                .filter_map(|layer| u16::try_from(layer).ok())
                .collect()
        });
        ModelFacts {
            warmup_tokens: self.warmup_tokens.clone(),
            moe_layers: layers.filter(|layers: &BTreeSet<u16>| !layers.is_empty()),
            nextn: only.and_then(ModelShape::first_nextn),
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
            routers: self
                .of_process
                .iter()
                .map(|(process, of_process)| (*process, self.routers(of_process)))
                .collect(),
        }
    }

    fn routers(&self, of_process: &OfProcess) -> Vec<Router> {
        let files = self.files.iter();
        files
            .filter(|file| of_process.paths.contains(&file.path))
            .filter_map(|file| router(&overridden(&file.shape, &of_process.overrides)))
            .collect()
    }

    /// Indices of the files that a process has; of all when nobody has looked at it.
    pub fn indices_of(&self, process: u32) -> Vec<usize> {
        let of_process = self.of_process.get(&process);
        let has = |file: &ModelFile| {
            of_process.is_none_or(|of_process| of_process.paths.contains(&file.path))
        };
        let files = self.files.iter().enumerate();
        files
            .filter(|(_, file)| has(file))
            .map(|(index, _)| index)
            .collect()
    }

    /// The files.
    pub fn files(&self) -> &[ModelFile] {
        &self.files
    }

    /// The files, for the document.
    pub fn into_files(self) -> Vec<ModelFile> {
        self.files
    }

    /// Reads the model whose first shard is called `path`; of several shards it needs all.
    fn add(
        &mut self,
        path: &Path,
        shards: &[PathBuf],
        open: impl Fn(&Path) -> io::Result<File>,
        found: &'static str,
    ) {
        let read_shard = |shard: &PathBuf| {
            let file = open(shard).map_err(|source| GgufError::Io { offset: 0, source });
            file.and_then(|mut file| Gguf::read(&mut file))
                .map_err(|error| (shard.clone(), error))
        };
        let read = || {
            let ggufs: Vec<Gguf> = shards.iter().map(read_shard).collect::<Result<_, _>>()?;
            let shape = ModelShape::from_ggufs(&ggufs).map_err(|error| (path.to_owned(), error))?;
            Ok((shape, special_tokens(&ggufs[0])))
        };
        match read() {
            Ok((shape, special)) => {
                // common_init_from_params (common.cpp) decodes one token where the vocabulary has
                // only one of the two; that can be a user's, too, and counts.
                if let (Some(bos), Some(eos)) = (special.bos, special.eos) {
                    self.warmup_tokens.push(vec![bos as i32, eos as i32]);
                }
                self.seen.insert(path.to_string_lossy().into_owned());
                self.files.push(ModelFile {
                    path: path.to_string_lossy().into_owned(),
                    found,
                    shape,
                });
            }
            Err((file, error)) => {
                let (file, error) = (printable(&file), anyhow::Error::new(error));
                say!("warning: {file}: {error:#}; the model is not taken into account");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::gguf::tests::{Builder, moe};

    #[test]
    fn a_model_needs_all_its_files() {
        let directory = tempfile::tempdir().unwrap();
        let name = |no: u32| directory.path().join(format!("m-0000{no}-of-00003.gguf"));
        let split = |builder: Builder, no| builder.u32("split.no", no).u32("split.count", 3);
        let router = Builder::default().tensor("blk.2.ffn_gate_inp.weight", &[8]);
        let experts = Builder::default().tensor("blk.2.ffn_up_exps.weight", &[8]);
        for (no, builder) in (0..).zip([moe(), router, experts]) {
            fs::write(name(no + 1), split(builder, no).bytes()).unwrap();
        }
        let command = ["llama-cli".into(), "-m".into(), name(1).into_os_string()];
        let found = || {
            let reach = Reach::of(std::process::id());
            named(&command, None, directory.path(), reach.as_ref())
        };
        assert_eq!(found().into_files()[0].shape.moe_layers, [2]);
        fs::rename(name(3), name(2)).unwrap();
        assert!(found().is_empty(), "two files of three");
        fs::copy(name(2), name(3)).unwrap();
        assert!(
            found().is_empty(),
            "the third file in the place of the second"
        );
    }

    #[test]
    fn a_command_line_can_change_how_experts_are_chosen() {
        let words = |text: &str| -> Vec<OsString> { text.split(' ').map(OsString::from).collect() };
        let command =
            words("llama-cli --override-kv a.x=bool:true,qwen3moe.expert_used_count=int:6");
        let expected = [("qwen3moe.expert_used_count".to_owned(), 6)];
        assert_eq!(overrides(&command), expected.into());
        let command = words("llama-cli --override-kv=d.expert_group_used_count=int:3 -p int:4");
        let expected = [("d.expert_group_used_count".to_owned(), 3)];
        assert_eq!(overrides(&command), expected.into());
        assert!(overrides(&words("llama-cli -m expert_used_count=int:6")).is_empty());
    }
}
