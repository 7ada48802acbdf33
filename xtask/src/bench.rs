//! Benchmarks: what tracing costs, as a result file and a table each.
//!
//! Most are end-to-end tests that print results; what they measure is described there.

mod flood;
mod scale;
mod throughput;

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::document::Place;
use crate::results::ResultFile;
use crate::{command, llama, results, suite, system, workspace};

/// Document that shows the tables.
const DOCUMENT: &str = "docs/performance.md";

/// A benchmark.
struct Bench {
    name: &'static str,
    file: ResultFile,
    place: Place,
    source: Source,
    table: Show,
    /// A plot beside the table: the file it goes to, and what makes it.
    plot: Option<(&'static str, Show)>,
}

/// Makes the text that shows results.
type Show = fn(&[Value]) -> String;

/// Where results come from.
enum Source {
    /// The end-to-end tests `bench::NAME::`.
    Tests,
    /// Something else that gives them in rows.
    Rows(fn(&Path) -> Result<Vec<Value>>),
}

static ALL: [Bench; 3] = [
    Bench {
        name: "throughput",
        file: ResultFile {
            path: "docs/results/bench-throughput.json",
            rows: "benchmarks",
            command: "cargo xtask bench throughput",
        },
        place: Place {
            begin: "<!-- Made by `cargo xtask bench throughput`: begin -->",
            end: "<!-- end of throughput -->",
        },
        source: Source::Rows(throughput::measure),
        table: throughput::table,
        plot: None,
    },
    Bench {
        name: "flood",
        file: FLOOD,
        place: Place {
            begin: "<!-- Made by `cargo xtask bench flood`: begin -->",
            end: "<!-- end of flood -->",
        },
        source: Source::Tests,
        table: flood::table,
        plot: Some(("docs/results/bench-flood.svg", flood::plot)),
    },
    // After those that it computes from.
    Bench {
        name: "scale",
        file: ResultFile {
            path: "docs/results/bench-scale.json",
            rows: "computed",
            command: "cargo xtask bench scale",
        },
        place: Place {
            begin: "<!-- Made by `cargo xtask bench scale`: begin -->",
            end: "<!-- end of scale -->",
        },
        source: Source::Rows(scale::compute),
        table: scale::table,
        plot: None,
    },
];

const FLOOD: ResultFile = ResultFile {
    path: "docs/results/bench-flood.json",
    rows: "measured",
    command: "cargo xtask bench flood",
};

#[derive(clap::Args)]
pub struct Arguments {
    /// Which: all, one after the other, if none is named
    #[arg(value_parser = ALL.each_ref().map(|bench| bench.name))]
    name: Option<String>,
    /// Give up after so many minutes, and print what is not resolved by then
    #[arg(long, value_name = "N", default_value_t = 60)]
    minutes: u32,
}

/// Result files of all benchmarks.
pub fn files() -> impl Iterator<Item = &'static ResultFile> {
    ALL.iter().map(|bench| &bench.file)
}

pub fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    ensure!(
        system::is_root(),
        "tracing another process needs root: run `sudo env \"PATH=$PATH\" \"HOME=$HOME\" cargo xtask bench`"
    );
    let wanted = |bench: &&Bench| {
        arguments
            .name
            .as_ref()
            .is_none_or(|name| name == bench.name)
    };
    for bench in ALL.iter().filter(wanted) {
        measure(root, bench, arguments.minutes)?;
    }
    Ok(())
}

fn measure(root: &Path, bench: &Bench, minutes: u32) -> Result<()> {
    let (rows, sum) = match bench.source {
        Source::Tests => {
            let found = suite::run(&mut test_command(root, bench, minutes)?)?;
            found.ensure_passed()?;
            (found.results, Some(found.sum))
        }
        Source::Rows(rows) => (rows(root)?, None),
    };
    let table = (bench.table)(&rows);
    print!("\n{table}");
    ensure!(!rows.is_empty(), "nothing was measured");
    let mut document = results::header(root, &bench.file, None)?;
    document["processor"] = system::processor()?.into();
    if let Some(sum) = sum {
        document["tests"] = sum.into();
    }
    if let Some((path, plot)) = bench.plot {
        fs::write(root.join(path), plot(&rows)).with_context(|| format!("cannot write {path}"))?;
    }
    document[bench.file.rows] = rows.into();
    results::write(&root.join(bench.file.path), &document)?;
    bench.place.show(root, DOCUMENT, &table)
}

/// What a result says of its goal.
fn met(met: &Value) -> &str {
    match met {
        Value::Bool(true) => "met",
        Value::Bool(false) => "not met",
        other => other.as_str().unwrap_or_default(),
    }
}

fn test_command(root: &Path, bench: &Bench, minutes: u32) -> Result<Command> {
    let llama = llama::provision(root)?;
    command::run(&mut workspace::release_build(root))?;
    let mut cargo = workspace::cargo(root);
    cargo
        // Writing large models takes too long otherwise.
        .args(["test", "--release", "--package", "expert-trace-tests"])
        .args(["--test", "e2e", "--", "--test-threads=1", "--nocapture"])
        .args(["--ignored", &format!("bench::{}::", bench.name)])
        .env("EXPERT_TRACE_TEST_BIN", workspace::release_program()?)
        .env("EXPERT_TRACE_BENCH_MINUTES", minutes.to_string())
        .envs(llama.to_env());
    Ok(cargo)
}
