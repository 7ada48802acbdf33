//! What else goes on in a pass, and must neither be missed nor counted twice: a second block of experts,
//! adapters, graphs that are used again, requests that generate nothing.

use std::{collections::BTreeMap, path::Path, process::Command};

use expert_trace_tests::{
    models::{ModelSpec, Shape, write_lora},
    oracle::{DumpRow, Oracle, read_dump},
    server,
    tracer::{self, Attached, Stats, count, read_second_log},
};
use serde_json::{Value, json};

use crate::{
    rpc,
    support::{
        Files, Known, Traced, assert_schema, compare_with_callback, driver, known_small, llama,
        prebuilt, random_small, scratch, shape,
    },
};

fn rows(dump: Vec<DumpRow>) -> Vec<(u32, Vec<u32>)> {
    dump.into_iter().map(|row| (row.layer, row.ids)).collect()
}

/// GroveMoE: the ids of the second block are those that its weights are multiplied by.
#[test]
fn a_second_block_is_counted_apart() {
    let expected = &Shape::GROVEMOE;
    let model = shape("grovemoe", expected);
    let files = Files::new();
    let [dump, second] = ["dump", "second"].map(|name| files.path(name));
    let driver = driver(
        &model,
        &[
            "-t",
            "2",
            "-c",
            "512",
            "-ub",
            "32",
            "--dump",
            dump.to_str().unwrap(),
            "--dump-second",
            second.to_str().unwrap(),
        ],
    );
    let mut command = tracer::run(&files.options(), &driver).unwrap();
    let mut target = Oracle::spawn(&mut command).unwrap();
    for command in ["prompt 0 48 4000", "generate 0 8 17", "batch 0:77 1:78"] {
        target.command(command).unwrap();
    }
    assert!(target.quit().unwrap().success());

    let stats = files.stats();
    stats.assert_complete();
    assert_schema(&stats);
    let dumped = rows(read_dump(&dump).unwrap());
    assert_eq!(files.log(), dumped);
    assert_eq!(
        stats.counts(),
        count(dumped.iter().map(|(layer, ids)| (*layer, &ids[..])))
    );

    let dumped = rows(read_dump(&second).unwrap());
    assert_eq!(read_second_log(&files.path("log")).unwrap(), dumped);
    let mut counts = count(dumped.iter().map(|(layer, ids)| (*layer, &ids[..])));
    let layers = stats.0["contexts"][0]["layers"].as_array().unwrap();
    assert_eq!(layers.len(), expected.layers as usize);
    for layer in layers {
        assert_eq!(layer["n_expert"], expected.n_expert);
        assert_eq!(layer["coverage"], "observed");
        let block = &layer["second_block"];
        assert_eq!(block["n_expert"], expected.second_experts().unwrap());
        assert_eq!(block["k"], expected.k);
        assert_eq!(block["coverage"], "observed");
        for key in ["passes", "total_tokens", "prefill_tokens", "decode_tokens"] {
            assert_eq!(block[key], layer[key], "{key}");
        }
        let number = layer["layer_id"].as_u64().unwrap() as u32;
        let dumped = counts.remove(&number).unwrap();
        let seen: Vec<&Value> = block["experts"].as_array().unwrap().iter().collect();
        assert_eq!(seen.len(), dumped.len());
        for expert in seen {
            let id = expert["expert_id"].as_u64().unwrap() as u32;
            assert_eq!(
                expert["activations"], dumped[&id],
                "layer {number}, expert {id}"
            );
        }
        // Two experts of a row can have the same one in the second block.
        let tokens = block["total_tokens"].as_u64().unwrap();
        assert_eq!(block["activations"], tokens * u64::from(expected.k));
    }
    assert!(dumped.iter().any(|(_, ids)| {
        let mut ids = ids.clone();
        ids.sort_unstable();
        ids.windows(2).any(|pair| pair[0] == pair[1])
    }));
    let model = &stats.0["models"][0];
    assert_eq!(
        model["second_block_experts"],
        expected.second_experts().unwrap()
    );
}

