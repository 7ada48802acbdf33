//! Routers and experts on a device and on the host, in all combinations that the host can see. The
//! device is that of an RPC server, which is a CPU llama.cpp itself: where everything is on the device,
//! the ids that the server shows are what our choice from the logits is compared with.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use expert_trace::router_on_cpu::OVERRIDE;
use expert_trace_tests::{
    models::Shape,
    oracle::Oracle,
    tracer::{self, Attached, Stats, read_log},
};
use serde_json::{Value, json};

use crate::{
    rpc::Server,
    support::{
        Known, Traced, assert_same_choice, assert_schema, assert_tokens_of, compare_with_tokens,
        driver, known_draft, known_small, known_wide, llama, llama_program, scratch, shape,
    },
};

const EXPERTS_ON_CPU: &str = "ffn_.*_exps=CPU";
const SIZES: [&str; 8] = ["-t", "2", "-c", "4096", "-b", "2048", "-ub", "512"];

/// Options of the driver: everything on the server, but what matches `on_cpu`.
fn options<'a>(endpoint: &'a str, on_cpu: &'a str) -> Vec<&'a str> {
    let device = [
        "--rpc",
        endpoint,
        "-ngl",
        "99",
        "--op-offload",
        "0",
        "-ot",
        on_cpu,
    ];
    [&SIZES[..], &device].concat()
}

