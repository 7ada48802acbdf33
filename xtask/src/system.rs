//! The machine we are on: who we are, and which distribution it runs.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use anyhow::Result;

use crate::command;

/// Whether our effective user is root.
pub fn is_root() -> bool {
    // The kernel gives a process' own directory to its effective user.
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Whether this is Debian 12, the one distribution on which the BPF toolchain is pinned.
pub fn is_debian_12() -> bool {
    let release = os_release();
    field(&release, "ID") == Some("debian") && field(&release, "VERSION_ID") == Some("12")
}

/// The distribution's name and version, for messages.
pub fn distribution() -> String {
    let release = os_release();
    let name = field(&release, "PRETTY_NAME").unwrap_or("an unknown distribution");
    name.to_owned()
}

fn os_release() -> String {
    fs::read_to_string("/etc/os-release").unwrap_or_default()
}

fn field<'a>(release: &'a str, name: &str) -> Option<&'a str> {
    release
        .lines()
        .filter_map(|line| line.split_once('='))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value.trim_matches(['"', '\'']))
}

/// What the system calls the processor.
pub fn processor() -> Result<String> {
    let lscpu = command::output(Command::new("lscpu").env("LC_ALL", "C"))?;
    let name = lscpu
        .lines()
        .find_map(|line| line.strip_prefix("Model name:"));
    Ok(name.unwrap_or("unknown").trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::field;

    #[test]
    fn os_release_values_may_be_quoted() {
        let release =
            "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_ID=\"12\"\nID=debian\n";
        assert_eq!(field(release, "ID"), Some("debian"));
        assert_eq!(field(release, "VERSION_ID"), Some("12"));
        assert_eq!(
            field(release, "PRETTY_NAME"),
            Some("Debian GNU/Linux 12 (bookworm)")
        );
        assert_eq!(field(release, "ID_LIKE"), None);
    }
}
