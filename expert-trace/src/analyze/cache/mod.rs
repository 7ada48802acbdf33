//! Which share of the lookups a cache of experts would answer, by budget and policy.
//!
//! The budget is in bytes of experts, each with the size that it has in its layer, and limits what is held
//! after a batch. docs/analyze.md has the definitions.

pub mod pin;
pub mod simulate;
pub mod stack;
#[cfg(test)]
mod tests;

use serde::Serialize;

use self::{
    simulate::{Belady, Lfu, NextUse, Random},
    stack::Stack,
};
use super::{
    Stage,
    lookups::{Distinct, Lookup, Lookups},
    routing::{Layer, Routing},
};

/// Bytes of a MiB.
pub const MIB: f64 = (1 << 20) as f64;

/// Points of the LRU curve.
const POINTS: u64 = 64;

/// Shares of all experts' bytes that are tried when no budgets are named: sixteenths.
const SWEEP: [u64; 9] = [1, 2, 3, 4, 6, 8, 10, 12, 14];

/// What is to be tried.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Budgets in bytes; none for a sweep up to all experts.
    pub budgets: Vec<u64>,
    /// Activations of which all policies but LRU are computed, from the beginning.
    pub sample: usize,
    /// Seed of the random policy.
    pub seed: u64,
}

/// Caches of experts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cache {
    /// Bytes of an expert: least and most of a layer.
    pub expert_bytes: [u64; 2],
    /// All experts of all layers.
    pub all_experts_mib: f64,
    /// Distinct experts that a decode pass touches, in MiB: the working set of one token when every pass has
    /// one. `None` without decode passes.
    pub pass_mib: Option<PassBytes>,
    /// Decode lookups of the table: one for each distinct expert of a batch.
    pub lookups: u64,
    /// Set when the table, but for `lru_curve`, is of the first activations alone.
    pub sampled: Option<Sampled>,
    /// Seed of the random policy.
    pub seed: u64,
    /// Decode hits by budget, ascending.
    pub table: Vec<Row>,
    /// Decode hits of LRU over the whole trace, for budgets up to all experts.
    pub lru_curve: Vec<Point>,
    /// Decode lookups that would miss in any cache: the first use of an expert, in percent.
    pub first_use_percent: Option<f64>,
    /// Memory that computing the table has taken, in MiB.
    pub memory_mib: f64,
}

/// What decode passes touch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PassBytes {
    /// On average.
    pub mean: f64,
    /// At most.
    pub max: f64,
}

/// What part of a trace was computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sampled {
    /// Activations, from the beginning.
    pub activations: usize,
    /// All activations.
    pub of: usize,
}

/// Decode hits of one budget, in percent of the lookups. `None` where it is not known.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The budget.
    pub budget_mib: f64,
    /// Its share of all experts, in percent: what a fixed choice by chance would hit.
    pub share_percent: f64,
    /// The expert goes whose next use is furthest: knows the future.
    pub belady: Option<f64>,
    /// The least recently used one goes.
    pub lru: Option<f64>,
    /// The least frequently used one goes.
    pub lfu: Option<f64>,
    /// Any goes.
    pub random: Option<f64>,
    /// LRU with an equal slice of the budget for each layer.
    pub layer_lru: Option<f64>,
    /// LFU with an equal slice of the budget for each layer.
    pub layer_lfu: Option<f64>,
    /// The experts with most decode lookups per byte stay: chosen with knowledge of the whole run.
    pub static_pin: Option<f64>,
    /// What the two per-layer caches hold at least, when that is more than the budget: a layer always holds
    /// its last batch.
    pub layer_holds_mib: Option<f64>,
    /// Whether it is less than one decode pass touches.
    pub below_working_set: bool,
    /// Hits in the second half of the decode lookups, with a pin learned from the first half.
    pub second_half: Option<SecondHalf>,
}

/// Decode hits in the second half of the run, in percent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SecondHalf {
    /// Experts stay that had most decode lookups per byte in the first half.
    pub learned_pin: f64,
    /// LRU.
    pub lru: f64,
}

/// A point of a curve.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    /// The budget.
    pub budget_mib: f64,
    /// Decode hits, in percent.
    pub percent: f64,
}

