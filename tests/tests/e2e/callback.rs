//! The same rows in the same order as a program's own eval callback sees them; and that callback itself.

use std::{path::Path, process::Stdio};

use expert_trace_tests::{
    oracle::Oracle,
    tracer::{self, Attached},
};
use serde_json::{Value, json};

use crate::{
    rpc::Server,
    support::{
        Files, Traced, assert_tokens_of, compare_with_callback, compare_with_tokens, driver,
        known_small, random_small, random_wide, scratch,
    },
};

fn compare(model: &Path, threads: &str) {
    let (_, rows) = compare_with_callback(
        model,
        &["-t", threads, "-c", "2048", "-ub", "128"],
        &[
            "prompt 0 300 4000",
            "generate 0 20 17",
            "decode 1 9 8 7 6 5 4 3 2",
            "batch 0:77 1:78",
            "generate 1 10 5",
            "prompt 2 129 12000",
        ],
    );
    assert!(rows.len() > 900, "the oracle saw only {} rows", rows.len());
}

#[test]
fn small() {
    compare(random_small(), "1");
}

#[test]
fn small_two_threads() {
    compare(random_small(), "2");
}

#[test]
fn wide() {
    compare(random_wide(), "2");
}

/// The callback alone shows what is fully on a device. Its server, which it asks for the ids, has no
/// callback.
#[test]
fn all_on_a_device() {
    let known = known_small();
    let server = Server::start();
    let files = Files::new();
    let of_server = Attached::to(server.pid(), &files.options()).unwrap();
    let directory = scratch();
    let dump = directory.path().join("dump");
    let (endpoint, dump) = (server.endpoint(), dump.to_string_lossy());
    let device = ["--rpc", &endpoint, "-ngl", "99", "--op-offload", "0"];
    let sizes = ["-t", "2", "-c", "4096", "-b", "2048", "-ub", "512"];
    let stats = compare_with_tokens(known, &[&device[..], &sizes, &["--dump", &dump]].concat());
    of_server.interrupt().unwrap();

    let of = |stats: &Value| stats["contexts"][0]["layers"][0]["routes"].to_string();
    assert_eq!(of(&stats.0), r#"["callback"]"#);
    let callbacks = &stats.0["target"]["eval_callbacks"];
    let names_it = |function: &Value| function.as_str().unwrap().contains("on_tensor(");
    assert!(names_it(&callbacks[0]["function"]), "{callbacks}");
    assert_eq!(callbacks.as_array().unwrap().len(), 1);

    let seen = files.stats();
    seen.assert_complete();
    assert_eq!(of(&seen.0), r#"["router"]"#);
    assert_eq!(seen.tokens(), stats.tokens());
    assert_tokens_of(known, &files.log());
}

/// What `doctor` says of the eval callback of a driver that computes meanwhile.
fn doctors_answer(options: &[&str]) -> Value {
    let mut target = Oracle::spawn(&mut driver(&known_small().path, options)).unwrap();
    let mut doctor = tracer::command().unwrap();
    doctor.args(["doctor", "--json", "--pid", &target.pid().to_string()]);
    let mut doctor = doctor.stdout(Stdio::piped()).spawn().unwrap();
    // Another length has llama.cpp allocate another graph.
    for length in [3, 2].into_iter().cycle() {
        target.command("clear 0").unwrap();
        target.command(&format!("prompt 0 {length} 500")).unwrap();
        if doctor.try_wait().unwrap().is_some() {
            break;
        }
    }
    let output = doctor.wait_with_output().unwrap();
    let mut report: Value = serde_json::from_slice(&output.stdout).unwrap();
    report["target"]["eval_callback"].take()
}

#[test]
fn doctor_names_it() {
    let directory = scratch();
    let dump = directory.path().join("dump");
    let said = doctors_answer(&["--dump", &dump.to_string_lossy()]);
    assert_eq!(said["answer"], "yes", "{said}");
    let function = said["functions"][0]["function"].as_str().unwrap();
    assert!(
        function.ends_with("on_tensor(ggml_tensor*, bool, void*)"),
        "{said}"
    );
    assert_eq!(said["functions"][0]["set"], true);

    let said = doctors_answer(&[]);
    assert_eq!(said["answer"], "no", "{said}");
}

/// What is not seen because the user does not want to look there is not blamed on a device.
#[test]
fn a_route_that_is_left_out_is_told() {
    let path = &known_small().path;
    let mut traced = Traced::start_with(&["--routes=fetch,callback"], path, &[]);
    traced.command("prompt 0 9 500");
    let (stats, rows) = traced.finish();
    assert_eq!(rows, []);
    assert_eq!(stats.0["capture"]["routes"], json!(["fetch", "callback"]));
    let gap = &stats.0["not_visible"][0]["gaps"][0];
    assert_eq!(gap["reason"], "route_left_out", "{gap}");
    assert_eq!(
        gap["explanation"],
        "--routes leaves out router, split_input, device_copy"
    );
}
