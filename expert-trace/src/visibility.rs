//! Why routing was not seen, and what a user can change.
//!
//! A function that was found is not one that runs: compilers copy its code into its callers. So a probe
//! is believed to watch over a route only when it was hit.

use serde::Serialize;

use crate::{
    probes::Hook,
    stats::{Hits, HookStats, Stats},
};

/// Why routing was not seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The probes that would have shown it on the host were hit, for other things.
    OnADevice,
    /// A function through which the CPU's work goes was never entered.
    NeverEntered,
    /// The function with expert ids was entered, and nothing in it could be read.
    NotUnderstood,
    /// It was there, as router logits from which no experts could be chosen.
    LogitsRefused,
}

/// Why routing was not seen, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotVisible {
    /// Why.
    pub reason: Reason,
    /// The same in words, which follow "not visible: ".
    pub explanation: String,
    /// What a user can change, which follows "to see all: ".
    pub remedy: String,
}

/// What brings routing from a device to the host.
pub const OFF_THE_DEVICE: &str =
    "trace with --router-on-cpu, or keep the experts on the CPU (--cpu-moe)";

/// Why something was not seen, in a capture in which something was not.
pub fn explain(stats: &Stats) -> NotVisible {
    if is_not_understood(&stats.integrity.hits) {
        return NotVisible {
            reason: Reason::NotUnderstood,
            explanation:
                "the function with expert ids was entered, and nothing in it was understood"
                    .to_owned(),
            remedy: "use a build of llama.cpp that docs/compatibility.md lists, or one with debug \
                     information (-g)"
                .to_owned(),
        };
    }
    of_hooks(&stats.target.hooks, stats.integrity.logits.refused > 0)
}

/// Every thread pool has a first thread, and every graph of a model something with a name.
fn is_not_understood(hits: &Hits) -> bool {
    let Hits {
        entered,
        filtered_thread,
        unreadable,
        layout_unknown,
        ..
    } = *hits;
    entered > 0 && entered == filtered_thread + unreadable + layout_unknown
}

fn of_hooks(hooks: &[HookStats], logits_refused: bool) -> NotVisible {
    if logits_refused {
        return NotVisible {
            reason: Reason::LogitsRefused,
            explanation: "router logits were there, and told no experts".to_owned(),
            remedy: "mend what INCOMPLETE names".to_owned(),
        };
    }
    let device = if of(hooks, Hook::SplitDone).next().is_some() {
        // It was asked for already.
        "get the routers' weights onto the CPU: look for an --override-tensor of your own, or for a \
         draft model, which has options of its own (--override-tensor-draft)"
    } else {
        OFF_THE_DEVICE
    };
    let never_entered: Vec<&str> = [Hook::ExpertIds, Hook::Split]
        .into_iter()
        .filter_map(|hook| never_hit(hooks, hook))
        .collect();
    if never_entered.is_empty() {
        return NotVisible {
            reason: Reason::OnADevice,
            explanation: "their routing stayed on a device".to_owned(),
            remedy: device.to_owned(),
        };
    }
    let functions = never_entered.join(" and ");
    NotVisible {
        reason: Reason::NeverEntered,
        explanation: format!(
            "{functions} was never entered: nothing was computed on the CPU, or a compiler has put the \
             function into its callers"
        ),
        remedy: format!(
            "{device}; if it ran on the CPU, use a build without link-time optimisation"
        ),
    }
}

fn of(hooks: &[HookStats], hook: Hook) -> impl Iterator<Item = &HookStats> {
    hooks.iter().filter(move |of| of.probe.hook == hook)
}

/// The function of a hook that has probes, none of which was hit.
fn never_hit(hooks: &[HookStats], hook: Hook) -> Option<&'static str> {
    let symbol = of(hooks, hook).next()?.probe.symbol;
    of(hooks, hook).all(|of| of.hits == 0).then_some(symbol)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use expert_trace_common::Site;

    use super::*;
    use crate::{
        probes::{FileId, Probe},
        symbols::{Definition, Table},
    };

    fn hook(hook: Hook, hits: u64) -> HookStats {
        HookStats {
            probe: Probe {
                hook,
                symbol: hook.symbols()[0],
                file: String::new(),
                build_id: None,
                definition: Definition {
                    table: Table::Symtab,
                    address: 0,
                    file_offset: 0,
                    skipped: 0,
                },
                site: Site {
                    source: 0,
                    probe: 0,
                },
                declared: None,
                file_id: FileId::default(),
                attach_path: PathBuf::new(),
            },
            hits,
        }
    }

    #[test]
    fn a_probe_that_was_never_hit_is_named() {
        let hooks = [hook(Hook::ExpertIds, 9), hook(Hook::Split, 0)];
        let why = of_hooks(&hooks, false);
        assert_eq!(why.reason, Reason::NeverEntered);
        assert!(why.explanation.starts_with("ggml_graph_compute was never"));

        // One of two libraries is enough.
        let hooks = [
            hook(Hook::ExpertIds, 0),
            hook(Hook::ExpertIds, 9),
            hook(Hook::Split, 1),
        ];
        assert_eq!(of_hooks(&hooks, false).reason, Reason::OnADevice);
    }

    #[test]
    fn hits_that_showed_nothing_are_no_device() {
        let hits = |filtered_thread, layout_unknown| Hits {
            entered: 4,
            filtered_thread,
            layout_unknown,
            ..Hits::default()
        };
        assert!(is_not_understood(&hits(2, 2)));
        assert!(is_not_understood(&hits(4, 0)));
        // The others were for tensors of which the layout was known.
        assert!(!is_not_understood(&hits(2, 1)));
        assert!(!is_not_understood(&Hits::default()));
    }

    #[test]
    fn what_was_asked_for_already_is_not_advised() {
        let plain = [hook(Hook::ExpertIds, 1)];
        assert!(of_hooks(&plain, false).remedy.contains("--router-on-cpu"));
        let asked = [hook(Hook::ExpertIds, 1), hook(Hook::SplitDone, 0)];
        assert!(!of_hooks(&asked, false).remedy.contains("--router-on-cpu"));
        assert_eq!(of_hooks(&asked, true).reason, Reason::LogitsRefused);
    }
}
