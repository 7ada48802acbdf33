//! One pass: the rows of one ubatch through all layers, until it is known whether they count.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use expert_trace_common::{
    Header, MAX_WARMUP_TOKENS, PassSource, Phase, ROW_OUTPUT, Route, RowInfo, UBATCH_UNREADABLE,
};

use super::{CloseCall, ModelFacts, layer::LayerSet};
use crate::{
    decode::{Floats, Numbers, RowInfos},
    selection::Refusal,
};

/// Ids kept of one pass (8192 tokens, 128 layers, 32 experts each). A target that shows more is not
/// believed.
const MAX_PASS_IDS: usize = 32 << 20;

/// Rows of one layer that lie together in [`Pass`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Layer.
    pub layer: u16,
    /// Experts per row.
    pub k: u16,
    /// First row, counted within the pass and layer.
    pub first_row: u32,
    /// Rows.
    pub rows: u32,
    /// Rows of the pass in this layer.
    pub total_rows: u32,
    /// Where it was read.
    pub route: Route,
    /// When its first record was made: `CLOCK_MONOTONIC`, ns.
    pub time_ns: u64,
    row_stride: u32,
    start: usize,
    /// Where its weights begin, if it has them.
    weights: Option<usize>,
}

/// What became of rows that were to be added to a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Added {
    /// They count.
    Counted,
    /// The layer was read in another way before. So many of them are not what was read then.
    Repeated { differing: u64 },
    /// The pass has more than can be.
    Refused,
}

impl Block {
    /// That of a record, whose ids and weights begin there.
    #[inline]
    fn new(header: &Header, route: Route, start: usize, weights: Option<usize>) -> Self {
        Self {
            layer: header.layer,
            k: header.k,
            first_row: header.first_row,
            rows: header.rows,
            total_rows: header.total_rows,
            route,
            time_ns: header.time_ns,
            row_stride: header.row_stride,
            start,
            weights,
        }
    }

    /// Experts to choose from; 0 when the tensor does not show it.
    pub fn n_expert(&self) -> u32 {
        if self.row_stride > u32::from(self.k) {
            self.row_stride
        } else {
            0
        }
    }

    /// Whether its rows are as long as the rows of the argsort: nothing was left to choose.
    fn shows_all_experts(&self) -> bool {
        self.k > 1 && self.row_stride == u32::from(self.k)
    }

    fn has(&self, row: u32) -> bool {
        (self.first_row..self.first_row + self.rows).contains(&row)
    }

    /// Whether `other` brings rows that this one has, too.
    fn is_repeated_by(&self, other: &Block) -> bool {
        let overlap = self.has(other.first_row) || other.has(self.first_row);
        self.layer == other.layer && overlap
    }

    fn ids(&self) -> Range<usize> {
        self.start..self.start + self.len()
    }

    fn weights(&self) -> Option<Range<usize>> {
        self.weights.map(|start| start..start + self.len())
    }

    /// Ids that it has.
    fn len(&self) -> usize {
        self.rows as usize * usize::from(self.k)
    }
}

/// Ids for which a pass that has been counted leaves room to the next one: 2 MiB, for a prompt of 2,048
/// tokens, 48 layers and 10 experts each.
const MAX_SPARE_IDS: usize = 1 << 20;

/// Rows of one ubatch.
#[derive(Clone, Debug, Default)]
pub struct Pass {
    /// Index of its context.
    pub context: usize,
    /// Number within the context, from 0.
    pub number: u32,
    /// When its first record was made: `CLOCK_MONOTONIC`, ns.
    pub began_ns: u64,
    /// What has been seen of it, in the order it was computed.
    pub blocks: Vec<Block>,
    /// The same of the second block of experts that a layer has (GroveMoE).
    pub second_blocks: Vec<Block>,
    /// Its tokens, when they are asked for, or it is short enough to be a warm-up; else empty.
    tokens: Vec<i32>,
    /// Layers of `blocks`.
    layers: LayerSet,
    ids: Vec<u16>,
    weights: Vec<f32>,
    /// By layer; rows are counted within the pass.
    pub(super) close_calls: Vec<(u16, CloseCall)>,
    /// Rows of logits that tell no experts, by layer and first row: why, and how many.
    pub(super) refused: BTreeMap<(u16, u32), (Refusal, u32)>,
    /// Choices from logits that ids have taken the place of.
    replaced: Vec<Block>,
    /// Counting has begun anew since it began.
    pub(super) before_reset: bool,
    ubatch_tokens: u32,
    infos: Vec<RowInfo>,
    /// Its ubatch was there, and could not be read.
    pub ubatch_unreadable: bool,
    scheduler: bool,
}

