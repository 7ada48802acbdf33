//! Models and programs that the tests share.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
    sync::OnceLock,
};

use expert_trace::trace::{Ending, Kind, Reader};
use expert_trace_tests::{
    llama::LlamaCpp,
    models::{self, Expected, ModelSpec, PlainArchitecture, Shape},
    oracle::{Oracle, read_dump},
    prebuilt::Prebuilt,
    tracer::{self, Counts, Stats, count, read_log},
};
use tempfile::TempDir;

/// The llama.cpp under the tracer.
pub fn llama() -> &'static LlamaCpp {
    static LLAMA: OnceLock<LlamaCpp> = OnceLock::new();
    LLAMA.get_or_init(|| LlamaCpp::from_env().unwrap())
}

/// What others have built.
pub fn prebuilt() -> &'static Prebuilt {
    static PREBUILT: OnceLock<Prebuilt> = OnceLock::new();
    PREBUILT.get_or_init(|| Prebuilt::from_env().unwrap())
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

/// The same as the small one, with a scale for every weight of every expert.
pub fn known_scaled() -> &'static Known {
    static MODEL: OnceLock<Known> = OnceLock::new();
    let spec = ModelSpec {
        scales: true,
        ..ModelSpec::SMALL
    };
    MODEL.get_or_init(|| known("known-scaled.gguf", spec))
}

/// The same as the small one, as a `llama` model.
pub fn known_llama() -> &'static Known {
    static MODEL: OnceLock<Known> = OnceLock::new();
    let spec = ModelSpec {
        architecture: PlainArchitecture::Llama,
        ..ModelSpec::SMALL
    };
    MODEL.get_or_init(|| known("known-llama.gguf", spec))
}

/// 4 layers, 32 experts in Q4_K, top-4.
pub fn known_quantized() -> &'static Known {
    static MODEL: OnceLock<Known> = OnceLock::new();
    MODEL.get_or_init(|| known("known-quantized.gguf", ModelSpec::QUANTIZED))
}

/// 3 layers, 32 experts, top-4, in three files: the first without tensors, the second with the router of
/// a layer whose experts are in the third.
pub fn known_sharded(directory: &Path) -> Known {
    let path = directory.join("m-00001-of-00003.gguf");
    let spec = ModelSpec {
        layers: 3,
        ..ModelSpec::SMALL
    };
    Known {
        expected: models::write_known_routing(&path, &llama().vocab, &spec).unwrap(),
        path,
        spec,
    }
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

/// Quantized random weights, as wide as a model in the field.
pub fn reference() -> &'static Path {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| {
        publish("reference.gguf", |path| {
            models::write_quantized(path, &llama().vocab, &ModelSpec::REFERENCE).unwrap();
        })
    })
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

