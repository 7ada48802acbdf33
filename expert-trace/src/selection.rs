//! The router's choice, made again from its logits.
//!
//! Where only the logits of a router are computed on the host, the choice itself stays on a device.
//! It is a pure function of the logits and of what the model file says (`build_moe_ffn` in
//! llama-graph.cpp): a gating function, a bias for the selection alone, groups of experts of which
//! some are kept, and the k largest of what remains, the largest first.

use std::collections::BTreeMap;

/// Largest distance between the last chosen value and the first that is not at which a device, which
/// rounds in its own way, may have chosen otherwise.
pub const CLOSE_CALL: f32 = 1e-3;

/// What a row of values is, on the way from the router's product to the choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The product with the router's weights (`ffn_moe_logits`).
    Logits,
    /// That, and the router's bias (`ffn_moe_logits_biased`).
    BiasedLogits,
    /// What the gating function makes of that (`ffn_moe_probs`; where it is applied to the chosen
    /// experts alone, llama.cpp gives the biased logits this name).
    Probs,
    /// That, and the selection bias (`ffn_moe_probs_biased`).
    Selection,
}

/// `<arch>.expert_gating_func` (`llama_expert_gating_func_type` in llama-hparams.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gating {
    /// Over all experts.
    Softmax,
    /// Of each logit.
    Sigmoid,
    /// Over the chosen experts: the choice is made from the logits.
    SoftmaxWeight,
    /// Square root of the softplus of each logit.
    SqrtSoftplus,
}

impl Gating {
    /// The function with this number in a model file; `None` for others, and for "not said".
    pub fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Softmax,
            2 => Self::Sigmoid,
            3 => Self::SoftmaxWeight,
            4 => Self::SqrtSoftplus,
            _ => return None,
        })
    }

    fn apply(self, values: &mut [f32]) {
        match self {
            Self::Softmax => {
                let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let mut sum = 0.0;
                for value in &mut *values {
                    *value = (*value - max).exp();
                    sum += *value;
                }
                for value in values {
                    *value /= sum;
                }
            }
            Self::Sigmoid => {
                for value in values {
                    *value = 1.0 / (1.0 + (-*value).exp());
                }
            }
            Self::SoftmaxWeight => {}
            Self::SqrtSoftplus => {
                for value in values {
                    // As ggml computes it (ggml_compute_softplus_f32), rounding included.
                    let softplus = if *value > 20.0 {
                        *value
                    } else {
                        (1.0 + value.exp()).ln()
                    };
                    *value = softplus.sqrt();
                }
            }
        }
    }
}

/// How one layer chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Experts chosen per token.
    pub k: u16,
    /// The last values on the way that the file's tensors make different from those before: what has
    /// to be seen. `None` where experts are not chosen by logits (deepseek4's first layers choose by
    /// token).
    pub stage: Option<Stage>,
    /// `None` when the file does not say, and the architecture decides.
    pub gating: Option<Gating>,
    /// Groups the experts are in; 0 or 1 when they are in none.
    pub groups: u16,
    /// Groups that are kept.
    pub groups_used: u16,
}

/// How a model's routers choose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Router {
    /// Experts to choose from.
    pub n_expert: u16,
    /// Layers with experts.
    pub layers: BTreeMap<u16, Layer>,
}

/// Why no choice can be made from a layer's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// No model file is known, or none has such a layer.
    NoModel,
    /// Models that choose differently fit.
    Ambiguous,
    /// A bias that the model adds was not on the host.
    BiasElsewhere,
    /// The layer chooses by token.
    NotByLogits,
    /// Groups are chosen by what the gating function gives, and the file does not name one.
    UnknownGating,
    /// A value is no number.
    NotANumber,
    /// The groups that are kept have fewer experts than are chosen, or there are no such groups.
    TooFewExperts,
}

