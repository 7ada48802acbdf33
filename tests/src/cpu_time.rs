//! Time that a process computes.

use std::time::Duration;

use anyhow::Result;
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

/// What all threads of a process have used of processors so far, in the kernel and outside, to the
/// nanosecond.
///
/// # Errors
///
/// If there is no such process.
pub fn of(pid: u32) -> Result<Duration> {
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(pid as i32))?;
    let nanoseconds = clock_gettime(clock)?.num_nanoseconds();
    Ok(Duration::from_nanos(nanoseconds.cast_unsigned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn computing_takes_time() {
        let pid = std::process::id();
        let before = of(pid).unwrap();
        while of(pid).unwrap() < before + Duration::from_millis(1) {}
        assert!(of(0x7fff_ffff).is_err());
    }
}
