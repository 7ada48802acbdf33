//! The document of a capture, drawn up from all that it knows.

use std::{collections::BTreeSet, time::Duration};

use anyhow::Context as _;

use super::{Capture, pid_of};
use crate::{
    attach::AttachError,
    layout::Layout,
    model::{Context, Ends},
    probes::Hook,
    routes,
    stats::{self, Capture as CaptureStats, Integrity, Stats, cost::Cost},
    stats_schema,
};

impl Capture {
    pub(super) fn stats(
        &self,
        integrity: Integrity,
        cost: Cost,
        why: &'static str,
        duration: Duration,
    ) -> anyhow::Result<Stats> {
        let counted = |context: &&Context| context.passes > 0;
        let contexts: Vec<&Context> = self.model.contexts().iter().filter(counted).collect();
        let main = stats::main_context(&contexts);
        let tensor_layouts = self
            .plan
            .of(Hook::ExpertIds)
            .map(|probe| {
                let shown = self.session.candidate_layout(probe.site.source)?;
                Ok(Layout::new(probe.declared, shown))
            })
            .collect::<Result<_, AttachError>>()?;
        let hooks = self
            .hooks
            .iter()
            .map(|probe| {
                Ok(stats::HookStats {
                    probe: probe.clone(),
                    hits: self.session.hits(probe)?,
                })
            })
            .collect::<Result<Vec<_>, AttachError>>()?;
        let (started, _) = self.started.context("the capture has not started")?;
        let processes = self.targets.describe(self.pid.get());
        let models_of = |context: &Context| self.targets.models.indices_of(context.process);
        let of_process: Vec<Vec<usize>> = contexts.iter().map(|of| models_of(of)).collect();
        let not_visible = self.not_visible();
        let models = self.targets.models.files().to_vec();
        let main_target = self.targets.main.describe(self.pid.get());
        Ok(Stats {
            schema: stats::Schema {
                name: stats_schema::NAME,
                version: stats_schema::VERSION,
            },
            tool: stats::Tool {
                name: env!("CARGO_PKG_NAME"),
                version: env!("CARGO_PKG_VERSION"),
            },
            target: stats::Target {
                process: main_target,
                hooks,
                tensor_layouts,
                eval_callbacks: self.targets.eval_callbacks.clone(),
            },
            capture: CaptureStats {
                mode: self.mode(),
                started: humantime::format_rfc3339_millis(started).to_string(),
                duration_s: duration.as_secs_f64(),
                ended: why,
                counted_since: self
                    .baseline
                    .map(|of| humantime::format_rfc3339_millis(of.since).to_string()),
                include_warmup: self.recording.include_warmup,
                attached_by: self.session.attached_by(),
                routes: self.plan.routes().iter().map(routes::name).collect(),
                late_libraries: self.late_libraries(),
            },
            processes,
            layers_context: main,
            layers: main.map_or_else(Vec::new, |main| stats::specified_layers(contexts[main])),
            contexts: contexts
                .iter()
                .enumerate()
                .map(|(id, context)| {
                    let of_process = &of_process[id];
                    stats::context_stats(id, context, &models, of_process, self.pid_of(context))
                })
                .collect(),
            not_visible,
            excluded: stats::excluded_list(&self.model.excluded()),
            models,
            trace: None,
            integrity,
            cost,
        }
        .explained(&|pid| self.targets.options(pid, self.pid.get())))
    }

    /// Contexts that computed something, or may have, and of which nothing is counted.
    fn not_visible(&self) -> Vec<stats::NotVisible> {
        let contexts = self.model.contexts().iter();
        let readable: BTreeSet<u32> = contexts
            .clone()
            .filter(|context| context.reads_ubatches())
            .map(|context| context.process)
            .collect();
        let (seen, unseen): (Vec<&Context>, Vec<&Context>) =
            contexts.partition(|context| context.passes > 0);
        let not_known = |context: &Context| match readable.contains(&context.process) {
            true => context.passes_unread(),
            false => context.passes_not_known(),
        };
        let computed = |context: &Context| context.not_visible(Ends::default()).passes > 0;
        let unseen: Vec<&Context> = unseen
            .into_iter()
            .filter(|context| computed(context) || not_known(context) > 0)
            .collect();
        let models = self.targets.models.files();
        let model_of = |context: &Context| {
            let of_process = self.targets.models.indices_of(context.process);
            let has_nextn = |model: &&usize| models[**model].shape.nextn_predict_layers > 0;
            let nextn: Vec<usize> = of_process.iter().filter(has_nextn).copied().collect();
            let beside = |other: &&&Context| other.process == context.process;
            let fitting = |other: &&Context| stats::fitting_models(other, models, &of_process);
            let in_part = |other: &&Context| other.not_visible(Ends::default()).passes > 0;
            let in_part = seen.iter().filter(beside).any(in_part);
            let seen: Vec<Vec<usize>> = seen.iter().filter(beside).map(fitting).collect();
            let known = stats::unseen::Known {
                models: &of_process,
                nextn: &nextn,
                seen: &seen,
                unseen: unseen.iter().filter(beside).count(),
            };
            let model = stats::unseen::model(&known, computed(context))?;
            // Where a device can hide some passes of a model, what is left need not be another one.
            let is_dense = models[model].shape.moe_layers.is_empty();
            let options = || self.targets.options(self.pid_of(context), self.pid.get());
            let hides = in_part || is_dense && options().has_device(None);
            let is_only = of_process.len() == 1;
            (is_only || !hides).then_some(model)
        };
        unseen
            .iter()
            .map(|context| {
                let (pid, model) = (self.pid_of(context), model_of(context));
                stats::unseen_context(context, not_known(context), models, model, pid)
            })
            .collect()
    }

    /// Process of a context, in our PID namespace where that is known.
    fn pid_of(&self, context: &Context) -> u32 {
        pid_of(context, self.first_process, self.pid.get())
    }
}
