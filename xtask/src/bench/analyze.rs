//! What `analyze` takes: caches of a small trace by Criterion, and a trace of 100 million activations as a
//! program that runs, on one thread, with its peak of memory.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use expert_trace_tests::{synthetic::Synthetic, usage};
use serde_json::{Value, json};

use super::throughput;
use crate::document::head;
use crate::{command, workspace};

/// Goals: milliseconds for nine budgets and six policies; seconds and GiB for 100 million activations.
const CACHES_MS: f64 = 100.0;
const LARGE_S: f64 = 60.0;
const LARGE_GIB: f64 = 1.0;

/// What is done of a large trace before its caches are simulated, as `cost` in the document names it.
const SIMULATED: &str = "simulating caches";
const PAIRS: &str = "counting pairs of experts";

/// Measures both.
pub fn measure(root: &Path) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    for (benchmark, estimates) in throughput::estimates(root, "analyze")? {
        let interval = &estimates["median"]["confidence_interval"];
        let ms = |value: &Value| value.as_f64().map(|ns| ns / 1e6);
        let high = ms(&interval["upper_bound"]).context("no estimate of the median")?;
        rows.push(json!({
            "what": "nine budgets × six policies",
            "case": benchmark["function_id"],
            "milliseconds": [ms(&interval["lower_bound"]), ms(&estimates["median"]["point_estimate"]), high],
            "goal": format!("≤ {CACHES_MS} ms"),
            "met": high <= CACHES_MS,
        }));
    }
    rows.push(large(root)?);
    Ok(rows)
}

fn large(root: &Path) -> Result<Value> {
    command::run(&mut workspace::release_build(root))?;
    let shape = Synthetic::LARGE;
    let trace = workspace::target()?.join("bench-analyze.arrows");
    let answers = trace.with_extension("json");
    shape.write(BufWriter::new(File::create(&trace)?))?;
    let mut program = Command::new(workspace::release_program()?);
    program
        .arg("analyze")
        .arg(&trace)
        .args(["--json", "--sample", "1"])
        .stdout(Stdio::from(File::create(&answers)?));
    let usage = usage::of(&mut program)?;
    let document: Value = serde_json::from_reader(File::open(&answers)?)?;
    let stages = document["cost"].as_array().cloned().unwrap_or_default();
    // Pairs are no part of the goal.
    let others = stages
        .iter()
        .filter(|of| of["work"] == PAIRS || of["work"] == SIMULATED);
    let others: f64 = others.filter_map(|of| of["seconds"].as_f64()).sum();
    let seconds = usage.time.as_secs_f64();
    let gib = usage.peak as f64 / f64::from(1 << 30);
    std::fs::remove_file(&trace)?;
    std::fs::remove_file(&answers)?;
    Ok(json!({
        "what": "a whole analysis",
        "case": format!("{} million activations", shape.activations() / 1_000_000),
        "seconds": seconds,
        "seconds_of_goal": seconds - others,
        "computed_seconds": usage.computed.as_secs_f64(),
        "peak_gib": gib,
        "stages": stages,
        "goal": format!("≤ {LARGE_S} s, ≤ {LARGE_GIB} GiB"),
        "met": seconds - others <= LARGE_S && gib <= LARGE_GIB,
    }))
}

const COLUMNS: [&str; 5] = [
    "what",
    "case",
    "time (95 % interval)",
    "peak of memory",
    "goal",
];

/// The results as a table in Markdown.
pub fn table(rows: &[Value]) -> String {
    let mut table = head(&COLUMNS);
    for row in rows {
        let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        let time = match &row["milliseconds"] {
            Value::Null => format!(
                "{:.1} s; {:.1} s without pairs of experts",
                number(&row["seconds"]),
                number(&row["seconds_of_goal"])
            ),
            of => format!(
                "{:.1} ms ({:.1} – {:.1})",
                number(&of[1]),
                number(&of[0]),
                number(&of[2])
            ),
        };
        let memory = match row["peak_gib"].as_f64() {
            Some(gib) => format!("{gib:.2} GiB"),
            None => String::new(),
        };
        let goal = format!("{}: {}", text("goal"), super::met(&row["met"]));
        let cells = [text("what"), text("case"), time, memory, goal];
        table += &format!("| {} |\n", cells.join(" | "));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_both_kinds_are_shown() {
        let rows = [
            json!({
                "what": "nine", "case": "a", "milliseconds": [1.0, 2.0, 3.0], "goal": "≤ 100 ms", "met": true,
            }),
            json!({
                "what": "whole", "case": "b", "seconds": 20.0, "seconds_of_goal": 15.0, "peak_gib": 0.5,
                "goal": "≤ 60 s", "met": false,
            }),
        ];
        let table = table(&rows);
        let lines: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(
            lines,
            [
                "| nine | a | 2.0 ms (1.0 – 3.0) |  | ≤ 100 ms: met |",
                "| whole | b | 20.0 s; 15.0 s without pairs of experts | 0.50 GiB | ≤ 60 s: not met |",
            ]
        );
    }
}
