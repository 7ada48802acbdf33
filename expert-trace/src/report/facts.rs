//! What a document of statistics says of its capture: whether it is complete, and what was not visible.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Of a capture. All empty where nothing is known of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Facts {
    /// Whether all that was seen is counted; `None` where that is not known.
    pub complete: Option<bool>,
    /// What is wrong, a sentence each.
    pub problems: Vec<String>,
    /// What was not visible, and why, a sentence each.
    pub not_visible: Vec<String>,
    /// Names and values for a table.
    pub table: Vec<(&'static str, String)>,
}

/// A document, as far as it is shown. Of a newer program, what is not understood is left out.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Document {
    tool: Value,
    target: Value,
    capture: Value,
    integrity: Integrity,
    contexts: Vec<Context>,
    not_visible: Vec<Unseen>,
    excluded: Vec<Value>,
    cost: Value,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Integrity {
    complete: Option<bool>,
    problems: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Context {
    gaps: Vec<Gap>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Unseen {
    pid: u64,
    tokens: u64,
    gaps: Vec<Gap>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Gap {
    layers: Option<Vec<u32>>,
    coverage: String,
    explanation: String,
}

impl Facts {
    /// Those of a document.
    pub fn of(document: Document) -> Self {
        let Document {
            tool,
            target,
            capture,
            integrity,
            contexts,
            not_visible,
            excluded,
            cost,
        } = document;
        let mut table = Vec::new();
        let mut row = |name, value: Option<String>| table.extend(value.map(|value| (name, value)));
        let text = |of: &Value| of.as_str().map(str::to_owned);
        row("Program", text(&target["exe"]));
        row("Process", target["pid"].as_u64().map(|pid| pid.to_string()));
        let command = target["command"].as_array().map(|words| {
            let words: Vec<&str> = words.iter().filter_map(Value::as_str).collect();
            words.join(" ")
        });
        row("Command", command);
        row("Begun", text(&capture["started"]));
        row("Counted since", text(&capture["counted_since"]));
        let seconds = capture["duration_s"].as_f64();
        row("Duration", seconds.map(|seconds| format!("{seconds:.1} s")));
        row("Mode", text(&capture["mode"]));
        row(
            "Ended",
            text(&capture["ended"]).map(|why| why.replace('_', " ")),
        );
        for left_out in &excluded {
            let passes = left_out["passes"].as_u64().unwrap_or(0);
            let tokens = left_out["tokens"].as_u64().unwrap_or(0);
            let kind = left_out["kind"].as_str().unwrap_or("?");
            row(
                "Left out",
                Some(format!("{passes} passes, {tokens} tokens: {kind}")),
            );
        }
        let percent = cost["window_percent"].as_f64();
        let each = cost["ns_per_token"].as_f64();
        let cost = percent.zip(each).map(|(percent, each)| {
            format!("{percent:.2} % of the time, {:.1} µs per token", each / 1e3)
        });
        row("Cost of the hits", cost);
        let version = text(&tool["version"]);
        row(
            "Counted by",
            version.map(|version| format!("expert-trace {version}")),
        );
        let of_context = contexts
            .iter()
            .flat_map(|context| &context.gaps)
            .map(Gap::sentence);
        let unseen = not_visible.iter().flat_map(|context| {
            let what = format!(
                "A context of process {} ({} tokens)",
                context.pid, context.tokens
            );
            let gaps = context.gaps.iter();
            gaps.map(move |gap| format!("{what}: {}", gap.explanation))
        });
        Self {
            complete: integrity.complete,
            problems: integrity.problems,
            not_visible: of_context.chain(unseen).collect(),
            table,
        }
    }
}

impl Gap {
    fn sentence(&self) -> String {
        let layers = match self.layers.as_deref() {
            None => "layers that are not known".to_owned(),
            Some(layers) => {
                let numbers: Vec<String> = layers.iter().map(u32::to_string).collect();
                format!("layers {}", numbers.join(", "))
            }
        };
        let coverage = self.coverage.replace('_', " ");
        format!("{layers} ({coverage}): {}", self.explanation)
    }
}
