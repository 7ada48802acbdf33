//! Why no expert was counted, as far as can be told from outside.

use std::path::{Path, PathBuf};

use crate::{
    diagnosis,
    placement::Options,
    stats::{ModelFile, Stats},
    target::printable,
    visibility::Evidence,
};

/// Why routing was not seen, and what to change.
#[derive(Debug)]
struct Why {
    explanation: String,
    remedy: String,
}

/// What the reason is picked from.
#[derive(Debug, Default)]
struct Facts<'a> {
    /// There were passes, and none was to be counted.
    left_out: bool,
    /// Passes were not seen that were to be counted.
    unseen: bool,
    /// A library with the probed function was found.
    has_library: bool,
    /// The executable contains llama.cpp and no symbol of it.
    stripped: Option<PathBuf>,
    /// Entries of the probed function.
    entered: u64,
    /// Of these, for the embedding lookup of tokens.
    token_lookup: u64,
    /// Of these, for expert ids.
    routed: u64,
    /// Rows of expert ids.
    rows: u64,
    /// Nothing was lost.
    complete: bool,
    /// Graphs that were computed.
    passes: u64,
    /// Why routing may have been out of sight.
    why: Option<Why>,
    models: &'a [ModelFile],
}

/// Says, in half a sentence, why a document counts nothing.
///
/// `options` are those of the first process.
pub fn reason(stats: &Stats, options: &Options) -> String {
    let hits = &stats.integrity.hits;
    let has_library = !stats.target.tensor_layouts.is_empty();
    let exe = stats.target.process.exe.as_deref().map(PathBuf::from);
    Facts {
        left_out: !stats.excluded.is_empty(),
        unseen: !stats.not_visible.is_empty(),
        has_library,
        stripped: exe.filter(|exe| !has_library && diagnosis::contains_llama_cpp(exe)),
        entered: hits.entered,
        token_lookup: hits.token_lookup,
        routed: hits.routed,
        rows: stats.integrity.rows.seen,
        complete: stats.integrity.complete,
        passes: hits.passes,
        why: Some(why(stats, options)),
        models: &stats.models,
    }
    .reason()
}

fn why(stats: &Stats, options: &Options) -> Why {
    let silence = || Evidence::of(stats).explain_silence(stats.integrity.hits.passes, options);
    let gap = stats.worst_gap().cloned().unwrap_or_else(silence);
    Why {
        remedy: gap.to_see(),
        explanation: gap.explanation,
    }
}

/// Says of a file that it has llama.cpp in it, and nothing to find its functions by.
pub fn without_symbols(file: &Path) -> String {
    let file = printable(file);
    format!("{file} contains llama.cpp without symbols (a stripped static build)")
}

/// Says of a model that it has no experts.
pub fn dense(model: &ModelFile) -> String {
    let path = printable(model.path.as_ref());
    format!("the model is dense: {path} has no MoE layer")
}

