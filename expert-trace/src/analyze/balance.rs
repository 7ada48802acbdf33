//! How evenly the experts of a layer are used.

use serde::Serialize;

use crate::profile::{ContextProfile, LayerProfile, diff::divergence};

/// Shares of the activations that a coverage curve has, in percent.
const COVERED: [u32; 4] = [50, 80, 90, 99];

/// Balance of all layers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Balance {
    /// Prompts and generated tokens together.
    pub all: Means,
    /// Prompts.
    pub prefill: Means,
    /// Generated tokens.
    pub decode: Means,
    /// What splitting the experts over devices would give each of them to do.
    pub split: Vec<Split>,
    /// Every layer, ascending.
    pub layers: Vec<LayerBalance>,
}

/// The experts of each layer in ascending order, divided equally over devices.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Split {
    /// Devices.
    pub devices: usize,
    /// Activations of a layer's busiest device / mean of its devices; mean over the layers.
    pub busiest_over_mean: f64,
}

/// Devices that experts are divided over.
const DEVICES: [usize; 3] = [2, 4, 8];

/// Means over the layers that have activations; `None` when none has.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Means {
    /// Layers with activations.
    pub layers: usize,
    /// Distinct experts that were used: mean, least and most of a layer.
    pub used: Option<Spread>,
    /// Experts that were never used, summed over the layers.
    pub dead: u64,
    /// Mean entropy of the shares, in bits.
    pub entropy_bits: Option<f64>,
    /// Mean of 100 × exp(H) / experts.
    pub effective_percent: Option<f64>,
    /// Mean of the busiest expert's load / mean load.
    pub max_over_mean: Option<f64>,
    /// Mean Gini coefficient.
    pub gini: Option<f64>,
    /// Mean coefficient of variation.
    pub cv: Option<f64>,
    /// Mean number of experts that cover so much of the activations.
    pub coverage: Vec<MeanCoverage>,
}

/// Mean, least and most of several numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Their mean.
    pub mean: f64,
    /// The least one.
    pub min: u64,
    /// The largest one.
    pub max: u64,
}

/// A point of a mean coverage curve.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct MeanCoverage {
    /// Share of the activations, in percent.
    pub percent: u32,
    /// The fewest experts that have it, on average.
    pub experts: f64,
}

/// Balance of one layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerBalance {
    /// Layer of the model.
    pub layer_id: u16,
    /// Experts to choose from.
    pub n_expert: u32,
    /// Whether that number is known. Otherwise it is as many as the largest id tells.
    pub n_expert_known: bool,
    /// Jensen-Shannon divergence of the shares in prefill and decode, in bits: 0 when they are equal, 1 when
    /// no expert is used in both. `None` when one of them has no activation.
    pub prefill_decode_jsd_bits: Option<f64>,
    /// Prompts and generated tokens together; `None` without activations.
    pub all: Option<Evenness>,
    /// Prompts.
    pub prefill: Option<Evenness>,
    /// Generated tokens.
    pub decode: Option<Evenness>,
}

/// How evenly the activations of a layer are spread over its experts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evenness {
    /// (token, expert) pairs.
    pub activations: u64,
    /// Distinct experts that were used.
    pub used: u64,
    /// Experts that were never used.
    pub dead: u64,
    /// Entropy of the shares: log2(experts) when all are used alike.
    pub entropy_bits: f64,
    /// 100 × exp(H) / experts: the share of the experts that would give this entropy if they were used alike.
    pub effective_percent: f64,
    /// Activations of the busiest expert / mean over all experts.
    pub max_over_mean: f64,
    /// Gini coefficient over all experts: 0 when all are used alike.
    pub gini: f64,
    /// Coefficient of variation: standard deviation over all experts / mean.
    pub cv: f64,
    /// The fewest experts that have so much of the activations.
    pub coverage: Vec<Coverage>,
}

/// A point of a coverage curve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Coverage {
    /// Share of the activations, in percent.
    pub percent: u32,
    /// The fewest experts that have it.
    pub experts: usize,
}

impl Balance {
    /// That of what a context has counted.
    pub fn of(context: &ContextProfile) -> Self {
        let layers: Vec<LayerBalance> = context.layers.iter().map(LayerBalance::of).collect();
        let means = |of: fn(&LayerBalance) -> Option<&Evenness>| {
            Means::of(&layers.iter().filter_map(of).collect::<Vec<_>>())
        };
        Self {
            all: means(|layer| layer.all.as_ref()),
            prefill: means(|layer| layer.prefill.as_ref()),
            decode: means(|layer| layer.decode.as_ref()),
            split: DEVICES
                .iter()
                .filter_map(|of| split(context, *of))
                .collect(),
            layers,
        }
    }
}

