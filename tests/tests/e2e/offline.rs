//! The program that was built without what traces, by somebody without rights: it does with files what the
//! whole program does.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output},
};

use expert_trace_tests::{models::Shape, tracer};

use crate::support::{Traced, known_small, scratch, shape};

fn call(program: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.arg(program).args(arguments);
    tracer::without_sudo(&mut command);
    command.output().unwrap()
}

#[test]
fn files_come_out_as_from_the_whole_program() {
    let programs = [
        tracer::program().unwrap(),
        tracer::offline_program().unwrap(),
    ];
    for model in [
        known_small().path.clone(),
        shape("grovemoe", &Shape::GROVEMOE),
    ] {
        let directory = scratch();
        fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        let (trace, json) = (path("routes.arrows"), path("stats.json"));
        let option = format!("--trace={trace}");
        let mut traced = Traced::start_with(&[&option], &model, &["-t", "2", "-ub", "64"]);
        traced.command("prompt 0 150 20");
        traced.command("generate 0 20 7");
        let (stats, _) = traced.finish();
        fs::write(&json, stats.0.to_string()).unwrap();
        for file in [&trace, &json] {
            fs::set_permissions(file, Permissions::from_mode(0o644)).unwrap();
        }
        let out = path("out");
        let of_trace = [
            "json",
            "jsonl",
            "csv",
            "parquet",
            "route-trace",
            "mbolt",
            "turbospark",
            "imatrix-counts",
            "npy",
        ];
        let of_counts = ["json", "csv", "turbospark", "imatrix-counts", "npy"];
        let exports = of_trace.map(|format| ["export", &trace, "--format", format, "-o", &out]);
        let others = of_counts.map(|format| ["export", &json, "--format", format, "-o", &out]);
        let mut calls: Vec<Vec<&str>> = Vec::new();
        calls.extend(exports.iter().map(|call| call.to_vec()));
        calls.extend(others.iter().map(|call| call.to_vec()));
        calls.push(vec!["merge", &json, "-o", &out]);
        calls.push(vec!["diff", "--json", &trace, &json]);
        for arguments in &calls {
            let [whole, offline] = programs.each_ref().map(|program| {
                let _ = fs::remove_file(&out);
                let output = call(program, arguments);
                assert!(output.status.success(), "{arguments:?}: {output:?}");
                (output.stdout, output.stderr, fs::read(&out).ok())
            });
            assert!(whole == offline, "{arguments:?} differs");
            assert!(whole.2.is_some_and(|file| !file.is_empty()) || !whole.0.is_empty());
        }
        // A trace that it has written itself is read, too.
        let (routes, imported) = (path("routes.csv"), path("imported.arrows"));
        let offline = |arguments: &[&str]| {
            let output = call(&programs[1], arguments);
            assert!(output.status.success(), "{arguments:?}: {output:?}");
        };
        offline(&["export", &trace, "-f", "route-trace", "-o", &routes]);
        offline(&["import", &routes, "-f", "route-trace", "-o", &imported]);
        offline(&["export", &imported, "-f", "route-trace", "-o", &out]);
        let choices = |file: &str| {
            let text = fs::read_to_string(file).unwrap();
            let rows = text.lines().filter(|line| !line.starts_with('#'));
            rows.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(choices(&out), choices(&routes));
    }
}

#[test]
fn commands_that_trace_say_that_they_are_missing() {
    let program = tracer::offline_program().unwrap();
    for arguments in [
        vec!["run", "-o", "stats.json", "--", "true"],
        vec!["attach", "--pid", "1"],
        vec!["doctor"],
    ] {
        let output = call(&program, &arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{said}");
        assert!(said.contains("this build cannot trace"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    let help = call(&program, &["--help"]);
    let help = String::from_utf8_lossy(&help.stdout);
    assert!(help.contains("this build cannot trace"), "{help}");
    assert!(!help.contains("  run "), "{help}");
}
