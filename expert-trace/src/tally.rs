//! Tokens routed in a layer and what they activated, and how documents tell of it.

use std::cmp::Reverse;

use expert_trace_common::Phase;
use serde::Serialize;

/// Tokens routed, and what they activated. Index 0 is prefill, 1 is decode.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Experts chosen per token; the largest seen.
    pub k: u16,
    /// Tokens routed.
    pub tokens: [u64; 2],
    /// Activations by expert.
    pub experts: Vec<[u64; 2]>,
}

impl Tally {
    /// Tokens routed, prefill and decode.
    pub fn total_tokens(&self) -> u64 {
        self.tokens.iter().sum()
    }

    /// (token, expert) pairs, prefill and decode.
    pub fn activations(&self) -> u64 {
        self.experts.iter().flatten().sum()
    }

    /// Begins anew. How many experts a token chooses is known.
    pub fn reset(&mut self) {
        self.tokens = [0; 2];
        self.experts.fill([0; 2]);
    }

    /// Counts so many tokens of a phase, which have chosen these experts, one after the other. Whoever
    /// calls has bounded the ids.
    #[inline]
    pub fn count(&mut self, phase: Phase, tokens: u32, ids: &[u16]) {
        let column = usize::from(phase == Phase::Decode);
        self.tokens[column] += u64::from(tokens);
        let mut experts = self.experts.as_mut_slice();
        for id in ids {
            let id = usize::from(*id);
            if id >= experts.len() {
                self.experts.resize(id + 1, [0; 2]);
                experts = &mut self.experts;
            }
            experts[id][column] += 1;
        }
    }
}

/// Counts of one expert.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExpertStats {
    /// Expert.
    pub expert_id: usize,
    /// Tokens it was chosen for.
    pub activations: u64,
    /// Those of prompts.
    pub prefill: u64,
    /// Those generated.
    pub decode: u64,
    /// 100 × activations / tokens of the layer.
    pub percentage: f64,
    /// Activations / activations of the layer: sums to 1 over a layer.
    pub share: f64,
}

/// Activated experts, most activations first, then by ascending id.
pub fn expert_stats(tally: &Tally) -> Vec<ExpertStats> {
    let total_tokens = tally.total_tokens();
    let of_layer = tally.activations();
    let mut experts: Vec<ExpertStats> = tally
        .experts
        .iter()
        .enumerate()
        .map(|(expert_id, [prefill, decode])| (expert_id, *prefill, *decode, prefill + decode))
        .filter(|(_, _, _, activations)| *activations > 0)
        .map(|(expert_id, prefill, decode, activations)| ExpertStats {
            expert_id,
            activations,
            prefill,
            decode,
            percentage: percentage(activations, total_tokens),
            share: activations as f64 / of_layer as f64,
        })
        .collect();
    experts.sort_by_key(|expert| (Reverse(expert.activations), expert.expert_id));
    experts
}

/// Those of so many experts that are not among the activated ones, ascending.
pub fn never_activated(n_expert: u32, experts: &[ExpertStats]) -> Vec<u32> {
    let mut activated: Vec<usize> = experts.iter().map(|of| of.expert_id).collect();
    activated.sort_unstable();
    let is_idle = |expert: &u32| activated.binary_search(&(*expert as usize)).is_err();
    (0..n_expert).filter(is_idle).collect()
}

fn percentage(activations: u64, total_tokens: u64) -> f64 {
    100.0 * activations as f64 / total_tokens as f64
}

/// A layer as the original specification has it.
#[derive(Debug, Serialize)]
pub struct SpecifiedLayer {
    /// Layer of the model.
    pub layer_id: u16,
    /// Tokens routed in the layer.
    pub total_tokens: u64,
    /// Activated experts, most activations first.
    pub experts: Vec<SpecifiedExpert>,
}

/// An expert as the original specification has it.
#[derive(Debug, Serialize)]
pub struct SpecifiedExpert {
    /// Expert.
    pub expert_id: usize,
    /// Tokens it was chosen for.
    pub activations: u64,
    /// 100 × activations / tokens of the layer: sums to 100 × k over a layer.
    pub percentage: f64,
}

impl SpecifiedLayer {
    /// One of these experts and their activations, in the order in which they are to stand.
    pub fn new(
        layer_id: u16,
        total_tokens: u64,
        experts: impl IntoIterator<Item = (usize, u64)>,
    ) -> Self {
        let experts = experts.into_iter();
        Self {
            layer_id,
            total_tokens,
            experts: experts
                .map(|(expert_id, activations)| SpecifiedExpert {
                    expert_id,
                    activations,
                    percentage: percentage(activations, total_tokens),
                })
                .collect(),
        }
    }

    /// One that was counted.
    pub fn of(layer_id: u16, tally: &Tally) -> Self {
        let experts = expert_stats(tally).into_iter();
        let experts = experts.map(|expert| (expert.expert_id, expert.activations));
        Self::new(layer_id, tally.total_tokens(), experts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally() -> Tally {
        let mut tally = Tally::default();
        tally.count(Phase::Prefill, 2, &[5, 1, 5, 0]);
        tally.count(Phase::Decode, 1, &[1, 2]);
        tally
    }

    #[test]
    fn tokens_and_activations_are_counted_by_phase() {
        let tally = tally();
        assert_eq!(tally.tokens, [2, 1]);
        assert_eq!(
            tally.experts,
            [[1, 0], [1, 1], [0, 1], [0, 0], [0, 0], [2, 0]]
        );
        assert_eq!((tally.total_tokens(), tally.activations()), (3, 6));
        assert_eq!(never_activated(8, &expert_stats(&tally)), [3, 4, 6, 7]);
    }

    #[test]
    fn experts_are_listed_by_their_activations() {
        let experts = expert_stats(&tally());
        let listed: Vec<_> = experts
            .iter()
            .map(|expert| (expert.expert_id, expert.prefill, expert.decode))
            .collect();
        assert_eq!(listed, [(1, 1, 1), (5, 2, 0), (0, 1, 0), (2, 0, 1)]);
        let sum = |of: fn(&ExpertStats) -> f64| experts.iter().map(of).sum::<f64>();
        assert!((sum(|expert| expert.percentage) - 200.0).abs() < 1e-9);
        assert!((sum(|expert| expert.share) - 1.0).abs() < 1e-9);
        let specified = SpecifiedLayer::of(7, &tally());
        let ids: Vec<_> = specified.experts.iter().map(|of| of.expert_id).collect();
        assert_eq!((specified.total_tokens, ids), (3, vec![1, 5, 0, 2]));
    }
}
