//! One build of llama.cpp after another: is every row of expert ids the one that follows from its token,
//! by `run` and by `attach`? Where it cannot be, the build's description has the words in which the
//! tracer has to say so.
//!
//! The builds come as a list from `cargo xtask compat`, which makes a table of the results. In CI there
//! are only a stripped copy of the usual build, and some that others have published.
//!
//! Builds that can put routers and experts anywhere are traced once for each [route](routes).

mod routes;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use expert_trace_tests::{
    builds::{Build, Driven, Fate, Model, strip_libraries},
    driver::Driver,
    models::Expected,
    oracle::Oracle,
    server::Server,
    tracer::{self, Attached, Counts, Refusal, Stats, count, read_log},
};
use serde::Serialize;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    layouts::compile_to,
    support::{Known, known, known_llama, llama, scratch},
};

/// Comes before a row of the table, for `cargo xtask compat`.
const RESULT: &str = "RESULT ";

/// How much a target is told to decode. A driver's context has room for 512 tokens in all.
#[derive(Clone, Copy)]
struct Load {
    /// Lengths of the prompts, each decoded by one call.
    prompts: &'static [u32],
    /// Tokens that are decoded one by one after them.
    decoded: usize,
}

/// What is decoded before a tracer attaches.
const BEFORE: Load = Load {
    prompts: &[1],
    decoded: 0,
};

const LOAD: Load = Load {
    prompts: &[1, 7, 200],
    decoded: 32,
};

/// What llama.cpp says of weights that it has rearranged.
const REPACKED: &str = "CPU_REPACK model buffer size";

/// What is in lines in which the tracer says what it has not seen. A warm-up that it has left out is no
/// excuse for a row that is missing.
const ADMISSIONS: [&str; 5] = [
    "INCOMPLETE: ",
    "No expert routing was seen: ",
    "Not visible: ",
    "Seen in some of ",
    "seen only in part at the edge of what is counted",
];

/// Exit status of the tracer when it is at fault, or cannot do what it is asked.
const TRACER_FAILED: i32 = 125;

/// What has become of a build.
#[derive(Debug, Serialize)]
struct Row {
    build: String,
    version: String,
    model: &'static str,
    /// Whether the experts' weights were rearranged for the processor when the model was loaded.
    repacked: bool,
    #[serde(flatten)]
    by_run: Found,
    /// Of all probes, while tokens are decoded one by one; `None` where no pass was seen.
    hits_per_token: Option<f64>,
    run: Outcome,
    attach: Outcome,
}

/// What the tracer has found in the target.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Found {
    hooks: Vec<Hook>,
    /// Builds that have this `ggml_tensor`.
    layout: Option<String>,
    layout_found_by: Option<String>,
    pass_source: Option<String>,
    phase_source: Option<String>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Hook {
    hook: String,
    symbol: String,
    file: String,
    table: String,
    hits: u64,
}

/// How what the tracer has seen compares with what follows from the tokens.
#[derive(Debug, Serialize)]
struct Outcome {
    /// Every row was seen once, in order, with its experts, and counted, and the capture is complete.
    equal: bool,
    rows: usize,
    expected: usize,
    complete: bool,
    /// By which the rows came, in alphabetical order.
    routes: Vec<String>,
    /// Exit status of a tracer that did not attach.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<i32>,
    /// What the tracer says of what it has not seen.
    says: Vec<String>,
}

impl Outcome {
    /// Whether it is what has to come of the build.
    fn is(&self, fate: &Fate) -> bool {
        let says = |words: &String| self.says.iter().any(|line| line.contains(words));
        match fate {
            Fate::Equal => self.equal,
            Fate::Unseen(words) => self.refused.is_none() && self.rows == 0 && says(words),
            Fate::Refused(words) => self.refused == Some(TRACER_FAILED) && says(words),
        }
    }
}

/// A build with its model loaded, waiting to be told what to decode.
enum Target {
    Driver(Driver),
    Server(Server),
    Oracle(Oracle),
}

/// What has gone through a model.
#[derive(Debug, Default)]
struct Work {
    tokens: Vec<u32>,
    /// Those of them whose output was wanted: the last layer computes no others.
    outputs: Vec<u32>,
}

impl Target {
    /// Starts it, or what starts it. What it says goes to the file `said`.
    fn start(build: &Build, command: &mut Command, said: &Path) -> Result<Self> {
        Ok(match build.driven {
            Driven::Lines => {
                command.stderr(File::create(said)?);
                let driver = Driver::spawn(command);
                Self::Driver(driver.with_context(|| fs::read_to_string(said).unwrap_or_default())?)
            }
            Driven::Http => Self::Server(Server::start(command, said)?),
            Driven::Oracle => {
                command.stderr(File::create(said)?);
                let oracle = Oracle::spawn(command);
                Self::Oracle(oracle.with_context(|| fs::read_to_string(said).unwrap_or_default())?)
            }
        })
    }

