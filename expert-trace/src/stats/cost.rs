//! What a capture has cost the target, as measured by itself: hits times what one takes; and what we took.
//!
//! A hit is a trap, and the run of a BPF program. What the trap takes depends on the machine and on the
//! instruction under the probe; it is measured on functions of our own. The programs take their own times,
//! at some of the hits, since that costs time, too.

use std::time::Duration;

use serde::Serialize;

use expert_trace_common::ProbeCounts;

use crate::{probes::Hook, prologue::Step};

/// Hits of a probe, and what is known of them.
#[derive(Clone, Copy, Debug)]
pub struct ProbeHits {
    /// What the probe is for.
    pub hook: Hook,
    /// How the kernel gets past the instruction under it.
    pub step: Option<Step>,
    /// Its hits, and what its program took for some of them.
    pub counts: ProbeCounts,
}

/// What traps take on this machine, in nanoseconds; of those that were not needed, or could not be
/// measured, nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traps {
    /// On an instruction that the kernel emulates.
    pub emulated: Option<f64>,
    /// On one that the processor steps over.
    pub single_stepped: Option<f64>,
    /// On the entry of a function, and on its return.
    pub on_return: Option<f64>,
}

impl Traps {
    /// On a probe; one of which the instruction is not known is taken for an emulated one.
    pub fn of(&self, hook: Hook, step: Option<Step>) -> Option<f64> {
        match step {
            _ if hook.on_return() => self.on_return,
            Some(Step::SingleStepped) => self.single_stepped,
            Some(Step::Emulated) | None => self.emulated,
        }
    }
}

/// What we took ourselves.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Tracer {
    /// Processor time since our start, in seconds.
    pub cpu_s: f64,
    /// Most memory that was resident (`VmHWM`), in bytes: with the ring buffer, and pages of files.
    pub peak_rss_bytes: Option<u64>,
    /// Anonymous memory that is resident (`RssAnon`), in bytes.
    pub anonymous_rss_bytes: Option<u64>,
    /// Size of the ring buffer, in bytes.
    pub ring_buffer_bytes: u32,
}

/// What is measured at the end of a capture.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Of each probe.
    pub probes: Vec<ProbeHits>,
    /// Of this machine.
    pub traps: Traps,
    /// How long the probes were on.
    pub window: Duration,
    /// Tokens that are counted, over all contexts.
    pub tokens: u64,
    /// Processor time that the target took in the window.
    pub target_cpu: Option<Duration>,
    /// What could not be measured, and why.
    pub unknown: Vec<String>,
    /// Of us.
    pub tracer: Tracer,
}

/// What a capture has cost.
#[derive(Debug, Serialize)]
pub struct Cost {
    /// Hits of all probes.
    pub hits: u64,
    /// By hook, those that were hit.
    pub hooks: Vec<HookCost>,
    /// Hits of hooks of which no run was timed: their traps are in `hits_ns`, their programs are not.
    pub untimed_hits: u64,
    /// Time that hits took from the target's threads, in nanoseconds.
    pub hits_ns: Option<f64>,
    /// Tokens that are counted, over all contexts.
    pub tokens: u64,
    /// `hits_ns` for each of them.
    pub ns_per_token: Option<f64>,
    /// 100 × `hits_ns` / the time of the capture: several threads are hit at once.
    pub window_percent: Option<f64>,
    /// Processor time of the target in the time of the capture, in seconds, with that of the hits.
    pub target_cpu_s: Option<f64>,
    /// 100 × `hits_ns` / that.
    pub target_cpu_percent: Option<f64>,
    /// What of this is not known, and why.
    pub unknown: Vec<String>,
    /// What we took.
    pub tracer: Tracer,
}

/// What the hits of one hook have cost.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct HookCost {
    /// What its probes are for.
    pub hook: Hook,
    /// Their hits.
    pub hits: u64,
    /// Those of which the program took its own time.
    pub timed_hits: u64,
    /// What a trap takes, in nanoseconds; the mean, where probes differ.
    pub trap_ns: Option<f64>,
    /// What a run of the program takes, in nanoseconds: the mean of those.
    pub run_ns: Option<f64>,
}

impl HookCost {
    fn of(hook: Hook, probes: &[ProbeHits], traps: &Traps) -> Self {
        let hit = probes
            .iter()
            .filter(|probe| probe.hook == hook && probe.counts.hits > 0);
        let sum = |of: fn(&ProbeCounts) -> u64| hit.clone().map(|probe| of(&probe.counts)).sum();
        let (hits, timed, timed_ns): (u64, u64, u64) = (
            sum(|counts| counts.hits),
            sum(|counts| counts.timed),
            sum(|counts| counts.timed_ns),
        );
        let all = hit.map(|probe| Some(traps.of(hook, probe.step)? * probe.counts.hits as f64));
        let all: Option<f64> = all.sum();
        Self {
            hook,
            hits,
            timed_hits: timed,
            trap_ns: all.and_then(|all| quotient(all, hits as f64)),
            run_ns: quotient(timed_ns as f64, timed as f64),
        }
    }

    /// What its hits took, in nanoseconds, their programs as far as they were timed.
    fn hits_ns(&self) -> Option<f64> {
        Some(self.hits as f64 * (self.trap_ns? + self.run_ns.unwrap_or(0.0)))
    }
}

