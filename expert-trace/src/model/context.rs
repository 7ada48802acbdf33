//! Counts of one context, and what of it was not seen.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::{Add, Sub},
};

use expert_trace_common::{Header, PassSource, Phase};
use serde::Serialize;

use super::{
    CloseCall, Layers, Pass,
    layer::LayerSet,
    pass::{RowPhases, Sequence},
};

/// Why a pass is not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Exclusion {
    /// Evaluated before any other pass of its context, to warm up.
    Warmup,
    /// Only a part of it was seen, at the start or the end of the capture, or since counting began anew.
    Partial,
}

/// Passes that were left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Excluded {
    /// Number of passes.
    pub passes: u64,
    /// Their tokens.
    pub tokens: u64,
}

/// Layers that do not work on all rows of all passes of a context, by the model file.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ends {
    /// Whether the model is known.
    pub known: bool,
    /// The last layer that every decode goes through, if it has experts: it may work on output rows
    /// alone.
    pub last: Option<u16>,
    /// The first NextN block, if there is one: blocks that predict further tokens come after all other
    /// layers, work on output rows alone, and each of them runs in passes of its own.
    pub nextn: Option<u16>,
}

impl Ends {
    fn is_nextn(self, layer: u16) -> bool {
        self.nextn.is_some_and(|first| layer >= first)
    }

    /// Whether a layer may have nothing to do in a pass without output.
    fn may_idle(self, layer: u16) -> bool {
        self.last == Some(layer) || self.is_nextn(layer)
    }
}

/// Whether the routing of a layer was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Coverage {
    /// In every pass in which it had something to do.
    Observed,
    /// In some passes, and not in others.
    PartlyObserved,
    /// In no pass.
    NotVisible,
    /// In all passes in which it is known to have had something to do, which can be none; there may have
    /// been others.
    NotKnown,
}

/// Passes by phase. A pass that works on any token of a prompt is one of prefill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PhasePasses {
    /// Passes with tokens of prompts.
    pub prefill: u64,
    /// All others.
    pub decode: u64,
}

impl PhasePasses {
    /// Of both phases.
    pub fn sum(self) -> u64 {
        self.prefill + self.decode
    }

    fn note(&mut self, phase: Phase) {
        match phase {
            Phase::Prefill => self.prefill += 1,
            Phase::Decode | Phase::Unknown => self.decode += 1,
        }
    }
}

impl Add for PhasePasses {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            prefill: self.prefill + other.prefill,
            decode: self.decode + other.decode,
        }
    }
}

impl Sub for PhasePasses {
    type Output = Self;

    /// Passes that `other`, a part of these, has not.
    fn sub(self, other: Self) -> Self {
        Self {
            prefill: self.prefill - other.prefill,
            decode: self.decode - other.decode,
        }
    }
}

/// Passes, those in which no output was wanted apart: the last layers had nothing to do in them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passes {
    /// Passes with an output, and such of which that is not known.
    pub with_output: PhasePasses,
    /// Passes without.
    pub without_output: PhasePasses,
}

impl Passes {
    /// All of them.
    pub fn sum(self) -> u64 {
        self.all().sum()
    }

    /// The same by phase alone.
    pub fn all(self) -> PhasePasses {
        self.with_output + self.without_output
    }

    fn note(&mut self, phase: Phase, no_output: bool) {
        if no_output {
            self.without_output.note(phase);
        } else {
            self.with_output.note(phase);
        }
    }
}

/// Counts of one context.
#[derive(Debug, Default)]
pub struct Context {
    /// Its number: the order in which contexts were first seen.
    pub number: usize,
    /// Process, as the initial PID namespace numbers it.
    pub process: u32,
    /// How its passes were told apart.
    pub layer_order: bool,
    /// Library that its ids were read in: [`crate::probes::Probe::source`].
    pub source: u32,
    /// Passes counted.
    pub passes: u64,
    /// The same by phase.
    pub by_phase: Passes,
    /// Those of them whose ubatch was read, so that prefill and decode are known row by row.
    pub passes_with_ubatch: u64,
    /// Passes that computed tokens for an output, and of which no routing was seen.
    pub unseen: Excluded,
    /// Passes that computed tokens, none of them for an output, and of which no routing was seen.
    pub unseen_without_output: Excluded,
    /// Both by phase.
    pub unseen_by_phase: Passes,
    /// Passes without a ubatch, of which no routing was seen.
    silent: u64,
    /// Passes whose ubatch could not be read, and of which no routing was seen.
    unread: u64,
    /// Counts by layer.
    pub layers: Layers,
    /// Passes left out.
    pub excluded: BTreeMap<Exclusion, Excluded>,

