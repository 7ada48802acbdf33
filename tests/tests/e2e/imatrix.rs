//! llama-imatrix counts the rows routed to each expert itself: its counts and ours must be equal.

use std::{collections::BTreeMap, ffi::OsStr, fs, path::Path, process::Command};

use expert_trace_tests::{
    imatrix::read_counts,
    tracer::{self, Stats},
};

use serde_json::json;

use crate::{
    rpc::Server,
    support::{llama_program, random_small, random_wide, scratch},
};

/// How a run is traced, and what that has to show.
struct Run<'a> {
    /// Of the tracer.
    options: &'a [&'a str],
    /// Of the program: where its tensors are.
    placement: &'a [&'a str],
    /// Routes of every layer.
    routes: &'a [&'a str],
}

/// Traces llama-imatrix, and fails unless our counts are those that it writes. Gives what was said.
fn compare(model: &Path, run: &Run<'_>) -> String {
    let directory = scratch();
    let [stats, text, counts] =
        ["stats.json", "text", "imatrix.gguf"].map(|name| directory.path().join(name));
    let sentences: Vec<String> = (0..400)
        .map(|i| {
            format!(
                "Line {i}: the {}th of {} owls counts {} mice.",
                i * 7,
                i % 13,
                i * i
            )
        })
        .collect();
    fs::write(&text, sentences.join("\n")).unwrap();
    let (text, counts) = (text.to_string_lossy(), counts.to_string_lossy());
    let files = ["-f", &text, "-o", &counts];
    let work = ["-c", "128", "--chunks", "12", "--no-ppl", "-t", "2"];
    let command = llama_program(
        "llama-imatrix",
        model,
        &[&files, &work[..], run.placement].concat(),
    );
    let output = format!("--output={}", stats.display());
    let options = [&[output.as_str(), "--top=0"], run.options].concat();
    let output = tracer::run(&options, &command).unwrap().output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");

    let verify = |stats: &Path| {
        let verify = ["verify".as_ref(), stats.as_os_str(), OsStr::new(&*counts)];
        Command::new(tracer::program().unwrap())
            .args(verify)
            .output()
            .unwrap()
    };
    let verified = verify(&stats);
    assert_eq!(verified.status.code(), Some(0), "{verified:?}");
    assert!(String::from_utf8_lossy(&verified.stdout).contains("\nEqual: "));

    let path = stats;
    let stats = Stats::read(&path).unwrap();
    stats.assert_complete();
    // One activation more.
    let mut other = stats.0.clone();
    for key in ["prefill", "activations"] {
        let count = &mut other["contexts"][0]["layers"][0]["experts"][0][key];
        *count = json!(count.as_u64().unwrap() + 1);
    }
    fs::write(&path, other.to_string()).unwrap();
    let refuted = verify(&path);
    assert_eq!(refuted.status.code(), Some(1), "{refuted:?}");
    assert!(String::from_utf8_lossy(&refuted.stdout).contains("Different: in 1 of "));

    let theirs = read_counts(Path::new(&*counts)).unwrap();
    let ours: BTreeMap<u32, Vec<u64>> = theirs
        .iter()
        .map(|(layer, counts)| {
            let layer_counts = &stats.counts()[layer];
            let of = |expert: usize| layer_counts.get(&(expert as u32)).copied().unwrap_or(0);
            (*layer, (0..counts.len()).map(of).collect())
        })
        .collect();
    assert_eq!(ours, theirs);
    assert_eq!(stats.counts().len(), theirs.len());
    let rows: u64 = theirs.values().flatten().sum();
    assert!(
        rows > 12 * 128,
        "several chunks were counted, not {rows} activations"
    );
    for layer in stats.0["contexts"][0]["layers"].as_array().unwrap() {
        let id = &layer["layer_id"];
        assert_eq!(layer["routes"], json!(run.routes), "layer {id}: {said}");
        assert_eq!(layer["coverage"], "observed", "layer {id}: {said}");
    }
    said
}

#[test]
fn small() {
    // No device can be there, and so nobody looks for the callback.
    let said = compare(
        random_small(),
        &Run {
            options: &[],
            placement: &[],
            routes: &["router"],
        },
    );
    assert!(!said.contains(CALLBACK), "{said}");
}

/// What the program's callback is called.
const CALLBACK: &str = "ik_collect_imatrix(ggml_tensor*, bool, void*) in ";

/// Its callback asks for the ids of every MUL_MAT_ID, also when they are on the host.
#[test]
fn wide_by_one_route() {
    for route in ["router", "callback"] {
        compare(
            random_wide(),
            &Run {
                options: &[&format!("--routes={route}")],
                placement: &[],
                routes: &[route],
            },
        );
    }
}

/// Where nothing else crosses to the host, what the callback asks for does.
#[test]
fn all_on_a_device() {
    let server = Server::start();
    let said = compare(
        random_wide(),
        &Run {
            options: &[],
            placement: &["--rpc", &server.endpoint(), "-ngl", "99"],
            routes: &["callback"],
        },
    );
    assert!(said.contains(CALLBACK), "{said}");
}

/// What MUL_MAT_ID gets is a copy of the ids then, which is named after the device it is for.
#[test]
fn copies_for_other_devices() {
    let server = Server::start();
    let endpoint = server.endpoint();
    let experts_on = |device: &str| format!("ffn_.*_exps={device}");
    let [on_cpu, on_server] = [experts_on("CPU"), experts_on(&format!("RPC0[{endpoint}]"))];
    for (layers, experts) in [("99", on_cpu), ("0", on_server)] {
        compare(
            random_small(),
            &Run {
                options: &["--routes=callback"],
                placement: &["--rpc", &endpoint, "-ngl", layers, "-ot", &experts],
                routes: &["callback"],
            },
        );
    }
}
