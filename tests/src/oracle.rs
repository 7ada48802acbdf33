//! Drives `tests/oracle/oracle.cpp`: a program on libllama that decodes what it is told to, and can
//! dump the experts that were used. Its commands are described at the top of its source.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result, ensure};

use crate::lines::Lines;
use crate::tracer::Counts;

/// A running oracle, waiting for commands. Dropping it ends the process.
pub struct Oracle {
    lines: Lines,
    pid: u32,
}

impl Oracle {
    /// A command line that loads `model`, for the caller to add options, environment or working
    /// directory.
    pub fn command_line(program: &Path, model: &Path) -> Command {
        let mut command = Command::new(program);
        command.arg("-m").arg(model);
        command
    }

    /// Starts `command_line`, and returns when the model is loaded. The command may also be another
    /// program that starts the oracle with its own standard input and output.
    ///
    /// # Errors
    ///
    /// If the process cannot be started, ends, or is not ready within two minutes. Its standard
    /// error, inherited unless the caller set it, says why.
    pub fn spawn(command_line: &mut Command) -> Result<Oracle> {
        let mut lines = Lines::spawn(command_line)?;
        let line = lines.line()?;
        let pid = line.strip_prefix("ready ").and_then(|pid| pid.parse().ok());
        let pid = pid.with_context(|| format!("expected `ready <pid>`, got {line:?}"))?;
        Ok(Oracle { lines, pid })
    }

    /// Process id of the oracle itself, as seen in its PID namespace.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends a command and returns what follows `ok` in its answer.
    ///
    /// # Errors
    ///
    /// If the oracle answers `error`, ends, or takes more than two minutes.
    pub fn command(&mut self, command: &str) -> Result<String> {
        self.send(command)?;
        let line = self.line()?;
        let rest = line.strip_prefix("ok");
        let rest = rest.with_context(|| format!("{command:?}: {line}"))?;
        Ok(rest.trim_start().to_owned())
    }

    /// Makes a copy that has decoded nothing and shares the weights in memory. It ends by itself when it
    /// is dropped.
    ///
    /// # Errors
    ///
    /// If this one has decoded something, or the copy cannot be made.
    pub fn copy(&mut self, threads: usize, callback: Callback) -> Result<Oracle> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path)?;
        let command = format!("fork {} {threads} {}", path.display(), callback.name());
        let pid = self.command(&command)?.parse()?;
        let (stream, _) = listener.accept()?;
        let mut lines = Lines::over(stream)?;
        let answer = lines.line()?;
        ensure!(answer == format!("ok {pid}"), "{command:?}: {answer}");
        Ok(Oracle { lines, pid })
    }

    /// What the eval callback has counted.
    ///
    /// # Errors
    ///
    /// As [`Oracle::command`].
    pub fn counts(&mut self) -> Result<Counts> {
        let mut counts = Counts::new();
        for count in self.command("counts")?.split_whitespace() {
            let (layer, id, n) =
                parse_count(count).with_context(|| format!("no count of an expert: {count:?}"))?;
            counts.entry(layer).or_default().insert(id, n);
        }
        Ok(counts)
    }

    /// Makes the oracle wait with its work for a reader that is a page of output behind.
    ///
    /// # Errors
    ///
    /// If the pipe cannot be made smaller.
    pub fn wait_for_reader(&self) -> Result<()> {
        self.lines.wait_for_reader()
    }

    /// Ends the oracle, and waits for the command that started it.
    pub fn quit(mut self) -> Result<ExitStatus> {
        self.command("quit")?;
        self.wait()
    }

    /// Waits for the end of the command that started the oracle, which something else brings about.
    pub fn wait(self) -> Result<ExitStatus> {
        self.lines.wait()
    }

    /// Sends a command without waiting; its answer has to be read with [`Oracle::line`].
    pub fn send(&mut self, command: &str) -> Result<()> {
        self.lines.send(command)
    }

    /// Reads the next line of output, such as a token of `stream`, without its line feed.
    ///
    /// # Errors
    ///
    /// If the oracle ends, or writes no whole line within two minutes.
    pub fn line(&mut self) -> Result<String> {
        self.lines.line()
    }
}

/// The eval callback of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Callback {
    /// None, as in a program in the field.
    None,
    /// Counts the ids of `ffn_moe_topk-<layer>`.
    TopK,
    /// Counts the ids at each MUL_MAT_ID: three times, for gate, up and down.
    MulMatId,
}

