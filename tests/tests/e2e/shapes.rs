//! The routers of the architectures that are traced in the field: the rows that a program's own eval
//! callback sees, and the layers and numbers of experts that the model was written with.

use std::collections::{BTreeMap, BTreeSet};

use expert_trace_tests::{models::Shape, oracle::read_dump};
use serde_json::Value;

use crate::support::{Traced, compare_with_callback, scratch, shape};

/// Prompts in two sequences, the first of two micro-batches, and decoding in both.
const COMMANDS: [&str; 5] = [
    "prompt 0 48 4000",
    "generate 0 8 17",
    "prompt 1 20 12000",
    "batch 0:77 1:78",
    "generate 1 4 5",
];
/// Tokens of [`COMMANDS`]: of the prompts, and of the rest.
const PREFILL: u64 = 68;
const DECODE: u64 = 14;

fn compare(name: &str, expected: &Shape) {
    let (stats, rows) = compare_with_callback(
        &shape(name, expected),
        &["-t", "2", "-c", "512", "-ub", "32"],
        &COMMANDS,
    );

    let with_experts = expected.layers_with_experts();
    let traced = stats.0["contexts"][0]["layers"].as_array().unwrap();
    let layers: Vec<_> = traced.iter().map(|layer| &layer["layer_id"]).collect();
    assert_eq!(layers, with_experts.iter().collect::<Vec<_>>());
    for (layer, number) in traced.iter().zip(&with_experts) {
        assert_eq!(layer["n_expert"], expected.n_expert);
        assert_eq!(layer["k"], expected.k_of(*number));
        assert_eq!(layer["coverage"], "observed");
    }
    let context = &stats.0["contexts"][0];
    assert_eq!(context["model"], 0);
    // What only predicts further tokens has not run, and so is not missing.
    assert_eq!(context["layers_not_visible"].to_string(), "[]");
    assert_eq!(context["passes_not_visible"]["passes"], 0);
    assert_eq!(stats.0["models"][0]["n_expert"], expected.n_expert);

    for layer in 0..with_experts.len() - 1 {
        let layer = format!("/contexts/0/layers/{layer}");
        assert_eq!(stats.number(&format!("{layer}/prefill_tokens")), PREFILL);
        assert_eq!(stats.number(&format!("{layer}/decode_tokens")), DECODE);
    }
    for layer in with_experts {
        let of_layer = rows.iter().filter(|(of, _)| *of == layer);
        let distinct: BTreeSet<&[u32]> = of_layer.map(|(_, ids)| ids.as_slice()).collect();
        assert!(
            distinct.len() > 10,
            "layer {layer} routes only {distinct:?}"
        );
    }
}

/// Blocks that predict further tokens run in a context of their own, and nothing else does.
#[test]
fn nextn_blocks() {
    let expected = &Shape::QWEN3NEXT;
    let directory = scratch();
    let dump = directory.path().join("dump");
    let mut traced = Traced::start(
        &shape("qwen3next-nextn", expected),
        &["-t", "2", "--nextn", "1", "--dump", &dump.to_string_lossy()],
    );
    let commands = ["prompt 0 24 4000", "generate 0 8 17", "batch 0:77"];
    for command in commands {
        traced.command(command);
    }
    traced.command("nextn");
    for command in commands {
        traced.command(command);
    }
    let (stats, seen) = traced.finish();

    let by_layer = |rows: &[(u32, Vec<u32>)]| {
        let mut by_layer: BTreeMap<u32, Vec<Vec<u32>>> = BTreeMap::new();
        for (layer, ids) in rows {
            by_layer.entry(*layer).or_default().push(ids.clone());
        }
        by_layer
    };
    let oracle: Vec<_> = read_dump(&dump)
        .unwrap()
        .into_iter()
        .map(|row| (row.layer, row.ids))
        .collect();
    assert_eq!(by_layer(&seen), by_layer(&oracle));

    let layers = |context: &Value| -> Vec<u64> {
        let layers = context["layers"].as_array().unwrap().iter();
        layers
            .map(|layer| layer["layer_id"].as_u64().unwrap())
            .collect()
    };
    let contexts = stats.0["contexts"].as_array().unwrap();
    assert_eq!(contexts.len(), 2);
    assert_eq!(layers(&contexts[0]), [0, 1, 2, 3]);
    assert_eq!(layers(&contexts[1]), [4]);
    for context in contexts {
        assert_eq!(context["layers_not_visible"].to_string(), "[]");
        assert_eq!(context["passes_not_visible"]["passes"], 0);
        for layer in context["layers"].as_array().unwrap() {
            assert_eq!(layer["coverage"], "observed");
        }
    }
    assert_eq!(
        stats.0["models"][0]["moe_layers"].to_string(),
        "[0,1,2,3,4]"
    );
    for context in contexts {
        assert_eq!(context["gaps"].to_string(), "[]");
    }
}

#[test]
fn deepseek2() {
    compare("deepseek2", &Shape::DEEPSEEK2);
}

#[test]
fn gemma4() {
    compare("gemma4", &Shape::GEMMA4);
}

#[test]
fn gpt_oss_20b() {
    compare("gpt-oss-20b", &Shape::GPT_OSS_20B);
}

#[test]
fn gpt_oss_120b() {
    compare("gpt-oss-120b", &Shape::GPT_OSS_120B);
}

#[test]
fn mixtral() {
    compare("mixtral", &Shape::MIXTRAL);
}

#[test]
fn nemotron_h_moe() {
    compare("nemotron-h-moe", &Shape::NEMOTRON_H_MOE);
}

#[test]
fn olmoe() {
    compare("olmoe", &Shape::OLMOE);
}

#[test]
fn qwen3moe() {
    compare("qwen3moe", &Shape::QWEN3MOE);
}

#[test]
fn qwen3next() {
    compare("qwen3next", &Shape::QWEN3NEXT);
}
