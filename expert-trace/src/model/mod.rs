//! Events to counts. Pure: the same events give the same result; no clock, no I/O.
//!
//! Rows are collected pass by pass, and a pass is counted as a whole when the next one begins, so
//! that warm-up passes and passes seen in part can be left out. Contexts are never summed.

mod context;
mod keys;
mod layer;
mod pass;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    mem,
};

use expert_trace_common::{Header, Route};
use serde::Serialize;

pub use self::{
    context::{Context, Coverage, Ends, Excluded, Exclusion, Passes, PhasePasses},
    layer::{CloseCall, Layer, Layers, SecondBlock},
    pass::{Block, Pass, RowPhases},
};
use self::{keys::Keys, pass::Added};
use crate::{
    decode::{Body, Choices, Event, Malformed, Scores},
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

/// A pass of which nothing more is to come.
#[derive(Clone, Copy, Debug)]
pub struct Finished<'a> {
    /// What was seen of it.
    pub pass: &'a Pass,
    /// Its context, in which it is counted by now if it is to be.
    pub context: &'a Context,
    /// What became of it.
    pub fate: Fate<'a>,
    /// Where the NextN blocks of its model begin, if it has any.
    nextn: Option<u16>,
}

/// What became of a pass.
#[derive(Clone, Copy, Debug)]
pub enum Fate<'a> {
    /// It is counted, with rows of these phases, or as one of which nothing was seen.
    Counted(&'a RowPhases),
    /// It is whole, with rows of these phases, or nothing was seen of it, and it is in no count: counting
    /// began anew while it was under way.
    Split(&'a RowPhases),
    /// It is left out.
    Excluded(Exclusion),
    /// It is a warm-up, and showed no routing.
    Ignored,
}

impl<'a> Finished<'a> {
    /// The pass, when it is whole, none to be left out, and has shown routing.
    pub fn shown(&self) -> Option<&'a Pass> {
        let is_whole = matches!(self.fate, Fate::Counted(_) | Fate::Split(_));
        (is_whole && self.pass.has_rows()).then_some(self.pass)
    }

    /// Layers that other passes of the context have gone through, and that are missing in this one though
    /// they had something to do.
    pub fn missing_layers(&self) -> Vec<u16> {
        self.context.missing_layers(self.pass, self.nextn)
    }

    /// Layers whose second block of experts was seen in other passes, and not in this one, though the layer was,
    /// or is missing itself.
    pub fn missing_second_blocks(&self) -> Vec<u16> {
        let seen = self.pass.second_layers();
        let has_one = |layer: &u16| {
            let layer = self.context.layers.get(*layer);
            layer.is_some_and(|layer| layer.second_block.is_some())
        };
        let layers = self.pass.layers().iter().chain(self.missing_layers());
        let layers: BTreeSet<u16> = layers
            .filter(|layer| has_one(layer) && !seen.contains(layer))
            .collect();
        layers.into_iter().collect()
    }

    /// Whether the pass need not have routed anything: the context runs NextN blocks alone, which work on
    /// output rows, and it has none.
    pub fn may_idle(&self) -> bool {
        let is_nextn = |layer| self.nextn.is_some_and(|first| layer >= first);
        self.pass.has_no_output() && self.context.layers.numbers().all(is_nextn)
    }
}

/// Gets every pass when it is finished, in order.
pub type OnPass<'a> = dyn FnMut(Finished<'_>) + 'a;

/// All that has been seen.
#[derive(Debug, Default)]
pub struct Model {
    options: Options,
    facts: ModelFacts,
    contexts: Vec<Context>,
    keys: Keys,
    received: Received,
    from_logits: FromLogits,
    blind: Vec<BlindTime>,
    /// Status, as waitpid tells it, of processes that have ended.
    ended: HashMap<u32, u32>,
    /// The pass that was judged last, for its memory.
    spare: Pass,
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

    /// Begins to count anew. Contexts stay what they are, and a pass that is under way is in no count.
    pub fn reset(&mut self) {
        for context in &mut self.contexts {
            context.reset();
        }
        self.received = Received::default();
        self.from_logits = FromLogits::default();
        let contexts = &self.contexts;
        self.blind.retain_mut(|time| {
            time.passes = 0;
            // Those under way are still judged by it.
            let mut under_way = contexts.iter().flat_map(Context::under_way);
            time.until_ns.is_none() || under_way.any(|pass| time.contains(pass.began_ns))
        });
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
            self.keys.forget_process(header.process);
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
        let known = self.keys.find(&header);
        let Some(index) = known.or_else(|| self.new_context(&header)) else {
            self.received.rejected += 1;
            return;
        };
        if let Body::ContextEnd = body {
            self.finish_pass(index, on_pass);
            self.keys.remove(&header);
            return;
        }
        if let Body::Owner(_) = body {
            return;
        }
        let current = self.contexts[index].current.as_ref();
        if current.is_none_or(|pass| pass.number != header.pass) {
            self.begin_pass(index, &header, on_pass);
        }
        let context = &mut self.contexts[index];
        let Some(pass) = &mut context.current else {
            return;
        };
        match body {
            Body::Rows(Choices { ids, weights }) => {
                context.source = header.source;
                let route = Route::ALL[usize::from(header.route)];
                let ids = ids.iter().map(|id| id as u16);
                let added = pass.add_rows(&header, route, ids, weights);
                self.received.note_rows(&header, added);
            }
            Body::SecondBlock(Choices { ids, weights }) => {
                let route = Route::ALL[usize::from(header.route)];
                let ids = ids.iter().map(|id| id as u16);
                let added = pass.add_second_rows(&header, route, ids, weights);
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
                        let added =
                            pass.add_rows(&chosen, Route::Logits, choice.ids.into_iter(), None);
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
            Body::Tokens(tokens) => pass.add_tokens(&header, tokens),
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
                self.judge(index, &pass, on_pass);
            } else {
                self.exclude(index, &pass, Exclusion::Partial, on_pass);
            }
        }
    }

