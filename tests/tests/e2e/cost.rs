//! What a capture tells of its own cost adds up, and is what others say.

use std::fs;

use expert_trace_tests::{
    oracle::Oracle,
    tracer::{self, Attached, Stats},
};

use crate::support::{driver, known_small, scratch};

/// A number of the block; `None` where it is `null`.
fn number(stats: &Stats, pointer: &str) -> Option<f64> {
    let value = stats.0.pointer(&format!("/cost/{pointer}"));
    value.unwrap_or_else(|| panic!("no {pointer}")).as_f64()
}

fn assert_near(one: f64, other: f64) {
    let near = (one - other).abs() <= 1e-9 * other.abs();
    assert!(near, "{one} is not {other}");
}

/// Checks what is known of every capture in which tokens were decoded for long enough.
fn assert_adds_up(stats: &Stats) {
    stats.assert_complete();
    let known = |pointer: &str| {
        number(stats, pointer).unwrap_or_else(|| panic!("{pointer}: {}", stats.0["cost"]))
    };
    let mut hits = 0;
    let mut ns = 0.0;
    for (i, hook) in stats.0["cost"]["hooks"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
    {
        let of_hook = stats.number(&format!("/cost/hooks/{i}/hits"));
        let probes = stats.0["target"]["hooks"].as_array().unwrap().iter();
        let probes = probes.filter(|probe| probe["hook"] == hook["hook"]);
        let counted: u64 = probes.map(|probe| probe["hits"].as_u64().unwrap()).sum();
        assert_eq!(of_hook, counted, "{hook}");
        hits += of_hook;
        let run_ns = hook["run_ns"].as_f64();
        assert_eq!(run_ns.is_some(), hook["timed_hits"] != 0, "{hook}");
        ns += of_hook as f64 * (hook["trap_ns"].as_f64().unwrap() + run_ns.unwrap_or(0.0));
        if hook["hook"] == "expert_ids" {
            assert_eq!(of_hook, stats.number("/integrity/hits/entered"));
            let timed = hook["timed_hits"].as_u64().unwrap();
            assert!(timed > 0 && timed <= of_hook, "{hook}");
        }
    }
    assert_eq!(stats.number("/cost/hits"), hits);
    assert_near(known("hits_ns"), ns);
    let tokens = stats.number("/cost/tokens");
    assert_eq!(tokens, stats.tokens()[&0]);
    assert_near(known("ns_per_token") * tokens as f64, ns);
    let window = stats.0["capture"]["duration_s"].as_f64().unwrap();
    assert_near(known("window_percent"), ns / window / 1e7);
    assert_near(
        known("target_cpu_percent"),
        ns / known("target_cpu_s") / 1e7,
    );
    assert!(stats.0["cost"]["unknown"].as_array().unwrap().is_empty());
    let buffer = stats.number("/cost/tracer/ring_buffer_bytes");
    assert_eq!(buffer, stats.number("/integrity/ring_buffer_bytes"));
    let resident = stats.number("/cost/tracer/anonymous_rss_bytes");
    assert!(resident < stats.number("/cost/tracer/peak_rss_bytes"));
    assert!(known("tracer/cpu_s") > 0.0);
}

/// What a process has in `/proc/PID/status`, in bytes.
fn memory(pid: u32, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
    kib.parse::<u64>().unwrap() << 10
}

#[test]
fn of_a_process() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let mut target = Oracle::spawn(&mut driver(&known_small().path, &["-t", "1"])).unwrap();
    let tracer = Attached::to(target.pid(), &["-o", path.to_str().unwrap()]).unwrap();
    target.command("generate 0 400 21").unwrap();
    let [peak, anonymous] = ["VmHWM:", "RssAnon:"].map(|key| memory(tracer.pid(), key));
    let said = tracer.interrupt().unwrap();
    assert!(target.quit().unwrap().success());
    let stats = Stats::read(&path).unwrap();
    assert_adds_up(&stats);
    // Some memory more for the document.
    let more = stats.number("/cost/tracer/peak_rss_bytes");
    assert!(
        (peak..peak + (8 << 20)).contains(&more),
        "{more} after {peak}"
    );
    let more = stats.number("/cost/tracer/anonymous_rss_bytes");
    let near = anonymous.saturating_sub(1 << 20)..anonymous + (8 << 20);
    assert!(near.contains(&more), "{more} after {anonymous}");
    let hits = stats.number("/cost/hits");
    assert!(said.contains(&format!("Cost: {hits} hits, ")), "{said}");
}

#[test]
fn of_a_run() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let driver = driver(&known_small().path, &["-t", "1"]);
    let options = ["-o", path.to_str().unwrap()];
    let mut run = tracer::run(&options, &driver).unwrap();
    let mut target = Oracle::spawn(run.stderr(std::process::Stdio::null())).unwrap();
    target.command("generate 0 400 21").unwrap();
    assert!(target.quit().unwrap().success());
    assert_adds_up(&Stats::read(&path).unwrap());
}
