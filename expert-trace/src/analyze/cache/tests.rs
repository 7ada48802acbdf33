//! Every policy against one that is written as its definition reads.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::analyze::tests::{Known, RandomTrace};

/// A cache that is written as README and docs/analyze.md define it, with sets.
struct Naive<'a> {
    trace: &'a RandomTrace,
    budget: u64,
    /// Whether the budget is divided by the layers, and which of them this is.
    layer: Option<usize>,
}

/// What is known of an expert when one is to go.
struct Candidate {
    next_batch: usize,
    /// Whether a generated token needs it there.
    next_is_decode: bool,
    lookups: u64,
    last_use: usize,
    key: usize,
}

impl Naive<'_> {
    /// Decode hits and lookups of a policy that chooses one of the candidates.
    fn run(&self, mut choose: impl FnMut(&[Candidate]) -> usize) -> (u64, u64) {
        let batches = self.trace.batches();
        let batches: Vec<_> = batches
            .iter()
            .filter(|batch| self.layer.is_none_or(|layer| batch[0].layer == layer))
            .collect();
        let keys = |batch: &[&Known]| -> BTreeSet<usize> {
            let of_row = |row: &&Known| {
                row.experts
                    .iter()
                    .map(|id| self.trace.key(row, *id))
                    .collect()
            };
            batch
                .iter()
                .flat_map(|row| -> Vec<usize> { of_row(row) })
                .collect()
        };
        let touched_by: Vec<BTreeSet<usize>> = batches.iter().map(|batch| keys(batch)).collect();
        let mut held: BTreeSet<usize> = BTreeSet::new();
        let mut lookups: BTreeMap<usize, u64> = BTreeMap::new();
        let mut last_use: BTreeMap<usize, usize> = BTreeMap::new();
        let mut uses = 0;
        let (mut hits, mut all) = (0, 0);
        for (index, batch) in batches.iter().enumerate() {
            let touched = &touched_by[index];
            let generated: Vec<&Known> = batch.iter().filter(|row| row.decode).copied().collect();
            let generated = keys(&generated);
            all += generated.len() as u64;
            hits += generated.intersection(&held).count() as u64;
            for row in batch.iter() {
                for expert in &row.experts {
                    uses += 1;
                    last_use.insert(self.trace.key(row, *expert), uses);
                }
            }
            for key in touched {
                *lookups.entry(*key).or_default() += 1;
            }
            held.extend(touched);
            loop {
                let bytes: u64 = held.iter().map(|key| self.trace.sizes[*key]).sum();
                let parts = if self.layer.is_some() {
                    self.trace.layers.len() as u64
                } else {
                    1
                };
                let mut candidates: Vec<Candidate> = held
                    .difference(touched)
                    .map(|key| {
                        let mut later = index + 1..batches.len();
                        let next = later.find(|at| touched_by[*at].contains(key));
                        let of_next = next.iter().flat_map(|at| batches[*at]);
                        let mut of_next = of_next.filter(|row| row.decode);
                        Candidate {
                            next_batch: next.unwrap_or(usize::MAX),
                            next_is_decode: of_next.any(|row| keys(&[row]).contains(key)),
                            lookups: lookups[key],
                            last_use: last_use[key],
                            key: *key,
                        }
                    })
                    .collect();
                candidates.sort_by_key(|candidate| candidate.last_use);
                if bytes * parts <= self.budget || candidates.is_empty() {
                    break;
                }
                let key = candidates[choose(&candidates)].key;
                held.remove(&key);
            }
        }
        (hits, all)
    }

    fn percent((hits, all): (u64, u64)) -> Option<f64> {
        (all > 0).then(|| 100.0 * hits as f64 / all as f64)
    }
}

fn furthest(candidates: &[Candidate]) -> usize {
    let candidates = candidates.iter().enumerate();
    candidates
        .max_by_key(|(_, of)| (of.next_batch, !of.next_is_decode))
        .unwrap()
        .0
}

fn least_used(candidates: &[Candidate]) -> usize {
    let candidates = candidates.iter().enumerate();
    candidates
        .min_by_key(|(_, of)| (of.lookups, of.last_use))
        .unwrap()
        .0
}

fn oldest(_: &[Candidate]) -> usize {
    0
}

fn budgets(trace: &RandomTrace) -> Vec<u64> {
    (1..=trace.sizes.iter().sum::<u64>() + 1).collect()
}

fn cache_of(trace: &RandomTrace) -> Cache {
    let options = Options {
        budgets: budgets(trace),
        sample: usize::MAX,
        seed: 7,
    };
    Cache::of(&trace.routing, &trace.sizes, &options, &mut |_, _, _| {})
}

#[test]
fn policies_are_those_of_their_definitions() {
    for seed in 0..30 {
        let trace = RandomTrace::new(seed, seed % 2 == 0);
        let cache = cache_of(&trace);
        let step = 1 + trace.sizes.len() / 4;
        let rows = cache.table.iter().zip(budgets(&trace));
        for (row, budget) in rows.skip(seed as usize % step).step_by(step) {
            let of = |layer| Naive {
                trace: &trace,
                budget,
                layer,
            };
            let whole = |choose: fn(&[Candidate]) -> usize| Naive::percent(of(None).run(choose));
            let sliced = |choose: fn(&[Candidate]) -> usize| {
                let layers = (0..trace.layers.len()).map(|layer| of(Some(layer)).run(choose));
                let sum = layers.fold((0, 0), |(hits, all), (h, a)| (hits + h, all + a));
                Naive::percent(sum)
            };
            assert_eq!(row.belady, whole(furthest), "Belady, {seed}, {budget}");
            assert_eq!(row.lru, whole(oldest), "LRU, {seed}, {budget}");
            assert_eq!(row.lfu, whole(least_used), "LFU, {seed}, {budget}");
            assert_eq!(
                row.layer_lru,
                sliced(oldest),
                "LRU by layer, {seed}, {budget}"
            );
            assert_eq!(
                row.layer_lfu,
                sliced(least_used),
                "LFU by layer, {seed}, {budget}"
            );
        }
    }
}