impl Cache {
    /// What caches would do on a trace whose layers all have sizes.
    pub fn of(
        routing: &Routing,
        sizes: &[u64],
        options: &Options,
        progress: &mut dyn FnMut(Stage, u64, u64),
    ) -> Self {
        let all: u64 = sizes.iter().sum();
        let budgets = options.budgets(all);
        let mut sums = Sums::new(sizes.len());
        let mut distances = Hits::new(&budgets);
        let whole = lru(routing, sizes, all, progress);
        let lookups = Lookups::of(routing, options.sample);
        let halves = second_half(&lookups);
        let mut later = Hits::new(&budgets);
        let mut stack = Stack::new(sizes);
        for (index, batch) in lookups.batches().enumerate() {
            stack.look_up(batch, |lookup, bytes| {
                if lookup.is_decode() {
                    distances.add(bytes);
                    if index >= halves {
                        later.add(bytes);
                    }
                    sums.add(lookup.key(), index >= halves);
                }
            });
        }
        let pins = pin::hits(&sums.whole(), &sums.whole(), sizes, &budgets);
        let learned = pin::hits(&sums.first, &sums.second, sizes, &budgets);
        let [first, second] = [&sums.first, &sums.second].map(|of| of.iter().sum::<u64>());
        let simulated = Simulated::of(
            routing.layers(),
            &lookups,
            sizes,
            &budgets,
            options,
            progress,
        );
        let percent = |hits: u64, of: u64| (of > 0).then(|| 100.0 * hits as f64 / of as f64);
        let table = budgets.iter().enumerate().map(|(index, budget)| Row {
            belady: percent(simulated.belady[index], lookups.decode),
            lru: percent(distances.hits(index), lookups.decode),
            lfu: percent(simulated.lfu[index], lookups.decode),
            random: percent(simulated.random[index], lookups.decode),
            layer_lru: percent(simulated.layer_lru[index], lookups.decode),
            layer_lfu: percent(simulated.layer_lfu[index], lookups.decode),
            static_pin: percent(pins[index], lookups.decode),
            layer_holds_mib: Some(slices_hold(&whole.largest, *budget))
                .filter(|holds| *holds > *budget)
                .map(|holds| holds as f64 / MIB),
            below_working_set: whole
                .pass
                .is_some_and(|pass| (*budget as f64) < pass.mean * MIB),
            second_half: (first > 0 && second > 0).then(|| SecondHalf {
                learned_pin: 100.0 * learned[index] as f64 / second as f64,
                lru: 100.0 * later.hits(index) as f64 / second as f64,
            }),
            ..Row::unknown(*budget, all)
        });
        Self {
            expert_bytes: spread(sizes),
            all_experts_mib: all as f64 / MIB,
            pass_mib: whole.pass,
            lookups: lookups.decode,
            sampled: (options.sample < routing.activations()).then_some(Sampled {
                activations: options.sample,
                of: routing.activations(),
            }),
            seed: options.seed,
            table: table.collect(),
            lru_curve: whole.curve,
            first_use_percent: whole.first_use_percent,
            memory_mib: simulated.bytes as f64 / MIB,
        }
    }

    /// What can be said of counts alone: experts that stay.
    pub fn of_counts(decode: &[u64], sizes: &[u64], options: &Options) -> Self {
        let all: u64 = sizes.iter().sum();
        let budgets = options.budgets(all);
        let lookups: u64 = decode.iter().sum();
        let pins = pin::hits(decode, decode, sizes, &budgets);
        let table = budgets.iter().zip(pins).map(|(budget, hits)| Row {
            static_pin: (lookups > 0).then(|| 100.0 * hits as f64 / lookups as f64),
            ..Row::unknown(*budget, all)
        });
        Self {
            expert_bytes: spread(sizes),
            all_experts_mib: all as f64 / MIB,
            pass_mib: None,
            lookups,
            sampled: None,
            seed: options.seed,
            table: table.collect(),
            lru_curve: Vec::new(),
            first_use_percent: None,
            memory_mib: 0.0,
        }
    }
}

impl Options {
    fn budgets(&self, all: u64) -> Vec<u64> {
        let mut budgets = match self.budgets.as_slice() {
            [] => SWEEP.map(|sixteenths| all / 16 * sixteenths).to_vec(),
            named => named.to_vec(),
        };
        budgets.sort_unstable();
        budgets.dedup();
        budgets
    }
}

