//! Attaching to a running process.

use std::{ffi::OsString, io, num::NonZeroU32, os::fd::OwnedFd, time::Duration};

use anyhow::{Context as _, anyhow, bail};
use nix::sys::signal::Signal;
use tokio::io::{Interest, unix::AsyncFd};

use super::{Capture, Sinks, Start, Variables, Wanted, all, monotonic_ns, sinks, view::Wish};
use crate::{
    attach::{Events, Scope, Session},
    caller::{Account, Caller},
    cli::{Attach, Recording, Top},
    control::Control,
    diagnosis::{self, Untraceable},
    doctor::{self, Answer, Subject},
    launch::{self, ThreadExit},
    model::End,
    probes::Plan,
    requirements::{self, Purpose},
    router_on_cpu,
    signals::OwnSignal,
    target::{self, MappedFile},
    top::View,
};

/// What `--strict` makes of an incomplete capture.
const INCOMPLETE: u8 = 3;

/// Traces a running process, or all that map a library, until Ctrl-C, the end of the duration, or its
/// own end.
///
/// # Errors
/// When a process cannot be traced, or a result cannot be written.
pub async fn attach(arguments: Attach) -> anyhow::Result<u8> {
    if arguments.recording.dry_run {
        return dry_run(&arguments);
    }
    requirements::check(Purpose::Attach)?;
    let account = Caller::detect()?.account;
    let complete = match (arguments.pid, &arguments.library) {
        (Some(pid), _) => {
            let process = Loaded::new(pid, &arguments, &account)?;
            let mut process = process.probe(Signals::listen()?)?;
            process.capture.start()?;
            process.capture.announce();
            process.trace(arguments.duration).await?
        }
        (None, Some(library)) => all::trace(library, &arguments, &account).await?,
        (None, None) => bail!("name a process (--pid), or a library (--all --library)"),
    };
    Ok(if arguments.recording.strict && !complete {
        INCOMPLETE
    } else {
        0
    })
}

/// Tells what would be done with each process. Gives the worst of their exit statuses.
fn dry_run(arguments: &Attach) -> anyhow::Result<u8> {
    let recording = &arguments.recording;
    let (pids, refused) = match (arguments.pid, &arguments.library) {
        (None, Some(library)) => {
            let users = all::users_of(library)?;
            all::warn_of_hidden(&users);
            let refused = all::refused(library, &users, recording);
            (users.pids, refused)
        }
        (pid, _) => (pid.into_iter().collect(), None),
    };
    let account = Caller::detect()?.account;
    let mut worst = Answer::Yes;
    for pid in pids {
        let subject = Subject::Process {
            pid: pid.get(),
            router_on_cpu: arguments.router_on_cpu,
            routes: &recording.routes,
            watch: false,
        };
        let refused = refused
            .clone()
            .or_else(|| sinks::refused(&wanted(recording), recording, &account, pid.get()));
        worst = Answer::worst([worst, doctor::dry_run(&subject, refused.as_ref())?]);
    }
    Ok(worst.exit_status())
}

/// Shows what a running process does, as it does it.
///
/// # Errors
/// When the process cannot be traced, there is no terminal, or a result cannot be written.
pub async fn top(arguments: Top) -> anyhow::Result<u8> {
    let Top {
        pid,
        duration,
        router_on_cpu,
        mut recording,
    } = arguments;
    recording.top.get_or_insert(TOP);
    let arguments = Attach {
        pid: Some(pid),
        all: false,
        library: None,
        duration,
        router_on_cpu,
        recording,
    };
    if arguments.recording.dry_run {
        return dry_run(&arguments);
    }
    requirements::check(Purpose::Attach)?;
    let account = Caller::detect()?.account;
    let process = Loaded::new(pid, &arguments, &account)?;
    let mut process = process.probe(Signals::listen()?)?;
    let name = target::name(pid.get()).unwrap_or_default();
    let view = View::open(format!("expert-trace: {pid} {name}"))?;
    process.view = Some((view, account));
    process.capture.start()?;
    let complete = process.trace(duration).await?;
    Ok(if arguments.recording.strict && !complete {
        INCOMPLETE
    } else {
        0
    })
}

/// Experts of each layer that the summary lists after the live view, which has shown them.
const TOP: usize = 3;

/// What is wanted of each process.
pub(super) fn wanted(recording: &Recording) -> Wanted {
    Wanted {
        stats: true,
        log: recording.log.is_some(),
        // Our stdout is nobody else's here.
        output: recording.output.as_deref().map(|path| match path.to_str() {
            Some("-") => "/dev/fd/1".into(),
            _ => path.to_owned(),
        }),
    }
}

