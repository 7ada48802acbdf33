//! A terminal of a known size that draws: tmux, which tells what it shows.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;

/// Longest wait for anything, far above what it takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A tmux server with one window. Dropping it ends what runs there.
pub struct Tmux {
    directory: TempDir,
}

impl Tmux {
    /// Starts a shell's command line in a terminal of so many columns and lines, with these variables.
    ///
    /// # Errors
    /// If there is no tmux, or it cannot make a window.
    pub fn spawn(columns: u16, lines: u16, variables: &[(&str, &str)], line: &str) -> Result<Self> {
        let tmux = Self {
            directory: tempfile::tempdir()?,
        };
        let mut command = tmux.command();
        command.args(["-u", "new-session", "-d"]);
        command.args(["-x", &columns.to_string(), "-y", &lines.to_string()]);
        // tmux has a TERM and a COLORTERM of its own.
        let variables = variables.iter();
        let variables = variables.map(|(name, value)| format!("export {name}={value}; "));
        let variables: String = variables.collect();
        // The window stays to be looked at.
        command.arg(format!(
            "unset COLORTERM NO_COLOR; {variables}{line}; echo \"[over: $?]\"; exec cat"
        ));
        run(&mut command)?;
        Ok(tmux)
    }

    fn command(&self) -> Command {
        let mut command = Command::new("tmux");
        command.arg("-S").arg(self.directory.path().join("socket"));
        command.args(["-f", "/dev/null"]);
        command.env_remove("TMUX");
        command
    }

    /// What is shown, line by line.
    ///
    /// # Errors
    /// If tmux is gone.
    pub fn shown(&self) -> Result<Vec<String>> {
        let text = run(self.command().args(["capture-pane", "-p"]))?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// The same with the colours' escape sequences.
    ///
    /// # Errors
    /// If tmux is gone.
    pub fn shown_with_colours(&self) -> Result<String> {
        run(self.command().args(["capture-pane", "-p", "-e"]))
    }

    /// Waits until what is shown is as wanted, and gives it.
    ///
    /// # Errors
    /// If it is not within a minute.
    pub fn wait(&self, wanted: impl Fn(&[String]) -> bool) -> Result<Vec<String>> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let shown = self.shown()?;
            if wanted(&shown) {
                return Ok(shown);
            }
            if Instant::now() > deadline {
                bail!("the terminal does not get there:\n{}", shown.join("\n"));
            }
            std::thread::yield_now();
        }
    }

    /// Waits until a text is shown.
    ///
    /// # Errors
    /// If it is not within a minute.
    pub fn wait_for(&self, text: &str) -> Result<Vec<String>> {
        self.wait(|shown| shown.iter().any(|line| line.contains(text)))
            .with_context(|| format!("waiting for {text:?}"))
    }

    /// Presses keys, by tmux's names of them.
    ///
    /// # Errors
    /// If tmux is gone.
    pub fn press(&self, keys: &[&str]) -> Result<()> {
        run(self.command().arg("send-keys").args(keys)).map(drop)
    }

    /// Changes the size of the terminal.
    ///
    /// # Errors
    /// If tmux is gone.
    pub fn resize(&self, columns: u16, lines: u16) -> Result<()> {
        let (columns, lines) = (columns.to_string(), lines.to_string());
        run(self
            .command()
            .args(["resize-window", "-x", &columns, "-y", &lines]))
        .map(drop)
    }

    /// Whether the terminal shows its alternate screen, and whether its cursor is shown.
    ///
    /// # Errors
    /// If tmux is gone.
    pub fn modes(&self) -> Result<(bool, bool)> {
        let format = "#{alternate_on} #{cursor_flag}";
        let text = run(self.command().args(["display-message", "-p", format]))?;
        Ok((text.starts_with('1'), text.trim_end().ends_with('1')))
    }

    /// Settings of the terminal, as stty has them.
    ///
    /// # Errors
    /// If tmux is gone.
    pub fn settings(&self) -> Result<String> {
        let tty = run(self
            .command()
            .args(["display-message", "-p", "#{pane_tty}"]))?;
        run(Command::new("stty").args(["-a", "-F", tty.trim_end()]))
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        let _ = self.command().arg("kill-server").output();
    }
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {said}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
