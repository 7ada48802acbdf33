//! Warm-up passes are left out on positive evidence alone.

use expert_trace_tests::tracer::{self, Stats};

use crate::support::{Traced, known_small, llama_program, scratch};

/// Traces a llama-completion with these options.
fn completion(tracer_options: &[&str], options: &[&str]) -> Stats {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let command = llama_program(
        "llama-completion",
        &known_small().path,
        &[
            &["-p", "Hello world", "-n", "6", "-no-cnv", "-t", "2"],
            options,
        ]
        .concat(),
    );
    let options = [&["-o", path.to_str().unwrap()], tracer_options].concat();
    let output = tracer::run(&options, &command).unwrap().output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let stats = Stats::read(&path).unwrap();
    stats.assert_complete();
    stats
}

#[test]
fn the_counts_are_those_of_a_run_without_warmup() {
    let with = completion(&[], &[]);
    let without = completion(&[], &["--no-warmup"]);
    assert_eq!(with.counts(), without.counts());
    assert_eq!(with.excluded("warmup"), (1, 2));
    assert_eq!(without.excluded("warmup"), (0, 0));
}

#[test]
fn it_can_be_counted() {
    let without = completion(&[], &[]);
    let with = completion(&["--include-warmup"], &[]);
    assert_eq!(with.excluded("warmup"), (0, 0));
    assert_eq!(with.tokens()[&0], without.tokens()[&0] + 2);
}

/// The same tokens as a warm-up count when they are not the first, and other short prompts always.
#[test]
fn tokens_of_a_user_are_not_taken_for_a_warmup() {
    let mut traced = Traced::start(&known_small().path, &["-t", "2"]);
    traced.command("decode 0 5 6");
    // The vocabulary's [BOS, EOS].
    traced.command("decode 0 1 2");
    traced.command("decode 0 0 0");
    let (stats, _) = traced.finish();
    assert_eq!(stats.tokens()[&0], 6);
    assert_eq!(stats.excluded("warmup"), (0, 0));
}
