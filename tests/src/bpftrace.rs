//! Scripts of bpftrace, next to which the tracer is measured.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::breakpoints::{self, Mapping, Places};
use crate::tracer::Counts;

/// Counts as the tracer does, on a CPU.
const COUNT: &str = include_str!("../oracle/count.bt");
/// An empty program at what every thread calls for every node of a graph.
const EVERY_NODE: &str = "uprobe:LIBRARY:ggml_cpu_extra_compute_forward { }";
/// The same, with a counter.
const COUNT_NODES: &str = "uprobe:LIBRARY:ggml_cpu_extra_compute_forward { @hits = count(); }";

/// Far above what bpftrace takes to compile a script.
const START_LIMIT: Duration = Duration::from_secs(60);
/// The same of removing its probe and printing its maps.
const END_LIMIT: Duration = Duration::from_secs(30);

/// Begins the name of the library that is probed.
const LIBRARY: &str = "libggml-cpu";

/// What is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Script {
    /// Activations by layer and expert.
    Count,
    /// Nothing, for every node of a graph on every thread.
    EveryNode,
    /// The number of those hits.
    CountNodes,
}

impl Script {
    fn text(self) -> &'static str {
        match self {
            Script::Count => COUNT,
            Script::EveryNode => EVERY_NODE,
            Script::CountNodes => COUNT_NODES,
        }
    }

    /// What it probes.
    fn function(self) -> &'static str {
        match self {
            Script::Count => "ggml_compute_forward_get_rows",
            Script::EveryNode | Script::CountNodes => breakpoints::EVERY_NODE,
        }
    }
}

/// A running script. bpftrace of Debian 12 sets its probes in all processes that map the library.
pub struct Running {
    child: Child,
    stdout: File,
    stderr: File,
}

impl Running {
    /// Runs a script on the libggml-cpu of a process; returns when its breakpoint is there. Gives
    /// nothing where another tracer has its own at that place: the script's could not be told from it.
    ///
    /// # Errors
    ///
    /// If bpftrace is missing, or ends.
    pub fn on(pid: u32, script: Script) -> Result<Option<Running>> {
        let mut mappings = Mapping::all(pid)?.into_iter();
        let library = mappings
            .find(|mapping| mapping.file_name().starts_with(LIBRARY))
            .with_context(|| format!("process {pid} maps no {LIBRARY}"))?
            .path;
        let place = Places::of(pid, LIBRARY, &[script.function()])?;
        if place.are_probed(pid)? {
            return Ok(None);
        }
        let (stdout, stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
        let child = Command::new("bpftrace")
            .args(["-e", &script.text().replace("LIBRARY", &library)])
            .stdout(stdout.try_clone()?)
            .stderr(stderr.try_clone()?)
            .spawn()
            .context("bpftrace cannot be run: `cargo xtask test` installs it")?;
        let mut running = Running {
            child,
            stdout,
            stderr,
        };
        let deadline = Instant::now() + START_LIMIT;
        // It says nothing when it is ready.
        while !place.are_probed(pid)? {
            if running.child.try_wait()?.is_some() {
                bail!("bpftrace ended: {}", text(&mut running.stderr)?);
            }
            ensure!(Instant::now() < deadline, "bpftrace sets no probe");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Some(running))
    }

    /// Ends it as Ctrl-C does, and gives what it prints.
    ///
    /// # Errors
    ///
    /// If it fails.
    pub fn end(mut self) -> Result<String> {
        let pid = Pid::from_raw(self.child.id() as i32);
        let deadline = Instant::now() + END_LIMIT;
        let status = loop {
            // bpftrace only notices a signal that interrupts its waiting. Once it has, the next one
            // would end it before it has printed anything.
            if catches_sigint(self.child.id())? {
                kill(pid, Signal::SIGINT)?;
            }
            std::thread::sleep(Duration::from_millis(20));
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(Instant::now() < deadline, "bpftrace does not end");
        };
        let said = text(&mut self.stderr)?;
        ensure!(status.success(), "bpftrace ended with {status}: {said}");
        text(&mut self.stdout)
    }
}

fn catches_sigint(pid: u32) -> Result<bool> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mut lines = status.lines();
    let mask = lines.find_map(|line| line.strip_prefix("SigCgt:"));
    // A process that has ended, and was not waited for, has none.
    let mask = u64::from_str_radix(mask.unwrap_or("0").trim(), 16)?;
    Ok(mask & (1 << (Signal::SIGINT as i32 - 1)) != 0)
}

/// What was written to a file that another process writes to, too.
fn text(file: &mut File) -> Result<String> {
    let mut text = String::new();
    file.rewind()?;
    file.read_to_string(&mut text)?;
    Ok(text)
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The activations that [`Script::Count`] prints.
///
/// # Errors
///
/// If some were lost.
pub fn counts(printed: &str) -> Result<Counts> {
    let mut counts = Counts::new();
    for line in printed.lines() {
        ensure!(!line.starts_with("@lost"), "too many ids: {line}");
        let Some(count) = line.strip_prefix("@counts[") else {
            continue;
        };
        let (layer, id, n) =
            parse_count(count).with_context(|| format!("no count of an expert: {line:?}"))?;
        counts.entry(layer).or_default().insert(id, n);
    }
    Ok(counts)
}

fn parse_count(count: &str) -> Option<(u32, u32, u64)> {
    let (key, n) = count.split_once("]: ")?;
    let (layer, id) = key.split_once(", ")?;
    Some((layer.parse().ok()?, id.parse().ok()?, n.parse().ok()?))
}

/// The hits that [`Script::CountNodes`] prints.
///
/// # Errors
///
/// If there is no number.
pub fn hits(printed: &str) -> Result<u64> {
    let hits = printed
        .lines()
        .find_map(|line| line.strip_prefix("@hits: "));
    let hits = hits.with_context(|| format!("bpftrace printed no hits: {printed:?}"))?;
    Ok(hits.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_scripts_print() {
        let printed = "Attaching 1 probe...\n\n\n@counts[0, 7]: 2\n@counts[12, 31]: 5\n";
        let expected = [(0, [(7, 2)].into()), (12, [(31, 5)].into())].into();
        assert_eq!(counts(printed).unwrap(), expected);
        assert!(counts("@lost: 5\n").is_err());
        assert!(counts("@counts[0]: 5\n").is_err());
        assert_eq!(hits("Attaching 1 probe...\n\n\n@hits: 31\n").unwrap(), 31);
        assert!(hits("").is_err());
    }
}
