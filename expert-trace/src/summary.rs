//! What a person reads at the end, in the form of the original specification.

use std::{
    fmt::Write as _,
    io::{self, Write},
    path::Path,
    slice,
};

use crate::{
    model::{Block, Coverage, Exclusion, Pass},
    remedy,
    stats::{ContextStats, LayerStats, ModelFile, Stats, cost::Cost},
    target::printable,
    visibility::{Gap, Reason},
};

/// Writes the summary of the context that `layers` shows.
///
/// `top` limits the experts listed per layer.
///
/// # Errors
/// When `out` cannot be written.
pub fn write(out: &mut impl Write, stats: &Stats, top: Option<usize>) -> io::Result<()> {
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = render(&mut text, stats, top);
    out.write_all(text.as_bytes())
}

fn render(text: &mut String, stats: &Stats, top: Option<usize>) -> std::fmt::Result {
    writeln!(text, "\n=== Expert Usage Statistics ===")?;
    if let Some(since) = &stats.capture.counted_since {
        writeln!(text, "Counted since {since}, when counting began anew.")?;
    }
    for layer in &stats.layers {
        writeln!(
            text,
            "Layer {} ({} tokens):",
            layer.layer_id, layer.total_tokens
        )?;
        let shown = top.unwrap_or(usize::MAX);
        for expert in layer.experts.iter().take(shown) {
            writeln!(
                text,
                "  Expert {:3}: {:5} activations ({:.1}%)",
                expert.expert_id, expert.activations, expert.percentage
            )?;
        }
        if let Some(left @ 1..) = layer.experts.len().checked_sub(shown) {
            writeln!(text, "  ... and {left} more experts (--top N, -o FILE)")?;
        }
    }
    if stats.contexts.len() > 1
        && let Some(shown) = stats.layers_context
    {
        writeln!(
            text,
            "Context {shown} of {} is shown; all are in the JSON, and none are summed.",
            stats.contexts.len()
        )?;
    }
    second_blocks(text, stats)?;
    coverage(text, stats)?;
    for excluded in &stats.excluded {
        let what = match excluded.kind {
            Exclusion::Warmup => "warm-up (--include-warmup counts it)",
            Exclusion::Partial => "seen only in part at the edge of what is counted",
        };
        let count = excluded.count;
        writeln!(
            text,
            "Left out: {} passes, {} tokens: {what}",
            count.passes, count.tokens
        )?;
    }
    logits(text, stats)?;
    for callback in &stats.target.eval_callbacks {
        writeln!(
            text,
            "Eval callback of the program: {}; llama.cpp computes graphs piece by piece for it.",
            callback.shown()
        )?;
    }
    writeln!(text, "{}", cost_line(&stats.cost))?;
    writeln!(text, "{}", integrity_line(stats))
}

/// One line that says what the capture has cost.
fn cost_line(cost: &Cost) -> String {
    let mut text = format!("Cost: {} hits", cost.hits);
    // Writing to a String does not fail.
    if let Some(ns) = cost.ns_per_token {
        let _ = write!(text, ", {:.1} µs per token", ns / 1e3);
    }
    let share = cost.window_percent.map(|percent| (percent, "the time"));
    let of_target = cost.target_cpu_percent;
    let of_target = of_target.map(|percent| (percent, "the target's processor time"));
    for (percent, of) in share.into_iter().chain(of_target) {
        let _ = write!(text, ", {percent:.2} % of {of}");
    }
    let tracer = &cost.tracer;
    let _ = write!(text, "; the tracer took {:.2} s", tracer.cpu_s);
    if let Some(peak) = tracer.peak_rss_bytes {
        let _ = write!(text, " and {:.0} MiB", peak as f64 / f64::from(1 << 20));
    }
    text + "."
}

/// What was counted apart in the context that is shown.
fn second_blocks(text: &mut String, stats: &Stats) -> std::fmt::Result {
    let Some(context) = shown(stats) else {
        return Ok(());
    };
    let layers = context.layers.iter();
    let seconds: Vec<_> = layers
        .filter_map(|layer| Some((u32::from(layer.layer_id), layer.second_block.as_ref()?)))
        .collect();
    let Some((_, second)) = seconds.first() else {
        return Ok(());
    };
    let of = second
        .n_expert
        .map_or(String::new(), |n| format!(" of {n} experts"));
    let layers: Vec<u32> = seconds.iter().map(|(layer, _)| *layer).collect();
    writeln!(
        text,
        "Second block{of}, counted apart (second_block, -o FILE): layers {}.",
        ranges(&layers)
    )
}

