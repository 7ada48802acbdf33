//! Reports in a real browser, and pictures read by others.

use std::{fs, path::Path, process::Command};

use expert_trace_tests::{python, tracer};
use serde_json::{Value, json};

use crate::support::{Traced, known_small, scratch};

/// Debian's, which `cargo xtask test` installs.
const BROWSER: &str = "/usr/bin/chromium";

fn report(input: &Path, output: &Path, options: &[&str]) {
    let mut command = Command::new(tracer::program().unwrap());
    command.arg("report").arg(input).arg("-o").arg(output);
    let output = command.args(options).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// A document of 128 layers of 512 experts.
fn large(stats: &Value) -> Value {
    let expert = |id: u64| {
        let beside = (id / 2) % 8;
        let activations = if id.is_multiple_of(2) {
            8 + beside
        } else {
            8 - beside
        };
        json!({
            "expert_id": id, "activations": activations, "prefill": 0, "decode": activations,
            "percentage": 0.0, "share": 0.0,
        })
    };
    let mut experts: Vec<Value> = (0..512).map(expert).collect();
    experts.sort_by_key(|expert| std::cmp::Reverse(expert["activations"].as_u64()));
    let mut document = stats.clone();
    let context = &mut document["contexts"][0];
    let first = context["layers"][0].clone();
    let layer = |number: u64| {
        let mut layer = first.clone();
        layer["layer_id"] = number.into();
        layer["n_expert"] = 512.into();
        layer["k"] = 8.into();
        layer["total_tokens"] = 512.into();
        layer["prefill_tokens"] = 0.into();
        layer["decode_tokens"] = 512.into();
        layer["activations"] = 4096.into();
        layer["experts"] = experts.clone().into();
        layer
    };
    context["layers"] = (0..128).map(layer).collect();
    document
}

/// The page renders, values are those of the document, nothing is asked for, nobody is left out, and names of
/// files are no HTML.
#[test]
fn pages_and_pictures_show_what_was_counted() {
    let directory = scratch();
    let at = |name: &str| directory.path().join(name);
    let trace = format!("--trace={}", at("routes.arrows").display());
    let mut traced = Traced::start_with(&[&trace], &known_small().path, &["-t", "2"]);
    traced.command("prompt 0 60 20");
    traced.command("generate 0 60 7");
    let (stats, _) = traced.finish();
    let document = stats.0;
    fs::write(at("stats.json"), document.to_string()).unwrap();

    report(&at("stats.json"), &at("counts.html"), &[]);
    report(&at("routes.arrows"), &at("trace.html"), &[]);
    report(&at("stats.json"), &at("map.png"), &["--format", "png"]);
    report(&at("stats.json"), &at("map.svg"), &["--format", "svg"]);
    let mut hostile = document.clone();
    let name = "a</script><img src=x onerror=alert(1)>\u{202e}\"'&.gguf";
    // What stands behind the last slash is the model's name.
    hostile["models"][0]["path"] = name.replace('/', "\u{2215}").into();
    hostile["target"]["exe"] = name.into();
    hostile["integrity"]["problems"] = json!([name]);
    for (name, document) in [("hostile", &hostile), ("large", &large(&document))] {
        let json = at(&format!("{name}.json"));
        fs::write(&json, document.to_string()).unwrap();
        report(&json, &at(&format!("{name}.html")), &[]);
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/report.py");
    let mut python = Command::new(python::interpreter().unwrap());
    python.arg(script).arg(BROWSER).arg(directory.path());
    let output = python.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    print!("{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn what_cannot_be_shown_is_refused() {
    let directory = scratch();
    let text = directory.path().join("text");
    fs::write(&text, "no counts").unwrap();
    let out = directory.path().join("out.html");
    for (input, options, why) in [
        (&text, &[][..], "has no counts that can be read"),
        (&directory.path().join("none"), &[], "cannot open"),
        (&text, &["--open", "-o", "-"], "--open needs a file"),
    ] {
        let mut command = Command::new(tracer::program().unwrap());
        command.arg("report").arg(input).args(options);
        if !options.contains(&"-o") {
            command.arg("-o").arg(&out);
        }
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(why), "{said}");
        assert!(!out.exists());
    }
}
