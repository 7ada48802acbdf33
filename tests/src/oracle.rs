//! Drives `tests/oracle/oracle.cpp`: a program on libllama that decodes what it is told to, and can
//! dump the experts that were used. Its commands are described at the top of its source.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Longest wait for one line, far above what any command takes on a busy machine.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);
/// Longest wait for the process to end once its input is closed.
const EXIT_LIMIT: Duration = Duration::from_secs(10);

/// A running oracle, waiting for commands. Dropping it ends the process.
pub struct Oracle {
    child: Child,
    /// `None` only while being dropped.
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
    received: VecDeque<u8>,
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
        let mut child = command_line
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {command_line:?}"))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("no standard output")?;
        let mut oracle = Oracle {
            child,
            stdin,
            stdout,
            received: VecDeque::new(),
            pid: 0,
        };
        let line = oracle.line()?;
        let pid = line.strip_prefix("ready ").and_then(|pid| pid.parse().ok());
        oracle.pid = pid.with_context(|| format!("expected `ready <pid>`, got {line:?}"))?;
        Ok(oracle)
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

    /// Makes the oracle wait with its work for a reader that is a page of output behind.
    ///
    /// # Errors
    ///
    /// If the pipe cannot be made smaller.
    pub fn wait_for_reader(&self) -> Result<()> {
        fcntl(&self.stdout, FcntlArg::F_SETPIPE_SZ(4096))?;
        Ok(())
    }

    /// Ends the oracle, and waits for the command that started it.
    pub fn quit(mut self) -> Result<ExitStatus> {
        self.command("quit")?;
        self.wait()
    }

    /// Waits for the end of the command that started the oracle, which something else brings about.
    pub fn wait(mut self) -> Result<ExitStatus> {
        Ok(self.child.wait()?)
    }

    /// Sends a command without waiting; its answer has to be read with [`Oracle::line`].
    pub fn send(&mut self, command: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("standard input is closed")?;
        stdin
            .write_all(format!("{command}\n").as_bytes())
            .with_context(|| format!("send {command:?}"))
    }

    /// Reads the next line of output, such as a token of `stream`, without its line feed.
    ///
    /// # Errors
    ///
    /// If the oracle ends, or writes no whole line within two minutes.
    pub fn line(&mut self) -> Result<String> {
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.received.drain(..=end).collect();
                line.pop();
                return Ok(String::from_utf8(line)?);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(self.stdout.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(left)?;
            if poll(&mut fds, timeout)? == 0 {
                bail!("no answer from the oracle within {ANSWER_LIMIT:?}");
            }
            let mut buf = [0; 4096];
            let n = self.stdout.read(&mut buf)?;
            ensure!(n > 0, "the oracle ended");
            self.received.extend(&buf[..n]);
        }
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        // The end of its input ends the oracle.
        self.stdin = None;
        let deadline = Instant::now() + EXIT_LIMIT;
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
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
        assert_eq!(oracle.pid(), oracle.child.id());
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
    fn reads_dump_rows() {
        let row = parse_row("3 1 0 7 2").unwrap();
        assert_eq!((row.pass, row.layer, row.row), (3, 1, 0));
        assert_eq!(row.ids, [7, 2]);
        assert_eq!(parse_row("3 1"), None);
        assert_eq!(parse_row("3 1 0 -1"), None);
    }
}