/// Whoever draws other numbers has other hits; on average they are those of a cache that draws from the
/// candidates with equal probability.
#[test]
fn random_is_fair_and_goes_by_its_seed() {
    let mut different = 0;
    for seed in [3, 5, 8] {
        let trace = RandomTrace::new(seed, false);
        let lookups = Lookups::of(&trace.routing, usize::MAX);
        let budget = trace.sizes.iter().sum::<u64>() / 2;
        let keys = trace.sizes.len();
        let ours =
            |seed| simulate::hits(&lookups, &trace.sizes, budget, &mut Random::new(seed, keys));
        assert_eq!(ours(5), ours(5));
        let runs = 300;
        let mean = (0..runs).map(ours).sum::<u64>() as f64 / runs as f64;
        let mut dice = crate::analyze::tests::Dice::new(11);
        let naive = Naive {
            trace: &trace,
            budget,
            layer: None,
        };
        let theirs = (0..60).map(|_| naive.run(|of| dice.below(of.len() as u64) as usize).0);
        let expected = theirs.sum::<u64>() as f64 / 60.0;
        assert!(
            (mean - expected).abs() < 0.08 * expected,
            "{seed}: {mean} {expected}"
        );
        different += (0..50).map(ours).collect::<BTreeSet<u64>>().len();
    }
    assert!(different > 10, "{different}");
}

/// Nothing that begins empty, holds no more than it may, and is counted in all that it is asked for, with
/// experts of one size.
#[test]
fn no_policy_beats_belady() {
    let mut compared = 0;
    for seed in 0..100 {
        let trace = RandomTrace::new(seed, true).without_prompts();
        for row in cache_of(&trace).table {
            let Some(best) = row.belady else { continue };
            let by_layer = [row.layer_lru, row.layer_lfu];
            let by_layer = by_layer
                .into_iter()
                .filter(|_| row.layer_holds_mib.is_none());
            let others = [row.lru, row.lfu, row.random].into_iter().chain(by_layer);
            for other in others.flatten() {
                assert!(other <= best, "{seed}: {row:?}");
                compared += u64::from(other < best);
            }
        }
    }
    assert!(compared > 1000, "{compared}");
}

/// Hits do not fall when the budget grows, of policies that are stacks.
#[test]
fn more_memory_never_hurts_lru() {
    for seed in 0..100 {
        let cache = cache_of(&RandomTrace::new(seed, false));
        let lru: Vec<Option<f64>> = cache.table.iter().map(|row| row.lru).collect();
        assert!(lru.is_sorted_by(|a, b| a <= b), "{seed}: {lru:?}");
        let last = cache.table.last().unwrap();
        let first_uses = cache.first_use_percent;
        for policy in [last.lru, last.belady, last.lfu, last.random] {
            let sum = policy.zip(first_uses).map(|(hits, first)| hits + first);
            assert!(
                sum.is_none_or(|sum| (sum - 100.0).abs() < 1e-9),
                "{seed}: {last:?}"
            );
        }
        let curve: Vec<f64> = cache.lru_curve.iter().map(|point| point.percent).collect();
        assert!(curve.is_sorted(), "{seed}");
    }
}

/// With experts of one size, no other set of as many has more.
#[test]
fn a_pin_is_the_best_set() {
    for seed in 0..100 {
        let trace = RandomTrace::new(seed, true);
        let lookups = Lookups::of(&trace.routing, usize::MAX);
        let mut counts = vec![0_u64; trace.sizes.len()];
        let decode = lookups.all().iter().filter(|lookup| lookup.is_decode());
        decode.for_each(|lookup| counts[lookup.key()] += 1);
        let mut best = counts.clone();
        best.sort_unstable_by(|a, b| b.cmp(a));
        for (row, budget) in cache_of(&trace).table.iter().zip(budgets(&trace)) {
            let fit = (budget / trace.sizes[0]) as usize;
            let hits: u64 = best.iter().take(fit).sum();
            assert_eq!(row.static_pin, Naive::percent((hits, lookups.decode)));
        }
    }
}

#[test]
fn a_sample_is_the_beginning() {
    let trace = RandomTrace::new(4, true);
    let all = trace.routing.activations();
    let options = |sample| Options {
        budgets: vec![6],
        sample,
        seed: 1,
    };
    let of = |sample| {
        Cache::of(
            &trace.routing,
            &trace.sizes,
            &options(sample),
            &mut |_, _, _| {},
        )
    };
    assert_eq!(of(all).sampled, None);
    let half = of(all / 2);
    let expected = Sampled {
        activations: all / 2,
        of: all,
    };
    assert_eq!(half.sampled, Some(expected));
    assert!(half.lookups < of(all).lookups);
    assert_eq!(half.lru_curve, of(all).lru_curve);
}

#[test]
fn budgets_are_tried_in_order_and_once() {
    let options = |budgets: &[u64]| Options {
        budgets: budgets.to_vec(),
        sample: 1,
        seed: 1,
    };
    assert_eq!(options(&[5, 3, 5]).budgets(100), [3, 5]);
    let sweep = options(&[]).budgets(1600);
    assert_eq!(sweep, [100, 200, 300, 400, 600, 800, 1000, 1200, 1400]);
}
