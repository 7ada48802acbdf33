//! Events to counts. Pure: the same events give the same result; no clock, no I/O.
//!
//! Rows are collected pass by pass, and a pass is counted as a whole when the next one begins, so
//! that warm-up passes and passes seen in part can be left out. Contexts are never summed.

mod pass;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::{Add, Sub},
};

use expert_trace_common::{Header, PassSource, Phase, Route};
use serde::Serialize;

use self::pass::{Added, RowPhases, Sequence};
pub use self::pass::{Block, Pass};
use crate::{
    decode::{Body, Event, Malformed, Scores},
    selection::{self, CLOSE_CALL, Refusal, Router},
};

/// Contexts told apart. A target that makes up more is not believed.
const MAX_CONTEXTS: usize = 4096;

/// What the capture knows beside the events.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Count warm-up passes like all others.
    pub include_warmup: bool,
    /// The target was traced from its first instruction on: no pass can have begun before.
    pub from_start: bool,
}

/// What the model file says, as far as passes are judged by it.
#[derive(Clone, Debug, Default)]
pub struct ModelFacts {
    /// Token sequences that are decoded to warm up: [BOS, EOS], by the tokenizer of each model.
    pub warmup_tokens: Vec<Vec<i32>>,
    /// Layers with experts that every decode goes through, when one model is known for certain.
    pub moe_layers: Option<BTreeSet<u16>>,
    /// Where that model's NextN blocks begin, if it has any.
    pub nextn: Option<u16>,
    /// Numbers of experts of which a model does not normally choose all; `None` when no model is
    /// known.
    pub selective: Option<BTreeSet<u32>>,
    /// How each model with experts chooses them, by the process that has it, as the initial PID namespace
    /// numbers it.
    pub routers: BTreeMap<u32, Vec<Router>>,
}

/// Why a pass is not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Exclusion {
    /// Evaluated before any other pass of its context, to warm up.
    Warmup,
    /// Only a part of it was seen, at the start or the end of the capture.
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

/// What arrived from the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Received {
    /// Records read from the ring buffer.
    pub events: u64,
    /// Rows in those that could be decoded.
    pub rows: u64,
    /// Records that could not be believed, and were not counted.
    pub rejected: u64,
    /// Rows that were read in two ways, and counted once.
    pub repeated_rows: u64,
    /// Those of them that were not the same both times.
    pub differing_rows: u64,
}

/// Choices made from router logits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FromLogits {
    /// Rows for which the choice was made.
    pub rows: u64,
    /// Rows for which it could not be made, and why.
    pub refused: BTreeMap<Refusal, u64>,
}

/// How a capture ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The target has ended by itself.
    Exited,
    /// The target goes on, was killed, or has ended we know not how: its last pass may have been cut.
    Cut,
}

/// A time in which code of new libraries could run before it was probed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlindTime {
    /// When the target's list of libraries had changed: `CLOCK_MONOTONIC`, ns.
    pub from_ns: u64,
    /// When their probes were in place; `None` while it lasts.
    pub until_ns: Option<u64>,
    /// The libraries.
    pub files: Vec<String>,
    /// Passes that began in it.
    pub passes: u64,
}

impl BlindTime {
    fn contains(&self, time_ns: u64) -> bool {
        self.from_ns <= time_ns && self.until_ns.is_none_or(|until| time_ns < until)
    }
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

    fn note(&mut self, pass: &Pass, phase: Phase) {
        if pass.has_no_output() {
            self.without_output.note(phase);
        } else {
            self.with_output.note(phase);
        }
    }
}

/// A row whose last chosen value lies less than [`CLOSE_CALL`] above the next.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CloseCall {
    /// Number of the row among those that are counted in its layer, from 0: its line in the log.
    pub row: u64,
    /// The distance, in units of what is chosen from.
    pub margin: f32,
}

/// Tokens routed, and what they activated. Index 0 is prefill, 1 is decode.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Experts chosen per token; the largest seen.
    pub k: u16,
    /// Tokens routed.
    pub tokens: [u64; 2],
    /// Activations by expert.
    pub experts: Vec<[u64; 2]>,
}