/// A process that can be traced, and the BPF programs for it.
pub(super) struct Loaded {
    session: (Session, Events),
    start: Start,
    sinks: Sinks,
    exit: OwnedFd,
    command: Vec<OsString>,
    variables: Variables,
}

impl Loaded {
    pub(super) fn new(
        pid: NonZeroU32,
        arguments: &Attach,
        account: &Account,
    ) -> anyhow::Result<Self> {
        diagnosis::check_process(pid.get())?;
        let recording = &arguments.recording;
        let sinks = Sinks::open(&wanted(recording), recording, account, pid.get())?;
        let exit = launch::exit_descriptor(pid.get())
            .with_context(|| format!("cannot attach to process {pid}"));
        let exit = diagnosis::unless_ended(pid.get(), exit)?;
        let command = target::command_line(pid.get()).unwrap_or_default();
        let variables = Variables::from(&target::root(pid.get()), |name| {
            target::variable(pid.get(), name)
        });
        let logits = arguments.router_on_cpu
            || router_on_cpu::is_asked_for(&command, variables.override_tensor.as_deref());
        let start = Start {
            pid,
            first_process: None,
            plan: Plan::default().with_routes(recording.routes(logits, arguments.router_on_cpu)?),
            from_start: false,
            recording: recording.clone(),
        };
        Ok(Self {
            session: Session::load(recording.ring_bytes(logits), Scope::Process(pid))?,
            start,
            sinks,
            exit,
            command,
            variables,
        })
    }

    /// Sets the probes.
    pub(super) fn probe(self, signals: Signals) -> anyhow::Result<Probed> {
        let pid = self.start.pid;
        let mut capture = Capture::new(self.session, self.start, self.sinks)?;
        let main = &mut capture.targets.main;
        main.command = self.command;
        main.variables = self.variables;
        main.look(pid.get());
        let files = target::mapped_files(pid.get())
            .with_context(|| format!("cannot read what process {pid} maps"));
        let files = diagnosis::unless_ended(pid.get(), files)?;
        if capture.plan.reads_logits() {
            warn_of_fusion(pid, &files);
        }
        let changes = capture.plan.extend(pid.get(), &files);
        if !capture.plan.can_see_experts() {
            match diagnosis::no_expert_ids(pid.get(), &files, &capture.plan) {
                waiting @ Untraceable::NoBackendYet { .. } => say!("{waiting}"),
                error => bail!(error),
            }
        }
        let mut probes = Vec::new();
        for change in changes {
            if let Some(refusal) = change.refusal {
                capture.problem(refusal);
            }
            probes.extend(change.probes);
        }
        capture
            .session
            .load_programs(probes.iter().map(|probe| probe.hook))?;
        for probe in probes {
            let attached = capture.session.attach(&probe);
            diagnosis::unless_ended(pid.get(), attached)?;
            diagnosis::check_probe(pid.get(), &files, &probe)?;
            capture.hooks.push(probe);
        }
        capture.tell_of_schedulers()?;
        // SAFETY: an `OwnedFd` keeps its descriptor for as long as it lives.
        let exit = unsafe { AsyncFd::register_with_interest(self.exit, Interest::READABLE) }?;
        Ok(Probed {
            capture,
            exit,
            main_thread: MainThread::watch(pid),
            signals,
            dump: OwnSignal::listen(Signal::SIGUSR1)?,
            view: None,
        })
    }
}

/// A process whose probes are set.
pub(super) struct Probed {
    pub(super) capture: Capture,
    exit: AsyncFd<OwnedFd>,
    main_thread: MainThread,
    signals: Signals,
    /// Asks for what is known up to now.
    dump: OwnSignal,
    /// The live view, and who writes what is saved there.
    view: Option<(View, Account)>,
}

