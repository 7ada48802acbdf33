//! A `llama-server` that others have built and stripped, with its Vulkan backend on a device in
//! software: routers and experts on the device and on the host, as users place them.
//!
//! The device computes a hundred tokens in some seconds, so that each server is asked little. The
//! first time it compiles shaders, and those of prompts of 2 to 8 tokens each by themselves: such
//! prompts are left out.

use std::{path::Path, process::Command, thread};

use expert_trace::router_on_cpu::OVERRIDE;
use expert_trace_tests::{
    models::Shape,
    server::Server,
    tracer::{self, Attached, Counts, Stats, count},
};
use serde_json::{Value, json};

use crate::support::{Files, Known, known_small, known_wide, prebuilt, shape};

const EXPERTS_ON_CPU: [&str; 3] = ["-ngl", "99", "--cpu-moe"];

/// A command line of the server, for one user at a time.
fn server(model: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(prebuilt().vulkan_server.join("llama-server"));
    command.arg("-m").arg(model);
    command.args(["-np", "1", "-c", "512", "--no-warmup"]);
    command.args(options);
    command
}

/// Starts the server, or what starts it, in the environment that it needs.
fn start(command: &mut Command, files: &Files) -> Server {
    command
        .env("LD_LIBRARY_PATH", &prebuilt().vulkan_server)
        .env("MESA_SHADER_CACHE_DIR", &prebuilt().shader_cache)
        // Where there are more devices than the one in software, all tests have the same.
        .env("GGML_VK_VISIBLE_DEVICES", "0");
    Server::start(command, &files.path("said")).unwrap()
}

/// Starts a server under `expert-trace run`.
fn start_traced(model: &Path, tracer_options: &[&str], options: &[&str], files: &Files) -> Server {
    let mut all_options = files.options();
    all_options.extend(tracer_options.iter().map(|option| (*option).to_owned()));
    let mut command = tracer::run(&all_options, &server(model, options)).unwrap();
    start(&mut command, files)
}

/// What a server has been asked.
#[derive(Default)]
struct Asked {
    /// Tokens that have gone through the model.
    tokens: Vec<u32>,
    /// Those of them whose output was wanted: the last layer computes no others.
    outputs: Vec<u32>,
    prompts: u32,
    prompt_tokens: u32,
}

impl Asked {
    /// Asks it for a prompt of so many tokens, and then for as many tokens of its own as make it decode
    /// `decoded` of them.
    fn ask(&mut self, server: &Server, length: u32, decoded: usize) {
        let start = 1000 + 17 * self.prompts;
        let prompt: Vec<u32> = (start..start + length).collect();
        let generated = server.complete(&prompt, decoded + 1).unwrap();
        self.tokens.extend(&prompt);
        self.tokens.extend(&generated[..decoded]);
        self.outputs.push(start + length - 1);
        self.outputs.extend(&generated[..decoded]);
        self.prompts += 1;
        self.prompt_tokens += length;
    }

    /// The same for a server that was traced from its first instruction: before any prompt, llama.cpp
    /// tries the context with two tokens.
    fn compare_from_start(&self, known: &Known, files: &Files) -> Stats {
        let stats = self.compare(known, files);
        assert_eq!(stats.excluded("warmup"), (1, 2));
        stats
    }

    /// Fails unless each token has its experts in each layer, once, in order, and nothing else has any.
    fn compare(&self, known: &Known, files: &Files) -> Stats {
        let stats = files.stats();
        stats.assert_complete();
        let seen = files.rows();
        let layers = known.expected.layers();
        let mut counts = Counts::new();
        for layer in 0..layers {
            let tokens = if layer + 1 == layers {
                &self.outputs
            } else {
                &self.tokens
            };
            let expected: Vec<&[u32]> = tokens
                .iter()
                .map(|token| known.expected.ids(layer, *token))
                .collect();
            assert_eq!(seen[&layer], expected, "layer {layer}");
            counts.extend(count(expected.into_iter().map(|ids| (layer, ids))));
        }
        assert_eq!(seen.len(), layers as usize);
        assert_eq!(stats.counts(), counts);
        self.assert_described(&stats);
        stats
    }

