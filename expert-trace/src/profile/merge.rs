//! Several profiles of one model shape as one.

use std::collections::BTreeMap;

use serde_json::Value;
use thiserror::Error;

use super::{
    ContextProfile, ExpertProfile, LayerProfile, MAX_CONTEXTS, Profile, Schema, main_context,
    printable,
};

/// Why profiles cannot be merged.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum MergeError {
    /// Their main contexts run models of different shapes.
    #[error("{first} and {second} are of different models: {difference}")]
    Shape {
        /// Where the first of the two comes from.
        first: String,
        /// Where the other one comes from.
        second: String,
        /// The first difference.
        difference: String,
    },
    /// There are too many contexts.
    #[error("together they have more than {MAX_CONTEXTS} contexts: merge fewer files at once")]
    TooMany,
    /// A sum does not fit.
    #[error("the counts of layer {0} have no sum of 64 bits")]
    Overflow(u16),
}

/// Merges profiles: their contexts stay apart, and the sum of their main contexts follows them, as a
/// context of its own that `layers_context` names. One main context alone is no sum. The main context of
/// a profile that was merged before stands for the contexts that it is the sum of.
///
/// # Errors
/// When the main contexts are not of one shape: those whose model file is known have the same architecture
/// and the same layers as far as they tell them all, and every layer has the same number of experts, where
/// that is known.
pub fn merge(profiles: Vec<Profile>) -> Result<Profile, MergeError> {
    let mut merged = Profile {
        schema: Schema::default(),
        ..Profile::default()
    };
    let mut summands = Vec::new();
    for profile in profiles {
        summands.extend(append(&mut merged, profile));
    }
    if merged.contexts.len() >= MAX_CONTEXTS {
        return Err(MergeError::TooMany);
    }
    summands.sort_unstable();
    merged.layers_context = match summands[..] {
        [] => main_context(&merged.contexts),
        [only] => Some(only),
        _ => {
            let sum = sum(&merged, summands)?;
            merged.contexts.push(sum);
            Some(merged.contexts.len() - 1)
        }
    };
    Ok(merged)
}

/// Adds the contexts of a profile that are no sums. Gives those that its main context stands for.
fn append(merged: &mut Profile, profile: Profile) -> Vec<usize> {
    let first_source = merged.sources.len();
    merged.sources.extend(profile.sources);
    let models: Vec<usize> = profile
        .models
        .into_iter()
        .map(|model| model_index(&mut merged.models, model))
        .collect();
    let main = profile
        .layers_context
        .and_then(|main| profile.contexts.get(main));
    let of_main = match main {
        None => Vec::new(),
        Some(main) if main.summed.is_empty() => vec![main.id],
        Some(sum) => sum.summed.clone(),
    };
    let mut summands = Vec::new();
    for context in profile.contexts {
        if !context.summed.is_empty() {
            continue;
        }
        let id = merged.contexts.len();
        if of_main.contains(&context.id) {
            summands.push(id);
        }
        merged.contexts.push(ContextProfile {
            id,
            source: first_source + context.source,
            model: context.model.map(|model| models[model]),
            ..context
        });
    }
    summands
}

fn model_index(models: &mut Vec<Value>, model: Value) -> usize {
    let known = models.iter().position(|known| *known == model);
    known.unwrap_or_else(|| {
        models.push(model);
        models.len() - 1
    })
}

fn sum(profile: &Profile, summands: Vec<usize>) -> Result<ContextProfile, MergeError> {
    let parts: Vec<&ContextProfile> = summands.iter().map(|id| &profile.contexts[*id]).collect();
    check_shapes(profile, &parts)?;
    let mut by_layer: BTreeMap<u16, Vec<&LayerProfile>> = BTreeMap::new();
    for layer in parts.iter().flat_map(|part| &part.layers) {
        by_layer.entry(layer.layer_id).or_default().push(layer);
    }
    let layers = by_layer.into_iter();
    let model = parts[0].model;
    Ok(ContextProfile {
        id: profile.contexts.len(),
        source: parts[0].source,
        model: model.filter(|_| parts.iter().all(|part| part.model == model)),
        layers: layers
            .map(|(id, of)| sum_of_layer(id, &of).ok_or(MergeError::Overflow(id)))
            .collect::<Result<_, _>>()?,
        summed: summands,
    })
}

/// None when the sum is too large.
fn sum_of_layer(layer_id: u16, of: &[&LayerProfile]) -> Option<LayerProfile> {
    let mut experts: BTreeMap<u32, [u64; 2]> = BTreeMap::new();
    let mut tokens = [0_u64; 2];
    for layer in of {
        tokens = sums(tokens, [layer.prefill_tokens, layer.decode_tokens])?;
        for expert in &layer.experts {
            let counts = experts.entry(expert.expert_id).or_default();
            *counts = sums(*counts, [expert.prefill, expert.decode])?;
        }
    }
    let mut activations = 0_u64;
    for counts in experts.values() {
        activations = activations.checked_add(counts[0].checked_add(counts[1])?)?;
    }
    let [prefill_tokens, decode_tokens] = tokens;
    let mut layer = LayerProfile {
        layer_id,
        n_expert: of.iter().find_map(|layer| layer.n_expert),
        k: of.iter().filter_map(|layer| layer.k).max(),
        coverage: coverage(of),
        total_tokens: prefill_tokens.checked_add(decode_tokens)?,
        prefill_tokens,
        decode_tokens,
        experts: experts
            .into_iter()
            .map(|(expert_id, [prefill, decode])| ExpertProfile {
                expert_id,
                activations: prefill + decode,
                prefill,
                decode,
            })
            .collect(),
    };
    layer.put_in_order();
    Some(layer)
}

