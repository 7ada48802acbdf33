//! Whether a profile has exactly the counts that `llama-imatrix` made itself.

use std::{collections::BTreeSet, fmt::Write as _};

use serde::Serialize;

use super::{
    ContextProfile, LayerProfile, Profile, Schema, diff::Side, imatrix::Imatrix, printable,
};

/// Name of the document's schema.
pub const SCHEMA_NAME: &str = "expert-trace-verify";
/// Its version: raised when a key changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

/// Counts of a context and of an imatrix, compared. Pairs are in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// What this is.
    pub schema: Schema,
    /// The context.
    pub profile: Side,
    /// The imatrix.
    pub imatrix: String,
    /// Whether every expert of every layer has the same count in both.
    pub equal: bool,
    /// All layers that one of them has, ascending.
    pub layers: Vec<LayerReport>,
    /// What can be the reason when they are not equal.
    pub hints: Vec<String>,
}

/// One layer, compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LayerReport {
    /// The layer.
    pub layer_id: u16,
    /// Whether all counts are the same.
    pub equal: bool,
    /// Tokens routed, as the context has them.
    pub total_tokens: u64,
    /// Activations of the context; `None` when it does not have the layer.
    pub activations: Option<u64>,
    /// Rows of one weight of the layer, over all experts; `None` when the imatrix does not have it.
    pub imatrix: Option<u64>,
    /// Weights of the layer that the imatrix has counts of. Each counts every activation.
    pub weights: Vec<&'static str>,
    /// Whether these have the same counts.
    pub weights_agree: bool,
    /// Experts of which the counts differ, ascending.
    pub experts: Vec<ExpertReport>,
}

/// An expert of which the counts differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ExpertReport {
    /// The expert.
    pub expert_id: u32,
    /// Its activations in the context.
    pub activations: u64,
    /// Its count in the imatrix.
    pub imatrix: u64,
}

/// Compares one context of a profile with an imatrix; `file` and `imatrix_file` are for the report.
pub fn verify(
    profile: &Profile,
    context: &ContextProfile,
    file: &str,
    imatrix: &Imatrix,
    imatrix_file: &str,
) -> Report {
    let layers = compare(context, imatrix);
    let equal = layers.iter().all(|layer| layer.equal);
    Report {
        schema: Schema {
            name: SCHEMA_NAME.to_owned(),
            version: SCHEMA_VERSION,
        },
        profile: Side {
            file: file.to_owned(),
            context: context.id,
        },
        imatrix: imatrix_file.to_owned(),
        equal,
        hints: match equal {
            true => Vec::new(),
            false => hints(profile, context, imatrix, &layers),
        },
        layers,
    }
}

fn compare(context: &ContextProfile, imatrix: &Imatrix) -> Vec<LayerReport> {
    let ours = context.layers.iter().map(|layer| layer.layer_id);
    let ids: BTreeSet<u16> = ours.chain(imatrix.layers.keys().copied()).collect();
    ids.into_iter()
        .map(|id| compare_layer(id, context.layer(id), imatrix))
        .collect()
}

fn compare_layer(layer_id: u16, layer: Option<&LayerProfile>, imatrix: &Imatrix) -> LayerReport {
    let theirs = imatrix.layers.get(&layer_id);
    let mut weights = theirs.into_iter().flatten();
    // They are in the order of their names: down, which every architecture has, comes first.
    let first = weights.next().map(|(_, counts)| counts);
    let weights_agree = weights.all(|(_, counts)| Some(counts) == first);
    let counted = first.map_or(&[][..], |counts| counts);
    let activations = layer.map_or_else(Vec::new, LayerProfile::dense);
    let at = |counts: &[u64], id: usize| counts.get(id).copied().unwrap_or(0);
    let experts: Vec<ExpertReport> = (0..counted.len().max(activations.len()))
        .map(|id| ExpertReport {
            expert_id: id as u32,
            activations: at(&activations, id),
            imatrix: at(counted, id),
        })
        .filter(|expert| expert.activations != expert.imatrix)
        .collect();
    let n_expert = layer.and_then(|layer| layer.n_expert);
    let same_width = match (n_expert, first) {
        (Some(n_expert), Some(counts)) => counts.len() == n_expert as usize,
        _ => true,
    };
    LayerReport {
        layer_id,
        // A layer that the other one does not have is the same when it was never used.
        equal: experts.is_empty() && weights_agree && same_width,
        total_tokens: layer.map_or(0, |layer| layer.total_tokens),
        activations: layer.map(LayerProfile::activations),
        imatrix: first.map(|counts| counts.iter().sum()),
        weights: theirs
            .into_iter()
            .flatten()
            .map(|(name, _)| *name)
            .collect(),
        weights_agree,
        experts,
    }
}