fn assert_routes(stats: &Stats, expected: &[&str]) {
    for layer in stats.0["contexts"][0]["layers"].as_array().unwrap() {
        let routes: Vec<&str> = layer["routes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|route| route.as_str().unwrap())
            .collect();
        assert_eq!(routes, expected, "layer {}", layer["layer_id"]);
    }
}

fn experts_on_the_cpu(known: &Known) {
    let server = Server::start();
    let stats = compare_with_tokens(known, &options(&server.endpoint(), EXPERTS_ON_CPU));
    assert_routes(&stats, &["split_input"]);
}

#[test]
fn experts_on_the_cpu_small() {
    experts_on_the_cpu(known_small());
}

#[test]
fn experts_on_the_cpu_wide() {
    experts_on_the_cpu(known_wide());
}

/// An eval callback has the CPU's splits computed piece by piece: ids come for every weight.
#[test]
fn ids_that_come_again_count_once() {
    let server = Server::start();
    let directory = scratch();
    let dump = directory.path().join("dump");
    let dump = dump.to_string_lossy();
    let endpoint = server.endpoint();
    let options = [options(&endpoint, EXPERTS_ON_CPU), vec!["--dump", &dump]].concat();
    compare_with_tokens(known_small(), &options);
}

fn router_on_the_cpu(known: &Known) {
    let server = Server::start();
    let stats = compare_with_tokens(known, &options(&server.endpoint(), OVERRIDE));
    assert_routes(&stats, &["logits"]);
    assert!(stats.number("/integrity/logits/rows") > 0);
    assert_eq!(stats.number("/integrity/logits/refused"), 0);
}

#[test]
fn router_on_the_cpu_small() {
    router_on_the_cpu(known_small());
}

#[test]
fn router_on_the_cpu_wide() {
    router_on_the_cpu(known_wide());
}

/// Everything is on the server, but the router's logits: the choice from them is what the server does.
fn choice_is_the_servers(name: &str, expected: &Shape) {
    let server = Server::start();
    let directory = scratch();
    let log = directory.path().join("server.log");
    let of_server = Attached::to(server.pid(), &[format!("--log={}", log.display())]).unwrap();
    let mut traced = Traced::start(
        &shape(name, expected),
        &options(&server.endpoint(), OVERRIDE),
    );
    for command in ["prompt 0 48 4000", "generate 0 8 17", "prompt 1 20 12000"] {
        traced.command(command);
    }
    let (stats, chosen) = traced.finish();
    of_server.interrupt().unwrap();

    let chosen_by_server = read_log(&log).unwrap();
    assert_same_choice(&stats, &chosen, &chosen_by_server);
    let layers = stats.tokens();
    let with_experts = expected.layers_with_experts();
    assert_eq!(layers.keys().copied().collect::<Vec<_>>(), with_experts);
    assert_eq!(layers[&with_experts[0]], 76);
    assert_routes(&stats, &["logits"]);
}

#[test]
fn choice_deepseek2() {
    choice_is_the_servers("deepseek2", &Shape::DEEPSEEK2);
}

#[test]
fn choice_gpt_oss() {
    choice_is_the_servers("gpt-oss-20b", &Shape::GPT_OSS_20B);
}

#[test]
fn choice_mixtral() {
    choice_is_the_servers("mixtral", &Shape::MIXTRAL);
}

#[test]
fn choice_nemotron_h_moe() {
    choice_is_the_servers("nemotron-h-moe", &Shape::NEMOTRON_H_MOE);
}

#[test]
fn choice_olmoe() {
    choice_is_the_servers("olmoe", &Shape::OLMOE);
}

#[test]
fn choice_qwen3moe() {
    choice_is_the_servers("qwen3moe", &Shape::QWEN3MOE);
}

#[test]
fn choice_qwen3next() {
    choice_is_the_servers("qwen3next", &Shape::QWEN3NEXT);
}

/// The biases stay on the server: logits alone do not tell what is chosen.
#[test]
fn logits_without_the_models_bias_are_refused() {
    for (name, expected) in [
        ("deepseek2", Shape::DEEPSEEK2),
        ("gpt-oss-20b", Shape::GPT_OSS_20B),
    ] {
        let server = Server::start();
        let on_cpu = r"blk\.[0-9]+\.ffn_gate_inp\.weight=CPU";
        let mut traced = Traced::start(
            &shape(name, &expected),
            &options(&server.endpoint(), on_cpu),
        );
        traced.command("prompt 0 8 4000");
        let stats = traced.finish_incomplete();
        assert!(stats.0["layers"].as_array().unwrap().is_empty(), "{name}");
        assert!(stats.number("/integrity/logits/refused") > 0, "{name}");
        let problems = stats.0["integrity"]["problems"].to_string();
        assert!(problems.contains("exp_probs_b"), "{problems}");
    }
}

/// Logits that the ring buffer has no room for are lost, and the loss is counted.
#[test]
fn logits_that_do_not_fit_are_counted() {
    let known = known_small();
    let server = Server::start();
    let endpoint = server.endpoint();
    let mut traced = Traced::start_with(
        &["--buffer-size=4K"],
        &known.path,
        &options(&endpoint, OVERRIDE),
    );
    traced.command("prompt 0 300 500");
    let stats = traced.finish_incomplete();
    // All tokens in the first three layers, and the one that is followed in the last.
    assert_eq!(stats.number("/integrity/rows/seen"), 901);
    assert_eq!(stats.number("/integrity/rows/dropped/ring_full"), 900);
    assert_eq!(stats.number("/integrity/rows/emitted"), 1);
    // That is why they were not seen, and no device.
    for layer in 0..3 {
        assert_eq!(stats.0["contexts"][0]["layers"][layer]["reason"], "lost");
    }
    let remedies = &stats.0["contexts"][0]["gaps"][0]["remedies"];
    assert_eq!(remedies[0]["text"], "trace with a larger --buffer-size");
}

/// A program that is none of llama.cpp's is told what it has to set; it is started as it is.
#[test]
fn a_program_that_does_not_take_the_options() {
    let output = tracer::run(&["--router-on-cpu"], &Command::new("true"))
        .unwrap()
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("tensor_buft_overrides"), "{said}");
    assert!(said.contains("op_offload = false"), "{said}");
}

/// The option puts its own options into the command line, and says so.
#[test]
fn the_option_alone_is_enough() {
    let known = known_small();
    let server = Server::start();
    let options = ["--rpc", &server.endpoint(), "-ngl", "99"];
    let Completed { stats, rows, said } =
        complete(&["--router-on-cpu", "--strict"], &known.path, &options);
    stats.assert_complete();
    assert!(said.contains("--no-op-offload"), "{said}");
    assert!(said.contains("slower"), "{said}");
    assert!(said.contains("Chosen from router logits: "), "{said}");
    assert!(rows.len() > 20, "{} rows", rows.len());
    assert_tokens_of(known, &rows);
}

