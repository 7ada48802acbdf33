//! A pseudo-terminal with a program in it, driven as a person drives a terminal: type, press Ctrl
//! and a letter, wait for words to appear.
//!
//! Job control, Ctrl-C and Ctrl-Z are the work of the kernel's terminal driver and of the shell.
//! They can be tested in a terminal only, not with signals sent to one process.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, Uid, chown, setsid};

/// Longest wait for anything, far above what it takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A program whose controlling terminal is ours. Dropping it ends the program's process group; what
/// else reads from the terminal finds it hung up.
pub struct Terminal {
    child: Child,
    master: PtyMaster,
    /// All that was shown.
    shown: Vec<u8>,
    /// Where in it the last text that was expected ends.
    expected: usize,
    /// Nothing has the other side open any more.
    closed: bool,
}

impl Terminal {
    /// Starts a program in a terminal that belongs to `owner`, as after a login. The program leads a
    /// session of its own, and the terminal is its standard input, output and error.
    ///
    /// # Errors
    ///
    /// If the system has no pseudo-terminal to give, or the program cannot be started.
    pub fn spawn(mut command: Command, owner: Uid) -> Result<Terminal> {
        // Close-on-exec from the start: a child that had the master would keep it open for ever.
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let master = posix_openpt(flags).context("open a pseudo-terminal")?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname_r(&master)?;
        chown(name.as_str(), Some(owner), None).with_context(|| format!("chown {name}"))?;
        let slave = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_NOCTTY.bits())
            .open(&name)
            .with_context(|| format!("open {name}"))?;
        command.stdin(slave.try_clone()?);
        command.stdout(slave.try_clone()?);
        command.stderr(slave);
        // SAFETY: `take_terminal` makes system calls only.
        unsafe { command.pre_exec(take_terminal) };
        let child = command
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        // The command is dropped here, and with it our side of the child's terminal.
        Ok(Terminal {
            child,
            master,
            shown: Vec::new(),
            expected: 0,
            closed: false,
        })
    }

    /// Types.
    pub fn send(&mut self, keys: &str) -> Result<()> {
        self.master
            .write_all(keys.as_bytes())
            .with_context(|| format!("type {keys:?}"))
    }

    /// Presses Ctrl and a letter.
    pub fn send_control(&mut self, letter: char) -> Result<()> {
        ensure!(letter.is_ascii_alphabetic(), "there is no Ctrl-{letter}");
        let key = letter.to_ascii_uppercase() as u8 & 0x1f;
        self.master
            .write_all(&[key])
            .with_context(|| format!("press Ctrl-{letter}"))
    }

    /// Reads until `text` is shown, and returns what was shown since the last text expected, `text`
    /// included. A terminal shows what is typed, too, unless it was told not to (`stty -echo`).
    ///
    /// # Errors
    ///
    /// If it is not shown within a minute, or all programs in the terminal end before. The error holds
    /// all that was shown.
    pub fn expect(&mut self, text: &str) -> Result<String> {
        Ok(self.expect_either(&[text])?.1)
    }

    /// As [`Terminal::expect`], for the first of several texts to be shown; also gives its index.
    ///
    /// # Errors
    ///
    /// As [`Terminal::expect`].
    pub fn expect_either(&mut self, texts: &[&str]) -> Result<(usize, String)> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let new = &self.shown[self.expected..];
            let ends = texts.iter().enumerate().filter_map(|(index, text)| {
                let at = find(new, text.as_bytes())?;
                Some((at + text.len(), index))
            });
            if let Some((end, index)) = ends.min() {
                let shown = lossy(&new[..end]);
                self.expected += end;
                return Ok((index, shown));
            }
            if self.closed {
                bail!("{texts:?} was not shown before the end: {}", self.all());
            }
            let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, left(deadline)?)? == 0 {
                bail!("{texts:?} was not shown within {LIMIT:?}: {}", self.all());
            }
            self.receive()?;
        }
    }

    /// Waits for the program's end, reading on. Returns how it ended, and what was shown since the
    /// last text expected.
    ///
    /// # Errors
    ///
    /// If it does not end within a minute. The error holds all that was shown.
    pub fn wait(mut self) -> Result<(ExitStatus, String)> {
        let deadline = Instant::now() + LIMIT;
        let end = end_of(&self.child)?;
        loop {
            let mut fds = vec![PollFd::new(end.as_fd(), PollFlags::POLLIN)];
            if !self.closed {
                fds.push(PollFd::new(self.master.as_fd(), PollFlags::POLLIN));
            }
            if poll(&mut fds, left(deadline)?)? == 0 {
                bail!("no end within {LIMIT:?}: {}", self.all());
            }
            // What is still to be read comes first: the kernel hands on all that was written before
            // it says that there is nothing.
            if fds.get(1).is_some_and(|fd| fd.any() == Some(true)) {
                self.receive()?;
            } else if fds[0].any() == Some(true) {
                let status = self.child.wait()?;
                return Ok((status, lossy(&self.shown[self.expected..])));
            }
        }
    }

    fn receive(&mut self) -> Result<()> {
        let mut buf = [0; 4096];
        match self.master.read(&mut buf) {
            Ok(0) => self.closed = true,
            Ok(n) => self.shown.extend(&buf[..n]),
            // How Linux says that the other side is closed.
            Err(error) if error.raw_os_error() == Some(Errno::EIO as i32) => self.closed = true,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("read from the terminal"),
        }
        Ok(())
    }

    fn all(&self) -> String {
        format!("the terminal shows\n{}", lossy(&self.shown))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Until it has been waited for, the number cannot have become another's.
        if let Ok(None) = self.child.try_wait() {
            let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// In the child: makes standard input the controlling terminal of a session of its own.
fn take_terminal() -> std::io::Result<()> {
    setsid()?;
    // SAFETY: TIOCSCTTY takes a number, and standard input is open.
    Errno::result(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })?;
    Ok(())
}

/// Becomes readable when the child ends.
fn end_of(child: &Child) -> Result<OwnedFd> {
    // SAFETY: the call takes a process id and flags.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) })
        .context("pidfd_open")?;
    // SAFETY: the descriptor was just made, and nothing else has it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) }).into())
}

fn left(deadline: Instant) -> Result<PollTimeout> {
    let left = deadline.saturating_duration_since(Instant::now());
    Ok(PollTimeout::try_from(left)?)
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terminal(program: &str, arguments: &[&str]) -> Terminal {
        let mut command = Command::new(program);
        command.args(arguments);
        Terminal::spawn(command, Uid::current()).unwrap()
    }

    #[test]
    fn the_program_leads_a_session_with_a_terminal() {
        let script = "read -r _ _ _ _ _ session _ </proc/$$/stat
            test $session = $$ && tty && tty <&1 && tty <&2 && : </dev/tty";
        let (status, shown) = terminal("sh", &["-c", script]).wait().unwrap();
        assert!(status.success(), "{shown}");
        let lines: Vec<&str> = shown.lines().collect();
        assert!(lines[0].starts_with("/dev/pts/"), "{shown}");
        assert_eq!(lines, [lines[0]; 3]);
    }

    #[test]
    fn what_is_typed_is_read_and_shown() {
        let mut cat = terminal("cat", &[]);
        cat.send("one\n").unwrap();
        assert_eq!(cat.expect("one\r\none\r\n").unwrap(), "one\r\none\r\n");
        cat.send_control('d').unwrap();
        let (status, rest) = cat.wait().unwrap();
        assert!(status.success());
        assert_eq!(rest, "");
    }

    #[test]
    fn echo_can_be_turned_off() {
        let mut shell = terminal(
            "sh",
            &["-c", "stty -echo; echo ready; read line; echo [$line]"],
        );
        shell.expect("ready\r\n").unwrap();
        shell.send("words\n").unwrap();
        let (status, rest) = shell.wait().unwrap();
        assert_eq!((status.code(), rest.as_str()), (Some(0), "[words]\r\n"));
    }

    #[test]
    fn control_c_reaches_the_program() {
        let mut shell = terminal("sh", &["-c", "trap 'echo caught; exit 5' INT; cat"]);
        // The second time, it is `cat` that shows it.
        shell.send("here\n").unwrap();
        shell.expect("here\r\nhere\r\n").unwrap();
        shell.send_control('c').unwrap();
        shell.expect("caught").unwrap();
        let (status, _) = shell.wait().unwrap();
        assert_eq!(status.code(), Some(5));
    }

    #[test]
    fn all_of_the_output_is_read() {
        let (status, shown) = terminal("seq", &["100000"]).wait().unwrap();
        assert!(status.success());
        assert_eq!(shown.lines().count(), 100_000);
        assert!(shown.ends_with("\r\n100000\r\n"));
    }

    #[test]
    fn the_first_of_several_texts_counts() {
        let mut shell = terminal("sh", &["-c", "echo one two"]);
        let (index, shown) = shell.expect_either(&["two", "no", "one"]).unwrap();
        assert_eq!((index, shown.as_str()), (2, "one"));
        assert_eq!(shell.expect("two").unwrap(), " two");
    }

    #[test]
    fn an_early_end_is_an_error_that_shows_the_output() {
        let mut shell = terminal("sh", &["-c", "echo something else"]);
        let error = shell.expect("this").unwrap_err().to_string();
        assert!(
            error.contains(r#"["this"] was not shown before the end"#),
            "{error}"
        );
        assert!(error.contains("something else"), "{error}");
    }

    #[test]
    fn dropping_it_ends_the_program() {
        let mut shell = terminal("sh", &["-c", "trap '' HUP; echo ready; cat; cat"]);
        shell.expect("ready").unwrap();
        let pid = Pid::from_raw(shell.child.id() as i32);
        drop(shell);
        assert_eq!(nix::sys::signal::kill(pid, None), Err(Errno::ESRCH));
    }
}