/// Second blocks that were not seen in all passes in which their layers were, and what to change.
///
/// `expected` says that the model has them, `lost` how many records were lost.
fn second_block_gaps(layers: &[LayerStats], expected: bool, lost: u64) -> Vec<String> {
    let coverage = |layer: &LayerStats| match &layer.second_block {
        Some(second) if second.passes < layer.passes => Some(Coverage::PartlyObserved),
        None if expected && layer.passes > 0 => Some(Coverage::NotVisible),
        _ => None,
    };
    let remedy = |layer: &LayerStats| {
        let seen = layer.second_block.as_ref().map_or(0, |of| of.passes);
        if lost > 0 && lost >= layer.passes - seen {
            "records were lost, and its can be among them"
        } else if layer.routes.contains(&"fetch") {
            // Experts that are streamed are on the CPU already.
            "it is read where the CPU computes it: --no-op-offload"
        } else {
            "it is read where the CPU computes it: --cpu-moe --no-op-offload, or -ngl 0 \
             --no-op-offload"
        }
    };
    let mut gaps: Vec<((Coverage, &str), Vec<u32>)> = Vec::new();
    for layer in layers {
        let Some(coverage) = coverage(layer) else {
            continue;
        };
        let kind = (coverage, remedy(layer));
        let id = u32::from(layer.layer_id);
        match gaps.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, layers)) => layers.push(id),
            None => gaps.push((kind, vec![id])),
        }
    }
    let line = |((coverage, remedy), layers): ((Coverage, &str), Vec<u32>)| {
        let what = match coverage {
            Coverage::PartlyObserved => "Seen in part",
            _ => "Not visible",
        };
        let layers = named(&layers);
        format!("{what}: the second block of {layers} ({remedy}).")
    };
    gaps.into_iter().map(line).collect()
}

/// Experts that no token was routed to, in the layers of the context that is shown. Where not all was
/// seen, others may have been.
fn never_activated(text: &mut String, layers: &[LayerStats], complete: bool) -> std::fmt::Result {
    let all_seen = |layer: &LayerStats| complete && layer.coverage == Coverage::Observed;
    for (whole, limits) in [(true, ""), (false, " in what was seen")] {
        let layers = layers.iter().filter(|layer| all_seen(layer) == whole);
        let idle: Vec<_> = layers
            .filter_map(|layer| {
                let count = layer.experts_never_activated.as_ref()?.len();
                Some((count, layer.n_expert?, u32::from(layer.layer_id)))
            })
            .collect();
        let alike = idle.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1));
        let groups: Vec<String> = alike
            .filter(|group| group[0].0 > 0)
            .map(|group| {
                let layers: Vec<u32> = group.iter().map(|(.., layer)| *layer).collect();
                let (count, n_expert, _) = group[0];
                format!("{count} of {n_expert} in {}", named(&layers))
            })
            .collect();
        if !groups.is_empty() {
            writeln!(
                text,
                "Experts never activated{limits}: {}.",
                groups.join("; ")
            )?;
        }
    }
    Ok(())
}

/// The context that `layers` shows.
fn shown(stats: &Stats) -> Option<&ContextStats> {
    stats.layers_context.map(|id| &stats.contexts[id])
}

/// Names contexts of one model, where there are several.
fn label(all: &[ContextStats], models: &[ModelFile], model: Option<usize>, ids: &[u32]) -> String {
    if all.len() == 1 {
        return String::new();
    }
    let model = model.map_or(String::new(), |index| {
        let path = Path::new(&models[index].path);
        let name = path.file_name().unwrap_or(path.as_os_str());
        format!(" ({})", printable(name.as_ref()))
    });
    let plural = if ids.len() == 1 { "" } else { "s" };
    format!("Context{plural} {}{model}: ", ranges(ids))
}