    fn pid(&self) -> u32 {
        match self {
            Self::Driver(driver) => driver.pid(),
            Self::Server(server) => server.pid(),
            Self::Oracle(oracle) => oracle.pid(),
        }
    }

    fn decode(&mut self, load: Load) -> Result<Work> {
        let Load { prompts, decoded } = load;
        let mut work = Work::default();
        for (n, length) in (0..).zip(prompts) {
            let start = 1000 + 17 * n;
            let prompt: Vec<u32> = (start..start + length).collect();
            let last = n + 1 == prompts.len() as u32;
            let following = self.continue_by(&prompt, if last { decoded } else { 0 })?;
            work.tokens.extend(&prompt);
            work.outputs.extend(prompt.last());
            work.tokens.extend(&following);
            work.outputs.extend(&following);
        }
        Ok(work)
    }

    /// Has it decode a prompt at once and then so many tokens one by one, which are returned.
    fn continue_by(&mut self, prompt: &[u32], decoded: usize) -> Result<Vec<u32>> {
        let own = (0..decoded as u32).map(|n| 5000 + 31 * n);
        match self {
            Self::Driver(driver) => {
                driver.decode(prompt)?;
                for token in own.clone() {
                    driver.decode(&[token])?;
                }
                Ok(own.collect())
            }
            Self::Oracle(oracle) => {
                let [first, length] = [prompt[0] as usize, prompt.len()];
                oracle.command(&format!("prompt 0 {length} {first}"))?;
                for token in own.clone() {
                    oracle.command(&format!("decode 0 {token}"))?;
                }
                Ok(own.collect())
            }
            Self::Server(server) => {
                // The last one that it generates does not go through the model.
                let mut tokens = server.complete(prompt, decoded + 1)?;
                tokens.truncate(decoded);
                Ok(tokens)
            }
        }
    }

    fn end(self) -> Result<()> {
        let status = match self {
            Self::Driver(driver) => driver.quit()?,
            Self::Oracle(oracle) => oracle.quit()?,
            Self::Server(server) => server.stop()?.0,
        };
        ensure!(status.success(), "it ended with {status}");
        Ok(())
    }
}

/// Where a tracer and its target write.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(scratch())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn options(&self) -> [String; 3] {
        [
            format!("--output={}", self.path("stats.json").display()),
            format!("--log={}", self.path("log").display()),
            "--top=0".to_owned(),
        ]
    }

    fn stats(&self) -> Result<Stats> {
        Stats::read(&self.path("stats.json"))
    }

    fn read(&self, name: &str) -> Result<String> {
        Ok(fs::read_to_string(self.path(name))?)
    }

    /// Compares what was traced with what was decoded.
    fn compare(&self, work: &Work, expected: &Expected, says: Vec<String>) -> Result<Outcome> {
        let mut seen = Rows::new();
        for (layer, ids) in read_log(&self.path("log"))? {
            seen.entry(layer).or_default().push(ids);
        }
        let expected = work.rows(expected);
        let stats = self.stats()?;
        let complete = stats.0["integrity"]["complete"] == true;
        Ok(Outcome {
            equal: seen == expected && stats.counts() == counts(&expected) && complete,
            rows: seen.values().map(Vec::len).sum(),
            expected: expected.values().map(Vec::len).sum(),
            complete,
            routes: stats.routes(),
            refused: None,
            says,
        })
    }
}

/// Expert ids by layer, in the order in which they were computed.
type Rows = BTreeMap<u32, Vec<Vec<u32>>>;

fn counts(rows: &Rows) -> Counts {
    let rows = rows
        .iter()
        .flat_map(|(layer, rows)| rows.iter().map(|ids| (*layer, ids.as_slice())));
    count(rows)
}

impl Work {
    /// The rows that follow from the tokens.
    fn rows(&self, expected: &Expected) -> Rows {
        let of_layer = |layer| {
            let last = layer + 1 == expected.layers();
            let tokens = if last { &self.outputs } else { &self.tokens };
            let ids = tokens.iter();
            let ids = ids.map(|token| expected.ids(layer, *token).to_vec());
            (layer, ids.collect())
        };
        (0..expected.layers()).map(of_layer).collect()
    }
}

/// What the tracer says of what it has not seen, without what differs from machine to machine.
fn admissions(said: &str, build: &Build) -> Vec<String> {
    let lines = said.lines().map(str::trim);
    let lines = lines.filter(|line| ADMISSIONS.iter().any(|part| line.contains(part)));
    lines.map(|line| without_directories(line, build)).collect()
}

