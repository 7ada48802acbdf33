//! A capture from start to end: the one place where probes, events, the clock, signals and files
//! meet.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, BufWriter, Write},
    num::NonZeroU32,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, bail};
use nix::sys::{
    signal::{Signal, kill},
    wait::{WaitPidFlag, WaitStatus, waitpid},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{SignalKind, signal},
};

use crate::{
    attach::{Events, Session},
    cli::{Attach, Recording, Run},
    decode::{Body, decode},
    diagnosis,
    export::Output,
    launch::{self, Suspended, ThreadExit},
    model::{Context, End, Model, Options},
    models::{self, KnownModels},
    probes::{Plan, Probe, linker_hook},
    redact,
    requirements::{self, Purpose},
    silence,
    stats::{self, Capture as CaptureStats, Integrity, Stats},
    summary::{self, Log},
    target::{self, MappedFile, printable},
};

/// Starts a program, traces it to its end, and gives its exit status.
///
/// # Errors
/// When the tracer fails before the program has started. Later failures are reported and cost no
/// data already collected.
pub async fn run(arguments: Run) -> anyhow::Result<u8> {
    let Run {
        recording, command, ..
    } = arguments;
    requirements::check(Purpose::Run)?;
    let path = launch::find(&command[0])?;
    let program = launch::loaded_program(&path);
    let linker = launch::dynamic_linker(&program)?;
    let sinks = Sinks::open(&recording)?;
    let mut child_changed = signal(SignalKind::child())?;
    let mut signals = OwnSignals::listen()?;

    let child = Suspended::spawn(&path, &command)?;
    let pid = child.pid();
    let mut capture = Capture::new(&recording, sinks, pid.as_raw(), true)?;
    capture.target.command = command.clone();
    capture.target.exe = std::fs::canonicalize(&program).ok();
    capture.target.model_variable = std::env::var_os(MODEL_VARIABLE);
    capture.stop_at_library_changes(&program, linker.as_deref())?;
    let mut main_thread = MainThread::watch(capture.pid);
    capture.start()?;
    child.release(&path)?;

    let mut stops_handled = 0;
    let mut more = false;
    let status = loop {
        tokio::select! {
            biased;
            _ = child_changed.recv() => {}
            signal = signals.for_child() => {
                // Ctrl-C and Ctrl-Z reach the child from the terminal; others are passed on.
                if let Some(signal) = signal {
                    let _ = kill(pid, signal);
                }
                continue;
            }
            () = main_thread.ended() => {
                capture.look_at_main_thread();
                continue;
            }
            ready = capture.events.readable_mut(), if !more => {
                ready?.clear_ready();
                more = !capture.take_events();
                continue;
            }
            // Lets signals and timers through between two helpings.
            () = tokio::task::yield_now(), if more => {
                more = !capture.take_events();
                continue;
            }
        }
        // Signals of children are not counted: look until there is nothing new.
        let ended = loop {
            match waitpid(pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED))? {
                WaitStatus::Stopped(_, Signal::SIGSTOP) => {
                    let stops = capture.session.stops()?;
                    if stops != stops_handled {
                        stops_handled = stops;
                        capture.attach_to_new_libraries();
                        kill(pid, Signal::SIGCONT)?;
                    }
                }
                WaitStatus::StillAlive => break None,
                status @ (WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => break Some(status),
                _ => {}
            }
        };
        if let Some(status) = ended {
            break status;
        }
    };
    // Killed while it was stopped, it has run nothing that could be missing.
    let killed = matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _));
    if !killed && capture.session.stops()? != stops_handled {
        capture.problems.push(
            "somebody continued the program while its libraries were to be probed: \
             what ran before that is missing"
                .to_owned(),
        );
    }
    let (end, status) = match status {
        WaitStatus::Signaled(_, signal, _) => (End::Cut, 128 + signal as u8),
        WaitStatus::Exited(_, code) => (End::Exited, code as u8),
        _ => (End::Exited, 0),
    };
    capture.finish(end, "target_exited", &recording)?;
    Ok(status)
}