/// `attach` sees by the command line that the routers are on the CPU.
#[test]
fn attached_to_routers_on_the_cpu() {
    let known = known_small();
    let server = Server::start();
    let directory = scratch();
    let log = directory.path().join("log");
    let endpoint = server.endpoint();
    let mut command = driver(&known.path, &options(&endpoint, OVERRIDE));
    let mut target = Oracle::spawn(&mut command).unwrap();
    let tracer = Attached::to(target.pid(), &[format!("--log={}", log.display())]).unwrap();
    target.command("prompt 0 9 500").unwrap();
    target.command("prompt 0 1 509").unwrap();
    let said = tracer.interrupt().unwrap();
    assert!(said.contains("Complete: "), "{said}");
    assert!(target.quit().unwrap().success());
    let first: Vec<Vec<u32>> = read_log(&log)
        .unwrap()
        .into_iter()
        .filter(|(layer, _)| *layer == 0)
        .map(|(_, ids)| ids)
        .collect();
    let expected: Vec<&[u32]> = (500..510)
        .map(|token| known.expected.ids(0, token))
        .collect();
    assert_eq!(first, expected);
}

/// A process that was started so is recognised, and its number of experts, too, when it was changed.
#[test]
fn a_process_that_was_started_so() {
    let known = known_small();
    let server = Server::start();
    let server_options = ["--rpc", &server.endpoint(), "-ngl", "99"];
    let on_cpu = ["-ot", r"ffn_gate_inp\.=CPU", "--no-op-offload"];
    let fewer = ["--override-kv", "qwen3moe.expert_used_count=int:3"];
    let options = [&server_options[..], &on_cpu, &fewer].concat();
    let changed = complete(&[], &known.path, &options);
    changed.stats.assert_complete();
    assert_routes(&changed.stats, &["logits"]);
    // On the CPU, the ids are seen, and not chosen by us.
    let seen = complete(&[], &known.path, &[&["-ngl", "0"][..], &fewer].concat());
    assert_eq!(changed.rows, seen.rows);
    assert!(seen.rows.iter().all(|(_, ids)| ids.len() == 3));
}

/// A script that runs the small model twice on a server, once with other numbers of experts.
fn script(endpoint: &str, first: &str, second: &str) -> String {
    let program = llama().program("llama-completion");
    let run = |options: &str| {
        format!(
            "{} -m {} --rpc {endpoint} -ngl 99 -p 'Hello world' -n 4 -no-cnv --no-warmup {options} \
             < /dev/null",
            program.display(),
            known_small().path.display()
        )
    };
    format!("#!/bin/sh\n{}\nexec {}\n", run(first), run(second))
}

/// What is changed for one process is not changed for the next, and a script can become a program.
#[test]
fn each_process_has_its_own_number_of_experts() {
    let server = Server::start();
    let directory = scratch();
    let (path, file) = (
        directory.path().join("stats.json"),
        directory.path().join("script"),
    );
    let on_cpu = r"-ot 'ffn_gate_inp\.=CPU' --no-op-offload";
    let changed = format!("{on_cpu} --override-kv qwen3moe.expert_used_count=int:2");
    for (first, second, expected) in [(&*changed, on_cpu, [2, 4]), (on_cpu, &*changed, [4, 2])] {
        fs::write(&file, script(&server.endpoint(), first, second)).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        let options = [
            "--router-on-cpu".to_owned(),
            format!("--output={}", path.display()),
        ];
        let output = tracer::run(&options, &Command::new(&file))
            .unwrap()
            .output()
            .unwrap();
        assert!(output.status.success());
        let stats = Stats::read(&path).unwrap();
        stats.assert_complete();
        for (context, k) in expected.into_iter().enumerate() {
            assert_eq!(
                stats.number(&format!("/contexts/{context}/layers/0/k")),
                k,
                "context {context}"
            );
        }
    }
}

