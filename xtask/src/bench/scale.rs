//! What tracing costs on machines and models that are not here, computed from what was measured.
//!
//! Nothing is measured. Every number follows from the terms of a hit and from the shape of llama.cpp's
//! graphs by the formulas of [`Case::cost`].

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use expert_trace_tests::{hits, records::Records};
use serde_json::{Value, json};

use super::flood;
use crate::document::head;
use crate::results::ResultFile;

/// Measured times, in nanoseconds on the thread that is hit.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Terms {
    /// A hit of another thread than the first.
    other_thread: f64,
    /// A hit of the first thread, on a node that is no router's.
    other_node: f64,
    /// A hit that emits one row.
    one_row: f64,
    /// Each row of a longer pass.
    row: f64,
    /// What begins a pass of one token.
    pass: f64,
    /// What each further token adds to that.
    pass_token: f64,
    /// Expert ids in a second that nothing was lost of, at the default ring buffer.
    safe_ids_per_second: f64,
}

/// How hits of several threads go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kernel {
    /// Before Linux 6.13: one after the other, at worst.
    Old,
    /// At the same time.
    New,
}

/// A machine and what it computes.
#[derive(Clone, Copy, Debug)]
struct Case {
    kernel: Kernel,
    threads: u32,
    /// Layers with experts.
    layers: u32,
    /// Tokens of a pass.
    ubatch: u32,
    /// Experts chosen per token and layer.
    k: u32,
    tokens_per_second: f64,
}

/// What it costs there.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cost {
    hits_per_token_and_thread: f64,
    /// By which a token is late.
    ns_per_token: f64,
    /// Of the token's time.
    percent: f64,
    /// That records take of the ring buffer.
    bytes_per_second: f64,
    /// How many times as many ids were taken in without a loss.
    margin: f64,
    /// To take the probes away.
    detach_ms: f64,
}

/// GET_ROWS nodes of a graph beside those of its routers: of tokens (`build_inp_embd` in
/// llama-graph.cpp), and two in the last layer, which keep the rows whose output is wanted (`inp_out_ids`
/// for `cur` and for `inpSA`, models/qwen3moe.cpp).
const OTHER_NODES: u32 = 3;

/// The usual plan on the CPU, by the goals of the project: not measured.
const PROBES: u32 = 3;
/// A perf event's way out, one after the other, and links' shared one, by the same goals.
const DETACH_EACH_MS: f64 = 90.0;
const DETACH_SHARED_MS: f64 = 100.0;

impl Case {
    fn cost(&self, terms: &Terms) -> Cost {
        let Self {
            kernel,
            threads,
            layers,
            ubatch,
            k,
            tokens_per_second,
        } = *self;
        let [layers, tokens] = [layers, ubatch].map(f64::from);
        let nodes = layers + f64::from(OTHER_NODES);
        let routed = match ubatch {
            1 => terms.one_row,
            _ => terms.one_row + (tokens - 1.0) * terms.row,
        };
        let begin = terms.pass + (tokens - 1.0) * terms.pass_token;
        let first_thread = begin + f64::from(OTHER_NODES) * terms.other_node + layers * routed;
        // The others wait at the barrier behind each node, for longer than their own hits take.
        let others = match kernel {
            Kernel::New => 0.0,
            Kernel::Old => f64::from(threads - 1) * nodes * terms.other_thread,
        };
        let ns_per_token = (first_thread + others) / tokens;
        let passes_per_second = tokens_per_second / tokens;
        let bytes = bytes_of_pass(ubatch, k, self.layers);
        let ids_per_second = tokens_per_second * layers * f64::from(k);
        Cost {
            hits_per_token_and_thread: nodes / tokens,
            ns_per_token,
            percent: 100.0 * ns_per_token * tokens_per_second / 1e9,
            bytes_per_second: passes_per_second * bytes as f64,
            margin: terms.safe_ids_per_second / ids_per_second,
            detach_ms: match kernel {
                Kernel::New => DETACH_SHARED_MS,
                Kernel::Old => f64::from(PROBES) * DETACH_EACH_MS,
            },
        }
    }
}

/// Bytes of a pass' records in the ring buffer.
fn bytes_of_pass(tokens: u32, k: u32, layers: u32) -> u64 {
    let of_layer = Records::of_layer(tokens, k, EXPERTS).bytes();
    u64::from(layers) * of_layer + Records::of_ubatch(tokens).bytes()
}

/// Threads, layers with experts, tokens of a pass, and tokens in a second.
const CASES: [(u32, u32, u32, f64); 14] = [
    (1, 48, 1, 10.0),
    (8, 48, 1, 20.0),
    (16, 48, 1, 50.0),
    (64, 48, 1, 50.0),
    (128, 48, 1, 100.0),
    (16, 24, 1, 100.0),
    (16, 94, 1, 20.0),
    (128, 94, 1, 50.0),
    (1, 48, 512, 50.0),
    (16, 48, 512, 500.0),
    (128, 48, 512, 2000.0),
    (128, 94, 512, 2000.0),
    (128, 94, 2048, 2000.0),
    (128, 94, 8192, 2000.0),
];