/// Traces a running process until Ctrl-C, the end of the duration, or its own end.
///
/// # Errors
/// When the process cannot be traced, or the result cannot be written.
pub async fn attach(arguments: Attach) -> anyhow::Result<u8> {
    let Attach {
        pid,
        duration,
        recording,
    } = arguments;
    requirements::check(Purpose::Attach)?;
    diagnosis::check_process(pid.get())?;
    let sinks = Sinks::open(&recording)?;
    let exit = launch::exit_descriptor(pid.get())
        .with_context(|| format!("cannot attach to process {pid}"));
    let exit = diagnosis::unless_ended(pid.get(), exit)?;
    let files = target::mapped_files(pid.get())
        .with_context(|| format!("cannot read what process {pid} maps"));
    let files = diagnosis::unless_ended(pid.get(), files)?;

    let mut capture = Capture::new(&recording, sinks, pid.get() as i32, false)?;
    capture.target.command = target::command_line(pid.get()).unwrap_or_default();
    capture.target.model_variable = target::variable(pid.get(), MODEL_VARIABLE);
    capture.target.look(pid.get());
    let probes = capture.plan.extend(pid.get(), &files).to_vec();
    if !capture.plan.can_see_experts() {
        bail!(diagnosis::no_expert_ids(pid.get(), &files, &capture.plan));
    }
    for probe in probes {
        let attached = capture.session.attach(&probe, capture.pid);
        diagnosis::unless_ended(pid.get(), attached)?;
        capture.hooks.push(probe);
    }
    // SAFETY: an `OwnedFd` keeps its descriptor for as long as it lives.
    let exit = unsafe { AsyncFd::register_with_interest(exit, Interest::READABLE) }?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut main_thread = MainThread::watch(pid);
    capture.start()?;

    let over = tokio::time::sleep(duration.unwrap_or(Duration::MAX));
    tokio::pin!(over);
    let mut more = false;
    let (end, why) = loop {
        tokio::select! {
            biased;
            _ = interrupt.recv() => break (End::Cut, "interrupted"),
            _ = terminate.recv() => break (End::Cut, "interrupted"),
            _ = hangup.recv() => break (End::Cut, "interrupted"),
            () = &mut over => break (End::Cut, "duration"),
            _ = exit.readable() => break (End::Cut, "target_exited"),
            () = main_thread.ended() => capture.look_at_main_thread(),
            ready = capture.events.readable_mut(), if !more => {
                ready?.clear_ready();
                more = !capture.take_events();
            }
            // Lets signals and timers through between two helpings.
            () = tokio::task::yield_now(), if more => {
                more = !capture.take_events();
            }
        }
    };
    capture.finish(end, why, &recording)?;
    Ok(0)
}

/// Names the model to llama.cpp's programs (common/arg.cpp).
const MODEL_VARIABLE: &str = "LLAMA_ARG_MODEL";
/// A target that shows no model in so many looks has none that we can read.
const MODEL_LOOKS: u32 = 20;

/// Where results go; opened before anything is traced.
struct Sinks {
    output: Option<Output>,
    log: Option<Log<Box<dyn Write>>>,
}

impl Sinks {
    fn open(recording: &Recording) -> anyhow::Result<Self> {
        let failed = |path: &Path| format!("Failed to open output file: {}", path.display());
        let output = match &recording.output {
            Some(path) => Some(Output::create(path).with_context(|| failed(path))?),
            None => None,
        };
        let log: Option<Box<dyn Write>> = match &recording.log {
            None => None,
            Some(None) => Some(Box::new(BufWriter::new(io::stderr()))),
            Some(Some(path)) => {
                let file = File::create(path).with_context(|| failed(path))?;
                Some(Box::new(BufWriter::new(file)))
            }
        };
        Ok(Self {
            output,
            log: log.map(Log::new),
        })
    }
}