/// Leaves of paths in the build's command line their file names.
fn without_directories(text: &str, build: &Build) -> String {
    let directories = build.command.iter().filter_map(|path| path.parent());
    let mut text = text.to_owned();
    for directory in directories.filter(|directory| directory.is_absolute()) {
        text = text.replace(&format!("{}/", directory.display()), "");
    }
    text
}

/// Traces the build from its first instruction to its end. Gives what was found in it as well, and
/// whether the experts were repacked.
fn by_run(build: &Build, known: &Known, load: Load) -> Result<(Outcome, Found, bool)> {
    let files = Files::new();
    let mut command = tracer::run(&files.options(), &build.command_line(&known.path))?;
    command.envs(&build.environment);
    let mut target = Target::start(build, &mut command, &files.path("said"))?;
    let work = target.decode(load)?;
    target.end()?;
    let said = files.read("said")?;
    let outcome = files.compare(&work, &known.expected, admissions(&said, build))?;
    Ok((outcome, Found::of(&files.stats()?), said.contains(REPACKED)))
}

/// Traces the build after it has computed something. Gives the hits per token as well.
fn by_attach(build: &Build, known: &Known, load: Load) -> Result<(Outcome, Option<f64>)> {
    let files = Files::new();
    let mut command = build.command_line(&known.path);
    let mut target = Target::start(build, &mut command, &files.path("said"))?;
    target.decode(BEFORE)?;
    let tracer = match Attached::to(target.pid(), &files.options()) {
        Ok(tracer) => tracer,
        Err(error) => {
            let refusal: Refusal = error.downcast()?;
            let said = refusal.said.replace(&target.pid().to_string(), "PID");
            let said = said
                .rsplit("expert-trace: error: ")
                .next()
                .unwrap_or_default();
            let work = target.decode(load)?;
            target.end()?;
            let expected = work.rows(&known.expected);
            let outcome = Outcome {
                equal: false,
                rows: 0,
                expected: expected.values().map(Vec::len).sum(),
                complete: false,
                routes: Vec::new(),
                refused: refusal.status.code(),
                says: vec![without_directories(said.trim_end(), build)],
            };
            return Ok((outcome, None));
        }
    };
    let work = target.decode(load)?;
    let said = tracer.interrupt()?;
    target.end()?;
    let outcome = files.compare(&work, &known.expected, admissions(&said, build))?;
    Ok((outcome, hits_per_token(&files.stats()?)))
}

impl Found {
    /// The one place that knows where the document has it.
    fn of(stats: &Stats) -> Self {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let target = &stats.0["target"];
        let hook = |probe: &Value| {
            let file = Path::new(probe["file"].as_str()?).file_name()?;
            Some(Hook {
                hook: text(&probe["hook"])?,
                symbol: text(&probe["symbol"])?,
                file: file.to_string_lossy().into_owned(),
                table: text(&probe["table"])?,
                hits: probe["hits"].as_u64()?,
            })
        };
        let hooks = target["hooks"].as_array().into_iter().flatten();
        let layouts = target["tensor_layouts"].as_array();
        let shown = |layout: &&Value| !layout["builds"].is_null();
        let layout = layouts.and_then(|layouts| layouts.iter().find(shown));
        let layout = layout.unwrap_or(&Value::Null);
        let context = &stats.0["contexts"][0];
        Self {
            hooks: hooks.filter_map(hook).collect(),
            layout: text(&layout["builds"]),
            layout_found_by: text(&layout["found_by"]),
            pass_source: text(&context["pass_source"]),
            phase_source: text(&context["phase_source"]),
        }
    }

    /// Fails unless expert ids were read by a function that this symbol table has, and in no other file
    /// than one.
    fn assert_ids_from(&self, table: &str) {
        let of_ids = |hook: &&Hook| hook.hook == "expert_ids" && hook.hits > 0;
        let tables: Vec<&str> = self
            .hooks
            .iter()
            .filter(of_ids)
            .map(|hook| hook.table.as_str())
            .collect();
        assert_eq!(tables, [table]);
    }
}

/// Of a capture in which all passes were counted. Each has as many, be it of one token or of many.
fn hits_per_token(stats: &Stats) -> Option<f64> {
    let passes = stats.0["contexts"][0]["passes"].as_f64()?;
    let hits: u64 = Found::of(stats).hooks.iter().map(|hook| hook.hits).sum();
    Some(hits as f64 / passes)
}

fn trace(build: &Build, model: Model) -> Result<Row> {
    let (spec, name) = model.spec();
    let known = known(&format!("compat-{}.gguf", name.replace(", ", "-")), spec);
    trace_with(build, &known, name)
}

