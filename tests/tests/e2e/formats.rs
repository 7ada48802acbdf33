//! What `export` writes, read back by the tools that others use, and by what wrote it.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output},
};

use expert_trace_tests::{python, tracer};

use crate::support::{Traced, known_small, scratch};

/// `expert-trace ARGUMENTS`, without any right that tracing needs.
fn expert_trace(arguments: &[&str]) -> Output {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.arg(tracer::program().unwrap()).args(arguments);
    tracer::without_sudo(&mut command);
    command.output().unwrap()
}

/// The same, which is to succeed.
fn succeed(arguments: &[&str]) {
    let output = expert_trace(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
}

/// A trace of prompts, generation and two contexts, where everybody may read and write.
fn trace(path: &Path) {
    let option = format!("--trace={}", path.display());
    let options = ["-t", "2", "-c", "4096", "-b", "2048", "-ub", "64"];
    let mut traced = Traced::start_with(&[&option], &known_small().path, &options);
    traced.command("prompt 0 150 20");
    traced.command("generate 0 20 7");
    traced.command("batch 0:30 1:31");
    traced.command("context");
    traced.command("prompt 0 10 300");
    traced.finish();
}

#[test]
fn every_library_counts_the_same() {
    let directory = scratch();
    let open = Permissions::from_mode(0o777);
    fs::set_permissions(directory.path(), open).unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let recorded = path("routes.arrows");
    trace(recorded.as_ref());
    let readable = Permissions::from_mode(0o644);
    fs::set_permissions(&recorded, readable).unwrap();
    let mut files = vec![recorded.clone()];
    for (format, name) in [
        ("parquet", "routes.parquet"),
        ("json", "profile.json"),
        ("jsonl", "routes.jsonl"),
        ("npy", "counts.npy"),
    ] {
        let output = path(name);
        succeed(&["export", &recorded, "--format", format, "-o", &output]);
        files.push(output);
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/read_back.py");
    let mut python = Command::new(python::interpreter().unwrap());
    let output = python.arg(script).args(&files).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    for library in [
        "pyarrow",
        "pandas",
        "DuckDB, Parquet",
        "Polars, Arrow",
        "DuckDB, JSON",
        "numpy",
    ] {
        assert!(said.contains(library), "{library}: {said}");
    }
}
