//! Processes that have a number in a PID namespace of their own: a user who looked a number up inside
//! a container gives that one.

use std::{fmt, fs};

use super::status::Status;

/// More are not listed: small numbers are in every container.
const SHOWN: usize = 4;

/// Processes that have a number in their own PID namespace, and another one in ours.
#[derive(Debug, PartialEq, Eq)]
pub struct Namesakes {
    number: u32,
    /// Number in our namespace, and name.
    processes: Vec<(u32, String)>,
}

impl Namesakes {
    /// Looks through all processes that are shown to us.
    pub fn of(number: u32) -> Self {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let mut processes: Vec<(u32, String)> = entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter_map(|pid: u32| {
                let status = Status::read(pid).ok()?;
                let [outer, .., inner] = status.numbers.as_slice() else {
                    return None;
                };
                (*inner == number && !status.ended).then_some((*outer, status.name))
            })
            .collect();
        processes.sort();
        Self { number, processes }
    }
}

impl fmt::Display for Namesakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = self.number;
        for (pid, name) in self.processes.iter().take(SHOWN) {
            write!(
                f,
                "\n  in the PID namespace of {name}, {number} is process {pid} here: use --pid {pid}"
            )?;
        }
        match self.processes.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(
                f,
                "\n  and {more} more processes have the number {number} in a PID namespace of their own"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_are_listed() {
        let named = |count: u32| {
            let processes = (0..count).map(|i| (100 + i, format!("p{i}"))).collect();
            let number = 7;
            Namesakes { number, processes }.to_string()
        };
        assert_eq!(named(0), "");
        assert_eq!(
            named(1),
            "\n  in the PID namespace of p0, 7 is process 100 here: use --pid 100"
        );
        assert_eq!(named(4).lines().count(), 5);
        let many = named(9);
        assert_eq!(many.lines().count(), 6);
        assert!(many.contains("and 5 more processes"), "{many}");
    }
}