impl Callback {
    fn name(self) -> &'static str {
        match self {
            Callback::None => "none",
            Callback::TopK => "topk",
            Callback::MulMatId => "mul-mat-id",
        }
    }
}

/// The experts used for one row, a token, in one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DumpRow {
    /// Counts evaluated micro-batches from 0, over all contexts.
    pub pass: u64,
    /// Layer of the model.
    pub layer: u32,
    /// Position in the micro-batch; in the last layer, among the tokens whose logits were asked for.
    pub row: u32,
    /// Expert ids in router order.
    pub ids: Vec<u32>,
}

/// Reads what the oracle wrote with `--dump`. Complete up to the last answered command.
pub fn read_dump(path: &Path) -> Result<Vec<DumpRow>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    text.lines()
        .map(|line| parse_row(line).with_context(|| format!("no row of a dump: {line:?}")))
        .collect()
}

/// The router's weights of the experts of one row, as [`DumpRow`] has their ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightsRow {
    /// Counts evaluated micro-batches from 0, over all contexts.
    pub pass: u64,
    /// Layer of the model.
    pub layer: u32,
    /// Whether they are of the layer's second block of experts.
    pub second: bool,
    /// Position in the micro-batch; in the last layer, among the tokens whose logits were asked for.
    pub row: u32,
    /// The bits of each `f32`, in router order.
    pub bits: Vec<u32>,
}

/// Reads what the oracle wrote with `--dump-weights`. Complete up to the last answered command.
pub fn read_weights(path: &Path) -> Result<Vec<WeightsRow>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    text.lines()
        .map(|line| parse_weights(line).with_context(|| format!("no row of weights: {line:?}")))
        .collect()
}

fn parse_weights(line: &str) -> Option<WeightsRow> {
    let mut fields = line.split(' ');
    Some(WeightsRow {
        pass: fields.next()?.parse().ok()?,
        layer: fields.next()?.parse().ok()?,
        second: fields.next()? == "1",
        row: fields.next()?.parse().ok()?,
        bits: fields
            .map(|bits| u32::from_str_radix(bits, 16).ok())
            .collect::<Option<_>>()?,
    })
}

fn parse_count(count: &str) -> Option<(u32, u32, u64)> {
    let mut fields = count.split(':');
    Some((
        fields.next()?.parse().ok()?,
        fields.next()?.parse().ok()?,
        fields.next()?.parse().ok()?,
    ))
}

fn parse_row(line: &str) -> Option<DumpRow> {
    let mut fields = line.split(' ');
    Some(DumpRow {
        pass: fields.next()?.parse().ok()?,
        layer: fields.next()?.parse().ok()?,
        row: fields.next()?.parse().ok()?,
        ids: fields.map(|id| id.parse().ok()).collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stand-in that speaks the protocol.
    fn shell(script: &str) -> Result<Oracle> {
        Oracle::spawn(Command::new("sh").arg("-c").arg(script))
    }

    #[test]
    fn commands_get_their_answers() {
        let mut oracle = shell("echo ready $$; read a; echo ok 5; read b; echo error bad; read c")
            .expect("a shell");
        assert_eq!(Some(oracle.pid()), oracle.lines.pid());
        assert_eq!(oracle.command("decode 0 1").unwrap(), "5");
        let error = oracle.command("nonsense").unwrap_err();
        assert_eq!(error.to_string(), "\"nonsense\": error bad");
    }

    #[test]
    fn an_oracle_that_ends_is_an_error() {
        assert!(shell("exit 1").is_err());
        assert!(shell("echo hello").is_err());
    }

    #[test]
    fn reads_counts() {
        let mut oracle = shell("echo ready $$; read a; echo ok 0:7:2 1:3:1; read b; echo ok 0:7");
        let oracle = oracle.as_mut().expect("a shell");
        let expected = [(0, [(7, 2)].into()), (1, [(3, 1)].into())].into();
        assert_eq!(oracle.counts().unwrap(), expected);
        assert!(oracle.counts().is_err());
    }

    #[test]
    fn reads_dump_rows() {
        let row = parse_row("3 1 0 7 2").unwrap();
        assert_eq!((row.pass, row.layer, row.row), (3, 1, 0));
        assert_eq!(row.ids, [7, 2]);
        assert_eq!(parse_row("3 1"), None);
        assert_eq!(parse_row("3 1 0 -1"), None);
    }
}