/// What is known of the target, beside its events.
#[derive(Default)]
struct Known {
    command: Vec<OsString>,
    exe: Option<PathBuf>,
    build_id: Option<String>,
    directory: PathBuf,
    model_variable: Option<OsString>,
    models: KnownModels,
}

impl Known {
    /// Looks at the process while it lives. What is known already is kept.
    fn look(&mut self, pid: u32) {
        if let Ok(exe) = target::executable(pid) {
            let file = PathBuf::from(format!("/proc/{pid}/exe"));
            self.build_id = crate::probes::build_id(&file);
            self.exe = Some(exe);
        }
        if let Ok(directory) = std::fs::read_link(format!("/proc/{pid}/cwd")) {
            self.directory = directory;
        }
    }

    fn look_for_models(&mut self, pid: u32) {
        let files: Vec<MappedFile> = target::mapped_files(pid).unwrap_or_default();
        self.models.merge(models::mapped(pid, &files, &self.models));
        if self.models.is_empty() {
            let variable = self.model_variable.as_deref();
            self.models = models::named(&self.command, variable, &self.directory);
        }
    }
}

struct Capture {
    pid: NonZeroU32,
    session: Session,
    events: AsyncFd<Events>,
    plan: Plan,
    /// Probes that are in place.
    hooks: Vec<Probe>,
    /// What went wrong, and costs completeness.
    problems: Vec<String>,
    model: Model,
    target: Known,
    sinks: Sinks,
    /// How often the target's models may still be looked for, without a new context.
    looks_left: u32,
    /// Contexts for which they have been looked for.
    contexts_known: usize,
    from_start: bool,
    started: Option<(SystemTime, Instant)>,
    ring_bytes: u32,
}