impl Tally {
    /// Tokens routed, prefill and decode.
    pub fn total_tokens(&self) -> u64 {
        self.tokens.iter().sum()
    }

    /// (token, expert) pairs, prefill and decode.
    pub fn activations(&self) -> u64 {
        self.experts.iter().flatten().sum()
    }

    fn add(&mut self, pass: &Pass, block: &Block, phases: &RowPhases) {
        self.k = self.k.max(block.k);
        for (i, ids) in pass.rows(block).enumerate() {
            let phase = phases.of(block.first_row as usize + i, block.total_rows);
            let column = usize::from(phase == Phase::Decode);
            self.tokens[column] += 1;
            for id in ids {
                let id = usize::from(*id);
                if self.experts.len() <= id {
                    self.experts.resize(id + 1, [0; 2]);
                }
                self.experts[id][column] += 1;
            }
        }
    }
}

/// The second block of experts that a layer has (GroveMoE): fewer, larger experts, which the same
/// router's choice stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SecondBlock {
    /// Passes in which it was seen.
    pub passes: u64,
    /// What was counted. A token that has several experts in one group activates its second expert as
    /// many times.
    pub tally: Tally,
}

/// Counts of one layer in one context.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layer {
    /// Experts to choose from, when the target's tensors show it; else 0.
    pub n_expert: u32,
    /// Passes in which it was seen.
    pub passes: Passes,
    /// Where it was read.
    pub routes: BTreeSet<Route>,
    /// Rows whose experts the target, which rounds in its own way, may have chosen otherwise.
    pub close_calls: Vec<CloseCall>,
    /// What was counted.
    pub tally: Tally,
    /// Its second block of experts, if one was seen. In no other count.
    pub second_block: Option<SecondBlock>,
}

/// Counts of one context.
#[derive(Debug, Default)]
pub struct Context {
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
    pub layers: BTreeMap<u16, Layer>,
    /// Passes left out.
    pub excluded: BTreeMap<Exclusion, Excluded>,

    current: Option<Pass>,
    held: Option<Pass>,
    /// Whether a pass that is no warm-up has been seen.
    worked: bool,
    /// Whether a pass has been counted that had an output, and so went through all layers.
    knows_layers: bool,
    /// Where each sequence is.
    sequences: BTreeMap<u16, Sequence>,
    /// Sequences that the last pass had equal parts of.
    equal_parts: BTreeSet<u16>,
}

impl Context {
    /// Tokens of the layer that routed most: what passed through the model.
    pub fn tokens(&self) -> u64 {
        self.layers
            .values()
            .map(|layer| layer.tally.total_tokens())
            .max()
            .unwrap_or(0)
    }

    /// Passes of which no routing was seen, though a layer with experts had something to do.
    pub fn not_visible(&self, ends: Ends) -> Excluded {
        let idle = self.layers.keys().all(|layer| ends.may_idle(*layer));
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
        let seen = self.layers.contains_key(&layer);
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
        let last_seen = self.layers.keys().next_back().copied();
        let ends = Ends {
            last: if ends.known { ends.last } else { last_seen },
            ..ends
        };
        let unseen = self.unseen_by_phase;
        if ends.is_nextn(layer) {
            // Passes that were seen without it are those of other blocks.
            return unseen.with_output;
        }
        let seen = self.layers.get(&layer);
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
        self.passes_with_ubatch + self.unseen.passes + self.unseen_without_output.passes > 0
    }
}

/// Gets every pass that is counted, in order.
pub type OnPass<'a> = dyn FnMut(&Pass) + 'a;

/// All that has been seen.
#[derive(Debug, Default)]
pub struct Model {
    options: Options,
    facts: ModelFacts,
    contexts: Vec<Context>,
    by_key: HashMap<(u32, u64, u32), usize>,
    received: Received,
    from_logits: FromLogits,
    blind: Vec<BlindTime>,
    /// Status, as waitpid tells it, of processes that have ended.
    ended: HashMap<u32, u32>,
}