/// Experts chosen per token and layer, as most models in the field do.
const K: u32 = 8;
/// Experts of a layer, between which they are chosen: as far as that are rows from each other.
const EXPERTS: u32 = 128;

/// Benchmarks whose results are computed from.
const FROM: [&str; 2] = ["hits", "flood"];

/// The cases, on new kernels and on old ones.
pub fn compute(root: &Path) -> Result<Vec<Value>> {
    let [of_hits, of_flood] = FROM.map(super::file);
    let (hits, flood) = (read(root, of_hits)?, read(root, of_flood)?);
    let terms = terms(&hits[of_hits.rows], &flood[of_flood.rows])
        .with_context(|| format!("{} or {} lacks a term", of_hits.path, of_flood.path))?;
    let from = json!({ "hits": hits["commit"], "flood": flood["commit"] });
    let mut rows =
        vec![json!({ "what": "terms", "measured": describe(&terms), "of_commit": from })];
    for kernel in [Kernel::New, Kernel::Old] {
        for (threads, layers, ubatch, tokens_per_second) in CASES {
            let case = Case {
                kernel,
                threads,
                layers,
                ubatch,
                k: K,
                tokens_per_second,
            };
            rows.push(row(&case, &case.cost(&terms)));
        }
    }
    Ok(rows)
}

fn read(root: &Path, file: &ResultFile) -> Result<Value> {
    let ResultFile { path, command, .. } = file;
    let text = fs::read(root.join(path));
    let text = text.with_context(|| format!("cannot read {path}: run `{command}` first"))?;
    serde_json::from_slice(&text).with_context(|| format!("{path} is no JSON"))
}

/// Medians of what the traced program lost per hit, over what the function takes by itself.
fn terms(hits: &Value, flood: &Value) -> Option<Terms> {
    let rows = hits.as_array()?;
    let hit = |name: &str| rows.iter().find(|hit| hit["hit"] == name);
    let added = |name: &str| {
        let hit = hit(name)?;
        Some(hit["attached_ns"].as_f64()? - hit["untraced_ns"].as_f64()?)
    };
    let pass = added(hits::PASS)?;
    let further = added(hits::PROMPT_PASS)? - pass;
    Some(Terms {
        other_thread: added(hits::OTHER_THREAD)?,
        other_node: added(hits::OTHER_TENSOR)?,
        one_row: added(hits::ONE_ROW)?,
        row: hit(hits::PROMPT)?["row_ns"][1].as_f64()?,
        pass,
        pass_token: further / f64::from(hits::PROMPT_TOKENS - 1),
        safe_ids_per_second: flood::safe_rate(flood.as_array()?)?,
    })
}

fn describe(terms: &Terms) -> Value {
    let Terms {
        other_thread,
        other_node,
        one_row,
        row,
        pass,
        pass_token,
        safe_ids_per_second,
    } = *terms;
    json!({
        "hit_of_another_thread_ns": other_thread,
        "hit_of_another_node_ns": other_node,
        "hit_of_one_row_ns": one_row,
        "row_of_a_prompt_ns": row,
        "begin_of_a_pass_ns": pass,
        "begin_of_a_pass_for_each_further_token_ns": pass_token,
        "ids_per_second_without_loss": safe_ids_per_second,
    })
}

fn row(case: &Case, cost: &Cost) -> Value {
    let kernel = match case.kernel {
        Kernel::New => "6.13 and newer",
        Kernel::Old => "before 6.13",
    };
    json!({
        "what": "case",
        "kernel": kernel,
        "threads": case.threads,
        "layers": case.layers,
        "ubatch": case.ubatch,
        "k": case.k,
        "tokens_per_second": case.tokens_per_second,
        "computed": {
            "hits_per_token_and_thread": cost.hits_per_token_and_thread,
            "ns_per_token": cost.ns_per_token,
            "percent_of_a_token": cost.percent,
            "ring_buffer_bytes_per_second": cost.bytes_per_second,
            "loss_margin": cost.margin,
            "detach_ms": cost.detach_ms,
        },
    })
}

const COLUMNS: [&str; 10] = [
    "kernel",
    "threads",
    "layers",
    "ubatch",
    "tokens/s",
    "hits per token and thread",
    "µs per token",
    "% of a token's time",
    "ring buffer, MB/s",
    "margin before losses",
];

