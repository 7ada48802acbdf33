//! Attaching to all processes that map a library, each with a capture of its own.

use std::{fmt::Write as _, path::Path};

use anyhow::{Context as _, bail};
use tokio::task::{JoinSet, LocalSet};

use super::attach::{Loaded, Probed, Signals, wanted};
use crate::{
    caller::Account,
    cli::Attach,
    diagnosis::Untraceable,
    probes::Plan,
    target::{self, open_regular, printable},
    users::{self, Users},
};

/// More are not listed.
const SHOWN: usize = 4;

/// Traces all processes that map `library` now, until all captures have ended. Gives whether all that was
/// seen of all of them is counted.
///
/// # Errors
/// When none can be traced, or a result cannot be written.
pub async fn trace(library: &Path, arguments: &Attach, account: &Account) -> anyhow::Result<bool> {
    let users = users_of(library)?;
    let recording = &arguments.recording;
    if users.pids.len() > 1 && !wanted(recording).tells_processes_apart(recording) {
        bail!(
            "{} processes map {} ({}), and would write to one place; name a file for each with %p, the \
             process id: -o stats-%p.json, --log=routes-%p.log",
            users.pids.len(),
            printable(library),
            list(users.pids.iter().map(|pid| pid.to_string()))
        );
    }
    allow_many_descriptors();
    let mut all_seen = true;
    if !users.hidden.is_empty() {
        say!("warning: {}", hidden(&users));
    }
    // What cannot be traced does not keep us from the others.
    let mut passed_over = |pid: u32, error: anyhow::Error| {
        all_seen &= matches!(error.downcast_ref(), Some(Untraceable::Ended { .. }));
        say!("process {pid} is not traced: {error:#}");
    };
    let mut loaded = Vec::new();
    for pid in users.pids {
        match Loaded::new(pid, arguments, account) {
            Ok(process) => loaded.push((pid, process)),
            Err(error) => passed_over(pid.get(), error),
        }
    }
    // For all of them before the first is probed: a signal is meant for all.
    let signals = loaded.iter().map(|_| Signals::listen());
    let signals: Vec<Signals> = signals.collect::<Result<_, _>>()?;
    let mut probed: Vec<Probed> = Vec::new();
    for ((pid, process), signals) in loaded.into_iter().zip(signals) {
        match process.probe(signals) {
            Ok(process) => probed.push(process),
            Err(error) => passed_over(pid.get(), error),
        }
    }
    if probed.is_empty() {
        bail!("no process that maps {} can be traced", printable(library));
    }
    for process in &mut probed {
        let capture = &mut process.capture;
        let exe = capture.targets.main.exe().unwrap_or_default();
        let exe = printable(exe.as_ref());
        say!("process {} ({exe}) is traced", capture.pid);
        capture.heading = format!("\nProcess {} ({exe}):", capture.pid);
        capture.start()?;
    }
    probed[0].capture.announce();

    let duration = arguments.duration;
    let local = LocalSet::new();
    let results = local.run_until(async {
        let mut captures = JoinSet::new();
        for process in probed {
            let pid = process.capture.pid;
            captures.spawn_local(async move { (pid, process.trace(duration).await) });
        }
        captures.join_all().await
    });
    let mut failed = 0;
    for (pid, result) in results.await {
        match result {
            Ok(complete) => all_seen &= complete,
            Err(error) => {
                say!("error: process {pid}: {error:#}");
                failed += 1;
            }
        }
    }
    if failed > 0 {
        bail!("{failed} captures could not be written");
    }
    Ok(all_seen)
}

fn users_of(library: &Path) -> anyhow::Result<Users> {
    let shown = printable(library);
    let file = open_regular(library).with_context(|| format!("cannot read {shown}"))?;
    let mut plan = Plan::default();
    plan.add_file(&file, library, library)
        .with_context(|| format!("cannot read {shown}"))?;
    if plan.of_llama_cpp().is_none() {
        bail!(
            "{shown} defines none of the functions that show what llama.cpp does; name the \
             libggml-cpu.so that the processes map, or the program that has it built in"
        );
    }
    let users = users::of(&file, library).context("cannot list the processes")?;
    if users.pids.is_empty() {
        let mut text = format!("none of {} processes maps {shown}", users.looked_at);
        for (pid, path) in users.namesakes.iter().take(SHOWN) {
            let path = printable(path);
            let _ = write!(
                text,
                "\n  process {pid} maps another file of that name: {path}; it is \
                 /proc/{pid}/root{path} here"
            );
        }
        if !users.hidden.is_empty() {
            let _ = write!(text, "\n  {}", hidden(&users));
        }
        bail!(text);
    }
    Ok(users)
}

fn hidden(users: &Users) -> String {
    let names = users.hidden.iter().map(|pid| {
        let name = target::name(*pid).unwrap_or_default();
        format!("{pid} ({name})")
    });
    format!(
        "{} processes may not be looked at, which takes CAP_SYS_PTRACE (sudo): {}",
        users.hidden.len(),
        list(names)
    )
}

fn list(items: impl ExactSizeIterator<Item = String>) -> String {
    let more = items.len().saturating_sub(SHOWN);
    let mut text = items.take(SHOWN).collect::<Vec<_>>().join(", ");
    if more > 0 {
        let _ = write!(text, " and {more} more");
    }
    text
}

/// Each process takes some dozens of descriptors; shells allow a thousand, and the system more.
fn allow_many_descriptors() {
    // SAFETY: the structure is made of integers, and the calls take its address.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}
