//! A process that is told what to do on its standard input, and answers on its standard output, line by
//! line.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Longest wait for one line, far above what any command takes on a busy machine.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);
/// Longest wait for the process to end once its input is closed.
const EXIT_LIMIT: Duration = Duration::from_secs(10);

/// Such a process. Dropping it ends it.
pub struct Lines {
    /// `None` when it is not a child of ours.
    child: Option<Child>,
    /// `None` once it is closed.
    stdin: Option<File>,
    stdout: File,
    received: VecDeque<u8>,
}

impl Lines {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub fn spawn(command_line: &mut Command) -> Result<Lines> {
        let mut child = command_line
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {command_line:?}"))?;
        let stdin = child.stdin.take().context("no standard input")?;
        let stdout = child.stdout.take().context("no standard output")?;
        Ok(Lines {
            child: Some(child),
            stdin: Some(OwnedFd::from(stdin).into()),
            stdout: OwnedFd::from(stdout).into(),
            received: VecDeque::new(),
        })
    }

    /// Talks to a process that somebody else has started.
    ///
    /// # Errors
    ///
    /// If there are no more file descriptors.
    pub fn over(stream: UnixStream) -> Result<Lines> {
        Ok(Lines {
            child: None,
            stdin: Some(OwnedFd::from(stream.try_clone()?).into()),
            stdout: OwnedFd::from(stream).into(),
            received: VecDeque::new(),
        })
    }

    /// The process that was started here.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Makes the process wait with its work for a reader that is a page of output behind.
    ///
    /// # Errors
    ///
    /// If the pipe cannot be made smaller.
    pub fn wait_for_reader(&self) -> Result<()> {
        fcntl(&self.stdout, FcntlArg::F_SETPIPE_SZ(4096))?;
        Ok(())
    }

    /// Sends a line without waiting for an answer.
    ///
    /// # Errors
    ///
    /// If the process reads no more.
    pub fn send(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("standard input is closed")?;
        stdin
            .write_all(format!("{line}\n").as_bytes())
            .with_context(|| format!("send {line:?}"))
    }

    /// Reads the next line of output, without its line feed.
    ///
    /// # Errors
    ///
    /// If the process ends, or writes no whole line within two minutes.
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
                bail!("no answer within {ANSWER_LIMIT:?}");
            }
            let mut buf = [0; 4096];
            let n = self.stdout.read(&mut buf)?;
            ensure!(n > 0, "the process ended");
            self.received.extend(&buf[..n]);
        }
    }

    /// Closes the process' standard input.
    pub fn close(&mut self) {
        self.stdin = None;
    }

    /// Waits for the end of the process, which something else brings about.
    ///
    /// # Errors
    ///
    /// If it was not started here.
    pub fn wait(mut self) -> Result<ExitStatus> {
        let child = self.child.as_mut().context("it is no child of ours")?;
        Ok(child.wait()?)
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        // The end of its input ends it.
        self.close();
        let Some(child) = &mut self.child else { return };
        let deadline = Instant::now() + EXIT_LIMIT;
        while let Ok(None) = child.try_wait() {
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
