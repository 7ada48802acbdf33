//! What is asked of a capture that goes on, by SIGUSR1 and by its socket.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, anyhow, bail, ensure};
use tokio::{task, time::timeout_at};

use super::{Capture, reckoning::Raw};
use crate::{
    control::{Asked, Request},
    export,
    model::Context,
    stats::{Integrity, Stats},
    target::printable,
};

/// How long we look for a moment at which the sums are right: between two records.
const LOOKING: Duration = Duration::from_millis(100);

/// What was there when counting began anew.
#[derive(Clone, Copy, Debug)]
pub(super) struct Baseline {
    /// When.
    pub(super) since: SystemTime,
    /// Hits, and the kernel's counters.
    pub(super) raw: Raw,
    /// Rows that the kernel had lost.
    pub(super) lost_rows: u64,
    /// Tokens of all contexts.
    pub(super) tokens: u64,
}

impl Capture {
    /// Writes the document as it is now. What goes wrong is said, and the capture goes on.
    pub(super) async fn dump(&mut self) {
        match self.write_so_far().await {
            Ok(place) => say!("statistics up to now exported to: {place}"),
            Err(error) => say!("statistics up to now cannot be written: {error:#}"),
        }
    }

    /// Does what was asked for. Gives back what is to be answered when the capture has ended, for that.
    pub(super) async fn answer(&mut self, asked: Asked) -> Option<Asked> {
        let answer = match asked.request {
            Request::Dump => self.so_far().await.and_then(|stats| {
                let mut document = Vec::new();
                export::to_json(&mut document, &stats)?;
                Ok(document)
            }),
            Request::Reset => self.reset().await.map(|()| Vec::new()),
            Request::Stop if self.from_start => Err(anyhow!(
                "run traces its program up to its end: end process {}, or use attach",
                self.pid
            )),
            Request::Stop => return Some(asked),
        };
        asked.answer(answer);
        None
    }

    pub(super) async fn write_so_far(&mut self) -> anyhow::Result<String> {
        if self.sinks.output.is_none() {
            bail!("there is no file for them; name one with -o");
        }
        let stats = self.so_far().await?;
        let output = self.sinks.output.as_ref();
        let (path, output) = output.context("there is no file for them")?;
        output.write_so_far(&stats)?;
        Ok(printable(path))
    }

    /// The document of the passes that are over. The one under way is in none of its counts.
    pub(super) async fn so_far(&mut self) -> anyhow::Result<Stats> {
        let (_, began) = self.started.context("the capture has not started")?;
        let (_, integrity) = self.balance().await?;
        let integrity = integrity.with_problems(self.all_problems()?);
        let integrity = integrity.with_refusals(self.model.from_logits());
        let duration = began.elapsed();
        let clock = self.target_clock.as_ref();
        let target_cpu = clock.and_then(|clock| clock.so_far(self.pid));
        let cost = self.cost(duration, target_cpu, self.tokens())?;
        let mut stats = self.stats(integrity, cost, "running", duration)?;
        stats.trace = self.sinks.trace.as_ref().map(|trace| trace.so_far());
        Ok(stats)
    }

    /// Begins to count anew. What is known of contexts, models and probes stays; so do log and trace.
    pub(super) async fn reset(&mut self) -> anyhow::Result<()> {
        let (raw, integrity) = self.balance().await?;
        ensure!(
            integrity.adds_up(),
            "records never cease to come, so that counts have no moment to begin at: ask again"
        );
        let rows = &integrity.rows.dropped;
        let lost_before = self.baseline.map_or(0, |baseline| baseline.lost_rows);
        self.baseline = Some(Baseline {
            since: SystemTime::now(),
            raw: raw.with_awaited_after(),
            lost_rows: lost_before + rows.ring_full + rows.unreadable,
            tokens: self.tokens(),
        });
        self.model.reset();
        Ok(())
    }

    /// Tokens of all contexts, since the capture began.
    pub(super) fn tokens(&self) -> u64 {
        let before = self.baseline.map_or(0, |baseline| baseline.tokens);
        let now: u64 = self.model.contexts().iter().map(Context::tokens).sum();
        before + now
    }

    /// Takes what is there until the sums are right, or it has taken too long.
    async fn balance(&mut self) -> anyhow::Result<(Raw, Integrity)> {
        let deadline = Instant::now() + LOOKING;
        loop {
            self.take_until(deadline).await;
            let raw = self.raw()?;
            let integrity = self.integrity_of(raw);
            if integrity.adds_up() || Instant::now() >= deadline {
                return Ok((raw, integrity));
            }
            task::yield_now().await;
        }
    }

    /// Takes what is there, as long as the trace has room for it: its rows must not fill our memory.
    async fn take_until(&mut self, deadline: Instant) {
        loop {
            if let Some(trace) = &self.sinks.trace
                && timeout_at(deadline.into(), trace.has_room()).await.is_err()
            {
                return;
            }
            if self.take_events() || Instant::now() >= deadline {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use expert_trace_common::{COUNTERS, Counter};

    use super::*;
    use crate::{
        attach::Counters,
        model::{FromLogits, Received},
    };

    fn raw(entered: u64, counts: &[(Counter, u64)]) -> Raw {
        let mut counters = Counters([0; COUNTERS]);
        for (counter, count) in counts {
            counters.0[*counter as usize] = *count;
        }
        Raw { entered, counters }
    }

    fn integrity(raw: Raw) -> Integrity {
        let (received, from_logits) = (Received::default(), FromLogits::default());
        Integrity::new(raw.entered, &raw.counters, received, &from_logits, 0)
    }

    #[test]
    fn losses_before_are_not_told_again() {
        let lost = [
            (Counter::Routed, 5),
            (Counter::EventsSeen, 5),
            (Counter::EventsRingFull, 5),
        ];
        let before = raw(5, &lost);
        assert!(integrity(before).adds_up() && !integrity(before).complete);
        let now = raw(7, &[&lost[..], &[(Counter::FilteredTensor, 2)]].concat());
        let since = integrity(now.since(before));
        assert!(since.complete, "{:?}", since.problems);
        assert_eq!((since.hits.entered, since.hits.filtered_tensor), (2, 2));
    }

    #[test]
    fn copies_that_are_awaited_are_awaited_after() {
        let before = raw(0, &[(Counter::IdsCopies, 4), (Counter::DeviceIds, 1)]);
        let before = before.with_awaited_after();
        // Of the three, one has arrived; and of two others.
        let now = raw(0, &[(Counter::IdsCopies, 6), (Counter::DeviceIds, 4)]);
        let since = integrity(now.since(before)).without_target();
        assert_eq!(since.routes.ids_copies, 5);
        assert_eq!(since.routes.copies_lost, 2);
    }
}