/// The same with a model that is there.
fn trace_with(build: &Build, known: &Known, model: &'static str) -> Result<Row> {
    let (run, by_run, repacked) = by_run(build, known, LOAD).context("by run")?;
    let (attach, hits_per_token) = by_attach(build, known, LOAD).context("by attach")?;
    Ok(Row {
        build: build.name.clone(),
        version: build.version.clone(),
        model,
        repacked,
        by_run,
        hits_per_token,
        run,
        attach,
    })
}

/// Libraries as distributions ship them: the dynamic linker's symbols are all there is.
#[test]
fn stripped_shared_libraries() {
    let directory = scratch();
    strip_libraries(&llama().bin, directory.path()).unwrap();
    let driver = directory.path().join("driver");
    compile_to(&driver, &["driver.c"], &["-ldl"]);
    let library = directory.path().join("libllama.so");
    let build = Build {
        name: "stripped".to_owned(),
        version: String::new(),
        command: vec![driver, "--library".into(), library],
        environment: BTreeMap::new(),
        driven: Driven::Lines,
        models: Vec::new(),
        by_run: Fate::Equal,
        by_attach: Fate::Equal,
    };
    let row = trace(&build, Model::Qwen3Moe).unwrap();
    assert!(row.run.equal, "{:?}", row.run);
    assert!(row.attach.equal, "{:?}", row.attach);
    let hooks = &row.by_run.hooks;
    assert!(hooks.iter().any(|hook| hook.hook == "expert_ids"));
    assert!(
        hooks.iter().all(|hook| hook.table == ".dynsym"),
        "{hooks:?}"
    );
}

/// One of the builds that others have published, traced with the model that even the oldest can load.
fn published(name: &str) -> Row {
    let list = Build::list_from_env().unwrap();
    let build = list.iter().find(|build| build.name == name);
    let build = build.unwrap_or_else(|| panic!("no {name} in the list"));
    let row = trace_with(build, known_llama(), "llama").unwrap();
    println!("{row:#?}");
    row
}

/// `ggml_tensor` with `src` at 160, `get_rows` as a local symbol, and all of ggml in one library.
#[test]
fn node_llama_cpp_of_2024() {
    let row = published("node-llama-cpp 3.1.1");
    assert!(row.run.equal && row.attach.equal);
    assert_eq!(row.by_run.layout.as_deref(), Some("b3209 to b4105"));
    assert_eq!(row.by_run.phase_source.as_deref(), Some("rows"));
    row.by_run.assert_ids_from(".symtab");
}

/// The CPU backend is opened at run time, after other variants of it were opened and closed.
#[test]
fn node_llama_cpp_of_2026() {
    let row = published("node-llama-cpp 3.22.1");
    assert!(row.run.equal && row.attach.equal);
    assert_eq!(row.by_run.layout.as_deref(), Some("b4106 or newer"));
    assert_eq!(row.by_run.phase_source.as_deref(), Some("ubatch"));
    row.by_run.assert_ids_from(".symtab");
}

/// All of llama.cpp in one library of a Python process.
#[test]
fn python_extension_of_2025() {
    let row = published("xllamacpp 0.1.4");
    assert!(row.run.equal && row.attach.equal);
    assert_eq!(row.by_run.layout.as_deref(), Some("b4106 or newer"));
    row.by_run.assert_ids_from(".symtab");
}

/// The same, of a llama.cpp with another `llama_ubatch`.
#[test]
fn python_extension_of_2026() {
    let row = published("xllamacpp 2026.10.11549");
    assert!(row.run.equal && row.attach.equal);
    assert_eq!(row.by_run.layout.as_deref(), Some("b4106 or newer"));
    assert_eq!(row.by_run.phase_source.as_deref(), Some("ubatch"));
    row.by_run.assert_ids_from(".symtab");
}

#[test]
#[ignore = "builds and downloads many llama.cpp; run by `cargo xtask compat`"]
fn every_build() {
    let mut faults = Vec::new();
    let builds = Build::list_from_env().unwrap();
    assert!(!builds.is_empty(), "no build is in the list");
    for build in builds.iter().filter(|build| !routes::are_for(build)) {
        for model in &build.models {
            let row = match trace(build, *model) {
                Ok(row) => row,
                Err(error) => {
                    faults.push(format!("{}, {model:?}: {error:#}", build.name));
                    continue;
                }
            };
            println!("{RESULT}{}", serde_json::to_string(&row).unwrap());
            for (how, outcome, fate) in [
                ("run", &row.run, &build.by_run),
                ("attach", &row.attach, &build.by_attach),
            ] {
                if !outcome.is(fate) {
                    let Row { build, model, .. } = &row;
                    faults.push(format!(
                        "{build}, {model}, by {how}: {outcome:?}, where {fate:?} was expected"
                    ));
                }
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}
