//! Why routing was not seen, and what a user can change.
//!
//! A function that was found is not one that runs: compilers copy its code into its callers. So a probe
//! is believed to watch over a route only when it was hit.

use serde::Serialize;

use crate::{
    gguf::ModelShape,
    model::{Coverage, PhasePasses},
    placement::{Options, Role},
    probes::{Hook, Probe},
    remedy::{self, Layers, Need, Program, Remedy, remedies},
    routes::{self, Routes},
    stats::{Hits, HookStats, LayerStats, Stats},
};

/// Why routing was not seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The probes that would have shown it on the host were hit, for other things.
    OnADevice,
    /// The same, and the program uses no device.
    NoDevice,
    /// No device is used, and the CPU showed it in other passes: these were given up before they were
    /// computed, as when there is no memory for their graph.
    NotComputed,
    /// Routing stayed on a device in prompts only, which llama.cpp can compute on a device with weights that it streams
    /// there.
    Streamed,
    /// A function through which the CPU's work goes was never entered.
    NeverEntered,
    /// The function with expert ids was entered, and nothing in it could be read.
    NotUnderstood,
    /// It was there, as router logits from which no experts could be chosen.
    LogitsRefused,
    /// The user has left out ways to read it (`--routes`).
    RouteLeftOut,
    /// Passes showed none, and whether they computed tokens is not known.
    UbatchNotRead,
    /// No pass had an output: a layer that works on output rows alone was never computed.
    NothingToDo,
    /// At least as many records were lost as are missing.
    Lost,
}

/// Layers of a context that were not seen, or not always, for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// The layers, ascending; `null` where it is not known which layers there are.
    pub layers: Option<Vec<u32>>,
    /// Whether they were seen at all.
    pub coverage: Coverage,
    /// In which phases they were not seen: `prefill`, `decode`; empty where that is not known.
    pub phases: Vec<&'static str>,
    /// Why.
    pub reason: Reason,
    /// The same in words.
    pub explanation: String,
    /// What a user can change, best first; each is enough.
    pub remedies: Vec<Remedy>,
}

impl Gap {
    /// What to change, in words.
    pub fn to_see(&self) -> String {
        match self.remedies.as_slice() {
            // Only options of the user's own are in the way of all.
            [] => OWN_OVERRIDE.to_owned(),
            remedies => remedy::sentence(remedies),
        }
    }
}

/// What to do where a program's own options are in the way of all others.
pub const OWN_OVERRIDE: &str = "take away the --override-tensor (or LLAMA_ARG_OVERRIDE_TENSOR) that \
                                puts these experts on a device";

/// What a capture knows of why something was not seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// The function with expert ids was entered, and nothing in it was understood.
    not_understood: bool,
    /// Functions that have probes and were never entered.
    never_entered: Vec<&'static str>,
    /// Router logits told no experts.
    logits_refused: bool,
    /// Ways to read routing that the user has left out.
    left_out: Vec<&'static str>,
    /// Routers were asked to be on the CPU.
    router_on_cpu: bool,
    /// Ids by which weights are streamed to a device are certain to be seen.
    sees_streams: bool,
    /// The target was running before.
    attached: bool,
    /// At most so many records of layers in passes were lost.
    lost: u64,
    /// Some of them because the ring buffer was full.
    ring_full: bool,
}

impl Evidence {
    /// That of a document.
    pub fn of(stats: &Stats) -> Self {
        let hooks = &stats.target.hooks;
        let fetched = stats.integrity.routes.fetches > 0;
        Self {
            not_understood: is_not_understood(&stats.integrity.hits),
            sees_streams: fetched || sees_streams(hooks.iter().map(|of| &of.probe)),
            attached: stats.capture.mode == "attach",
            lost: stats.integrity.lost(),
            ring_full: stats.integrity.events.dropped.ring_full > 0,
            left_out: Routes::default()
                .iter()
                .map(routes::name)
                .filter(|route| !stats.capture.routes.contains(route))
                .collect(),
            ..Self::of_hooks(hooks, stats.integrity.logits.refused > 0)
        }
    }

