//! The tests that need an NVIDIA GPU, and what tracing costs there.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use expert_trace_tests::llama::LlamaCpp;
use serde_json::Value;

use crate::{command, llama, results, suite, system, workspace};

#[derive(clap::Args)]
pub struct Arguments {
    /// Compiled end-to-end tests to run, on a machine without Rust; needs --tracer
    #[arg(long, value_name = "FILE", requires = "tracer")]
    tests: Option<PathBuf>,
    /// expert-trace to test, instead of one that is built
    #[arg(long, value_name = "FILE")]
    tracer: Option<PathBuf>,
    /// Commit that these are of, on a machine without git
    #[arg(long, value_name = "HASH")]
    commit: Option<String>,
    /// File for the results
    #[arg(long, value_name = "FILE", default_value = results::CUDA.path)]
    output: PathBuf,
}

pub fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    ensure!(
        system::is_root(),
        "tracing another process needs root: run `sudo env \"PATH=$PATH\" \"HOME=$HOME\" cargo xtask cuda`"
    );
    let gpu = command::output(
        Command::new("nvidia-smi")
            .args(["--query-gpu=name,driver_version", "--format=csv,noheader"]),
    )
    .context("no NVIDIA GPU answers")?;
    let llama = llama::provision_cuda(root)?;
    let found = suite::run(&mut test_command(root, arguments, &llama)?)?;
    found.ensure_passed()?;
    ensure!(!found.results.is_empty(), "the tests measured nothing");
    let costs = found.results.into();
    print!("\n{}", table(&costs));
    let mut document = results::header(root, &results::CUDA, arguments.commit.as_deref())?;
    document["gpu"] = gpu.trim().into();
    document["tests"] = found.sum.into();
    document[results::CUDA.rows] = costs;
    results::write(&root.join(&arguments.output), &document)?;
    Ok(())
}

/// The measured costs as a table in Markdown, for docs/performance.md.
fn table(costs: &Value) -> String {
    let mut table =
        "| model | phase | setup | tokens/s | time, in units of | ratio (95 % interval) |\n\
                     |---|---|---|---|---|---|\n"
            .to_owned();
    for cost in costs.as_array().into_iter().flatten() {
        let text = |key: &str| cost[key].as_str().unwrap_or_default().to_owned();
        let ratio = |i: usize| cost["time_ratio"][i].as_f64().unwrap_or_default();
        let compared = if cost["arm"] == cost["compared_with"] {
            "| | |".to_owned()
        } else {
            let [low, median, high] = [0, 1, 2].map(ratio);
            format!(
                "| {} | {median:.3} ({low:.3} – {high:.3}) |",
                text("compared_with")
            )
        };
        let speed = cost["tokens_per_second"].as_f64().unwrap_or_default();
        let [model, phase, arm] = ["model", "phase", "arm"].map(text);
        table += &format!("| {model} | {phase} | {arm} | {speed:.0} {compared}\n");
    }
    table
}

fn test_command(root: &Path, arguments: &Arguments, llama: &LlamaCpp) -> Result<Command> {
    let tracer = match &arguments.tracer {
        Some(tracer) => tracer.clone(),
        None => {
            command::run(&mut workspace::release_build(root))?;
            workspace::release_program()?
        }
    };
    let mut tests = match &arguments.tests {
        Some(tests) => Command::new(tests),
        None => {
            let mut cargo = workspace::cargo(root);
            // Writing large models takes too long otherwise.
            cargo.args(["test", "--release", "--package", "expert-trace-tests"]);
            cargo.args(["--test", "e2e", "--"]);
            cargo
        }
    };
    tests
        .args(["--test-threads=1", "--nocapture", "--ignored", "cuda::"])
        .env("EXPERT_TRACE_TEST_BIN", tracer)
        .envs(llama.to_env());
    Ok(tests)
}
