//! A capture from start to end: the one place where probes, events, the clock, signals and files
//! meet.

mod all;
mod attach;
mod cost;
mod document;
mod interim;
mod reading;
mod reckoning;
mod run;
mod sinks;
mod targets;
mod trace;
mod view;

use std::{
    collections::HashMap,
    fmt::Display,
    io::{self, Write as _},
    num::NonZeroU32,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use expert_trace_common::COUNTERS;
use nix::time::{ClockId, clock_gettime};
use tokio::io::{Interest, unix::AsyncFd};

pub use self::{
    attach::{attach, top},
    run::run,
};
use self::{
    cost::TargetClock,
    interim::Baseline,
    reading::{Reading, gathering},
    sinks::{Sinks, Wanted},
    targets::{Targets, Variables},
};
use crate::{
    attach::{AttachError, Events, Session},
    cli::Recording,
    decode::{Body, decode},
    model::{Context, End, Model, Options},
    probes::{Change, Plan, Probe},
    signals::OwnSignal,
    silence,
    stats::{self, Integrity, Stats},
    summary,
};

/// How a capture begins.
struct Start {
    pid: NonZeroU32,
    /// The same process as the initial PID namespace numbers it, if events can come from others, too.
    first_process: Option<u32>,
    plan: Plan,
    from_start: bool,
    recording: Recording,
}

struct Capture {
    pid: NonZeroU32,
    first_process: Option<u32>,
    session: Session,
    events: AsyncFd<Events>,
    reading: Reading,
    /// Events taken since we last began to look.
    taken: u64,
    /// How long events are left where they are.
    gathering: Duration,
    plan: Plan,
    /// Probes that are in place.
    hooks: Vec<Probe>,
    /// What went wrong, and costs completeness.
    problems: Vec<String>,
    model: Model,
    targets: Targets,
    sinks: Sinks,
    /// Contexts for which the targets have been looked at.
    contexts_known: usize,
    from_start: bool,
    started: Option<(SystemTime, Instant)>,
    /// Where counting began anew.
    baseline: Option<Baseline>,
    /// Measures what it costs, once it has started.
    target_clock: Option<TargetClock>,
    recording: Recording,
    /// The kernel's counters when the live view was last shown something.
    shown: Option<[u64; COUNTERS]>,
    /// Stands before what is printed at the end.
    heading: String,
}

impl Capture {
    fn new(
        (mut session, events): (Session, Events),
        start: Start,
        sinks: Sinks,
    ) -> anyhow::Result<Self> {
        let Start {
            pid,
            first_process,
            plan,
            from_start,
            recording,
        } = start;
        session.forward_log();
        session.read(plan.routes())?;
        if recording.tokens {
            session.read_tokens()?;
        }
        if recording.weights {
            session.read_weights()?;
        }
        // SAFETY: the ring buffer keeps its descriptor for as long as it lives.
        let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) }?;
        let mut targets = Targets::default();
        targets.main.directory = std::env::current_dir().unwrap_or_default();
        Ok(Self {
            pid,
            first_process,
            session,
            events,
            reading: Reading::Woken,
            taken: 0,
            gathering: gathering(recording.ring_bytes(plan.reads_logits())),
            plan,
            hooks: Vec::new(),
            problems: Vec::new(),
            model: Model::new(Options {
                include_warmup: recording.include_warmup,
                from_start,
            }),
            targets,
            sinks,
            contexts_known: 0,
            from_start,
            started: None,
            baseline: None,
            target_clock: None,
            recording,
            shown: None,
            heading: String::new(),
        })
    }

    /// Switches the probes on.
    fn start(&mut self) -> anyhow::Result<()> {
        let started = SystemTime::now();
        self.sinks.begin(self.capture_facts(started))?;
        self.session.set_active(true)?;
        self.started = Some((started, Instant::now()));
        self.target_clock = TargetClock::start(self.pid, self.from_start);
        Ok(())
    }

    /// What a trace says of the capture.
    fn capture_facts(&self, started: SystemTime) -> crate::trace::Capture {
        crate::trace::Capture {
            tool: env!("CARGO_PKG_VERSION").to_owned(),
            mode: self.mode().to_owned(),
            pid: self.pid.get(),
            started: humantime::format_rfc3339_millis(started).to_string(),
            include_warmup: self.recording.include_warmup,
            ..crate::trace::Capture::default()
        }
    }

    fn mode(&self) -> &'static str {
        if self.from_start { "run" } else { "attach" }
    }

    /// Tells the user that the probes are on.
    fn announce(&self) {
        let _ = writeln!(
            io::stderr(),
            "Expert tracing enabled (stats={}, logging={})",
            u8::from(self.sinks.stats),
            u8::from(self.sinks.log.is_some())
        );
    }

    /// Attaches probes. A failure is reported, and the target goes on: it is the user's program.
    fn probe(&mut self, change: Change) {
        if let Some(refusal) = change.refusal {
            self.problem(refusal);
        }
        if let Some(file) = change.stale {
            self.session.detach_file(file);
        }
        // What is refused here is told by each probe that needs it.
        let _ = self
            .session
            .load_programs(change.probes.iter().map(|probe| probe.hook));
        for probe in change.probes {
            match self.session.attach(&probe) {
                Ok(()) => self.hooks.push(probe),
                Err(error) => self.problem(error.to_string()),
            }
        }
        if let Err(error) = self.tell_of_schedulers() {
            self.problem(error.to_string());
        }
    }

    /// Tells the BPF programs whether a pass enters a scheduler that is probed.
    fn tell_of_schedulers(&mut self) -> Result<(), AttachError> {
        self.session
            .expect_schedulers(self.plan.probes_schedulers())
    }

    fn problem(&mut self, problem: String) {
        say!("{problem}");
        self.problems.push(problem);
    }

    /// Takes some of the events that are there. Gives whether those were all.
    fn take_events(&mut self) -> bool {
        let Self {
            events,
            taken,
            model,
            sinks,
            targets,
            contexts_known,
            pid,
            first_process,
            plan,
            ..
        } = self;
        let main_pid = pid.get();
        let first = *first_process;
        let describe = |targets: &Targets, context: &Context| {
            targets.describe_context(context, pid_of(context, first, main_pid))
        };
        let mut looked_at = Vec::new();
        let mut log_error = None;
        let is_main = |process| first_process.is_none_or(|first| first == process);
        let known_by = |process| {
            if is_main(process) {
                Some(pid.get())
            } else {
                // The same numbers, unless we are in a PID namespace of our own.
                (*first_process == Some(pid.get())).then_some(process)
            }
        };
        let look = |targets: &mut Targets, model: &mut Model, process: u32, new_context: bool| {
            let is_main = is_main(process);
            if known_by(process)
                .is_some_and(|pid| targets.computes(pid, process, is_main, new_context))
            {
                model.set_facts(targets.models.facts());
            }
        };
        let emptied = events.get_mut().drain(|bytes| {
            *taken += 1;
            let event = decode(bytes);
            let process = event
                .as_ref()
                .ok()
                .filter(|event| {
                    !matches!(
                        event.body,
                        Body::Libraries | Body::ProcessStart | Body::ProcessEnd(_)
                    )
                })
                .map(|event| event.header.process);
            if let Ok(event) = &event
                && let Body::EvalCallback(address) = event.body
                && let Some(pid) = known_by(event.header.process)
            {
                targets.sets_callback(pid, address);
            }
            if let Some(process) = process
                && !looked_at.contains(&process)
            {
                looked_at.push(process);
                look(targets, model, process, false);
            }
            if let Ok(event) = &event
                && let Body::ProcessEnd(_) = event.body
                && let Some(pid) = known_by(event.header.process)
            {
                plan.forget(pid);
            }
            model.push(event, &mut |finished| {
                if let Some(log) = &mut sinks.log
                    && let Some(pass) = finished.shown()
                    && let Err(error) = log.pass(pass)
                {
                    log_error = Some(error);
                }
                if let Some(trace) = &mut sinks.trace {
                    trace.pass(&finished, &|context| describe(targets, context));
                }
            });
            // A pass is judged when the next one begins, so that this is in time.
            let new_context = model.contexts().len() > *contexts_known;
            if let Some(process) = process
                && new_context
            {
                *contexts_known = model.contexts().len();
                look(targets, model, process, true);
            }
        });
        if let Some(log) = &mut sinks.log
            && let Err(error) = log.flush()
        {
            log_error = Some(error);
        }
        if let Some(error) = log_error {
            self.sinks.log = None;
            self.problem(format!("the log ends here: {error}"));
        }
        self.keep_up_trace();
        emptied
    }

    fn keep_up_trace(&mut self) {
        let Some(trace) = &mut self.sinks.trace else {
            return;
        };
        let why = match trace.keep_up() {
            Ok(()) if !trace.is_broken() => return,
            Ok(()) => None,
            Err(error) => Some(error.to_string()),
        };
        let Some(trace) = self.sinks.trace.take() else {
            return;
        };
        // What was recorded is written in any case.
        let broken = trace.abandon();
        let why = why.unwrap_or(broken);
        self.problem(format!("the trace ends here: {why}"));
    }

    /// Waits until what the probes have begun has arrived: they can be running on other CPUs.
    async fn settle(&mut self) -> anyhow::Result<Integrity> {
        let deadline = Instant::now() + Duration::from_secs(1);
        loop {
            while !self.take_events() {}
            let integrity = self.integrity_of(self.raw()?);
            if integrity.adds_up() || Instant::now() > deadline {
                return Ok(integrity.with_problems(self.all_problems()?));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Ends the capture: writes the document, then the summary, which a Ctrl-C cuts short. Gives
    /// whether all that was seen is counted.
    async fn finish(
        mut self,
        end: End,
        why: &'static str,
        interrupt: &mut OwnSignal,
    ) -> anyhow::Result<bool> {
        let duration = self
            .started
            .map_or(Duration::ZERO, |(_, began)| began.elapsed());
        let target_cpu = self.target_clock.as_ref().and_then(TargetClock::elapsed);
        self.session.set_active(false)?;
        let mut integrity = self.settle().await?;
        // What a target awaits that goes on, or that we know was killed, belongs to a pass that was cut.
        if end == End::Exited || (!self.from_start && why == "target_exited") {
            integrity = integrity.without_target();
        }
        let first_process = self.first_process;
        let ended: HashMap<u32, u32> = self
            .model
            .contexts()
            .iter()
            .filter_map(|context| Some((context.process, self.model.status(context.process)?)))
            .collect();
        let end_of = |process| match first_process {
            Some(first) if first != process => match ended.get(&process) {
                Some(status) if libc::WIFEXITED(*status as i32) => End::Exited,
                _ => End::Cut,
            },
            _ => end,
        };
        let (sinks, targets) = (&mut self.sinks, &self.targets);
        let main_pid = self.pid.get();
        self.model.end(&end_of, &mut |finished| {
            if let Some(log) = &mut sinks.log
                && let Some(pass) = finished.shown()
            {
                let _ = log.pass(pass);
            }
            if let Some(trace) = &mut sinks.trace {
                trace.pass(&finished, &|context| {
                    targets.describe_context(context, pid_of(context, first_process, main_pid))
                });
            }
        });
        if let Some(mut log) = sinks.log.take() {
            let _ = log.flush();
        }
        let integrity = integrity.with_refusals(self.model.from_logits());
        let output = sinks.output.take();
        let wants_summary = sinks.stats;
        let cost = self.cost(duration, target_cpu, self.tokens())?;
        let mut stats = self.stats(integrity, cost, why, duration)?;
        if let Some(problem) = self.end_trace(&mut stats, interrupt).await {
            say!("{problem}");
            stats.integrity = stats.integrity.with_problems(vec![problem]);
        }
        let complete = stats.integrity.complete;

        let mut text = std::mem::take(&mut self.heading).into_bytes();
        // Writing to memory does not fail.
        if wants_summary {
            let _ = summary::write(&mut text, &stats, self.recording.top);
            if stats.layers_context.is_none() {
                let pid = self.pid.get();
                let _ = writeln!(
                    text,
                    "No expert routing was seen: {}.",
                    silence::reason(&stats, &self.targets.options(pid, pid))
                );
            }
        } else if !complete {
            let _ = writeln!(text, "{}", summary::integrity_line(&stats));
        }
        let written = output.map(|(path, output)| {
            let written = output.write_json(&stats);
            if written.is_ok() {
                let _ = writeln!(text, "Statistics exported to: {}", path.display());
            }
            written.with_context(|| format!("Failed to write output file: {}", path.display()))
        });
        if let Some(trace) = &stats.trace {
            let files = match trace.files.as_slice() {
                [only] => only.clone(),
                files => format!("{} and {} more", files[0], files.len() - 1),
            };
            let stats::Trace { rows, gaps, .. } = trace;
            let unweighted = match trace.rows_without_weights {
                Some(missing) if missing > 0 => format!(", {missing} rows without weights"),
                _ => String::new(),
            };
            let _ = writeln!(
                text,
                "Trace recorded in: {files} ({rows} rows, {gaps} gaps{unweighted})"
            );
        }
        print(text, interrupt).await;
        // Other captures go on meanwhile.
        let _ = tokio::task::spawn_blocking(|| self.session.detach()).await;
        written.transpose()?;
        Ok(complete)
    }

    /// Writes what is known at the end to the trace, and waits for the disk until somebody interrupts us.
    /// Gives what went wrong.
    async fn end_trace(&mut self, stats: &mut Stats, interrupt: &mut OwnSignal) -> Option<String> {
        let mut trace = self.sinks.trace.take()?;
        let rows = &stats.integrity.rows.dropped;
        let lost = rows.ring_full + rows.unreadable;
        let lost_before = self.baseline.map_or(0, |baseline| baseline.lost_rows);
        stats.trace = Some(trace.close(lost_before + lost));
        let summary = stats.without_counts();
        // A thread that nobody waits for when the process ends, as tokio would: a pipe need not be read.
        let (done, mut written) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let _ = done.send(trace.finish(&summary));
        });
        let problem = |why: &dyn Display| Some(format!("the trace is not complete: {why}"));
        let long = tokio::time::sleep(PATIENCE);
        tokio::pin!(long);
        let mut said = false;
        loop {
            tokio::select! {
                written = &mut written => return match written {
                    Ok(Ok(_)) => None,
                    Ok(Err(error)) => problem(&error),
                    Err(_) => problem(&"the thread that ends it has panicked"),
                },
                () = interrupt.came() => {
                    return problem(&"interrupted while it was being written");
                }
                () = &mut long, if !said => {
                    said = true;
                    say!("the trace is still being written; Ctrl-C gives up the rest of it");
                }
            }
        }
    }
}

/// Process of a context. `first` is what the initial PID namespace calls the main one, if there can be
/// others.
fn pid_of(context: &Context, first: Option<u32>, main: u32) -> u32 {
    match first {
        Some(first) if first != context.process => context.process,
        _ => main,
    }
}

/// How long the end of a trace may take before we say what we wait for.
const PATIENCE: Duration = Duration::from_secs(1);

/// Now, by the clock of the events.
fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    now.as_nanos() as u64
}

/// Prints to stderr, until done or interrupted: a terminal can be stopped, and a pager not be read.
async fn print(text: Vec<u8>, interrupt: &mut OwnSignal) {
    let (done, printed) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        // A closed terminal is no reason to fail.
        let _ = io::stderr().lock().write_all(&text);
        let _ = done.send(());
    });
    tokio::select! {
        _ = printed => {}
        () = interrupt.came() => {}
    }
}
