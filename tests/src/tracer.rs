//! Runs the expert-trace under test, and reads what it wrote.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::error::Error;
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Variable by which `cargo xtask test` names the program under test.
pub const BIN: &str = "EXPERT_TRACE_TEST_BIN";

/// What the tracer prints once its probes are in place.
const READY: &str = "Expert tracing enabled";

/// The program under test.
pub fn program() -> Result<PathBuf> {
    let path =
        env::var_os(BIN).with_context(|| format!("{BIN} is not set: run `cargo xtask test`"))?;
    Ok(path.into())
}

/// Variable with the path of the program that was built without what traces.
pub const OFFLINE_BIN: &str = "EXPERT_TRACE_TEST_OFFLINE_BIN";

/// The program that was built without what traces.
pub fn offline_program() -> Result<PathBuf> {
    let path = env::var_os(OFFLINE_BIN);
    let path = path.with_context(|| format!("{OFFLINE_BIN} is not set: run `cargo xtask test`"))?;
    Ok(path.into())
}

/// A command line of the [`program`] without arguments, as it is called without `sudo`.
pub fn command() -> Result<Command> {
    let mut tracer = Command::new(program()?);
    without_sudo(&mut tracer);
    Ok(tracer)
}

/// Takes the traces of a `sudo` that started the tests from a command's environment: the tracer acts
/// on them.
pub fn without_sudo(command: &mut Command) {
    for (name, _) in env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"SUDO_") {
            command.env_remove(name);
        }
    }
}

/// `expert-trace run OPTIONS -- COMMAND`.
pub fn run<S: AsRef<OsStr>>(options: &[S], command: &Command) -> Result<Command> {
    let mut tracer = self::command()?;
    tracer.arg("run").args(options).arg("--");
    tracer.arg(command.get_program()).args(command.get_args());
    Ok(tracer)
}

/// A tracer that ended before its probes were in place.
#[derive(Debug)]
pub struct Refusal {
    pub status: ExitStatus,
    pub said: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { status, said } = self;
        write!(f, "expert-trace attach ended with {status}: {said}")
    }
}

impl Error for Refusal {}

/// A tracer attached to a live process.
pub struct Attached {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Attached {
    /// `expert-trace attach --pid PID OPTIONS`; returns when its probes are in place.
    ///
    /// # Errors
    ///
    /// If it cannot attach; a [`Refusal`] if it says why not.
    pub fn to<S: AsRef<OsStr>>(pid: u32, options: &[S]) -> Result<Attached> {
        let mut command = command()?;
        command.args(["attach", "--pid", &pid.to_string()]);
        Self::by(command.args(options))
    }

    /// A command that attaches, or has the tracer do so; returns when its probes are in place.
    ///
    /// # Errors
    ///
    /// If it cannot attach; a [`Refusal`] if it says why not.
    pub fn by(command: &mut Command) -> Result<Attached> {
        let mut child = command.stderr(Stdio::piped()).spawn()?;
        let mut stderr = BufReader::new(child.stderr.take().context("no stderr")?);
        let mut said = String::new();
        while !said.lines().last().unwrap_or_default().contains(READY) {
            if stderr.read_line(&mut said)? == 0 {
                let status = child.wait()?;
                bail!(Refusal { status, said });
            }
        }
        Ok(Attached { child, stderr })
    }

    /// Reads what it says until a line contains `text`.
    ///
    /// # Errors
    ///
    /// If it ends before.
    pub fn wait_for(&mut self, text: &str) -> Result<()> {
        let mut said = String::new();
        while !said.lines().last().unwrap_or_default().contains(text) {
            ensure!(self.stderr.read_line(&mut said)? > 0, "it ended: {said}");
        }
        Ok(())
    }

    /// Its process, or that of the command that has it attach.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id() as i32), signal)?)
    }

    /// Ends it as Ctrl-C does, and gives what it said after it was ready.
    pub fn interrupt(self) -> Result<String> {
        self.signal(Signal::SIGINT)?;
        let (status, said) = self.wait()?;
        ensure!(status.success(), "expert-trace ended with {status}: {said}");
        Ok(said)
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Result<(ExitStatus, String)> {
        let mut said = String::new();
        self.stderr.read_to_string(&mut said)?;
        Ok((self.child.wait()?, said))
    }
}

/// Activations by layer and expert.
pub type Counts = BTreeMap<u32, BTreeMap<u32, u64>>;

/// A document that `-o` wrote.
#[derive(Debug)]
pub struct Stats(pub Value);

impl Stats {
    /// Reads it.
    pub fn read(path: &Path) -> Result<Stats> {
        let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        Ok(Stats(serde_json::from_slice(&text)?))
    }

