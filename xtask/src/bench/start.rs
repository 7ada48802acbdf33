//! The table of how long the tracer takes to begin and to end.

use serde_json::Value;

use crate::document;

/// Milliseconds, with their intervals, beside what was to be reached.
pub fn table(rows: &[Value]) -> String {
    let mut table = document::head(&[
        "target",
        "attached by",
        "probes",
        "measure",
        "ms (95 % interval)",
        "goal",
        "met",
    ]);
    for row in rows {
        let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let number = |key: &str| row[key].as_f64().map(|number| format!("{number:.0}"));
        let time = match (number("ms"), number("low_ms"), number("high_ms")) {
            (Some(ms), Some(low), Some(high)) => format!("{ms} ({low} – {high})"),
            _ => String::new(),
        };
        let goal = number("goal_ms").map_or_else(String::new, |goal| format!("≤ {goal}"));
        let met = match &row["met"] {
            Value::Bool(true) => "yes",
            Value::Bool(false) => "no",
            Value::String(other) => other,
            _ => "",
        };
        table += &format!(
            "| {} | {} | {} | {} | {time} | {goal} | {met} |\n",
            text("target"),
            text("attached_by"),
            number("probes").unwrap_or_default(),
            text("measure"),
        );
    }
    table
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_row_has_what_was_measured_and_what_was_to_be_reached() {
        let table = table(&[
            json!({"target": "t", "attached_by": "perf_event", "probes": 2, "measure": "m",
                   "ms": 99.6, "low_ms": 90.1, "high_ms": 152.0, "goal_ms": 150.0,
                   "met": "not resolved"}),
            json!({"target": "t", "attached_by": "uprobe_multi", "measure": "order", "met": true}),
        ]);
        let lines: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(
            lines,
            [
                "| t | perf_event | 2 | m | 100 (90 – 152) | ≤ 150 | not resolved |",
                "| t | uprobe_multi |  | order |  |  | yes |",
            ]
        );
    }
}