impl Row {
    fn unknown(budget: u64, all: u64) -> Self {
        Self {
            budget_mib: budget as f64 / MIB,
            share_percent: (100.0 * budget as f64 / all as f64).min(100.0),
            belady: None,
            lru: None,
            lfu: None,
            random: None,
            layer_lru: None,
            layer_lfu: None,
            static_pin: None,
            layer_holds_mib: None,
            below_working_set: false,
            second_half: None,
        }
    }
}

/// Hits by budget, of distances in bytes.
#[derive(Debug)]
struct Hits<'a> {
    budgets: &'a [u64],
    /// Lookups for which this budget is the smallest that is enough.
    enough: Vec<u64>,
}

impl<'a> Hits<'a> {
    fn new(budgets: &'a [u64]) -> Self {
        Self {
            budgets,
            enough: vec![0; budgets.len()],
        }
    }

    fn add(&mut self, bytes: Option<u64>) {
        let Some(bytes) = bytes else { return };
        let index = self.budgets.partition_point(|budget| *budget < bytes);
        if let Some(enough) = self.enough.get_mut(index) {
            *enough += 1;
        }
    }

    fn hits(&self, index: usize) -> u64 {
        self.enough[..=index].iter().sum()
    }
}

/// Decode lookups by expert, in both halves.
#[derive(Debug)]
struct Sums {
    first: Vec<u64>,
    second: Vec<u64>,
}

impl Sums {
    fn new(keys: usize) -> Self {
        Self {
            first: vec![0; keys],
            second: vec![0; keys],
        }
    }

    fn add(&mut self, key: usize, later: bool) {
        let of = if later {
            &mut self.second
        } else {
            &mut self.first
        };
        of[key] += 1;
    }

    fn whole(&self) -> Vec<u64> {
        self.first
            .iter()
            .zip(&self.second)
            .map(|(a, b)| a + b)
            .collect()
    }
}

/// The batch with which the second half of the decode lookups begins.
fn second_half(lookups: &Lookups) -> usize {
    let mut seen = 0;
    let mut batches = lookups.batches();
    let half = lookups.decode.div_ceil(2);
    let is_first = |batch: &[Lookup]| {
        let is_first = seen < half;
        seen += batch.iter().filter(|lookup| lookup.is_decode()).count() as u64;
        is_first
    };
    let first = batches.by_ref().map(is_first);
    first.take_while(|is_first| *is_first).count()
}

/// LRU over a whole trace.
struct Whole {
    curve: Vec<Point>,
    first_use_percent: Option<f64>,
    pass: Option<PassBytes>,
    /// The largest decode batch of each layer, in bytes.
    largest: Vec<u64>,
}

fn lru(
    routing: &Routing,
    sizes: &[u64],
    all: u64,
    progress: &mut dyn FnMut(Stage, u64, u64),
) -> Whole {
    let points: Vec<u64> = (1..=POINTS).map(|point| all / POINTS * point).collect();
    let points: Vec<u64> = points.into_iter().chain([all]).collect();
    let mut hits = Hits::new(&points);
    let mut stack = Stack::new(sizes);
    let mut distinct = Distinct::new(routing.keys());
    let mut batch_lookups = Vec::new();
    let (mut decode, mut first_uses) = (0_u64, 0_u64);
    let mut passes = Passes::default();
    let mut largest = vec![0; routing.layers().len()];
    for batch in routing.batches() {
        batch_lookups.clear();
        distinct.find(routing, &batch, &mut batch_lookups);
        let mut bytes_of_pass = 0;
        stack.look_up(&batch_lookups, |lookup, bytes| {
            if lookup.is_decode() {
                decode += 1;
                first_uses += u64::from(bytes.is_none());
                hits.add(bytes);
                bytes_of_pass += sizes[lookup.key()];
            }
        });
        passes.add(batch.pass, bytes_of_pass);
        if bytes_of_pass > 0 {
            let bytes: u64 = batch_lookups.iter().map(|lookup| sizes[lookup.key()]).sum();
            largest[batch.layer] = bytes.max(largest[batch.layer]);
        }
        if batch.index % (1 << 14) == 0 {
            progress(Stage::Lru, batch.index as u64, routing.len() as u64);
        }
    }
    let percent = |hits: u64| 100.0 * hits as f64 / decode as f64;
    let curve = (0..POINTS as usize).map(|index| Point {
        budget_mib: points[index] as f64 / MIB,
        percent: percent(hits.hits(index)),
    });
    Whole {
        curve: if decode > 0 {
            curve.collect()
        } else {
            Vec::new()
        },
        first_use_percent: (decode > 0).then(|| percent(first_uses)),
        pass: passes.end(),
        largest,
    }
}