    pub(super) current: Option<Pass>,
    pub(super) held: Option<Pass>,
    /// Whether a pass that is no warm-up has been seen.
    pub(super) worked: bool,
    /// Whether a pass has been counted that had an output, and so went through all layers.
    pub(super) knows_layers: bool,
    /// Whether a warm-up was left out before counting began anew.
    warmed_up: bool,
    /// Whether a ubatch was read before counting began anew.
    read_ubatches: bool,
    /// Where each sequence is.
    sequences: BTreeMap<u16, Sequence>,
    /// Sequences that the last pass had equal parts of.
    equal_parts: BTreeSet<u16>,
}

impl Context {
    /// That of a record, of which nothing is counted yet.
    pub(super) fn new(number: usize, header: &Header) -> Self {
        Self {
            number,
            process: header.process,
            layer_order: header.pass_source == PassSource::LayerOrder as u8,
            ..Self::default()
        }
    }

    /// Tokens of the layer that routed most: what passed through the model.
    pub fn tokens(&self) -> u64 {
        self.layers
            .iter()
            .map(|(_, layer)| layer.tally.total_tokens())
            .max()
            .unwrap_or(0)
    }

    /// Passes of which no routing was seen, though a layer with experts had something to do.
    pub fn not_visible(&self, ends: Ends) -> Excluded {
        let idle = self.layers.numbers().all(|layer| ends.may_idle(layer));
        if idle && !self.layers.is_empty() {
            return self.unseen;
        }
        Excluded {
            passes: self.unseen.passes + self.unseen_without_output.passes,
            tokens: self.unseen.tokens + self.unseen_without_output.tokens,
        }
    }

    /// Whether the routing of a layer was seen in all passes in which it ran. One that had nothing to do
    /// in any pass is not visible when no other layer of the context is.
    pub fn coverage(&self, layer: u16, ends: Ends) -> Coverage {
        let seen = self.layers.get(layer).is_some();
        let not_seen = self.passes_not_seen(layer, ends).sum();
        let nothing_seen = self.layers.is_empty() && self.unseen_by_phase.sum() > 0;
        match (seen, not_seen) {
            (true, 0) if self.passes_not_known() == 0 => Coverage::Observed,
            (true, 1..) => Coverage::PartlyObserved,
            (false, 1..) => Coverage::NotVisible,
            (false, 0) if nothing_seen => Coverage::NotVisible,
            (_, 0) => Coverage::NotKnown,
        }
    }

    /// Passes in which a layer had something to do, and was not seen. Of a model that is not known, the
    /// last layer that was seen stands for the last one with experts.
    pub fn passes_not_seen(&self, layer: u16, ends: Ends) -> PhasePasses {
        let last_seen = self.layers.numbers().next_back();
        let ends = Ends {
            last: if ends.known { ends.last } else { last_seen },
            ..ends
        };
        let unseen = self.unseen_by_phase;
        if ends.is_nextn(layer) {
            // Passes that were seen without it are those of other blocks.
            return unseen.with_output;
        }
        let seen = self.layers.get(layer);
        let seen = seen.map_or(Passes::default(), |layer| layer.passes);
        if ends.may_idle(layer) {
            // Empty nodes are not computed.
            return self.by_phase.with_output - seen.with_output + unseen.with_output;
        }
        self.by_phase.all() - seen.all() + unseen.all()
    }

    /// Passes of which neither the routing nor the ubatch was seen: whether they computed tokens is not
    /// known. Where ubatches are read, passes without one have no tokens.
    pub fn passes_not_known(&self) -> u64 {
        let silent = if self.reads_ubatches() {
            0
        } else {
            self.silent
        };
        self.unread + silent
    }

    /// The same of a context in a process whose ubatches are read: one whose passes never have any is
    /// that of other graphs than a language model's.
    pub fn passes_unread(&self) -> u64 {
        self.unread
    }

    /// Whether the ubatch of any pass was read.
    pub fn reads_ubatches(&self) -> bool {
        let now =
            self.passes_with_ubatch + self.unseen.passes + self.unseen_without_output.passes > 0;
        now || self.read_ubatches
    }

    /// Whether a warm-up was left out.
    pub(super) fn has_warmed_up(&self) -> bool {
        self.warmed_up || self.excluded.contains_key(&Exclusion::Warmup)
    }

    /// Passes of which something may be to come.
    pub(super) fn under_way(&self) -> impl Iterator<Item = &Pass> {
        self.held.iter().chain(&self.current)
    }

