//! `cargo bench` of the program's own work, and its estimates.

use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::document::head;
use crate::{command, workspace};

/// Group of the benchmarks that have a goal, and how many elements of theirs in a second it is.
const GOAL: (&str, f64) = ("ids", 300e6);

/// Has Criterion measure, and gives what it found out.
pub fn measure(root: &Path) -> Result<Vec<Value>> {
    estimates(root, "throughput")?
        .iter()
        .map(|(benchmark, estimates)| row(benchmark, estimates))
        .collect()
}

/// Has Criterion measure with a program of that name, and gives each benchmark and its estimates.
pub fn estimates(root: &Path, bench: &str) -> Result<Vec<(Value, Value)>> {
    // Nothing of another day is to be taken for today's.
    let directory = workspace::target()?.join(format!("bench-{bench}"));
    match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot empty {}", directory.display()));
        }
        _ => {}
    }
    let mut cargo = workspace::cargo(root);
    cargo
        .args(["bench", "--package", "expert-trace", "--bench", bench])
        .args(["--", "--noplot"])
        .env("CRITERION_HOME", &directory);
    command::run(&mut cargo)?;
    let mut rows = Vec::new();
    for group in entries(&directory)? {
        for benchmark in entries(&group)? {
            let read = |name: &str| -> Result<Value> {
                let path = benchmark.join("new").join(name);
                let text = fs::read(&path);
                let text = text.with_context(|| format!("Criterion left no {}", path.display()))?;
                Ok(serde_json::from_slice(&text)?)
            };
            rows.push((read("benchmark.json")?, read("estimates.json")?));
        }
    }
    ensure!(!rows.is_empty(), "Criterion has measured nothing");
    rows.sort_by_key(|(of, _)| [&of["group_id"], &of["function_id"]].map(Value::to_string));
    Ok(rows)
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// A benchmark with its estimates, as Criterion writes them: times are in nanoseconds.
fn row(benchmark: &Value, estimates: &Value) -> Result<Value> {
    let median = &estimates["median"];
    let interval = &median["confidence_interval"];
    let [Some(low), Some(middle), Some(high)] = [
        &interval["lower_bound"],
        &median["point_estimate"],
        &interval["upper_bound"],
    ]
    .map(Value::as_f64) else {
        anyhow::bail!("no estimate of the median in {estimates}");
    };
    let throughput = &benchmark["throughput"];
    let per_second = |unit: &str| {
        let amount = throughput[unit].as_f64()?;
        Some([high, middle, low].map(|ns| amount / ns * 1e9))
    };
    let elements = per_second("Elements");
    let (group, goal) = GOAL;
    let judged = elements.filter(|_| benchmark["group_id"] == group);
    Ok(json!({
        "group": benchmark["group_id"],
        "case": benchmark["function_id"],
        "time_ns": [low, middle, high],
        "ids_per_second": elements,
        "bytes_per_second": per_second("Bytes"),
        "goal": judged.map(|_| goal),
        "met": judged.map(|[low, _, high]| verdict(low, high, goal)),
    }))
}

/// Whether the interval is at or above the goal, below it, or both.
fn verdict(low: f64, high: f64, goal: f64) -> Value {
    if low >= goal {
        true.into()
    } else if high < goal {
        false.into()
    } else {
        "not resolved".into()
    }
}

const COLUMNS: [&str; 5] = [
    "what",
    "case",
    "time, ms (95 % interval)",
    "in a second (95 % interval)",
    "goal",
];

/// The results as a table in Markdown.
pub fn table(rows: &[Value]) -> String {
    let mut table = head(&COLUMNS);
    for row in rows {
        let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let interval = |values: &Value, unit: f64, digits: usize| {
            let number = |index: usize| values[index].as_f64().unwrap_or(f64::NAN) / unit;
            let [low, middle, high] = [0, 1, 2].map(number);
            format!("{middle:.digits$} ({low:.digits$} – {high:.digits$})")
        };
        let rate = match (&row["ids_per_second"], &row["bytes_per_second"]) {
            (Value::Null, Value::Null) => String::new(),
            (Value::Null, bytes) => format!("{} GB", interval(bytes, 1e9, 1)),
            (ids, _) => format!("{} million ids", interval(ids, 1e6, 0)),
        };
        let goal = match row["goal"].as_f64() {
            Some(goal) => format!("≥ {:.0} million: {}", goal / 1e6, super::met(&row["met"])),
            None => String::new(),
        };
        let time = interval(&row["time_ns"], 1e6, 2);
        let cells = [text("group"), text("case"), time, rate, goal];
        table += &format!("| {} |\n", cells.join(" | "));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(low: f64, median: f64, high: f64) -> Value {
        let benchmark = json!({
            "group_id": "ids", "function_id": "decode", "throughput": { "Elements": 3_000_000 },
        });
        let estimates = json!({ "median": {
            "confidence_interval": { "lower_bound": low, "upper_bound": high },
            "point_estimate": median,
        }});
        row(&benchmark, &estimates).unwrap()
    }

    #[test]
    fn times_become_rates_that_are_judged_by_their_interval() {
        let fast = measured(5e6, 6e6, 7.5e6);
        assert_eq!(fast["ids_per_second"], json!([4e8, 5e8, 6e8]));
        assert_eq!(fast["met"], true);
        assert_eq!(measured(5e6, 8e6, 12e6)["met"], "not resolved");
        assert_eq!(measured(11e6, 12e6, 15e6)["met"], false);
        assert!(row(&json!({}), &json!({})).is_err());
        let line = "| ids | decode | 6.00 (5.00 – 7.50) | 500 (400 – 600) million ids | ≥ 300 million: met |";
        assert_eq!(table(&[fast]).lines().nth(2), Some(line));
    }
}