fn sums(a: [u64; 2], b: [u64; 2]) -> Option<[u64; 2]> {
    Some([a[0].checked_add(b[0])?, a[1].checked_add(b[1])?])
}

/// That of all, where it is the same; else some of it was not seen. None where one is not known.
fn coverage(of: &[&LayerProfile]) -> Option<String> {
    let mut all = of.iter().map(|layer| layer.coverage.as_deref());
    let first = all.next()??;
    let mut coverage = first;
    for other in all {
        if other? != first {
            coverage = "partly_observed";
        }
    }
    Some(coverage.to_owned())
}

/// Compares each context with all that stand before it. What is not known fits anything.
fn check_shapes(profile: &Profile, parts: &[&ContextProfile]) -> Result<(), MergeError> {
    let shown = |context: &ContextProfile| {
        let source = printable(profile.source_of(context));
        format!("{source} (context {} of the result)", context.id)
    };
    let fail = |first, second, difference| {
        Err(MergeError::Shape {
            first: shown(first),
            second: shown(second),
            difference,
        })
    };
    let mut with_model: Option<(&ContextProfile, &Value)> = None;
    let mut n_expert: BTreeMap<u16, (&ContextProfile, u32)> = BTreeMap::new();
    for context in parts {
        if let Some(model) = context.model.map(|model| &profile.models[model]) {
            match with_model {
                None => with_model = Some((context, model)),
                Some((first, first_model)) => {
                    if let Some(difference) = difference([first, context], [first_model, model]) {
                        return fail(first, context, difference);
                    }
                }
            }
        }
        for layer in &context.layers {
            let Some(number) = layer.n_expert else {
                continue;
            };
            let (first, known) = *n_expert.entry(layer.layer_id).or_insert((context, number));
            if known != number {
                let id = layer.layer_id;
                let difference = format!("layer {id} has {known} experts, and {number}");
                return fail(first, context, difference);
            }
        }
    }
    // Where the number of experts is not known, the last one that was active is.
    for context in parts {
        for layer in &context.layers {
            let Some((first, known)) = n_expert.get(&layer.layer_id) else {
                continue;
            };
            let mut experts = layer.experts.iter().map(|expert| expert.expert_id);
            if let Some(id) = experts.find(|id| id >= known) {
                let layer = layer.layer_id;
                let difference = format!("layer {layer} has {known} experts, and an expert {id}");
                return fail(first, context, difference);
            }
        }
    }
    Ok(())
}

/// Whether a context has all layers that its model has: then it is known of each whether it was seen.
fn lists_all_layers(context: &ContextProfile) -> bool {
    let mut layers = context.layers.iter();
    !context.layers.is_empty() && layers.all(|layer| layer.coverage.is_some())
}