/// The router is on a device, and the experts of every other layer on the CPU, where llama.cpp makes the
/// choice for the second block once more. The device is that of a server that shows the rest: without a
/// scheduler passes are told apart by the layer number, which comes twice.
#[test]
fn a_second_block_of_a_router_on_a_device() {
    let expected = &Shape::GROVEMOE;
    let model = shape("grovemoe", expected);
    let (of_server, of_client) = (Files::new(), Files::new());
    let [dump, second] = ["dump", "second"].map(|name| of_client.path(name));
    let server = rpc::Server::start();
    let attached = Attached::to(server.pid(), &of_server.options()).unwrap();
    let endpoint = server.endpoint();
    let options = [
        ["--rpc", &endpoint],
        ["-ngl", "99"],
        ["--op-offload", "0"],
        ["-ot", "blk.[02].*exps=CPU"],
        ["--dump", dump.to_str().unwrap()],
        ["--dump-second", second.to_str().unwrap()],
    ];
    let client = driver(&model, options.as_flattened());
    // By the ids that its callback asks for, the client would show the first block of all layers.
    let routes = ["--routes=router,split_input".to_owned()];
    let options = [of_client.options().as_slice(), &routes].concat();
    let mut client = tracer::run(&options, &client).unwrap();
    let mut client = Oracle::spawn(&mut client).unwrap();
    for command in ["prompt 0 20 4000", "generate 0 4 17"] {
        client.command(command).unwrap();
    }
    assert!(client.quit().unwrap().success());
    attached.interrupt().unwrap();

    let [first, second] = [dump, second].map(|path| rows(read_dump(&path).unwrap()));
    let of = |rows: &[(u32, Vec<u32>)], layers: [u32; 2]| -> Vec<(u32, Vec<u32>)> {
        let rows = rows.iter().filter(|(layer, _)| layers.contains(layer));
        rows.cloned().collect()
    };
    let on_cpu = [0, 2];
    for (files, first, layers) in [
        (&of_server, first.clone(), [1, 3]),
        (&of_client, of(&first, on_cpu), on_cpu),
    ] {
        let stats = files.stats();
        stats.assert_complete();
        assert_eq!(stats.0["contexts"][0]["passes"], 5);
        assert_eq!(files.log(), first);
        let seen = read_second_log(&files.path("log")).unwrap();
        assert_eq!(seen, of(&second, layers));
        for layer in stats.0["contexts"][0]["layers"].as_array().unwrap() {
            let number = layer["layer_id"].as_u64().unwrap() as u32;
            let block = &layer["second_block"];
            assert_eq!(
                block.is_object(),
                layers.contains(&number),
                "layer {number}"
            );
        }
    }
    let source = |files: &Files| files.stats().0["contexts"][0]["pass_source"].clone();
    assert_eq!(source(&of_server), "layer_order");
    let stats = of_client.stats();
    let context = &stats.0["contexts"][0];
    assert_eq!(context["layers_not_visible"].to_string(), "[1,3]");
    assert_eq!(
        context["layers"][0]["routes"].to_string(),
        "[\"split_input\"]"
    );
}

const COMMANDS: [&str; 4] = [
    "prompt 0 40 4000",
    "generate 0 6 17",
    "prompt 1 9 12000",
    "batch 0:77 1:78",
];

/// Rows that an untraced driver dumps.
fn dumped(model: &Path, options: &[&str]) -> Vec<(u32, Vec<u32>)> {
    let directory = scratch();
    let dump = directory.path().join("dump");
    let options = [options, &["--dump", dump.to_str().unwrap()]].concat();
    let mut target = Oracle::spawn(&mut driver(model, &options)).unwrap();
    for command in COMMANDS {
        target.command(command).unwrap();
    }
    assert!(target.quit().unwrap().success());
    rows(read_dump(&dump).unwrap())
}

