//! Attaching to a running process.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, bail};
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{SignalKind, signal},
};

use super::{Capture, MODEL_VARIABLE, MainThread, Sinks, Start, Wanted};
use crate::{
    attach::{Scope, Session, check_privileges},
    caller::Caller,
    cli::Attach,
    launch,
    model::End,
    probes::Plan,
    target::{self, printable},
};

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
    check_privileges()?;
    let sinks = Sinks::open(&recording)?;
    let exit = launch::exit_descriptor(pid.get())
        .with_context(|| format!("cannot attach to process {pid}"))?;
    let files = target::mapped_files(pid.get())
        .with_context(|| format!("cannot read what process {pid} maps"))?;

    let mut capture = Capture::new(&recording, sinks, pid.get() as i32, false)?;
    capture.target.command = target::command_line(pid.get()).unwrap_or_default();
    capture.target.model_variable = target::variable(pid.get(), MODEL_VARIABLE);
    capture.target.look(pid.get());
    let probes = capture.plan.extend(pid.get(), &files).to_vec();
    if !capture.plan.can_see_experts() {
        bail!(
            "process {pid} ({}) maps no file that defines ggml_compute_forward_get_rows, the function that shows expert ids\n  \
             It is no llama.cpp, has not loaded its CPU backend yet, or its static executable has been stripped of symbols",
            printable(capture.target.exe.as_deref().unwrap_or(Path::new("?")))
        );
    }
    for probe in probes {
        capture.session.attach(&probe, capture.pid)?;
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

