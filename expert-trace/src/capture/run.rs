//! Starting a program and tracing it, and all that it forks, to its end.

use std::{ffi::OsString, io, num::NonZeroU32};

use anyhow::Context as _;
use nix::{
    sys::{
        signal::{Signal, kill, killpg, raise},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, geteuid},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{SignalKind, signal},
};

use super::{Capture, Sinks, Start, Variables, Wanted, sinks, view::Wish};
use crate::{
    attach::{Scope, Session},
    caller::Caller,
    cli::Run,
    control::Control,
    doctor::{self, Refusal, Subject},
    gate::{Arrival, Gate, Next},
    launch::{self, Program, Suspended},
    model::End,
    probes::{self, Mapper, Plan},
    requirements::{self, Purpose},
    router_on_cpu::{self, Insertion},
    signals::OwnSignal,
    target,
    top::View,
    variables::{self, Decision, Flags},
};

/// Why nothing would be recorded.
const UNTRACED: &str = "the variables ask for nothing: the program would run untraced";

/// What `--strict` makes of an incomplete capture of a program that succeeded.
const INCOMPLETE: u8 = 3;

/// Starts a program, traces it to its end, and gives its exit status.
///
/// # Errors
/// When the tracer fails before the program has started, or the result cannot be written.
pub async fn run(arguments: Run) -> anyhow::Result<u8> {
    let caller = Caller::detect()?;
    let (account, mut environment) =
        caller.program(arguments.user.as_deref(), &arguments.variables)?;
    let recording = &arguments.recording;
    let flags = Flags {
        output: recording.output.as_deref(),
        log: recording.log.is_some(),
        summary: recording.top.is_some() || recording.trace.is_some(),
    };
    // Those of whoever calls: `--user` changes who runs the program, and not who asked.
    let mut asked = caller.environment.clone();
    for (name, value) in &arguments.variables {
        asked.set(name, value);
    }
    let (decision, warning) = variables::decide(&asked, flags);
    if let Some(warning) = warning {
        say!("warning: {warning}");
    }
    if let Decision::Traced { .. } = decision
        && !recording.dry_run
    {
        let purpose = if geteuid() == account.uid {
            Purpose::Run
        } else {
            Purpose::RunAsOther
        };
        requirements::check(purpose)?;
    }
    let mut command = arguments.command.clone();
    let inserted = arguments
        .router_on_cpu
        .then(|| router_on_cpu::insertion(&command));
    if let Some(Some(insertion)) = &inserted {
        insertion.apply(&mut command);
    }
    if arguments.router_on_cpu {
        if let Some(variable) = environment.get(router_on_cpu::OVERRIDE_VARIABLE) {
            let value = router_on_cpu::with_override(variable);
            environment.set(router_on_cpu::OVERRIDE_VARIABLE, value);
        }
        environment.set(router_on_cpu::NO_FUSION_VARIABLE, "1");
    }
    let override_variable = environment.get(router_on_cpu::OVERRIDE_VARIABLE);
    let logits =
        arguments.router_on_cpu || router_on_cpu::is_asked_for(&command, override_variable);
    let routes = recording.routes(logits, arguments.router_on_cpu)?;
    if recording.dry_run {
        say_what_is_added(inserted.as_ref(), &command);
        let subject = Subject::Command(doctor::Command {
            arguments: &command,
            environment: &environment,
            account: &account,
            routes,
        });
        let refused = match decision {
            Decision::Untraced => Some(Refusal {
                why: UNTRACED.to_owned(),
                fix: "unset the variables LLAMA_EXPERT_TRACE_…, or give -o, --log or --top",
            }),
            Decision::Traced { stats, log, output } => {
                let wanted = Wanted { stats, log, output };
                sinks::refused(&wanted, recording, &caller.account, 0)
            }
        };
        return Ok(doctor::dry_run(&subject, refused.as_ref())?.exit_status());
    }
    let path = account.with_rights(|| Ok(launch::find(&command[0], environment.get("PATH"))))??;
    let program = Program {
        path: &path,
        arguments: &command,
        environment: &environment,
        account: &account,
        // The terminal is the view's.
        own_session: arguments.live,
    };
    let wanted = match decision {
        Decision::Untraced => match launch::replace(&program)? {},
        Decision::Traced { stats, log, output } => Wanted { stats, log, output },
    };
    account.with_rights(|| Ok(launch::check(&path)))??;
    if let Some(notice) = &caller.notice {
        say!("{notice}");
    }
    say_what_is_added(inserted.as_ref(), &command);
    let open = |pid| Sinks::open(&wanted, &arguments.recording, &caller.account, pid);
    // A name with the process in it has to wait for the process, which does not begin before us.
    let sinks = match wanted.names_process(&arguments.recording) {
        true => None,
        false => Some(open(0)?),
    };

    // Before the program is there: it is to inherit what its output goes to meanwhile.
    let live = arguments.live;
    let open_view = || {
        View::open(format!(
            "expert-trace: {}",
            target::printable(command[0].as_ref())
        ))
    };
    let follow = !arguments.no_follow;
    let buffer_size = arguments.recording.ring_bytes(logits);
    // What sees the fork must be there before it.
    let session = Session::load(buffer_size, Scope::FirstChild { forks: follow })?;
    // From here on there is something to lose. A handler would have disturbed the loading: the kernel
    // breaks it off with EAGAIN.
    let mut signals = OwnSignals::listen()?;
    let mut dump = OwnSignal::listen(Signal::SIGUSR1)?;
    let mut child_changed = signal(SignalKind::child())?;
    let mut view = live.then(open_view).transpose()?;
    let child = Suspended::spawn(&program)?;
    let pid = child.pid();
    let main_process = u32::try_from(pid.as_raw()).ok().and_then(NonZeroU32::new);
    let main_process = main_process.context("not a process id")?;
    let sinks = match sinks {
        Some(sinks) => sinks,
        None => open(main_process.get())?,
    };
    let first_process = Some(session.0.first_child()?);
    let start = Start {
        pid: main_process,
        first_process,
        plan: Plan::gated().with_routes(routes),
        from_start: true,
        recording: arguments.recording,
    };
    let mut capture = Capture::new(session, start, sinks)?;
    capture.targets.main.command = command.clone();
    capture.targets.main.variables =
        Variables::from("/".as_ref(), |name| environment.get(name).map(Into::into));
    capture.start()?;
    if !live {
        capture.announce();
    }
    let gate = child.release(&program, |gate| {
        capture.serve(gate, follow);
    })?;
    capture.targets.main.look(main_process.get());
    // SAFETY: a `Gate` keeps its descriptor for as long as it lives.
    let mut gate = Some(unsafe { AsyncFd::register_with_interest(gate, Interest::READABLE) }?);

    let mut control = capture.sinks.control.take();
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
            () = dump.came() => {
                capture.dump().await;
                continue;
            }
            asked = Control::next(&mut control) => {
                capture.answer(asked).await;
                continue;
            }
            asked = View::next(&mut view) => {
                match capture.show(asked, &caller.account).await {
                    Wish::None | Wish::Leave => {}
                    // As the terminal would have done.
                    Wish::End => drop(killpg(pid, Signal::SIGINT)),
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
            due = capture.events_due(more) => {
                due?;
                more = !capture.take_events();
                continue;
            }
        }
        if let Some(status) = look_at_child(pid, &mut capture)? {
            break status;
        }
    };
    drop(view);
    let (end, status) = match status {
        WaitStatus::Signaled(_, signal, _) => (End::Cut, 128 + signal as u8),
        WaitStatus::Exited(_, code) => (End::Exited, code as u8),
        _ => (End::Exited, 0),
    };
    let others_live = follow && gate.is_some_and(|gate| gate.into_inner().leave());
    if others_live {
        say!("processes that the program has started go on; they are not traced any more");
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

/// Says what `--router-on-cpu` does to a command: nothing without it, and nothing to a program that does
/// not take llama.cpp's options.
fn say_what_is_added(inserted: Option<&Option<Insertion>>, command: &[OsString]) {
    match inserted {
        Some(Some(insertion)) => say!("{}", router_on_cpu::added(insertion)),
        Some(None) => say!("{}", router_on_cpu::equivalent(&command[0])),
        None => {}
    }
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

fn is_nothing_to_run(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidFilename, InvalidInput, NotADirectory, NotFound};
    // When a thread is killed, its memory cannot be read any more.
    let of_thread = matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EIO));
    of_thread
        || matches!(
            error.kind(),
            NotFound | NotADirectory | InvalidFilename | InvalidInput
        )
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
            // The call will fail, the thread has been killed, or it is no file.
            Err(error) if is_nothing_to_run(&error) => {
                return tracing::debug!("{arrival:?}: {error}");
            }
            Err(error) => {
                let thread = arrival.thread;
                return self.problem(format!(
                    "a file that thread {thread} runs cannot be looked at ({error}): what it computes \
                     is missing"
                ));
            }
        };
        let process = target::process_of(arrival.thread);
        let is_main = process == Some(self.pid.get());
        let is_first = is_main && self.targets.main.exe().is_none();
        if !arrival.maps() {
            if is_main {
                self.targets.main.begins(self.pid.get(), &code.path);
            }
            // What it maps now goes when the call succeeds.
            process.inspect(|process| self.plan.forget(*process));
        }
        let main = &self.targets.main;
        let options = || match process {
            // Before the call, its arguments are those of what it has been.
            _ if is_first => Some(main.options_of_command()),
            Some(process) if arrival.maps() => probes::options_of(process),
            _ => None,
        };
        let mapper = Mapper {
            process,
            options: &options,
        };
        let path = code.own_path();
        match self.plan.add_file(&code.file, &code.path, &path, mapper) {
            Ok(change) => self.probe(change),
            Err(error) => tracing::debug!("{}: {error}", target::printable(&code.path)),
        }
    }
}

/// Signals to us while a child runs.
struct OwnSignals {
    interrupt: OwnSignal,
    quit: OwnSignal,
    stop: OwnSignal,
    terminate: OwnSignal,
    hangup: OwnSignal,
}

impl OwnSignals {
    /// What was ignored when we were started (nohup) stays so, for the child, too.
    fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: OwnSignal::unless_ignored(Signal::SIGINT)?,
            quit: OwnSignal::unless_ignored(Signal::SIGQUIT)?,
            stop: OwnSignal::unless_ignored(Signal::SIGTSTP)?,
            terminate: OwnSignal::unless_ignored(Signal::SIGTERM)?,
            hangup: OwnSignal::unless_ignored(Signal::SIGHUP)?,
        })
    }

    /// Waits for a signal to us. Gives it when the child has to be told, too.
    async fn for_child(&mut self) -> Option<Signal> {
        tokio::select! {
            () = self.interrupt.came() => None,
            () = self.quit.came() => None,
            () = self.stop.came() => None,
            () = self.terminate.came() => Some(Signal::SIGTERM),
            () = self.hangup.came() => Some(Signal::SIGHUP),
        }
    }
}