/// What a traced llama-completion has left.
struct Completed {
    stats: Stats,
    /// Rows of the log.
    rows: Vec<(u32, Vec<u32>)>,
    /// What it and the tracer said.
    said: String,
}

/// Traces llama-completion with these options.
fn complete(tracer_options: &[&str], model: &Path, program_options: &[&str]) -> Completed {
    let directory = scratch();
    let [path, log] = ["stats.json", "log"].map(|name| directory.path().join(name));
    let mut options: Vec<String> = tracer_options.iter().map(|text| (*text).into()).collect();
    options.push(format!("--output={}", path.display()));
    options.push(format!("--log={}", log.display()));
    let common = [
        "-p",
        "Hello world",
        "-n",
        "4",
        "-no-cnv",
        "--no-warmup",
        "--temp",
        "0",
    ];
    let program = [&common[..], program_options].concat();
    let output = tracer::run(
        &options,
        &llama_program("llama-completion", model, &program),
    )
    .unwrap()
    .stdin(Stdio::null())
    .output()
    .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    Completed {
        stats: Stats::read(&path).unwrap(),
        rows: read_log(&log).unwrap(),
        said,
    }
}

/// Groups as the command line changes them; and more experts than the groups have, which no choice from
/// logits can be.
#[test]
fn groups_that_are_overridden() {
    let server = Server::start();
    let endpoint = server.endpoint();
    let model = shape("deepseek2", &Shape::DEEPSEEK2);
    let fewer = "deepseek2.expert_group_used_count=int:2";
    let rpc = ["--rpc", &endpoint, "-ngl", "99", "--override-kv", fewer];
    let chosen = complete(&["--router-on-cpu"], &model, &rpc);
    let expected = complete(&[], &model, &["-ngl", "0", "--override-kv", fewer]);
    chosen.stats.assert_complete();
    assert_same_choice(&chosen.stats, &chosen.rows, &expected.rows);

    let more = "deepseek2.expert_used_count=int:40";
    let rpc = ["--rpc", &endpoint, "-ngl", "99", "--override-kv", more];
    let refused = complete(&["--router-on-cpu"], &model, &rpc);
    assert!(refused.rows.is_empty());
    assert!(refused.stats.number("/integrity/logits/refused") > 0);
}

/// The variable comes before the options, and would win.
#[test]
fn an_override_in_the_environment() {
    let server = Server::start();
    let endpoint = server.endpoint();
    let override_tensor = format!("LLAMA_ARG_OVERRIDE_TENSOR=ffn_gate_inp=RPC0[{endpoint}]");
    let rpc = format!("LLAMA_ARG_RPC={endpoint}");
    let options = ["--router-on-cpu", "--env", &override_tensor, "--env", &rpc];
    let Completed { stats, rows, .. } = complete(&options, &known_small().path, &["-ngl", "99"]);
    stats.assert_complete();
    assert_routes(&stats, &["logits"]);
    assert_tokens_of(known_small(), &rows);
}