    fn of_hooks(hooks: &[HookStats], logits_refused: bool) -> Self {
        let never_entered = [Hook::ExpertIds, Hook::Split].into_iter();
        Self {
            not_understood: false,
            never_entered: never_entered
                .filter_map(|hook| never_hit(hooks, hook))
                .collect(),
            logits_refused,
            left_out: Vec::new(),
            router_on_cpu: of(hooks, Hook::SplitDone).next().is_some(),
            sees_streams: false,
            attached: false,
            lost: 0,
            ring_full: false,
        }
    }

    /// Why a layer was not seen in so many passes, in which a device may have kept it, if there is one.
    /// Each of them takes a record that was lost, if that is why.
    fn reason(&self, passes: u64, has_device: bool) -> Reason {
        if self.not_understood {
            Reason::NotUnderstood
        } else if self.lost >= passes.max(1) {
            Reason::Lost
        } else if !self.left_out.is_empty() {
            Reason::RouteLeftOut
        } else if self.logits_refused {
            Reason::LogitsRefused
        } else if !self.never_entered.is_empty() {
            Reason::NeverEntered
        } else if has_device {
            Reason::OnADevice
        } else {
            Reason::NoDevice
        }
    }

    fn reason_of(
        layer: &LayerStats,
        unread: bool,
        options: &Options,
        reason: Reason,
    ) -> Option<Reason> {
        let prompts_only = layer.passes_not_seen.decode == 0;
        let by_a_copy = layer.routes.contains(&"device_copy");
        match (layer.coverage, reason) {
            (Coverage::Observed, _) => None,
            (Coverage::NotKnown, _) if layer.passes == 0 && !unread => Some(Reason::NothingToDo),
            (Coverage::NotKnown, _) => Some(Reason::UbatchNotRead),
            (Coverage::PartlyObserved, Reason::OnADevice)
                if prompts_only && options.streams() && !by_a_copy =>
            {
                Some(Reason::Streamed)
            }
            // The CPU shows a layer in every pass in which it computes it.
            (Coverage::PartlyObserved, Reason::NoDevice) => Some(Reason::NotComputed),
            (_, reason) => Some(reason),
        }
    }

    /// Sets the reason of each layer of a context that was not always seen; gives those that have the
    /// same one together. `unread` says that the context has passes of which it is not known whether they
    /// computed tokens.
    pub fn explain(
        &self,
        layers: &mut [LayerStats],
        unread: bool,
        shape: Option<&ModelShape>,
        options: &Options,
        role: Option<Role>,
    ) -> Vec<Gap> {
        let mut gaps: Vec<Gap> = Vec::new();
        let has_device = options.has_device(role);
        let missing = |layer: &LayerStats| layer.passes_not_seen.sum();
        let most = layers.iter().map(missing).max().unwrap_or(0);
        for layer in layers {
            // One that had nothing to do in any pass goes with the others.
            let passes = match missing(layer) {
                0 => most,
                passes => passes,
            };
            let reason = self.reason(passes, has_device);
            layer.reason = Self::reason_of(layer, unread, options, reason);
            let Some(reason) = layer.reason else { continue };
            let phases = phases(layer.passes_not_seen);
            let id = u32::from(layer.layer_id);
            let alike = |gap: &Gap| phases.is_empty() || gap.phases == phases;
            let known = gaps
                .iter_mut()
                .find(|gap| (gap.coverage, gap.reason) == (layer.coverage, reason) && alike(gap));
            match known.and_then(|gap| gap.layers.as_mut()) {
                Some(layers) => layers.push(id),
                None => gaps.push(Gap {
                    layers: Some(vec![id]),
                    coverage: layer.coverage,
                    phases,
                    reason,
                    explanation: String::new(),
                    remedies: Vec::new(),
                }),
            }
        }
        let idle: Vec<u32> = gaps
            .iter()
            .filter(|gap| gap.reason == Reason::NothingToDo)
            .flat_map(|gap| gap.layers.clone().unwrap_or_default())
            .collect();
        for gap in &mut gaps {
            let mut wanted = gap.layers.clone().unwrap_or_default();
            if gap.coverage == Coverage::NotVisible {
                // Where these will be computed is not known: what is advised does for them, too.
                wanted.extend(&idle);
            }
            let wanted = wanted.as_slice();
            let layers = shape.map(|shape| Layers { wanted, shape });
            let program = self.program(options, role);
            gap.explanation = self.explanation(gap.reason, gap.coverage, layers, &program);
            gap.remedies = self.remedies(gap.reason, layers, &program);
        }
        gaps
    }

