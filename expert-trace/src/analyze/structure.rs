//! Which experts go together: within a layer, from layer to layer, and with which tokens.

use std::ops::Range;

use serde::Serialize;

use super::{
    Stage,
    pairs::Pairs,
    routing::{Batch, Layer, Routing},
    tokens::Tokens,
};
use crate::profile::{ContextProfile, diff::divergence};

/// Tokens that must have chosen a pair before its lift is told: of fewer, chance makes any lift.
pub const MIN_SUPPORT: u32 = 10;
/// Pairs that are listed of a layer.
const TOP: usize = 5;
/// Pairs of layers that are listed.
const TOP_LAYERS: usize = 10;
/// Counters in memory at once: 64 MiB. Layers whose pairs are more are counted in several rounds.
const MAX_CELLS: usize = 16 << 20;

/// What goes together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Structure {
    /// Tokens that a pair has at least in the lists of lifts.
    pub min_support: u32,
    /// The layers whose loads are most alike, expert by expert.
    pub similar_layers: Vec<SimilarLayers>,
    /// Experts of a layer that tokens choose together more often than by chance; the strongest of each layer.
    /// Empty without a trace.
    pub co_activation: Vec<Pair>,
    /// Experts of a layer that are chosen after an expert of the layer before more often than by chance; the
    /// strongest of each pair of layers. Empty without a trace.
    pub transitions: Vec<Pair>,
    /// Rows of which it is not known which rows of the layer before are the same tokens, as in a last layer that
    /// computes some of them alone.
    pub unmatched_rows: u64,
    /// Experts by token and tokens by expert; `None` without token ids.
    pub tokens: Option<Tokens>,
}

/// Two layers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SimilarLayers {
    /// Their numbers.
    pub layers: [u16; 2],
    /// Jensen-Shannon divergence of the activation shares by expert id, in bits. Experts of the same id in two
    /// layers have nothing else in common.
    pub jsd_bits: f64,
}

/// Two experts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pair {
    /// Their layers.
    pub layers: [u16; 2],
    /// Their numbers.
    pub experts: [u16; 2],
    /// Tokens that chose both.
    pub tokens: u64,
    /// Tokens that chose the second one, of those that chose the first one, in percent.
    pub percent: f64,
    /// Tokens that chose both / tokens that would by chance, as often as each of them is chosen.
    pub lift: f64,
}

impl Structure {
    /// What counts tell, and a trace where there is one.
    pub fn of(
        context: &ContextProfile,
        layers: &[Layer],
        routing: Option<&Routing>,
        progress: &mut dyn FnMut(Stage, u64, u64),
    ) -> Self {
        let mut structure = Self {
            min_support: MIN_SUPPORT,
            similar_layers: similar_layers(context),
            co_activation: Vec::new(),
            transitions: Vec::new(),
            unmatched_rows: 0,
            tokens: None,
        };
        let Some(routing) = routing else {
            return structure;
        };
        let groups = groups(layers);
        let work = (groups.len() * routing.len()) as u64;
        for (round, group) in groups.into_iter().enumerate() {
            let mut counted = Counted::new(layers, group);
            for batch in routing.batches() {
                if batch.index % (1 << 14) == 0 {
                    let done = round * routing.len() + batch.index;
                    progress(Stage::Structure, done as u64, work);
                }
                counted.add(&batch);
            }
            let Counted {
                within,
                after,
                group,
                ..
            } = &counted;
            for (pairs, layer) in within.iter().zip(&layers[group.clone()]) {
                structure
                    .co_activation
                    .extend(listed(pairs, [layer, layer]));
            }
            for (pairs, layers) in after.iter().zip(layers[group.start..].windows(2)) {
                structure
                    .transitions
                    .extend(listed(pairs, [&layers[0], &layers[1]]));
            }
            structure.unmatched_rows += counted.unmatched;
        }
        for list in [&mut structure.co_activation, &mut structure.transitions] {
            list.sort_by(|a, b| b.lift.total_cmp(&a.lift).then(a.layers.cmp(&b.layers)));
        }
        structure.tokens = Tokens::of(routing);
        structure
    }
}