/// What is known to make the counts differ, as far as the counts show it.
fn hints(
    profile: &Profile,
    context: &ContextProfile,
    imatrix: &Imatrix,
    layers: &[LayerReport],
) -> Vec<String> {
    let mut hints = Vec::new();
    let is_equal = |other: &&ContextProfile| {
        other.id != context.id && compare(other, imatrix).iter().all(|layer| layer.equal)
    };
    if let Some(other) = profile.contexts.iter().find(is_equal) {
        hints.push(format!(
            "Context {} has exactly these counts: --context {}.",
            other.id, other.id
        ));
    }
    if layers.iter().any(|layer| !layer.weights_agree) {
        hints.push(
            "The weights of a layer have different counts in the imatrix, and a run counts the same for all of \
             them: the file was put together from others, or is damaged."
                .to_owned(),
        );
    }
    let width_differs = layers.iter().find_map(|report| {
        let ours = context.layer(report.layer_id)?.n_expert?;
        let theirs = imatrix.layers.get(&report.layer_id)?.values().next()?.len();
        (ours as usize != theirs).then_some((report.layer_id, ours, theirs))
    });
    if let Some((layer, ours, theirs)) = width_differs {
        hints.push(format!(
            "Layer {layer} has {ours} experts in the profile and {theirs} in the imatrix: these are different \
             models."
        ));
    }
    match common_factor(layers) {
        Some((1, times @ 2..)) => hints.push(format!(
            "The imatrix counts exactly {times} times as much: it was combined with files of other runs \
             (--in-file), or the same text was computed {times} times."
        )),
        Some((times @ 2.., 1)) => hints.push(format!(
            "The profile counts exactly {times} times as much: it is a sum of runs, or was made by something \
             that adds up the weights of a layer. Each weight (gate, up, down) has all activations of its layer; \
             expert-trace counts them once."
        )),
        _ => {}
    }
    if let Some(hint) = fewer_in_last_layer(context) {
        hints.push(hint);
    }
    let not_seen: Vec<String> = context
        .layers
        .iter()
        .filter(|layer| layer.coverage.as_deref().is_some_and(|of| of != "observed"))
        .map(|layer| layer.layer_id.to_string())
        .collect();
    if !not_seen.is_empty() {
        hints.push(format!(
            "Not all routing of layers {} was seen (coverage): expert-trace can only have counted less.",
            not_seen.join(", ")
        ));
    }
    let differ = |more: fn(&ExpertReport) -> bool| {
        let mut experts = layers.iter().flat_map(|layer| &layer.experts);
        layers.iter().any(|layer| !layer.experts.is_empty()) && experts.all(more)
    };
    if differ(|expert| expert.imatrix < expert.activations) {
        hints.push(
            "The imatrix has nowhere more: it is one of the files that llama-imatrix writes while it works \
             (FILE.at_N, or the last one before it was stopped), or the capture has seen other work, too."
                .to_owned(),
        );
    }
    if differ(|expert| expert.imatrix > expert.activations) {
        hints.push(
            "The profile has nowhere more: the capture began late or ended early, has losses (see `integrity`), \
             or left passes out as warm-up (see `excluded`); or the imatrix has counts of earlier runs \
             (--in-file)."
                .to_owned(),
        );
    }
    let unknown: Vec<String> = layers
        .iter()
        .filter(|layer| layer.activations.is_none() && !layer.experts.is_empty())
        .map(|layer| layer.layer_id.to_string())
        .collect();
    if !unknown.is_empty() {
        hints.push(format!(
            "The context does not have layers {}: NextN blocks (--nextn) and draft models run in contexts of \
             their own.",
            unknown.join(", ")
        ));
    }
    if hints.is_empty() {
        hints.push(
            "Both have counts that the other one has not: these are different runs, or different texts."
                .to_owned(),
        );
    }
    if let Some([chunks, tokens]) = imatrix.chunks {
        let all = chunks.saturating_mul(tokens);
        hints.push(format!(
            "The imatrix says that it is of {chunks} chunks of {tokens} tokens (-c, --chunks): {all} tokens in \
             every layer."
        ));
    }
    hints
}

