//! llama-cli, as a user runs it.

use std::{fs, io::Write as _, process::Stdio};

use expert_trace_tests::tracer::{self, Stats, read_log};

use crate::support::{
    assert_schema, assert_tokens_of, known_draft, known_small, llama_program, scratch,
};

#[test]
fn end_to_end() {
    let known = known_small();
    let directory = scratch();
    let [path, log] = ["stats.json", "log"].map(|name| directory.path().join(name));
    let options = [
        format!("--output={}", path.display()),
        format!("--log={}", log.display()),
        "--top=2".to_owned(),
    ];
    let secret = "What is the airspeed of an unladen swallow?";
    let command = llama_program(
        "llama-cli",
        &known.path,
        &["-p", secret, "-n", "16", "-st", "-t", "2"],
    );
    let output = tracer::run(&options, &command)
        .unwrap()
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");

    let stats = Stats::read(&path).unwrap();
    stats.assert_complete();
    let rows = read_log(&log).unwrap();
    let tokens = rows.iter().filter(|(layer, _)| *layer == 0).count();
    assert_eq!(stats.tokens()[&0], tokens as u64);
    assert!(tokens >= 20, "{tokens} tokens of a chat");
    // [0, 0] when it makes its context, and [BOS, EOS] to warm up.
    assert_eq!(stats.excluded("warmup"), (2, 4));
    assert_eq!(
        tracer::count(rows.iter().map(|(layer, ids)| (*layer, ids.as_slice()))),
        stats.counts()
    );
    // Which tokens llama-cli makes of a chat is its own affair.
    assert_tokens_of(known, &rows);

    // The summary, in the form of the specification.
    assert!(
        said.contains("Expert tracing enabled (stats=1, logging=1)"),
        "{said}"
    );
    assert!(said.contains("=== Expert Usage Statistics ==="), "{said}");
    assert!(
        said.contains(&format!("Layer 0 ({tokens} tokens):")),
        "{said}"
    );
    let first = &stats.0["layers"][0]["experts"][0];
    let line = format!(
        "  Expert {:3}: {:5} activations ({:.1}%)",
        first["expert_id"].as_u64().unwrap(),
        first["activations"].as_u64().unwrap(),
        first["percentage"].as_f64().unwrap()
    );
    assert!(said.contains(&line), "{line:?} in {said}");
    assert!(
        said.contains(&format!("Statistics exported to: {}", path.display())),
        "{said}"
    );
    let log = fs::read_to_string(&log).unwrap();
    assert_eq!(
        log.lines().next(),
        Some("[EXPERT-TRACE] Layer 0: MoE layer detected (tensor 'ffn_moe_topk')")
    );
    // What the program prints is its own: the tracer adds nothing to it.
    assert!(!String::from_utf8_lossy(&output.stdout).contains("Expert"));

    // No prompt in the document.
    let document = fs::read_to_string(&path).unwrap();
    assert!(!document.contains("swallow"), "{document}");

    for layer in stats.0["layers"].as_array().unwrap() {
        let sum: f64 = layer["experts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|expert| expert["percentage"].as_f64().unwrap())
            .sum();
        assert!(
            (sum - 100.0 * f64::from(known.spec.k)).abs() < 1e-6,
            "{layer:#}"
        );
    }
}

/// With its samplers in the graph, llama-cli makes a new scheduler for every turn of a chat. It is
/// one context all the same, and nothing of it is a warm-up but its first two passes.
#[test]
fn a_chat_with_new_schedulers_is_one_context() {
    let chat = |options: &[&str]| {
        let directory = scratch();
        let path = directory.path().join("stats.json");
        let command = llama_program("llama-cli", &known_small().path, &["-n", "6", "-t", "1"]);
        let tracer_options = ["-o", path.to_str().unwrap(), "--top=0"];
        let mut traced = tracer::run(&tracer_options, &command).unwrap();
        let mut child = traced
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let turns = "Hello one\nHello two there\nHello three\n/exit\n";
        child
            .stdin
            .take()
            .unwrap()
            .write_all(turns.as_bytes())
            .unwrap();
        assert!(child.wait().unwrap().success());
        let stats = Stats::read(&path).unwrap();
        stats.assert_complete();
        assert_eq!(stats.0["contexts"].as_array().map(Vec::len), Some(1));
        assert_eq!(stats.excluded("warmup"), (2, 4));
        stats.tokens()[&0]
    };
    assert_eq!(chat(&["--backend-sampling"]), chat(&[]));
}

/// A draft model is a context of its own, and is not taken for the main model.
#[test]
fn a_draft_model_is_told_apart() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let [main, draft] = [&known_small().path, &known_draft().path];
    let command = llama_program(
        "llama-cli",
        main,
        &[
            "-md",
            draft.to_str().unwrap(),
            "--spec-type",
            "draft-simple",
            "-p",
            "Hello there my friend",
            "-n",
            "16",
            "-st",
        ],
    );
    let options = ["-o", path.to_str().unwrap(), "--top=0"];
    let output = tracer::run(&options, &command)
        .unwrap()
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let stats = Stats::read(&path).unwrap();
    stats.assert_complete();
    let models = stats.0["models"].as_array().unwrap();
    assert_eq!(models.len(), 2, "{models:#?}");
    for (id, context) in stats.0["contexts"].as_array().unwrap().iter().enumerate() {
        let model = &models[context["model"].as_u64().unwrap() as usize];
        let layers = context["layers"].as_array().unwrap();
        assert_eq!(model["layers"], layers.len(), "context {id}");
        assert_eq!(model["n_expert"], layers[0]["n_expert"], "context {id}");
    }
    assert_eq!(stats.0["contexts"].as_array().map(Vec::len), Some(2));
}

#[test]
fn the_document_is_as_its_schema_says() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let command = llama_program(
        "llama-completion",
        &known_small().path,
        &["-p", "Hello", "-n", "4", "-no-cnv"],
    );
    let options = ["-o", path.to_str().unwrap()];
    assert!(
        tracer::run(&options, &command)
            .unwrap()
            .output()
            .unwrap()
            .status
            .success()
    );
    let stats = Stats::read(&path).unwrap();
    assert_schema(&stats);
    // The part that the original specification defines has its keys and no others.
    let keys = |value: &serde_json::Value| -> Vec<String> {
        value.as_object().unwrap().keys().cloned().collect()
    };
    assert_eq!(
        keys(&stats.0["layers"][1]),
        ["experts", "layer_id", "total_tokens"]
    );
    let expert = &stats.0["layers"][1]["experts"][0];
    assert_eq!(keys(expert), ["activations", "expert_id", "percentage"]);
}
