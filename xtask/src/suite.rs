//! Suites of end-to-end tests that CI does not run, and what they print for a result file.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
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
    /// Fails unless all tests passed, and there was one.
    pub fn ensure_passed(&self) -> Result<()> {
        ensure!(
            self.passed && all_passed(&self.sum),
            "tests have failed, and no results were written: {}",
            if self.sum.is_empty() {
                "none ran"
            } else {
                &self.sum
            }
        );
        Ok(())
    }

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

/// Whether a sum of tests says that there were some, and all passed.
pub fn all_passed(sum: &str) -> bool {
    let passed = sum
        .strip_prefix("ok. ")
        .and_then(|sum| sum.split_once(" passed; "));
    passed.is_some_and(|(passed, others)| {
        passed.parse::<u64>().is_ok_and(|passed| passed > 0)
            && others.starts_with("0 failed; 0 ignored")
    })
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

    #[test]
    fn tests_have_to_run_and_to_pass() {
        assert!(all_passed("ok. 8 passed; 0 failed; 0 ignored"));
        for sum in [
            "",
            "ok. 0 passed; 0 failed; 0 ignored",
            "ok. 7 passed; 0 failed; 1 ignored",
            "FAILED. 7 passed; 1 failed; 0 ignored",
        ] {
            assert!(!all_passed(sum), "{sum}");
        }
        // Whatever they say, Cargo has to say so too.
        let found = Found {
            sum: "ok. 8 passed; 0 failed; 0 ignored".to_owned(),
            ..Found::default()
        };
        assert!(found.ensure_passed().is_err());
    }
}
