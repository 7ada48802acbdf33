//! What a context routed, in memory: flat arrays, two bytes for an activation.

use std::ops::Range;

use expert_trace_common::Phase;

use crate::trace::Row;

/// Most activations of one analysis: places in the arrays are numbers of 32 bits.
const MAX_ACTIVATIONS: usize = u32::MAX as usize;
/// Stands for a sequence that is not known.
const NO_SEQUENCE: u16 = u16::MAX;
/// Stands for a position that is not known, and for a token without id.
const UNKNOWN: i32 = i32::MIN;

/// A layer with experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its number in the model.
    pub id: u16,
    /// Experts to choose from, or as many as the largest id tells.
    pub n_expert: u32,
    /// Experts chosen per token; the largest seen.
    pub k: u32,
    /// Bytes of one of its experts, where that is known.
    pub expert_bytes: Option<u64>,
    /// Its expert 0 among the experts of all layers.
    pub first_key: u32,
}

impl Layer {
    /// Its experts among those of all layers.
    pub fn keys(&self) -> Range<usize> {
        self.first_key as usize..(self.first_key + self.n_expert) as usize
    }
}

/// Tokens of one pass in one layer: the loads and hits of a cache are decided for all of them at once.
#[derive(Clone, Debug)]
pub struct Batch<'a> {
    routing: &'a Routing,
    /// Its number, from 0.
    pub index: usize,
    /// Index of its layer.
    pub layer: usize,
    /// Pass of the context.
    pub pass: u32,
    /// Its rows.
    pub rows: Range<usize>,
}

impl<'a> Batch<'a> {
    /// Its rows, in the order of the pass.
    pub fn rows(&self) -> impl DoubleEndedIterator<Item = RoutedRow<'a>> + Clone + use<'a> {
        let routing = self.routing;
        self.rows.clone().map(|row| routing.row(row))
    }

    /// Rows of generated tokens.
    pub fn decode_rows(&self) -> usize {
        let decode = &self.routing.decode[self.rows.clone()];
        decode.iter().filter(|decode| **decode).count()
    }
}

/// A token in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutedRow<'a> {
    /// Its number among all rows.
    pub index: usize,
    /// Whether it was generated.
    pub decode: bool,
    /// Its sequence, where that is known.
    pub sequence: Option<u16>,
    /// Its position there, where that is known.
    pub position: Option<i32>,
    /// Its id, where that is known.
    pub token: Option<i32>,
    /// Chosen experts in router order.
    pub experts: &'a [u16],
}

/// What comes next in a trace.
#[derive(Clone, Debug)]
pub enum Step<'a> {
    /// Tokens of one pass in one layer.
    Batch(Batch<'a>),
    /// Something is missing here, in the layer of that index, or anywhere.
    Gap(Option<usize>),
}

/// What a context routed, in the order in which it was computed.
#[derive(Debug, Default)]
pub struct Routing {
    layers: Vec<Layer>,
    batches: Vec<BatchEnd>,
    gaps: Vec<Gap>,
    row_ends: Vec<u32>,
    experts: Vec<u16>,
    decode: Vec<bool>,
    sequences: Vec<u16>,
    positions: Vec<i32>,
    /// Empty when no row has one.
    tokens: Vec<i32>,
}

#[derive(Clone, Copy, Debug)]
struct BatchEnd {
    row: u32,
    pass: u32,
    layer: u16,
}

#[derive(Clone, Copy, Debug)]
struct Gap {
    /// The batch that comes next.
    before: usize,
    layer: Option<usize>,
}

impl Routing {
    /// Nothing yet, of these layers in ascending order, with room for so many rows and activations.
    pub fn new(layers: Vec<Layer>, rows: usize, activations: usize) -> Self {
        Self {
            layers,
            row_ends: Vec::with_capacity(rows),
            experts: Vec::with_capacity(activations),
            decode: Vec::with_capacity(rows),
            sequences: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            ..Self::default()
        }
    }

