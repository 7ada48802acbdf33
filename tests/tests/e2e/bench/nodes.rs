//! Hits of the probe with expert ids, against the GET_ROWS nodes that the program's graphs have.
//!
//! How many nodes there are, a program tells that is asked about each of them by libllama's own API
//! before it is computed, and has none computed by itself. Every thread enters the function for each.

use std::path::Path;

use expert_trace_tests::{
    models::Shape,
    oracle::Oracle,
    tracer::{self, Stats},
};
use serde_json::json;

use crate::{
    bench::Effort,
    support::{driver, scratch, shape},
};

/// Shapes of models that are traced in the field.
const SHAPES: [(&str, Shape); 10] = [
    ("qwen3next", Shape::QWEN3NEXT),
    ("deepseek2", Shape::DEEPSEEK2),
    ("grovemoe", Shape::GROVEMOE),
    ("nemotron-h-moe", Shape::NEMOTRON_H_MOE),
    ("gemma4", Shape::GEMMA4),
    ("gpt-oss-20b", Shape::GPT_OSS_20B),
    ("gpt-oss-120b", Shape::GPT_OSS_120B),
    ("mixtral", Shape::MIXTRAL),
    ("olmoe", Shape::OLMOE),
    ("qwen3moe", Shape::QWEN3MOE),
];
/// Of these, with a node of each kind.
const SMOKE: usize = 2;

/// One prompt, which is one pass, and decodes of one token.
const PROMPT: &str = "prompt 0 20 4000";
const DECODES: u64 = 4;
const DECODE: &str = "generate 0 4 17";

/// Nodes of a pass, as the program counts them, and hits of it, on each thread.
#[derive(Debug, PartialEq)]
struct PerPass {
    nodes: [u64; 2],
    hits: [u64; 2],
}

/// Index 0 is a pass of a prompt, 1 one of a generated token.
fn measure(model: &Path, threads: u64) -> PerPass {
    let prompt = traced(model, threads, &[PROMPT]);
    let both = traced(model, threads, &[PROMPT, DECODE]);
    assert_eq!(both.nodes[0], prompt.nodes[0]);
    let each = |of_all: u64, of: u64| {
        assert_eq!(of_all % of, 0, "{of_all} is not the same for each of {of}");
        of_all / of
    };
    let hits = [prompt.hits, both.hits - prompt.hits];
    PerPass {
        nodes: [prompt.nodes[0], each(both.nodes[1], DECODES)],
        hits: [each(hits[0], threads), each(hits[1], DECODES * threads)],
    }
}

struct Traced {
    /// After each command.
    nodes: Vec<u64>,
    hits: u64,
}

fn traced(model: &Path, threads: u64, commands: &[&str]) -> Traced {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let threads = threads.to_string();
    let command = driver(model, &["-t", &threads, "-c", "64", "--ops", "1"]);
    let options = [&format!("--output={}", path.display()), "--top=0"];
    let mut target = Oracle::spawn(&mut tracer::run(&options, &command).unwrap()).unwrap();
    let mut nodes = Vec::new();
    for command in commands {
        target.command(command).unwrap();
        nodes.push(target.command("ops").unwrap().trim().parse().unwrap());
    }
    assert!(target.quit().unwrap().success());
    let stats = Stats::read(&path).unwrap();
    stats.assert_complete();
    let hooks = stats.0["target"]["hooks"].as_array().unwrap().iter();
    let hits = hooks.filter(|hook| hook["hook"] == "expert_ids");
    Traced {
        nodes,
        hits: hits.map(|hook| hook["hits"].as_u64().unwrap()).sum(),
    }
}

fn run(effort: Effort) {
    let shapes = match effort {
        Effort::Smoke => &SHAPES[..SMOKE],
        Effort::Full { .. } => &SHAPES[..],
    };
    for (name, expected) in shapes {
        let model = shape(name, expected);
        let per_pass = measure(&model, 2);
        if let Effort::Full { .. } = effort {
            assert_eq!(measure(&model, 1), per_pass, "{name} with another thread");
        }
        let PerPass { nodes, hits } = per_pass;
        assert_eq!(hits, nodes, "{name}");
        let layers = expected.layers_with_experts().len() as u64;
        let (recurrent, grouped, second) = (
            u64::from(expected.recurrent_layers()),
            expected.grouped_layers() as u64,
            expected.second_experts().map_or(0, |_| layers),
        );
        // A recurrent layer gathers its states, one or both of two kinds (Mamba 2 reads one by itself).
        let least = layers + recurrent + 2 * grouped + second;
        let most = least + recurrent + A_FEW;
        let [prompt, decode] = nodes;
        assert!(
            (least..=most).contains(&decode) && decode <= prompt,
            "{name}: {nodes:?} nodes, where {least} to {most} were expected"
        );
        println!(
            "RESULT {}",
            json!({
                "shape": name,
                "layers_with_experts": layers,
                "recurrent_layers": recurrent,
                "grouped_layers": grouped,
                "second_blocks": second,
                "nodes": { "prompt": prompt, "decode": decode },
                "hits_per_thread": { "prompt": hits[0], "decode": hits[1] },
                "goal": "hits per thread = nodes",
                "met": hits == nodes,
            })
        );
    }
}

/// The lookups of tokens and of positions, and rows whose output is wanted.
const A_FEW: u64 = 6;

#[test]
fn smoke() {
    run(Effort::Smoke);
}

#[test]
#[ignore = "cargo xtask bench nodes"]
fn all_shapes() {
    run(Effort::asked());
}