impl Cost {
    /// Draws up the account.
    pub fn new(measured: Measured) -> Self {
        let Measured {
            probes,
            traps,
            window,
            tokens,
            target_cpu,
            mut unknown,
            tracer,
        } = measured;
        let hooks = Hook::ALL.map(|hook| HookCost::of(hook, &probes, &traps));
        let hooks: Vec<HookCost> = hooks.into_iter().filter(|hook| hook.hits > 0).collect();
        let hits = hooks.iter().map(|hook| hook.hits).sum();
        let untimed = hooks.iter().filter(|hook| hook.run_ns.is_none());
        let untimed_hits = untimed.map(|hook| hook.hits).sum();
        // Where no run was timed at all, what is left says nothing.
        let is_timed = untimed_hits < hits || hits == 0;
        let all: Option<f64> = hooks.iter().map(HookCost::hits_ns).sum();
        // A sum of nothing is -0.
        let hits_ns = all.filter(|_| is_timed).map(|ns| ns + 0.0);
        if !is_timed {
            unknown.push("what the BPF programs take: no hit was timed to its end".to_owned());
        }
        let share = |of: f64| Some(100.0 * quotient(hits_ns?, of)?);
        let target_cpu_s = target_cpu.map(|time| time.as_secs_f64());
        let mut target_cpu_percent = target_cpu_s.and_then(|seconds| share(seconds * 1e9));
        if target_cpu_percent.is_some_and(|percent| percent > 100.0) {
            target_cpu_percent = None;
            unknown.push(
                "the part of the target's processor time: its hits would have taken more than all, so \
                 that a trap takes less here than measured, or processes were hit that nobody waited for"
                    .to_owned(),
            );
        }
        Self {
            hits,
            untimed_hits,
            hits_ns,
            tokens,
            ns_per_token: hits_ns.and_then(|ns| quotient(ns, tokens as f64)),
            window_percent: share(window.as_secs_f64() * 1e9),
            target_cpu_s,
            target_cpu_percent,
            hooks,
            unknown,
            tracer,
        }
    }
}

fn quotient(dividend: f64, divisor: f64) -> Option<f64> {
    (divisor > 0.0).then(|| dividend / divisor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(hook: Hook, step: Step, hits: u64, timed_ns: u64, timed: u64) -> ProbeHits {
        ProbeHits {
            hook,
            step: Some(step),
            counts: ProbeCounts {
                hits,
                timed,
                timed_ns,
            },
        }
    }

    fn measured() -> Measured {
        Measured {
            probes: vec![
                // Two libraries, of which one begins the function in another way.
                probe(Hook::ExpertIds, Step::Emulated, 300, 5000, 50),
                probe(Hook::ExpertIds, Step::SingleStepped, 100, 5000, 50),
                probe(Hook::SplitDone, Step::Emulated, 10, 0, 0),
                probe(Hook::Fetch, Step::Emulated, 0, 0, 0),
            ],
            traps: Traps {
                emulated: Some(800.0),
                single_stepped: Some(20_000.0),
                on_return: Some(2500.0),
            },
            window: Duration::from_millis(100),
            tokens: 25,
            target_cpu: Some(Duration::from_millis(200)),
            ..Measured::default()
        }
    }

    #[test]
    fn hits_are_traps_and_runs() {
        let cost = Cost::new(measured());
        assert_eq!((cost.hits, cost.untimed_hits), (410, 10));
        let [ids, done] = cost.hooks[..] else {
            panic!("{:?}", cost.hooks)
        };
        assert_eq!(
            ids.trap_ns,
            Some((300.0 * 800.0 + 100.0 * 20_000.0) / 400.0)
        );
        assert_eq!((ids.run_ns, ids.timed_hits), (Some(100.0), 100));
        assert_eq!((done.trap_ns, done.run_ns), (Some(2500.0), None));
        let ns = 300.0 * 900.0 + 100.0 * 20_100.0 + 10.0 * 2500.0;
        assert_eq!(cost.hits_ns, Some(ns));
        assert_eq!(cost.ns_per_token, Some(ns / 25.0));
        assert_eq!(cost.window_percent, Some(100.0 * (ns / 1e8)));
        assert_eq!(cost.target_cpu_percent, Some(100.0 * (ns / 2e8)));
        assert!(cost.unknown.is_empty());
    }

    #[test]
    fn what_is_not_known_is_no_number() {
        let mut without_traps = measured();
        without_traps.traps.single_stepped = None;
        let cost = Cost::new(without_traps);
        assert_eq!((cost.hits_ns, cost.window_percent), (None, None));
        assert_eq!(cost.hooks[0].trap_ns, None);

        let mut untimed = measured();
        for probe in &mut untimed.probes {
            (probe.counts.timed, probe.counts.timed_ns) = (0, 0);
        }
        untimed.tokens = 0;
        let cost = Cost::new(untimed);
        assert_eq!((cost.hits_ns, cost.untimed_hits), (None, 410));
        assert_eq!(cost.unknown.len(), 1);

        let mut ended = measured();
        (ended.target_cpu, ended.tokens) = (None, 0);
        let cost = Cost::new(ended);
        assert_eq!((cost.target_cpu_percent, cost.ns_per_token), (None, None));
        assert!(cost.hits_ns.is_some());
    }

    #[test]
    fn nothing_hit_cost_nothing() {
        let cost = Cost::new(Measured {
            window: Duration::from_secs(1),
            ..Measured::default()
        });
        assert_eq!((cost.hits, cost.hits_ns), (0, Some(0.0)));
        assert_eq!(cost.window_percent, Some(0.0));
        assert!(cost.hits_ns.is_some_and(f64::is_sign_positive));
    }

    #[test]
    fn no_part_is_more_than_all() {
        let cost = Cost::new(Measured {
            target_cpu: Some(Duration::from_millis(1)),
            ..measured()
        });
        assert_eq!(cost.target_cpu_percent, None);
        assert_eq!(cost.unknown.len(), 1);
    }
}
