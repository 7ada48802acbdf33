//! The steps of a run: each is announced and timed, and one that fails does not keep the next from
//! running. The last line of all is the sum of the tests' results.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::command;

/// All steps up to now.
#[derive(Default)]
pub struct Steps {
    done: Vec<Step>,
    results: Results,
}

struct Step {
    name: &'static str,
    outcome: Outcome,
}

enum Outcome {
    Passed(Duration),
    Failed(Duration),
    Skipped(String),
}

impl Steps {
    /// Runs a step; `None` if it fails.
    pub fn run<T>(
        &mut self,
        name: &'static str,
        step: impl FnOnce(&mut Results) -> Result<T>,
    ) -> Option<T> {
        println!("\n==> {name}");
        let begin = Instant::now();
        let failed_before = self.results.failed;
        let result = step(&mut self.results);
        let time = begin.elapsed();
        let (outcome, value) = match result {
            Ok(value) => (Outcome::Passed(time), Some(value)),
            Err(error) => {
                // One that fails otherwise than by its tests must show in the sum as well.
                if self.results.failed == failed_before {
                    self.results.failed += 1;
                }
                println!("FAILED: {error:#}");
                (Outcome::Failed(time), None)
            }
        };
        self.done.push(Step { name, outcome });
        value
    }

    /// Notes that a step cannot run here.
    pub fn skip(&mut self, name: &'static str, reason: &str) {
        println!("\n==> {name}: not run, because {reason}");
        let outcome = Outcome::Skipped(reason.to_owned());
        self.done.push(Step { name, outcome });
    }

    /// Prints what happened, and tells how to exit.
    pub fn finish(self) -> ExitCode {
        println!("\n==> Summary");
        for Step { name, outcome } in &self.done {
            match outcome {
                Outcome::Passed(time) => println!("{:>8.1} s  passed  {name}", time.as_secs_f64()),
                Outcome::Failed(time) => println!("{:>8.1} s  FAILED  {name}", time.as_secs_f64()),
                Outcome::Skipped(reason) => println!("{:>10}  not run {name}: {reason}", "-"),
            }
        }
        let Results { passed, failed } = self.results;
        println!("{passed} passed, {failed} failed");
        if passed == 0 {
            println!("No test has run: does --filter name one?");
        }
        if failed == 0 && passed > 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// Sum over all test programs.
#[derive(Default, Debug, PartialEq, Eq)]
pub struct Results {
    passed: u64,
    failed: u64,
}

impl Results {
    /// Runs `cargo test` and adds what it reports, which stays visible.
    pub fn cargo_test(&mut self, cargo: &mut Command) -> Result<()> {
        command::show(cargo);
        let mut child = cargo
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| command::cannot_run(cargo))?;
        let report = child.stdout.take().context("cargo test has no output")?;
        for line in BufReader::new(report).split(b'\n') {
            let line = line.context("cannot read what cargo test prints")?;
            self.add(&String::from_utf8_lossy(&line));
            let mut out = std::io::stdout().lock();
            out.write_all(&line)?;
            out.write_all(b"\n")?;
        }
        let status = child.wait().context("cannot wait for cargo test")?;
        ensure!(status.success(), "cargo test failed ({status})");
        Ok(())
    }

    /// A line such as `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    fn add(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else {
            return;
        };
        let count = |what| {
            let (before, _) = result.split_once(what)?;
            before.split_whitespace().last()?.parse::<u64>().ok()
        };
        self.passed += count(" passed;").unwrap_or(0);
        self.failed += count(" failed;").unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn results_are_summed_over_programs() {
        let mut results = Results::default();
        for line in [
            "running 5 tests",
            "test a_test ... ok",
            "test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: FAILED. 12 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1.20s",
            "test says 7 passed; 7 failed;",
        ] {
            results.add(line);
        }
        assert_eq!(
            results,
            Results {
                passed: 17,
                failed: 2
            }
        );
    }

    #[test]
    fn a_step_that_fails_without_a_test_counts_as_one_failure() {
        let mut steps = Steps::default();
        assert_eq!(steps.run("fine", |_| Ok(1)), Some(1));
        assert_eq!(
            steps.run("broken", |_| -> Result<()> { bail!("no network") }),
            None
        );
        assert_eq!(
            steps.results,
            Results {
                passed: 0,
                failed: 1
            }
        );
    }

    #[test]
    fn a_step_whose_tests_fail_counts_them_alone() {
        let mut steps = Steps::default();
        steps.run("tests", |results| -> Result<()> {
            results.add("test result: FAILED. 1 passed; 3 failed; 0 ignored");
            bail!("cargo test failed")
        });
        assert_eq!(
            steps.results,
            Results {
                passed: 1,
                failed: 3
            }
        );
    }
}
