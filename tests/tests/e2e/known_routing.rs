//! Every (token, layer) of a model whose experts follow from the token id alone.

use std::collections::BTreeMap;

use expert_trace_tests::tracer::count;

use crate::support::{
    Known, Traced, compare_with_tokens, known_llama, known_quantized, known_scaled, known_sharded,
    known_small, known_wide, scratch,
};

fn compare(known: &Known, threads: &str, ubatch: &str) {
    let options = ["-t", threads, "-c", "4096", "-b", "2048", "-ub", ubatch];
    compare_with_tokens(known, &options);
}

#[test]
fn small_one_thread() {
    compare(known_small(), "1", "512");
}

#[test]
fn small_two_threads_one_large_ubatch() {
    compare(known_small(), "2", "2048");
}

#[test]
fn small_three_threads_odd_ubatch() {
    compare(known_small(), "3", "77");
}

/// The scales of chosen experts are gathered by the same ids, which are no more tokens.
#[test]
fn experts_with_scales() {
    compare(known_scaled(), "2", "512");
}

#[test]
fn mixtral() {
    compare(known_llama(), "2", "512");
}

/// The CPU backend stores such weights in another order, and multiplies with them by other functions.
#[test]
fn repacked_experts() {
    compare(known_quantized(), "2", "512");
}

#[test]
fn wide_one_thread() {
    compare(known_wide(), "1", "512");
}

#[test]
fn wide_two_threads() {
    compare(known_wide(), "2", "512");
}

#[test]
fn a_model_of_three_files() {
    let directory = scratch();
    let known = known_sharded(directory.path());
    let stats = compare_with_tokens(&known, &["-t", "2", "-c", "4096", "-b", "2048"]);
    let model = &stats.0["models"][0];
    assert_eq!(model["path"], known.path.to_string_lossy().as_ref());
    assert_eq!(model["moe_layers"].to_string(), "[0,1,2]");
    assert_eq!(stats.0["models"].as_array().map(Vec::len), Some(1));
}

/// Several sequences in one pass, and threads that come and go.
#[test]
fn parallel_sequences_are_decode() {
    let known = known_small();
    let mut traced = Traced::start(&known.path, &["-t", "2"]);
    let mut tokens = Vec::new();
    for sequence in 0..4 {
        traced.command(&format!("decode {sequence} 5 6 7"));
        tokens.extend([5, 6, 7]);
    }
    for step in 0..10 {
        let batch: Vec<String> = (0..4)
            .map(|sequence| format!("{sequence}:{}", 100 + step * 4 + sequence))
            .collect();
        traced.command(&format!("batch {}", batch.join(" ")));
        tokens.extend((0..4).map(|sequence| 100 + step * 4 + sequence));
    }
    traced.command("thread-generate 0 1 42");
    tokens.push(42);
    let (stats, _) = traced.finish();

    let rows = tokens
        .iter()
        .map(|token| (0, known.expected.ids(0, *token)));
    assert_eq!(stats.counts()[&0], count(rows)[&0]);
    let first = &stats.0["contexts"][0]["layers"][0];
    assert_eq!(first["prefill_tokens"], 12);
    assert_eq!(first["decode_tokens"], 41);
}

/// A context makes a new scheduler when its graphs change, and stays the same context.
#[test]
fn a_new_scheduler_is_no_new_context() {
    let known = known_small();
    let mut traced = Traced::start(&known.path, &["-t", "2"]);
    let mut tokens: Vec<u32> = (100..110).collect();
    traced.command("prompt 0 10 100");
    for _ in 0..3 {
        traced.command("reserve");
        // What a warm-up would decode, from a user.
        traced.command("decode 0 0 0");
        traced.command("decode 0 1 2");
        traced.command("prompt 0 10 200");
        tokens.extend([0, 0, 1, 2]);
        tokens.extend(200..210);
    }
    let (stats, _) = traced.finish();

    assert_eq!(stats.0["contexts"].as_array().map(Vec::len), Some(1));
    assert_eq!(stats.excluded("warmup"), (0, 0));
    let rows = tokens
        .iter()
        .map(|token| (0, known.expected.ids(0, *token)));
    assert_eq!(stats.counts()[&0], count(rows)[&0]);
}

/// Contexts are told apart, also when one takes the other's place in memory.
#[test]
fn contexts_are_never_summed() {
    let known = known_small();
    let mut traced = Traced::start(&known.path, &["-t", "2"]);
    traced.command("prompt 0 10 200");
    for _ in 0..3 {
        let index = traced.command("context")[0];
        traced.command("prompt 0 20 300");
        traced.command("use 0");
        traced.command("prompt 0 1 250");
        traced.command(&format!("free {index}"));
    }
    let (stats, _) = traced.finish();

    let tokens = |id: usize| {
        stats.0["contexts"][id]["layers"][0]["total_tokens"]
            .as_u64()
            .unwrap()
    };
    let of_each: Vec<u64> = (0..4).map(tokens).collect();
    assert_eq!(of_each, [13, 20, 20, 20]);
    assert_eq!(stats.0["contexts"].as_array().map(Vec::len), Some(4));
    assert_eq!(stats.0["layers_context"], 1);
    assert_eq!(stats.tokens()[&0], 20);

    // Wherever in its function a probe sits, it is hit once for each call.
    let hooks = stats.0["target"]["hooks"].as_array().unwrap().iter();
    let hits: BTreeMap<&str, u64> = hooks
        .map(|hook| {
            (
                hook["hook"].as_str().unwrap(),
                hook["hits"].as_u64().unwrap(),
            )
        })
        .collect();
    for (hook, calls) in [
        ("context", 7),
        // Of the four contexts, and in the end once more of those that had been freed.
        ("context_end", 7),
    ] {
        assert_eq!(hits[hook], calls, "{hook}");
    }
}