    /// A number, by JSON pointer.
    pub fn number(&self, pointer: &str) -> u64 {
        self.0
            .pointer(pointer)
            .and_then(Value::as_u64)
            .unwrap_or_else(|| panic!("no number at {pointer} of {:#}", self.0))
    }

    /// The counts of `layers`, which are also checked against each other.
    pub fn counts(&self) -> Counts {
        counts(&self.0["layers"])
    }

    /// The counts of a context.
    pub fn context_counts(&self, id: usize) -> Counts {
        counts(&self.0["contexts"][id]["layers"])
    }

    /// Tokens of each layer.
    pub fn tokens(&self) -> BTreeMap<u32, u64> {
        list(&self.0["layers"])
            .iter()
            .map(|layer| (id(layer, "layer_id"), number(layer, "total_tokens")))
            .collect()
    }

    /// Fails unless the kernel's counters and ours add up and nothing was lost.
    pub fn assert_complete(&self) {
        let integrity = &self.0["integrity"];
        assert_eq!(integrity["complete"], true, "{integrity:#}");
        for flow in ["events", "rows"] {
            let seen = self.number(&format!("/integrity/{flow}/seen"));
            assert_eq!(seen, self.number(&format!("/integrity/{flow}/emitted")));
            assert_eq!(seen, self.number(&format!("/integrity/received/{flow}")));
        }
    }

    /// The routes by which rows of any layer came, in alphabetical order.
    pub fn routes(&self) -> Vec<String> {
        let layers = list(&self.0["contexts"])
            .iter()
            .flat_map(|context| list(&context["layers"]));
        let routes = layers
            .flat_map(|layer| list(&layer["routes"]))
            .filter_map(Value::as_str);
        let routes: BTreeSet<&str> = routes.collect();
        routes.into_iter().map(str::to_owned).collect()
    }

    /// Passes left out for this reason, and their tokens.
    pub fn excluded(&self, kind: &str) -> (u64, u64) {
        list(&self.0["excluded"])
            .iter()
            .find(|excluded| excluded["kind"] == kind)
            .map_or((0, 0), |excluded| {
                (number(excluded, "passes"), number(excluded, "tokens"))
            })
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn number(value: &Value, key: &str) -> u64 {
    value[key]
        .as_u64()
        .unwrap_or_else(|| panic!("no number {key} in {value:#}"))
}

fn id(value: &Value, key: &str) -> u32 {
    u32::try_from(number(value, key)).expect("a small id")
}

fn counts(layers: &Value) -> Counts {
    list(layers)
        .iter()
        .map(|layer| {
            let experts = list(&layer["experts"])
                .iter()
                .map(|expert| (id(expert, "expert_id"), number(expert, "activations")));
            (id(layer, "layer_id"), experts.collect())
        })
        .collect()
}

/// Rows as `--log` printed them: layer and expert ids, in order. Those of second blocks are not among them.
pub fn read_log(path: &Path) -> Result<Vec<(u32, Vec<u32>)>> {
    read_rows(path, |line| !line.contains(SECOND_BLOCK))
}

/// The same of second blocks alone.
pub fn read_second_log(path: &Path) -> Result<Vec<(u32, Vec<u32>)>> {
    read_rows(path, |line| line.contains(SECOND_BLOCK))
}

const SECOND_BLOCK: &str = ", second block: ";

fn read_rows(path: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<(u32, Vec<u32>)>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    text.lines()
        .filter(|line| !line.ends_with("MoE layer detected (tensor 'ffn_moe_topk')"))
        .filter(|line| wanted(line))
        .map(|line| parse_row(line).with_context(|| format!("not a row: {line:?}")))
        .collect()
}

fn parse_row(line: &str) -> Option<(u32, Vec<u32>)> {
    let (layer, ids) = line
        .strip_prefix("[EXPERT-TRACE] Layer ")?
        .strip_suffix(']')?
        .split_once(": Experts [")?;
    let layer = layer.strip_suffix(", second block").unwrap_or(layer);
    let ids: Result<_, _> = ids.split(", ").map(str::parse).collect();
    Some((layer.parse().ok()?, ids.ok()?))
}

/// Counts rows.
pub fn count<'a>(rows: impl IntoIterator<Item = (u32, &'a [u32])>) -> Counts {
    let mut counts = Counts::new();
    for (layer, ids) in rows {
        let layer = counts.entry(layer).or_default();
        for id in ids {
            *layer.entry(*id).or_default() += 1;
        }
    }
    counts
}
