//! The same rows in the same order as a program's own eval callback sees them.

use std::path::Path;

use expert_trace_tests::oracle::read_dump;

use crate::support::{Traced, random_small, random_wide, scratch};

fn compare(model: &Path, threads: &str) {
    let directory = scratch();
    let dump = directory.path().join("dump");
    let dump_path = dump.to_string_lossy();
    let mut traced = Traced::start(
        model,
        &[
            "-t", threads, "-c", "2048", "-ub", "128", "--dump", &dump_path,
        ],
    );
    for command in [
        "prompt 0 300 4000",
        "generate 0 20 17",
        "decode 1 9 8 7 6 5 4 3 2",
        "batch 0:77 1:78",
        "generate 1 10 5",
        "prompt 2 129 12000",
    ] {
        traced.command(command);
    }
    let (_, seen) = traced.finish();

    let oracle: Vec<(u32, Vec<u32>)> = read_dump(&dump)
        .unwrap()
        .into_iter()
        .map(|row| (row.layer, row.ids))
        .collect();
    assert!(
        oracle.len() > 900,
        "the oracle saw only {} rows",
        oracle.len()
    );
    assert_eq!(seen, oracle);
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