    /// Passes that were numbered by the scheduler, because we came when the thread had already
    /// entered its `llama_context`, are that context's.
    fn adopt(&mut self, owner: &Header, sched: u64, on_pass: &mut OnPass<'_>) {
        if let Some(index) = self.keys.take_scheduler(owner.process, sched) {
            // The owner numbers its passes anew.
            self.finish_pass(index, on_pass);
            self.keys.insert_new(owner, index);
        }
    }

    fn new_context(&mut self, header: &Header) -> Option<usize> {
        if self.contexts.len() >= MAX_CONTEXTS {
            return None;
        }
        let index = self.contexts.len();
        self.contexts.push(Context::new(index, header));
        self.keys.insert_new(header, index);
        Some(index)
    }

    fn begin_pass(&mut self, index: usize, header: &Header, on_pass: &mut OnPass<'_>) {
        self.finish_pass(index, on_pass);
        let mut blind = self.blind.iter_mut();
        if let Some(time) = blind.find(|time| time.contains(header.time_ns)) {
            time.passes += 1;
        }
        let spare = mem::take(&mut self.spare);
        self.contexts[index].current = Some(Pass::new(index, header, spare));
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
        self.judge(index, &pass, on_pass);
        self.spare = pass;
    }

    fn settle_held(&mut self, index: usize, next: Option<&Pass>, on_pass: &mut OnPass<'_>) {
        let Some(held) = self.contexts[index].held.take() else {
            return;
        };
        if next.is_some_and(|next| next.first_layer() == held.first_layer()) {
            self.judge(index, &held, on_pass);
        } else {
            self.exclude(index, &held, Exclusion::Partial, on_pass);
        }
    }

    fn judge(&mut self, index: usize, pass: &Pass, on_pass: &mut OnPass<'_>) {
        if !pass.before_reset {
            self.settle_refusals(pass);
        }
        let mut blind = self.blind.iter().filter(|time| time.until_ns.is_some());
        if blind.any(|time| time.contains(pass.began_ns)) {
            self.exclude(index, pass, Exclusion::Partial, on_pass);
            return;
        }
        let context = &self.contexts[index];
        let first = !context.has_warmed_up();
        if !context.worked && pass.is_warmup(&self.facts, first) {
            if !pass.has_rows() {
                self.finish(index, pass, Fate::Ignored, on_pass);
            } else if self.options.include_warmup {
                self.commit(index, pass, on_pass);
            } else {
                self.exclude(index, pass, Exclusion::Warmup, on_pass);
            }
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
        if pass.layers().iter().all(nextn) {
            // Each block runs in passes of its own.
            return !pass.lacks_rows();
        }
        let mut expected: BTreeSet<u16> = context.layers.numbers().collect();
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
            let layer = context.layers.get(*layer);
            layer.is_some_and(|layer| layer.second_block.is_some())
        };
        let expected_second: BTreeSet<u16> = expected.iter().copied().filter(has_second).collect();
        expected.iter().all(|layer| pass.layers().contains(*layer))
            && expected_second.is_subset(&pass.second_layers())
            && !pass.lacks_rows()
    }

    fn exclude(&mut self, index: usize, pass: &Pass, why: Exclusion, on_pass: &mut OnPass<'_>) {
        if !pass.has_rows() {
            return self.finish(index, pass, Fate::Ignored, on_pass);
        }
        let context = &mut self.contexts[index];
        if why != Exclusion::Warmup {
            context.worked = true;
        }
        context.note_excluded(pass, why);
        self.finish(index, pass, Fate::Excluded(why), on_pass);
    }

    fn commit(&mut self, index: usize, pass: &Pass, on_pass: &mut OnPass<'_>) {
        let context = &mut self.contexts[index];
        if !pass.before_reset {
            let phases = context.count(pass);
            return self.finish(index, pass, Fate::Counted(&phases), on_pass);
        }
        let phases = context.follow(pass);
        if pass.has_rows() {
            context.note_excluded(pass, Exclusion::Partial);
        }
        self.finish(index, pass, Fate::Split(&phases), on_pass);
    }

    fn finish(&self, index: usize, pass: &Pass, fate: Fate<'_>, on_pass: &mut OnPass<'_>) {
        on_pass(Finished {
            pass,
            context: &self.contexts[index],
            fate,
            nextn: self.facts.nextn,
        });
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
        let values: Vec<f32> = scores.values.iter().collect();
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

#[cfg(test)]
mod tests;