    /// Adds a token.
    ///
    /// # Errors
    /// When the layer is none of these, or has no such expert, or there are too many activations.
    pub fn push(&mut self, row: &Row<'_>) -> Result<(), &'static str> {
        const CHANGED: &str =
            "the file has changed while it was read: analyze it when it is complete";
        let layer = self.index_of(row.layer).ok_or(CHANGED)?;
        let n_expert = self.layers[layer].n_expert;
        if row
            .experts
            .iter()
            .any(|expert| u32::from(*expert) >= n_expert)
        {
            return Err(CHANGED);
        }
        if self.experts.len() + row.experts.len() > MAX_ACTIVATIONS {
            return Err("it has more than 4294967295 activations: analyze a shorter trace");
        }
        if let Some(token) = row.token {
            self.tokens.resize(self.row_ends.len(), UNKNOWN);
            self.tokens.push(token);
        }
        self.experts.extend_from_slice(row.experts);
        self.row_ends.push(self.experts.len() as u32);
        self.decode.push(row.phase != Some(Phase::Prefill));
        self.sequences.push(row.sequence.unwrap_or(NO_SEQUENCE));
        self.positions.push(row.position.unwrap_or(UNKNOWN));
        let (end, pass) = (self.row_ends.len() as u32, row.pass.unwrap_or(0));
        match self.batches.last_mut() {
            Some(last) if (last.pass, usize::from(last.layer)) == (pass, layer) => {
                last.row = end;
            }
            _ => self.batches.push(BatchEnd {
                row: end,
                pass,
                layer: layer as u16,
            }),
        }
        Ok(())
    }

    /// Something is missing here: in a layer, or in any.
    pub fn push_gap(&mut self, layer: Option<u16>) {
        let index = self.index_of(layer);
        if layer.is_some() && index.is_none() {
            // A layer that was never seen has no sequence to break.
            return;
        }
        self.gaps.push(Gap {
            before: self.batches.len(),
            layer: index,
        });
    }

    /// Gives its layers the sizes of these, which are the same layers.
    pub fn set_sizes(&mut self, layers: &[Layer]) {
        self.layers = layers.to_vec();
    }

    fn index_of(&self, layer: Option<u16>) -> Option<usize> {
        let of = |known: &Layer| known.id;
        self.layers.binary_search_by_key(&layer?, of).ok()
    }

    /// Its layers, ascending.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Experts of all layers together.
    pub fn keys(&self) -> usize {
        self.layers.last().map_or(0, |layer| layer.keys().end)
    }

    /// Batches that there are.
    pub fn len(&self) -> usize {
        self.batches.len()
    }

    /// Whether nothing was routed.
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Gaps that there are.
    pub fn gaps(&self) -> usize {
        self.gaps.len()
    }

    /// Whether tokens have ids.
    pub fn has_tokens(&self) -> bool {
        !self.tokens.is_empty()
    }

    /// (token, expert) pairs.
    pub fn activations(&self) -> usize {
        self.experts.len()
    }

    /// One batch.
    pub fn batch(&self, index: usize) -> Batch<'_> {
        let BatchEnd { row, pass, layer } = self.batches[index];
        let start = index
            .checked_sub(1)
            .map_or(0, |before| self.batches[before].row);
        Batch {
            routing: self,
            index,
            layer: layer.into(),
            pass,
            rows: start as usize..row as usize,
        }
    }

    /// All batches, in order.
    pub fn batches(&self) -> impl Iterator<Item = Batch<'_>> {
        (0..self.len()).map(|index| self.batch(index))
    }

    /// All batches, and the gaps between them.
    pub fn steps(&self) -> impl Iterator<Item = Step<'_>> {
        let mut gaps = self.gaps.iter().peekable();
        let mut next = 0;
        std::iter::from_fn(move || {
            if let Some(gap) = gaps.next_if(|gap| gap.before <= next) {
                return Some(Step::Gap(gap.layer));
            }
            let batch = (next < self.len()).then(|| self.batch(next))?;
            next += 1;
            Some(Step::Batch(batch))
        })
    }

    fn row(&self, index: usize) -> RoutedRow<'_> {
        let known = |value: i32| Some(value).filter(|value| *value != UNKNOWN);
        let sequence = self.sequences[index];
        RoutedRow {
            index,
            decode: self.decode[index],
            sequence: Some(sequence).filter(|sequence| *sequence != NO_SEQUENCE),
            position: known(self.positions[index]),
            token: self.tokens.get(index).copied().and_then(known),
            experts: self.experts_of(index),
        }
    }

    /// Experts that a row has chosen.
    pub fn experts_of(&self, row: usize) -> &[u16] {
        let start = row.checked_sub(1).map_or(0, |before| self.row_ends[before]);
        &self.experts[start as usize..self.row_ends[row] as usize]
    }
}