/// Writes a model of this file name.
pub fn known(name: &str, spec: ModelSpec) -> Known {
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

/// Fails unless a document is as its schema says, and the schema strict enough to notice another key.
#[track_caller]
pub fn assert_schema(stats: &Stats) {
    let schema = include_str!("../../../docs/stats.schema.json");
    let schema = serde_json::from_str(schema).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let problems: Vec<String> = validator
        .iter_errors(&stats.0)
        .map(|error| format!("{error} at {}", error.instance_path()))
        .collect();
    assert_eq!(problems, Vec::<String>::new());
    let mut changed = stats.0.clone();
    changed["integrity"]["surprise"] = 1.into();
    assert!(!validator.is_valid(&changed));
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
        Self::start_with(&[], model, options)
    }

    /// The same, with options of the tracer.
    pub fn start_with(tracer_options: &[&str], model: &Path, options: &[&str]) -> Self {
        let directory = scratch();
        let mut all_options = vec![
            format!("--output={}", directory.path().join("stats.json").display()),
            format!("--log={}", directory.path().join("log").display()),
            "--top=0".to_owned(),
        ];
        all_options.extend(tracer_options.iter().map(|option| (*option).to_owned()));
        let command = tracer::run(&all_options, &driver(model, options));
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

    /// Ends the target, of which not all could be counted; gives the document.
    pub fn finish_incomplete(self) -> Stats {
        assert!(self.target.quit().unwrap().success());
        let stats = Stats::read(&self.directory.path().join("stats.json")).unwrap();
        assert_eq!(stats.0["integrity"]["complete"], false);
        stats
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

/// Traces a driver that decodes prompts and then generates, and fails unless every row is what follows
/// from its token. Gives the document.
pub fn compare_with_tokens(known: &Known, options: &[&str]) -> Stats {
    let prompts = [1, 7, 512, 1300, 1];
    let mut traced = Traced::start(&known.path, options);

    // The tokens that go through the model, and those whose output is wanted.
    let mut tokens: Vec<u32> = Vec::new();
    let mut outputs: Vec<u32> = Vec::new();
    let mut prefill = 0;
    let mut next = 0;
    for (sequence, length) in prompts.into_iter().enumerate() {
        let start = 1000 + 17 * sequence as u32;
        let answer = traced.command(&format!("prompt {sequence} {length} {start}"));
        tokens.extend(start..start + length);
        outputs.push(start + length - 1);
        prefill += u64::from(length);
        next = answer[0];
    }
    let last = prompts.len() - 1;
    let generated = traced.command(&format!("generate {last} 40 {next}"));
    let decoded: Vec<u32> = [&[next], &generated[..39]].concat();
    tokens.extend(&decoded);
    outputs.extend(&decoded);
    let (stats, log) = traced.finish();

    let layers = known.expected.layers();
    let of_layer = |layer| {
        if layer + 1 == layers {
            &outputs
        } else {
            &tokens
        }
    };
    let mut logged: BTreeMap<u32, Vec<Vec<u32>>> = BTreeMap::new();
    for (layer, ids) in log {
        logged.entry(layer).or_default().push(ids);
    }
    let mut expected_counts = Counts::new();
    for layer in 0..layers {
        let expected: Vec<&[u32]> = of_layer(layer)
            .iter()
            .map(|token| known.expected.ids(layer, *token))
            .collect();
        assert_eq!(logged[&layer], expected, "layer {layer}");
        expected_counts.extend(count(expected.into_iter().map(|ids| (layer, ids))));
    }
    assert_eq!(stats.counts(), expected_counts);
    assert_eq!(stats.context_counts(0), expected_counts);

    let first = &stats.0["contexts"][0]["layers"][0];
    assert_eq!(first["prefill_tokens"], prefill);
    assert_eq!(first["decode_tokens"], decoded.len());
    let last = &stats.0["contexts"][0]["layers"][layers as usize - 1];
    assert_eq!(last["prefill_tokens"], prompts.len());
    assert_eq!(last["decode_tokens"], decoded.len());
    assert_eq!(first["n_expert"], known.spec.n_expert);
    assert_eq!(first["k"], known.spec.k);
    assert_eq!(stats.0["contexts"][0]["phase_source"], "ubatch");
    assert_eq!(stats.0["contexts"][0]["model"], 0);
    assert_eq!(stats.0["models"][0]["n_expert"], known.spec.n_expert);
    assert_eq!(stats.0["excluded"].as_array().map(Vec::len), Some(0));
    for layer in stats.0["contexts"][0]["layers"].as_array().unwrap() {
        assert_eq!(layer["coverage"], "observed");
    }
    stats
}

/// Fails unless the experts that we have chosen from logits are those that the target has chosen. Where
/// they are not, the values must lie so close together that rounding decides.
pub fn assert_same_choice(
    stats: &Stats,
    chosen: &[(u32, Vec<u32>)],
    by_target: &[(u32, Vec<u32>)],
) {
    assert!(!chosen.is_empty());
    let rows = |log: &[(u32, Vec<u32>)]| {
        let mut rows: BTreeMap<u32, Vec<Vec<u32>>> = BTreeMap::new();
        for (layer, ids) in log {
            let mut ids = ids.clone();
            ids.sort_unstable();
            rows.entry(*layer).or_default().push(ids);
        }
        rows
    };
    let (chosen, by_target) = (rows(chosen), rows(by_target));
    assert_eq!(
        chosen.keys().collect::<Vec<_>>(),
        by_target.keys().collect::<Vec<_>>()
    );
    for layer in stats.0["contexts"][0]["layers"].as_array().unwrap() {
        let id = layer["layer_id"].as_u64().unwrap() as u32;
        let (ours, theirs) = (&chosen[&id], &by_target[&id]);
        assert_eq!(ours.len(), theirs.len(), "layer {id}");
        for (row, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
            if ours == theirs {
                continue;
            }
            let mut calls = layer["close_calls"].as_array().unwrap().iter();
            let close = calls.find(|call| call["row"] == row);
            let margin = close.and_then(|call| call["margin"].as_f64());
            println!("layer {id}, row {row}: {ours:?} or {theirs:?}, margin {margin:?}");
            assert!(
                margin.is_some_and(|margin| margin < 1e-3),
                "layer {id}, row {row}: we chose {ours:?}, and the target {theirs:?}"
            );
        }
    }
}

/// A command line of one of llama.cpp's programs, with its standard input closed.
pub fn llama_program(name: &str, model: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(llama().program(name));
    command.arg("-m").arg(model).args(options);
    command
}

/// A program of ours that says `waiting`, and goes on when it is told to.
pub struct Waiting {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Waiting {
    /// Starts it, by a tracer or alone.
    pub fn start(mut command: Command) -> Self {
        let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = pipes.spawn().unwrap();
        Self {
            stdin: child.stdin.take().unwrap(),
            stdout: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// Its process, or that of its tracer.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it says until it waits.
    pub fn until_it_waits(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            assert!(self.stdout.read_line(&mut line).unwrap() > 0, "{lines:?}");
            match line.trim_end() {
                "waiting" => return lines,
                other => lines.push(other.to_owned()),
            }
        }
    }

    /// Lets it go on.
    pub fn go_on(&mut self) {
        self.stdin.write_all(b"go\n").unwrap();
    }

    /// Ends its input; gives what it says to its end, and its status or that of its tracer.
    pub fn end(mut self) -> (String, ExitStatus) {
        drop(self.stdin);
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        (rest, self.child.wait().unwrap())
    }
}

/// What a tracer writes, in a directory that a target can use, too.
pub struct Files(TempDir);

impl Files {
    pub fn new() -> Self {
        Self(scratch())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Options of the tracer.
    pub fn options(&self) -> Vec<String> {
        vec![
            format!("--output={}", self.path("stats.json").display()),
            format!("--log={}", self.path("log").display()),
            "--top=0".to_owned(),
        ]
    }

    pub fn stats(&self) -> Stats {
        Stats::read(&self.path("stats.json")).unwrap()
    }

    /// Rows of the log, as they were written.
    pub fn log(&self) -> Vec<(u32, Vec<u32>)> {
        read_log(&self.path("log")).unwrap()
    }

    /// Option that has the tracer record a trace.
    pub fn trace_option(&self) -> String {
        format!("--trace={}", self.path("routes.arrows").display())
    }

    /// Rows of that trace, which must be whole.
    pub fn trace(&self) -> Vec<(u32, Vec<u32>)> {
        let mut reader = Reader::open(&self.path("routes.arrows")).unwrap();
        let mut rows = Vec::new();
        while let Some(batch) = reader.next().unwrap() {
            let routed = batch.rows().filter(|row| row.kind == Kind::Routed);
            rows.extend(routed.map(|row| {
                let experts = row.experts.iter().map(|id| u32::from(*id));
                (u32::from(row.layer.unwrap()), experts.collect())
            }));
        }
        assert_eq!(reader.ending(), Some(&Ending::Whole));
        rows
    }

    /// Rows of the log, by layer.
    pub fn rows(&self) -> BTreeMap<u32, Vec<Vec<u32>>> {
        let mut rows: BTreeMap<u32, Vec<Vec<u32>>> = BTreeMap::new();
        for (layer, ids) in self.log() {
            rows.entry(layer).or_default().push(ids);
        }
        rows
    }
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