impl Model {
    /// Nothing seen yet.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            ..Self::default()
        }
    }

    /// Tells what the model files say. Passes judged before are not judged again.
    pub fn set_facts(&mut self, facts: ModelFacts) {
        self.facts = facts;
    }

    /// Contexts in which a pass was seen, in the order of their first.
    pub fn contexts(&self) -> &[Context] {
        &self.contexts
    }

    /// What arrived.
    pub fn received(&self) -> Received {
        self.received
    }

    /// Choices made from router logits.
    pub fn from_logits(&self) -> &FromLogits {
        &self.from_logits
    }

    /// Passes left out, over all contexts.
    pub fn excluded(&self) -> BTreeMap<Exclusion, Excluded> {
        let mut sums: BTreeMap<Exclusion, Excluded> = BTreeMap::new();
        for (kind, excluded) in self.contexts.iter().flat_map(|context| &context.excluded) {
            let sum = sums.entry(*kind).or_default();
            sum.passes += excluded.passes;
            sum.tokens += excluded.tokens;
        }
        sums
    }

    /// Times in which new libraries were not probed yet.
    pub fn blind_times(&self) -> &[BlindTime] {
        &self.blind
    }

    /// Whether the target's libraries have changed and nobody has looked at them since.
    pub fn libraries_changed(&self) -> bool {
        self.blind
            .last()
            .is_some_and(|time| time.until_ns.is_none())
    }

    /// Tells that the target's libraries have been looked at, and these probed by now.
    pub fn libraries_probed(&mut self, files: Vec<String>, now_ns: u64) {
        let Some(time) = self.blind.last_mut() else {
            return;
        };
        if files.is_empty() {
            self.blind.pop();
        } else {
            time.files = files;
            time.until_ns = Some(now_ns);
        }
    }

    /// How a process ended, as waitpid tells it, if that was seen.
    pub fn status(&self, process: u32) -> Option<u32> {
        self.ended.get(&process).copied()
    }

    /// Takes in a record of the ring buffer, decoded or not.
    pub fn push(&mut self, event: Result<Event<'_>, Malformed>, on_pass: &mut OnPass<'_>) {
        self.received.events += 1;
        let Ok(Event { header, body }) = event else {
            self.received.rejected += 1;
            return;
        };
        if let Body::Libraries = body {
            if !self.libraries_changed() {
                self.blind.push(BlindTime {
                    from_ns: header.time_ns,
                    ..BlindTime::default()
                });
            }
            return;
        }
        if let Body::ProcessStart = body {
            // Its number can have been another's before.
            self.by_key
                .retain(|(process, ..), _| *process != header.process);
            self.ended.remove(&header.process);
            return;
        }
        if let Body::ProcessEnd(status) = body {
            self.ended.insert(header.process, status);
            return;
        }
        if !self.ended.is_empty() {
            // Its number has come back, or it goes on without its main thread.
            self.ended.remove(&header.process);
        }
        if let Body::EvalCallback(_) = body {
            return;
        }
        if let Body::Owner(sched) = body {
            self.adopt(&header, sched, on_pass);
        }
        let Some(index) = self.context_index(&header) else {
            self.received.rejected += 1;
            return;
        };
        if let Body::ContextEnd = body {
            self.finish_pass(index, on_pass);
            self.by_key.remove(&context_key(&header));
            return;
        }
        if let Body::Owner(_) = body {
            return;
        }
        let begins = self.contexts[index]
            .current
            .as_ref()
            .is_none_or(|pass| pass.number != header.pass);
        if begins {
            self.finish_pass(index, on_pass);
            let mut blind = self.blind.iter_mut();
            if let Some(time) = blind.find(|time| time.contains(header.time_ns)) {
                time.passes += 1;
            }
        }
        let context = &mut self.contexts[index];
        let pass = context
            .current
            .get_or_insert_with(|| Pass::new(index, &header));
        match body {
            Body::Rows(ids) => {
                context.source = header.source;
                let route = Route::ALL[usize::from(header.route)];
                let added = pass.add_rows(&header, route, ids.iter().map(|id| id as u16));
                self.received.note_rows(&header, added);
            }
            Body::SecondBlock(ids) => {
                let route = Route::ALL[usize::from(header.route)];
                let added = pass.add_second_rows(&header, route, ids.iter().map(|id| id as u16));
                self.received.note_rows(&header, added);
            }
            Body::Scores(scores) => {
                context.source = header.source;
                let routers = self.facts.routers.get(&header.process);
                let routers = routers.map_or(&[][..], Vec::as_slice);
                let mut choice = Choice::default();
                let added = match choice.make(routers, &header, scores) {
                    Ok(chosen) => {
                        self.from_logits.rows += u64::from(header.rows);
                        let added = pass.add_rows(&chosen, Route::Logits, choice.ids.into_iter());
                        if added == Added::Counted {
                            pass.close_calls.append(&mut choice.close_calls);
                        }
                        added
                    }
                    Err(refusal) => {
                        // Of two stages, the later one's reason.
                        let place = (header.layer, header.first_row);
                        pass.refused.insert(place, (refusal, header.rows));
                        Added::Counted
                    }
                };
                self.received.note_rows(&header, added);
            }
            Body::Pass(rows) => pass.add_ubatch_rows(&header, rows),
            Body::Tokens(tokens) => pass.tokens = tokens.iter().collect(),
            Body::ContextEnd
            | Body::Owner(_)
            | Body::EvalCallback(_)
            | Body::Libraries
            | Body::ProcessStart
            | Body::ProcessEnd(_) => {}
        }
    }

    /// Ends the capture: what is still open is counted if it is whole. `end_of` tells how a process
    /// ended, by the number that the initial PID namespace has for it.
    pub fn end(&mut self, end_of: &dyn Fn(u32) -> End, on_pass: &mut OnPass<'_>) {
        for index in 0..self.contexts.len() {
            let end = end_of(self.contexts[index].process);
            let Some(pass) = self.contexts[index].current.take() else {
                self.settle_held(index, None, on_pass);
                continue;
            };
            self.settle_held(index, Some(&pass), on_pass);
            if self.is_whole(index, &pass, end) {
                self.judge(index, pass, on_pass);
            } else {
                self.exclude(index, &pass, Exclusion::Partial);
            }
        }
    }

    /// Passes that were numbered by the scheduler, because we came when the thread had already
    /// entered its `llama_context`, are that context's.
    fn adopt(&mut self, owner: &Header, sched: u64, on_pass: &mut OnPass<'_>) {
        let of_sched = |(process, address, _): &&(u32, u64, u32)| {
            *process == owner.process && *address == sched
        };
        let Some(key) = self.by_key.keys().find(of_sched).copied() else {
            return;
        };
        if let Some(index) = self.by_key.remove(&key) {
            // The owner numbers its passes anew.
            self.finish_pass(index, on_pass);
            self.by_key.entry(context_key(owner)).or_insert(index);
        }
    }

    fn context_index(&mut self, header: &Header) -> Option<usize> {
        let key = context_key(header);
        if let Some(index) = self.by_key.get(&key) {
            return Some(*index);
        }
        if self.contexts.len() >= MAX_CONTEXTS {
            return None;
        }
        self.contexts.push(Context {
            process: header.process,
            layer_order: header.pass_source == PassSource::LayerOrder as u8,
            ..Context::default()
        });
        self.by_key.insert(key, self.contexts.len() - 1);
        Some(self.contexts.len() - 1)
    }

    /// The pass is followed by another, or by the context's end: nothing of it is to come.
    fn finish_pass(&mut self, index: usize, on_pass: &mut OnPass<'_>) {
        let context = &mut self.contexts[index];
        let Some(pass) = context.current.take() else {
            return;
        };
        // Without a scheduler nothing tells whether we have come in the middle of the first pass,
        // except that the second one begins with the same layer.
        if context.layer_order
            && !self.options.from_start
            && !context.worked
            && context.held.is_none()
        {
            context.held = Some(pass);
            return;
        }
        self.settle_held(index, Some(&pass), on_pass);
        self.judge(index, pass, on_pass);
    }

    fn settle_held(&mut self, index: usize, next: Option<&Pass>, on_pass: &mut OnPass<'_>) {
        let Some(held) = self.contexts[index].held.take() else {
            return;
        };
        if next.is_some_and(|next| next.first_layer() == held.first_layer()) {
            self.judge(index, held, on_pass);
        } else {
            self.exclude(index, &held, Exclusion::Partial);
        }
    }

    fn judge(&mut self, index: usize, pass: Pass, on_pass: &mut OnPass<'_>) {
        self.settle_refusals(&pass);
        let mut blind = self.blind.iter().filter(|time| time.until_ns.is_some());
        if blind.any(|time| time.contains(pass.began_ns)) {
            self.exclude(index, &pass, Exclusion::Partial);
            return;
        }
        let context = &self.contexts[index];
        let warmups = context.excluded.get(&Exclusion::Warmup);
        let first = warmups.is_none_or(|warmups| warmups.passes == 0);
        if !context.worked && pass.is_warmup(&self.facts, first) {
            if !pass.has_rows() {
                return;
            }
            if !self.options.include_warmup {
                self.exclude(index, &pass, Exclusion::Warmup);
                return;
            }
            self.commit(index, pass, on_pass);
            return;
        }
        if pass.has_rows() {
            self.contexts[index].worked = true;
        }
        self.commit(index, pass, on_pass);
    }

    /// Rows that were read in another way, or at a later stage, are not missing. Of passes that are left
    /// out nothing is.
    fn settle_refusals(&mut self, pass: &Pass) {
        for (&(layer, first), &(refusal, rows)) in &pass.refused {
            let missing = (first..first + rows).filter(|row| !pass.has_row(layer, *row));
            let missing = missing.count() as u64;
            if missing > 0 {
                *self.from_logits.refused.entry(refusal).or_default() += missing;
            }
        }
    }

    /// Whether nothing is missing of the last pass of a context.
    fn is_whole(&self, index: usize, pass: &Pass, end: End) -> bool {
        let context = &self.contexts[index];
        if !pass.has_rows() {
            // It may have been cut before its first layer with experts.
            return end == End::Exited || context.layers.is_empty();
        }
        if context.layer_order && !self.options.from_start && !context.worked {
            // A scheduler's pass whose beginning we missed looks the same.
            return false;
        }
        let nextn = |layer: u16| self.facts.nextn.is_some_and(|first| layer >= first);
        if pass.layers().into_iter().all(nextn) {
            // Each block runs in passes of its own.
            return !pass.lacks_rows();
        }
        let mut expected: BTreeSet<u16> = context.layers.keys().copied().collect();
        if !context.knows_layers {
            match (end, &self.facts.moe_layers) {
                // Another thread can have ended the process in the middle of its first pass, or an
                // exec. A model file would not tell: some of its layers can be on a device.
                (End::Exited, _) => return true,
                (End::Cut, Some(layers)) => expected.extend(layers),
                (End::Cut, None) => return false,
            }
        }
        if pass.has_no_output() {
            // The last layer works on output rows alone, and empty nodes are not computed.
            expected.pop_last();
        }
        let has_second = |layer: &u16| {
            let layer = context.layers.get(layer);
            layer.is_some_and(|layer| layer.second_block.is_some())
        };
        let expected_second: BTreeSet<u16> = expected.iter().copied().filter(has_second).collect();
        expected.is_subset(&pass.layers())
            && expected_second.is_subset(&pass.second_layers())
            && !pass.lacks_rows()
    }

    fn exclude(&mut self, index: usize, pass: &Pass, why: Exclusion) {
        if !pass.has_rows() {
            return;
        }
        let context = &mut self.contexts[index];
        if why != Exclusion::Warmup {
            context.worked = true;
        }
        let excluded = context.excluded.entry(why).or_default();
        excluded.passes += 1;
        excluded.tokens += u64::from(pass.token_count());
    }

    fn commit(&mut self, index: usize, pass: Pass, on_pass: &mut OnPass<'_>) {
        let context = &mut self.contexts[index];
        let goes_on = pass.goes_on_with(&context.equal_parts);
        let phases = pass.row_phases(&context.sequences, goes_on);
        let phase = phases.of_pass();
        pass.note_sequences(&mut context.sequences, goes_on);
        context.equal_parts = pass.equal_parts(goes_on);
        if !pass.has_rows() {
            if pass.has_ubatch() {
                context.unseen_by_phase.note(&pass, phase);
                let unseen = if pass.has_no_output() {
                    &mut context.unseen_without_output
                } else {
                    &mut context.unseen
                };
                unseen.passes += 1;
                unseen.tokens += u64::from(pass.token_count());
            } else if pass.ubatch_unreadable {
                context.unread += 1;
            } else {
                context.silent += 1;
            }
            return;
        }
        context.passes += 1;
        context.by_phase.note(&pass, phase);
        context.knows_layers |= !pass.has_no_output();
        for layer in pass.layers() {
            let layer = context.layers.entry(layer).or_default();
            layer.passes.note(&pass, phase);
        }
        context.passes_with_ubatch += u64::from(pass.has_ubatch());
        for (number, call) in &pass.close_calls {
            let layer = context.layers.entry(*number).or_default();
            let row = layer.tally.total_tokens() + call.row;
            layer.close_calls.push(CloseCall { row, ..*call });
        }
        for block in &pass.blocks {
            let layer = context.layers.entry(block.layer).or_default();
            layer.routes.insert(block.route);
            layer.n_expert = layer.n_expert.max(block.n_expert());
            layer.tally.add(&pass, block, &phases);
        }
        // A second block has no place without its layer.
        for number in pass.second_layers() {
            if let Some(layer) = context.layers.get_mut(&number) {
                layer.second_block.get_or_insert_default().passes += 1;
            }
        }
        for block in &pass.second_blocks {
            let layer = context.layers.get_mut(&block.layer);
            if let Some(second) = layer.and_then(|layer| layer.second_block.as_mut()) {
                second.tally.add(&pass, block, &phases);
            }
        }
        on_pass(&pass);
    }
}

