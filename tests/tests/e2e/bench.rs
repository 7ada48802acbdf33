//! What tracing costs: `cargo xtask bench` runs these; a smoke run of each is part of the tests.
//!
//! A benchmark prints its results as lines `RESULT {…}`, from which the result files and the tables in
//! docs/performance.md are made.

mod flood;
mod hits;
mod nodes;
mod overhead;
mod start;

use std::{env, time::Duration};

/// How much of a benchmark is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Every part once, with models that are there anyway: it has to work, and says nothing of speed.
    Smoke,
    /// Until the results are certain enough, or so much time is over.
    Full { limit: Duration },
}

impl Effort {
    /// What `cargo xtask bench` has asked for.
    pub fn asked() -> Self {
        let minutes = env::var("EXPERT_TRACE_BENCH_MINUTES").ok();
        let minutes = minutes.and_then(|minutes| minutes.parse().ok());
        Self::Full {
            limit: Duration::from_secs(60 * minutes.unwrap_or(60)),
        }
    }
}
