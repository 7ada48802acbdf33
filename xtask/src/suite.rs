//! Suites of end-to-end tests that CI does not run, and what they print for a result file.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::command;

/// Comes before a result in the tests' output.
const RESULT: &str = "RESULT ";
/// Starts the line that sums up the tests.
const SUM: &str = "test result: ";

/// What tests have printed.
#[derive(Default)]
pub struct Found {
    pub passed: bool,
    /// How many passed and failed, in words.
    pub sum: String,
    pub results: Vec<Value>,
}

/// Runs tests, and shows what they print.
pub fn run(tests: &mut Command) -> Result<Found> {
    tests.stdout(Stdio::piped());
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