    /// Of a context of which nothing was seen, and not even the layers are known. `passes` are those that
    /// computed tokens; of others that is not known.
    pub fn explain_unknown(&self, passes: PhasePasses, options: &Options) -> Gap {
        let (coverage, reason) = match passes.sum() {
            0 => (Coverage::NotKnown, Reason::UbatchNotRead),
            passes => (
                Coverage::NotVisible,
                self.reason_of_unknown(passes, options),
            ),
        };
        self.unknown(coverage, reason, phases(passes), options)
    }

    /// Of a target of which nothing at all was seen, in so many passes.
    pub fn explain_silence(&self, passes: u64, options: &Options) -> Gap {
        let reason = self.reason_of_unknown(passes, options);
        self.unknown(Coverage::NotVisible, reason, Vec::new(), options)
    }

    /// Of a context whose model is not known.
    fn reason_of_unknown(&self, passes: u64, options: &Options) -> Reason {
        self.reason(passes, options.has_device(options.role_of(None)))
    }

    fn unknown(
        &self,
        coverage: Coverage,
        reason: Reason,
        phases: Vec<&'static str>,
        options: &Options,
    ) -> Gap {
        let program = self.program(options, options.role_of(None));
        Gap {
            layers: None,
            coverage,
            phases,
            reason,
            explanation: self.explanation(reason, coverage, None, &program),
            remedies: self.remedies(reason, None, &program),
        }
    }

    fn program<'a>(&self, options: &'a Options, role: Option<Role>) -> Program<'a> {
        Program {
            options,
            role,
            sees_streams: self.sees_streams,
            router_on_cpu: self.router_on_cpu,
            attached: self.attached,
        }
    }

    fn explanation(
        &self,
        reason: Reason,
        coverage: Coverage,
        layers: Option<Layers<'_>>,
        program: &Program<'_>,
    ) -> String {
        match reason {
            Reason::OnADevice => {
                let asked = match remedy::has_router_on_cpu(layers, program) {
                    true => {
                        ", although routers were asked to be on the CPU: an override of the \
                         program's own comes before, or they are a draft model's"
                    }
                    false => "",
                };
                match coverage {
                    Coverage::NotVisible => {
                        format!("routers and experts stayed on a device, and so their ids{asked}")
                    }
                    _ => format!("their routing stayed on a device{asked}"),
                }
            }
            Reason::NoDevice => {
                let of = match layers {
                    Some(_) => " of these layers",
                    None => ": the model is dense, or its expert ids have another name",
                };
                format!("no device is used, and the CPU showed no routing{of}")
            }
            Reason::NotComputed => {
                "no device is used, and the CPU showed these layers in other passes: the program gave \
                 passes up before they were computed"
                    .to_owned()
            }
            Reason::Streamed => {
                "a device computed longer prompts, with weights streamed to it (op \
                                 offload), and no copy of the ids to the host was seen"
                    .to_owned()
            }
            Reason::NeverEntered => format!(
                "{} was never entered: nothing was computed on the CPU, or a compiler has put the \
                 function into its callers",
                self.never_entered.join(" and ")
            ),
            Reason::NotUnderstood => {
                "the function with expert ids was entered, and nothing in it was understood"
                    .to_owned()
            }
            Reason::LogitsRefused => "router logits were there, and told no experts".to_owned(),
            Reason::RouteLeftOut => {
                format!("--routes leaves out {}", self.left_out.join(", "))
            }
            Reason::UbatchNotRead => {
                "passes showed no routing, and whether they computed tokens is \
                                      not known"
                    .to_owned()
            }
            Reason::Lost => "records were lost, and theirs can be among them".to_owned(),
            Reason::NothingToDo => "no pass had an output, and without one they are not computed: \
                                    where their routing goes was not seen"
                .to_owned(),
        }
    }

    fn remedies(
        &self,
        reason: Reason,
        layers: Option<Layers<'_>>,
        program: &Program<'_>,
    ) -> Vec<Remedy> {
        let off_the_device = || match program.options.has_device(program.role) {
            true => remedies(Need::OffTheDevice, layers, program),
            false => Vec::new(),
        };
        match reason {
            Reason::NoDevice => {
                let build = "use a build of llama.cpp that docs/compatibility.md lists";
                vec![Remedy::other(&match layers {
                    Some(_) => build.to_owned(),
                    None => format!("if the model has experts, {build}"),
                })]
            }
            Reason::NotComputed => {
                let why = "see in the program's own messages why llama.cpp gave them up";
                vec![Remedy::other(why)]
            }
            Reason::OnADevice => off_the_device(),
            Reason::Streamed => remedies(Need::NotStreamed, layers, program),
            Reason::NeverEntered => {
                let build = "if it ran on the CPU, use a build without link-time optimisation";
                let build = Remedy::other(build);
                [off_the_device(), vec![build]].concat()
            }
            Reason::NotUnderstood => vec![Remedy::other(
                "use a build of llama.cpp that docs/compatibility.md lists, or one with debug \
                 information (-g)",
            )],
            Reason::Lost if self.ring_full => {
                vec![Remedy::other("trace with a larger --buffer-size")]
            }
            Reason::Lost | Reason::LogitsRefused => {
                vec![Remedy::other("mend what INCOMPLETE names")]
            }
            Reason::RouteLeftOut => {
                let all = Remedy::other("trace without --routes");
                let others = off_the_device().into_iter();
                // They can bring ids to a route that is left out, too.
                let others = others.map(|remedy| remedy.and("without --routes"));
                [all].into_iter().chain(others).collect()
            }
            Reason::UbatchNotRead => {
                let build = "to know it, use a build of b5922 or newer, with its symbols";
                [off_the_device(), vec![Remedy::other(build)]].concat()
            }
            Reason::NothingToDo => vec![Remedy::other(
                "trace until a prompt is through: its last token has an output, and so has each that \
                 is generated",
            )],
        }
    }
}

