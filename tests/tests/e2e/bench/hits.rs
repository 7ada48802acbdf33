//! What a hit costs its thread: a program that calls the probed functions and does nothing else, with no
//! probe, with probes that do nothing, and traced.
//!
//! In each round the same process is measured in these ways, in a random order, at the same places. A
//! second process of a file of its own was started by `run`, which sets probes for all processes and has
//! them look up whose a hit is.

use std::{
    fs::{self, File},
    num::NonZeroU32,
    os::fd::OwnedFd,
    time::Instant,
};

use expert_trace::{
    attach::{Scope, Session},
    probes::{Hook, Mapper, Plan},
};
use expert_trace_tests::{
    comparison::{self, Ratio, ratio},
    hits,
    oracle::Oracle,
    tracer::{self, Attached, Stats},
};
use serde_json::json;

use super::Effort;
use crate::{layouts::compile_to, support::scratch};

/// A kind of hit.
struct Case {
    name: &'static str,
    /// Of tests/oracle/hits.c; what is left out at its end is the number of batches.
    command: &'static str,
    batches: u32,
    /// Rows that a call has, of which the time is told one by one.
    rows: Option<f64>,
    goal: Option<Goal>,
}

#[derive(Clone, Copy)]
enum Goal {
    /// So many times what an empty program costs there.
    Ratio(f64),
    /// So many nanoseconds for each row, on top of what the function takes by itself.
    RowNs(f64),
}

const FILTERED: Goal = Goal::Ratio(1.3);
const ONE_ROW: Goal = Goal::Ratio(2.5);

const CASES: [Case; 11] = [
    Case::new(hits::OTHER_THREAD, "thread", 20, Some(FILTERED)),
    Case::new(hits::OTHER_TENSOR, "other", 20, Some(FILTERED)),
    Case::new("scales of experts", "scales", 20, Some(FILTERED)),
    Case::new("one row, k 4", "decode 4", 20, Some(ONE_ROW)),
    Case::new(hits::ONE_ROW, "decode 8", 20, Some(ONE_ROW)),
    Case::new("one row, k 10", "decode 10", 20, Some(ONE_ROW)),
    Case::new("one row, k 8, every 0.2 ms", "paced 8", 5, Some(ONE_ROW)),
    Case::of_512_rows(hits::PROMPT, "prompt 8 512"),
    Case::of_512_rows("512 rows, k 10 of 512", "wide 10 512"),
    Case::new(hits::PASS, "pass 1", 200, None),
    Case::new(hits::PROMPT_PASS, "pass 512", 40, None),
];

impl Case {
    const fn new(
        name: &'static str,
        command: &'static str,
        batches: u32,
        goal: Option<Goal>,
    ) -> Self {
        Self {
            name,
            command,
            batches,
            rows: None,
            goal,
        }
    }

    const fn of_512_rows(name: &'static str, command: &'static str) -> Self {
        Self {
            rows: Some(512.0),
            ..Self::new(name, command, 4, Some(Goal::RowNs(120.0)))
        }
    }

    /// Nanoseconds of a call.
    fn time(&self, target: &mut Oracle, effort: Effort) -> f64 {
        let batches = match effort {
            Effort::Smoke => 2,
            Effort::Full { .. } => self.batches,
        };
        let time = |target: &mut Oracle, batches| {
            let answer = target.command(&format!("{} {batches}", self.command));
            answer.unwrap().parse().unwrap()
        };
        // The first calls bring pages and caches.
        let _: f64 = time(target, 1);
        time(target, batches)
    }
}

/// How a process is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arm {
    Untraced,
    Empty,
    Attached,
    Run,
}

const ARMS: [Arm; 4] = [Arm::Untraced, Arm::Empty, Arm::Attached, Arm::Run];

/// Probed functions that the program calls.
const HOOKS: [Hook; 2] = [Hook::ExpertIds, Hook::Context];

/// Rounds after which the intervals are narrow enough for the goals to be judged.
const ROUNDS: usize = 40;

#[test]
fn smoke() {
    let results = measure(Effort::Smoke);
    assert_eq!(results.len(), CASES.len());
    for result in results {
        let number = |key: &str| result[key].as_f64().unwrap();
        assert!(number("untraced_ns") < number("empty_ns"), "{result}");
        assert!(number("untraced_ns") < number("attached_ns"), "{result}");
        assert!(number("untraced_ns") < number("run_ns"), "{result}");
        assert_eq!(result["rounds"], 2);
    }
}

#[test]
#[ignore = "takes a minute: cargo xtask bench hits"]
fn cost() {
    for result in measure(Effort::asked()) {
        println!("RESULT {result}");
    }
}

