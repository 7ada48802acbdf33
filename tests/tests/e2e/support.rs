//! Models and programs that the tests share.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use expert_trace_tests::{
    llama::LlamaCpp,
    models::{self, Expected, ModelSpec, Shape},
    oracle::{Oracle, read_dump},
    tracer::{self, Stats, read_log},
};
use tempfile::TempDir;

/// The llama.cpp under the tracer.
pub fn llama() -> &'static LlamaCpp {
    static LLAMA: OnceLock<LlamaCpp> = OnceLock::new();
    LLAMA.get_or_init(|| LlamaCpp::from_env().unwrap())
}

/// A model whose experts follow from the token.
pub struct Known {
    pub path: PathBuf,
    pub spec: ModelSpec,
    pub expected: Expected,
}

/// 4 layers, 32 experts, top-4.
pub fn known_small() -> &'static Known {
    static MODEL: OnceLock<Known> = OnceLock::new();
    MODEL.get_or_init(|| known("known-small.gguf", ModelSpec::SMALL))
}

/// 2 layers, 16 experts, top-2: another shape with the same vocabulary.
pub fn known_draft() -> &'static Known {
    static MODEL: OnceLock<Known> = OnceLock::new();
    let spec = ModelSpec {
        layers: 2,
        n_expert: 16,
        k: 2,
        ..ModelSpec::SMALL
    };
    MODEL.get_or_init(|| known("known-draft.gguf", spec))
}

/// 4 layers, 128 experts, top-4.
pub fn known_medium() -> &'static Known {
    static MODEL: OnceLock<Known> = OnceLock::new();
    MODEL.get_or_init(|| known("known-medium.gguf", ModelSpec::MEDIUM))
}

/// 3 layers, 512 experts, top-10.
pub fn known_wide() -> &'static Known {
    static MODEL: OnceLock<Known> = OnceLock::new();
    MODEL.get_or_init(|| known("known-wide.gguf", ModelSpec::WIDE))
}

/// Ordinary random weights, 32 experts, top-4.
pub fn random_small() -> &'static Path {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| random("random-small.gguf", &ModelSpec::SMALL))
}

/// Ordinary random weights, 512 experts, top-10.
pub fn random_wide() -> &'static Path {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| random("random-wide.gguf", &ModelSpec::WIDE))
}

/// Two layers without experts.
pub fn dense() -> &'static Path {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| {
        publish("dense.gguf", |path| {
            models::write_dense(path, &llama().vocab).unwrap();
        })
    })
}

/// Random weights in the shape of a model that is traced in the field.
pub fn shape(name: &str, shape: &Shape) -> PathBuf {
    publish(&format!("shape-{name}.gguf"), |path| {
        models::write_shape(path, &llama().vocab, shape).unwrap();
    })
}

fn known(name: &str, spec: ModelSpec) -> Known {
    let mut expected = None;
    let path = publish(name, |path| {
        expected = Some(models::write_known_routing(path, &llama().vocab, &spec).unwrap());
    });
    Known {
        path,
        spec,
        expected: expected.unwrap(),
    }
}

fn random(name: &str, spec: &ModelSpec) -> PathBuf {
    publish(name, |path| {
        models::write_random(path, &llama().vocab, spec).unwrap();
    })
}

/// Writes a model under another name first: a running target may have the old one mapped.
fn publish(name: &str, write: impl FnOnce(&Path)) -> PathBuf {
    let path = llama().models_cache.join(name);
    let new = llama()
        .models_cache
        .join(format!("{name}.{}", std::process::id()));
    write(&new);
    fs::rename(&new, &path).unwrap();
    path
}

/// Fails unless every token's experts are, in all layers that have a row for it, those of one and
/// the same token of the model.
pub fn assert_tokens_of(known: &Known, rows: &[(u32, Vec<u32>)]) {
    let full = 0..known.expected.layers() - 1;
    let of_layer = |layer: u32| -> Vec<&[u32]> {
        let of = rows.iter().filter(|(of, _)| *of == layer);
        of.map(|(_, ids)| ids.as_slice()).collect()
    };
    let layers: Vec<Vec<&[u32]>> = full.map(of_layer).collect();
    for token in 0..layers[0].len() {
        let fits = (0..known.spec.n_embd).any(|class| {
            layers
                .iter()
                .zip(0..)
                .all(|(rows, layer)| rows[token] == known.expected.ids(layer, class))
        });
        assert!(fits, "token {token} has experts that no token has");
    }
}

/// A command line of the driver, with options.
pub fn driver(model: &Path, options: &[&str]) -> Command {
    let mut command = Oracle::command_line(&llama().oracle, model);
    command.args(options);
    command
}

/// A driver that `expert-trace run` traces from its first instruction.
pub struct Traced {
    /// Takes commands.
    pub target: Oracle,
    directory: TempDir,
}

impl Traced {
    /// Starts it.
    pub fn start(model: &Path, options: &[&str]) -> Self {
        let directory = scratch();
        let tracer_options = [
            format!("--output={}", directory.path().join("stats.json").display()),
            format!("--log={}", directory.path().join("log").display()),
            "--top=0".to_owned(),
        ];
        let command = tracer::run(&tracer_options, &driver(model, options));
        Self {
            target: Oracle::spawn(&mut command.unwrap()).unwrap(),
            directory,
        }
    }

    /// Sends a command, and gives the ids it is answered with.
    pub fn command(&mut self, command: &str) -> Vec<u32> {
        ids(&self.target.command(command).unwrap())
    }

    /// Ends the target; gives the document, of which nothing may be lost, and the rows of the log.
    pub fn finish(self) -> (Stats, Vec<(u32, Vec<u32>)>) {
        assert!(self.target.quit().unwrap().success());
        let stats = Stats::read(&self.directory.path().join("stats.json")).unwrap();
        stats.assert_complete();
        let log = read_log(&self.directory.path().join("log")).unwrap();
        (stats, log)
    }
}

/// Has a traced driver do `commands`, and fails unless the rows are, in the same order, those that its
/// own eval callback sees. Gives the document and the rows.
pub fn compare_with_callback(
    model: &Path,
    options: &[&str],
    commands: &[&str],
) -> (Stats, Vec<(u32, Vec<u32>)>) {
    let directory = scratch();
    let dump = directory.path().join("dump");
    let dump_path = dump.to_string_lossy();
    let mut traced = Traced::start(model, &[options, &["--dump", &dump_path]].concat());
    for command in commands {
        traced.command(command);
    }
    let (stats, seen) = traced.finish();

    let oracle: Vec<(u32, Vec<u32>)> = read_dump(&dump)
        .unwrap()
        .into_iter()
        .map(|row| (row.layer, row.ids))
        .collect();
    assert_eq!(seen, oracle);
    (stats, seen)
}

/// A command line of one of llama.cpp's programs, with its standard input closed.
pub fn llama_program(name: &str, model: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(llama().program(name));
    command.arg("-m").arg(model).args(options);
    command
}

/// A directory for what one test writes.
pub fn scratch() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Ids that a driver printed.
pub fn ids(answer: &str) -> Vec<u32> {
    answer
        .split_whitespace()
        .map(|id| id.parse().unwrap())
        .collect()
}
