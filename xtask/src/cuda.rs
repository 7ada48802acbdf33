//! The tests that need an NVIDIA GPU, and what tracing costs there.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use expert_trace_tests::llama::LlamaCpp;
use serde_json::Value;

use crate::{command, llama, results, system, workspace};

/// Comes before a result in the tests' output.
const RESULT: &str = "RESULT ";
/// Starts the line that sums up the tests.
const SUM: &str = "test result: ";

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
    #[arg(long, value_name = "FILE", default_value = results::CUDA)]
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
    let found = run_tests(&mut test_command(root, arguments, &llama)?)?;
    let mut document = results::header(root, arguments.commit.as_deref(), "cargo xtask cuda")?;
    document["gpu"] = gpu.trim().into();
    document["tests"] = found.sum.clone().into();
    document["costs"] = found.results.into();
    results::write(&root.join(&arguments.output), &document)?;
    print!("\n{}", table(&document["costs"]));
    ensure!(found.passed, "{SUM}{}", found.sum);
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
        .envs(llama.to_env())
        .stdout(Stdio::piped());
    Ok(tests)
}

#[derive(Default)]
struct Found {
    passed: bool,
    sum: String,
    results: Vec<Value>,
}

fn run_tests(tests: &mut Command) -> Result<Found> {
    command::show(tests);
    let mut child = tests.spawn().with_context(|| command::cannot_run(tests))?;
    let output = child.stdout.take().context("no standard output")?;
    let mut found = Found::default();
    for line in BufReader::new(output).lines() {
        let line = line.context("the tests' output is no text")?;
        println!("{line}");
        found.take(&line)?;
    }
    found.passed = child.wait()?.success();
    Ok(found)
}

impl Found {
    fn take(&mut self, line: &str) -> Result<()> {
        // The first line of a test's output follows its name.
        if let Some((_, result)) = line.split_once(RESULT) {
            let result = serde_json::from_str(result);
            self.results
                .push(result.with_context(|| format!("no result: {line}"))?);
        } else if let Some(sum) = line.strip_prefix(SUM) {
            // How long they took is not part of the result.
            let sum = sum.split("; finished").next().unwrap_or(sum);
            sum.clone_into(&mut self.sum);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn results_are_picked_out_of_the_output() {
        let mut found = Found::default();
        for line in [
            r#"test cuda::cost ... RESULT {"arm":"GPU"}"#,
            r#"RESULT {"arm":"CPU"}"#,
            "test result: ok. 8 passed; 0 failed; 0 ignored; finished in 60.12s",
        ] {
            found.take(line).unwrap();
        }
        assert_eq!(
            found.results,
            [json!({"arm": "GPU"}), json!({"arm": "CPU"})]
        );
        assert_eq!(found.sum, "ok. 8 passed; 0 failed; 0 ignored");
        assert!(found.take("RESULT {").is_err());
    }
}
