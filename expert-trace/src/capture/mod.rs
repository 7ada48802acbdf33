//! A capture from start to end: the one place where probes, events, the clock, signals and files
//! meet.

mod all;
mod attach;
mod cost;
mod interim;
mod run;
mod sinks;
mod targets;
mod trace;

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Display,
    io::{self, Write as _},
    num::NonZeroU32,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use expert_trace_common::{Counter, WakeUp};
use nix::time::{ClockId, clock_gettime};
use tokio::io::{Interest, unix::AsyncFd};

pub use self::{attach::attach, run::run};
use self::{
    cost::TargetClock,
    interim::Baseline,
    sinks::{Sinks, Wanted},
    targets::{Targets, Variables},
};
use crate::{
    attach::{AttachError, Counters, Events, Session},
    cli::Recording,
    decode::{Body, decode},
    layout::Layout,
    model::{BlindTime, Context, End, Ends, Model, Options},
    probes::{Change, Hook, Plan, Probe},
    routes,
    signals::OwnSignal,
    silence,
    stats::{self, Capture as CaptureStats, Integrity, Stats, cost::Cost},
    stats_schema, summary,
    target::printable,
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
    /// Stands before what is printed at the end.
    heading: String,
}

/// What the probes have counted.
#[derive(Clone, Copy, Debug)]
struct Raw {
    /// Hits of the probes on ids of experts.
    entered: u64,
    counters: Counters,
}

impl Raw {
    /// The same, when copies that are still awaited belong to what comes after.
    fn with_awaited_after(self) -> Self {
        let mut counters = self.counters;
        let get = |counter| counters.get(counter);
        let arrived =
            get(Counter::FetchedIds) + get(Counter::DeviceIds) + get(Counter::CallbackIds);
        let known = arrived + get(Counter::IdsCopiesLost);
        let asked_for = &mut counters.0[Counter::IdsCopies as usize];
        *asked_for = known.min(*asked_for);
        Self { counters, ..self }
    }

    fn since(self, before: Raw) -> Self {
        let Counters(mut counters) = self.counters;
        for (counter, before) in counters.iter_mut().zip(before.counters.0) {
            *counter = counter.saturating_sub(before);
        }
        Self {
            entered: self.entered.saturating_sub(before.entered),
            counters: Counters(counters),
        }
    }
}

/// How we come to know of events.
#[derive(Clone, Copy, Debug)]
enum Reading {
    /// The next one wakes us.
    Woken,
    /// We will look by ourselves.
    Waiting { due: Instant, wake_up: WakeUp },
    /// We do.
    Looking { wake_up: WakeUp },
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

    /// Waits until events are to be taken, or written. Where `more` are there, it only lets others through,
    /// and waits for the trace, whose rows must not fill our memory. It may be broken off, and begun again.
    async fn events_due(&mut self, more: bool) -> anyhow::Result<()> {
        if let Some(trace) = &self.sinks.trace {
            trace.has_room().await;
        }
        if more {
            tokio::task::yield_now().await;
            return Ok(());
        }
        let Some(trace) = &self.sinks.trace else {
            return self.events_came().await;
        };
        let Some(due) = trace.due() else {
            return self.events_came().await;
        };
        tokio::select! {
            came = self.events_came() => came,
            () = tokio::time::sleep_until(due.into()) => Ok(()),
        }
    }

    /// Waits until there may be events.
    ///
    /// To be woken costs the thread that was hit more than the hit. So the first event wakes us, and from
    /// then on we look by ourselves now and then, until twice nothing has come: the second time, since a
    /// hit that was under way can have left an event and woken nobody. Whatever comes after that wakes us
    /// in any case.
    async fn events_came(&mut self) -> anyhow::Result<()> {
        loop {
            match self.reading {
                Reading::Woken => {
                    self.events.readable_mut().await?.clear_ready();
                    if !self.gathering.is_zero() {
                        self.session.set_wake_up(WakeUp::Never)?;
                        let wake_up = WakeUp::Never;
                        self.reading = Reading::Looking { wake_up };
                        self.taken = 0;
                    }
                    return Ok(());
                }
                Reading::Waiting { due, wake_up } => {
                    // Some events wake us in any case: those of a process that may soon be gone.
                    tokio::select! {
                        () = tokio::time::sleep_until(due.into()) => {}
                        woken = self.events.readable_mut() => woken?.clear_ready(),
                    }
                    self.reading = Reading::Looking { wake_up };
                    self.taken = 0;
                    return Ok(());
                }
                Reading::Looking { wake_up } => match (self.taken, wake_up) {
                    (1.., _) => self.look_again(WakeUp::Never)?,
                    (0, WakeUp::Never) => self.look_again(WakeUp::Always)?,
                    (0, _) => self.reading = Reading::Woken,
                },
            }
        }
    }

