//! What `export` writes, read back by the tools that others use, and by what wrote it.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output},
};

use expert_trace_tests::{
    models::{ModelSpec, Shape},
    python,
    tracer::{self, Counts, Stats},
};
use serde_json::json;
use tempfile::TempDir;

use crate::support::{Traced, assert_schema, known_quantized, known_small, scratch, shape};

/// `expert-trace ARGUMENTS`, without any right that tracing needs.
fn expert_trace(arguments: &[&str]) -> Output {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.arg(tracer::program().unwrap()).args(arguments);
    tracer::without_sudo(&mut command);
    command.output().unwrap()
}

/// The same, which is to succeed. Gives what was said.
fn succeed(arguments: &[&str]) -> String {
    let output = expert_trace(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// A directory where everybody may read and write.
struct Open(TempDir);

impl Open {
    fn new() -> Self {
        let directory = scratch();
        fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
        Self(directory)
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// The trace of a target that did this, which everybody may read, and the document.
    fn trace(&self, model: &Path, commands: &[&str]) -> (String, Stats) {
        let recorded = self.path("routes.arrows");
        let option = format!("--trace={recorded}");
        let options = ["-t", "2", "-c", "4096", "-b", "2048", "-ub", "64"];
        let mut traced = Traced::start_with(&[&option], model, &options);
        for command in commands {
            traced.command(command);
        }
        let (stats, _) = traced.finish();
        fs::set_permissions(&recorded, Permissions::from_mode(0o644)).unwrap();
        (recorded, stats)
    }
}

/// Prompts, generation and two contexts.
const COMMANDS: [&str; 5] = [
    "prompt 0 150 20",
    "generate 0 20 7",
    "batch 0:30 1:31",
    "context",
    "prompt 0 10 300",
];

/// Floats, too: what is written again must not be rounded on its way.
#[test]
fn json_of_a_trace_is_the_document_of_its_capture() {
    for model in [
        known_small().path.clone(),
        shape("grovemoe", &Shape::GROVEMOE),
    ] {
        let directory = Open::new();
        let (trace, stats) = directory.trace(&model, &COMMANDS);
        let output = directory.path("again.json");
        let said = succeed(&["export", &trace, "--format", "json", "-o", &output]);
        assert_eq!(said, "");
        let again = Stats::read(output.as_ref()).unwrap();
        assert_schema(&again);
        assert_eq!(again.0, stats.0);
        let blocks = stats.0["contexts"][0]["layers"][0]["second_block"].is_object();
        assert_eq!(blocks, model.to_string_lossy().contains("grovemoe"));
        // Of a document, itself.
        let copy = directory.path("copy.json");
        succeed(&["export", &output, "--format", "json", "-o", &copy]);
        assert_eq!(fs::read(&output).unwrap(), fs::read(&copy).unwrap());
    }
}

#[test]
fn json_of_a_trace_that_was_cut_is_a_profile() {
    let directory = Open::new();
    let (trace, stats) = directory.trace(&known_small().path, &COMMANDS);
    let bytes = fs::read(&trace).unwrap();
    let cut = directory.path("cut.arrows");
    // Without the last batch's end, and so without the summary, which is in it.
    fs::write(&cut, &bytes[..bytes.len() - 100]).unwrap();
    let output = directory.path("cut.json");
    let said = succeed(&["export", &cut, "--format", "json", "-o", &output]);
    assert!(
        said.contains("whether it is complete is not known"),
        "{said}"
    );
    let profile = Stats::read(output.as_ref()).unwrap();
    assert_eq!(profile.0["schema"]["name"], "expert-trace-profile");
    assert!(
        profile.0["contexts"].as_array().unwrap().len()
            <= stats.0["contexts"].as_array().unwrap().len()
    );
}

#[test]
fn csv_of_counts_has_a_line_for_every_activation() {
    let directory = Open::new();
    let (trace, stats) = directory.trace(&known_small().path, &COMMANDS);
    let json = directory.path("stats.json");
    fs::write(&json, stats.0.to_string()).unwrap();
    let lines = |input: &str| {
        let output = directory.path("lines.csv");
        let said = succeed(&["export", input, "--format", "csv", "-o", &output]);
        let text = fs::read_to_string(&output).unwrap();
        let mut counts = Counts::new();
        for line in text.lines().skip(1) {
            let (layer, expert) = line.split_once(',').unwrap();
            let layer = counts.entry(layer.parse().unwrap()).or_default();
            *layer.entry(expert.parse().unwrap()).or_default() += 1;
        }
        (counts, said)
    };
    let (of_trace, _) = lines(&trace);
    let (of_counts, said) = lines(&json);
    assert_eq!(of_trace, stats.counts());
    assert_eq!(of_counts, stats.counts());
    for part in ["by layer and expert", "not told apart"] {
        assert!(said.contains(part), "{said}");
    }
}

/// What experts take is in the document, in the trace, and in what others read of it.
#[test]
fn experts_have_their_bytes() {
    for known in [known_small(), known_quantized()] {
        let spec: &ModelSpec = &known.spec;
        let directory = Open::new();
        let (trace, stats) = directory.trace(&known.path, &["prompt 0 10 20"]);
        let (expert, dense) = spec.layer_bytes();
        let layers: Vec<_> = (0..spec.layers)
            .map(|id| json!({"layer_id": id, "expert_bytes": expert, "dense_bytes": dense}))
            .collect();
        assert_eq!(stats.0["models"][0]["layer_bytes"], json!(layers));

        let routes = directory.path("routes.csv");
        succeed(&["export", &trace, "--format", "route-trace", "-o", &routes]);
        let text = fs::read_to_string(&routes).unwrap();
        let preamble = format!("# layer=0 expert_bytes={expert} dense_bytes={dense}\n");
        assert!(text.contains(&preamble), "{}", &text[..400]);
        let row = format!(",nan,0,{expert},0\n");
        let rows = text.matches(&row).count();
        assert_eq!(
            rows,
            text.lines().filter(|line| line.starts_with("0,")).count()
        );

        let imported = directory.path("imported.arrows");
        succeed(&[
            "import",
            &routes,
            "--format",
            "route-trace",
            "-o",
            &imported,
        ]);
        let again = directory.path("again.csv");
        succeed(&["export", &imported, "--format", "route-trace", "-o", &again]);
        assert_eq!(fs::read_to_string(&again).unwrap(), text);
    }
}

#[test]
fn every_library_counts_the_same() {
    let directory = Open::new();
    let path = |name: &str| directory.path(name);
    let (recorded, _) = directory.trace(&known_small().path, &COMMANDS);
    let mut files = vec![recorded.clone()];
    for (format, name) in [
        ("parquet", "routes.parquet"),
        ("json", "stats.json"),
        ("jsonl", "routes.jsonl"),
        ("npy", "counts.npy"),
    ] {
        let output = path(name);
        succeed(&["export", &recorded, "--format", format, "-o", &output]);
        files.push(output);
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/read_back.py");
    let mut python = Command::new(python::interpreter().unwrap());
    let output = python.arg(script).args(&files).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    for library in [
        "pyarrow",
        "pandas",
        "DuckDB, Parquet",
        "Polars, Arrow",
        "DuckDB, JSON",
        "numpy",
    ] {
        assert!(said.contains(library), "{library}: {said}");
    }
}