impl Pass {
    /// Nothing of it but a record's header. `spare` is a pass that nobody needs, whose memory it takes.
    pub(super) fn new(context: usize, header: &Header, mut spare: Pass) -> Self {
        if spare.ids.capacity() > MAX_SPARE_IDS {
            spare.ids = Vec::new();
            spare.weights = Vec::new();
        }
        Self {
            context,
            number: header.pass,
            began_ns: header.time_ns,
            layers: LayerSet::default(),
            blocks: emptied(spare.blocks),
            second_blocks: emptied(spare.second_blocks),
            tokens: emptied(spare.tokens),
            ids: emptied(spare.ids),
            weights: emptied(spare.weights),
            close_calls: emptied(spare.close_calls),
            refused: BTreeMap::new(),
            replaced: emptied(spare.replaced),
            before_reset: false,
            ubatch_tokens: header.ubatch_tokens,
            infos: emptied(spare.infos),
            ubatch_unreadable: false,
            scheduler: header.pass_source == PassSource::Scheduler as u8,
        }
    }

    /// Adds a record's rows. A layer counts once, whichever way it was read first, except that ids win
    /// over a choice made from logits, ids with weights over those without, and what the scheduler copies is
    /// not the target's own code's.
    pub(super) fn add_rows(
        &mut self,
        header: &Header,
        route: Route,
        ids: impl ExactSizeIterator<Item = u16>,
        weights: Option<Floats<'_>>,
    ) -> Added {
        if self.ids.len() + ids.len() > MAX_PASS_IDS {
            return Added::Refused;
        }
        if header.total_rows == 0 {
            return Added::Counted;
        }
        let block = self.take_in(header, route, ids, weights);
        if !self.layers.contains(header.layer) {
            self.layers.insert(header.layer);
            self.blocks.push(block);
            return Added::Counted;
        }
        self.add_to_layer(block)
    }

    #[inline]
    fn take_in(
        &mut self,
        header: &Header,
        route: Route,
        ids: impl Iterator<Item = u16>,
        weights: Option<Floats<'_>>,
    ) -> Block {
        let start = self.ids.len();
        self.ids.extend(ids);
        let weights = weights.map(|weights| {
            let start = self.weights.len();
            self.weights.extend(weights.iter());
            start
        });
        Block::new(header, route, start, weights)
    }

    /// The same of a layer that has rows already, whose ids have been taken in.
    fn add_to_layer(&mut self, block: Block) -> Added {
        let known = self.blocks.iter().chain(&self.replaced);
        let repeats: Vec<Block> = known
            .filter(|known| known.is_repeated_by(&block))
            .copied()
            .collect();
        if !repeats.is_empty() {
            let differing = self.differing(&block, &repeats);
            let brings_ids = block.route != Route::Logits
                && repeats.iter().all(|known| known.route == Route::Logits);
            let brings_weights =
                block.weights.is_some() && repeats.iter().all(|known| known.weights.is_none());
            if !brings_ids && !brings_weights {
                self.ids.truncate(block.start);
                if let Some(start) = block.weights {
                    self.weights.truncate(start);
                }
                self.name_after(block.route, &repeats);
            } else {
                let replaced = self.blocks.extract_if(.., |known| repeats.contains(known));
                self.replaced.extend(replaced);
                self.close_calls.retain(|(layer, _)| *layer != block.layer);
                append(&mut self.blocks, block);
            }
            return Added::Repeated { differing };
        }
        append(&mut self.blocks, block);
        Added::Counted
    }

