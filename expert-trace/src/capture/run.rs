//! Starting a program and tracing it, and all that it forks, to its end.

use std::{io, num::NonZeroU32};

use anyhow::Context as _;
use nix::{
    sys::{
        signal::{Signal, kill, raise},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, geteuid},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{SignalKind, signal},
};

use super::{Capture, MainThread, Sinks, Start, Wanted};
use crate::{
    attach::{Scope, Session},
    caller::Caller,
    cli::Run,
    gate::{Arrival, Gate, Next},
    launch::{self, Program, Suspended},
    model::End,
    probes::Plan,
    requirements::{self, Purpose},
    target,
    variables::{self, Decision, Flags},
};

/// What `--strict` makes of an incomplete capture of a program that succeeded.
const INCOMPLETE: u8 = 3;

/// Starts a program, traces it to its end, and gives its exit status.
///
/// # Errors
/// When the tracer fails before the program has started, or the result cannot be written.
pub async fn run(arguments: Run) -> anyhow::Result<u8> {
    let caller = Caller::detect()?;
    if let Some(notice) = &caller.notice {
        eprintln!("expert-trace: {notice}");
    }
    let (account, environment) = caller.program(arguments.user.as_deref(), &arguments.variables)?;
    let path = account.with_rights(|| {
        Ok(launch::find(&arguments.command[0], environment.get("PATH"))
            .and_then(|path| launch::check(&path).map(|()| path)))
    })??;
    let program = Program {
        path: &path,
        arguments: &arguments.command,
        environment: &environment,
        account: &account,
    };
    let recording = &arguments.recording;
    let flags = Flags {
        output: recording.output.as_deref(),
        log: recording.log.is_some(),
        summary: recording.top.is_some(),
    };
    let (decision, warning) = variables::decide(&environment, flags);
    if let Some(warning) = warning {
        eprintln!("expert-trace: warning: {warning}");
    }
    let wanted = match decision {
        Decision::Untraced => match launch::replace(&program)? {},
        Decision::Traced { stats, log, output } => Wanted { stats, log, output },
    };
    let purpose = if geteuid() == account.uid {
        Purpose::Run
    } else {
        Purpose::RunAsOther
    };
    requirements::check(purpose)?;
    let sinks = Sinks::open(wanted, &arguments.recording, &caller.account)?;
    let mut signals = OwnSignals::listen()?;
    let mut child_changed = signal(SignalKind::child())?;

    let follow = !arguments.no_follow;
    let buffer_size = arguments.recording.buffer_size;
    // What sees the fork must be there before it.
    let (child, session) = if follow {
        let session = Session::load(buffer_size, Scope::FirstChild)?;
        (Suspended::spawn(&program)?, session)
    } else {
        let child = Suspended::spawn(&program)?;
        let scope = Scope::Process(process_id(child.pid())?);
        (child, Session::load(buffer_size, scope)?)
    };
    let pid = child.pid();
    let main_process = process_id(pid)?;
    let first_process = follow.then(|| session.0.first_child()).transpose()?;
    let start = Start {
        pid: main_process,
        first_process,
        plan: Plan::gated(),
        from_start: true,
        recording: arguments.recording,
    };
    let mut capture = Capture::new(session, start, sinks)?;
    capture.targets.main.command = arguments.command.clone();
    capture.targets.main.model_variable = environment.get(super::MODEL_VARIABLE).map(Into::into);
    let mut main_thread = if follow {
        MainThread::unwatched()
    } else {
        MainThread::watch(main_process)
    };
    capture.start()?;
    let gate = child.release(&program, |gate| {
        capture.serve(gate, follow);
    })?;
    capture.targets.main.look(main_process.get());
    // SAFETY: a `Gate` keeps its descriptor for as long as it lives.
    let mut gate = Some(unsafe { AsyncFd::register_with_interest(gate, Interest::READABLE) }?);

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
            ready = arrivals(&mut gate) => {
                let over = match ready {
                    Ok(mut ready) => {
                        let served = capture.serve(ready.get_inner(), follow);
                        ready.clear_ready();
                        served == Served::Over
                    }
                    Err(_) => true,
                };
                if over {
                    gate = None;
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
        if let Some(status) = look_at_child(pid, &mut capture)? {
            break status;
        }
    };
    let (end, status) = match status {
        WaitStatus::Signaled(_, signal, _) => (End::Cut, 128 + signal as u8),
        WaitStatus::Exited(_, code) => (End::Exited, code as u8),
        _ => (End::Exited, 0),
    };
    let others_live = gate.is_some_and(|gate| !matches!(gate.get_ref().next(), Ok(Next::Over)));
    if follow && others_live {
        eprintln!(
            "expert-trace: processes that the program has started go on; they are not traced any more"
        );
    }
    let strict = capture.recording.strict;
    let complete = capture
        .finish(end, "target_exited", &mut signals.interrupt)
        .await?;
    Ok(if strict && !complete && status == 0 {
        INCOMPLETE
    } else {
        status
    })
}

fn process_id(pid: Pid) -> anyhow::Result<NonZeroU32> {
    let pid = u32::try_from(pid.as_raw()).ok().and_then(NonZeroU32::new);
    pid.context("not a process id")
}

/// Waits until somebody is at the gate; forever when there is none any more.
async fn arrivals(
    gate: &mut Option<AsyncFd<Gate>>,
) -> io::Result<tokio::io::unix::AsyncFdReadyGuard<'_, Gate>> {
    match gate {
        Some(gate) => gate.readable().await,
        None => std::future::pending().await,
    }
}

