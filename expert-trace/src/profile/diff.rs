//! How two profiles differ, layer by layer.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use serde::Serialize;

use super::{ContextProfile, LayerProfile, Schema, printable};

/// Name of the document's schema.
pub const SCHEMA_NAME: &str = "expert-trace-diff";
/// Its version: raised when a key changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

/// What is compared: a context of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Side {
    /// The file.
    pub file: String,
    /// Its context.
    pub context: usize,
}

/// Two contexts, compared. Pairs are in the order A, B.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What this is.
    pub schema: Schema,
    /// The first one.
    pub a: Side,
    /// The second one.
    pub b: Side,
    /// Share of the activations that a hot set covers, in percent.
    pub hot_percent: u8,
    /// Layers that both have, ascending.
    pub layers: Vec<LayerDiff>,
    /// Layers that A has alone.
    pub only_in_a: Vec<u16>,
    /// Layers that B has alone.
    pub only_in_b: Vec<u16>,
    /// Mean of `jsd_bits` over the layers that have one; `None` when none has.
    pub mean_jsd_bits: Option<f64>,
    /// Mean of `jaccard`, likewise.
    pub mean_jaccard: Option<f64>,
}

/// One layer of two contexts, compared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerDiff {
    /// The layer.
    pub layer_id: u16,
    /// Experts to choose from, where that is known.
    pub n_expert: [Option<u32>; 2],
    /// Tokens routed.
    pub total_tokens: [u64; 2],
    /// (token, expert) pairs.
    pub activations: [u64; 2],
    /// Jensen-Shannon divergence of the activation shares, in bits: 0 for equal ones, 1 when no expert is
    /// active in both. `None` when one side has no activation.
    pub jsd_bits: Option<f64>,
    /// Experts of the hot sets.
    pub hot: [usize; 2],
    /// Experts that are in both hot sets, of those that are in any; `None` as above.
    pub jaccard: Option<f64>,
    /// Experts whose share differs most, the largest difference first, then by ascending id.
    pub moved: Vec<Moved>,
}

/// An expert whose share differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Moved {
    /// The expert.
    pub expert_id: u32,
    /// Activations / activations of the layer.
    pub share: [f64; 2],
    /// The second share less the first.
    pub difference: f64,
}

