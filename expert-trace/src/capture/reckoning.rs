//! What the probes have counted, held against what has arrived; and what else costs completeness.

use expert_trace_common::Counter;

use super::Capture;
use crate::{
    attach::{AttachError, Counters},
    layout::Layout,
    model::BlindTime,
    probes::{Hook, Probe},
    stats::{self, Integrity},
    target::printable,
};

/// What the probes have counted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Raw {
    /// Hits of the probes on ids of experts.
    pub(super) entered: u64,
    pub(super) counters: Counters,
}

impl Raw {
    /// The same, when copies that are still awaited belong to what comes after.
    pub(super) fn with_awaited_after(self) -> Self {
        let mut counters = self.counters;
        let get = |counter| counters.get(counter);
        let arrived =
            get(Counter::FetchedIds) + get(Counter::DeviceIds) + get(Counter::CallbackIds);
        let known = arrived + get(Counter::IdsCopiesLost);
        let asked_for = &mut counters.0[Counter::IdsCopies as usize];
        *asked_for = known.min(*asked_for);
        Self { counters, ..self }
    }

    pub(super) fn since(self, before: Raw) -> Self {
        let Counters(mut counters) = self.counters;
        for (counter, before) in counters.iter_mut().zip(before.counters.0) {
            *counter = counter.saturating_sub(before);
        }
        Self {
            entered: self.entered.saturating_sub(before.entered),
            counters: Counters(counters),
        }
    }
}

impl Capture {
    /// What the probes have counted since the capture began.
    pub(super) fn raw(&self) -> Result<Raw, AttachError> {
        let counters = self.session.counters()?;
        let of_ids = |probe: &&Probe| probe.hook == Hook::ExpertIds;
        let hits = self.hooks.iter().filter(of_ids);
        let entered: Result<u64, _> = hits.map(|probe| self.session.hits(probe)).sum();
        Ok(Raw {
            entered: entered?,
            counters,
        })
    }

    /// What the probes have counted, held against what has arrived, since counting began.
    pub(super) fn integrity_of(&self, raw: Raw) -> Integrity {
        let Raw { entered, counters } = match self.baseline {
            Some(baseline) => raw.since(baseline.raw),
            None => raw,
        };
        Integrity::new(
            entered,
            &counters,
            self.model.received(),
            self.model.from_logits(),
            self.recording.ring_bytes(self.plan.reads_logits()),
        )
    }

    /// What has gone wrong up to now, and costs completeness.
    pub(super) fn all_problems(&self) -> Result<Vec<String>, AttachError> {
        let mut problems = self.problems.clone();
        problems.extend(self.blind_time_problems());
        problems.extend(self.unknown_layouts()?);
        Ok(problems)
    }

    /// Libraries whose probe was hit, and in which nothing was recognised, beside others in which
    /// something was.
    fn unknown_layouts(&self) -> Result<Vec<String>, AttachError> {
        let mut unknown = Vec::new();
        let mut any_known = false;
        for probe in self
            .hooks
            .iter()
            .filter(|probe| probe.hook == Hook::ExpertIds)
        {
            let hits = self.session.hits(probe)?;
            if hits == 0 {
                continue;
            }
            let shown = self.session.candidate_layout(probe.site.source)?;
            if Layout::new(probe.declared, shown).found_by.is_some() {
                any_known = true;
            } else {
                unknown.push(format!(
                    "{hits} hits in {}, whose layout is not known: nothing of it was read",
                    printable(probe.file.as_ref())
                ));
            }
        }
        // Of the only one, the counters tell more.
        if !any_known {
            unknown.clear();
        }
        Ok(unknown)
    }

    pub(super) fn late_libraries(&self) -> Vec<stats::LateLibraries> {
        let times = self.model.blind_times().iter();
        times
            .filter_map(|time| {
                let blind_ns = time.until_ns?.saturating_sub(time.from_ns);
                Some(stats::LateLibraries {
                    files: time.files.clone(),
                    blind_ms: blind_ns as f64 / 1e6,
                    passes: self.saw_passes_before(time).then_some(time.passes),
                })
            })
            .collect()
    }

    /// Whether passes could be seen when these libraries came.
    fn saw_passes_before(&self, time: &BlindTime) -> bool {
        let mut hooks = self.hooks.iter();
        hooks.any(|probe| {
            let begins_passes = matches!(probe.hook, Hook::PassBegin | Hook::Context);
            begins_passes && !time.files.contains(&probe.file)
        })
    }

    /// What may have run between the loading of libraries and their probing costs completeness.
    fn blind_time_problems(&self) -> Vec<String> {
        let problem = |late: stats::LateLibraries| {
            let files = late.files.join(", ");
            let ms = late.blind_ms;
            match late.passes {
                Some(0) => None,
                Some(passes) => Some(format!(
                    "{passes} passes began in the {ms:.1} ms between the loading of {files} and its \
                     probing: their routing is missing"
                )),
                None => Some(format!(
                    "whether tokens were routed in the {ms:.1} ms between the loading of {files} and \
                     its probing is not known"
                )),
            }
        };
        self.late_libraries()
            .into_iter()
            .filter_map(problem)
            .collect()
    }
}