/// The smallest whole numbers by which activations and counts of all experts relate, where they all do so in
/// the same way.
fn common_factor(layers: &[LayerReport]) -> Option<(u64, u64)> {
    // Experts that are equal are not listed: one that is active and equal makes the factor 1.
    let mut ratio = None;
    for layer in layers {
        let (ours, theirs) = (layer.activations?, layer.imatrix?);
        let listed = |of: fn(&ExpertReport) -> u64| layer.experts.iter().map(of).sum::<u64>();
        if ours != listed(|expert| expert.activations) || theirs != listed(|expert| expert.imatrix)
        {
            return None;
        }
        for expert in &layer.experts {
            let (ours, theirs) = (expert.activations, expert.imatrix);
            let divisor = divisor(ours, theirs);
            let of_expert = (ours / divisor, theirs / divisor);
            if *ratio.get_or_insert(of_expert) != of_expert {
                return None;
            }
        }
    }
    ratio
}

/// The greatest common divisor of two numbers that are not both 0.
fn divisor(a: u64, b: u64) -> u64 {
    match b {
        0 => a,
        _ => divisor(b, a % b),
    }
}

/// `llama-imatrix` asks for the output of every token, and so its last layer works on all of them.
fn fewer_in_last_layer(context: &ContextProfile) -> Option<String> {
    let (last, others) = context.layers.split_last()?;
    let tokens = others.last()?.total_tokens;
    (last.total_tokens < tokens).then(|| {
        format!(
            "Layer {}, the last one, has {} tokens, and the one before it {tokens}: a program that wants the output \
             of some tokens alone computes the last layer for those. llama-imatrix wants that of all, so this \
             is no capture of it.",
            last.layer_id, last.total_tokens
        )
    })
}

impl Report {
    /// For people: a table, what it says in a sentence, and what can be the reason.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        let Self {
            profile, imatrix, ..
        } = self;
        writeln!(
            text,
            "Profile: {}, context {}",
            printable(&profile.file),
            profile.context
        )?;
        writeln!(text, "Imatrix: {}\n", printable(imatrix))?;
        writeln!(
            text,
            "{:>5}  {:>12}  {:>12}  {:>12}  {:<15}  Experts that differ",
            "Layer", "Tokens", "Activations", "Imatrix", "Weights"
        )?;
        for layer in &self.layers {
            let number = |of: Option<u64>| of.map_or_else(|| "-".to_owned(), |of| of.to_string());
            let weights = match layer.weights_agree {
                true => layer.weights.join(","),
                false => format!("{} (differ)", layer.weights.join(",")),
            };
            let line = format!(
                "{:>5}  {:>12}  {:>12}  {:>12}  {weights:<15}  {}",
                layer.layer_id,
                layer.total_tokens,
                number(layer.activations),
                number(layer.imatrix),
                experts_text(&layer.experts),
            );
            writeln!(text, "{}", line.trim_end())?;
        }
        writeln!(text, "\n{}", self.sentence())?;
        for hint in &self.hints {
            writeln!(text, "{hint}")?;
        }
        Ok(())
    }

    fn sentence(&self) -> String {
        let layers = self.layers.len();
        if self.equal {
            let activations: u64 = self.layers.iter().filter_map(|of| of.activations).sum();
            return format!(
                "Equal: {activations} activations in {layers} layers. The imatrix counts each once per weight."
            );
        }
        let differ = self.layers.iter().filter(|layer| !layer.equal).count();
        format!("Different: in {differ} of {layers} layers.")
    }
}