/// What was not seen of contexts of which other passes were, the one that is shown first. Those alike are
/// told together: a program can make many.
fn context_gaps(
    text: &mut String,
    contexts: &[ContextStats],
    models: &[ModelFile],
    shown: Option<usize>,
    lost: u64,
) -> std::fmt::Result {
    type Gaps<'a> = (Option<usize>, &'a [Gap], Vec<String>);
    let mut alike: Vec<(Gaps<'_>, Vec<u32>)> = Vec::new();
    let (first, others): (Vec<&ContextStats>, Vec<&ContextStats>) = contexts
        .iter()
        .partition(|context| Some(context.id) == shown);
    for context in first.into_iter().chain(others) {
        let model = context.model.map(|index| &models[index].shape);
        let expected = model.is_some_and(|model| model.second_block_experts.is_some());
        let seconds = second_block_gaps(&context.layers, expected, lost);
        let gaps = (context.model, &context.gaps[..], seconds);
        let id = context.id as u32;
        match alike.iter_mut().find(|(known, _)| *known == gaps) {
            Some((_, ids)) => ids.push(id),
            None => alike.push((gaps, vec![id])),
        }
    }
    for ((model, gaps, seconds), mut ids) in alike {
        ids.sort_unstable();
        let label = label(contexts, models, model, &ids);
        for second in seconds {
            writeln!(text, "{label}{second}")?;
        }
        for gap in gaps {
            text.push_str(&label);
            write_gap(text, gap)?;
        }
    }
    Ok(())
}

/// What was not seen.
fn coverage(text: &mut String, stats: &Stats) -> std::fmt::Result {
    if let Some(context) = shown(stats) {
        never_activated(text, &context.layers, stats.integrity.complete)?;
        let label = label(
            &stats.contexts,
            &stats.models,
            context.model,
            &[context.id as u32],
        );
        let unseen = context.passes_not_visible;
        let passes = context.passes + unseen.passes;
        if unseen.passes > 0 {
            let what = not_visible(&context.gaps);
            writeln!(
                text,
                "{label}{what}: {} of {passes} passes, {} tokens.",
                unseen.passes, unseen.tokens
            )?;
        }
        if context.passes_not_known > 0 {
            writeln!(
                text,
                "{label}Perhaps not visible: {} passes.",
                context.passes_not_known
            )?;
        }
    }
    let lost = stats.integrity.lost();
    context_gaps(
        text,
        &stats.contexts,
        &stats.models,
        stats.layers_context,
        lost,
    )?;
    for context in &stats.not_visible {
        if context.model.is_some() && context.gaps.is_empty() {
            // Its model is dense.
            continue;
        }
        let tokens = match context.count.passes {
            0 => String::new(),
            _ => format!(", {} tokens", context.count.tokens),
        };
        let passes = context.count.passes + context.passes_not_known;
        let doubt = match context.gaps.iter().any(|gap| gap.layers.is_some()) {
            true => "",
            false => ", unless its model is dense (a draft model, say)",
        };
        let what = not_visible(&context.gaps);
        writeln!(
            text,
            "{what}: {passes} passes{tokens} of another context{doubt}."
        )?;
        for gap in &context.gaps {
            write_gap(text, gap)?;
        }
    }
    Ok(())
}

/// What was lost need not have been out of sight.
fn not_visible(gaps: &[Gap]) -> &'static str {
    match gaps.iter().any(|gap| gap.reason == Reason::Lost) {
        true => "Not seen",
        false => "Not visible",
    }
}

/// Layers that were not seen for one reason, why, and what to change: the best of it; the document has
/// all.
fn write_gap(text: &mut String, gap: &Gap) -> std::fmt::Result {
    const SHOWN: usize = 2;
    let layers = match &gap.layers {
        Some(layers) => named(layers),
        None => "all layers with experts".to_owned(),
    };
    let phases: Vec<&str> = gap
        .phases
        .iter()
        .map(|phase| match *phase {
            "prefill" => "prompts",
            other => other,
        })
        .collect();
    let what = match gap.coverage {
        Coverage::PartlyObserved => {
            format!("Seen in part: {layers}, not all {}", phases.join(" and "))
        }
        Coverage::NotKnown => format!("Perhaps not visible: {layers}"),
        Coverage::NotVisible | Coverage::Observed => {
            format!("{}: {layers}", not_visible(slice::from_ref(gap)))
        }
    };
    writeln!(text, "{what}: {}.", gap.explanation)?;
    let shown = gap.remedies.get(..SHOWN).unwrap_or(&gap.remedies);
    let shown = match shown {
        [] => gap.to_see(),
        shown => remedy::sentence(shown),
    };
    writeln!(text, "  To see them: {shown}.")
}

