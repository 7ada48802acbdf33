//! The table of routes by which expert ids come, in builds that differ by compiler and linkage.

use serde_json::Value;

use super::{hooks, joined, outcome, text, was_hit};
use crate::document::head;

const COLUMNS: [&str; 8] = [
    "route",
    "device",
    "build",
    "entered",
    "found, never entered",
    "rows came by",
    "ids by `run`",
    "by `attach`",
];

/// Hooks that tell whose pass it is and how it is computed, and show no ids.
const OF_PASSES: [&str; 7] = [
    "pass_begin",
    "ubatch",
    "context",
    "context_end",
    "scheduler_end",
    "eval_callback",
    "libraries",
];

/// The results as a table in Markdown.
pub fn table(rows: &[Value]) -> String {
    let mut table = head(&COLUMNS);
    for row in rows {
        let [route, device, build] = ["route", "device", "build"].map(|key| text(&row[key]));
        let came_by = row["run"]["routes"].as_array().into_iter().flatten();
        let cells: [String; COLUMNS.len()] = [
            format!("`{route}`"),
            device.to_owned(),
            build.to_owned(),
            functions(row, true),
            functions(row, false),
            joined(
                came_by.map(|name| format!("`{}`", text(name))).collect(),
                ", ",
            ),
            outcome(&row["run"], None),
            outcome(&row["attach"], Some(&row["run"])),
        ];
        table += &format!("| {} |\n", cells.join(" | "));
    }
    table
}

/// The functions that show ids, and were entered or not.
fn functions(row: &Value, entered: bool) -> String {
    let mut names: Vec<String> = hooks(row)
        .filter(|hook| !OF_PASSES.contains(&text(&hook["hook"])) && was_hit(hook) == entered)
        .map(|hook| format!("`{}`", name(text(&hook["symbol"]))))
        .collect();
    names.sort();
    names.dedup();
    joined(names, ", ")
}

/// A function's name without its parameters, where it is a static one of C++.
fn name(symbol: &str) -> &str {
    let Some(rest) = symbol.strip_prefix("_ZL") else {
        return symbol;
    };
    let name = rest.trim_start_matches(|c: char| c.is_ascii_digit());
    let length = rest[..rest.len() - name.len()].parse().ok();
    length
        .and_then(|length: usize| name.get(..length))
        .unwrap_or(symbol)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_row_shows_the_functions_that_show_ids() {
        let hook = |hook, symbol, hits: u64| json!({"hook": hook, "symbol": symbol, "hits": hits});
        let outcome = json!({"equal": true, "rows": 9, "routes": ["fetch", "split_input"]});
        let row = json!({
            "route": "fetch", "device": "Vulkan", "build": "static",
            "hooks": [
                hook("pass_begin", "ggml_backend_sched_graph_compute_async", 4),
                hook("fetch", "ggml_backend_tensor_get_async", 0),
                hook("fetch", "_ZL32ggml_backend_vk_get_tensor_asyncP12ggml_backend", 3),
                hook("split", "ggml_graph_compute", 2),
                hook("split_done", "ggml_graph_compute", 2),
            ],
            "run": outcome, "attach": outcome,
        });
        let table = table(&[row]);
        assert_eq!(
            table.lines().last().unwrap(),
            "| `fetch` | Vulkan | static | `ggml_backend_vk_get_tensor_async`, `ggml_graph_compute` \
             | `ggml_backend_tensor_get_async` | `fetch`, `split_input` | equal, 9 rows | equal, 9 rows |"
        );
    }

    #[test]
    fn other_names_stay_as_they_are() {
        for symbol in ["ggml_graph_compute", "_ZN1a1bEv", "_ZL99short", "_ZLx"] {
            assert_eq!(name(symbol), symbol);
        }
    }
}