    /// Adds a record's rows of a layer's second block of experts.
    pub(super) fn add_second_rows(
        &mut self,
        header: &Header,
        route: Route,
        ids: impl ExactSizeIterator<Item = u16>,
        weights: Option<Floats<'_>>,
    ) -> Added {
        if self.ids.len() + ids.len() > MAX_PASS_IDS {
            return Added::Refused;
        }
        if header.total_rows > 0 {
            let block = self.take_in(header, route, ids, weights);
            append(&mut self.second_blocks, block);
        }
        Added::Counted
    }

    /// Rows that the target's own code seemed to ask for, and that come by this route as well, are the
    /// scheduler's: it copies a split's inputs by `ggml_backend_tensor_get`, too, from devices that have
    /// no copy of their own (`ggml_backend_tensor_copy` in ggml-backend.cpp).
    fn name_after(&mut self, route: Route, repeated: &[Block]) {
        if !matches!(route, Route::SplitInput | Route::Fetch) {
            return;
        }
        let blocks = self.blocks.iter_mut();
        for block in blocks.filter(|block| repeated.contains(block)) {
            if block.route == Route::Callback {
                block.route = route;
            }
        }
    }

    /// How many rows of `block` are not what other blocks have of them.
    fn differing(&self, block: &Block, others: &[Block]) -> u64 {
        let known = |row: u32| {
            let known = others.iter().find(|known| known.has(row))?;
            self.rows(known).nth((row - known.first_row) as usize)
        };
        let rows = self.rows(block).zip(block.first_row..);
        rows.filter(|(ids, row)| known(*row).is_some_and(|known| known != *ids))
            .count() as u64
    }

    /// Adds what the ubatch says about some of its tokens.
    pub(super) fn add_ubatch_rows(&mut self, header: &Header, rows: RowInfos<'_>) {
        self.ubatch_unreadable |= header.k == UBATCH_UNREADABLE;
        // After a loss the rows that follow would stand in the wrong place: better none.
        if header.first_row as usize == self.infos.len() {
            self.infos.extend(rows.iter());
        }
    }

    /// Adds token ids of the ubatch.
    pub(super) fn add_tokens(&mut self, header: &Header, tokens: Numbers<'_>) {
        if header.first_row == 0 {
            // Those of a short pass can come in two ways.
            self.tokens.clear();
        }
        if header.first_row as usize == self.tokens.len() {
            self.tokens.extend(tokens.iter());
        }
    }

    /// What is known of each token of the ubatch; nothing when it was not read.
    pub fn ubatch(&self) -> &[RowInfo] {
        if self.has_ubatch() { &self.infos } else { &[] }
    }

    /// Token ids of the ubatch; empty when they were not read.
    pub fn tokens(&self) -> &[i32] {
        if self.tokens.len() == self.ubatch_tokens as usize {
            &self.tokens
        } else {
            &[]
        }
    }

    /// Expert ids of a block, row by row, in router order.
    pub fn rows(&self, block: &Block) -> impl Iterator<Item = &[u16]> {
        self.ids(block).chunks_exact(usize::from(block.k))
    }

    /// The router's weights of those experts, row by row, where they were asked for and could be read.
    pub fn weights(&self, block: &Block) -> Option<impl Iterator<Item = &[f32]>> {
        let weights = &self.weights[block.weights()?];
        Some(weights.chunks_exact(usize::from(block.k)))
    }

    /// The same as [`rows`](Self::rows), one row after the other.
    pub(super) fn ids(&self, block: &Block) -> &[u16] {
        &self.ids[block.ids()]
    }

    /// Whether a row of a layer was seen.
    pub(super) fn has_row(&self, layer: u16, row: u32) -> bool {
        let mut blocks = self.blocks.iter();
        self.layers.contains(layer) && blocks.any(|block| block.layer == layer && block.has(row))
    }

    /// Whether anything was routed.
    pub fn has_rows(&self) -> bool {
        self.blocks.iter().any(|block| block.rows > 0)
    }

    /// Whether position and sequence of each token are known.
    pub fn has_ubatch(&self) -> bool {
        !self.infos.is_empty() && self.infos.len() == self.ubatch_tokens as usize
    }