    /// Fails unless the document says of what it counts that it is all there is.
    fn assert_described(&self, stats: &Stats) {
        assert_eq!(stats.0["contexts"].as_array().map(Vec::len), Some(1));
        let context = &stats.0["contexts"][0];
        let layers = context["layers"].as_array().unwrap();
        for layer in layers {
            assert_eq!(layer["coverage"], "observed");
        }
        let decoded = self.tokens.len() - self.prompt_tokens as usize;
        assert_eq!(layers[0]["prefill_tokens"], self.prompt_tokens);
        assert_eq!(layers[0]["decode_tokens"], decoded);
        assert_eq!(context["passes_not_visible"]["passes"], 0);
        assert_eq!(context["layers_not_visible"].to_string(), "[]");
        assert_eq!(context["phase_source"], "ubatch");
        for lost in ["routes/copies_lost", "received/rejected", "logits/refused"] {
            assert_eq!(stats.number(&format!("/integrity/{lost}")), 0, "{lost}");
        }
    }
}

/// Ends a server under `expert-trace run`; gives what both have said.
fn finish(server: Server) -> String {
    let (status, said) = server.stop().unwrap();
    assert!(status.success(), "{status}: {said}");
    said
}

/// The routes of each layer, with blanks between them.
fn routes(stats: &Stats) -> Vec<String> {
    let layers = stats.0["contexts"][0]["layers"].as_array().unwrap();
    let names = |layer: &Value| -> Vec<String> {
        let routes = layer["routes"].as_array().unwrap().iter();
        routes
            .map(|name| name.as_str().unwrap().to_owned())
            .collect()
    };
    layers.iter().map(|layer| names(layer).join(" ")).collect()
}

/// Passes of 32 tokens and more have the weights of their experts streamed to the device; for shorter
/// ones, and in the last layer, the experts are computed on the CPU.
fn experts_on_the_cpu(known: &Known, options: &[&str], prompts: &[(u32, usize)], streamed: u64) {
    let files = Files::new();
    let options = [&EXPERTS_ON_CPU, options].concat();
    let server = start_traced(&known.path, &[], &options, &files);
    let mut asked = Asked::default();
    for (length, decoded) in prompts {
        asked.ask(&server, *length, *decoded);
    }
    finish(server);
    let stats = asked.compare_from_start(known, &files);
    let layers = known.expected.layers() as usize;
    let mut expected = vec!["split_input fetch"; layers - 1];
    expected.push("split_input");
    assert_eq!(routes(&stats), expected);
    let fetches = stats.number("/integrity/routes/fetches");
    assert_eq!(fetches, streamed * (layers as u64 - 1));
}

#[test]
fn experts_on_the_cpu_small() {
    // 1, 32 + 10, and in two batches 32 + 32 and 11.
    let prompts = [(1, 3), (42, 2), (75, 2)];
    experts_on_the_cpu(known_small(), &["-ub", "32", "-b", "64"], &prompts, 3);
}

#[test]
fn experts_on_the_cpu_wide() {
    experts_on_the_cpu(known_wide(), &["--no-mmap"], &[(1, 3), (40, 2)], 1);
}

