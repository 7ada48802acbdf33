//! Attaching to a running process.

use std::{num::NonZeroU32, time::Duration};

use anyhow::{Context as _, bail};
use nix::sys::signal::Signal;
use tokio::io::{Interest, unix::AsyncFd};

use super::{Capture, Sinks, Start, Variables, Wanted, monotonic_ns};
use crate::{
    attach::{Scope, Session},
    caller::Caller,
    cli::Attach,
    diagnosis::{self, Untraceable},
    doctor::{self, Subject},
    launch::{self, ThreadExit},
    model::End,
    probes::Plan,
    requirements::{self, Purpose},
    router_on_cpu,
    signals::OwnSignal,
    target::{self, MappedFile},
};

/// What `--strict` makes of an incomplete capture.
const INCOMPLETE: u8 = 3;

/// Traces a running process until Ctrl-C, the end of the duration, or its own end.
///
/// # Errors
/// When the process cannot be traced, or the result cannot be written.
pub async fn attach(arguments: Attach) -> anyhow::Result<u8> {
    let Attach {
        pid,
        duration,
        router_on_cpu,
        recording,
    } = arguments;
    if recording.dry_run {
        let pid = pid.get();
        return doctor::dry_run(&Subject::Process { pid, router_on_cpu }, None);
    }
    requirements::check(Purpose::Attach)?;
    diagnosis::check_process(pid.get())?;
    let wanted = Wanted {
        stats: true,
        log: recording.log.is_some(),
        // Our stdout is nobody else's here.
        output: recording.output.as_deref().map(|path| match path.to_str() {
            Some("-") => "/dev/fd/1".into(),
            _ => path.to_owned(),
        }),
    };
    let sinks = Sinks::open(wanted, &recording, &Caller::detect()?.account)?;
    let exit = launch::exit_descriptor(pid.get())
        .with_context(|| format!("cannot attach to process {pid}"));
    let exit = diagnosis::unless_ended(pid.get(), exit)?;
    let strict = recording.strict;
    let command = target::command_line(pid.get()).unwrap_or_default();
    let variables = Variables::from(|name| target::variable(pid.get(), name));
    let logits = router_on_cpu
        || router_on_cpu::is_asked_for(&command, variables.override_tensor.as_deref());
    let start = Start {
        pid,
        first_process: None,
        plan: Plan::default().with_logits(logits),
        from_start: false,
        recording,
    };
    let session = Session::load(start.recording.ring_bytes(logits), Scope::Process(pid))?;
    // Handlers would have disturbed the loading: the kernel breaks it off with EAGAIN.
    // A shell ignores it for its background jobs; who sends it all the same means it.
    let mut interrupt = OwnSignal::listen(Signal::SIGINT)?;
    let mut terminate = OwnSignal::listen(Signal::SIGTERM)?;
    let mut hangup = OwnSignal::unless_ignored(Signal::SIGHUP)?;
    let mut capture = Capture::new(session, start, sinks)?;
    let main = &mut capture.targets.main;
    main.command = command;
    main.variables = variables;
    main.look(pid.get());
    let files = target::mapped_files(pid.get())
        .with_context(|| format!("cannot read what process {pid} maps"));
    let files = diagnosis::unless_ended(pid.get(), files)?;
    if logits {
        warn_of_fusion(pid, &files);
    }
    let changes = capture.plan.extend(pid.get(), &files);
    if !capture.plan.can_see_experts() {
        match diagnosis::no_expert_ids(pid.get(), &files, &capture.plan) {
            waiting @ Untraceable::NoBackendYet { .. } => say!("{waiting}"),
            error => bail!(error),
        }
    }
    for probe in changes.into_iter().flat_map(|change| change.probes) {
        let attached = capture.session.attach(&probe);
        diagnosis::unless_ended(pid.get(), attached)?;
        capture.hooks.push(probe);
    }
    // SAFETY: an `OwnedFd` keeps its descriptor for as long as it lives.
    let exit = unsafe { AsyncFd::register_with_interest(exit, Interest::READABLE) }?;
    let mut main_thread = MainThread::watch(pid);
    capture.start()?;

    let over = tokio::time::sleep(duration.unwrap_or(Duration::MAX));
    tokio::pin!(over);
    let mut more = false;
    let why = loop {
        tokio::select! {
            biased;
            () = interrupt.came() => break "interrupted",
            () = terminate.came() => break "interrupted",
            () = hangup.came() => break "interrupted",
            () = &mut over => break "duration",
            _ = exit.readable() => break "target_exited",
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
        if capture.model.libraries_changed() {
            capture.probe_new_libraries();
        }
    };
    let complete = capture.finish(End::Cut, why, &mut interrupt).await?;
    Ok(if strict && !complete { INCOMPLETE } else { 0 })
}

impl Capture {
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

    /// Probes what the target has mapped since the last time.
    fn probe_new_libraries(&mut self) {
        let pid = self.pid.get();
        let files = match target::mapped_files(pid) {
            Ok(files) => files,
            Err(error) => {
                self.problem(format!("cannot read what process {pid} maps: {error}"));
                Vec::new()
            }
        };
        let mut names: Vec<String> = Vec::new();
        for change in self.plan.extend(pid, &files) {
            names.extend(change.probes.iter().map(|probe| probe.file.clone()));
            self.probe(change);
        }
        names.dedup();
        for name in &names {
            let name = target::printable(name.as_ref());
            say!("{name} was loaded, and is traced from now on");
        }
        self.model.libraries_probed(names, monotonic_ns());
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