fn named(layers: &[u32]) -> String {
    let plural = if layers.len() == 1 { "" } else { "s" };
    format!("layer{plural} {}", ranges(layers))
}

/// What choices made from router logits rest on, and cost.
fn logits(text: &mut String, stats: &Stats) -> std::fmt::Result {
    let logits = &stats.integrity.logits;
    if logits.rows == 0 {
        return Ok(());
    }
    let layers = stats.contexts.iter().flat_map(|context| &context.layers);
    let close_calls: usize = layers.map(|layer| layer.close_calls.len()).sum();
    let percent = logits.host_ms / 10.0 / stats.capture.duration_s;
    // Of the capture as a whole, it is not known when counting has begun anew.
    let share = match stats.capture.counted_since {
        None => format!(" ({percent:.1} % of the capture)"),
        Some(_) => String::new(),
    };
    writeln!(
        text,
        "Chosen from router logits: {} rows, {} of them close calls. The host computed logits for \
         {:.1} ms{share}, in which the device waited.",
        logits.rows, close_calls, logits.host_ms,
    )
}

/// Ascending numbers, those that follow each other as one range: `0-3, 7`.
pub fn ranges(numbers: &[u32]) -> String {
    let mut text = String::new();
    for run in numbers.chunk_by(|a, b| a + 1 == *b) {
        let separator = if text.is_empty() { "" } else { ", " };
        let _ = match run {
            [one] => write!(text, "{separator}{one}"),
            [first, .., last] => write!(text, "{separator}{first}-{last}"),
            [] => Ok(()),
        };
    }
    text
}

/// One line that says whether anything was lost.
pub fn integrity_line(stats: &Stats) -> String {
    let integrity = &stats.integrity;
    if integrity.complete {
        format!(
            "Complete: {} rows seen, {} rows received, none lost.",
            integrity.rows.seen, integrity.received.rows
        )
    } else {
        format!("INCOMPLETE: {}.", integrity.problems.join("; "))
    }
}

/// Writes one line per routed token and layer, as they were computed.
#[derive(Debug)]
pub struct Log<W: Write> {
    out: W,
    detected: Vec<u16>,
    line: String,
}

impl<W: Write> Log<W> {
    /// A log that has announced no layer yet.
    pub fn new(out: W) -> Self {
        Self {
            out,
            detected: Vec::new(),
            line: String::new(),
        }
    }

    /// Writes the rows of a pass.
    ///
    /// # Errors
    /// When the output cannot be written.
    pub fn pass(&mut self, pass: &Pass) -> io::Result<()> {
        for block in &pass.blocks {
            let layer = block.layer;
            if !self.detected.contains(&layer) {
                self.detected.push(layer);
                writeln!(
                    self.out,
                    "[EXPERT-TRACE] Layer {layer}: MoE layer detected (tensor 'ffn_moe_topk')"
                )?;
            }
            self.rows(pass, block, "")?;
        }
        for block in &pass.second_blocks {
            self.rows(pass, block, ", second block")?;
        }
        Ok(())
    }

    fn rows(&mut self, pass: &Pass, block: &Block, part: &str) -> io::Result<()> {
        for ids in pass.rows(block) {
            self.line.clear();
            let layer = block.layer;
            let _ = write!(self.line, "[EXPERT-TRACE] Layer {layer}{part}: Experts [");
            for (i, id) in ids.iter().enumerate() {
                let separator = if i == 0 { "" } else { ", " };
                let _ = write!(self.line, "{separator}{id}");
            }
            self.line.push_str("]\n");
            self.out.write_all(self.line.as_bytes())?;
        }
        Ok(())
    }

