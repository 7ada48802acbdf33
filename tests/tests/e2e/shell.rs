//! Exit statuses and errors of the command line.

use std::{ffi::OsStr, process::Output};

use expert_trace_tests::tracer;

use crate::support::scratch;

fn expert_trace<S: AsRef<OsStr>>(arguments: &[S]) -> Output {
    tracer::command().unwrap().args(arguments).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_exit_status_is_the_childs() {
    for (script, status) in [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)] {
        let output = expert_trace(&["run", "--", "sh", "-c", script]);
        assert_eq!(output.status.code(), Some(status), "{}", said(&output));
    }
}

#[test]
fn a_program_that_decodes_nothing_is_said_to() {
    let output = expert_trace(&["run", "--", "true"]);
    assert_eq!(output.status.code(), Some(0));
    let said = said(&output);
    assert!(said.contains("No expert routing was seen"), "{said}");
}

#[test]
fn what_cannot_start_is_said() {
    let output = expert_trace(&["run", "--", "no-such-command-anywhere"]);
    assert_eq!(output.status.code(), Some(127));
    assert!(
        said(&output).contains("command not found"),
        "{}",
        said(&output)
    );

    let output = expert_trace(&["run", "--", "/etc/passwd"]);
    assert_eq!(output.status.code(), Some(126));
    assert!(
        said(&output).contains("not executable"),
        "{}",
        said(&output)
    );
}

#[test]
fn a_bad_output_path_fails_before_the_program_starts() {
    let directory = scratch();
    let witness = directory.path().join("ran");
    for path in ["/no/such/directory/stats.json", "/tmp"] {
        let output = expert_trace(&["run", "-o", path, "--", "touch", witness.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(125));
        let said = said(&output);
        assert!(
            said.contains(&format!("Failed to open output file: {path}")),
            "{said}"
        );
        assert!(!witness.exists());
    }
}