impl Refusal {
    /// In words, to follow a number of rows.
    pub fn text(self) -> &'static str {
        match self {
            Self::NoModel => "no model file is known that says how many experts are chosen",
            Self::Ambiguous => "models that choose differently fit",
            Self::BiasElsewhere => {
                "the model adds a bias that was not computed on the CPU: keep ffn_gate_inp.bias and \
                 exp_probs_b there, too"
            }
            Self::NotByLogits => "the layer chooses experts by token, and not by logits",
            Self::UnknownGating => {
                "the model chooses groups of experts, and its file does not name the gating function"
            }
            Self::NotANumber => "a logit is no number",
            Self::TooFewExperts => {
                "the model file, or what overrides it, has more experts chosen than there are in the \
                 groups that are kept"
            }
        }
    }
}

/// How a layer of so many experts chooses, if all routers that have one agree.
///
/// # Errors
/// When there is none, or they do not agree.
pub fn layer_of(routers: &[Router], layer: u16, n_expert: u16) -> Result<Layer, Refusal> {
    let fitting = routers.iter().filter(|router| router.n_expert == n_expert);
    let mut layers = fitting.filter_map(|router| router.layers.get(&layer));
    let first = layers.next().ok_or(Refusal::NoModel)?;
    if layers.any(|other| other != first) {
        return Err(Refusal::Ambiguous);
    }
    Ok(*first)
}

impl Layer {
    /// Appends the experts that it chooses by a row of values to `ids`, in router order: k of them. Gives
    /// how far the closest value that was not chosen lies behind the last one that was, in units of the
    /// row; 0 where the gating function makes the two the same, or nearly so.
    ///
    /// # Errors
    /// When the values do not determine the choice. Nothing is appended then.
    pub fn choose(&self, stage: Stage, row: &[f32], ids: &mut Vec<u16>) -> Result<f32, Refusal> {
        match self.stage {
            None => return Err(Refusal::NotByLogits),
            Some(wanted) if wanted > stage => return Err(Refusal::BiasElsewhere),
            Some(_) => {}
        }
        if row.iter().any(|value| value.is_nan()) {
            return Err(Refusal::NotANumber);
        }
        let k = usize::from(self.k);
        if k == 0 || k > row.len() {
            return Err(Refusal::TooFewExperts);
        }
        if self.groups <= 1 {
            // The gating functions keep the order, but for values that they make the same.
            let (margin, [last, next]) = take_largest(row.iter().copied().zip(0..), k, ids);
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let merged = stage < Stage::Probs && merges(self.gating, max, last, next);
            return Ok(if merged { 0.0 } else { margin });
        }
        let groups = usize::from(self.groups);
        let per_group = row.len() / groups;
        if !row.len().is_multiple_of(groups) || per_group * usize::from(self.groups_used) < k {
            return Err(Refusal::TooFewExperts);
        }
        let mut values = row.to_vec();
        if stage < Stage::Probs {
            self.gating
                .ok_or(Refusal::UnknownGating)?
                .apply(&mut values);
        }
        let (kept, group_margin) = self.largest_groups(&values, per_group);
        let of_kept = values
            .iter()
            .copied()
            .zip(0..)
            .filter(|(_, id)| kept.contains(&(usize::from(*id) / per_group)));
        Ok(take_largest(of_kept, k, ids).0.min(group_margin))
    }

    /// The groups whose two largest values have the largest sums, and the distance to the next group.
    fn largest_groups(&self, values: &[f32], per_group: usize) -> (Vec<usize>, f32) {
        let sums = values.chunks_exact(per_group).map(|group| {
            let mut sorted = group.to_vec();
            sorted.sort_by(|a, b| b.total_cmp(a));
            sorted.iter().take(2).sum()
        });
        let mut kept = Vec::new();
        let (margin, _) = take_largest(sums.zip(0..), usize::from(self.groups_used), &mut kept);
        (kept.into_iter().map(usize::from).collect(), margin)
    }
}

