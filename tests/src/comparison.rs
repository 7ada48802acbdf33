//! Times of several arms that were taken by turns, as ratios to one of them.
//!
//! Absolute times differ from machine to machine and from minute to minute; arms that are run one after
//! the other in each round share their minute.

use crate::models::rng::Rng;

/// A ratio of two arms: the median over all rounds, and the 95 % interval of that median.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio {
    /// Median.
    pub median: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

/// How often rounds are drawn anew for the interval.
const RESAMPLES: usize = 2000;

/// Ratio of `arm` to `baseline`, round by round, with a bootstrap interval.
///
/// # Panics
///
/// If there are no rounds, or not the same number of each.
pub fn ratio(arm: &[f64], baseline: &[f64]) -> Ratio {
    assert!(!arm.is_empty() && arm.len() == baseline.len());
    let ratios: Vec<f64> = arm.iter().zip(baseline).map(|(a, b)| a / b).collect();
    let mut rng = Rng::new(1);
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let drawn = (0..ratios.len()).map(|_| ratios[rng.below(ratios.len())]);
            median(&drawn.collect::<Vec<f64>>())
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    Ratio {
        median: median(&ratios),
        low: medians[RESAMPLES / 40],
        high: medians[RESAMPLES - 1 - RESAMPLES / 40],
    }
}

/// The middle value, or the mean of the two in the middle.
///
/// # Panics
///
/// If there is none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        (sorted[middle - 1] + sorted[middle]) / 2.0
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

    #[test]
    fn every_arm_has_its_turn() {
        for round in 0..10 {
            let mut order = order(5, round);
            order.sort_unstable();
            assert_eq!(order, [0, 1, 2, 3, 4]);
        }
    }
}
