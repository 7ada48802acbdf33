//! Counts of layers.

use std::{iter, ops::Index};

use expert_trace_common::MAX_LAYERS;
use serde::Serialize;

use super::{Block, Pass, Passes, pass::RowPhases};
use crate::{routes::Routes, tally::Tally};

/// A row whose last chosen value lies less than [`crate::selection::CLOSE_CALL`] above the next.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CloseCall {
    /// Number of the row among those that are counted in its layer, from 0: its line in the log.
    pub row: u64,
    /// The distance, in units of what is chosen from.
    pub margin: f32,
}

impl Tally {
    pub(super) fn add(&mut self, pass: &Pass, block: &Block, phases: &RowPhases) {
        self.k = self.k.max(block.k);
        let (mut row, end) = (block.first_row, block.first_row + block.rows);
        let mut ids = pass.ids(block);
        while row < end {
            let (phase, run_end) = phases.run(row, end, block.total_rows);
            let rows = run_end - row;
            let (of_run, rest) = ids.split_at(rows as usize * usize::from(block.k));
            self.count(phase, rows, of_run);
            (row, ids) = (run_end, rest);
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
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Experts to choose from, when the target's tensors show it; else 0.
    pub n_expert: u32,
    /// Passes in which it was seen.
    pub passes: Passes,
    /// Where it was read.
    pub routes: Routes,
    /// Rows whose experts the target, which rounds in its own way, may have chosen otherwise.
    pub close_calls: Vec<CloseCall>,
    /// What was counted.
    pub tally: Tally,
    /// Its second block of experts, if one was seen. In no other count.
    pub second_block: Option<SecondBlock>,
}

impl Layer {
    /// Nothing seen of it yet.
    fn new() -> Self {
        Self {
            n_expert: 0,
            passes: Passes::default(),
            routes: Routes::of(&[]),
            close_calls: Vec::new(),
            tally: Tally::default(),
            second_block: None,
        }
    }
}

/// Layers by number. Every pass asks for each of them: a place in an array is found at once.
#[derive(Clone, Debug, Default)]
pub struct Layers(Vec<Option<Layer>>);

impl Layers {
    /// One that was seen.
    pub fn get(&self, number: u16) -> Option<&Layer> {
        self.0.get(usize::from(number))?.as_ref()
    }

    /// Whether none was seen.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// Those that were seen, in the order of their numbers.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (u16, &Layer)> {
        let numbered = self.0.iter().enumerate();
        numbered.filter_map(|(number, layer)| Some((number as u16, layer.as_ref()?)))
    }

    /// Their numbers, in ascending order.
    pub fn numbers(&self) -> impl DoubleEndedIterator<Item = u16> {
        self.iter().map(|(number, _)| number)
    }

    /// A layer to count in.
    #[inline]
    pub(super) fn entry(&mut self, number: u16) -> &mut Layer {
        let index = usize::from(number);
        if index >= self.0.len() {
            self.0.resize_with(index + 1, || None);
        }
        self.0[index].get_or_insert_with(Layer::new)
    }

    /// Begins to count anew, in the layers that are known.
    pub(super) fn reset(&mut self) {
        for layer in self.0.iter_mut().flatten() {
            layer.passes = Passes::default();
            layer.close_calls.clear();
            layer.tally.reset();
            if let Some(second) = &mut layer.second_block {
                second.passes = 0;
                second.tally.reset();
            }
        }
    }

    pub(super) fn get_mut(&mut self, number: u16) -> Option<&mut Layer> {
        self.0.get_mut(usize::from(number))?.as_mut()
    }
}

impl Index<u16> for Layers {
    type Output = Layer;

    fn index(&self, number: u16) -> &Layer {
        self.get(number).expect("the layer was seen")
    }
}

/// Numbers of layers.
#[derive(Clone, Debug, Default)]
pub(super) struct LayerSet([u64; MAX_LAYERS as usize / 64]);

impl LayerSet {
    #[inline]
    pub(super) fn insert(&mut self, layer: u16) {
        self.0[usize::from(layer / 64)] |= 1 << (layer % 64);
    }

    #[inline]
    pub(super) fn contains(&self, layer: u16) -> bool {
        self.0[usize::from(layer / 64)] & (1 << (layer % 64)) != 0
    }

    /// In ascending order.
    pub(super) fn iter(&self) -> impl Iterator<Item = u16> {
        let words = (0..).zip(&self.0);
        words.flat_map(|(index, word)| {
            let mut left = *word;
            iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros() as u16)?;
                left &= left - 1;
                Some(index * 64 + bit)
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_what_was_put_in() {
        let mut set = LayerSet::default();
        let layers = [0, 1, 63, 64, 500, MAX_LAYERS - 1];
        for layer in layers.into_iter().rev() {
            assert!(!set.contains(layer));
            set.insert(layer);
            assert!(set.contains(layer));
        }
        assert!(set.iter().eq(layers));
    }

    #[test]
    fn layers_are_those_that_were_asked_for() {
        let mut layers = Layers::default();
        assert!(layers.is_empty());
        for number in [5, 2, 5] {
            layers.entry(number).n_expert += 1;
        }
        assert!(layers.numbers().eq([2, 5]));
        assert_eq!([layers[2].n_expert, layers[5].n_expert], [1, 2]);
        assert!(layers.get(3).is_none() && layers.get(900).is_none());
    }
}