/// Several users at a time, whose tokens share passes.
#[test]
fn parallel_users() {
    let known = known_small();
    let files = Files::new();
    let options = [&EXPERTS_ON_CPU[..], &["-np", "2"]].concat();
    let server = start_traced(&known.path, &[], &options, &files);
    let ask = &|user: u32| -> Vec<u32> {
        let prompt: Vec<u32> = (1000 + 50 * user..1030 + 51 * user).collect();
        let mut generated = server.complete(&prompt, 4).unwrap();
        generated.pop();
        [prompt, generated].concat()
    };
    let tokens: Vec<u32> = thread::scope(|scope| {
        let users: Vec<_> = (0..4).map(|user| scope.spawn(move || ask(user))).collect();
        let users = users.into_iter();
        users.flat_map(|user| user.join().unwrap()).collect()
    });
    finish(server);

    let stats = files.stats();
    stats.assert_complete();
    let seen = files.rows();
    for layer in 0..known.expected.layers() - 1 {
        let mut expected: Vec<&[u32]> = tokens
            .iter()
            .map(|token| known.expected.ids(layer, *token))
            .collect();
        expected.sort_unstable();
        let mut seen = seen[&layer].clone();
        seen.sort_unstable();
        assert_eq!(seen, expected, "layer {layer}");
    }
    assert_eq!(seen[&(known.expected.layers() - 1)].len(), 4 * 4);
}

/// Two layers on the CPU, and two on the device, whose experts are on the CPU: what the CPU chooses is
/// seen in its router, and what the device chooses on its way to the experts.
#[test]
fn part_of_the_layers_on_the_cpu() {
    let known = known_small();
    let files = Files::new();
    let server = start_traced(&known.path, &[], &["-ngl", "3", "--cpu-moe"], &files);
    let mut asked = Asked::default();
    for (length, decoded) in [(1, 3), (40, 2), (20, 1)] {
        asked.ask(&server, length, decoded);
    }
    finish(server);
    let stats = asked.compare_from_start(known, &files);
    assert_eq!(
        routes(&stats),
        [
            "router fetch",
            "router fetch",
            "split_input fetch",
            "split_input"
        ]
    );
}

fn router_on_the_cpu(known: &Known, prompts: &[(u32, usize)]) {
    let files = Files::new();
    let server = start_traced(&known.path, &["--router-on-cpu"], &["-ngl", "99"], &files);
    let mut asked = Asked::default();
    for (length, decoded) in prompts {
        asked.ask(&server, *length, *decoded);
    }
    let said = finish(server);
    assert!(said.contains("--no-op-offload"), "{said}");
    let stats = asked.compare_from_start(known, &files);
    assert_from_logits(known, &stats);
}

fn assert_from_logits(known: &Known, stats: &Stats) {
    assert_eq!(
        routes(stats),
        vec!["logits"; known.expected.layers() as usize]
    );
    let rows = stats.number("/integrity/logits/rows");
    assert_eq!(rows, stats.number("/integrity/received/rows"));
}

#[test]
fn router_on_the_cpu_small() {
    router_on_the_cpu(known_small(), &[(1, 5), (40, 2)]);
}

#[test]
fn router_on_the_cpu_wide() {
    router_on_the_cpu(known_wide(), &[(1, 3), (40, 2)]);
}

/// The router is seen itself in the layers that are on the CPU anyway.
#[test]
fn router_and_part_of_the_layers_on_the_cpu() {
    let known = known_small();
    let files = Files::new();
    let server = start_traced(&known.path, &["--router-on-cpu"], &["-ngl", "3"], &files);
    let mut asked = Asked::default();
    for (length, decoded) in [(1, 2), (20, 1)] {
        asked.ask(&server, length, decoded);
    }
    finish(server);
    let stats = asked.compare_from_start(known, &files);
    assert_eq!(routes(&stats), ["router", "router", "logits", "logits"]);
}

