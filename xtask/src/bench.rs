//! Benchmarks: what tracing costs, as a result file and a table each.
//!
//! Most are end-to-end tests that print results; what they measure is described there.

mod analyze;
mod flood;
mod hits;
mod nodes;
mod overhead;
mod scale;
mod start;
mod throughput;

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use expert_trace_tests::builds::Build;
use serde_json::Value;

use crate::document::Place;
use crate::results::ResultFile;
use crate::{command, llama, packages, prebuilt, results, suite, system, test, workspace};

/// Document that shows the tables.
const DOCUMENT: &str = "docs/performance.md";

/// What `overhead` compares with.
pub const BPFTRACE: &[&str] = &["bpftrace"];

/// A benchmark.
struct Bench {
    name: &'static str,
    file: ResultFile,
    place: Place,
    source: Source,
    table: fn(&[Value]) -> String,
    plot: Option<Plot>,
}

/// Where results come from.
enum Source {
    /// The end-to-end tests `bench::NAME::`.
    Tests,
    /// Something else that gives them in rows.
    Rows(fn(&Path) -> Result<Vec<Value>>),
}

/// The results as a picture that the document shows beside the table.
struct Plot {
    path: &'static str,
    svg: fn(&[Value]) -> String,
}

/// A benchmark whose files go by its name; `$rows` is the member of its results that has them.
macro_rules! bench {
    ($name:literal, $rows:literal, $source:expr, $table:path) => {
        bench!($name, $rows, $source, $table, None)
    };
    ($name:literal, $rows:literal, $source:expr, $table:path, plot $svg:path) => {
        bench!(
            $name,
            $rows,
            $source,
            $table,
            Some(Plot {
                path: concat!("docs/results/bench-", $name, ".svg"),
                svg: $svg,
            })
        )
    };
    ($name:literal, $rows:literal, $source:expr, $table:path, $plot:expr) => {
        Bench {
            name: $name,
            file: ResultFile {
                path: concat!("docs/results/bench-", $name, ".json"),
                rows: $rows,
                command: concat!("cargo xtask bench ", $name),
            },
            place: Place {
                begin: concat!("<!-- Made by `cargo xtask bench ", $name, "`: begin -->\n"),
                end: concat!("<!-- end of ", $name, " -->\n"),
            },
            source: $source,
            table: $table,
            plot: $plot,
        }
    };
}

static ALL: [Bench; 8] = [
    bench!("overhead", "costs", Source::Tests, overhead::table, plot overhead::plot),
    bench!("hits", "hits", Source::Tests, hits::table),
    bench!("nodes", "shapes", Source::Tests, nodes::table),
    bench!("start", "times", Source::Tests, start::table),
    bench!(
        "throughput",
        "benchmarks",
        Source::Rows(throughput::measure),
        throughput::table
    ),
    bench!(
        "analyze",
        "measured",
        Source::Rows(analyze::measure),
        analyze::table
    ),
    bench!("flood", "measured", Source::Tests, flood::table, plot flood::plot),
    // After those that it computes from.
    bench!(
        "scale",
        "computed",
        Source::Rows(scale::compute),
        scale::table
    ),
];

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
    let name = arguments.name.as_deref();
    for bench in &ALL {
        if name.is_none_or(|name| name == bench.name) {
            measure(root, bench, arguments.minutes)?;
        }
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
    ensure!(!rows.is_empty(), "nothing was measured");
    let table = (bench.table)(&rows);
    print!("\n{table}");
    let mut document = results::header(root, &bench.file, None)?;
    document["processor"] = system::processor()?.into();
    if let Some(sum) = sum {
        document["tests"] = sum.into();
    }
    if let Some(Plot { path, svg }) = &bench.plot {
        fs::write(root.join(path), svg(&rows)).with_context(|| format!("cannot write {path}"))?;
    }
    document[bench.file.rows] = rows.into();
    results::write(&root.join(bench.file.path), &document)?;
    bench.place.show(root, DOCUMENT, &table)
}

/// The result file of a benchmark.
fn file(name: &str) -> &'static ResultFile {
    let named = ALL.iter().find(|bench| bench.name == name);
    named
        .map(|bench| &bench.file)
        .expect("a benchmark of that name")
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
    packages::ensure(BPFTRACE, "measuring against scripts")?;
    let llama = llama::provision(root)?;
    let builds = prebuilt::some(root)?;
    let list = workspace::target()?.join(test::BUILDS);
    command::run(&mut workspace::release_build(root))?;
    let mut cargo = workspace::cargo(root);
    cargo
        // Writing large models takes too long otherwise.
        .args(["test", "--release", "--package", "expert-trace-tests"])
        .args(["--test", "e2e", "--", "--test-threads=1", "--nocapture"])
        .args(["--ignored", &format!("bench::{}::", bench.name)])
        .env("EXPERT_TRACE_TEST_BIN", workspace::release_program()?)
        .env("EXPERT_TRACE_BENCH_MINUTES", minutes.to_string())
        .envs(llama.to_env())
        .envs([Build::write_list(&list, &builds)?]);
    Ok(cargo)
}