fn split(context: &ContextProfile, devices: usize) -> Option<Split> {
    let active = context.layers.iter().map(LayerProfile::dense);
    let active = active.filter(|counts| counts.len() >= devices && counts.iter().any(|n| *n > 0));
    let busiest = mean(active.map(|counts| {
        let mut loads = vec![0_u64; devices];
        for (expert, count) in counts.iter().enumerate() {
            loads[expert * devices / counts.len()] += count;
        }
        let total: u64 = loads.iter().sum();
        let busiest = loads.iter().max().copied().unwrap_or(0);
        (busiest * devices as u64) as f64 / total as f64
    }));
    busiest.map(|busiest_over_mean| Split {
        devices,
        busiest_over_mean,
    })
}

impl Means {
    fn of(layers: &[&Evenness]) -> Self {
        let mean = |of: fn(&Evenness) -> f64| mean(layers.iter().map(|layer| of(layer)));
        let used = layers.iter().map(|layer| layer.used);
        let coverage = COVERED.iter().enumerate().filter_map(|(index, percent)| {
            let experts = self::mean(layers.iter().map(|of| of.coverage[index].experts as f64));
            Some(MeanCoverage {
                percent: *percent,
                experts: experts?,
            })
        });
        Self {
            layers: layers.len(),
            used: mean(|layer| layer.used as f64).map(|mean| Spread {
                mean,
                min: used.clone().min().unwrap_or(0),
                max: used.max().unwrap_or(0),
            }),
            dead: layers.iter().map(|layer| layer.dead).sum(),
            entropy_bits: mean(|layer| layer.entropy_bits),
            effective_percent: mean(|layer| layer.effective_percent),
            max_over_mean: mean(|layer| layer.max_over_mean),
            gini: mean(|layer| layer.gini),
            cv: mean(|layer| layer.cv),
            coverage: coverage.collect(),
        }
    }
}

impl LayerBalance {
    fn of(layer: &LayerProfile) -> Self {
        let [prefill, decode] = by_phase(layer);
        let all: Vec<u64> = prefill.iter().zip(&decode).map(|(a, b)| a + b).collect();
        let [a, b] = [&prefill, &decode].map(|counts| counts.iter().sum::<u64>());
        let shares = prefill.iter().zip(&decode);
        let shares = shares.map(|(p, q)| [*p as f64 / a as f64, *q as f64 / b as f64]);
        Self {
            layer_id: layer.layer_id,
            n_expert: all.len() as u32,
            n_expert_known: layer.n_expert.is_some(),
            prefill_decode_jsd_bits: (a > 0 && b > 0).then(|| divergence(shares)),
            all: Evenness::of(&all),
            prefill: Evenness::of(&prefill),
            decode: Evenness::of(&decode),
        }
    }
}

/// Activations by expert, of prompts and of generated tokens.
fn by_phase(layer: &LayerProfile) -> [Vec<u64>; 2] {
    let mut counts = [vec![0; layer.width()], vec![0; layer.width()]];
    for expert in &layer.experts {
        counts[0][expert.expert_id as usize] = expert.prefill;
        counts[1][expert.expert_id as usize] = expert.decode;
    }
    counts
}

impl Evenness {
    /// That of activations by expert; none when there are none.
    pub fn of(counts: &[u64]) -> Option<Self> {
        let total: u64 = counts.iter().sum();
        if total == 0 {
            return None;
        }
        let mut sorted = counts.to_vec();
        sorted.sort_unstable();
        let n = counts.len() as f64;
        let mean = total as f64 / n;
        let shares = sorted.iter().filter(|count| **count > 0);
        let shares = shares.map(|count| *count as f64 / total as f64);
        let entropy_nats = shares
            .map(|share| -share * share.ln())
            .sum::<f64>()
            .max(0.0);
        let squares = sorted.iter().map(|count| (*count as f64 - mean).powi(2));
        let variance = squares.sum::<f64>() / n;
        // The mean difference of all pairs / twice the mean, by ranks.
        let ranked = (1_u64..).zip(&sorted);
        let ranked: f64 = ranked
            .map(|(rank, count)| rank as f64 * *count as f64)
            .sum();
        let gini = 2.0 * ranked / (n * total as f64) - (n + 1.0) / n;
        let used = sorted.iter().filter(|count| **count > 0).count() as u64;
        let coverage = COVERED.map(|percent| Coverage {
            percent,
            experts: covering(&sorted, total, percent),
        });
        Some(Self {
            activations: total,
            used,
            dead: counts.len() as u64 - used,
            entropy_bits: entropy_nats / std::f64::consts::LN_2,
            effective_percent: 100.0 * entropy_nats.exp() / n,
            max_over_mean: sorted.last().map_or(0.0, |most| *most as f64 / mean),
            gini: gini.max(0.0),
            cv: variance.sqrt() / mean,
            coverage: coverage.to_vec(),
        })
    }
}