    /// Rows of the pass in a layer, if it was seen.
    pub fn total_rows(&self, layer: u16) -> Option<u32> {
        let block = self.blocks.iter().find(|block| block.layer == layer)?;
        Some(block.total_rows)
    }

    /// Tokens of the pass.
    pub fn token_count(&self) -> u32 {
        let rows = self.blocks.iter().map(|block| block.total_rows).max();
        self.ubatch_tokens.max(rows.unwrap_or(0))
    }

    pub(super) fn first_layer(&self) -> Option<u16> {
        self.blocks.first().map(|block| block.layer)
    }

    /// Layers that were seen.
    pub(super) fn layers(&self) -> &LayerSet {
        &self.layers
    }

    /// Layers of which the second block of experts was seen.
    pub(super) fn second_layers(&self) -> BTreeSet<u16> {
        self.second_blocks.iter().map(|block| block.layer).collect()
    }

    /// Whether rows are missing in a layer of which others were seen.
    pub(super) fn lacks_rows(&self) -> bool {
        !missing_rows(&self.blocks).is_empty() || !missing_rows(&self.second_blocks).is_empty()
    }

    /// Rows that are missing in layers of which others were seen.
    pub fn missing_rows(&self) -> Vec<(u16, Range<u32>)> {
        missing_rows(&self.blocks)
    }

    /// The same of second blocks of experts.
    pub fn missing_second_rows(&self) -> Vec<(u16, Range<u32>)> {
        missing_rows(&self.second_blocks)
    }

    /// Whether no token's output is wanted, for certain.
    pub fn has_no_output(&self) -> bool {
        self.has_ubatch() && self.infos.iter().all(|info| info.flags & ROW_OUTPUT == 0)
    }

    /// Positive evidence of a warm-up: at most two tokens, and either all experts chosen (b4887 to
    /// b9470 set `n_expert_used` so) or tokens that only a warm-up decodes: [BOS, EOS], or the
    /// [0, 0] of `common_context_can_seq_rm`.
    ///
    /// `first` says that no warm-up of the context has been seen: when no model file tells how many
    /// experts are normal, all of them are evidence once, since a model may always choose all.
    pub(super) fn is_warmup(&self, facts: &ModelFacts, first: bool) -> bool {
        let all_experts = match &facts.selective {
            Some(selective) => self
                .blocks
                .iter()
                .all(|block| selective.contains(&u32::from(block.k))),
            None => first && self.blocks.iter().all(Block::shows_all_experts),
        };
        self.scheduler
            && self.token_count() <= MAX_WARMUP_TOKENS
            && (self.tokens == [0, 0]
                || (!self.tokens.is_empty() && facts.warmup_tokens.contains(&self.tokens))
                || (self.has_rows() && all_experts))
    }

    /// Sequences of a batch of which the pass has as many tokens of each (`split_equal` in
    /// llama-batch.cpp), from the first on, and all with an output, as embeddings are computed: of longer
    /// ones the next pass has the rest. Empty for any other pass, unless it `goes_on` with such a batch.
    pub(super) fn equal_parts(&self, parts: &BTreeMap<u16, Part>, goes_on: bool) -> BTreeSet<u16> {
        let all_outputs = || self.infos.iter().all(|row| row.flags & ROW_OUTPUT != 0);
        let is_long = self.infos.len() > parts.len();
        if !self.has_ubatch() || !(is_long || goes_on) || !all_outputs() {
            return BTreeSet::new();
        }
        let length = self.infos.len() / parts.len();
        let firsts = self.infos.iter().filter(|row| row.position == 0).count();
        let from_the_first = length > 1 && firsts == parts.len();
        let equal = parts.values().all(|part| part.tokens as usize == length);
        if equal && (from_the_first || goes_on) {
            parts.keys().copied().collect()
        } else {
            BTreeSet::new()
        }
    }

    /// Whether it has the rest of some, and not of all, of these sequences.
    pub(super) fn goes_on_with(
        &self,
        equal_parts: &BTreeSet<u16>,
        parts: &BTreeMap<u16, Part>,
    ) -> bool {
        self.has_ubatch()
            && parts.len() < equal_parts.len()
            && parts.keys().all(|sequence| equal_parts.contains(sequence))
            && self.infos.iter().all(|row| row.position > 0)
    }