/// The first experts, with the activations and the count of each.
fn experts_text(experts: &[ExpertReport]) -> String {
    const SHOWN: usize = 3;
    let shown = experts.iter().take(SHOWN).map(|expert| {
        format!(
            "{}: {} and {}",
            expert.expert_id, expert.activations, expert.imatrix
        )
    });
    let mut text = shown.collect::<Vec<_>>().join("; ");
    if experts.len() > SHOWN {
        text += &format!("; and {} more", experts.len() - SHOWN);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::profile::tests::{context, layer, profile};

    /// What llama-imatrix counts of a context: the same for each weight.
    fn imatrix_of(context: &ContextProfile, times: u64) -> Imatrix {
        let layers = context.layers.iter().map(|layer| {
            let counts: Vec<u64> = layer.dense().iter().map(|count| times * count).collect();
            let weights = ["down", "gate", "up"].map(|name| (name, counts.clone()));
            (layer.layer_id, BTreeMap::from(weights))
        });
        Imatrix {
            layers: layers.collect(),
            chunks: Some([3, 64]),
            ..Imatrix::default()
        }
    }

    fn of(contexts: Vec<ContextProfile>, imatrix: &Imatrix) -> Report {
        let profile = profile("stats.json", contexts);
        let context = profile.context(None).unwrap();
        verify(&profile, context, "stats.json", imatrix, "x.gguf")
    }

    fn main_context() -> ContextProfile {
        context(vec![
            layer(0, 4, &[[3, 1], [0, 0], [2, 2]]),
            layer(1, 4, &[[1, 1], [5, 1]]),
        ])
    }

    #[test]
    fn each_weight_counts_every_activation_and_none_is_added() {
        let main = main_context();
        let report = of(vec![main.clone()], &imatrix_of(&main, 1));
        assert!(report.equal, "{report:?}");
        assert!(report.hints.is_empty());
        assert_eq!(report.layers[0].weights, ["down", "gate", "up"]);
        assert_eq!(report.layers[0].imatrix, report.layers[0].activations);
        let text = report.to_text();
        assert!(
            text.contains("\nEqual: 16 activations in 2 layers."),
            "{text}"
        );
    }

    #[test]
    fn layers_without_activation_need_not_be_in_both() {
        let main = main_context();
        let mut imatrix = imatrix_of(&main, 1);
        imatrix
            .layers
            .insert(9, BTreeMap::from([("down", vec![0; 4])]));
        let mut longer = main;
        longer.layers.push(layer(20, 4, &[]));
        let report = of(vec![longer], &imatrix);
        assert!(report.equal, "{report:?}");
        assert_eq!(report.layers.len(), 4);
    }

    #[test]
    fn one_count_more_is_a_difference() {
        let main = main_context();
        for (layer, expert) in [(0, 1), (1, 0), (1, 3)] {
            let mut imatrix = imatrix_of(&main, 1);
            for counts in imatrix.layers.get_mut(&layer).unwrap().values_mut() {
                counts[expert] += 1;
            }
            let report = of(vec![main.clone()], &imatrix);
            assert!(!report.equal);
            let of_layer = &report.layers[usize::from(layer)];
            let [found] = of_layer.experts[..] else {
                panic!("{of_layer:?}");
            };
            assert_eq!(found.expert_id as usize, expert);
            assert_eq!(found.imatrix, found.activations + 1);
            assert!(report.to_text().contains("Different: in 1 of 2 layers."));
            let hints = report.hints.join("\n");
            assert!(hints.contains("The profile has nowhere more"), "{hints}");
            assert!(hints.contains("192 tokens in every layer"), "{hints}");
        }
    }

    #[test]
    fn differences_are_explained() {
        let main = main_context();
        let explained = |contexts: Vec<ContextProfile>, imatrix: &Imatrix, hint: &str| {
            let report = of(contexts, imatrix);
            assert!(!report.equal, "{hint}");
            let hints = report.hints.join("\n");
            assert!(hints.contains(hint), "{hint}: {hints}");
        };
        let same = imatrix_of(&main, 1);

        explained(
            vec![main.clone()],
            &imatrix_of(&main, 2),
            "counts exactly 2 times as much",
        );
        let mut triple = main.clone();
        for expert in triple
            .layers
            .iter_mut()
            .flat_map(|layer| &mut layer.experts)
        {
            expert.activations *= 3;
        }
        explained(vec![triple], &same, "The profile counts exactly 3 times");

        let mut disagree = same.clone();
        disagree.layers.get_mut(&1).unwrap().get_mut("up").unwrap()[0] += 1;
        explained(
            vec![main.clone()],
            &disagree,
            "different counts in the imatrix",
        );

        let mut wide = same.clone();
        for counts in wide.layers.get_mut(&0).unwrap().values_mut() {
            counts.push(0);
        }
        explained(
            vec![main.clone()],
            &wide,
            "4 experts in the profile and 5 in the imatrix",
        );

        let larger = context(vec![layer(0, 4, &[[90, 9]]), layer(1, 4, &[[90, 9]])]);
        explained(vec![main.clone(), larger], &same, "--context 0");

        let mut prompt = main.clone();
        prompt.layers[1] = layer(1, 4, &[[1, 0], [1, 0]]);
        explained(vec![prompt], &same, "Layer 1, the last one, has 1 tokens");

        let mut unseen = main.clone();
        unseen.layers[0] = layer(0, 4, &[[1, 1]]);
        unseen.layers[0].coverage = Some("partly_observed".into());
        explained(vec![unseen], &same, "Not all routing of layers 0 was seen");

        let mut nextn = same.clone();
        nextn
            .layers
            .insert(2, BTreeMap::from([("down", vec![1, 1])]));
        explained(vec![main.clone()], &nextn, "does not have layers 2: NextN");

        let more = context(vec![
            layer(0, 4, &[[3, 9], [0, 3], [9, 2]]),
            main.layers[1].clone(),
        ]);
        explained(vec![more], &same, "The imatrix has nowhere more");
        let other = context(vec![
            layer(0, 4, &[[2, 0], [0, 0], [0, 0], [2, 0]]),
            main.layers[1].clone(),
        ]);
        explained(vec![other], &same, "different runs, or different texts");
    }
}