impl Facts<'_> {
    fn reason(&self) -> String {
        if self.left_out && !self.unseen {
            "all passes were left out".to_owned()
        } else if let Some(why) = self.why.as_ref().filter(|_| self.left_out) {
            format!(
                "passes were left out, and of the others: {}; {}",
                why.explanation, why.remedy
            )
        } else if let Some(exe) = &self.stripped {
            format!(
                "{}; use an unstripped build, or one with shared libraries",
                without_symbols(exe)
            )
        } else if !self.has_library {
            "the process loaded no library that defines ggml_compute_forward_get_rows".to_owned()
        } else if self.routed > 0 && self.rows == 0 && self.complete {
            "MoE layers ran, and routed no row".to_owned()
        } else if self.routed > 0 {
            "expert ids were there, and could not be read".to_owned()
        } else if self.token_lookup > 0 || (self.entered > 0 && self.passes > 0 && self.complete) {
            // Many builds of 2025 do not name the tensor of tokens.
            self.no_moe_layer_ran()
        } else if let Some(why) = self
            .why
            .as_ref()
            .filter(|_| self.entered == 0 && self.passes > 0)
        {
            format!(
                "graphs were computed, and {}; {}",
                why.explanation, why.remedy
            )
        } else if self.entered == 0 {
            "no token was decoded on the CPU backend".to_owned()
        } else if self.passes > 0 {
            "graphs were computed, and nothing in them that the probe recognised".to_owned()
        } else {
            "no token was decoded, and nothing that the probe recognised was computed".to_owned()
        }
    }

    fn no_moe_layer_ran(&self) -> String {
        let on_device = self.why.as_ref().map_or("", |why| &why.remedy);
        // The one with the most layers speaks for the others, such as a draft model's.
        let model = self
            .models
            .iter()
            .max_by_key(|model| model.shape.moe_layers.len());
        match model {
            None => format!(
                "tokens were decoded, but no MoE layer ran on the CPU: the model is dense, or its \
                 router is on a GPU or another device; if it is no dense model, {on_device}"
            ),
            Some(model) => {
                let path = printable(model.path.as_ref());
                match model.shape.moe_layers.len() {
                    0 => format!("tokens were decoded, but {}", dense(model)),
                    layers => format!(
                        "MoE layers are not visible: {path} has {layers} MoE layers, and none of \
                         their routing ran on the CPU (the router is on a GPU or another device); \
                         {on_device}"
                    ),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::ModelShape;

    fn model(path: &str, moe_layers: usize) -> ModelFile {
        ModelFile {
            path: path.to_owned(),
            found: "mapped",
            shape: ModelShape::with_experts_in(4, &[0, 1, 2, 3][..moe_layers]),
        }
    }

    fn decoded(models: &[ModelFile]) -> String {
        Facts {
            has_library: true,
            entered: 20,
            token_lookup: 10,
            complete: true,
            models,
            ..Facts::default()
        }
        .reason()
    }

    #[test]
    fn tokens_without_experts() {
        let dense = model("/m/dense.gguf", 0);
        let moe = model("/m/moe\u{1b}.gguf", 4);
        assert!(decoded(&[]).starts_with(
            "tokens were decoded, but no MoE layer ran on the CPU: the model is dense, or"
        ));
        assert_eq!(
            decoded(std::slice::from_ref(&dense)),
            "tokens were decoded, but the model is dense: /m/dense.gguf has no MoE layer"
        );
        // A dense draft model does not hide that the other one has experts.
        assert!(decoded(&[dense, moe]).starts_with(
            "MoE layers are not visible: /m/moe\u{fffd}.gguf has 4 MoE layers, and none"
        ));
    }

    #[test]
    fn each_fact_has_its_reason() {
        let facts = || Facts {
            has_library: true,
            complete: true,
            ..Facts::default()
        };
        let entered = |routed, rows, complete| Facts {
            entered: 9,
            routed,
            rows,
            complete,
            ..facts()
        };
        let unknown_layout = Facts {
            passes: 2,
            ..entered(0, 0, false)
        };
        // No tensor of tokens has a name, and none of experts is there.
        let dense = Facts {
            passes: 2,
            ..entered(0, 0, true)
        };
        let left_out = Facts {
            left_out: true,
            ..facts()
        };
        let stripped = Facts {
            stripped: Some("/bin/llama".into()),
            ..Facts::default()
        };
        let never_entered = Facts {
            passes: 2,
            why: Some(Why {
                explanation: "it was never entered".to_owned(),
                remedy: "rebuild".to_owned(),
            }),
            ..facts()
        };
        for (facts, expected) in [
            (facts(), "no token was decoded on the CPU backend"),
            (
                never_entered,
                "graphs were computed, and it was never entered; rebuild",
            ),
            (entered(0, 0, true), "no token was decoded, and nothing"),
            (unknown_layout, "graphs were computed, and nothing in them"),
            (dense, "tokens were decoded, but no MoE layer ran"),
            (entered(3, 0, true), "MoE layers ran, and routed no row"),
            (entered(3, 2, false), "expert ids were there"),
            (Facts::default(), "the process loaded no library"),
            (left_out, "all passes were left out"),
            (stripped, "/bin/llama contains llama.cpp without symbols"),
        ] {
            let reason = facts.reason();
            assert!(reason.starts_with(expected), "{reason}");
        }
    }
}
