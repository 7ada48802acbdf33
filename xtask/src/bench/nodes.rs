//! Hits, and the GET_ROWS nodes that they are for.

use serde_json::Value;

use crate::document::head;

const COLUMNS: [&str; 9] = [
    "shape",
    "layers with experts",
    "recurrent layers",
    "layers with groups",
    "second blocks",
    "GET_ROWS nodes: prompt",
    "decode",
    "hits on each thread: prompt, decode",
    "hits are nodes",
];

/// The results as a table in Markdown.
pub fn table(rows: &[Value]) -> String {
    let mut table = head(&COLUMNS);
    for row in rows {
        let layers = [
            "layers_with_experts",
            "recurrent_layers",
            "grouped_layers",
            "second_blocks",
        ];
        let mut cells = vec![row["shape"].as_str().unwrap_or_default().to_owned()];
        cells.extend(layers.map(|key| row[key].to_string()));
        let nodes = &row["nodes"];
        cells.extend([nodes["prompt"].to_string(), nodes["decode"].to_string()]);
        let hits = &row["hits_per_thread"];
        cells.push(format!("{}, {}", hits["prompt"], hits["decode"]));
        let met = match row["met"].as_bool() {
            Some(true) => "met",
            _ => "not met",
        };
        cells.push(met.to_owned());
        table += &format!("| {} |\n", cells.join(" | "));
    }
    table
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn one_line_for_each_shape() {
        let row = json!({
            "shape": "deepseek2", "layers_with_experts": 3, "recurrent_layers": 0,
            "grouped_layers": 3, "second_blocks": 0,
            "nodes": { "prompt": 11, "decode": 10 },
            "hits_per_thread": { "prompt": 11, "decode": 10 },
            "goal": "hits per thread = nodes", "met": true,
        });
        let table = table(&[row]);
        let line = "| deepseek2 | 3 | 0 | 3 | 0 | 11 | 10 | 11, 10 | met |";
        assert_eq!(table.lines().nth(2), Some(line));
    }
}
