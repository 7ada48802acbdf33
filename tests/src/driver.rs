//! Drives `tests/oracle/driver.c`, and whatever else speaks as it does: programs that decode the tokens
//! they are told. What they are told is described at the top of its source.

use std::process::{Command, ExitStatus};

use anyhow::{Result, ensure};

use crate::lines::Lines;

/// A running driver that has loaded its model. Dropping it ends the process.
pub struct Driver {
    lines: Lines,
}

impl Driver {
    /// Starts `command_line`, or what starts it with its own standard input and output, and returns
    /// when the model is loaded.
    ///
    /// # Errors
    ///
    /// If the process cannot be started, ends, or is not ready within two minutes. Its standard
    /// error, inherited unless the caller set it, says why.
    pub fn spawn(command_line: &mut Command) -> Result<Driver> {
        let mut driver = Driver {
            lines: Lines::spawn(command_line)?,
        };
        driver.expect("ready")?;
        Ok(driver)
    }

    /// The process that was started.
    pub fn pid(&self) -> u32 {
        self.lines.pid().expect("a driver is started here")
    }

    /// Has it continue its only sequence by these tokens, in one call.
    ///
    /// # Errors
    ///
    /// If it ends, or takes more than two minutes.
    pub fn decode(&mut self, tokens: &[u32]) -> Result<()> {
        let tokens: Vec<String> = tokens.iter().map(u32::to_string).collect();
        self.lines.send(&format!("decode {}", tokens.join(" ")))?;
        self.expect("done")
    }

    /// Ends it, and waits for the command that started it.
    pub fn quit(mut self) -> Result<ExitStatus> {
        self.lines.close();
        self.lines.wait()
    }

    fn expect(&mut self, answer: &str) -> Result<()> {
        let line = self.lines.line()?;
        ensure!(line == answer, "expected {answer:?}, got {line:?}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stand-in that speaks the protocol.
    fn shell(script: &str) -> Result<Driver> {
        Driver::spawn(Command::new("sh").arg("-c").arg(script))
    }

    #[test]
    fn tokens_are_decoded_until_the_input_ends() {
        let script = r#"echo ready; read a; [ "$a" = "decode 5 6" ] && echo done; read b; exit 3"#;
        let mut driver = shell(script).unwrap();
        driver.decode(&[5, 6]).unwrap();
        assert_eq!(driver.quit().unwrap().code(), Some(3));
    }

    #[test]
    fn a_driver_that_ends_is_an_error() {
        assert!(shell("exit 1").is_err());
        let mut driver = shell("echo ready; read a").unwrap();
        assert!(driver.decode(&[1]).is_err());
    }
}