/// What two contexts with known models differ in, be it the architecture or the layers. A trace that was cut
/// has those layers alone that routed something.
fn difference(contexts: [&ContextProfile; 2], models: [&Value; 2]) -> Option<String> {
    if let [Some(a), Some(b)] = models.map(|model| model["arch"].as_str())
        && a != b
    {
        let [a, b] = [a, b].map(printable);
        return Some(format!("their architectures are {a} and {b}"));
    }
    if let [Some(a), Some(b)] = models.map(|model| model["moe_layers"].as_array())
        && a != b
    {
        return Some("their models have experts in different layers".to_owned());
    }
    let [a, b] = contexts;
    if !contexts.into_iter().all(lists_all_layers) {
        return None;
    }
    let missing = |of: &ContextProfile, from: &ContextProfile| {
        let mut layers = of.layers.iter().map(|layer| layer.layer_id);
        layers.find(|id| from.layer(*id).is_none())
    };
    let of_first = missing(a, b).map(|id| (id, "first"));
    let of_second = missing(b, a).map(|id| (id, "second"));
    let (id, place) = of_first.into_iter().chain(of_second).min()?;
    Some(format!("layer {id} has experts in the {place} one alone"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::profile::tests::{context, layer, profile};

    fn of(name: &str, counts: &[[u64; 2]]) -> Profile {
        profile(name, vec![context(vec![layer(0, 4, counts)])])
    }

    #[test]
    fn contexts_stay_apart_and_the_main_ones_are_summed_by_phase() {
        let mut a = profile(
            "a",
            vec![
                context(vec![layer(0, 4, &[[1, 0]])]),
                context(vec![layer(0, 4, &[[4, 2], [0, 2]])]),
            ],
        );
        a.contexts[1].layers[0].coverage = Some("not_visible".into());
        let b = of("b", &[[0, 0], [6, 0], [0, 2]]);
        let parts = [a.clone(), b.clone()];
        let merged = merge(parts.into()).unwrap();

        assert_eq!(merged.check(), Ok(()));
        assert_eq!(merged.sources, ["a", "b"]);
        assert_eq!(merged.models.len(), 1, "the same one");
        assert_eq!(merged.layers_context, Some(3));
        assert_eq!(merged.contexts[..2], a.contexts);
        assert_eq!(merged.contexts[2].layers, b.contexts[0].layers);
        assert_eq!((merged.contexts[2].id, merged.contexts[2].source), (2, 1));

        let sum = &merged.contexts[3];
        assert_eq!(sum.summed, [1, 2]);
        assert_eq!(sum.model, Some(0));
        let mut expected = layer(0, 4, &[[4, 2], [6, 2], [0, 2]]);
        expected.coverage = Some("partly_observed".into());
        assert_eq!(sum.layers, [expected]);
    }

    #[test]
    fn merging_in_steps_is_merging_at_once() {
        let parts = [
            of("a", &[[1, 2], [3, 4]]),
            of("b", &[[5, 0], [1, 0]]),
            of("c", &[[0, 0], [0, 8]]),
        ];
        let [a, b, c] = parts.clone();
        let at_once = merge(parts.into()).unwrap();
        let first = merge(vec![a, b]).unwrap();
        assert_eq!(merge(vec![first, c]).unwrap(), at_once);
        assert_eq!(merge(vec![at_once.clone()]).unwrap(), at_once);
        assert_eq!(at_once.contexts.len(), 4);
    }

    #[test]
    fn one_main_context_is_no_sum() {
        let a = of("a", &[[1, 2]]);
        assert_eq!(merge(vec![a.clone()]).unwrap(), a);
        let idle = profile("idle", vec![]);
        let merged = merge(vec![idle.clone(), a]).unwrap();
        assert_eq!((merged.layers_context, merged.contexts.len()), (Some(0), 1));
        assert_eq!(merge(vec![idle]).unwrap().layers_context, None);
    }

    #[test]
    fn other_shapes_are_refused_by_their_first_difference() {
        let base = || of("a", &[[1, 2]]);
        let refused = |other: Profile| merge(vec![base(), other]).unwrap_err().to_string();

        let mut arch = of("b", &[[1, 2]]);
        arch.models[0] = json!({"arch": "llama"});
        let error = refused(arch);
        assert!(error.contains("qwen3moe and llama"), "{error}");
        assert!(
            error.starts_with("a (context 0 of the result) and b ("),
            "{error}"
        );

        let more = vec![layer(0, 4, &[[1, 2]]), layer(1, 4, &[[1, 2]])];
        let error = refused(profile("b", vec![context(more.clone())]));
        assert!(
            error.contains("layer 1 has experts in the second"),
            "{error}"
        );

        let error = refused(profile("b", vec![context(vec![layer(0, 8, &[[1, 2]])])]));
        assert!(error.contains("layer 0 has 4 experts, and 8"), "{error}");

        let mut beyond = profile("b", vec![context(vec![layer(0, 8, &[[1, 0]; 6])])]);
        beyond.contexts[0].layers[0].n_expert = None;
        let error = refused(beyond);
        assert!(
            error.contains("layer 0 has 4 experts, and an expert 4"),
            "{error}"
        );

        let moe_layers = |layers: &[u16]| {
            let mut of = of("b", &[[1, 2]]);
            of.models[0] = json!({"arch": "qwen3moe", "moe_layers": layers});
            of
        };
        let error = merge(vec![moe_layers(&[0]), moe_layers(&[0, 1])]).unwrap_err();
        assert!(error.to_string().contains("in different layers"), "{error}");
        assert!(merge(vec![moe_layers(&[0]), base()]).is_ok());

        // A trace that was cut does not list layers that it has not seen.
        let mut cut = of("b", &[[1, 2]]);
        cut.contexts[0].layers[0].coverage = None;
        let whole = profile("b", vec![context(more.clone())]);
        let merged = merge(vec![cut, whole]).unwrap();
        assert_eq!(merged.context(None).unwrap().layers.len(), 2);

        // What is not known fits anything.
        let mut unknown = profile("b", vec![context(more)]);
        unknown.contexts[0].model = None;
        unknown.contexts[0].layers[0].n_expert = None;
        let merged = merge(vec![base(), unknown]).unwrap();
        let sum = merged.context(None).unwrap();
        assert_eq!((sum.layers.len(), sum.model), (2, None));
        assert_eq!(sum.layers[0].n_expert, Some(4));
    }

    #[test]
    fn sums_that_do_not_fit_are_refused() {
        let large = of("a", &[[u64::MAX, 0]]);
        let error = merge(vec![large, of("b", &[[1, 0]])]);
        assert_eq!(error, Err(MergeError::Overflow(0)));
        let many = profile("a", vec![context(vec![]); MAX_CONTEXTS]);
        assert_eq!(merge(vec![many]), Err(MergeError::TooMany));
    }
}