    /// Looks for events once more after some time, whether they wake us or not.
    fn look_again(&mut self, wake_up: WakeUp) -> Result<(), AttachError> {
        let is_so = matches!(self.reading, Reading::Looking { wake_up: now } if now == wake_up);
        if !is_so {
            self.session.set_wake_up(wake_up)?;
        }
        let due = Instant::now() + self.gathering;
        self.reading = Reading::Waiting { due, wake_up };
        Ok(())
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

    /// What the probes have counted since the capture began.
    fn raw(&self) -> Result<Raw, AttachError> {
        let counters = self.session.counters()?;
        let of_ids = |probe: &&Probe| probe.hook == Hook::ExpertIds;
        let hits = self.hooks.iter().filter(of_ids);
        let entered: Result<u64, _> = hits.map(|probe| self.session.hits(probe)).sum();
        Ok(Raw {
            entered: entered?,
            counters,
        })
    }

    /// What the probes have counted, held against what has arrived, since counting began.
    fn integrity_of(&self, raw: Raw) -> Integrity {
        let Raw { entered, counters } = match self.baseline {
            Some(baseline) => raw.since(baseline.raw),
            None => raw,
        };
        Integrity::new(
            entered,
            &counters,
            self.model.received(),
            self.model.from_logits(),
            self.recording.ring_bytes(self.plan.reads_logits()),
        )
    }

    /// What has gone wrong up to now, and costs completeness.
    fn all_problems(&self) -> Result<Vec<String>, AttachError> {
        let mut problems = self.problems.clone();
        problems.extend(self.blind_time_problems());
        problems.extend(self.unknown_layouts()?);
        Ok(problems)
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
            let _ = writeln!(
                text,
                "Trace recorded in: {files} ({rows} rows, {gaps} gaps)"
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

    fn stats(
        &self,
        integrity: Integrity,
        cost: Cost,
        why: &'static str,
        duration: Duration,
    ) -> anyhow::Result<Stats> {
        let counted = |context: &&Context| context.passes > 0;
        let contexts: Vec<&Context> = self.model.contexts().iter().filter(counted).collect();
        let main = stats::main_context(&contexts);
        let tensor_layouts = self
            .plan
            .of(Hook::ExpertIds)
            .map(|probe| {
                let shown = self.session.candidate_layout(probe.site.source)?;
                Ok(Layout::new(probe.declared, shown))
            })
            .collect::<Result<_, AttachError>>()?;
        let hooks = self
            .hooks
            .iter()
            .map(|probe| {
                Ok(stats::HookStats {
                    probe: probe.clone(),
                    hits: self.session.hits(probe)?,
                })
            })
            .collect::<Result<Vec<_>, AttachError>>()?;
        let (started, _) = self.started.context("the capture has not started")?;
        let processes = self.targets.describe(self.pid.get());
        let models_of = |context: &Context| self.targets.models.indices_of(context.process);
        let of_process: Vec<Vec<usize>> = contexts.iter().map(|of| models_of(of)).collect();
        let not_visible = self.not_visible();
        let models = self.targets.models.files().to_vec();
        let main_target = self.targets.main.describe(self.pid.get());
        Ok(Stats {
            schema: stats::Schema {
                name: stats_schema::NAME,
                version: stats_schema::VERSION,
            },
            tool: stats::Tool {
                name: env!("CARGO_PKG_NAME"),
                version: env!("CARGO_PKG_VERSION"),
            },
            target: stats::Target {
                process: main_target,
                hooks,
                tensor_layouts,
                eval_callbacks: self.targets.eval_callbacks.clone(),
            },
            capture: CaptureStats {
                mode: self.mode(),
                started: humantime::format_rfc3339_millis(started).to_string(),
                duration_s: duration.as_secs_f64(),
                ended: why,
                counted_since: self
                    .baseline
                    .map(|of| humantime::format_rfc3339_millis(of.since).to_string()),
                include_warmup: self.recording.include_warmup,
                attached_by: self.session.attached_by(),
                routes: self.plan.routes().iter().map(routes::name).collect(),
                late_libraries: self.late_libraries(),
            },
            processes,
            layers_context: main,
            layers: main.map_or_else(Vec::new, |main| stats::specified_layers(contexts[main])),
            contexts: contexts
                .iter()
                .enumerate()
                .map(|(id, context)| {
                    let of_process = &of_process[id];
                    stats::context_stats(id, context, &models, of_process, self.pid_of(context))
                })
                .collect(),
            not_visible,
            excluded: stats::excluded_list(&self.model.excluded()),
            models,
            trace: None,
            integrity,
            cost,
        }
        .explained(&|pid| self.targets.options(pid, self.pid.get())))
    }

    /// Contexts that computed something, or may have, and of which nothing is counted.
    fn not_visible(&self) -> Vec<stats::NotVisible> {
        let contexts = self.model.contexts().iter();
        let readable: BTreeSet<u32> = contexts
            .clone()
            .filter(|context| context.reads_ubatches())
            .map(|context| context.process)
            .collect();
        let (seen, unseen): (Vec<&Context>, Vec<&Context>) =
            contexts.partition(|context| context.passes > 0);
        let not_known = |context: &Context| match readable.contains(&context.process) {
            true => context.passes_unread(),
            false => context.passes_not_known(),
        };
        let computed = |context: &Context| context.not_visible(Ends::default()).passes > 0;
        let unseen: Vec<&Context> = unseen
            .into_iter()
            .filter(|context| computed(context) || not_known(context) > 0)
            .collect();
        let models = self.targets.models.files();
        let model_of = |context: &Context| {
            let of_process = self.targets.models.indices_of(context.process);
            let has_nextn = |model: &&usize| models[**model].shape.nextn_predict_layers > 0;
            let nextn: Vec<usize> = of_process.iter().filter(has_nextn).copied().collect();
            let beside = |other: &&&Context| other.process == context.process;
            let fitting = |other: &&Context| stats::fitting_models(other, models, &of_process);
            let in_part = |other: &&Context| other.not_visible(Ends::default()).passes > 0;
            let in_part = seen.iter().filter(beside).any(in_part);
            let seen: Vec<Vec<usize>> = seen.iter().filter(beside).map(fitting).collect();
            let known = stats::unseen::Known {
                models: &of_process,
                nextn: &nextn,
                seen: &seen,
                unseen: unseen.iter().filter(beside).count(),
            };
            let model = stats::unseen::model(&known, computed(context))?;
            // Where a device can hide some passes of a model, what is left need not be another one.
            let is_dense = models[model].shape.moe_layers.is_empty();
            let options = || self.targets.options(self.pid_of(context), self.pid.get());
            let hides = in_part || is_dense && options().has_device(None);
            let is_only = of_process.len() == 1;
            (is_only || !hides).then_some(model)
        };
        unseen
            .iter()
            .map(|context| {
                let (pid, model) = (self.pid_of(context), model_of(context));
                stats::unseen_context(context, not_known(context), models, model, pid)
            })
            .collect()
    }

    /// Libraries whose probe was hit, and in which nothing was recognised, beside others in which
    /// something was.
    fn unknown_layouts(&self) -> Result<Vec<String>, AttachError> {
        let mut unknown = Vec::new();
        let mut any_known = false;
        for probe in self
            .hooks
            .iter()
            .filter(|probe| probe.hook == Hook::ExpertIds)
        {
            let hits = self.session.hits(probe)?;
            if hits == 0 {
                continue;
            }
            let shown = self.session.candidate_layout(probe.site.source)?;
            if Layout::new(probe.declared, shown).found_by.is_some() {
                any_known = true;
            } else {
                unknown.push(format!(
                    "{hits} hits in {}, whose layout is not known: nothing of it was read",
                    printable(probe.file.as_ref())
                ));
            }
        }
        // Of the only one, the counters tell more.
        if !any_known {
            unknown.clear();
        }
        Ok(unknown)
    }

    /// Process of a context, in our PID namespace where that is known.
    fn pid_of(&self, context: &Context) -> u32 {
        pid_of(context, self.first_process, self.pid.get())
    }

    fn late_libraries(&self) -> Vec<stats::LateLibraries> {
        let times = self.model.blind_times().iter();
        times
            .filter_map(|time| {
                let blind_ns = time.until_ns?.saturating_sub(time.from_ns);
                Some(stats::LateLibraries {
                    files: time.files.clone(),
                    blind_ms: blind_ns as f64 / 1e6,
                    passes: self.saw_passes_before(time).then_some(time.passes),
                })
            })
            .collect()
    }

    /// Whether passes could be seen when these libraries came.
    fn saw_passes_before(&self, time: &BlindTime) -> bool {
        let mut hooks = self.hooks.iter();
        hooks.any(|probe| {
            let begins_passes = matches!(probe.hook, Hook::PassBegin | Hook::Context);
            begins_passes && !time.files.contains(&probe.file)
        })
    }

    /// What may have run between the loading of libraries and their probing costs completeness.
    fn blind_time_problems(&self) -> Vec<String> {
        let problem = |late: stats::LateLibraries| {
            let files = late.files.join(", ");
            let ms = late.blind_ms;
            match late.passes {
                Some(0) => None,
                Some(passes) => Some(format!(
                    "{passes} passes began in the {ms:.1} ms between the loading of {files} and its \
                     probing: their routing is missing"
                )),
                None => Some(format!(
                    "whether tokens were routed in the {ms:.1} ms between the loading of {files} and \
                     its probing is not known"
                )),
            }
        };
        self.late_libraries()
            .into_iter()
            .filter_map(problem)
            .collect()
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

/// How long events are left in a ring buffer of this size: not so long that somebody who reads the log would
/// notice. One that fills up wakes us; in a small one, that would be too late.
fn gathering(ring_bytes: u32) -> Duration {
    const UNNOTICED: Duration = Duration::from_millis(40);
    /// Rows take more than a nanosecond for a byte, so that the rest of it lasts for longer than we take
    /// to wake up.
    const SMALLEST: u32 = 2 << 20;
    match ring_bytes {
        SMALLEST.. => UNNOTICED,
        _ => Duration::ZERO,
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
