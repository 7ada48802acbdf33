//! What a process has taken when it has ended.

use std::{
    io,
    mem::MaybeUninit,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

/// Time and memory of a process.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// From its start to its end.
    pub time: Duration,
    /// What it has computed, in the kernel and outside.
    pub computed: Duration,
    /// The most memory that it had at once, in bytes.
    pub peak: u64,
}

/// Runs a program to its end, which is to succeed.
///
/// # Errors
///
/// When it cannot be started, or fails.
pub fn of(command: &mut Command) -> Result<Usage> {
    let began = Instant::now();
    let child = command
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let mut status = 0;
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: both places are ours, and of the types that the kernel writes.
    let waited = unsafe { libc::wait4(child.id() as i32, &raw mut status, 0, usage.as_mut_ptr()) };
    ensure!(
        waited >= 0,
        "cannot wait for {command:?}: {}",
        io::Error::last_os_error()
    );
    ensure!(status == 0, "{command:?} has failed (wait status {status})");
    // SAFETY: zeroed, a structure of numbers is valid, whatever the kernel has written of it.
    let usage = unsafe { usage.assume_init() };
    let time = |of: libc::timeval| Duration::new(of.tv_sec as u64, 1000 * of.tv_usec as u32);
    Ok(Usage {
        time: began.elapsed(),
        computed: time(usage.ru_utime) + time(usage.ru_stime),
        peak: 1024 * usage.ru_maxrss as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_takes_is_told() {
        let usage =
            of(Command::new("sh").args(["-c", "x=$(head -c 50000000 /dev/zero | tr '\\0' a)"]));
        assert!(usage.unwrap().peak > 50_000_000);
        assert!(of(&mut Command::new("false")).is_err());
    }
}
