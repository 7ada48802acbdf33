//! The same rows in the same order as a program's own eval callback sees them.

use std::path::Path;

use crate::support::{compare_with_callback, random_small, random_wide};

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
