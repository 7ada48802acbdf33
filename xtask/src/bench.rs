//! Benchmarks: what tracing costs, as a result file and a table each.
//!
//! Most are end-to-end tests that print results; what they measure is described there.

mod nodes;

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::document::Place;
use crate::results::ResultFile;
use crate::{command, llama, results, suite, system, workspace};

/// Document that shows the tables.
const DOCUMENT: &str = "docs/performance.md";

/// A benchmark of end-to-end tests.
struct Bench {
    name: &'static str,
    file: ResultFile,
    place: Place,
    table: fn(&[Value]) -> String,
}

static ALL: [Bench; 1] = [Bench {
    name: "nodes",
    file: ResultFile {
        path: "docs/results/bench-nodes.json",
        rows: "shapes",
        command: "cargo xtask bench nodes",
    },
    place: Place {
        begin: "<!-- Made by `cargo xtask bench nodes`: begin -->",
        end: "<!-- end of nodes -->",
    },
    table: nodes::table,
}];

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
    let found = suite::run(&mut test_command(root, bench, minutes)?)?;
    let table = (bench.table)(&found.results);
    print!("\n{table}");
    found.ensure_passed()?;
    ensure!(!found.results.is_empty(), "nothing was measured");
    let mut document = results::header(root, &bench.file, None)?;
    document["processor"] = system::processor()?.into();
    document["tests"] = found.sum.into();
    document[bench.file.rows] = found.results.into();
    results::write(&root.join(bench.file.path), &document)?;
    bench.place.show(root, DOCUMENT, &table)
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
