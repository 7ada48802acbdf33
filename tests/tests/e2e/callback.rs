//! The same rows in the same order as a program's own eval callback sees them.

use std::path::Path;

use expert_trace_tests::{
    oracle::{Oracle, read_dump},
    tracer::{self, Stats, read_log},
};

use crate::support::{driver, random_small, random_wide, scratch};

fn compare(model: &Path, threads: &str) {
    let directory = scratch();
    let [stats, log, dump] = ["stats.json", "log", "dump"].map(|name| directory.path().join(name));
    let options = [
        format!("--output={}", stats.display()),
        format!("--log={}", log.display()),
        "--top=0".to_owned(),
    ];
    let dump_path = dump.to_string_lossy();
    let command = driver(
        model,
        &[
            "-t", threads, "-c", "2048", "-ub", "128", "--dump", &dump_path,
        ],
    );
    let mut target = Oracle::spawn(&mut tracer::run(&options, &command).unwrap()).unwrap();
    for command in [
        "prompt 0 300 4000",
        "generate 0 20 17",
        "decode 1 9 8 7 6 5 4 3 2",
        "batch 0:77 1:78",
        "generate 1 10 5",
        "prompt 2 129 12000",
    ] {
        target.command(command).unwrap();
    }
    assert!(target.quit().unwrap().success());

    let seen = read_log(&log).unwrap();
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
    Stats::read(&stats).unwrap().assert_complete();
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
