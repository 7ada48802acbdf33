//! Finished passes to rows of a trace. Pure: the same passes give the same rows.

use expert_trace_common::{ROW_OUTPUT, RowInfo};

use super::{ContextDetail, Kind, Reason, Row};
use crate::model::{Block, Context, Exclusion, Fate, Finished, Pass, RowPhases};

/// What is to be recorded, and how.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// Whether to record token ids.
    pub tokens: bool,
    /// What is added to `CLOCK_MONOTONIC` to get the time since 1970, UTC, in nanoseconds.
    pub clock_offset_ns: i64,
}

/// What a file says of a context.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Described {
    #[default]
    Nothing,
    /// This, from before it had shown any layers: the models that it can have by its process alone.
    WithoutLayers(String),
    /// All that is known.
    WithLayers,
}

/// What has been recorded of a context.
#[derive(Clone, Debug, Default)]
struct Progress {
    /// What the file says of which context this is.
    described: Described,
    /// Number that the next pass has in the target, if none was lost.
    awaited: Option<u32>,
    /// Number that the next pass has in the trace.
    next: u32,
}

/// Turns passes into rows.
#[derive(Debug, Default)]
pub struct Recorder {
    settings: Settings,
    contexts: Vec<Progress>,
    /// Of the pass at hand: tokens whose output is wanted, by their places in the ubatch.
    outputs: Vec<u32>,
    /// Rows in gaps of known size.
    located: u64,
    /// Whether a gap's size is not known.
    unknown: bool,
}

