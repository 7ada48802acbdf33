//! What the tracer can take in, and what it needs for it.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::document::head;
use crate::plot::{Plot, Series};

/// Losses at one size of the ring buffer.
struct Buffer {
    bytes: u64,
    is_default: bool,
    /// Ids in a second, and whether rows were lost, from the slowest to the fastest.
    rates: Vec<(f64, bool)>,
}

impl Buffer {
    /// The fastest rate below all at which rows were lost.
    fn safe(&self) -> Option<f64> {
        let safe = self.rates.iter().take_while(|(_, lost)| !lost);
        safe.last().map(|(rate, _)| *rate)
    }

    /// The slowest rate at which rows were lost.
    fn losing(&self) -> Option<f64> {
        let losing = self.rates.iter().find(|(_, lost)| *lost);
        losing.map(|(rate, _)| *rate)
    }
}

/// Ids in a second that the tracer took in without a loss, at the default size of the buffer.
pub fn safe_rate(rows: &[Value]) -> Option<f64> {
    let buffers = buffers(rows);
    buffers.iter().find(|buffer| buffer.is_default)?.safe()
}

fn buffers(rows: &[Value]) -> Vec<Buffer> {
    let mut buffers: BTreeMap<u64, Buffer> = BTreeMap::new();
    for row in rows.iter().filter(|row| row["measured"] == "loss") {
        let (Some(bytes), Some(rate), Some(lost)) = (
            row["buffer_bytes"].as_u64(),
            row["ids_per_second"].as_f64(),
            row["rows_lost"].as_u64(),
        ) else {
            continue;
        };
        let buffer = buffers.entry(bytes).or_insert(Buffer {
            bytes,
            is_default: row["default_buffer"] == true,
            rates: Vec::new(),
        });
        buffer.rates.push((rate, lost > 0));
    }
    let mut buffers: Vec<Buffer> = buffers.into_values().collect();
    for buffer in &mut buffers {
        buffer.rates.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    buffers
}

/// The results as tables in Markdown.
pub fn table(rows: &[Value]) -> String {
    let mut table = head(&[
        "ring buffer",
        "nothing lost up to, million ids/s",
        "rows lost from, million ids/s",
        "goal",
    ]);
    for buffer in buffers(rows) {
        let million = |rate: Option<f64>, none: &str| match rate {
            Some(rate) => format!("{:.1}", rate / 1e6),
            None => none.to_owned(),
        };
        let judged: Vec<&Value> = rows
            .iter()
            .filter(|row| row["buffer_bytes"] == buffer.bytes && !row["goal"].is_null())
            .collect();
        let goal = match judged.as_slice() {
            [] => String::new(),
            judged if judged.iter().all(|row| row["met"] == true) => {
                let fastest = judged
                    .iter()
                    .filter_map(|row| row["wanted_passes_per_second"].as_f64());
                let fastest = fastest.fold(0.0, f64::max);
                format!("nothing lost up to {fastest} prompts/s: met")
            }
            _ => "nothing lost: not met".to_owned(),
        };
        let size = match buffer.bytes >> 20 {
            0 => format!("{} KiB", buffer.bytes >> 10),
            mib => format!("{mib} MiB"),
        };
        let cells = [
            size + if buffer.is_default { " (default)" } else { "" },
            million(buffer.safe(), "–"),
            million(buffer.losing(), "never"),
            goal,
        ];
        table += &format!("| {} |\n", cells.join(" | "));
    }
    table += "\n";
    table += &head(&["what", "when", "measured", "goal"]);
    for row in rows.iter().filter(|row| row["measured"] != "loss") {
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        let (what, measured) = match row["measured"].as_str() {
            Some("processor") => {
                let share = &row["share_of_a_core"];
                let percent = [0, 1, 2].map(|index| 100.0 * number(&share[index]));
                let [low, middle, high] = percent;
                let text = format!("{middle:.2} % of a core ({low:.2} – {high:.2})");
                ("processor time", text)
            }
            Some("growth") => {
                let mib = number(&row["anonymous_mib"]);
                ("growth of anonymous memory", format!("{mib:.2} MiB"))
            }
            _ => {
                let mib = number(&row["anonymous_mib"]);
                let ring = number(&row["ring_buffer_mib"]);
                let text = format!("{mib:.1} MiB, and {ring} MiB of ring buffer");
                ("anonymous memory", text)
            }
        };
        let goal = match row["goal"].as_str() {
            Some(goal) => format!("{goal}: {}", super::met(&row["met"])),
            None => String::new(),
        };
        let when = row["when"].as_str().unwrap_or_default();
        let when = match row["shape"].as_str() {
            Some(shape) => format!("{shape}: {when}"),
            None => when.to_owned(),
        };
        table += &format!("| {what} | {when} | {measured} | {goal} |\n");
    }
    table
}

/// The losses as a plot.
pub fn plot(rows: &[Value]) -> String {
    let buffers = buffers(rows);
    let series = |name, rate: fn(&Buffer) -> Option<f64>| Series {
        name,
        points: buffers
            .iter()
            .filter_map(|buffer| Some((buffer.bytes as f64, rate(buffer)?)))
            .collect(),
    };
    Plot {
        title: "Where losses begin",
        x_label: "ring buffer, bytes",
        y_label: "expert ids in a second",
        series: vec![
            series("nothing lost up to", Buffer::safe),
            series("rows lost from", Buffer::losing),
        ],
    }
    .svg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn loss(buffer: u64, rate: f64, lost: u64) -> Value {
        json!({
            "measured": "loss", "buffer_bytes": buffer, "default_buffer": buffer == 8 << 20,
            "wanted_passes_per_second": 8.0, "ids_per_second": rate, "rows_lost": lost,
            "goal": (buffer == 8 << 20).then_some("no row lost"), "met": lost == 0,
        })
    }

    #[test]
    fn losses_begin_at_the_slowest_rate_that_has_any() {
        let rows = [
            loss(8 << 20, 4e6, 0),
            loss(8 << 20, 2e6, 0),
            loss(128 << 10, 4e6, 7),
            loss(128 << 10, 2e6, 0),
            // By luck.
            loss(128 << 10, 8e6, 0),
            loss(4 << 10, 2e6, 9),
        ];
        let table = table(&rows);
        let lines: Vec<&str> = table.lines().skip(2).take(3).collect();
        assert_eq!(
            lines,
            [
                "| 4 KiB | – | 2.0 |  |",
                "| 128 KiB | 2.0 | 4.0 |  |",
                "| 8 MiB (default) | 4.0 | never | nothing lost up to 8 prompts/s: met |",
            ]
        );
        assert_eq!(safe_rate(&rows), Some(4e6));
        assert!(plot(&rows).contains("rows lost from"));
    }

    #[test]
    fn a_goal_that_is_not_met_is_said_so() {
        let rows = [
            loss(8 << 20, 4e6, 1),
            json!({
                "measured": "memory", "shape": "8 layers", "when": "attached", "anonymous_mib": 30.04,
                "ring_buffer_mib": 8.0, "goal": "at most 24 MiB", "met": false,
            }),
            json!({
                "measured": "processor", "when": "48 layers", "share_of_a_core": [0.001, 0.002, 0.02],
                "goal": "at most 0.01 of a core", "met": "not resolved",
            }),
        ];
        let table = table(&rows);
        for cell in [
            "| nothing lost: not met |",
            "| 8 layers: attached | 30.0 MiB, and 8 MiB of ring buffer | at most 24 MiB: not met |",
            "| 0.20 % of a core (0.10 – 2.00) | at most 0.01 of a core: not resolved |",
        ] {
            assert!(table.contains(cell), "{cell}: {table}");
        }
    }
}