/// Looks at what became of the child, until there is nothing new: signals of children are not counted.
/// Gives how it ended.
fn look_at_child(pid: Pid, capture: &mut Capture) -> nix::Result<Option<WaitStatus>> {
    loop {
        match waitpid(pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED))? {
            WaitStatus::StillAlive => return Ok(None),
            status @ (WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => {
                return Ok(Some(status));
            }
            WaitStatus::Stopped(_, Signal::SIGTSTP | Signal::SIGTTIN | Signal::SIGTTOU) => {
                while !capture.take_events() {}
                stop_with(pid);
            }
            _ => {}
        }
    }
}

/// Stops us, as the terminal has stopped the child, so that the shell sees its job stop.
fn stop_with(child: Pid) {
    let _ = raise(Signal::SIGSTOP);
    // `fg` and `bg` continue the whole job; somebody who continues us alone means the child, too.
    if target::is_stopped(child.as_raw() as u32) {
        let _ = kill(child, Signal::SIGCONT);
    }
}

/// What came of serving the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Served {
    /// Nobody waits.
    All,
    /// Nobody will come any more.
    Over,
}

impl Capture {
    /// Probes what those at the gate are about to run, and lets them pass.
    fn serve(&mut self, gate: &Gate, follow: bool) -> Served {
        loop {
            match gate.next() {
                Ok(Next::Arrival(arrival)) => {
                    if follow || target::process_of(arrival.thread) == Some(self.pid.get()) {
                        self.admit(&arrival);
                    }
                    gate.let_pass(arrival);
                }
                Ok(Next::Nobody) => return Served::All,
                Ok(Next::Over) => return Served::Over,
                Err(error) => {
                    self.problem(format!("cannot see new libraries any more: {error}"));
                    return Served::Over;
                }
            }
        }
    }

    fn admit(&mut self, arrival: &Arrival) {
        let code = match arrival.code() {
            Ok(code) => code,
            // The call will fail, or the thread has been killed.
            Err(error) => return tracing::debug!("{arrival:?}: {error}"),
        };
        let path = code.own_path();
        match self.plan.add_file(&code.file, &code.path, &path) {
            Ok(probes) => {
                let probes = probes.to_vec();
                self.probe(probes);
            }
            Err(error) => tracing::debug!("{}: {error}", target::printable(&code.path)),
        }
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