impl Received {
    fn note_rows(&mut self, header: &Header, added: Added) {
        self.rows += u64::from(header.rows);
        match added {
            Added::Counted => {}
            Added::Repeated { differing } => {
                self.repeated_rows += u64::from(header.rows);
                self.differing_rows += differing;
            }
            Added::Refused => self.rejected += 1,
        }
    }
}

/// The choice for all rows of a record.
#[derive(Default)]
struct Choice {
    ids: Vec<u16>,
    /// By layer; rows are counted within the pass.
    close_calls: Vec<(u16, CloseCall)>,
}

impl Choice {
    /// Makes it. Gives the header that a record of the chosen ids would have.
    fn make(
        &mut self,
        routers: &[Router],
        header: &Header,
        scores: Scores<'_>,
    ) -> Result<Header, Refusal> {
        let n_expert = header.k;
        let layer = selection::layer_of(routers, header.layer, n_expert)?;
        let values: Vec<f32> = scores.iter().collect();
        for (row, values) in values.chunks_exact(usize::from(n_expert)).enumerate() {
            let margin = layer.choose(scores.stage, values, &mut self.ids)?;
            if margin < CLOSE_CALL {
                let row = u64::from(header.first_row) + row as u64;
                self.close_calls
                    .push((header.layer, CloseCall { row, margin }));
            }
        }
        Ok(Header {
            k: layer.k,
            row_stride: u32::from(n_expert),
            ..*header
        })
    }
}

fn context_key(header: &Header) -> (u32, u64, u32) {
    (header.process, header.context, header.generation)
}

#[cfg(test)]
mod tests;
