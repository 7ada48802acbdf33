//! What `analyze` says of tokens whose experts are known, through a real trace, and of what others make of it.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use expert_trace_tests::tracer;
use serde_json::Value;

use crate::support::{Known, Traced, known_quantized, known_small, scratch};

fn analyze(arguments: &[&str]) -> (Option<i32>, String, String) {
    let program = tracer::program().unwrap();
    let output = Command::new(program)
        .arg("analyze")
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

fn answers(arguments: &[&str]) -> Value {
    let (status, answer, said) = analyze(&[arguments, &["--json"]].concat());
    assert_eq!(status, Some(0), "{said}");
    serde_json::from_str(&answer).unwrap()
}

/// Generated tokens: every fourth one comes again at once.
fn tokens() -> Vec<u32> {
    let tokens = (0..40).map(|step| {
        if step % 4 == 3 {
            30 + 7 * (step - 1)
        } else {
            30 + 7 * step
        }
    });
    tokens.collect()
}

/// A trace of a prompt, and of these tokens, one in each pass.
fn record(known: &Known, directory: &Path) -> (String, String) {
    let path = |name: &str| directory.join(name).display().to_string();
    let (trace, stats) = (path("routes.arrows"), path("stats.json"));
    let option = format!("--trace={trace}");
    let mut traced = Traced::start_with(&[&option, "--tokens"], &known.path, &["-t", "2"]);
    traced.command("prompt 0 10 20");
    for token in tokens() {
        traced.command(&format!("batch 0:{token}"));
    }
    let (document, _) = traced.finish();
    fs::write(&stats, document.0.to_string()).unwrap();
    (trace, stats)
}

fn experts(known: &Known, layer: u32, token: u32) -> BTreeSet<u32> {
    known.expected.ids(layer, token).iter().copied().collect()
}

/// Experts in common with the token so far back, in percent.
fn overlap(known: &Known, lag: usize) -> f64 {
    let tokens = tokens();
    let (mut common, mut chosen) = (0, 0);
    for layer in 0..known.expected.layers() {
        for pair in tokens.windows(lag + 1) {
            let now = experts(known, layer, pair[lag]);
            common += now.intersection(&experts(known, layer, pair[0])).count();
            chosen += now.len();
        }
    }
    100.0 * common as f64 / chosen as f64
}

/// Decode hits of an LRU cache of so many experts, in percent: all layers take turns, and experts of a batch
/// that is over can go.
fn lru(known: &Known, places: usize) -> f64 {
    let mut recent: Vec<(u32, u32)> = Vec::new();
    let (mut hits, mut lookups) = (0, 0);
    let last = known.expected.layers() - 1;
    let mut batch = |layer: u32, tokens: &[u32], counts: bool| {
        let touched: BTreeSet<(u32, u32)> = tokens
            .iter()
            .flat_map(|token| experts(known, layer, *token))
            .map(|expert| (layer, expert))
            .collect();
        if counts {
            lookups += touched.len();
            hits += touched.iter().filter(|of| recent.contains(of)).count();
        }
        for token in tokens {
            for expert in known.expected.ids(layer, *token) {
                recent.retain(|of| *of != (layer, *expert));
                recent.insert(0, (layer, *expert));
            }
        }
        recent.truncate(places.max(touched.len()));
    };
    let prompt: Vec<u32> = (20..30).collect();
    for layer in 0..=last {
        // The last layer computes the token alone whose output is wanted.
        batch(
            layer,
            if layer == last { &prompt[9..] } else { &prompt },
            false,
        );
    }
    for token in tokens() {
        (0..=last).for_each(|layer| batch(layer, &[token], true));
    }
    100.0 * hits as f64 / lookups as f64
}

#[test]
fn known_tokens_are_analyzed_through_a_real_trace() {
    for known in [known_small(), known_quantized()] {
        let directory = scratch();
        let (trace, stats) = record(known, directory.path());
        let (bytes, _) = known.spec.layer_bytes();
        let places = [8, 20, 40, 60];
        let mib = |places: usize| (places as u64 * bytes) as f64 / f64::from(1 << 20);
        let budgets = places
            .map(|places| format!("{:.9}", mib(places) + 1e-6))
            .join(",");
        let of_trace = answers(&[&trace, "--budgets", &budgets]);

        for (index, lag) in [1, 2, 4, 8].into_iter().enumerate() {
            let found = &of_trace["time"]["overlap"][index];
            assert_eq!(found["lag"], lag);
            assert_eq!(found["percent"], overlap(known, lag), "{lag}");
        }
        let predictors = &of_trace["time"]["predictors"];
        assert_eq!(predictors["previous_token"], overlap(known, 1));
        for (row, places) in of_trace["cache"]["table"]
            .as_array()
            .unwrap()
            .iter()
            .zip(places)
        {
            assert_eq!(row["lru"], lru(known, places), "{places}");
            assert!(row["lru"].as_f64() <= row["belady"].as_f64());
        }
        assert_eq!(of_trace["source"]["decode_tokens"], 40);
        let by_token = of_trace["structure"]["tokens"]["distinct"].as_u64();
        let distinct: BTreeSet<u32> = tokens().into_iter().chain(20..30).collect();
        assert_eq!(by_token, Some(distinct.len() as u64));

        // What others read of it has the same answers, and counts have those that counts can have.
        let routes = directory.path().join("routes.csv").display().to_string();
        let mut export = Command::new(tracer::program().unwrap());
        export.args(["export", &trace, "--format", "route-trace", "-o", &routes]);
        assert!(export.status().unwrap().success());
        let of_routes = answers(&[&routes, "--budgets", &budgets]);
        for part in ["/time", "/cache", "/balance", "/structure/co_activation"] {
            assert_eq!(of_routes.pointer(part), of_trace.pointer(part), "{part}");
        }
        let of_counts = answers(&[&stats, "--budgets", &budgets]);
        assert_eq!(of_counts["balance"], of_trace["balance"]);
        assert_eq!(of_counts["time"], Value::Null);
        for index in 0..places.len() {
            let pin = format!("/cache/table/{index}/static_pin");
            assert_eq!(of_counts.pointer(&pin), of_trace.pointer(&pin), "{pin}");
        }
        let (status, text, _) = analyze(&[&trace, "--budgets", &budgets]);
        assert_eq!(status, Some(0));
        for part in [
            "=== Balance",
            "=== Time",
            "=== Cache",
            "=== Verdict",
            "-ncmoe",
            "cannot know",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}

/// Sizes come from the model's file where the trace has none.
#[test]
fn sizes_are_those_of_the_model() {
    let known = known_small();
    let directory = scratch();
    let (trace, _) = record(known, directory.path());
    let routes = directory.path().join("routes.csv").display().to_string();
    let mut export = Command::new(tracer::program().unwrap());
    export.args(["export", &trace, "--format", "route-trace", "-o", &routes]);
    assert!(export.status().unwrap().success());
    let text = fs::read_to_string(&routes).unwrap();
    let (bytes, _) = known.spec.layer_bytes();
    fs::write(
        &routes,
        text.replace(&format!("expert_bytes={bytes}"), "expert_bytes=0"),
    )
    .unwrap();
    let without = answers(&[&routes]);
    assert_eq!(without["cache"], Value::Null);
    let why = without["unanswered"][0]["why"].as_str().unwrap();
    assert!(
        why.contains("of layers 0-3: name the model's file (--model)"),
        "{why}"
    );
    let model = known.path.display().to_string();
    let with = answers(&[&routes, "--model", &model]);
    assert_eq!(with["cache"], answers(&[&trace])["cache"]);
}

#[test]
fn what_cannot_be_analyzed_is_refused_with_the_reason() {
    let directory = scratch();
    let (trace, _) = record(known_small(), directory.path());
    let foreign = directory.path().join("foreign").display().to_string();
    fs::write(&foreign, "GGUF").unwrap();
    for (arguments, why) in [
        (&["missing"][..], "cannot open missing"),
        (&[&foreign], "neither JSON nor an Arrow stream"),
        (&[&trace, "--context", "7"], "no context 7"),
        (&[&trace, "--model", &foreign], "(--model)"),
    ] {
        let (status, answer, said) = analyze(arguments);
        assert_eq!((status, &*answer), (Some(1), ""), "{arguments:?}");
        assert!(said.contains(why), "{why}: {said}");
    }
    let bytes = fs::read(&trace).unwrap();
    let cut = directory.path().join("cut.arrows").display().to_string();
    fs::write(&cut, &bytes[..bytes.len() - 100]).unwrap();
    // All rows are in its only batch.
    let (status, _, said) = analyze(&[&cut]);
    assert_eq!(status, Some(1));
    assert!(said.contains("has no end"), "{said}");
}