    /// Prefill or decode, for each token of the ubatch.
    ///
    /// A token is decoded when it is the only one of its sequence in the pass, not the sequence's
    /// first, and does not go on with a prompt of which the pass before had no output, or a part, nor is
    /// the prompt's last one anew. So are tokens that were guessed and are checked together. Where the
    /// ubatch was not read, a pass of one token is a decode.
    pub(super) fn row_phases(
        &self,
        parts: &BTreeMap<u16, Part>,
        before: &BTreeMap<u16, Sequence>,
        goes_on: bool,
    ) -> RowPhases {
        let mut phases = RowPhases {
            otherwise: if self.token_count() > 1 {
                Phase::Prefill
            } else {
                Phase::Decode
            },
            tokens: Vec::new(),
            outputs: Vec::new(),
        };
        if !self.has_ubatch() {
            return phases;
        }
        for info in &self.infos {
            let part = parts[&info.sequence];
            let phase = part.phase(before.get(&info.sequence), goes_on);
            phases.tokens.push(phase);
            if info.flags & ROW_OUTPUT != 0 {
                phases.outputs.push(phase);
            }
        }
        phases
    }

    /// What the pass has of each sequence; nothing when its ubatch was not read.
    pub(super) fn parts(&self) -> BTreeMap<u16, Part> {
        let mut parts: BTreeMap<u16, Part> = BTreeMap::new();
        if !self.has_ubatch() {
            return parts;
        }
        for info in &self.infos {
            let part = parts.entry(info.sequence).or_insert(Part {
                first_position: info.position,
                last_position: info.position,
                tokens: 0,
                outputs: 0,
            });
            part.last_position = info.position;
            part.tokens += 1;
            part.outputs += u32::from(info.flags & ROW_OUTPUT != 0);
        }
        parts
    }
}

/// A sequence after a pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sequence {
    state: SequenceState,
    /// Position of its last token.
    at: i32,
    /// That of the last token of its prompt.
    prompt_end: Option<i32>,
    /// The pass looked like a prompt that goes on with what was generated, and like guesses that a draft
    /// model evaluates once they were checked, of which the last need not stay.
    may_be_guesses: bool,
}

/// What is known of the next tokens of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SequenceState {
    /// None of its tokens had an output: the next ones go on with the same prompt.
    InPrompt,
    /// One of them had: what follows is generated.
    Generates,
    /// Several had, as where embeddings or the likelihood of a text are computed.
    InText,
}

/// What a pass has of one sequence.
#[derive(Clone, Copy)]
pub(super) struct Part {
    first_position: i32,
    last_position: i32,
    tokens: u32,
    outputs: u32,
}

/// Most tokens that are believed to be checked at once (llama.cpp guesses up to 64 by n-grams, and less
/// by a model; the last certain token comes with them).
const MAX_CHECKED: u32 = 65;

impl Part {
    fn phase(self, before: Option<&Sequence>, goes_on: bool) -> Phase {
        let state = before.map(|before| before.state);
        let alone = self.tokens == 1
            && state != Some(SequenceState::InPrompt)
            && !goes_on
            && !before.is_some_and(|before| self.is_asked_again(before));
        if self.first_position > 0 && (alone || self.is_check(state)) {
            Phase::Decode
        } else {
            Phase::Prefill
        }
    }

    /// Whether this is the prompt's last token once more: of a prompt that is asked again, llama-server
    /// has all others. What follows a check goes back, too, but never into the prompt.
    fn is_asked_again(self, before: &Sequence) -> bool {
        before.prompt_end == Some(self.first_position)
            && self.first_position <= before.at
            && !before.may_be_guesses
    }