    /// Begins to count anew: what is known of its layers and sequences stays.
    pub(super) fn reset(&mut self) {
        self.warmed_up = self.has_warmed_up();
        self.read_ubatches = self.reads_ubatches();
        self.passes = 0;
        self.by_phase = Passes::default();
        self.passes_with_ubatch = 0;
        self.unseen = Excluded::default();
        self.unseen_without_output = Excluded::default();
        self.unseen_by_phase = Passes::default();
        self.silent = 0;
        self.unread = 0;
        self.layers.reset();
        self.excluded.clear();
        for pass in self.current.iter_mut().chain(&mut self.held) {
            pass.before_reset = true;
        }
    }

    /// Layers that other passes have gone through, and that are missing in this one though they had
    /// something to do. NextN blocks run in passes of their own, and begin at `nextn`.
    pub(super) fn missing_layers(&self, pass: &Pass, nextn: Option<u16>) -> Vec<u16> {
        let is_main = |layer: &u16| nextn.is_none_or(|first| *layer < first);
        if !pass.layers().iter().any(|layer| is_main(&layer)) {
            return Vec::new();
        }
        let mut expected: Vec<u16> = self.layers.numbers().filter(is_main).collect();
        if pass.has_no_output() {
            // The last layer works on output rows alone, and empty nodes are not computed.
            expected.pop();
        }
        expected.retain(|layer| !pass.layers().contains(*layer));
        expected
    }

    /// Counts a pass, and gives the phases of its rows. What it leaves behind decides about those of the
    /// next.
    pub(super) fn count(&mut self, pass: &Pass) -> RowPhases {
        let phases = self.follow(pass);
        let phase = phases.of_pass();
        if pass.has_rows() {
            self.count_rows(pass, phase, &phases);
        } else {
            self.note_unseen(pass, phase);
        }
        phases
    }

    /// Gives the phases of a pass' rows, and notes where its sequences are now.
    pub(super) fn follow(&mut self, pass: &Pass) -> RowPhases {
        let parts = pass.parts();
        let goes_on = pass.goes_on_with(&self.equal_parts, &parts);
        let phases = pass.row_phases(&parts, &self.sequences, goes_on);
        self.equal_parts = pass.equal_parts(&parts, goes_on);
        for (number, part) in parts {
            let after = part.after(self.sequences.get(&number), goes_on);
            self.sequences.insert(number, after);
        }
        phases
    }

    /// Notes a pass that is left out.
    pub(super) fn note_excluded(&mut self, pass: &Pass, why: Exclusion) {
        let excluded = self.excluded.entry(why).or_default();
        excluded.passes += 1;
        excluded.tokens += u64::from(pass.token_count());
    }

    fn note_unseen(&mut self, pass: &Pass, phase: Phase) {
        if pass.has_ubatch() {
            let no_output = pass.has_no_output();
            self.unseen_by_phase.note(phase, no_output);
            let unseen = if no_output {
                &mut self.unseen_without_output
            } else {
                &mut self.unseen
            };
            unseen.passes += 1;
            unseen.tokens += u64::from(pass.token_count());
        } else if pass.ubatch_unreadable {
            self.unread += 1;
        } else {
            self.silent += 1;
        }
    }

    fn count_rows(&mut self, pass: &Pass, phase: Phase, phases: &RowPhases) {
        let no_output = pass.has_no_output();
        self.passes += 1;
        self.by_phase.note(phase, no_output);
        self.knows_layers |= !no_output;
        self.passes_with_ubatch += u64::from(pass.has_ubatch());
        for (number, call) in &pass.close_calls {
            let layer = self.layers.entry(*number);
            let row = layer.tally.total_tokens() + call.row;
            layer.close_calls.push(CloseCall { row, ..*call });
        }
        let mut noted = LayerSet::default();
        for block in &pass.blocks {
            let layer = self.layers.entry(block.layer);
            if !noted.contains(block.layer) {
                noted.insert(block.layer);
                layer.passes.note(phase, no_output);
            }
            layer.routes.insert(block.route);
            layer.n_expert = layer.n_expert.max(block.n_expert());
            layer.tally.add(pass, block, phases);
        }
        // A second block has no place without its layer.
        for number in pass.second_layers() {
            if let Some(layer) = self.layers.get_mut(number) {
                layer.second_block.get_or_insert_default().passes += 1;
            }
        }
        for block in &pass.second_blocks {
            let layer = self.layers.get_mut(block.layer);
            if let Some(second) = layer.and_then(|layer| layer.second_block.as_mut()) {
                second.tally.add(pass, block, phases);
            }
        }
    }
}
