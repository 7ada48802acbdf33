//! What `/proc/PID/status` and `stat` say of a process (fs/proc/array.c).

use std::{fs, io, path::Path};

/// Lines of `status` that we need.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Name of the main thread, fit for a terminal.
    pub name: String,
    /// Number of the process; differs from a thread's own.
    pub process: u32,
    /// Real user.
    pub uid: u32,
    /// A zombie, or dead.
    pub ended: bool,
    /// Its numbers, from our PID namespace inwards.
    pub numbers: Vec<u32>,
}

impl Status {
    /// Reads that of a process or thread.
    ///
    /// # Errors
    /// When there is none, or it is hidden.
    pub fn read(pid: u32) -> io::Result<Self> {
        let text = fs::read(format!("/proc/{pid}/status"))?;
        Ok(Self::parse(&String::from_utf8_lossy(&text)))
    }

    /// The kernel escapes line feeds in the name, so that lines are its own.
    fn parse(text: &str) -> Self {
        let mut status = Self::default();
        for line in text.lines() {
            let Some((key, value)) = line.split_once(':') else {
                continue;
            };
            let mut words = value.split_whitespace();
            let mut number = || words.next().and_then(|word| word.parse().ok());
            match key {
                "Name" => status.name = crate::target::printable(Path::new(value.trim())),
                "Tgid" => status.process = number().unwrap_or_default(),
                "Uid" => status.uid = number().unwrap_or_default(),
                "State" => status.ended = value.trim_start().starts_with(['Z', 'X']),
                "NSpid" => status.numbers = std::iter::from_fn(number).collect(),
                _ => {}
            }
        }
        status
    }
}

/// Whether a process is a thread of the kernel.
pub fn is_kernel_thread(pid: u32) -> bool {
    /// include/linux/sched.h
    const PF_KTHREAD: u32 = 0x0020_0000;
    let flags = || -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, can hold anything; the flags are the seventh field after it.
        let (_, fields) = stat.rsplit_once(") ")?;
        fields.split(' ').nth(6)?.parse().ok()
    };
    flags().is_some_and(|flags| flags & PF_KTHREAD != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_real_process() {
        let text = "Name:\tllama: a\\nb\u{1b}\nState:\tZ (zombie)\nTgid:\t4242\nPid:\t4243\n\
                    Uid:\t1000\t0\t0\t0\nNSpid:\t4243\t17\t1\n";
        assert_eq!(
            Status::parse(text),
            Status {
                name: "llama: a\\nb\u{fffd}".to_owned(),
                process: 4242,
                uid: 1000,
                ended: true,
                numbers: vec![4243, 17, 1],
            }
        );
        assert_eq!(Status::parse("\0\nx\nTgid:\tno\n"), Status::default());
    }

    #[test]
    fn our_own() {
        let own = std::process::id();
        let status = Status::read(own).unwrap();
        assert_eq!((status.process, status.ended), (own, false));
        assert_eq!(status.numbers.first(), Some(&own));
        assert!(!is_kernel_thread(own));
    }
}