impl Probed {
    /// Takes what comes, once the probes are switched on, until it is over. Gives whether all that was
    /// seen is counted.
    pub(super) async fn trace(self, duration: Option<Duration>) -> anyhow::Result<bool> {
        let Self {
            mut capture,
            exit,
            mut main_thread,
            mut signals,
            mut dump,
            view,
        } = self;
        let (mut view, account) = view.unzip();
        let mut control = capture.sinks.control.take();
        let over = tokio::time::sleep(duration.unwrap_or(Duration::MAX));
        tokio::pin!(over);
        let mut more = false;
        let mut stop = None;
        let why = loop {
            tokio::select! {
                biased;
                () = signals.came() => break "interrupted",
                () = &mut over => break "duration",
                _ = exit.readable() => break "target_exited",
                () = dump.came() => capture.dump().await,
                asked = Control::next(&mut control) => {
                    stop = capture.answer(asked).await;
                    if stop.is_some() {
                        break "stopped";
                    }
                }
                asked = View::next(&mut view) => {
                    // There is an account where there is a view.
                    let Some(account) = &account else { continue };
                    match capture.show(asked, account).await {
                        Wish::None => {}
                        Wish::End | Wish::Leave => break "interrupted",
                    }
                }
                () = main_thread.ended() => capture.look_at_main_thread(),
                due = capture.events_due(more) => {
                    due?;
                    more = !capture.take_events();
                }
            }
            if capture.model.libraries_changed() {
                capture.probe_new_libraries();
            }
        };
        drop(view);
        let ended = capture.finish(End::Cut, why, &mut signals.interrupt).await;
        if let Some(stop) = stop {
            let result = ended.as_ref().map(|_| Vec::new());
            stop.answer_last(result.map_err(|error| anyhow!("{error:#}")))
                .await;
        }
        ended
    }
}

/// What ends a capture from outside.
pub(super) struct Signals {
    interrupt: OwnSignal,
    terminate: OwnSignal,
    hangup: OwnSignal,
}

impl Signals {
    /// Waits for them from now on. Handlers disturb the loading of programs: the kernel breaks it off
    /// with EAGAIN.
    pub(super) fn listen() -> io::Result<Self> {
        Ok(Self {
            // A shell ignores it for its background jobs; who sends it all the same means it.
            interrupt: OwnSignal::listen(Signal::SIGINT)?,
            terminate: OwnSignal::listen(Signal::SIGTERM)?,
            hangup: OwnSignal::unless_ignored(Signal::SIGHUP)?,
        })
    }

    async fn came(&mut self) {
        tokio::select! {
            () = self.interrupt.came() => {}
            () = self.terminate.came() => {}
            () = self.hangup.came() => {}
        }
    }
}

impl Capture {
    /// The main thread has ended: with the process, or before it.
    fn look_at_main_thread(&mut self) {
        if !self.session.outlives_main_thread()
            && target::goes_on_without_its_main_thread(self.pid.get())
        {
            self.problem(
                "the target's main thread has ended, and the kernel has removed the probes with it: \
                 what other threads did since is missing"
                    .to_owned(),
            );
        }
    }

    /// Probes what the target has mapped since the last time.
    fn probe_new_libraries(&mut self) {
        let pid = self.pid.get();
        let shown_by = target::thread_with_memory(pid);
        let files = match target::mapped_files(shown_by) {
            Ok(files) => files,
            Err(error) => {
                self.problem(format!("cannot read what process {pid} maps: {error}"));
                Vec::new()
            }
        };
        let mut names: Vec<String> = Vec::new();
        for change in self.plan.extend(shown_by, &files) {
            // The kernel sets probes in a process that it knows by its main thread.
            if shown_by != pid
                && let Some(file) = &change.brings
            {
                let file = target::printable(file.as_ref());
                self.problem(format!(
                    "{file} was loaded after the target's main thread had ended: it cannot be probed, \
                     and what it did is missing"
                ));
                continue;
            }
            names.extend(change.brings.clone());
            let first = self.hooks.len();
            self.probe(change);
            let set = self.hooks.iter().skip(first);
            let mut changed =
                set.filter_map(|probe| diagnosis::check_probe(pid, &files, probe).err());
            if let Some(changed) = changed.next() {
                self.problem(changed.to_string());
            }
        }
        // What begins after we have said so is traced.
        let probed_ns = monotonic_ns();
        names.dedup();
        for name in &names {
            let name = target::printable(name.as_ref());
            say!("{name} was loaded, and is traced from now on");
        }
        self.model.libraries_probed(names, probed_ns);
    }
}

/// A target with a Vulkan device that was started without `run --router-on-cpu` may choose otherwise than
/// by the logits that we see: see [`router_on_cpu::NO_FUSION_VARIABLE`].
fn warn_of_fusion(pid: NonZeroU32, files: &[MappedFile]) {
    let mut names = files.iter().filter_map(|file| file.path.file_name());
    let vulkan = names.any(|name| name.to_string_lossy().starts_with("libvulkan.so"));
    let variable = router_on_cpu::NO_FUSION_VARIABLE;
    if vulkan && target::variable(pid.get(), variable).is_none() {
        say!(
            "warning: process {pid} uses Vulkan, and was started without {variable}: for prompts, its \
             device may choose other experts than its logits say"
        );
    }
}

/// The target's main thread, with which the kernel may remove the probes of the process.
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
