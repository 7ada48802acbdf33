//! Running other programs: each is shown before it runs, and a failure says which one it was.

use std::ffi::OsStr;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// Shows the command and runs it with our own input and output.
pub fn run(command: &mut Command) -> Result<()> {
    show(command);
    let status = command.status().with_context(|| cannot_run(command))?;
    ensure!(status.success(), "`{}` failed ({status})", line(command));
    Ok(())
}

/// Runs the command, and returns what it prints.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| cannot_run(command))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!(
            "`{}` failed ({}): {}",
            line(command),
            output.status,
            complaint.trim()
        );
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("`{}` did not print UTF-8", line(command)))
}

/// Prints the command as it would be typed.
pub fn show(command: &Command) {
    eprintln!("$ {}", line(command));
}

/// Context for the error of a command that could not be started.
pub fn cannot_run(command: &Command) -> String {
    format!("cannot run `{}`", line(command))
}

fn line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(quoted)
        .collect::<Vec<_>>()
        .join(" ")
}

/// The argument as a shell reads it.
fn quoted(argument: &OsStr) -> String {
    let argument = argument.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+:,./@%".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        argument.into_owned()
    } else {
        format!("'{}'", argument.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_it_would_be_typed() {
        let mut command = Command::new("llama-cli");
        command.args(["-p", "it's me", "--ctx-size=16", ""]);
        assert_eq!(
            line(&command),
            r"llama-cli -p 'it'\''s me' --ctx-size=16 ''"
        );
    }

    #[test]
    fn a_failure_names_the_command_and_repeats_its_complaint() {
        let error = output(Command::new("sh").args(["-c", "echo no such thing >&2; exit 3"]))
            .expect_err("exit status 3 is a failure");
        let error = error.to_string();
        assert!(
            error.contains("sh -c") && error.contains("no such thing"),
            "{error}"
        );
    }
}