/// The fewest of these that have so much of the total.
fn covering(ascending: &[u64], total: u64, percent: u32) -> usize {
    let mut covered = 0_u128;
    let wanted = u128::from(total) * u128::from(percent);
    let most_first = ascending.iter().rev();
    most_first
        .take_while(|count| {
            let is_needed = covered * 100 < wanted;
            covered += u128::from(**count);
            is_needed
        })
        .count()
}

/// Their mean; none of nothing.
pub(super) fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (count, sum) = values.fold((0_u64, 0.0), |(count, sum), value| (count + 1, sum + value));
    (count > 0).then(|| sum / count as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::tests::{context, layer};

    #[test]
    fn known_spreads() {
        let even = Evenness::of(&[5, 5, 5, 5]).unwrap();
        assert_eq!((even.entropy_bits, even.effective_percent), (2.0, 100.0));
        assert_eq!((even.gini, even.cv, even.max_over_mean), (0.0, 0.0, 1.0));
        assert_eq!((even.used, even.dead), (4, 0));

        let one = Evenness::of(&[0, 7, 0, 0]).unwrap();
        assert_eq!((one.entropy_bits, one.effective_percent), (0.0, 25.0));
        assert_eq!((one.gini, one.max_over_mean, one.dead), (0.75, 4.0, 3));
        assert!((one.cv - 3.0_f64.sqrt()).abs() < 1e-12);
        assert!(one.coverage.iter().all(|point| point.experts == 1));

        let steps = Evenness::of(&[50, 30, 10, 9, 1]).unwrap();
        let experts: Vec<usize> = steps.coverage.iter().map(|point| point.experts).collect();
        assert_eq!(experts, [1, 2, 3, 4]);
        assert_eq!(Evenness::of(&[0, 0]), None);
        assert_eq!(Evenness::of(&[]), None);
    }

    /// By the definition: the mean difference of all pairs.
    #[test]
    fn gini_is_that_of_all_pairs() {
        let mut state = 1_u64;
        for n in 1..40 {
            let counts: Vec<u64> = (0..n)
                .map(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    state >> 60
                })
                .collect();
            let Some(found) = Evenness::of(&counts) else {
                continue;
            };
            let differences: u64 = counts
                .iter()
                .flat_map(|a| counts.iter().map(|b| a.abs_diff(*b)))
                .sum();
            let pairs = (n * n) as f64;
            let mean = counts.iter().sum::<u64>() as f64 / n as f64;
            let expected = differences as f64 / pairs / (2.0 * mean);
            assert!((found.gini - expected).abs() < 1e-9, "{counts:?}");
        }
    }

    #[test]
    fn devices_get_equal_parts_of_the_experts() {
        let of = |counts: &[u64]| {
            let counts: Vec<[u64; 2]> = counts.iter().map(|count| [0, *count]).collect();
            context(vec![layer(0, counts.len() as u32, &counts)])
        };
        let busiest = |counts: &[u64], devices| {
            split(&of(counts), devices).map(|split| split.busiest_over_mean)
        };
        assert_eq!(busiest(&[1, 1, 1, 1], 2), Some(1.0));
        assert_eq!(busiest(&[3, 3, 1, 1], 2), Some(1.5));
        assert_eq!(busiest(&[8, 0, 0, 0], 4), Some(4.0));
        assert_eq!(busiest(&[1, 1], 4), None);
        assert_eq!(busiest(&[0, 0], 2), None);
    }

    #[test]
    fn phases_are_told_apart() {
        let balance = Balance::of(&context(vec![
            layer(0, 4, &[[4, 0], [0, 2], [0, 2]]),
            layer(3, 4, &[[1, 1], [1, 1]]),
            layer(5, 4, &[]),
        ]));
        assert_eq!(balance.layers[0].prefill_decode_jsd_bits, Some(1.0));
        assert_eq!(balance.layers[1].prefill_decode_jsd_bits, Some(0.0));
        assert_eq!(balance.layers[2].all, None);
        let used = |means: &Means| means.used.map(|used| (used.mean, used.min, used.max));
        assert_eq!(used(&balance.all), Some((2.5, 2, 3)));
        assert_eq!(used(&balance.prefill), Some((1.5, 1, 2)));
        assert_eq!(used(&balance.decode), Some((2.0, 2, 2)));
        assert_eq!((balance.decode.layers, balance.decode.dead), (2, 4));
    }
}