/// Compares two contexts; hot sets cover `hot_percent` of the activations, and at most `top` experts are
/// listed in a layer.
pub fn compare(sides: [(Side, &ContextProfile); 2], hot_percent: u8, top: usize) -> Report {
    let [(a, in_a), (b, in_b)] = sides;
    let only = |of: &ContextProfile, other: &ContextProfile| -> Vec<u16> {
        let layers = of.layers.iter().map(|layer| layer.layer_id);
        layers.filter(|id| other.layer(*id).is_none()).collect()
    };
    let in_both = in_a.layers.iter().filter_map(|layer| {
        let other = in_b.layer(layer.layer_id)?;
        Some(compare_layers([layer, other], hot_percent, top))
    });
    let layers: Vec<LayerDiff> = in_both.collect();
    Report {
        schema: Schema {
            name: SCHEMA_NAME.to_owned(),
            version: SCHEMA_VERSION,
        },
        a,
        b,
        hot_percent,
        only_in_a: only(in_a, in_b),
        only_in_b: only(in_b, in_a),
        mean_jsd_bits: mean(layers.iter().filter_map(|layer| layer.jsd_bits)),
        mean_jaccard: mean(layers.iter().filter_map(|layer| layer.jaccard)),
        layers,
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (count, sum) = values.fold((0_u32, 0.0), |(count, sum), value| (count + 1, sum + value));
    (count > 0).then(|| sum / f64::from(count))
}

fn compare_layers(pair: [&LayerProfile; 2], hot_percent: u8, top: usize) -> LayerDiff {
    let activations = pair.map(LayerProfile::activations);
    let shares = shares(pair, activations);
    let both_active = !activations.contains(&0);
    let hot = pair.map(|layer| hot_set(layer, hot_percent));
    LayerDiff {
        layer_id: pair[0].layer_id,
        n_expert: pair.map(|layer| layer.n_expert),
        total_tokens: pair.map(|layer| layer.total_tokens),
        activations,
        jsd_bits: both_active.then(|| divergence(shares.values().copied())),
        jaccard: both_active.then(|| jaccard(&hot)),
        hot: hot.map(|set| set.len()),
        moved: match both_active {
            true => most_moved(&shares, top),
            false => Vec::new(),
        },
    }
}

/// Of each expert that is active on a side, its share of the activations there.
fn shares(pair: [&LayerProfile; 2], activations: [u64; 2]) -> BTreeMap<u32, [f64; 2]> {
    let mut shares: BTreeMap<u32, [f64; 2]> = BTreeMap::new();
    for side in 0..2 {
        for expert in &pair[side].experts {
            let share = expert.activations as f64 / activations[side] as f64;
            shares.entry(expert.expert_id).or_default()[side] = share;
        }
    }
    shares
}

/// Jensen-Shannon divergence of two distributions, in bits.
pub fn divergence(shares: impl Iterator<Item = [f64; 2]>) -> f64 {
    let term = |share: f64, middle: f64| match share > 0.0 {
        true => share * (share / middle).log2(),
        false => 0.0,
    };
    let sum: f64 = shares
        .map(|[p, q]| {
            let middle = (p + q) / 2.0;
            (term(p, middle) + term(q, middle)) / 2.0
        })
        .sum();
    // Rounding must not lead out of what there can be.
    sum.clamp(0.0, 1.0)
}

/// The fewest experts that have so much of the activations; of equals those with lower ids.
fn hot_set(layer: &LayerProfile, percent: u8) -> BTreeSet<u32> {
    let total = u128::from(layer.activations());
    let mut covered = 0;
    let mut hot = BTreeSet::new();
    // Most activations first, then by id.
    for expert in &layer.experts {
        if covered * 100 >= total * u128::from(percent) {
            break;
        }
        covered += u128::from(expert.activations);
        hot.insert(expert.expert_id);
    }
    hot
}

fn jaccard([a, b]: &[BTreeSet<u32>; 2]) -> f64 {
    let common = a.intersection(b).count();
    common as f64 / (a.len() + b.len() - common) as f64
}

fn most_moved(shares: &BTreeMap<u32, [f64; 2]>, top: usize) -> Vec<Moved> {
    let mut moved: Vec<Moved> = shares
        .iter()
        .map(|(expert_id, share)| Moved {
            expert_id: *expert_id,
            share: *share,
            difference: share[1] - share[0],
        })
        .filter(|moved| moved.difference != 0.0)
        .collect();
    // Positive numbers are in the order of their bits. The sort is stable: equals stay in that of ids.
    moved.sort_by_key(|moved| Reverse(moved.difference.abs().to_bits()));
    moved.truncate(top);
    moved
}

impl Report {
    /// For people: a table, and what it says in a sentence.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        for (name, side) in [("A", &self.a), ("B", &self.b)] {
            writeln!(
                text,
                "{name}: {}, context {}",
                printable(&side.file),
                side.context
            )?;
        }
        if !self.layers.is_empty() {
            writeln!(
                text,
                "\n{:>5}  {:>12}  {:>12}  {:>10}  {:>6}  {:>6}  {:>7}  Moved most (share of A -> B)",
                "Layer", "Tokens A", "Tokens B", "JSD (bits)", "Hot A", "Hot B", "Jaccard"
            )?;
        }
        for layer in &self.layers {
            let [tokens_a, tokens_b] = layer.total_tokens;
            let [hot_a, hot_b] = layer.hot;
            let line = format!(
                "{:>5}  {tokens_a:>12}  {tokens_b:>12}  {:>10}  {hot_a:>6}  {hot_b:>6}  {:>7}  {}",
                layer.layer_id,
                decimals(layer.jsd_bits, 4),
                decimals(layer.jaccard, 2),
                moved_text(&layer.moved),
            );
            writeln!(text, "{}", line.trim_end())?;
        }
        writeln!(text)?;
        for layer in &self.layers {
            if let [Some(a), Some(b)] = layer.n_expert
                && a != b
            {
                let id = layer.layer_id;
                writeln!(
                    text,
                    "Layer {id} has {a} experts in A and {b} in B: these are different models."
                )?;
            }
        }
        for (name, layers) in [("A", &self.only_in_a), ("B", &self.only_in_b)] {
            if !layers.is_empty() {
                let layers: Vec<String> = layers.iter().map(u16::to_string).collect();
                writeln!(text, "Only in {name}: layers {}.", layers.join(", "))?;
            }
        }
        writeln!(text, "{}", self.sentence())
    }

    fn sentence(&self) -> String {
        let compared: Vec<(u16, f64)> = self
            .layers
            .iter()
            .filter_map(|layer| Some((layer.layer_id, layer.jsd_bits?)))
            .collect();
        let most = compared
            .iter()
            .rev()
            .max_by(|(_, a), (_, b)| a.total_cmp(b));
        let (Some(mean), Some(jaccard), Some((layer, most))) =
            (self.mean_jsd_bits, self.mean_jaccard, most)
        else {
            return "No layer has activations in both: there is nothing to compare.".to_owned();
        };
        let layers = match compared.len() {
            1 => "the layer".to_owned(),
            count => format!("the {count} layers"),
        };
        if *most == 0.0 {
            return format!("The shares of {layers} that have activations in both are equal.");
        }
        format!(
            "Over {layers} that have activations in both, the shares differ by {mean:.4} bits on average \
             (0: equal, 1: no expert in common), most in layer {layer} ({most:.4}); the experts with {} % \
             of the activations are the same to {:.0} %.",
            self.hot_percent,
            100.0 * jaccard
        )
    }
}

