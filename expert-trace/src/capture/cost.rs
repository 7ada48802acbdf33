//! Measures what a capture costs, while it goes on and at its end.

use std::{fs, io, num::NonZeroU32, os::fd::OwnedFd, time::Duration};

use nix::{
    errno::Errno,
    sys::resource::{UsageWho, getrusage},
    time::{ClockId, clock_gettime},
};
use tokio::task::JoinHandle;

use super::Capture;
use crate::{
    attach::Session,
    bpf,
    own_code::{self, Function},
    probes::Hook,
    prologue::Step,
    stats::cost::{Cost, Measured, ProbeHits, Tracer, Traps},
};

/// For this much of each [`PERIOD`], the kernel takes the times of runs: it makes every hit longer.
const SAMPLE: Duration = Duration::from_millis(10);
/// Prompts and decoding, which differ, are both in the sample; to begin and to end one, the kernel changes
/// its own code, which takes as long as some hundred hits.
const PERIOD: Duration = Duration::from_millis(500);

/// What is measured while a capture goes on.
pub struct Meter {
    /// Has the kernel take the times of runs now and then; or why it does not.
    sampling: Option<Result<JoinHandle<()>, Errno>>,
    target: Option<TargetClock>,
}

impl Meter {
    /// Begins to measure.
    pub fn start(pid: NonZeroU32, from_start: bool) -> Self {
        Self {
            sampling: None,
            target: TargetClock::start(pid, from_start),
        }
    }

    /// There are hits: has the times of runs taken, unless that is so. Needs a tokio runtime.
    pub fn sample(&mut self) {
        let begin = || bpf::take_run_times().map(|first| tokio::spawn(sample(first)));
        self.sampling.get_or_insert_with(begin);
    }

    /// Takes no more times, and gives those of the target and why there are none of runs. To be called
    /// before hits are counted no more.
    fn stop(self) -> (Option<Duration>, Vec<String>) {
        let mut unknown = Vec::new();
        match self.sampling {
            None => {}
            Some(Ok(sampling)) => sampling.abort(),
            Some(Err(error)) => unknown.push(format!(
                "the kernel does not take the times of BPF programs: {}",
                io::Error::from(error)
            )),
        }
        let target = self.target.and_then(|target| target.elapsed());
        if target.is_none() {
            unknown.push("the target's processor time: it had ended".to_owned());
        }
        (target, unknown)
    }
}

/// Has the kernel take the times of runs for a part of each period, from now on.
async fn sample(first: OwnedFd) {
    let mut taken = first;
    loop {
        tokio::time::sleep(SAMPLE).await;
        drop(taken);
        tokio::time::sleep(PERIOD - SAMPLE).await;
        taken = match bpf::take_run_times() {
            Ok(taken) => taken,
            Err(error) => return tracing::debug!("no times of runs: {error}"),
        };
    }
}

/// The processor time of what is traced.
enum TargetClock {
    /// Of a process that was there before, and its time then.
    Process(ClockId, Duration),
    /// Of our child, and of those of its children that it has waited for; and what others had taken.
    Child(Duration),
}

impl TargetClock {
    fn start(pid: NonZeroU32, is_child: bool) -> Option<Self> {
        if is_child {
            return Some(Self::Child(of_children()?));
        }
        let clock = ClockId::pid_cpu_clock_id(nix::unistd::Pid::from_raw(pid.get() as i32)).ok()?;
        Some(Self::Process(clock, clock_gettime(clock).ok()?.into()))
    }

    fn elapsed(self) -> Option<Duration> {
        match self {
            Self::Process(clock, before) => {
                let now: Duration = clock_gettime(clock).ok()?.into();
                now.checked_sub(before)
            }
            // It has been waited for by now.
            Self::Child(before) => of_children()?.checked_sub(before),
        }
    }
}

fn of_children() -> Option<Duration> {
    processor_time(UsageWho::RUSAGE_CHILDREN)
}

fn processor_time(who: UsageWho) -> Option<Duration> {
    let usage = getrusage(who).ok()?;
    let times = [usage.user_time(), usage.system_time()];
    let times = times.map(|time| {
        Duration::from_micros(time.tv_sec() as u64 * 1_000_000 + time.tv_usec() as u64)
    });
    Some(times.iter().sum())
}

impl Capture {
    /// Draws up what the capture has cost, once its hits are counted no more.
    pub(super) fn cost(&mut self, window: Duration, tokens: u64) -> Cost {
        let (target_cpu, mut unknown) = match self.meter.take() {
            Some(meter) => meter.stop(),
            None => (None, Vec::new()),
        };
        let probes: Vec<ProbeHits> = self
            .hooks
            .iter()
            .map(|probe| ProbeHits {
                hook: probe.hook,
                step: probe.definition.instruction,
                hits: self.session.hits(probe).unwrap_or(0),
                timed: self.session.run_time(probe.hook).unwrap_or_default(),
            })
            .collect();
        let traps = traps(&mut self.session, &probes).unwrap_or_else(|error| {
            unknown.push(format!("what a trap takes: {error}"));
            Traps::default()
        });
        let ring_buffer_bytes = self.recording.ring_bytes(self.plan.reads_logits());
        Cost::new(Measured {
            probes,
            traps,
            window,
            tokens,
            target_cpu,
            unknown,
            tracer: tracer(ring_buffer_bytes),
        })
    }
}

/// Hits functions of our own, of the kinds that were hit.
fn traps(session: &mut Session, probes: &[ProbeHits]) -> anyhow::Result<Traps> {
    let pid =
        NonZeroU32::new(std::process::id()).ok_or(io::Error::from(io::ErrorKind::NotFound))?;
    let mut measure = |hook: Hook, step: Step, function: Function| -> anyhow::Result<Option<f64>> {
        let is_like = |probe: &&ProbeHits| {
            let same_step = probe.step.unwrap_or(Step::Emulated) == step;
            let both_return = hook.on_return() && probe.hook.on_return();
            both_return || (same_step && !hook.on_return() && !probe.hook.on_return())
        };
        if !probes.iter().filter(is_like).any(|probe| probe.hits > 0) {
            return Ok(None);
        }
        let probe = own_code::probe(hook, 0, function)?;
        let without = own_code::call_ns(function);
        let empty = session.attach_empty(&probe, pid)?;
        let with = own_code::call_ns(function);
        // To detach it takes a grace period of the kernel.
        session.keep(empty);
        Ok(Some((with - without).max(0.0)))
    };
    Ok(Traps {
        emulated: measure(Hook::ExpertIds, Step::Emulated, own_code::emulated)?,
        single_stepped: measure(
            Hook::ExpertIds,
            Step::SingleStepped,
            own_code::single_stepped,
        )?,
        on_return: measure(Hook::SplitDone, Step::Emulated, own_code::returning)?,
    })
}

fn tracer(ring_buffer_bytes: u32) -> Tracer {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bytes = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
        Some(kib << 10)
    };
    Tracer {
        cpu_s: processor_time(UsageWho::RUSAGE_SELF).map_or(0.0, |time| time.as_secs_f64()),
        peak_rss_bytes: bytes("VmHWM:"),
        anonymous_rss_bytes: bytes("RssAnon:"),
        ring_buffer_bytes,
    }
}
