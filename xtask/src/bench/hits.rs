//! The table of what hits cost.

use std::fmt::Write as _;

use serde_json::Value;

use crate::document;

/// What the end-to-end tests have measured, as a table in Markdown.
pub fn table(results: &[Value]) -> String {
    let mut table = document::head(&[
        "hit",
        "empty program, ns",
        "`attach`, ns",
        "`run`, ns",
        "`attach` : empty (95 % interval)",
        "ns a row (95 % interval)",
        "goal",
        "met",
    ]);
    for result in results {
        let ns = |key: &str| result[key].as_f64().unwrap_or_default();
        let goal = &result["goal"];
        let goal = match (goal["most"].as_f64(), goal["unit"].as_str()) {
            (Some(most), Some(unit)) => format!("≤ {most} {unit}"),
            _ => String::new(),
        };
        // Writing to a String does not fail.
        let _ = writeln!(
            table,
            "| {} | {:.0} | {:.0} | {:.0} | {} | {} | {goal} | {} |",
            result["hit"].as_str().unwrap_or_default(),
            ns("empty_ns"),
            ns("attached_ns"),
            ns("run_ns"),
            interval(&result["attached_to_empty"], 2),
            interval(&result["row_ns"], 0),
            verdict(&result["met"]),
        );
    }
    table
}

fn interval(values: &Value, digits: usize) -> String {
    let [low, median, high] = [0, 1, 2].map(|i| values[i].as_f64());
    match (low, median, high) {
        (Some(low), Some(median), Some(high)) => {
            format!("{median:.digits$} ({low:.digits$} – {high:.digits$})")
        }
        _ => String::new(),
    }
}

fn verdict(met: &Value) -> &str {
    match met {
        Value::Bool(true) => "yes",
        Value::Bool(false) => "no",
        other => other.as_str().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_row_for_each_kind_of_hit() {
        let rows = [
            json!({"hit": "another thread", "untraced_ns": 2.0, "empty_ns": 800.4, "attached_ns": 900.0,
                   "run_ns": 950.0, "attached_to_empty": [1.1, 1.125, 1.2], "row_ns": null,
                   "goal": {"most": 1.3, "unit": "times an empty program"}, "met": true}),
            json!({"hit": "a pass begins", "empty_ns": 1.0, "attached_ns": 2.0, "run_ns": 2.0,
                   "attached_to_empty": [2.0, 2.0, 2.0], "row_ns": [9.6, 10.0, 11.0],
                   "goal": null, "met": null}),
        ];
        let table = table(&rows);
        let lines: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(
            lines,
            [
                "| another thread | 800 | 900 | 950 | 1.12 (1.10 – 1.20) |  | ≤ 1.3 times an empty program | yes |",
                "| a pass begins | 1 | 2 | 2 | 2.00 (2.00 – 2.00) | 10 (10 – 11) |  |  |",
            ]
        );
    }
}