/// Bytes that decode passes touch.
#[derive(Debug, Default)]
struct Passes {
    pass: Option<u32>,
    bytes: u64,
    count: u64,
    sum: u128,
    max: u64,
}

impl Passes {
    fn add(&mut self, pass: u32, bytes: u64) {
        if self.pass != Some(pass) {
            self.finish();
            self.pass = Some(pass);
        }
        self.bytes += bytes;
    }

    fn finish(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        if bytes > 0 {
            self.count += 1;
            self.sum += u128::from(bytes);
            self.max = self.max.max(bytes);
        }
    }

    fn end(mut self) -> Option<PassBytes> {
        self.finish();
        (self.count > 0).then(|| PassBytes {
            mean: self.sum as f64 / self.count as f64 / MIB,
            max: self.max as f64 / MIB,
        })
    }
}

/// What equal slices of a budget hold, of which each holds the largest decode batch of its layer at least.
fn slices_hold(largest: &[u64], budget: u64) -> u64 {
    let slice = budget / (largest.len() as u64).max(1);
    largest.iter().map(|batch| slice.max(*batch)).sum()
}

fn spread(sizes: &[u64]) -> [u64; 2] {
    let (min, max) = (sizes.iter().min(), sizes.iter().max());
    [min, max].map(|size| size.copied().unwrap_or(0))
}

/// Hits by budget.
struct Simulated {
    belady: Vec<u64>,
    lfu: Vec<u64>,
    random: Vec<u64>,
    layer_lru: Vec<u64>,
    layer_lfu: Vec<u64>,
    bytes: usize,
}

impl Simulated {
    fn of(
        layers: &[Layer],
        lookups: &Lookups,
        sizes: &[u64],
        budgets: &[u64],
        options: &Options,
        progress: &mut dyn FnMut(Stage, u64, u64),
    ) -> Self {
        let keys = sizes.len();
        let steps = 3 * budgets.len() as u64 + layers.len() as u64;
        let mut done = 0;
        let mut step = || {
            progress(Stage::Policies, done, steps);
            done += 1;
        };
        let next = NextUse::of(lookups, keys);
        let mut each = |of: &dyn Fn(u64) -> u64| -> Vec<u64> {
            let hits = budgets.iter().map(|budget| {
                step();
                of(*budget)
            });
            hits.collect()
        };
        let belady = each(&|budget| {
            simulate::hits(
                lookups,
                sizes,
                budget,
                &mut Belady::new(lookups, &next, keys),
            )
        });
        let lfu =
            each(&|budget| simulate::hits(lookups, sizes, budget, &mut Lfu::new(lookups, keys)));
        let random = each(&|budget| {
            simulate::hits(lookups, sizes, budget, &mut Random::new(options.seed, keys))
        });
        let first_keys: Vec<usize> = layers.iter().map(|layer| layer.keys().start).collect();
        let by_layer = lookups.by_layer(&first_keys);
        let mut layer_lru = vec![0; budgets.len()];
        let mut layer_lfu = vec![0; budgets.len()];
        let slices: Vec<u64> = budgets
            .iter()
            .map(|of| of / layers.len().max(1) as u64)
            .collect();
        for (layer, lookups) in layers.iter().zip(&by_layer) {
            step();
            let sizes = &sizes[layer.keys()];
            let mut hits = Hits::new(&slices);
            let mut stack = Stack::new(sizes);
            for batch in lookups.batches() {
                stack.look_up(batch, |lookup, bytes| {
                    if lookup.is_decode() {
                        hits.add(bytes);
                    }
                });
            }
            for (index, slice) in slices.iter().enumerate() {
                layer_lru[index] += hits.hits(index);
                let mut lfu = Lfu::new(lookups, sizes.len());
                layer_lfu[index] += simulate::hits(lookups, sizes, *slice, &mut lfu);
            }
        }
        let of_layers: usize = by_layer.iter().map(Lookups::bytes).sum();
        // Heaps of Belady and LFU have at most a place for each batch, or four for each expert.
        let heaps = (5 * lookups.len()).max(32 * keys);
        Self {
            belady,
            lfu,
            random,
            layer_lru,
            layer_lfu,
            bytes: lookups.bytes() + next.bytes() + of_layers + heaps + 20 * keys,
        }
    }
}