fn similar_layers(context: &ContextProfile) -> Vec<SimilarLayers> {
    let shares: Vec<(u16, Vec<f64>)> = context
        .layers
        .iter()
        .filter(|layer| layer.activations() > 0)
        .map(|layer| {
            let total = layer.activations() as f64;
            let counts = layer.dense().into_iter();
            (
                layer.layer_id,
                counts.map(|count| count as f64 / total).collect(),
            )
        })
        .collect();
    let mut similar = Vec::new();
    for (index, (a, of_a)) in shares.iter().enumerate() {
        for (b, of_b) in &shares[index + 1..] {
            let share = |of: &[f64], expert| of.get(expert).copied().unwrap_or(0.0);
            let experts = 0..of_a.len().max(of_b.len());
            let pairs = experts.map(|expert| [share(of_a, expert), share(of_b, expert)]);
            similar.push(SimilarLayers {
                layers: [*a, *b],
                jsd_bits: divergence(pairs),
            });
        }
    }
    similar.sort_by(|a, b| {
        a.jsd_bits
            .total_cmp(&b.jsd_bits)
            .then(a.layers.cmp(&b.layers))
    });
    similar.truncate(TOP_LAYERS);
    similar
}

/// Layers whose counters fit into memory together.
fn groups(layers: &[Layer]) -> Vec<Range<usize>> {
    let mut groups: Vec<Range<usize>> = Vec::new();
    let mut cells = usize::MAX;
    for (index, layer) in layers.iter().enumerate() {
        let next = layers.get(index + 1).map_or(0, |next| next.n_expert);
        let of_layer = (layer.n_expert * (layer.n_expert + next)) as usize;
        match groups.last_mut().filter(|_| cells + of_layer <= MAX_CELLS) {
            Some(last) => {
                last.end = index + 1;
                cells += of_layer;
            }
            None => {
                groups.push(index..index + 1);
                cells = of_layer;
            }
        }
    }
    groups
}

/// Pairs of some layers.
struct Counted<'a> {
    group: Range<usize>,
    within: Vec<Pairs>,
    after: Vec<Pairs>,
    unmatched: u64,
    before: Option<Batch<'a>>,
}

impl<'a> Counted<'a> {
    fn new(layers: &[Layer], group: Range<usize>) -> Self {
        let of_group = &layers[group.clone()];
        let next = layers[group.start..].iter().skip(1);
        let pairs = |a: &Layer, b: &Layer| Pairs::new(a.n_expert as usize, b.n_expert as usize);
        Self {
            within: of_group.iter().map(|layer| pairs(layer, layer)).collect(),
            after: of_group
                .iter()
                .zip(next)
                .map(|(a, b)| pairs(a, b))
                .collect(),
            group,
            unmatched: 0,
            before: None,
        }
    }

    fn add(&mut self, batch: &Batch<'a>) {
        if let Some(within) = self
            .at(batch.layer)
            .and_then(|index| self.within.get_mut(index))
        {
            batch
                .rows()
                .for_each(|row| within.add(row.experts, row.experts));
        }
        let before = self.before.replace(batch.clone());
        let Some(before) = before.filter(|of| of.pass == batch.pass && of.layer + 1 == batch.layer)
        else {
            return;
        };
        let Some(after) = self
            .at(before.layer)
            .and_then(|index| self.after.get_mut(index))
        else {
            return;
        };
        if before.rows.len() != batch.rows.len() {
            self.unmatched += batch.rows.len() as u64;
            return;
        }
        for (from, to) in before.rows().zip(batch.rows()) {
            after.add(from.experts, to.experts);
        }
    }

    fn at(&self, layer: usize) -> Option<usize> {
        self.group
            .contains(&layer)
            .then(|| layer - self.group.start)
    }
}

/// The strongest pairs of experts of two layers, of the same layer each pair once.
fn listed(pairs: &Pairs, layers: [&Layer; 2]) -> Vec<Pair> {
    let is_same = layers[0].id == layers[1].id;
    let strongest = pairs.strongest(MIN_SUPPORT, TOP, |a, b| !is_same || a < b);
    let pair = |of: super::pairs::Lift| Pair {
        layers: layers.map(|layer| layer.id),
        experts: [of.a as u16, of.b as u16],
        tokens: of.both.into(),
        percent: of.percent,
        lift: of.lift,
    };
    strongest.into_iter().map(pair).collect()
}