impl Recorder {
    /// Nothing recorded yet.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            ..Self::default()
        }
    }

    /// Records a pass: `push` gets its rows. `describe` says what is known of a context.
    pub fn pass(
        &mut self,
        finished: &Finished<'_>,
        describe: &dyn Fn(&Context) -> ContextDetail,
        push: &mut impl FnMut(&Row<'_>),
    ) {
        let Finished {
            pass,
            context,
            fate,
            ..
        } = *finished;
        let index = pass.context;
        if index >= self.contexts.len() {
            self.contexts.resize_with(index + 1, Progress::default);
        }
        let has_layers = !context.layers.is_empty();
        let tells = pass.has_rows() || has_layers;
        let progress = &mut self.contexts[index];
        let blank = Row {
            context: Some(index as u32),
            time_ns: wall_clock(self.settings, pass.began_ns),
            ..Row::of(Kind::Gap)
        };
        let is_described = match &progress.described {
            Described::Nothing => !tells,
            Described::WithoutLayers(_) => !has_layers,
            Described::WithLayers => true,
        };
        if !is_described {
            // A structure of numbers and JSON becomes JSON.
            let detail = serde_json::to_string(&describe(context)).unwrap_or_default();
            let told =
                matches!(&progress.described, Described::WithoutLayers(told) if *told == detail);
            if !told {
                push(&Row {
                    kind: Kind::Context,
                    detail: Some(&detail),
                    ..blank
                });
            }
            progress.described = match has_layers {
                true => Described::WithLayers,
                false => Described::WithoutLayers(detail),
            };
        }
        let first_lost = progress.next;
        let number = progress.number(pass.number);
        if tells && number > first_lost {
            self.unknown = true;
            push(&Row {
                pass: Some(first_lost),
                reason: Some(Reason::PassesLost),
                ..blank
            });
        }
        let blank = Row {
            pass: Some(number),
            ..blank
        };
        match fate {
            Fate::Counted(phases) | Fate::Split(phases) if pass.has_rows() => {
                self.rows(pass, phases, blank, push);
                self.gaps(finished, blank, push);
            }
            Fate::Counted(_) | Fate::Split(_) if has_layers => self.unseen(finished, blank, push),
            Fate::Excluded(why) => push(&Row {
                kind: Kind::Excluded,
                rows: Some(pass.token_count()),
                reason: Some(match why {
                    Exclusion::Warmup => Reason::Warmup,
                    Exclusion::Partial => Reason::Partial,
                }),
                ..blank
            }),
            Fate::Counted(_) | Fate::Split(_) | Fate::Ignored => {}
        }
    }

    /// Another file begins: it has to be understood by itself.
    pub fn begin_part(&mut self) {
        for progress in &mut self.contexts {
            progress.described = Described::Nothing;
        }
    }

    /// Records what the kernel has counted as lost, and what is in no gap yet.
    pub fn rest(&mut self, lost_rows: u64, now_ns: u64, push: &mut impl FnMut(&Row<'_>)) {
        let rest = lost_rows.saturating_sub(self.located);
        if rest == 0 {
            return;
        }
        let rows = u32::try_from(rest).ok().filter(|_| !self.unknown);
        push(&Row {
            rows,
            reason: Some(Reason::NotKnownWhere),
            time_ns: wall_clock(self.settings, now_ns),
            ..Row::of(Kind::Gap)
        });
    }

    /// A row that is no pass'.
    pub fn summary<'a>(&self, detail: &'a str, now_ns: u64) -> Row<'a> {
        Row {
            detail: Some(detail),
            time_ns: wall_clock(self.settings, now_ns),
            ..Row::of(Kind::Summary)
        }
    }

    fn rows(
        &mut self,
        pass: &Pass,
        phases: &RowPhases,
        blank: Row<'_>,
        push: &mut impl FnMut(&Row<'_>),
    ) {
        let ubatch = pass.ubatch();
        let outputs = (0..).zip(ubatch);
        self.outputs.clear();
        self.outputs.extend(
            outputs
                .filter(|(_, info)| info.flags & ROW_OUTPUT != 0)
                .map(|(index, _)| index),
        );
        let first = pass.blocks.iter().map(|block| (Kind::Routed, block));
        let second = pass.second_blocks.iter();
        for (kind, block) in first.chain(second.map(|block| (Kind::SecondBlock, block))) {
            let blank = Row {
                kind,
                layer: Some(block.layer),
                time_ns: wall_clock(self.settings, block.time_ns),
                ..blank
            };
            self.block(pass, block, phases, blank, push);
        }
    }

    fn block(
        &self,
        pass: &Pass,
        block: &Block,
        phases: &RowPhases,
        blank: Row<'_>,
        push: &mut impl FnMut(&Row<'_>),
    ) {
        let ubatch = pass.ubatch();
        let tokens = if self.settings.tokens {
            pass.tokens()
        } else {
            &[]
        };
        // The last layers work on the tokens alone whose output is wanted.
        let total = block.total_rows as usize;
        let places = if total == ubatch.len() {
            Places::All
        } else if total == self.outputs.len() {
            Places::Some(&self.outputs)
        } else {
            Places::Unknown
        };
        let (mut row, end) = (block.first_row, block.first_row + block.rows);
        let mut ids = pass.rows(block);
        let mut weights = pass.weights(block);
        while row < end {
            let (phase, run_end) = phases.run(row, end, block.total_rows);
            for (row, experts) in (row..run_end).zip(&mut ids) {
                let place = places.of(row);
                let info: Option<&RowInfo> = place.and_then(|place| ubatch.get(place));
                push(&Row {
                    phase: Some(phase),
                    row: Some(row),
                    sequence: info.map(|info| info.sequence),
                    position: info.map(|info| info.position),
                    token: place.and_then(|place| tokens.get(place)).copied(),
                    experts,
                    weights: weights.as_mut().and_then(Iterator::next),
                    ..blank
                });
            }
            row = run_end;
        }
    }

    fn gaps(&mut self, finished: &Finished<'_>, blank: Row<'_>, push: &mut impl FnMut(&Row<'_>)) {
        let pass = finished.pass;
        for (layer, rows) in pass.missing_rows() {
            let missing = rows.end - rows.start;
            self.located += u64::from(missing);
            push(&Row {
                layer: Some(layer),
                row: Some(rows.start),
                rows: Some(missing),
                reason: Some(Reason::RowsLost),
                ..blank
            });
        }
        for (layer, rows) in pass.missing_second_rows() {
            let missing = rows.end - rows.start;
            self.located += u64::from(missing);
            push(&Row {
                layer: Some(layer),
                row: Some(rows.start),
                rows: Some(missing),
                reason: Some(Reason::SecondRowsLost),
                ..blank
            });
        }
        for layer in finished.missing_second_blocks() {
            // Whether they were lost is not known: other routes do not show them.
            self.unknown = true;
            push(&Row {
                layer: Some(layer),
                rows: pass.total_rows(layer),
                reason: Some(Reason::SecondBlockNotSeen),
                ..blank
            });
        }
        let last = finished.context.layers.numbers().next_back();
        for layer in finished.missing_layers() {
            // How many rows the last layer works on, and whether it is the last, is not known for certain.
            let rows = (Some(layer) != last).then(|| pass.token_count());
            match rows {
                Some(rows) => self.located += u64::from(rows),
                None => self.unknown = true,
            }
            push(&Row {
                layer: Some(layer),
                rows,
                reason: Some(Reason::LayerNotSeen),
                ..blank
            });
        }
    }

    /// A pass without routing, of a context that has shown some. Where ubatches are read, one without has
    /// no tokens.
    fn unseen(&mut self, finished: &Finished<'_>, blank: Row<'_>, push: &mut impl FnMut(&Row<'_>)) {
        let Finished { pass, context, .. } = finished;
        let known = pass.has_ubatch();
        let has_no_tokens = !known && !pass.ubatch_unreadable && context.reads_ubatches();
        if has_no_tokens || finished.may_idle() {
            return;
        }
        self.unknown = true;
        push(&Row {
            rows: known.then(|| pass.token_count()),
            reason: Some(Reason::PassNotSeen),
            ..blank
        });
    }
}

impl Progress {
    /// From the number that a pass has in the target to its number in the trace, which leaves room for
    /// those that were lost before it. Passes of a context that was known by its scheduler are numbered
    /// anew in the target when its `llama_context` is known.
    fn number(&mut self, in_target: u32) -> u32 {
        let lost = match self.awaited {
            Some(awaited) => in_target.saturating_sub(awaited),
            None => 0,
        };
        self.awaited = Some(in_target.saturating_add(1));
        let number = self.next.saturating_add(lost);
        self.next = number.saturating_add(1);
        number
    }
}

/// Which tokens of the ubatch the rows of a layer are.
enum Places<'a> {
    /// Each its own.
    All,
    /// Those at these places.
    Some(&'a [u32]),
    /// It is not known.
    Unknown,
}

impl Places<'_> {
    fn of(&self, row: u32) -> Option<usize> {
        match self {
            Places::All => Some(row as usize),
            Places::Some(places) => places.get(row as usize).map(|place| *place as usize),
            Places::Unknown => None,
        }
    }
}

fn wall_clock(settings: Settings, monotonic_ns: u64) -> i64 {
    (monotonic_ns as i64).saturating_add(settings.clock_offset_ns)
}