    /// Hands what has been written to the system.
    ///
    /// # Errors
    /// When the output cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Excluded, PhasePasses},
        stats::SecondBlockStats,
    };

    #[test]
    fn numbers_in_a_row_are_one_range() {
        assert_eq!(ranges(&[]), "");
        assert_eq!(ranges(&[3]), "3");
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8");
    }

    fn layer(layer_id: u16, coverage: Coverage, idle: u32) -> LayerStats {
        LayerStats {
            coverage,
            n_expert: Some(32),
            passes: 9,
            passes_not_seen: PhasePasses::default(),
            experts_never_activated: Some((0..idle).collect()),
            ..LayerStats::unseen(layer_id)
        }
    }

    #[test]
    fn experts_out_of_sight_are_not_said_to_be_idle() {
        let layers = [
            layer(0, Coverage::Observed, 3),
            layer(1, Coverage::Observed, 3),
            layer(2, Coverage::PartlyObserved, 7),
        ];
        let told = |complete| {
            let mut text = String::new();
            never_activated(&mut text, &layers, complete).unwrap();
            text
        };
        assert_eq!(
            told(true),
            "Experts never activated: 3 of 32 in layers 0-1.\n\
             Experts never activated in what was seen: 7 of 32 in layer 2.\n"
        );
        assert_eq!(
            told(false),
            "Experts never activated in what was seen: 3 of 32 in layers 0-1; 7 of 32 in layer 2.\n"
        );
    }

    #[test]
    fn a_second_block_is_not_sought_where_its_experts_are_already() {
        let second = |passes| SecondBlockStats {
            n_expert: None,
            k: 2,
            coverage: Coverage::Observed,
            passes,
            experts_never_activated: None,
            total_tokens: 9,
            prefill_tokens: 0,
            decode_tokens: 9,
            activations: 18,
            experts: Vec::new(),
        };
        let with = |id, routes: &[&'static str], passes: Option<u64>| LayerStats {
            routes: routes.to_vec(),
            second_block: passes.map(second),
            ..layer(id, Coverage::Observed, 0)
        };
        let layers = [
            with(0, &["router"], Some(9)),
            with(1, &["fetch"], None),
            with(2, &["fetch"], None),
            with(3, &["split_input", "fetch"], Some(8)),
            with(4, &["logits"], None),
            LayerStats::unseen(5),
        ];
        let remedies: Vec<String> = second_block_gaps(&layers, true, 0)
            .iter()
            .map(|line| line.replace("it is read where the CPU computes it: ", ""))
            .collect();
        assert_eq!(
            remedies,
            [
                "Not visible: the second block of layers 1-2 (--no-op-offload).",
                "Seen in part: the second block of layer 3 (--no-op-offload).",
                "Not visible: the second block of layer 4 \
                 (--cpu-moe --no-op-offload, or -ngl 0 --no-op-offload).",
            ]
        );
        let told = second_block_gaps(&layers, true, 1);
        let lost = "Seen in part: the second block of layer 3 (records were lost, and its can be \
                    among them).";
        assert_eq!((told.len(), &told[1][..]), (3, lost));
        // Most models have none.
        assert_eq!(second_block_gaps(&layers, false, 0).len(), 1);
    }

    /// A program can have several contexts, of which the one with most tokens is shown.
    #[test]
    fn gaps_of_contexts_that_are_not_shown_are_told() {
        let gap = |layer| Gap {
            layers: Some(vec![layer]),
            coverage: Coverage::NotVisible,
            phases: vec!["decode"],
            reason: Reason::OnADevice,
            explanation: "why".to_owned(),
            remedies: Vec::new(),
        };
        let context = |id, gaps| ContextStats {
            id,
            trace_context: id,
            pid: 1,
            model: None,
            passes: 1,
            pass_source: "scheduler",
            phase_source: "ubatch",
            excluded: Vec::new(),
            passes_not_visible: Excluded::default(),
            passes_not_known: 0,
            layers_not_visible: None,
            gaps,
            layers: Vec::new(),
        };
        let told = |contexts: &[ContextStats]| {
            let mut text = String::new();
            context_gaps(&mut text, contexts, &[], Some(0), 0).unwrap();
            let lines = text.lines().filter(|line| !line.starts_with("  To see"));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        let alone = told(&[context(0, vec![gap(7)])]);
        assert_eq!(alone, ["Not visible: layer 7: why."]);
        let contexts = [
            context(0, vec![]),
            context(1, vec![gap(2), gap(4)]),
            context(2, vec![gap(3)]),
            context(3, vec![gap(2), gap(4)]),
        ];
        assert_eq!(
            told(&contexts),
            [
                "Contexts 1, 3: Not visible: layer 2: why.",
                "Contexts 1, 3: Not visible: layer 4: why.",
                "Context 2: Not visible: layer 3: why.",
            ]
        );
    }
}