/// The terms and the cases as tables in Markdown.
pub fn table(rows: &[Value]) -> String {
    let mut table = head(&["term", "measured", "of commit"]);
    for row in rows.iter().filter(|row| row["what"] == "terms") {
        let [hits, flood] = FROM.map(|name| row["of_commit"][name].as_str().unwrap_or_default());
        let terms = row["measured"].as_object();
        for (name, value) in terms.into_iter().flatten() {
            let value = value.as_f64().unwrap_or(f64::NAN);
            let commit = if name.ends_with("_ns") { hits } else { flood };
            table += &format!("| {} | {value:.0} | {commit} |\n", name.replace('_', " "));
        }
    }
    table += "\n";
    table += &head(&COLUMNS);
    for row in rows.iter().filter(|row| row["what"] == "case") {
        let computed = |key: &str| row["computed"][key].as_f64().unwrap_or(f64::NAN);
        let cells = [
            row["kernel"].as_str().unwrap_or_default().to_owned(),
            row["threads"].to_string(),
            row["layers"].to_string(),
            row["ubatch"].to_string(),
            format!(
                "{:.0}",
                row["tokens_per_second"].as_f64().unwrap_or(f64::NAN)
            ),
            format!("{:.3}", computed("hits_per_token_and_thread")),
            format!("{:.1}", computed("ns_per_token") / 1e3),
            format!("{:.2}", computed("percent_of_a_token")),
            format!("{:.2}", computed("ring_buffer_bytes_per_second") / 1e6),
            format!("{:.0} ×", computed("loss_margin")),
        ];
        table += &format!("| {} |\n", cells.join(" | "));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms {
        other_thread: 100.0,
        other_node: 150.0,
        one_row: 200.0,
        row: 10.0,
        pass: 1000.0,
        pass_token: 2.0,
        safe_ids_per_second: 38400.0 * 50.0,
    };
    const DECODE: Case = Case {
        kernel: Kernel::New,
        threads: 8,
        layers: 48,
        ubatch: 1,
        k: 8,
        tokens_per_second: 100.0,
    };

    #[test]
    fn a_token_is_late_by_the_hits_of_the_first_thread() {
        let cost = DECODE.cost(&TERMS);
        assert_eq!(cost.hits_per_token_and_thread, 51.0);
        assert_eq!(cost.ns_per_token, 1000.0 + 3.0 * 150.0 + 48.0 * 200.0);
        assert!((cost.percent - 0.1105).abs() < 1e-9);
        assert_eq!(cost.margin, 50.0);
        let more_threads = Case {
            threads: 128,
            ..DECODE
        };
        assert_eq!(more_threads.cost(&TERMS), cost);
    }

    #[test]
    fn on_old_kernels_the_other_threads_come_on_top() {
        let old = Case {
            kernel: Kernel::Old,
            ..DECODE
        };
        let more = old.cost(&TERMS).ns_per_token - DECODE.cost(&TERMS).ns_per_token;
        assert_eq!(more, 7.0 * 51.0 * 100.0);
        assert_eq!(old.cost(&TERMS).detach_ms, 270.0);
        let alone = Case { threads: 1, ..old };
        assert_eq!(
            alone.cost(&TERMS).ns_per_token,
            DECODE.cost(&TERMS).ns_per_token
        );
    }

    #[test]
    fn a_prompt_shares_its_hits() {
        let prompt = Case {
            ubatch: 512,
            ..DECODE
        };
        let cost = prompt.cost(&TERMS);
        assert_eq!(cost.hits_per_token_and_thread, 51.0 / 512.0);
        let pass = 1450.0 + 511.0 * 2.0 + 48.0 * (200.0 + 511.0 * 10.0);
        assert_eq!(cost.ns_per_token, pass / 512.0);
    }

    #[test]
    fn each_layer_and_the_ubatch_have_records() {
        assert_eq!(bytes_of_pass(1, 8, 48), 49 * (72 + 64));
        assert_eq!(bytes_of_pass(512, 8, 48), (48 * 17 + 4) * (72 + 1024));
    }

    #[test]
    fn terms_come_from_the_results() {
        let hit =
            |name: &str, ns: f64| json!({ "hit": name, "untraced_ns": 5.0, "attached_ns": ns });
        let mut rows = vec![
            hit(hits::OTHER_THREAD, 105.0),
            hit(hits::OTHER_TENSOR, 155.0),
            hit(hits::ONE_ROW, 205.0),
            hit(hits::PASS, 1005.0),
            hit(hits::PROMPT_PASS, 2027.0),
        ];
        let flood = json!([{
            "measured": "loss", "buffer_bytes": 8 << 20, "default_buffer": true,
            "ids_per_second": TERMS.safe_ids_per_second, "rows_lost": 0,
        }]);
        assert_eq!(terms(&json!(rows), &flood), None);
        rows.push(json!({ "hit": hits::PROMPT, "row_ns": [9.0, 10.0, 11.0] }));
        assert_eq!(terms(&json!(rows), &flood), Some(TERMS));
        let table = table(&[
            json!({ "what": "terms", "measured": describe(&TERMS), "of_commit": { "hits": "abc" } }),
            row(&DECODE, &DECODE.cost(&TERMS)),
        ]);
        assert!(
            table.contains("| hit of one row ns | 200 | abc |"),
            "{table}"
        );
        let line = "| 6.13 and newer | 8 | 48 | 1 | 100 | 51.000 | 11.1 | 0.11 | 0.67 | 50 × |";
        assert!(table.contains(line), "{table}");
    }
}
