//! Attaching to all processes that map a library, each with a capture of its own.

use std::{fmt::Write as _, path::Path};

use anyhow::{Context as _, bail};
use tokio::task::{JoinSet, LocalSet};

use super::attach::{Loaded, Probed, Signals, wanted};
use crate::{
    caller::Account,
    cli::{Attach, Recording},
    diagnosis::Untraceable,
    doctor::Refusal,
    probes::{Mapper, Plan},
    requirements::{self, Capability},
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
    if let Some(refusal) = refused(library, &users, &arguments.recording) {
        bail!("{}; {}", refusal.why, refusal.fix);
    }
    allow_many_descriptors();
    let mut all_seen = true;
    warn_of_hidden(&users);
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

/// Why captures of all of them would not be kept apart.
pub(super) fn refused(library: &Path, users: &Users, recording: &Recording) -> Option<Refusal> {
    if users.pids.len() < 2 || wanted(recording).tells_processes_apart(recording) {
        return None;
    }
    Some(Refusal {
        why: format!(
            "{} processes map {} ({}), and would write to one place",
            users.pids.len(),
            printable(library),
            list(users.pids.iter().map(|pid| pid.to_string()))
        ),
        fix: "name a file for each with %p, the process id: -o stats-%p.json, --log=routes-%p.log",
    })
}

/// Says which processes may use the library, too, and are not traced.
pub(super) fn warn_of_hidden(users: &Users) {
    if !users.hidden.is_empty() {
        say!("warning: {}", hidden(users));
    }
}

pub(super) fn users_of(library: &Path) -> anyhow::Result<Users> {
    let shown = printable(library);
    let file = open_regular(library).with_context(|| format!("cannot read {shown}"))?;
    let mut plan = Plan::default();
    plan.add_file(&file, library, library, Mapper::UNKNOWN)
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
        for namesake in users.namesakes.iter().take(SHOWN) {
            let pid = namesake.pid;
            let (path, here) = (printable(&namesake.path), printable(&namesake.reachable));
            let _ = match namesake.deleted {
                true => write!(
                    text,
                    "\n  process {pid} maps a file that was there before, and has been replaced or \
                     deleted: {path}; it is {here} here, or trace the process alone: attach --pid {pid}"
                ),
                false => write!(
                    text,
                    "\n  process {pid} maps another file of that name: {path}; it is {here} here"
                ),
            };
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
    let processes = match users.hidden.len() {
        1 => "1 process".to_owned(),
        number => format!("{number} processes"),
    };
    let why = match requirements::has(Capability::SysPtrace) {
        true => {
            "in spite of CAP_SYS_PTRACE: call expert-trace on the host, outside of any container"
        }
        false => "which takes CAP_SYS_PTRACE (sudo)",
    };
    let names = list(names);
    format!("{processes} may not be looked at, {why}: {names}")
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
