//! What tracing costs, next to doing nothing and to what one would use instead.

mod plot;

use std::collections::BTreeMap;

use serde_json::Value;

use crate::document;

pub use plot::plot;

/// An interval in a result, in per cent.
#[derive(Clone, Copy)]
struct Interval {
    low: f64,
    median: f64,
    high: f64,
}

impl Interval {
    fn of(result: &Value) -> Self {
        let end = |i: usize| result["percent_more"][i].as_f64().unwrap_or(f64::NAN);
        Self {
            low: end(0),
            median: end(1),
            high: end(2),
        }
    }

    fn text(self) -> String {
        let Self { low, median, high } = self;
        // Of a multiple, nobody wants hundredths.
        let places = if median.abs() < 10.0 { 2 } else { 0 };
        format!("{median:+.places$} ({low:+.places$} – {high:+.places$})")
    }
}

/// Results of one model on so many threads, in the order in which they were measured.
fn by_configuration(results: &[Value]) -> Vec<((&str, u64), Vec<&Value>)> {
    let mut order = Vec::new();
    let mut grouped: BTreeMap<(&str, u64), Vec<&Value>> = BTreeMap::new();
    for result in results {
        let threads = result["threads"].as_u64().unwrap_or_default();
        let key = (text(result, "model"), threads);
        if !grouped.contains_key(&key) {
            order.push(key);
        }
        grouped.entry(key).or_default().push(result);
    }
    order
        .into_iter()
        .map(|key| (key, grouped.remove(&key).unwrap_or_default()))
        .collect()
}

fn text<'a>(result: &'a Value, key: &str) -> &'a str {
    result[key].as_str().unwrap_or_default()
}

/// What is compared, in few words.
fn name(result: &Value) -> String {
    match (text(result, "arm"), text(result, "compared_with")) {
        (arm, "untraced") => arm.to_owned(),
        (arm, other) => format!("{arm}, in units of: {other}"),
    }
}

/// A table for each model and number of threads.
pub fn table(results: &[Value]) -> String {
    let mut tables = Vec::new();
    for ((model, threads), results) in by_configuration(results) {
        let threads_in_words = match threads {
            1 => "1 thread".to_owned(),
            n => format!("{n} threads"),
        };
        let mut lines = format!("### {model}, {threads_in_words}\n\n");
        lines += &format!("{} {}\n\n", untraced(&results), blocks(&results));
        lines += &document::head(&[
            "setup",
            "phase",
            "wall time, % more",
            "CPU time, % more",
            "pairs",
            "goal",
            "met: wall, CPU",
            "hits × ns, % of CPU time",
        ]);
        for pair in results.chunks(2) {
            let [wall, cpu] = pair else { continue };
            lines += &format!(
                "| {} | {} | {} | {} | {} | {} | {} | {} |\n",
                name(wall),
                text(wall, "phase"),
                Interval::of(wall).text(),
                Interval::of(cpu).text(),
                wall["pairs"],
                text(wall, "goal"),
                met(wall, cpu),
                hits(cpu),
            );
        }
        tables.push(lines);
    }
    tables.join("\n")
}

/// How fast it is when nobody looks.
fn untraced(results: &[&Value]) -> String {
    let speed = |phase: &str| {
        let of_phase =
            |result: &&&Value| text(result, "phase") == phase && text(result, "measure") == "wall";
        let ms = results.iter().find(of_phase)?["untraced_ms_per_token"].as_f64()?;
        Some(format!("{:.0} tokens/s in {phase}", 1e3 / ms))
    };
    let speeds = ["prompt", "decode"].into_iter().filter_map(speed);
    format!("Untraced: {}.", speeds.collect::<Vec<_>>().join(", "))
}

/// How often everything was begun anew, and what another tracer on the machine has spoilt.
fn blocks(results: &[&Value]) -> String {
    let number = |key: &str| {
        results
            .iter()
            .filter_map(|result| result[key].as_u64())
            .max()
    };
    let blocks = number("blocks").unwrap_or_default();
    let dropped = number("dropped_rounds").unwrap_or_default();
    format!("Blocks: {blocks}. Dropped rounds: {dropped}.")
}

fn met(wall: &Value, cpu: &Value) -> String {
    let met = |result: &Value| match &result["met"] {
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::String(not) => not.clone(),
        _ => String::new(),
    };
    match (met(wall), met(cpu)) {
        (wall, cpu) if wall == cpu => wall,
        (wall, cpu) => [wall, cpu]
            .map(|met| {
                if met.is_empty() {
                    "–".to_owned()
                } else {
                    met
                }
            })
            .join(", "),
    }
}

/// Hits in a pass, at so many nanoseconds, and what they come to; a dash where there are none.
fn hits(result: &Value) -> String {
    let number = |key: &str| result["hits"][key].as_f64();
    let (Some(per_pass), Some(ns), Some(percent)) =
        (number("per_pass"), number("ns"), number("percent"))
    else {
        return "–".to_owned();
    };
    format!("{per_pass:.0} a pass × {ns:.0} = {percent:.2}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    pub fn results() -> Vec<Value> {
        let row = |threads: u64, measure: &str, met: Value| {
            json!({
                "model": "m", "threads": threads, "phase": "decode", "measure": measure,
                "arm": "attach", "compared_with": "untraced", "pairs": 30,
                "blocks": 5, "dropped_rounds": 2,
                "percent_more": [-0.1, 0.25, 0.5], "goal": "at most 0.5 %", "met": met,
                "hits": {"per_pass": 10.4, "ns": 1144.0, "percent": 0.119},
                "untraced_ms_per_token": 20.0,
            })
        };
        let mut callback = [
            row(1, "wall", Value::Null),
            row(1, "cpu", "not resolved".into()),
        ];
        for row in &mut callback {
            row["arm"] = "callback".into();
            row["goal"] = Value::Null;
            row["hits"] = Value::Null;
        }
        let [wall, cpu] = callback;
        vec![
            row(1, "wall", "not resolved".into()),
            row(1, "cpu", true.into()),
            wall,
            cpu,
            row(2, "wall", false.into()),
            row(2, "cpu", false.into()),
        ]
    }

    #[test]
    fn each_configuration_has_a_table() {
        let table = table(&results());
        for line in [
            "### m, 1 thread\n\nUntraced: 50 tokens/s in decode. Blocks: 5. Dropped rounds: 2.\n",
            "### m, 2 threads\n",
            "| attach | decode | +0.25 (-0.10 – +0.50) | +0.25 (-0.10 – +0.50) | 30 | at most 0.5 % | \
             not resolved, yes | 10 a pass × 1144 = 0.12 |\n",
            "| 30 |  | –, not resolved | – |\n",
            "| at most 0.5 % | no | 10 a pass",
        ] {
            assert!(table.contains(line), "{line}\nin\n{table}");
        }
    }
}