    /// The sequence after the pass.
    pub(super) fn after(self, before: Option<&Sequence>, goes_on: bool) -> Sequence {
        let state = before.map(|before| before.state);
        let prompt_end = match self.phase(before, goes_on) {
            Phase::Prefill => Some(self.last_position),
            Phase::Decode | Phase::Unknown => before.and_then(|before| before.prompt_end),
        };
        Sequence {
            state: self.state_after(state),
            at: self.last_position,
            prompt_end,
            may_be_guesses: self.tokens > 1
                && self.outputs == 1
                && self.first_position > 0
                && state == Some(SequenceState::Generates),
        }
    }

    /// Whether these are tokens that were guessed: they follow generated ones, and all of them have an
    /// output to be compared with. Of a prompt, the last one has. A sequence of which nothing was seen
    /// before need not have begun here: we have come later, or it was copied from another one.
    fn is_check(self, before: Option<SequenceState>) -> bool {
        self.tokens > 1
            && self.tokens <= MAX_CHECKED
            && self.outputs == self.tokens
            && self.first_position > 0
            && matches!(before, None | Some(SequenceState::Generates))
    }

    fn state_after(self, before: Option<SequenceState>) -> SequenceState {
        match self.outputs {
            0 => SequenceState::InPrompt,
            1 => SequenceState::Generates,
            _ if self.is_check(before) => SequenceState::Generates,
            _ => SequenceState::InText,
        }
    }
}

/// What is missing between and behind the blocks of each layer.
fn missing_rows(blocks: &[Block]) -> Vec<(u16, Range<u32>)> {
    if blocks.iter().all(|block| block.rows == block.total_rows) {
        return Vec::new();
    }
    let mut blocks: Vec<&Block> = blocks.iter().collect();
    blocks.sort_by_key(|block| (block.layer, block.first_row));
    let mut missing = Vec::new();
    for layer in blocks.chunk_by(|one, other| one.layer == other.layer) {
        let mut seen = 0;
        for block in layer {
            if block.first_row > seen {
                missing.push((block.layer, seen..block.first_row));
            }
            seen = seen.max(block.first_row + block.rows);
        }
        let last = layer[layer.len() - 1];
        if seen < last.total_rows {
            missing.push((last.layer, seen..last.total_rows));
        }
    }
    missing
}

/// Adds a block, to the one before it where it goes on with its rows.
fn append(blocks: &mut Vec<Block>, block: Block) {
    match blocks.last_mut() {
        Some(last)
            if last.layer == block.layer
                && last.route == block.route
                && last.k == block.k
                && block.first_row > 0
                && last.first_row + last.rows == block.first_row
                && last.ids().end == block.start
                && last.weights().map(|range| range.end) == block.weights =>
        {
            last.rows += block.rows;
        }
        _ => blocks.push(block),
    }
}

/// Phases of a pass' rows.
#[derive(Debug)]
pub struct RowPhases {
    /// Of all tokens; empty when the ubatch was not read.
    tokens: Vec<Phase>,
    /// Of the tokens whose output is wanted: the last layers work on those alone.
    outputs: Vec<Phase>,
    /// Of rows that are neither.
    otherwise: Phase,
}

impl RowPhases {
    /// Phase of the pass: decode when all of its tokens are decoded.
    pub(super) fn of_pass(&self) -> Phase {
        match self.tokens.as_slice() {
            [] => self.otherwise,
            tokens if tokens.contains(&Phase::Prefill) => Phase::Prefill,
            _ => Phase::Decode,
        }
    }

    /// Phase of a row of a layer that has `total_rows` rows, and where the rows end, at most at `end`,
    /// that have the same.
    #[inline]
    pub fn run(&self, row: u32, end: u32, total_rows: u32) -> (Phase, u32) {
        let total = total_rows as usize;
        let phases = if total == self.tokens.len() {
            &self.tokens
        } else if total == self.outputs.len() {
            &self.outputs
        } else {
            return (self.otherwise, end);
        };
        let end_known = (end as usize).min(total);
        let rest = phases.get(row as usize..end_known).unwrap_or_default();
        let Some(first) = rest.first() else {
            return (self.otherwise, end);
        };
        let others = rest.iter().position(|phase| phase != first);
        (*first, row + others.unwrap_or(rest.len()) as u32)
    }
}

fn emptied<T>(mut vec: Vec<T>) -> Vec<T> {
    vec.clear();
    vec
}
