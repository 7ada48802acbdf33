//! Time that a process computes.

use std::time::Duration;

use anyhow::Result;
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

/// What all threads of a process have used of processors so far, in the kernel and outside. To the
/// nanosecond of threads that wait, and of the caller; of another process' threads that run just now, up to
/// the last tick of the scheduler, which can be 10 ms ago (`thread_group_cputime` in
/// kernel/sched/cputime.c).
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
        // Above all process ids; still larger numbers have no clock id of their own.
        assert!(of(0x0fff_ffff).is_err());
    }
}
