//! What a person reads at the end, in the form of the original specification.

use std::{
    fmt::Write as _,
    io::{self, Write},
};

use crate::{
    model::{Coverage, Exclusion, Pass},
    remedy,
    stats::{ContextStats, LayerStats, Stats},
    visibility::Gap,
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
    coverage(text, stats)?;
    for excluded in &stats.excluded {
        let what = match excluded.kind {
            Exclusion::Warmup => "warm-up (--include-warmup counts it)",
            Exclusion::Partial => "seen only in part at the edge of the capture",
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
    writeln!(text, "{}", integrity_line(stats))
}

/// Experts that no token was routed to, in the layers of the context that is shown.
fn never_activated(text: &mut String, context: &ContextStats) -> std::fmt::Result {
    let idle = |layer: &LayerStats| {
        let count = layer.experts_never_activated.as_ref()?.len();
        Some((count, layer.n_expert?, u32::from(layer.layer_id)))
    };
    let idle: Vec<_> = context.layers.iter().filter_map(idle).collect();
    let alike = idle.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1));
    let groups: Vec<String> = alike
        .filter(|group| group[0].0 > 0)
        .map(|group| {
            let layers: Vec<u32> = group.iter().map(|(.., layer)| *layer).collect();
            let (count, n_expert, _) = group[0];
            format!("{count} of {n_expert} in {}", named(&layers))
        })
        .collect();
    if groups.is_empty() {
        return Ok(());
    }
    writeln!(text, "Experts never activated: {}.", groups.join("; "))
}

/// What was not seen of the context that is shown, and of those of which nothing was.
fn coverage(text: &mut String, stats: &Stats) -> std::fmt::Result {
    if let Some(context) = stats.layers_context.map(|id| &stats.contexts[id]) {
        never_activated(text, context)?;
        let unseen = context.passes_not_visible;
        let passes = context.passes + unseen.passes;
        if unseen.passes > 0 {
            writeln!(
                text,
                "Not visible: {} of {passes} passes, {} tokens.",
                unseen.passes, unseen.tokens
            )?;
        }
        if context.passes_not_known > 0 {
            writeln!(
                text,
                "Perhaps not visible: {} passes.",
                context.passes_not_known
            )?;
        }
        for gap in &context.gaps {
            write_gap(text, gap)?;
        }
    }
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
        writeln!(
            text,
            "Not visible: {passes} passes{tokens} of another context{doubt}."
        )?;
        for gap in &context.gaps {
            write_gap(text, gap)?;
        }
    }
    Ok(())
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
        Coverage::NotVisible | Coverage::Observed => format!("Not visible: {layers}"),
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
    let duration_ms = stats.capture.duration_s * 1e3;
    writeln!(
        text,
        "Chosen from router logits: {} rows, {} of them close calls. The host computed logits for \
         {:.1} ms ({:.1} % of the capture), in which the device waited.",
        logits.rows,
        close_calls,
        logits.host_ms,
        100.0 * logits.host_ms / duration_ms
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
            for ids in pass.rows(block) {
                self.line.clear();
                let _ = write!(self.line, "[EXPERT-TRACE] Layer {layer}: Experts [");
                for (i, id) in ids.iter().enumerate() {
                    let separator = if i == 0 { "" } else { ", " };
                    let _ = write!(self.line, "{separator}{id}");
                }
                self.line.push_str("]\n");
                self.out.write_all(self.line.as_bytes())?;
            }
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
    use super::ranges;

    #[test]
    fn numbers_in_a_row_are_one_range() {
        assert_eq!(ranges(&[]), "");
        assert_eq!(ranges(&[3]), "3");
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8");
    }
}
