//! Measures what a capture costs, while it goes on and at its end.

use std::{
    fs, io,
    num::NonZeroU32,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use nix::{
    sys::resource::{UsageWho, getrusage},
    time::{ClockId, clock_gettime},
};

use super::Capture;
use crate::{
    attach::{AttachError, Session},
    own_code::{self, Function},
    probes::{Hook, Probe},
    prologue::Step,
    stats::cost::{Cost, Measured, ProbeHits, Tracer, Traps},
};

/// The processor time of what is traced.
pub enum TargetClock {
    /// Of a process that was there before, and its time then.
    Process(ClockId, Duration),
    /// Of our child, and of those of its children that it has waited for; and what others had taken.
    Child(Duration),
}

impl TargetClock {
    /// Of a process, from now on; `is_child` when it is our own, which we will have waited for.
    pub fn start(pid: NonZeroU32, is_child: bool) -> Option<Self> {
        if is_child {
            return Some(Self::Child(of_children()?));
        }
        let clock = ClockId::pid_cpu_clock_id(nix::unistd::Pid::from_raw(pid.get() as i32)).ok()?;
        Some(Self::Process(clock, clock_gettime(clock).ok()?.into()))
    }

    /// What it took since then, in a process that goes on: of our child, without its own children.
    pub fn so_far(&self, pid: NonZeroU32) -> Option<Duration> {
        let began;
        let clock = match self {
            Self::Process(..) => self,
            Self::Child(_) => {
                let pid = nix::unistd::Pid::from_raw(pid.get() as i32);
                began = Self::Process(ClockId::pid_cpu_clock_id(pid).ok()?, Duration::ZERO);
                &began
            }
        };
        clock.elapsed()
    }

    /// What it took since then, at the end.
    pub fn elapsed(&self) -> Option<Duration> {
        match self {
            Self::Process(clock, before) => {
                let now: Duration = clock_gettime(*clock).ok()?.into();
                now.checked_sub(*before)
            }
            // It has been waited for by now.
            Self::Child(before) => of_children()?.checked_sub(*before),
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
    pub(super) fn cost(
        &mut self,
        window: Duration,
        target_cpu: Option<Duration>,
        tokens: u64,
    ) -> Result<Cost, AttachError> {
        let of_probe = |probe: &Probe| {
            Ok(ProbeHits {
                hook: probe.hook,
                step: probe.definition.instruction,
                counts: self.session.probe_counts(probe)?,
            })
        };
        let probes: Result<Vec<ProbeHits>, AttachError> = self.hooks.iter().map(of_probe).collect();
        let probes = probes?;
        let mut unknown = Vec::new();
        let traps = traps(&mut self.session, &probes).unwrap_or_else(|error| {
            unknown.push(format!("what a trap takes: {error}"));
            Traps::default()
        });
        if target_cpu.is_none() {
            unknown.push("the target's processor time: it had ended".to_owned());
        }
        let ring_buffer_bytes = self.recording.ring_bytes(self.plan.reads_logits());
        Ok(Cost::new(Measured {
            probes,
            traps,
            window,
            tokens,
            target_cpu,
            unknown,
            tracer: tracer(ring_buffer_bytes),
        }))
    }
}

/// What traps of the kinds that were hit take here. Several captures of one tracer measure each kind once:
/// an empty probe stays where it is until its capture detaches.
fn traps(session: &mut Session, probes: &[ProbeHits]) -> anyhow::Result<Traps> {
    static KNOWN: Mutex<Traps> = Mutex::new(Traps {
        emulated: None,
        single_stepped: None,
        on_return: None,
    });
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let was_hit = |on_return: bool, step: Step| {
        probes.iter().any(|probe| {
            let same_step = probe.step.unwrap_or(Step::Emulated) == step;
            let is_like = probe.hook.on_return() == on_return && (on_return || same_step);
            is_like && probe.counts.hits > 0
        })
    };
    let mut measure = |hook: Hook, step: Step, function: Function, known: &mut Option<f64>| {
        if known.is_none() && was_hit(hook.on_return(), step) {
            *known = Some(trap_ns(session, hook, function)?);
        }
        anyhow::Ok(())
    };
    let ids = Hook::ExpertIds;
    measure(ids, Step::Emulated, own_code::emulated, &mut known.emulated)?;
    measure(
        ids,
        Step::SingleStepped,
        own_code::single_stepped,
        &mut known.single_stepped,
    )?;
    measure(
        Hook::SplitDone,
        Step::Emulated,
        own_code::returning,
        &mut known.on_return,
    )?;
    Ok(*known)
}

/// Hits a function of our own, with an empty probe and before that.
fn trap_ns(session: &mut Session, hook: Hook, function: Function) -> anyhow::Result<f64> {
    let pid =
        NonZeroU32::new(std::process::id()).ok_or(io::Error::from(io::ErrorKind::NotFound))?;
    let probe = own_code::probe(hook, 0, function)?;
    let without = own_code::call_ns(function);
    let empty = session.attach_empty(&probe, pid)?;
    let with = own_code::call_ns(function);
    // To detach it takes a grace period of the kernel.
    session.keep(empty);
    Ok((with - without).max(0.0))
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