fn decimals(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.decimals$}"))
}

fn moved_text(moved: &[Moved]) -> String {
    let moved = moved.iter().map(|moved| {
        let [a, b] = moved.share.map(|share| 100.0 * share);
        format!("{}: {a:.1} -> {b:.1} %", moved.expert_id)
    });
    moved.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::tests::{context, layer};

    /// Counts that are the same in every run: xorshift64.
    fn random(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    fn random_layer(state: &mut u64) -> LayerProfile {
        let n_expert = 1 + random(state) % 40;
        let counts: Vec<[u64; 2]> = (0..n_expert)
            .map(|_| match random(state) % 3 {
                0 => [0, 0],
                _ => [random(state) % 100, random(state) % 10],
            })
            .collect();
        layer(0, 40, &counts)
    }

    fn jsd(pair: [&LayerProfile; 2]) -> Option<f64> {
        compare_layers(pair, 80, 3).jsd_bits
    }

    /// By the other formula: the entropy of the middle less the mean of the entropies.
    fn jsd_by_entropy([a, b]: [&LayerProfile; 2]) -> f64 {
        let shares = |layer: &LayerProfile| -> Vec<f64> {
            let sum = layer.activations() as f64;
            let mut dense = layer.dense();
            dense.resize(40, 0);
            dense.iter().map(|count| *count as f64 / sum).collect()
        };
        let entropy = |shares: &[f64]| -> f64 {
            let active = shares.iter().filter(|share| **share > 0.0);
            active.map(|share| -share * share.log2()).sum()
        };
        let (a, b) = (shares(a), shares(b));
        let middle: Vec<f64> = a.iter().zip(&b).map(|(a, b)| (a + b) / 2.0).collect();
        entropy(&middle) - (entropy(&a) + entropy(&b)) / 2.0
    }

    #[test]
    fn divergence_is_symmetric_bounded_and_that_of_the_entropies() {
        let mut state = 42;
        let mut compared = 0;
        for _ in 0..500 {
            let (a, b) = (random_layer(&mut state), random_layer(&mut state));
            let Some(of_both) = jsd([&a, &b]) else {
                assert!(a.experts.is_empty() || b.experts.is_empty());
                continue;
            };
            compared += 1;
            assert_eq!(Some(of_both), jsd([&b, &a]));
            assert_eq!(jsd([&a, &a]), Some(0.0));
            assert!((0.0..=1.0).contains(&of_both));
            assert!((of_both - jsd_by_entropy([&a, &b])).abs() < 1e-12);
        }
        assert!(compared > 400);
    }

    #[test]
    fn divergence_of_known_layers() {
        let counts = |counts: &[u64]| {
            let counts: Vec<[u64; 2]> = counts.iter().map(|count| [*count, 0]).collect();
            layer(0, 4, &counts)
        };
        for (a, b, expected) in [
            (vec![1, 2, 3], vec![2, 4, 6], Some(0.0)),
            (vec![5, 5], vec![0, 0, 1, 7], Some(1.0)),
            // ½·log2(4/3) + ½·(½·log2(2/3) + ½·log2(2)), from (1, 0) and (½, ½).
            (vec![4], vec![2, 2], Some(0.311_278_124_459_132_8)),
            (vec![], vec![1], None),
        ] {
            let found = jsd([&counts(&a), &counts(&b)]);
            let close = match (found, expected) {
                (Some(found), Some(expected)) => (found - expected).abs() < 1e-12,
                (found, expected) => found == expected,
            };
            assert!(close, "{a:?} {b:?}: {found:?}");
        }
    }

    /// The smallest subset that covers enough, tried one by one.
    fn fewest(counts: &[u64], percent: u8) -> usize {
        let total: u64 = counts.iter().sum();
        (0_u32..1 << counts.len())
            .filter(|subset| {
                let of_subset = counts.iter().enumerate();
                let chosen = of_subset.filter(|(id, _)| subset >> id & 1 == 1);
                let covered: u64 = chosen.map(|(_, count)| count).sum();
                100 * covered >= total * u64::from(percent)
            })
            .map(u32::count_ones)
            .min()
            .unwrap() as usize
    }

    #[test]
    fn hot_sets_are_the_fewest_experts_that_cover() {
        let mut state = 7;
        for _ in 0..60 {
            let counts: Vec<u64> = (0..8).map(|_| random(&mut state) % 20).collect();
            let pairs: Vec<[u64; 2]> = counts.iter().map(|count| [0, *count]).collect();
            let of = layer(0, 8, &pairs);
            for percent in [1, 50, 80, 90, 100] {
                let hot = hot_set(&of, percent);
                assert_eq!(hot.len(), fewest(&counts, percent), "{counts:?} {percent}");
                let covered: u64 = hot.iter().map(|id| counts[*id as usize]).sum();
                let total: u64 = counts.iter().sum();
                assert!(100 * covered >= total * u64::from(percent));
            }
        }
        let ties = layer(0, 8, &[[1, 0]; 4]);
        assert_eq!(hot_set(&ties, 50), BTreeSet::from([0, 1]));
    }

    #[test]
    fn a_report_says_what_is_where() {
        let a = context(vec![
            layer(0, 4, &[[8, 0], [2, 0]]),
            layer(1, 4, &[[1, 1]]),
            layer(2, 4, &[[0, 0]]),
        ]);
        let b = context(vec![
            layer(0, 4, &[[2, 0], [2, 0], [6, 0]]),
            layer(2, 4, &[[1, 1]]),
            layer(5, 4, &[[1, 1]]),
        ]);
        let side = |file: &str, context| Side {
            file: file.into(),
            context,
        };
        let sides = [(side("a\u{1b}.json", 0), &a), (side("b.json", 3), &b)];
        let report = compare(sides, 80, 2);
        assert_eq!(
            (&*report.only_in_a, &*report.only_in_b),
            (&[1][..], &[5][..])
        );
        let ids: Vec<u16> = report.layers.iter().map(|layer| layer.layer_id).collect();
        assert_eq!(ids, [0, 2]);
        let [first, second] = &report.layers[..] else {
            panic!("{report:?}");
        };
        assert_eq!((first.hot, first.jaccard), ([1, 2], Some(0.5)));
        let moved: Vec<u32> = first.moved.iter().map(|moved| moved.expert_id).collect();
        assert_eq!(moved, [0, 2], "of equals the lower id first");
        assert_eq!((second.jsd_bits, second.jaccard), (None, None));
        assert_eq!(report.mean_jaccard, Some(0.5));

        let text = report.to_text();
        assert!(!text.contains('\u{1b}'));
        assert!(
            text.starts_with("A: a\u{fffd}.json, context 0\nB: b.json, context 3\n"),
            "{text}"
        );
        assert!(
            text.contains("0: 80.0 -> 20.0 %; 2: 0.0 -> 60.0 %"),
            "{text}"
        );
        assert!(
            text.contains("Only in A: layers 1.\nOnly in B: layers 5.\n"),
            "{text}"
        );
        assert!(text.contains("most in layer 0"), "{text}");

        let nothing = compare(
            [(side("a", 0), &a), (side("b", 0), &context(vec![]))],
            80,
            2,
        );
        assert!(nothing.to_text().contains("nothing to compare"));
        let same = compare([(side("a", 0), &a), (side("b", 0), &a)], 80, 2);
        assert!(same.to_text().contains("are equal."));
        assert!(same.layers.iter().all(|layer| layer.moved.is_empty()));
    }
}