impl Capture {
    fn new(
        recording: &Recording,
        sinks: Sinks,
        pid: i32,
        from_start: bool,
    ) -> anyhow::Result<Self> {
        let pid = u32::try_from(pid)
            .ok()
            .and_then(NonZeroU32::new)
            .context("not a process id")?;
        let (mut session, events) = Session::load(recording.buffer_size)?;
        session.forward_log();
        // SAFETY: the ring buffer keeps its descriptor for as long as it lives.
        let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) }?;
        Ok(Self {
            pid,
            session,
            events,
            plan: Plan::default(),
            hooks: Vec::new(),
            problems: Vec::new(),
            model: Model::new(Options {
                include_warmup: recording.include_warmup,
                from_start,
            }),
            target: Known {
                directory: std::env::current_dir().unwrap_or_default(),
                ..Known::default()
            },
            sinks,
            looks_left: MODEL_LOOKS,
            contexts_known: 0,
            from_start,
            started: None,
            ring_bytes: recording.buffer_size,
        })
    }

    /// Switches the probes on.
    fn start(&mut self) -> anyhow::Result<()> {
        self.session.set_active(true)?;
        self.started = Some((SystemTime::now(), Instant::now()));
        eprintln!(
            "Expert tracing enabled (stats=1, logging={})",
            u8::from(self.sinks.log.is_some())
        );
        Ok(())
    }

    /// Makes sure that our child, which has not begun, is probed before any code that matters runs.
    fn stop_at_library_changes(
        &mut self,
        program: &Path,
        linker: Option<&Path>,
    ) -> anyhow::Result<()> {
        if linker.is_none() {
            // A static program has all its code in one file.
            for probe in self.plan.extend_from_file(program)?.to_vec() {
                self.session.attach(&probe, self.pid)?;
                self.hooks.push(probe);
            }
            if self.plan.can_see_experts() {
                return Ok(());
            }
        }
        // A program without a linker can be one itself (`ld.so PROGRAM`).
        let loads = linker.unwrap_or(program);
        let hook = linker_hook(loads).with_context(|| printable(loads))?;
        match hook {
            Some(hook) => self
                .session
                .stop_at_library_changes(loads, &hook, self.pid)?,
            None if linker.is_some() => self.problem(format!(
                "{} has no _dl_debug_state: libraries of the program are not traced",
                printable(loads)
            )),
            None => {}
        }
        Ok(())
    }

    /// Probes what our child has mapped since the last time.
    ///
    /// A failure is reported, and the child goes on: it is the user's program.
    fn attach_to_new_libraries(&mut self) {
        let pid = self.pid.get();
        let files = match target::mapped_files(pid) {
            Ok(files) => files,
            Err(error) => return self.problem(format!("cannot read what {pid} maps: {error}")),
        };
        for probe in self.plan.extend(pid, &files).to_vec() {
            match self.session.attach(&probe, self.pid) {
                Ok(()) => self.hooks.push(probe),
                Err(error) => self.problem(error.to_string()),
            }
        }
    }

    fn problem(&mut self, problem: String) {
        eprintln!("expert-trace: {problem}");
        self.problems.push(problem);
    }

    /// The main thread has ended: with the process, or before it.
    fn look_at_main_thread(&mut self) {
        if target::goes_on_without_its_main_thread(self.pid.get()) {
            self.problem(
                "the target's main thread has ended, and the kernel has removed the probes with it: \
                 what other threads did since is missing"
                    .to_owned(),
            );
        }
    }

    /// Takes some of the events that are there. Gives whether those were all.
    fn take_events(&mut self) -> bool {
        let Self {
            events,
            model,
            sinks,
            target,
            looks_left,
            contexts_known,
            pid,
            ..
        } = self;
        let mut looked = false;
        let mut log_error = None;
        let emptied = events.get_mut().drain(|bytes| {
            let event = decode(bytes);
            let computes = event
                .as_ref()
                .is_ok_and(|event| !matches!(event.body, Body::Libraries));
            model.push(event, &mut |pass| {
                if let Some(log) = &mut sinks.log
                    && let Err(error) = log.pass(pass)
                {
                    log_error = Some(error);
                }
            });
            // A target that computes has mapped its model, and with a new context perhaps another.
            // A pass is judged when the next one begins, so that this is in time.
            let new_context = model.contexts().len() > *contexts_known;
            if new_context || (computes && !looked && *looks_left > 0) {
                looked = true;
                *contexts_known = model.contexts().len();
                *looks_left = looks_left.saturating_sub(1);
                target.look(pid.get());
                target.look_for_models(pid.get());
                if !target.models.is_empty() {
                    *looks_left = 0;
                }
                model.set_facts(target.models.facts());
            }
        });
        if let Some(log) = &mut sinks.log
            && let Err(error) = log.flush()
        {
            log_error = Some(error);
        }
        if let Some(error) = log_error {
            eprintln!("expert-trace: the log ends here: {error}");
            sinks.log = None;
        }
        emptied
    }

    /// Waits until what the probes have begun has arrived: they can be running on other CPUs.
    fn settle(&mut self) -> anyhow::Result<Integrity> {
        let deadline = Instant::now() + Duration::from_secs(1);
        loop {
            while !self.take_events() {}
            let counters = self.session.counters()?;
            let integrity = Integrity::new(&counters, self.model.received(), self.ring_bytes);
            if integrity.adds_up() || Instant::now() > deadline {
                return Ok(integrity.with_problems(std::mem::take(&mut self.problems)));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn finish(mut self, end: End, why: &'static str, recording: &Recording) -> anyhow::Result<()> {
        let duration = self
            .started
            .map_or(Duration::ZERO, |(_, began)| began.elapsed());
        self.session.set_active(false)?;
        let integrity = self.settle()?;
        let sinks = &mut self.sinks;
        self.model.end(end, &mut |pass| {
            if let Some(log) = &mut sinks.log {
                let _ = log.pass(pass);
            }
        });
        if let Some(mut log) = sinks.log.take() {
            let _ = log.flush();
        }
        let output = sinks.output.take();
        let stats = self.stats(integrity, why, duration, recording)?;

        let mut stderr = io::stderr().lock();
        // A closed terminal must not cost the file.
        let _ = summary::write(&mut stderr, &stats, recording.top);
        if stats.layers_context.is_none() {
            let _ = writeln!(
                stderr,
                "No expert routing was seen: {}.",
                silence::reason(&stats)
            );
        }
        if let (Some(output), Some(path)) = (output, &recording.output) {
            output
                .write_json(&stats)
                .with_context(|| format!("Failed to write output file: {}", path.display()))?;
            let _ = writeln!(stderr, "Statistics exported to: {}", path.display());
        }
        self.session.detach();
        Ok(())
    }

    fn stats(
        &mut self,
        integrity: Integrity,
        why: &'static str,
        duration: Duration,
        recording: &Recording,
    ) -> anyhow::Result<Stats> {
        let counted = |context: &&Context| context.passes > 0;
        let contexts: Vec<&Context> = self.model.contexts().iter().filter(counted).collect();
        let main = stats::main_context(&contexts);
        let sources = self.plan.sources();
        let tensor_layouts = (0..sources)
            .map(|source| self.session.layout(source))
            .collect::<Result<_, _>>()?;
        let (started, _) = self.started.context("the capture has not started")?;
        let models = std::mem::take(&mut self.target.models).into_files();
        Ok(Stats {
            schema: stats::Schema {
                name: stats::SCHEMA_NAME,
                version: stats::SCHEMA_VERSION,
            },
            tool: stats::Tool {
                name: env!("CARGO_PKG_NAME"),
                version: env!("CARGO_PKG_VERSION"),
            },
            target: stats::Target {
                pid: self.pid.get(),
                exe: self
                    .target
                    .exe
                    .as_deref()
                    .map(|exe| exe.to_string_lossy().into_owned()),
                build_id: self.target.build_id.clone(),
                command: redact::command(&self.target.command),
                hooks: self.hooks.clone(),
                tensor_layouts,
            },
            capture: CaptureStats {
                mode: if self.from_start { "run" } else { "attach" },
                started: humantime::format_rfc3339_millis(started).to_string(),
                duration_s: duration.as_secs_f64(),
                ended: why,
                include_warmup: recording.include_warmup,
            },
            layers_context: main,
            layers: main.map_or_else(Vec::new, |main| stats::specified_layers(contexts[main])),
            contexts: contexts
                .iter()
                .enumerate()
                .map(|(id, context)| stats::context_stats(id, context, &models))
                .collect(),
            excluded: stats::excluded_list(&self.model.excluded()),
            models,
            integrity,
        })
    }
}

/// The target's main thread, with which the kernel removes the probes of the process.
struct MainThread(Option<AsyncFd<ThreadExit>>);

impl MainThread {
    fn watch(pid: NonZeroU32) -> Self {
        let thread = ThreadExit::watch(pid.get())
            .map_err(|error| tracing::debug!("cannot watch the main thread: {error}"))
            .ok();
        Self(thread.and_then(|thread| {
            // SAFETY: a `ThreadExit` keeps its descriptor for as long as it lives.
            unsafe { AsyncFd::register_with_interest(thread, Interest::READABLE) }.ok()
        }))
    }

    /// Waits for its end; forever after that, and where the kernel cannot tell.
    async fn ended(&mut self) {
        if let Some(descriptor) = &self.0
            && descriptor.readable().await.is_ok()
        {
            self.0 = None;
            return;
        }
        std::future::pending().await
    }
}

/// Signals to us while a child runs.
struct OwnSignals {
    interrupt: tokio::signal::unix::Signal,
    quit: tokio::signal::unix::Signal,
    stop: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

impl OwnSignals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            stop: signal(SignalKind::from_raw(libc::SIGTSTP))?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for a signal to us. Gives it when the child has to be told, too.
    async fn for_child(&mut self) -> Option<Signal> {
        tokio::select! {
            _ = self.interrupt.recv() => None,
            _ = self.quit.recv() => None,
            _ = self.stop.recv() => None,
            _ = self.terminate.recv() => Some(Signal::SIGTERM),
            _ = self.hangup.recv() => Some(Signal::SIGHUP),
        }
    }
}
