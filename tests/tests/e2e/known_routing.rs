//! Every (token, layer) of a model whose experts follow from the token id alone.

use std::collections::BTreeMap;

use expert_trace_tests::tracer::{Counts, count};

use crate::support::{Known, Traced, known_small, known_wide};

/// Traces a driver that decodes prompts and then generates, and compares every row.
fn compare(known: &Known, threads: &str, ubatch: &str) {
    let prompts = [1, 7, 512, 1300, 1];
    let mut traced = Traced::start(
        &known.path,
        &["-t", threads, "-c", "4096", "-b", "2048", "-ub", ubatch],
    );

    // The tokens that go through the model, and those whose output is wanted.
    let mut tokens: Vec<u32> = Vec::new();
    let mut outputs: Vec<u32> = Vec::new();
    let mut prefill = 0;
    let mut next = 0;
    for (sequence, length) in prompts.into_iter().enumerate() {
        let start = 1000 + 17 * sequence as u32;
        let answer = traced.command(&format!("prompt {sequence} {length} {start}"));
        tokens.extend(start..start + length);
        outputs.push(start + length - 1);
        prefill += u64::from(length);
        next = answer[0];
    }
    let last = prompts.len() - 1;
    let generated = traced.command(&format!("generate {last} 40 {next}"));
    let decoded: Vec<u32> = [&[next], &generated[..39]].concat();
    tokens.extend(&decoded);
    outputs.extend(&decoded);
    let (stats, log) = traced.finish();

    let layers = known.expected.layers();
    let of_layer = |layer| {
        if layer + 1 == layers {
            &outputs
        } else {
            &tokens
        }
    };
    let mut logged: BTreeMap<u32, Vec<Vec<u32>>> = BTreeMap::new();
    for (layer, ids) in log {
        logged.entry(layer).or_default().push(ids);
    }
    let mut expected_counts = Counts::new();
    for layer in 0..layers {
        let expected: Vec<&[u32]> = of_layer(layer)
            .iter()
            .map(|token| known.expected.ids(layer, *token))
            .collect();
        assert_eq!(logged[&layer], expected, "layer {layer}");
        expected_counts.extend(count(expected.into_iter().map(|ids| (layer, ids))));
    }
    assert_eq!(stats.counts(), expected_counts);
    assert_eq!(stats.context_counts(0), expected_counts);

    let first = &stats.0["contexts"][0]["layers"][0];
    assert_eq!(first["prefill_tokens"], prefill);
    assert_eq!(first["decode_tokens"], decoded.len());
    let last = &stats.0["contexts"][0]["layers"][layers as usize - 1];
    assert_eq!(last["prefill_tokens"], prompts.len());
    assert_eq!(last["decode_tokens"], decoded.len());
    assert_eq!(first["n_expert"], known.spec.n_expert);
    assert_eq!(first["k"], known.spec.k);
    assert_eq!(stats.0["contexts"][0]["phase_source"], "ubatch");
    assert_eq!(stats.0["contexts"][0]["model"], 0);
    assert_eq!(stats.0["models"][0]["n_expert"], known.spec.n_expert);
    assert_eq!(stats.0["excluded"].as_array().map(Vec::len), Some(0));
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

#[test]
fn wide_one_thread() {
    compare(known_wide(), "1", "512");
}

#[test]
fn wide_two_threads() {
    compare(known_wide(), "2", "512");
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
}