/// An adapter adds two multiplications by the same ids for each weight of the experts.
#[test]
fn an_adapter_for_routers_and_experts() {
    let model = random_small();
    let directory = scratch();
    let adapter = directory.path().join("lora.gguf");
    write_lora(&adapter, &ModelSpec::SMALL).unwrap();
    let lora = ["--lora", adapter.to_str().unwrap()];

    let on_cpu = [&["-t", "2", "-ub", "32"], &lora[..]].concat();
    let (stats, with_adapter) = compare_with_callback(model, &on_cpu, &COMMANDS);
    assert_eq!(stats.number("/contexts/0/layers/0/total_tokens"), 57);
    let without = dumped(model, &["-t", "2", "-ub", "32"]);
    assert_eq!(without.len(), with_adapter.len());
    let differing = without.iter().zip(&with_adapter).filter(|(a, b)| a != b);
    assert!(
        differing.count() > without.len() / 2,
        "the adapter is not used"
    );

    let server = rpc::Server::start();
    let endpoint = server.endpoint();
    let device = [
        ["--rpc", &endpoint],
        ["-ngl", "99"],
        ["--op-offload", "0"],
        ["-ot", "ffn_.*_exps=CPU"],
        ["-ub", "32"],
    ];
    let on_device = [device.as_flattened(), &lora[..]].concat();
    let expected = dumped(model, &on_device);
    let mut traced = Traced::start(model, &on_device);
    for command in COMMANDS {
        traced.command(command);
    }
    let (stats, seen) = traced.finish();
    assert_eq!(seen, expected);
    for layer in stats.0["contexts"][0]["layers"].as_array().unwrap() {
        assert_eq!(layer["routes"].to_string(), "[\"split_input\"]");
    }
}

/// A program that maps ggml before llama.cpp has its scheduler probed, too. Its passes and contexts are the
/// same.
#[test]
fn a_scheduler_that_comes_before_llama_cpp() {
    let contexts = |ggml_comes_first: bool| {
        let files = Files::new();
        let mut command = Command::new("env");
        if ggml_comes_first {
            let library = llama().bin.join("libggml-base.so.0");
            command.arg(format!("LD_PRELOAD={}", library.display()));
        }
        let driver = driver(&known_small().path, &["-t", "1", "-c", "256"]);
        command.arg(driver.get_program()).args(driver.get_args());
        let mut traced = tracer::run(&files.options(), &command).unwrap();
        let mut traced = Oracle::spawn(&mut traced).unwrap();
        for command in [
            "prompt 0 9 500",
            "context",
            "prompt 0 7 600",
            "reserve",
            "use 0",
            "generate 0 3 4",
            "use 1",
            "generate 0 3 4",
            "free 0",
        ] {
            traced.command(command).unwrap();
        }
        assert!(traced.quit().unwrap().success());
        let mut stats = files.stats();
        stats.assert_complete();
        let hooks = stats.0["target"]["hooks"].as_array().unwrap().iter();
        let of_scheduler = hooks.filter(|hook| hook["hook"] == "pass_begin");
        let hits: Vec<u64> = of_scheduler
            .map(|hook| hook["hits"].as_u64().unwrap())
            .collect();
        let contexts = stats.0["contexts"].as_array_mut().unwrap();
        for context in contexts.iter_mut() {
            context["pid"] = Value::Null;
        }
        (hits, stats.0["contexts"].take())
    };
    let (of_none, expected) = contexts(false);
    assert_eq!(of_none, [0; 0]);
    let (of_scheduler, seen) = contexts(true);
    assert_eq!(of_scheduler, [8]);
    assert_eq!(expected.as_array().unwrap().len(), 2);
    assert_eq!(seen, expected);
}

/// llama.cpp uses the tensors of a pass again in the next one of the same shape, with other contents.
#[test]
fn graphs_that_are_used_again() {
    let known = known_small();
    let run = |options: &[&str]| {
        let mut traced = Traced::start_with(options, &known.path, &["-t", "2"]);
        traced.command("prompt 0 10 4000");
        let decoded = traced.command("generate 0 20 17");
        let reused = traced.command("reused")[0];
        let (stats, rows) = traced.finish();
        assert_eq!(stats.number("/contexts/0/passes"), 21);
        (reused, decoded, rows)
    };
    let (reused, decoded, rows) = run(&[]);
    assert!(reused >= 15, "only {reused} graphs were used again");
    let anew = run(&["--env=LLAMA_GRAPH_REUSE_DISABLE=1"]);
    assert_eq!(anew, (0, decoded.clone(), rows.clone()));

    let tokens = (4000..4010).chain([17]).chain(decoded).take(30);
    let seen: Vec<&[u32]> = rows
        .iter()
        .filter(|(layer, _)| *layer == 0)
        .map(|(_, ids)| ids.as_slice())
        .collect();
    let expected = tokens.map(|token| known.expected.ids(0, token));
    assert_eq!(seen, expected.collect::<Vec<_>>());
}