/// Whether a gating function makes the values of two logits the same in single precision, or leaves so
/// little between them that implementations differ. An unknown function can be any of them.
fn merges(gating: Option<Gating>, max: f32, last: f32, next: f32) -> bool {
    // Where the exponential function has no normal number any more, devices give 0; divided by a sum
    // over all experts, it is reached earlier.
    const UNDERFLOW: f32 = 80.0;
    // A few steps between numbers close to 1.
    const STEPS: f32 = 5e-7;
    let softmax = max - last > UNDERFLOW;
    let sigmoid = last < -UNDERFLOW || (next > 0.0 && (-next).exp() - (-last).exp() < STEPS);
    // Both are added to 1 before the logarithm is taken.
    let softplus = last < 0.0 && last.exp() - next.exp() < STEPS;
    match gating {
        Some(Gating::Softmax) => softmax,
        Some(Gating::Sigmoid) => sigmoid,
        Some(Gating::SqrtSoftplus) => softplus,
        Some(Gating::SoftmaxWeight) => false,
        None => softmax || sigmoid || softplus,
    }
}

/// Appends the ids of the `k` largest values, the largest first; of equals the smaller id. Gives the
/// distance between the last of them and the next, and these two.
fn take_largest(
    values: impl Iterator<Item = (f32, u16)>,
    k: usize,
    ids: &mut Vec<u16>,
) -> (f32, [f32; 2]) {
    let mut values: Vec<(f32, u16)> = values.collect();
    let order = |a: &(f32, u16), b: &(f32, u16)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    let (margin, ends) = if k < values.len() {
        let (before, next, _) = values.select_nth_unstable_by(k, order);
        let last = before.iter().map(|(value, _)| *value);
        let last = last.fold(f32::INFINITY, f32::min);
        // Of two that are infinite the difference is no number.
        let margin = if last == next.0 { 0.0 } else { last - next.0 };
        (margin, [last, next.0])
    } else {
        (f32::INFINITY, [f32::INFINITY; 2])
    };
    values.truncate(k);
    values.sort_by(order);
    ids.extend(values.iter().map(|(_, id)| *id));
    (margin, ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(k: u16, stage: Option<Stage>) -> Layer {
        Layer {
            k,
            stage,
            gating: None,
            groups: 0,
            groups_used: 0,
        }
    }

    fn chosen(layer: &Layer, stage: Stage, row: &[f32]) -> Result<(Vec<u16>, f32), Refusal> {
        let mut ids = Vec::new();
        let margin = layer.choose(stage, row, &mut ids)?;
        Ok((ids, margin))
    }

    #[test]
    fn the_largest_come_first() {
        let router = layer(3, Some(Stage::Logits));
        let row = [0.5, -1.0, 4.0, 0.25, 2.0];
        assert_eq!(
            chosen(&router, Stage::Logits, &row),
            Ok((vec![2, 4, 0], 0.25))
        );
        assert_eq!(
            chosen(&router, Stage::Logits, &[1.0; 5]),
            Ok((vec![0, 1, 2], 0.0))
        );
    }

    #[test]
    fn what_the_model_adds_has_to_be_there() {
        let biased = layer(1, Some(Stage::Selection));
        let row = [1.0, 2.0];
        assert_eq!(
            chosen(&biased, Stage::BiasedLogits, &row),
            Err(Refusal::BiasElsewhere)
        );
        assert_eq!(
            chosen(&biased, Stage::Probs, &row),
            Err(Refusal::BiasElsewhere)
        );
        assert_eq!(chosen(&biased, Stage::Selection, &row), Ok((vec![1], 1.0)));
        let by_token = layer(1, None);
        assert_eq!(
            chosen(&by_token, Stage::Logits, &row),
            Err(Refusal::NotByLogits)
        );
        let plain = layer(1, Some(Stage::Logits));
        assert_eq!(
            chosen(&plain, Stage::Logits, &[f32::NAN, 0.0]),
            Err(Refusal::NotANumber)
        );
    }

    #[test]
    fn groups_are_chosen_by_their_two_best() {
        let mut router = Layer {
            groups: 3,
            groups_used: 1,
            ..layer(2, Some(Stage::Logits))
        };
        // Group 0 has the largest value, group 1 the largest sum of two.
        let row = [5.0, -9.0, 3.0, 2.9, 0.0, 0.0];
        for stage in [Stage::Probs, Stage::Selection] {
            assert_eq!(chosen(&router, stage, &row).unwrap().0, vec![2, 3]);
        }
        assert_eq!(
            chosen(&router, Stage::Logits, &row),
            Err(Refusal::UnknownGating)
        );
        router.gating = Some(Gating::SoftmaxWeight);
        assert_eq!(chosen(&router, Stage::Logits, &row).unwrap().0, vec![2, 3]);
        // Sigmoid: 0.993 + 0.0001 is less than 0.953 + 0.948. Softmax: 0.79 is more than 0.10 + 0.09.
        router.gating = Some(Gating::Sigmoid);
        assert_eq!(chosen(&router, Stage::Logits, &row).unwrap().0, vec![2, 3]);
        router.gating = Some(Gating::Softmax);
        assert_eq!(chosen(&router, Stage::Logits, &row).unwrap().0, vec![0, 1]);
    }

    #[test]
    fn gating_functions() {
        let mut values = [0.0, 30.0];
        Gating::SqrtSoftplus.apply(&mut values);
        assert!((values[0] - std::f32::consts::LN_2.sqrt()).abs() < 1e-6);
        assert!((values[1] - 30f32.sqrt()).abs() < 1e-6);
        for number in 0..6 {
            assert_eq!(
                Gating::from_number(number).is_some(),
                (1..5).contains(&number)
            );
        }
    }

    #[test]
    fn what_a_gating_function_makes_the_same_is_a_close_call() {
        let margin = |gating, row: &[f32]| {
            let layer = Layer {
                gating,
                ..layer(1, Some(Stage::Logits))
            };
            chosen(&layer, Stage::Logits, row).unwrap().1
        };
        let (small, large, far) = ([3.0, 1.0], [30.0, 20.0], [100.0, 2.0, 1.0]);
        for gating in [None, Some(Gating::Softmax), Some(Gating::Sigmoid)] {
            assert_eq!(margin(gating, &small), 2.0);
        }
        assert_eq!(margin(Some(Gating::Sigmoid), &large), 0.0);
        assert_eq!(margin(None, &large), 0.0);
        assert_eq!(margin(Some(Gating::Softmax), &large), 10.0);
        assert_eq!(margin(Some(Gating::SoftmaxWeight), &far), 98.0);
        let layer = Layer {
            gating: Some(Gating::Softmax),
            ..layer(2, Some(Stage::Logits))
        };
        assert_eq!(chosen(&layer, Stage::Logits, &far).unwrap().1, 0.0);
    }

    #[test]
    fn a_choice_that_cannot_be_made_is_refused() {
        let too_many = layer(3, Some(Stage::Logits));
        assert_eq!(
            chosen(&too_many, Stage::Logits, &[1.0, 2.0]),
            Err(Refusal::TooFewExperts)
        );
        // Too many experts, experts that do not fit in the groups, more groups than experts.
        for (k, groups, groups_used) in [(3, 2, 1), (1, 3, 1), (1, 9, 1), (1, 2, 0)] {
            let layer = Layer {
                groups,
                groups_used,
                ..layer(k, Some(Stage::Logits))
            };
            assert_eq!(
                chosen(&layer, Stage::Probs, &[1.0, 2.0, 3.0, 4.0]),
                Err(Refusal::TooFewExperts)
            );
        }
    }

    #[test]
    fn models_that_choose_differently_are_not_mixed_up() {
        let router = |k, layers: std::ops::Range<u16>| Router {
            n_expert: 2,
            layers: layers
                .map(|number| (number, layer(k, Some(Stage::Logits))))
                .collect(),
        };
        let (one, shorter, other) = (router(1, 0..4), router(1, 0..2), router(2, 0..4));
        assert_eq!(layer_of(&[], 3, 2), Err(Refusal::NoModel));
        assert_eq!(
            layer_of(std::slice::from_ref(&one), 4, 2),
            Err(Refusal::NoModel)
        );
        let alike = layer_of(&[one.clone(), shorter], 1, 2);
        assert_eq!(alike, Ok(one.layers[&1]));
        assert_eq!(layer_of(&[one, other], 3, 2), Err(Refusal::Ambiguous));
    }
}
