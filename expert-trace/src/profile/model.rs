//! What the description of a model file says: an entry of `models`, as statistics, profiles and traces have it.

use std::collections::BTreeMap;

use expert_trace_common::{MAX_EXPERTS, MAX_LAYERS};
use serde_json::Value;

/// Key of what layers take in the file: a list of `layer_id`, `expert_bytes` and `dense_bytes`.
pub const LAYER_BYTES: &str = "layer_bytes";

/// What is known of a model. What a description lacks, or has as something else, is not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelFacts {
    /// The file.
    pub path: Option<String>,
    /// Architecture.
    pub arch: Option<String>,
    /// Layers, those without experts too.
    pub layers: Option<u64>,
    /// Experts to choose from.
    pub n_expert: Option<u32>,
    /// Bytes of an expert, and of all else, by layer.
    pub layer_bytes: BTreeMap<u16, (u64, u64)>,
}

impl ModelFacts {
    /// What one description says.
    pub fn of(model: &Value) -> Self {
        let text = |key: &str| Some(model.get(key)?.as_str()?.to_owned());
        let bytes_of = |layer: &Value| {
            let number = |key: &str| layer.get(key)?.as_u64();
            let id = u16::try_from(number("layer_id")?).ok();
            let id = id.filter(|id| *id < MAX_LAYERS)?;
            Some((id, (number("expert_bytes")?, number("dense_bytes")?)))
        };
        let layers = model.get(LAYER_BYTES).and_then(Value::as_array);
        let n_expert = model.get("n_expert").and_then(Value::as_u64);
        Self {
            path: text("path"),
            arch: text("arch"),
            layers: model.get("layers").and_then(Value::as_u64),
            n_expert: n_expert
                .filter(|n| (1..=MAX_EXPERTS as u64).contains(n))
                .map(|n| n as u32),
            layer_bytes: layers.into_iter().flatten().filter_map(bytes_of).collect(),
        }
    }

    /// Of the only model that it can be; of several, what they have in common.
    pub fn of_any(models: &[&Value]) -> Self {
        if let [only] = models {
            return Self::of(only);
        }
        let facts: Vec<Self> = models.iter().map(|model| Self::of(model)).collect();
        let same = facts.iter().all(|of| of.n_expert == facts[0].n_expert);
        Self {
            n_expert: facts.first().filter(|_| same).and_then(|of| of.n_expert),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_there_and_of_the_right_kind_is_taken() {
        let facts = ModelFacts::of(&json!({
            "path": "/m.gguf", "arch": 7, "layers": 48, "n_expert": 128,
            "layer_bytes": [
                {"layer_id": 3, "expert_bytes": 10, "dense_bytes": 20},
                {"layer_id": 4, "expert_bytes": -1, "dense_bytes": 20},
                {"layer_id": 1024, "expert_bytes": 1, "dense_bytes": 2},
                {"layer_id": 5}, 6,
            ],
        }));
        let expected = ModelFacts {
            path: Some("/m.gguf".into()),
            arch: None,
            layers: Some(48),
            n_expert: Some(128),
            layer_bytes: [(3, (10, 20))].into(),
        };
        assert_eq!(facts, expected);
        for n_expert in [json!(0), json!(1025), json!(-1), json!(1.5), json!("8")] {
            let facts = ModelFacts::of(&json!({"n_expert": n_expert}));
            assert_eq!(facts, ModelFacts::default(), "{n_expert}");
        }
        assert_eq!(ModelFacts::of(&json!([7])), ModelFacts::default());
    }

    #[test]
    fn several_models_have_in_common_what_does_not_differ() {
        let of = |n_experts: &[u32]| {
            let models: Vec<Value> = n_experts
                .iter()
                .map(|n| json!({"arch": "a", "n_expert": n}))
                .collect();
            let facts = ModelFacts::of_any(&models.iter().collect::<Vec<_>>());
            (facts.arch, facts.n_expert)
        };
        assert_eq!(of(&[]), (None, None));
        assert_eq!(of(&[16]), (Some("a".into()), Some(16)));
        assert_eq!(of(&[16, 16]), (None, Some(16)));
        assert_eq!(of(&[16, 32]), (None, None));
    }
}