/// Traces a server from its start, with its warm-up, has it do `ask`, and gives the document and the rows
/// by layer.
fn serve<T>(
    options: &[&str],
    ask: impl FnOnce(&server::Server) -> T,
) -> (T, Stats, BTreeMap<u32, Vec<Vec<u32>>>) {
    let files = Files::new();
    let directory = &prebuilt().vulkan_server;
    let mut command = Command::new(directory.join("llama-server"));
    command.arg("-m").arg(&known_small().path).args(options);
    command.args(["--device", "none", "-np", "2", "-c", "1024"]);
    let mut command = tracer::run(&files.options(), &command).unwrap();
    command.env("LD_LIBRARY_PATH", directory);
    let server = server::Server::start(&mut command, &files.path("said")).unwrap();
    let answer = ask(&server);
    let (status, said) = server.stop().unwrap();
    assert!(status.success(), "{said}");
    (answer, files.stats(), files.rows())
}

/// Fails unless each token has its experts in every layer, once, and as part of a prompt.
fn assert_prompts(stats: &Stats, rows: &BTreeMap<u32, Vec<Vec<u32>>>, tokens: &[u32]) {
    let Known { expected, .. } = known_small();
    stats.assert_complete();
    assert_eq!(stats.0["contexts"].as_array().map(Vec::len), Some(1));
    let layers = stats.0["contexts"][0]["layers"].as_array().unwrap();
    assert_eq!(layers.len(), expected.layers() as usize);
    for (number, layer) in (0..).zip(layers) {
        let mut expected: Vec<&[u32]> = tokens
            .iter()
            .map(|token| expected.ids(number, *token))
            .collect();
        let mut seen: Vec<&[u32]> = rows[&number].iter().map(Vec::as_slice).collect();
        expected.sort_unstable();
        seen.sort_unstable();
        assert_eq!(seen, expected, "layer {number}");
        assert_eq!(layer["coverage"], "observed");
        assert_eq!(layer["prefill_tokens"], tokens.len());
        assert_eq!(layer["decode_tokens"], 0);
    }
    let counts = |number| {
        count(
            tokens
                .iter()
                .map(|token| (number, expected.ids(number, *token))),
        )
    };
    assert_eq!(stats.counts()[&0], counts(0)[&0]);
    let (passes, warmup) = stats.excluded("warmup");
    assert!(passes > 0 && warmup == 2 * passes, "{passes}, {warmup}");
}

/// Several texts in one request: every token's output is wanted, and a pass has equal parts of texts that
/// are computed together.
#[test]
fn embeddings() {
    let inputs: [Vec<u32>; 3] = [(4000..4020).collect(), (12000..12021).collect(), vec![77]];
    let options = ["--embedding", "--pooling", "mean"];
    let (answer, stats, rows) = serve(&options, |server| {
        let question = json!({ "input": inputs });
        server.post("/v1/embeddings", &question).unwrap()
    });
    assert_eq!(answer["data"].as_array().map(Vec::len), Some(3));
    assert_eq!(answer["usage"]["prompt_tokens"], 42);
    assert_prompts(&stats, &rows, &inputs.concat());
}

/// A query and several documents.
#[test]
fn reranking() {
    let query = "where does it rain";
    let documents = [
        "in the north",
        "nobody knows",
        "it rains on the plain in Spain",
    ];
    let ((answer, tokens), stats, rows) = serve(&["--rerank"], |server| {
        let question = json!({ "query": query, "documents": documents });
        let answer = server.post("/v1/rerank", &question).unwrap();
        // The beginning of a text, the query, and the document, as `format_prompt_rerank` has it.
        let tokenize = |text: &str| {
            let question = json!({ "content": text });
            let answer = server.post("/tokenize", &question).unwrap();
            let tokens = answer["tokens"].as_array().unwrap().iter();
            tokens
                .map(|token| token.as_u64().unwrap() as u32)
                .collect::<Vec<_>>()
        };
        let prompts = documents.map(|text| [vec![1], tokenize(query), tokenize(text)].concat());
        (answer, prompts.concat())
    });
    assert_eq!(answer["results"].as_array().map(Vec::len), Some(3));
    assert_eq!(answer["usage"]["prompt_tokens"], tokens.len());
    assert_prompts(&stats, &rows, &tokens);
}