/// Without `--no-op-offload` the routers' weights are streamed to the device for passes of 32 tokens
/// and more, and their logits stay there: those passes are said to be missing.
#[test]
fn router_on_the_cpu_with_streaming() {
    let known = known_small();
    let files = Files::new();
    let options = ["-ngl", "99", "-ot", OVERRIDE];
    let server = start_traced(&known.path, &[], &options, &files);
    let [mut seen, mut not_seen] = [Asked::default(), Asked::default()];
    seen.ask(&server, 20, 1);
    not_seen.ask(&server, 40, 0);
    let said = finish(server);
    assert!(said.contains("layers 0-2"), "{said}");
    let stats = files.stats();
    let rows = files.rows();
    for layer in 0..3 {
        let expected = seen.tokens.iter();
        let expected: Vec<&[u32]> = expected
            .map(|token| known.expected.ids(layer, *token))
            .collect();
        assert_eq!(rows[&layer], expected, "layer {layer}");
        let layer = &stats.0["contexts"][0]["layers"][layer as usize];
        assert_eq!(layer["coverage"], "partly_observed");
        assert_eq!(layer["reason"], "streamed");
        let missed = json!({ "prefill": 1, "decode": 0 });
        assert_eq!(layer["passes_not_seen"], missed, "layer {layer}");
    }
    let gap = &stats.0["contexts"][0]["gaps"][0];
    assert_eq!(gap["layers"], json!([0, 1, 2]));
    assert_eq!(gap["phases"], json!(["prefill"]));
    let remedy = &gap["remedies"][0];
    assert_eq!(remedy["options"], json!(["--no-op-offload"]));
}

/// Our choice from a router's logits is the device's own, which is seen on its way to a part of the
/// experts.
///
/// As of this build, the device's choice is another one, if it is fused with what comes before and
/// after it and the logits come from the CPU: for that, the option sets a variable.
fn choice_is_the_devices(name: &str, expected: &Shape) {
    let files = Files::new();
    let options = ["-ngl", "99", "-ot", "ffn_down_exps=CPU"];
    let model = shape(name, expected);
    let server = start_traced(&model, &["--router-on-cpu"], &options, &files);
    let mut asked = Asked::default();
    for (length, decoded) in [(1, 1), (20, 1)] {
        asked.ask(&server, length, decoded);
    }
    finish(server);
    let stats = files.stats();
    stats.assert_complete();
    let chosen = stats.number("/integrity/logits/rows");
    let received = |rows: &str| stats.number(&format!("/integrity/received/{rows}"));
    assert!(chosen >= 23 * (expected.layers_with_experts().len() as u64 - 1));
    assert_eq!(received("rows"), 2 * chosen);
    assert_eq!(received("repeated_rows"), chosen);
    assert_eq!(received("differing_rows"), 0);
}

#[test]
fn choice_deepseek2() {
    choice_is_the_devices("deepseek2", &Shape::DEEPSEEK2);
}

#[test]
fn choice_qwen3moe() {
    choice_is_the_devices("qwen3moe", &Shape::QWEN3MOE);
}

/// A server whose user has put the routers on the CPU needs no option of ours.
#[test]
fn attached_to_a_server_with_its_router_on_the_cpu() {
    let known = known_small();
    let files = Files::new();
    let on_cpu = r"blk\.\d+\.ffn_gate_inp.*=CPU";
    let options = ["-ngl", "99", "-ot", on_cpu, "--no-op-offload"];
    let server = start(&mut server(&known.path, &options), &files);
    let tracer = Attached::to(server.pid(), &files.options()).unwrap();
    let mut asked = Asked::default();
    for (length, decoded) in [(1, 3), (20, 2)] {
        asked.ask(&server, length, decoded);
    }
    tracer.interrupt().unwrap();
    finish(server);
    let stats = asked.compare(known, &files);
    assert_from_logits(known, &stats);
}

/// Nothing crosses to the host: nothing is counted, and the user is told what to change.
#[test]
fn everything_on_the_device() {
    let files = Files::new();
    let command = &mut server(&known_small().path, &["-ngl", "99"]);
    let server = start(command, &files);
    let tracer = Attached::to(server.pid(), &files.options()).unwrap();
    Asked::default().ask(&server, 1, 3);
    let said = tracer.interrupt().unwrap();
    assert!(said.contains("--router-on-cpu"), "{said}");
    finish(server);
    assert_eq!(files.stats().counts(), Counts::new());
    assert!(files.rows().is_empty());
}