fn measure(effort: Effort) -> Vec<serde_json::Value> {
    let directory = scratch();
    let [program, for_run] = ["hits", "hits-run"].map(|name| directory.path().join(name));
    compile_to(&program, &["hits.c"], &[]);
    fs::copy(&program, &for_run).unwrap();

    let mut target = Oracle::spawn(&mut std::process::Command::new(&program)).unwrap();
    let pid = NonZeroU32::new(target.pid()).unwrap();
    let mut plan = Plan::default();
    // The process is known, and so its plan is that of `attach`.
    let mapper = Mapper {
        process: Some(pid.get()),
        ..Mapper::UNKNOWN
    };
    let planned = plan.add_file(&File::open(&program).unwrap(), &program, &program, mapper);
    let probes = planned.unwrap().probes;
    let mut hooks: Vec<Hook> = probes.iter().map(|probe| probe.hook).collect();
    hooks.retain(|hook| HOOKS.contains(hook));
    assert_eq!(hooks.len(), probes.len(), "all are called: {probes:?}");
    let (session, _events) = Session::load(4096, Scope::Process(pid)).unwrap();
    let [document, document_of_run] =
        ["stats.json", "run.json"].map(|name| directory.path().join(name));
    let options = |document: &std::path::Path| {
        let output = format!("--output={}", document.display());
        [output, "--top=0".to_owned(), "--buffer-size=64M".to_owned()]
    };
    let run = std::process::Command::new(&for_run);
    let mut run = tracer::run(&options(&document_of_run), &run).unwrap();
    let mut run = Oracle::spawn(run.stderr(std::process::Stdio::null())).unwrap();

    let (rounds, limit) = match effort {
        Effort::Smoke => (2, None),
        Effort::Full { limit } => (ROUNDS, Some(limit)),
    };
    let begin = Instant::now();
    // By case and arm.
    let mut times = vec![[const { Vec::new() }; ARMS.len()]; CASES.len()];
    let mut done = 0;
    while done < rounds && limit.is_none_or(|limit| done < 2 || begin.elapsed() < limit) {
        for index in comparison::order(ARMS.len(), done as u64 + 1) {
            let arm = ARMS[index];
            let empty: Vec<OwnedFd> = match arm {
                Arm::Empty => {
                    let set = |probe| session.attach_empty(probe, pid).unwrap();
                    probes.iter().map(set).collect()
                }
                _ => Vec::new(),
            };
            let tracer = (arm == Arm::Attached)
                .then(|| Attached::to(pid.get(), &options(&document)).unwrap());
            let target = match arm {
                Arm::Run => &mut run,
                _ => &mut target,
            };
            // Rows show the layout of tensors, and the tokens of first passes are looked for.
            target.command("decode 8 10").unwrap();
            for (case, times) in CASES.iter().zip(&mut times) {
                times[index].push(case.time(target, effort));
            }
            drop(empty);
            if let Some(tracer) = tracer {
                tracer.interrupt().unwrap();
                Stats::read(&document).unwrap().assert_complete();
            }
        }
        done += 1;
    }
    assert!(target.quit().unwrap().success());
    assert!(run.quit().unwrap().success());
    Stats::read(&document_of_run).unwrap().assert_complete();
    CASES
        .iter()
        .zip(&times)
        .map(|(case, times)| result(case, times))
        .collect()
}

fn result(case: &Case, times: &[Vec<f64>; ARMS.len()]) -> serde_json::Value {
    let [untraced, empty, attached, run] = times;
    let interval = |ratio: Ratio| [ratio.low, ratio.median, ratio.high];
    let [untraced_ns, empty_ns, attached_ns, run_ns] =
        times.each_ref().map(|ns| comparison::median(ns));
    let to_empty = ratio(attached, empty);
    let row_ns = case.rows.map(|rows| {
        let added = attached.iter().zip(untraced);
        let per_row: Vec<f64> = added
            .map(|(with, without)| (with - without) / rows)
            .collect();
        // A ratio to one is the value itself.
        ratio(&per_row, &vec![1.0; per_row.len()])
    });
    let judged = match case.goal {
        Some(Goal::Ratio(goal)) => Some((goal, "times an empty program", to_empty)),
        Some(Goal::RowNs(goal)) => row_ns.map(|of_row| (goal, "ns a row", of_row)),
        None => None,
    };
    json!({
        "hit": case.name,
        "untraced_ns": untraced_ns,
        "empty_ns": empty_ns,
        "attached_ns": attached_ns,
        "run_ns": run_ns,
        "attached_to_empty": interval(to_empty),
        "run_to_attached": interval(ratio(run, attached)),
        "row_ns": row_ns.map(interval),
        "goal": judged.map(|(goal, unit, _)| json!({ "most": goal, "unit": unit })),
        "met": judged.map(|(goal, _, measured)| verdict(goal, measured)),
        "rounds": untraced.len(),
    })
}

/// Whether the interval is within the goal, beyond it, or both.
fn verdict(goal: f64, measured: Ratio) -> serde_json::Value {
    if measured.high <= goal {
        true.into()
    } else if measured.low > goal {
        false.into()
    } else {
        "not resolved".into()
    }
}