/// Whether the probes see for certain the ids by which the scheduler streams weights to a device.
/// ggml-backend's own functions can be part of their callers, where a device's are called by pointer.
pub fn sees_streams<'a>(probes: impl Iterator<Item = &'a Probe> + Clone) -> bool {
    [Hook::Fetch, Hook::WeightsFollow].into_iter().all(|hook| {
        let mut of_hook = probes.clone().filter(|probe| probe.hook == hook);
        of_hook.any(|probe| probe.symbol != hook.symbols()[0])
    })
}

fn phases(passes: PhasePasses) -> Vec<&'static str> {
    let PhasePasses { prefill, decode } = passes;
    let names = [("prefill", prefill), ("decode", decode)];
    let names = names.into_iter().filter(|(_, passes)| *passes > 0);
    names.map(|(name, _)| name).collect()
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
    use std::{ffi::OsString, path::PathBuf};

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
                    instruction: None,
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
        let why = Evidence::of_hooks(&hooks, false);
        assert_eq!(why.reason(1, true), Reason::NeverEntered);
        let words = why.explain_silence(1, &options("llama-cli")).explanation;
        assert!(words.starts_with("ggml_graph_compute was never"));

        // One of two libraries is enough.
        let hooks = [
            hook(Hook::ExpertIds, 0),
            hook(Hook::ExpertIds, 9),
            hook(Hook::Split, 1),
        ];
        let why = Evidence::of_hooks(&hooks, false);
        assert_eq!(why.reason(1, true), Reason::OnADevice);
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

    fn options(text: &str) -> Options {
        let words: Vec<OsString> = text.split(' ').map(OsString::from).collect();
        Options::parse(&words, |_| None)
    }

    #[test]
    fn what_was_asked_for_already_is_not_advised() {
        let options = options("llama-cli -ngl 99");
        let passes = PhasePasses {
            prefill: 1,
            decode: 0,
        };
        let gap = |hooks: &[HookStats], refused| {
            Evidence::of_hooks(hooks, refused).explain_unknown(passes, &options)
        };
        let plain = gap(&[hook(Hook::ExpertIds, 1)], false);
        assert_eq!((plain.layers, plain.phases), (None, vec!["prefill"]));
        assert_eq!(plain.remedies[0].options, ["--router-on-cpu"]);
        let asked = [hook(Hook::ExpertIds, 1), hook(Hook::SplitDone, 0)];
        let again = gap(&asked, false);
        assert!(again.explanation.contains("were asked to be on the CPU"));
        assert!(!again.to_see().contains("--router-on-cpu"));
        assert_eq!(gap(&asked, true).reason, Reason::LogitsRefused);
    }

    /// What a route that was left out would not have shown needs the same as without it.
    #[test]
    fn a_route_that_was_left_out_need_not_be_the_reason() {
        let why = Evidence {
            left_out: vec!["device_copy", "callback"],
            ..Evidence::of_hooks(&[hook(Hook::ExpertIds, 1)], false)
        };
        let gap = why.explain_silence(1, &options("llama-cli -ngl 99"));
        assert_eq!(gap.reason, Reason::RouteLeftOut);
        let told: Vec<&str> = gap.remedies.iter().map(|of| &*of.text).collect();
        assert_eq!(told[0], "trace without --routes");
        assert_eq!(told[1], "trace with --router-on-cpu, without --routes");
        assert!(told[2].starts_with("start the program with --cpu-moe"));

        let gap = why.explain_silence(1, &options("llama-cli -dev none"));
        assert_eq!(gap.remedies.len(), 1);
    }

    #[test]
    fn where_there_is_no_device_none_is_named() {
        let why = Evidence::of_hooks(&[hook(Hook::ExpertIds, 1)], false);
        let gap = |command| why.explain_silence(1, &options(command));
        let none = gap("llama-cli -dev none -md draft.gguf");
        assert_eq!(none.reason, Reason::NoDevice);
        let words = "no device is used, and the CPU showed no routing: the model is dense";
        assert!(none.explanation.starts_with(words));
        let [build] = &none.remedies[..] else {
            panic!("{none:?}");
        };
        assert!(build.text.starts_with("if the model has experts"));
        // The draft model has one.
        let of_draft = gap("llama-cli -dev none -md draft.gguf -devd CUDA0");
        assert_eq!(of_draft.reason, Reason::OnADevice);

        let mut layers = [layer(0, Coverage::NotVisible, 1, 0)];
        let options = options("llama-cli -dev none");
        let gaps = why.explain(&mut layers, false, None, &options, Some(Role::Main));
        assert_eq!(gaps[0].reason, Reason::NoDevice);
        let mut layers = [layer(0, Coverage::PartlyObserved, 1, 0)];
        let gaps = why.explain(&mut layers, false, None, &options, Some(Role::Main));
        assert_eq!(gaps[0].reason, Reason::NotComputed);
        assert!(gaps[0].to_see().contains("the program's own messages"));

        let hooks = [hook(Hook::ExpertIds, 0)];
        let gap = Evidence::of_hooks(&hooks, false).explain_silence(1, &options);
        assert_eq!(gap.reason, Reason::NeverEntered);
        assert!(gap.remedies.iter().all(|of| of.options.is_empty()));
    }

    fn layer(layer_id: u16, coverage: Coverage, prefill: u64, decode: u64) -> LayerStats {
        LayerStats {
            coverage,
            passes_not_seen: PhasePasses { prefill, decode },
            ..LayerStats::unseen(layer_id)
        }
    }

    /// Layers alike in why and when they were not seen are one gap.
    #[test]
    fn layers_are_told_together() {
        use Coverage::{NotKnown, NotVisible, Observed, PartlyObserved};
        let mut layers = [
            layer(0, Observed, 0, 0),
            layer(1, PartlyObserved, 2, 0),
            layer(2, NotVisible, 2, 9),
            layer(3, NotVisible, 1, 9),
            layer(4, PartlyObserved, 2, 9),
            layer(5, NotKnown, 0, 0),
        ];
        let options = options("llama-cli -ngl 99 --cpu-moe");
        let why = Evidence::of_hooks(&[hook(Hook::ExpertIds, 1)], false);
        let gaps = why.explain(&mut layers, true, None, &options, Some(Role::Main));
        let told: Vec<_> = gaps
            .iter()
            .map(|gap| (gap.layers.clone().unwrap(), gap.reason, gap.phases.clone()))
            .collect();
        let both = vec!["prefill", "decode"];
        assert_eq!(
            told,
            [
                (vec![1], Reason::Streamed, vec!["prefill"]),
                (vec![2, 3], Reason::OnADevice, both.clone()),
                (vec![4], Reason::OnADevice, both),
                (vec![5], Reason::UbatchNotRead, vec![]),
            ]
        );
        assert_eq!(layers[0].reason, None);
        assert_eq!(layers[1].reason, Some(Reason::Streamed));
        assert_eq!(gaps[0].remedies[0].options, ["--no-op-offload"]);
    }

    /// What was lost explains no more than it can have been.
    #[test]
    fn lost_records_are_no_device() {
        use Coverage::{NotVisible, PartlyObserved};
        let mut layers = [
            layer(0, PartlyObserved, 14, 0),
            layer(1, PartlyObserved, 15, 1),
            layer(2, NotVisible, 15, 20),
            // Nothing to do in any pass: one loss does not explain what the others show.
            layer(3, NotVisible, 0, 0),
        ];
        let options = options("llama-completion -ngl 99");
        let mut why = Evidence {
            lost: 16,
            ring_full: true,
            ..Evidence::of_hooks(&[hook(Hook::ExpertIds, 1)], false)
        };
        why.explain(&mut layers, false, None, &options, Some(Role::Main));
        let reasons = layers.clone().map(|layer| layer.reason.unwrap());
        let on_a_device = Reason::OnADevice;
        assert_eq!(
            reasons,
            [Reason::Lost, Reason::Lost, on_a_device, on_a_device]
        );
        let told = |why: &Evidence| {
            let gap = why.explain_silence(1, &options);
            (gap.reason, gap.to_see())
        };
        let (reason, advice) = told(&why);
        assert_eq!(reason, Reason::Lost);
        assert_eq!(advice, "trace with a larger --buffer-size");
        why.ring_full = false;
        assert_eq!(told(&why).1, "mend what INCOMPLETE names");
    }

    /// A last layer that had nothing to do goes with layers that are not visible, as far as it can be
    /// told; and what is advised for those does for it.
    #[test]
    fn a_layer_that_had_nothing_to_do_is_in_the_advice() {
        use Coverage::{NotKnown, NotVisible, Observed};
        let shape = ModelShape::with_experts_in(4, &[0, 1, 2, 3]);
        let options = options("llama-server -ngl 99 -ncmoe 2");
        let why = Evidence::of_hooks(&[hook(Hook::ExpertIds, 1)], false);
        let told = |coverage: [Coverage; 4], idle: Coverage| {
            let mut layers = [0, 1, 2, 3].map(|id| match coverage[usize::from(id)] {
                NotVisible => layer(id, NotVisible, 5, 0),
                coverage => layer(id, coverage, 0, 0),
            });
            layers[3] = layer(3, idle, 0, 0);
            let gaps = why.explain(&mut layers, false, Some(&shape), &options, Some(Role::Main));
            let told = gaps.into_iter().map(|gap| {
                let options = |of: &Remedy| of.options.join(" ");
                let advice: Vec<String> = gap.remedies.iter().map(options).collect();
                (gap.layers.unwrap(), gap.reason, advice.join("; "))
            });
            told.collect::<Vec<_>>()
        };
        let all = told([NotVisible; 4], NotVisible);
        let [(layers, Reason::OnADevice, advice)] = &all[..] else {
            panic!("{all:?}");
        };
        assert_eq!(*layers, [0, 1, 2, 3]);
        assert!(advice.contains("--cpu-moe"), "{advice}");
        let some = told([Observed, Observed, NotVisible, NotKnown], NotKnown);
        let [(hidden, _, advice), (idle, Reason::NothingToDo, _)] = &some[..] else {
            panic!("{some:?}");
        };
        assert_eq!((&hidden[..], &idle[..]), (&[2][..], &[3][..]));
        assert!(advice.contains("--n-cpu-moe 4"), "{advice}");
    }
}
