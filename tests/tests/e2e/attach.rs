//! Attaching to a process in the middle of its work, and leaving it unharmed.

use std::collections::BTreeMap;

use expert_trace_tests::{
    oracle::Oracle,
    tracer::{Attached, Counts, Stats},
};
use nix::sys::signal::Signal;

use crate::support::{driver, known_small, scratch};

const GENERATED: usize = 6000;

fn start() -> Oracle {
    let options = ["-t", "2", "-c", "8192", "-b", "2048", "-ub", "512"];
    Oracle::spawn(&mut driver(&known_small().path, &options)).unwrap()
}

/// Reads so many tokens of a stream.
fn read(target: &mut Oracle, n: usize, into: &mut Vec<u32>) {
    for _ in 0..n {
        into.push(target.line().unwrap().parse().unwrap());
    }
}

/// First run of `n` tokens, beginning at or after `from`, that has exactly these counts in all
/// layers.
fn find_run(tokens: &[u32], from: usize, n: usize, counts: &Counts) -> Option<usize> {
    let known = known_small();
    // Counts of all tokens before each one, so that a run's are a difference.
    let before = |layer: u32| {
        let mut sums = vec![vec![0u64; known.spec.n_expert as usize]];
        for token in tokens {
            let mut sum = sums.last().unwrap().clone();
            for id in known.expected.ids(layer, *token) {
                sum[*id as usize] += 1;
            }
            sums.push(sum);
        }
        sums
    };
    let before: Vec<Vec<Vec<u64>>> = (0..known.expected.layers()).map(before).collect();
    (from..=tokens.len() - n).find(|start| {
        before.iter().zip(0..).all(|(sums, layer)| {
            let run = sums[start + n]
                .iter()
                .zip(&sums[*start])
                .map(|(end, begin)| end - begin);
            let used: BTreeMap<u32, u64> = (0..).zip(run).filter(|(_, count)| *count > 0).collect();
            counts.get(&layer) == Some(&used)
        })
    })
}

#[test]
fn twice_in_the_middle_of_a_generation() {
    let mut untraced = start();
    untraced.send(&format!("stream 0 {GENERATED} 11")).unwrap();
    let mut alone = Vec::new();
    read(&mut untraced, GENERATED, &mut alone);
    assert_eq!(untraced.line().unwrap(), "ok");

    let directory = scratch();
    let mut target = start();
    target.wait_for_reader().unwrap();
    target.send(&format!("stream 0 {GENERATED} 11")).unwrap();
    let mut tokens = Vec::new();
    let mut captures = Vec::new();
    for round in 0..2 {
        read(&mut target, 50, &mut tokens);
        let path = directory.path().join(format!("{round}.json"));
        let tracer = Attached::to(target.pid(), &["-o", path.to_str().unwrap()]).unwrap();
        // More than the pipe and our own buffer hold: the target has to work for these.
        read(&mut target, 1700, &mut tokens);
        tracer.interrupt().unwrap();
        captures.push(Stats::read(&path).unwrap());
    }
    read(&mut target, GENERATED - tokens.len(), &mut tokens);
    assert_eq!(target.line().unwrap(), "ok");
    assert!(target.quit().unwrap().success());
    assert_eq!(
        tokens, alone,
        "the target's output is that of an untraced run"
    );

    // What went through the model: the token given, then all generated but the last.
    let decoded: Vec<u32> = [&[11], &tokens[..GENERATED - 1]].concat();
    let mut after = 0;
    for stats in captures {
        stats.assert_complete();
        let per_layer = stats.tokens();
        let n = per_layer[&0] as usize;
        assert!(n >= 100, "only {n} tokens were seen");
        assert!(
            per_layer.values().all(|tokens| *tokens == n as u64),
            "{per_layer:?}"
        );
        let (partial, _) = stats.excluded("partial");
        assert!(partial <= 2, "{partial} passes at two edges");
        // Whole passes only: there is a run of tokens with exactly these counts in all layers.
        let start = find_run(&decoded, after, n, &stats.counts());
        after = start.expect("the counts of a run of whole passes") + n;
        assert_eq!(stats.number("/contexts/0/layers/0/decode_tokens"), n as u64);
    }
}

#[test]
fn ends_with_the_target() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let mut target = start();
    let tracer = Attached::to(target.pid(), &["-o", path.to_str().unwrap()]).unwrap();
    target.command("prompt 0 100 500").unwrap();
    assert!(target.quit().unwrap().success());
    let (status, said) = tracer.wait().unwrap();
    assert!(status.success(), "{said}");
    let stats = Stats::read(&path).unwrap();
    stats.assert_complete();
    assert_eq!(stats.0["capture"]["ended"], "target_exited");
    assert_eq!(stats.tokens()[&0], 100);
}

#[test]
fn ends_after_its_duration_and_the_target_goes_on() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let mut target = start();
    let options = ["-o", path.to_str().unwrap(), "--duration", "1s"];
    let tracer = Attached::to(target.pid(), &options).unwrap();
    target.command("prompt 0 30 500").unwrap();
    let (status, said) = tracer.wait().unwrap();
    assert!(status.success(), "{said}");
    target.command("prompt 0 5 600").unwrap();
    assert!(target.quit().unwrap().success());
    let stats = Stats::read(&path).unwrap();
    assert_eq!(stats.0["capture"]["ended"], "duration");
    assert_eq!(stats.tokens()[&0], 30);
}

#[test]
fn a_killed_target_costs_nothing_collected() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let mut target = start();
    let tracer = Attached::to(target.pid(), &["-o", path.to_str().unwrap()]).unwrap();
    target.command("prompt 0 64 500").unwrap();
    let pid = nix::unistd::Pid::from_raw(target.pid() as i32);
    nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
    let (status, said) = tracer.wait().unwrap();
    assert!(status.success(), "{said}");
    assert_eq!(Stats::read(&path).unwrap().tokens()[&0], 64);
}

#[test]
fn two_tracers_of_two_processes_do_not_meet() {
    let directory = scratch();
    let paths = [0, 1].map(|i| directory.path().join(format!("{i}.json")));
    let mut targets = [start(), start()];
    let tracers: Vec<Attached> = targets
        .iter()
        .zip(&paths)
        .map(|(target, path)| Attached::to(target.pid(), &["-o", path.to_str().unwrap()]).unwrap())
        .collect();
    targets[0].command("prompt 0 21 500").unwrap();
    targets[1].command("prompt 0 34 500").unwrap();
    for tracer in tracers {
        tracer.interrupt().unwrap();
    }
    for (path, tokens) in paths.iter().zip([21, 34]) {
        let stats = Stats::read(path).unwrap();
        stats.assert_complete();
        assert_eq!(stats.tokens()[&0], tokens);
    }
}
