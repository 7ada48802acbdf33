//! What is known while a capture goes on, for whoever asks by SIGUSR1.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::task;

use super::Capture;
use crate::{model::Context, stats::Stats, target::printable};

/// How long we look for a moment at which the sums are right: between two records.
const LOOKING: Duration = Duration::from_millis(100);

impl Capture {
    /// Writes the document as it is now. What goes wrong is said, and the capture goes on.
    pub(super) async fn dump(&mut self) {
        match self.write_so_far().await {
            Ok(place) => say!("statistics up to now exported to: {place}"),
            Err(error) => say!("statistics up to now cannot be written: {error:#}"),
        }
    }

    async fn write_so_far(&mut self) -> anyhow::Result<String> {
        anyhow::ensure!(
            self.sinks.output.is_some(),
            "there is no file for them; name one with -o"
        );
        let stats = self.so_far().await?;
        let output = self.sinks.output.as_ref();
        let (path, output) = output.context("there is no file for them")?;
        output.write_so_far(&stats)?;
        Ok(printable(path))
    }

    /// The document of the passes that are over. The one under way is in none of its counts.
    async fn so_far(&mut self) -> anyhow::Result<Stats> {
        let (_, began) = self.started.context("the capture has not started")?;
        let deadline = Instant::now() + LOOKING;
        let integrity = loop {
            while !self.take_events() && Instant::now() < deadline {}
            let integrity = self.integrity()?;
            if integrity.adds_up() || Instant::now() >= deadline {
                break integrity;
            }
            task::yield_now().await;
        };
        let integrity = integrity.with_problems(self.all_problems()?);
        let integrity = integrity.with_refusals(self.model.from_logits());
        let duration = began.elapsed();
        let clock = self.target_clock.as_ref();
        let target_cpu = clock.and_then(|clock| clock.so_far(self.pid));
        let tokens = self.model.contexts().iter().map(Context::tokens).sum();
        let cost = self.cost(duration, target_cpu, tokens)?;
        let mut stats = self.stats(integrity, cost, "running", duration)?;
        stats.trace = self.sinks.trace.as_ref().map(|trace| trace.so_far());
        Ok(stats)
    }
}
