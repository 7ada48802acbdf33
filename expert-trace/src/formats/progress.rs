//! How far a long export is, on a terminal.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

/// What takes less time shows nothing.
const PATIENCE: Duration = Duration::from_secs(1);
/// Time between two lines.
const INTERVAL: Duration = Duration::from_millis(200);

/// Progress of reading a file, on stderr when that is a terminal.
#[derive(Debug)]
pub struct Progress {
    /// What is being done, when that is not reading.
    work: Option<&'static str>,
    total: u64,
    /// Bytes of rounds that are done.
    before: u64,
    began: Instant,
    next: Option<Instant>,
    is_shown: bool,
}

impl Progress {
    /// Of a file of so many bytes that is read in several rounds.
    pub fn new(bytes: u64, rounds: u64) -> Self {
        let began = Instant::now();
        Self {
            work: None,
            total: bytes.saturating_mul(rounds),
            before: 0,
            began,
            next: io::stderr().is_terminal().then_some(began + PATIENCE),
            is_shown: false,
        }
    }

    /// Of work that is counted in some unit, of which there is so much.
    pub fn of_work(work: &'static str, total: u64) -> Self {
        Self {
            work: Some(work),
            ..Self::new(total, 1)
        }
    }

    /// So many bytes of this round have been read.
    pub fn update(&mut self, bytes: u64) {
        let now = Instant::now();
        if self.next.is_none_or(|next| now < next) {
            return;
        }
        self.next = Some(now + INTERVAL);
        self.is_shown = true;
        let done = self.before + bytes;
        let line = match self.work {
            Some(work) => format!("expert-trace: {work}: {} %", percent(done, self.total)),
            None => line(done, self.total, now - self.began),
        };
        // A terminal that is gone is no reason to stop.
        let _ = write!(io::stderr(), "\r\x1b[K{line}");
    }

    /// A round is done, which has read so many bytes. The line is free for other messages.
    pub fn end_round(&mut self, bytes: u64) {
        self.before += bytes;
        self.clear();
    }

    fn clear(&mut self) {
        if self.is_shown {
            self.is_shown = false;
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

fn percent(done: u64, total: u64) -> u128 {
    let percent = (100 * u128::from(done)).checked_div(total.into());
    percent.unwrap_or(100).min(100)
}

fn line(done: u64, total: u64, elapsed: Duration) -> String {
    let percent = percent(done, total);
    let rate = done as f64 / 1e6 / elapsed.as_secs_f64().max(1e-3);
    format!("expert-trace: {percent:3} %, {rate:.0} MB/s")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let second = Duration::from_secs(1);
        assert_eq!(
            line(50_000_000, 200_000_000, second),
            "expert-trace:  25 %, 50 MB/s"
        );
        assert_eq!(line(0, 0, Duration::ZERO), "expert-trace: 100 %, 0 MB/s");
        assert_eq!(
            line(u64::MAX, 1, second).split(',').next(),
            Some("expert-trace: 100 %"),
            "a file that grows"
        );
    }
}
