//! When events are taken from the ring buffer.

use std::time::{Duration, Instant};

use expert_trace_common::WakeUp;

use super::Capture;
use crate::attach::AttachError;

/// How we come to know of events.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reading {
    /// The next one wakes us.
    Woken,
    /// We will look by ourselves.
    Waiting { due: Instant, wake_up: WakeUp },
    /// We do.
    Looking { wake_up: WakeUp },
}

impl Capture {
    /// Waits until events are to be taken, or written. Where `more` are there, it only lets others through,
    /// and waits for the trace, whose rows must not fill our memory. It may be broken off, and begun again.
    pub(super) async fn events_due(&mut self, more: bool) -> anyhow::Result<()> {
        if let Some(trace) = &self.sinks.trace {
            trace.has_room().await;
        }
        if more {
            tokio::task::yield_now().await;
            return Ok(());
        }
        let Some(trace) = &self.sinks.trace else {
            return self.events_came().await;
        };
        let Some(due) = trace.due() else {
            return self.events_came().await;
        };
        tokio::select! {
            came = self.events_came() => came,
            () = tokio::time::sleep_until(due.into()) => Ok(()),
        }
    }

    /// Waits until there may be events.
    ///
    /// To be woken costs the thread that was hit more than the hit. So the first event wakes us, and from
    /// then on we look by ourselves now and then, until twice nothing has come: the second time, since a
    /// hit that was under way can have left an event and woken nobody. Whatever comes after that wakes us
    /// in any case.
    async fn events_came(&mut self) -> anyhow::Result<()> {
        loop {
            match self.reading {
                Reading::Woken => {
                    self.events.readable_mut().await?.clear_ready();
                    if !self.gathering.is_zero() {
                        self.session.set_wake_up(WakeUp::Never)?;
                        let wake_up = WakeUp::Never;
                        self.reading = Reading::Looking { wake_up };
                        self.taken = 0;
                    }
                    return Ok(());
                }
                Reading::Waiting { due, wake_up } => {
                    // Some events wake us in any case: those of a process that may soon be gone.
                    tokio::select! {
                        () = tokio::time::sleep_until(due.into()) => {}
                        woken = self.events.readable_mut() => woken?.clear_ready(),
                    }
                    self.reading = Reading::Looking { wake_up };
                    self.taken = 0;
                    return Ok(());
                }
                Reading::Looking { wake_up } => match (self.taken, wake_up) {
                    (1.., _) => self.look_again(WakeUp::Never)?,
                    (0, WakeUp::Never) => self.look_again(WakeUp::Always)?,
                    (0, _) => self.reading = Reading::Woken,
                },
            }
        }
    }

    /// Looks for events once more after some time, whether they wake us or not.
    fn look_again(&mut self, wake_up: WakeUp) -> Result<(), AttachError> {
        let is_so = matches!(self.reading, Reading::Looking { wake_up: now } if now == wake_up);
        if !is_so {
            self.session.set_wake_up(wake_up)?;
        }
        let due = Instant::now() + self.gathering;
        self.reading = Reading::Waiting { due, wake_up };
        Ok(())
    }
}

/// How long events are left in a ring buffer of this size: not so long that somebody who reads the log would
/// notice. One that fills up wakes us; in a small one, that would be too late.
pub(super) fn gathering(ring_bytes: u32) -> Duration {
    const UNNOTICED: Duration = Duration::from_millis(40);
    /// Rows take more than a nanosecond for a byte, so that the rest of it lasts for longer than we take
    /// to wake up.
    const SMALLEST: u32 = 2 << 20;
    match ring_bytes {
        SMALLEST.. => UNNOTICED,
        _ => Duration::ZERO,
    }
}
