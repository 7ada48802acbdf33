//! Profiles for tests, and what is true of all of them.

use super::*;

/// A layer with an expert for each pair of prefill and decode activations. Every token chooses two.
pub fn layer(layer_id: u16, n_expert: u32, counts: &[[u64; 2]]) -> LayerProfile {
    let sum = |phase: usize| counts.iter().map(|of| of[phase]).sum::<u64>().div_ceil(2);
    let experts = counts.iter().enumerate();
    let experts = experts.map(|(id, [prefill, decode])| ExpertProfile {
        expert_id: id as u32,
        activations: prefill + decode,
        prefill: *prefill,
        decode: *decode,
    });
    let mut layer = LayerProfile {
        layer_id,
        n_expert: Some(n_expert),
        k: Some(2),
        coverage: Some("observed".into()),
        total_tokens: sum(0) + sum(1),
        prefill_tokens: sum(0),
        decode_tokens: sum(1),
        experts: experts.collect(),
    };
    layer.put_in_order();
    layer
}

/// A context of these layers.
pub fn context(layers: Vec<LayerProfile>) -> ContextProfile {
    ContextProfile {
        model: Some(0),
        layers,
        ..ContextProfile::default()
    }
}

/// A profile of one file.
pub fn profile(source: &str, contexts: Vec<ContextProfile>) -> Profile {
    let numbered = contexts.into_iter().enumerate();
    let contexts: Vec<_> = numbered
        .map(|(id, context)| ContextProfile { id, ..context })
        .collect();
    Profile {
        schema: Schema::default(),
        sources: vec![source.into()],
        models: vec![serde_json::json!({"arch": "qwen3moe"})],
        layers_context: main_context(&contexts),
        contexts,
    }
}

#[test]
fn the_main_context_is_the_first_of_those_with_most_tokens() {
    let of = |tokens: u64| context(vec![layer(0, 4, &[[2 * tokens, 0]])]);
    for (tokens, main) in [
        (vec![], None),
        (vec![0, 0], None),
        (vec![1, 3, 3, 2], Some(1)),
        (vec![3, 1], Some(0)),
    ] {
        let contexts = tokens.iter().map(|tokens| of(*tokens)).collect();
        assert_eq!(profile("a", contexts).layers_context, main, "{tokens:?}");
    }
}

#[test]
fn a_context_is_found_or_the_reason_said() {
    let of = profile("a", vec![context(vec![layer(0, 4, &[[2, 0]])]); 3]);
    assert_eq!(of.context(None).unwrap().id, 0);
    assert_eq!(of.context(Some(2)).unwrap().id, 2);
    let missing = ContextError::Missing { id: 3, last: 2 };
    assert_eq!(of.context(Some(3)), Err(missing));
    assert_eq!(profile("a", vec![]).context(None), Err(ContextError::Empty));
    let idle = profile("a", vec![context(vec![])]);
    assert_eq!(idle.context(None), Err(ContextError::NoMain));
}
