//! Times of several arms that were taken by turns, as ratios to one of them.
//!
//! Absolute times differ from machine to machine and from minute to minute; arms that are run one after
//! the other in each round share their minute.

use crate::models::rng::Rng;

/// A ratio of two arms: the median over all rounds, and the 95 % bootstrap interval of that median.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio {
    /// Median.
    pub median: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

impl Ratio {
    /// Half the width of the interval.
    pub fn half_width(&self) -> f64 {
        (self.high - self.low) / 2.0
    }
}

/// What a ratio is to be. Shares, not per cent: 0.005 is half a point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// So much above 1 at most.
    AtMost(f64),
    /// Nothing but 1.
    Unchanged,
    /// Not more than 1.
    NotMore,
}

/// Whether a goal is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Yes.
    Met,
    /// No.
    Missed,
    /// The interval is too wide to tell.
    NotResolved,
}

/// What is between a goal and the end of an interval that meets it, and the half-width of an interval
/// that is narrow enough to tell.
pub const RESOLUTION: f64 = 0.005;

impl Goal {
    /// Judges a ratio by its whole interval.
    pub fn judge(self, ratio: &Ratio) -> Verdict {
        let (met, missed) = match self {
            Goal::AtMost(share) => {
                let limit = 1.0 + share + RESOLUTION;
                (ratio.high <= limit, ratio.low > limit)
            }
            Goal::Unchanged => {
                let within = ratio.low >= 1.0 - RESOLUTION && ratio.high <= 1.0 + RESOLUTION;
                let has_changed = ratio.low > 1.0 || ratio.high < 1.0;
                return if within {
                    Verdict::Met
                } else if has_changed {
                    Verdict::Missed
                } else {
                    Verdict::NotResolved
                };
            }
            Goal::NotMore => (ratio.low <= 1.0, ratio.low > 1.0),
        };
        let narrow = ratio.half_width() <= RESOLUTION;
        match (met, missed) {
            // However wide: the whole interval is on the wrong side.
            (_, true) => Verdict::Missed,
            (true, _) if narrow => Verdict::Met,
            // An interval that is wholly at or below 1 needs not be narrow.
            (true, _) if self == Goal::NotMore && ratio.high <= 1.0 => Verdict::Met,
            (false, _) if narrow => Verdict::Missed,
            _ => Verdict::NotResolved,
        }
    }
}

/// How often rounds are drawn anew for the interval.
const RESAMPLES: usize = 2000;

/// Ratio of `arm` to `baseline`, round by round, of rounds that have nothing in common.
///
/// # Panics
///
/// If there are no rounds, or not the same number of each.
pub fn ratio(arm: &[f64], baseline: &[f64]) -> Ratio {
    assert_eq!(arm.len(), baseline.len());
    let ratios: Vec<f64> = arm.iter().zip(baseline).map(|(a, b)| a / b).collect();
    bootstrap(&ratios, |rng| draw(&ratios, rng))
}

/// The same of ratios in blocks, whose rounds share what differs from block to block, such as places in
/// memory. Blocks are drawn with replacement, and then rounds within each: more rounds in the same blocks
/// say nothing more of what the blocks share. With a handful of blocks, the interval is still somewhat too
/// narrow.
///
/// # Panics
///
/// If there is no block, or one without rounds.
pub fn clustered(blocks: &[Vec<f64>]) -> Ratio {
    bootstrap(&blocks.concat(), |rng| {
        let drawn = (0..blocks.len()).map(|_| draw(&blocks[rng.below(blocks.len())], rng));
        drawn.collect::<Vec<_>>().concat()
    })
}

/// The median of `ratios`, with the interval of the medians of what is drawn again and again.
fn bootstrap(ratios: &[f64], draw: impl Fn(&mut Rng) -> Vec<f64>) -> Ratio {
    let mut rng = Rng::new(1);
    let mut medians: Vec<f64> = (0..RESAMPLES).map(|_| median(&draw(&mut rng))).collect();
    medians.sort_by(f64::total_cmp);
    Ratio {
        median: median(ratios),
        low: medians[RESAMPLES / 40],
        high: medians[RESAMPLES - 1 - RESAMPLES / 40],
    }
}

/// As many values as there are, with replacement.
fn draw(values: &[f64], rng: &mut Rng) -> Vec<f64> {
    let drawn = (0..values.len()).map(|_| values[rng.below(values.len())]);
    drawn.collect()
}

/// The middle value, or the mean of the two in the middle.
///
/// # Panics
///
/// If there is none.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    let half = values.len() / 2;
    let even = values.len().is_multiple_of(2);
    let (below, middle, _) = values.select_nth_unstable_by(half, f64::total_cmp);
    match below.iter().copied().max_by(f64::total_cmp) {
        Some(next) if even => (next + *middle) / 2.0,
        _ => *middle,
    }
}