/// An eval callback cuts the CPU's part behind every stage of the choice. What the last stage shows is
/// enough.
#[test]
fn stages_of_a_choice_are_no_losses() {
    let model = shape("gpt-oss-20b", &Shape::GPT_OSS_20B);
    let directory = scratch();
    let text = directory.path().join("text");
    fs::write(
        &text,
        "The quick brown fox jumps over the lazy dog. ".repeat(80),
    )
    .unwrap();
    let mut program = llama_program("llama-imatrix", &model, &["-c", "128", "--chunks", "2"]);
    program.arg("-f").arg(&text);
    program.args(["-ngl", "0", "-o"]);
    program.arg(directory.path().join("imatrix.gguf"));
    let output = tracer::run(&["--router-on-cpu", "--strict"], &program)
        .unwrap()
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

/// Every layer of the model is told of, also one whose experts are on the device.
#[test]
fn part_of_the_layers_on_the_device() {
    let known = known_small();
    let server = Server::start();
    let on_cpu = r"blk\.[12]\.ffn_.*_exps=CPU";
    let mut traced = Traced::start(&known.path, &options(&server.endpoint(), on_cpu));
    traced.command("prompt 0 9 500");
    let (stats, log) = traced.finish();
    assert_schema(&stats);

    let expected: Vec<(u32, Vec<u32>)> = [1, 2]
        .into_iter()
        .flat_map(|layer| {
            (500..509).map(move |token| (layer, known.expected.ids(layer, token).to_vec()))
        })
        .collect();
    assert_eq!(log, expected);
    let context = &stats.0["contexts"][0];
    assert_eq!(context["layers_not_visible"].to_string(), "[0,3]");
    let layers = context["layers"].as_array().unwrap();
    for (layer, id) in layers.iter().zip(0..) {
        let of_layer = expected.iter().filter(|(layer, _)| *layer == id);
        let chosen: BTreeSet<u32> = of_layer.flat_map(|(_, ids)| ids).copied().collect();
        let (coverage, reason, source, never) = if chosen.is_empty() {
            (
                "not_visible",
                json!("on_a_device"),
                "model_file",
                json!(null),
            )
        } else {
            let never: Vec<u32> = (0..32).filter(|id| !chosen.contains(id)).collect();
            ("observed", json!(null), "target", json!(never))
        };
        assert_eq!(layer["layer_id"], id);
        assert_eq!(layer["coverage"], coverage, "layer {id}");
        assert_eq!(layer["reason"], reason, "layer {id}");
        assert_eq!(layer["experts_never_activated"], never, "layer {id}");
        for (number, of) in [("n_expert", 32), ("k", 4)] {
            assert_eq!(layer[number], of, "layer {id}");
            assert_eq!(layer[format!("{number}_source")], source, "layer {id}");
        }
        let missed = json!({ "prefill": u32::from(chosen.is_empty()), "decode": 0 });
        assert_eq!(layer["passes_not_seen"], missed, "layer {id}");
    }
    assert_eq!(layers.len(), 4);
}

/// Applies a remedy's options to a program's own.
fn remedied(options: &[&str], remedy: &Value) -> Vec<String> {
    let further = remedy["options"].as_array().unwrap().iter();
    let further = further.map(|word| word.as_str().unwrap().to_owned());
    let own = options.iter().map(|word| (*word).to_owned());
    match remedy["position"].as_str().unwrap() {
        "before_others" => further.chain(own).collect(),
        "after_others" => own.chain(further).collect(),
        other => panic!("{other}"),
    }
}

/// What the document advises for a program's options does it: with each of the remedies that are options
/// of the program, all layers are observed.
#[test]
fn remedies_bring_all_layers_to_the_host() {
    let known = known_small();
    let server = Server::start();
    let rpc = ["--rpc", &server.endpoint()];
    let device = format!("exps=RPC0[{}]", server.endpoint());
    for (placing, hidden, expected) in [
        (
            &["-ngl", "99", "-ncmoe", "2"][..],
            "[2,3]",
            &["--n-cpu-moe", "-ngl"][..],
        ),
        (&["-ngl", "2"], "[3]", &["-ot"]),
        (&["-ngl", "99", "-ot", &device], "[0,1,2,3]", &["--cpu-moe"]),
    ] {
        let options = [&rpc[..], placing].concat();
        let before = complete(&[], &known.path, &options);
        assert_schema(&before.stats);
        let context = match before.stats.0["contexts"].as_array().unwrap().as_slice() {
            [context] => context,
            _ => &before.stats.0["not_visible"][0],
        };
        let gaps = context["gaps"].as_array().unwrap();
        assert_eq!(gaps.len(), 1, "{placing:?}: {gaps:#?}");
        assert_eq!(gaps[0]["layers"].to_string(), hidden, "{placing:?}");
        let remedies = gaps[0]["remedies"].as_array().unwrap();
        assert_eq!(remedies[0]["options"], json!(["--router-on-cpu"]));
        for option in expected {
            let mut remedies = remedies.iter();
            let remedy = remedies.find(|remedy| remedy["options"][0] == *option);
            let remedy = remedy.unwrap_or_else(|| panic!("{option} is not in {gaps:#?}"));
            let options = remedied(&options, remedy);
            let options: Vec<&str> = options.iter().map(String::as_str).collect();
            let after = complete(&["--strict"], &known.path, &options);
            let context = &after.stats.0["contexts"][0];
            assert_eq!(context["gaps"], json!([]), "{options:?}");
            let layers = context["layers"].as_array().unwrap();
            let observed = layers
                .iter()
                .filter(|layer| layer["coverage"] == "observed");
            assert_eq!(observed.count(), 4, "{options:?}");
            assert_tokens_of(known, &after.rows);
        }
        // The terminal has the layers, and the best of it.
        let text = remedies[0]["text"].as_str().unwrap();
        assert!(before.said.contains(text), "{}", before.said);
        let layers = if hidden.len() > 3 {
            "Not visible: layers "
        } else {
            "Not visible: layer "
        };
        assert!(before.said.contains(layers), "{}", before.said);
    }
}

/// A draft model that stays on a device beside a main model that does not is known by elimination, and has
/// options of its own.
#[test]
fn remedies_of_a_draft_model_are_its_own() {
    let [main, draft] = [known_small(), known_draft()];
    let server = Server::start();
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let run = |options: &[String]| {
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let mut command = llama_program("llama-cli", &main.path, &options);
        command.args(["-p", "Hello there", "-n", "4", "-st"]);
        let tracing = ["-o", path.to_str().unwrap(), "--strict"];
        let mut traced = tracer::run(&tracing, &command).unwrap();
        let output = traced.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        let stats = Stats::read(&path).unwrap();
        assert_schema(&stats);
        stats
    };
    let (endpoint, draft) = (server.endpoint(), draft.path.to_str().unwrap());
    let options = ["--rpc", &endpoint, "-ngl", "0", "-md", draft, "-ngld", "99"];
    let options = [&options[..], &["--spec-type", "draft-simple"]].concat();
    let own: Vec<String> = options.iter().map(|word| (*word).to_owned()).collect();
    let before = run(&own);
    let unseen = &before.0["not_visible"][0];
    let model = unseen["model"].as_u64().expect("its model is known");
    assert_eq!(before.0["models"][model as usize]["path"], draft);
    let remedies = unseen["gaps"][0]["remedies"].as_array().unwrap();
    let of_program = remedies.iter().filter(|of| of["whose"] == "program");
    let of_program: Vec<&Value> = of_program.collect();
    assert_eq!(of_program[0]["options"], json!(["--cpu-moe-draft"]));
    assert_eq!(of_program.len(), 2, "{remedies:#?}");
    for remedy in of_program {
        let after = run(&remedied(&options, remedy));
        assert_eq!(after.0["not_visible"], json!([]), "{remedy}");
        assert_eq!(after.0["contexts"].as_array().map(Vec::len), Some(2));
    }
}

/// Where nothing crosses to the host, nothing is counted, and the user is told what to change.
#[test]
fn everything_on_the_device() {
    let known = known_small();
    let directory = scratch();
    let server = Server::start();
    let endpoint = server.endpoint();
    let path = directory.path().join("stats.json");
    let mut command = driver(&known.path, &options(&endpoint, "nothing=CPU"));
    let mut target = Oracle::spawn(&mut command).unwrap();
    let tracer = Attached::to(target.pid(), &[format!("--output={}", path.display())]).unwrap();
    target.command("prompt 0 9 500").unwrap();
    let said = tracer.interrupt().unwrap();
    assert!(said.contains("--router-on-cpu"), "{said}");
    assert!(target.quit().unwrap().success());
    let stats = Stats::read(&path).unwrap();
    assert_schema(&stats);
    assert_eq!(stats.counts(), BTreeMap::new());
    let context = &stats.0["not_visible"][0];
    assert_eq!(context["model"], 0);
    assert_eq!(context["gaps"][0]["layers"], json!([0, 1, 2, 3]));
    assert_eq!(context["gaps"][0]["phases"], json!(["prefill"]));
    for layer in context["layers"].as_array().unwrap() {
        assert_eq!(layer["coverage"], "not_visible");
    }
}