/// The numbers below `n` in a random order, another one for each round.
pub fn order(n: usize, round: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    Rng::new(round).shuffle(&mut order);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn a_constant_factor_is_found_whatever_the_rounds() {
        let baseline: Vec<f64> = (1..40).map(f64::from).collect();
        let arm: Vec<f64> = baseline.iter().map(|time| time * 1.25).collect();
        let expected = Ratio {
            median: 1.25,
            low: 1.25,
            high: 1.25,
        };
        assert_eq!(ratio(&arm, &baseline), expected);
        let noisy: Vec<f64> = baseline
            .iter()
            .zip(0..)
            .map(|(time, round)| time * if round % 2 == 0 { 0.9 } else { 1.1 })
            .collect();
        let Ratio { median, low, high } = ratio(&noisy, &baseline);
        assert!(low <= median && median <= high && low < 1.0 && high > 1.0);
    }

    /// Blocks differ by as much as rounds do.
    #[test]
    fn an_interval_of_blocks_has_the_true_ratio_more_often_than_one_of_rounds() {
        const EXPERIMENTS: u32 = 40;
        let mut rng = Rng::new(7);
        let (mut by_blocks, mut by_rounds) = (0, 0);
        for _ in 0..EXPERIMENTS {
            let mut ratio_of = |shared: f64| 1.0 + shared + 0.01 * f64::from(rng.normal());
            let blocks: Vec<Vec<f64>> = (0..8)
                .map(|_| {
                    let shared = ratio_of(0.0) - 1.0;
                    (0..12).map(|_| ratio_of(shared)).collect()
                })
                .collect();
            let has_it = |ratio: Ratio| u32::from(ratio.low <= 1.0 && 1.0 <= ratio.high);
            let rounds = blocks.concat();
            by_blocks += has_it(clustered(&blocks));
            by_rounds += has_it(ratio(&rounds, &vec![1.0; rounds.len()]));
        }
        assert!(by_blocks * 100 >= EXPERIMENTS * 80, "{by_blocks}");
        assert!(by_rounds * 100 <= EXPERIMENTS * 65, "{by_rounds}");
    }

    #[test]
    fn blocks_that_have_nothing_in_common_are_like_rounds() {
        let rounds: Vec<f64> = (0..64)
            .map(|i| 1.0 + 0.001 * f64::from(i * 37 % 64))
            .collect();
        let blocks: Vec<Vec<f64>> = rounds.iter().map(|ratio| vec![*ratio]).collect();
        let expected = ratio(&rounds, &[1.0; 64]);
        let found = clustered(&blocks);
        assert_eq!(found.median, expected.median);
        assert!((found.half_width() / expected.half_width() - 1.0).abs() < 0.25);
    }

    #[test]
    fn goals_are_judged_by_the_whole_interval() {
        let judge = |goal: Goal, low: f64, high: f64| {
            let median = (low + high) / 2.0;
            goal.judge(&Ratio { median, low, high })
        };
        use Verdict::{Met, Missed, NotResolved};
        for (goal, low, high, expected) in [
            (Goal::AtMost(0.01), 1.006, 1.014, Met),
            (Goal::AtMost(0.01), 1.008, 1.016, Missed),
            (Goal::AtMost(0.01), 0.98, 1.014, NotResolved),
            (Goal::AtMost(0.01), 0.98, 1.03, NotResolved),
            (Goal::AtMost(0.01), 1.016, 1.2, Missed),
            (Goal::Unchanged, 0.996, 1.004, Met),
            (Goal::Unchanged, 1.001, 1.004, Met),
            (Goal::Unchanged, 0.999, 1.006, NotResolved),
            (Goal::Unchanged, 1.0, 1.006, NotResolved),
            (Goal::Unchanged, 1.001, 1.006, Missed),
            (Goal::Unchanged, 0.994, 0.999, Missed),
            (Goal::Unchanged, 0.99, 1.01, NotResolved),
            (Goal::Unchanged, 0.9, 0.99, Missed),
            (Goal::NotMore, 0.999, 1.001, Met),
            (Goal::NotMore, 0.8, 0.9, Met),
            (Goal::NotMore, 0.9, 1.1, NotResolved),
            (Goal::NotMore, 1.001, 1.1, Missed),
        ] {
            assert_eq!(judge(goal, low, high), expected, "{goal:?} {low} {high}");
        }
    }

    #[test]
    fn every_arm_has_its_turn() {
        for round in 0..10 {
            let mut order = order(5, round);
            order.sort_unstable();
            assert_eq!(order, [0, 1, 2, 3, 4]);
        }
    }
}
