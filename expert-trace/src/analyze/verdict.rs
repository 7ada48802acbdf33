//! What the figures say, in plain words.

use serde::Serialize;

use super::{
    balance::Balance,
    cache::{Cache, MIB, Row, SecondHalf},
    input::Input,
    routing::Layer,
};

/// A cache pays when it hits so many points more than its share of the experts, which whole layers would hit.
const PAYS: f64 = 10.0;
/// LRU is worth copying for when it hits so many points more than experts that stay.
const WORTH_COPYING: f64 = 3.0;
/// A list of layers is worth naming when it hits so many points more than the last layers.
const WORTH_NAMING: f64 = 0.5;

/// What follows from the figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// What pays.
    pub recommendation: Recommendation,
    /// The budget that it is for; the largest of the table that is not more than half of all experts.
    pub budget_mib: Option<f64>,
    /// One sentence.
    pub summary: String,
    /// The figures that it rests on, a sentence each.
    pub figures: Vec<String>,
    /// What can go wrong, a sentence each.
    pub warnings: Vec<String>,
    /// Options of llama.cpp that use the budget.
    pub options: Vec<LlamaOption>,
    /// What no figure here can tell, a sentence each.
    pub cannot_know: Vec<String>,
}

/// What pays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Recommendation {
    /// Experts that stay for the whole run.
    StaticPin,
    /// The least recently used one goes.
    Lru,
    /// Neither hits much more than whole layers would.
    Neither,
    /// The file does not tell.
    NotKnown,
}

/// An option of llama.cpp, and what it holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LlamaOption {
    /// The option with its value, as a shell takes it.
    pub option: String,
    /// Bytes of the experts that stay on the device, in MiB.
    pub holds_mib: f64,
    /// Their decode activations, in percent of all.
    pub percent: Option<f64>,
}

impl Verdict {
    /// What follows for a context.
    pub fn of(input: &Input, balance: &Balance, cache: Option<&Cache>) -> Self {
        let row = cache.and_then(reference);
        let (recommendation, summary) = match (cache, row) {
            (Some(cache), Some(row)) => judge(cache, row),
            _ => (
                Recommendation::NotKnown,
                "Whether a cache pays is not known: how many bytes an expert takes is not."
                    .to_owned(),
            ),
        };
        let budget = row.map(|row| row.budget_mib);
        Self {
            recommendation,
            budget_mib: budget,
            summary,
            figures: row
                .zip(cache)
                .map_or_else(Vec::new, |(row, cache)| figures(cache, row)),
            warnings: cache.map_or_else(Vec::new, |cache| warnings(input, cache)),
            options: budget.map_or_else(Vec::new, |mib| options(input, balance, mib)),
            cannot_know: cannot_know(input),
        }
    }
}

/// The row that is judged.
fn reference(cache: &Cache) -> Option<&Row> {
    let up_to_half = cache
        .table
        .iter()
        .rev()
        .find(|row| row.share_percent <= 50.0);
    up_to_half.or(cache.table.first())
}

fn judge(cache: &Cache, row: &Row) -> (Recommendation, String) {
    let place = format!(
        "With {} ({:.0} % of all experts)",
        mib(row.budget_mib),
        row.share_percent
    );
    let Some(SecondHalf { learned_pin, lru }) = row.second_half else {
        let why = match (
            row.static_pin,
            cache.table.iter().any(|row| row.lru.is_some()),
        ) {
            (Some(pin), false) => format!(
                "{place}, a static pin would hit {pin:.1} % if the next workload used each expert as often as this \
                 one; whether it does, and whether LRU would be better, counts do not tell."
            ),
            _ => "Whether a cache pays is not known: too few tokens were generated.".to_owned(),
        };
        return (Recommendation::NotKnown, why);
    };
    let whole_layers = row.share_percent;
    let compared = format!(
        "learned from the first half of the generated tokens, a static pin hits {learned_pin:.1} % of what the \
         second half needs, LRU {lru:.1} %, and whole layers of that size {whole_layers:.1} %"
    );
    let (recommendation, says) = if learned_pin.max(lru) < whole_layers + PAYS {
        (Recommendation::Neither, "neither a static pin nor LRU pays")
    } else if lru > learned_pin + WORTH_COPYING {
        (Recommendation::Lru, "an LRU cache of experts would pay")
    } else {
        (
            Recommendation::StaticPin,
            "pinning the hottest experts would pay",
        )
    };
    (recommendation, format!("{place} {says}: {compared}."))
}

fn figures(cache: &Cache, row: &Row) -> Vec<String> {
    let mut figures = Vec::new();
    if let (Some(lru), Some(belady)) = (row.lru, row.belady) {
        figures.push(format!(
            "Over all generated tokens, LRU hits {lru:.1} % at {}, and Belady, which knows the future, {belady:.1} %.",
            mib(row.budget_mib)
        ));
    }
    if let (Some(lru), Some(pass)) = (row.lru, cache.pass_mib) {
        figures.push(format!(
            "A decode pass touches {} of experts; LRU would copy {} of it, on average.",
            mib(pass.mean),
            mib(pass.mean * (100.0 - lru) / 100.0)
        ));
    }
    if let Some(first) = cache.first_use_percent {
        figures.push(format!(
            "{first:.1} % of the lookups are first uses, which every cache that begins empty misses."
        ));
    }
    figures.push(format!(
        "Judged by these thresholds: a cache pays from {PAYS:.0} points above whole layers, LRU from \
         {WORTH_COPYING:.0} points above a static pin."
    ));
    figures
}

fn warnings(input: &Input, cache: &Cache) -> Vec<String> {
    let mut warnings = Vec::new();
    let below: Vec<String> = cache
        .table
        .iter()
        .filter(|row| row.below_working_set)
        .map(|row| mib(row.budget_mib))
        .collect();
    if let Some(pass) = cache.pass_mib.filter(|_| !below.is_empty()) {
        warnings.push(format!(
            "Below one token's working set ({}), LRU throws out every expert before its layer comes again: {} fall \
             off this cliff.",
            mib(pass.mean),
            below.join(", ")
        ));
    }
    if let Some(row) = cache
        .table
        .iter()
        .rev()
        .find(|row| row.layer_holds_mib.is_some())
    {
        warnings.push(format!(
            "Up to {}, the per-layer caches hold more than the budget ({}): a layer's slice does not fit one token, \
             whose experts stay until the next one.",
            mib(row.budget_mib),
            mib(row.layer_holds_mib.unwrap_or(0.0))
        ));
    }
    if let Some(sampled) = cache.sampled {
        warnings.push(format!(
            "The table is of the first {} of {} activations (--sample).",
            sampled.activations, sampled.of
        ));
    }
    if input
        .routing
        .as_ref()
        .is_some_and(|routing| routing.gaps() > 0)
    {
        warnings.push(
            "The trace has gaps, which caches pass over: hits can be too high or too low."
                .to_owned(),
        );
    }
    if input
        .context
        .layers
        .iter()
        .any(|layer| layer.n_expert.is_none())
    {
        warnings.push(
            "How many experts there are is not known of some layers: as many as the largest id tells; the share of \
             a budget is too high then."
                .to_owned(),
        );
    }
    warnings
}

/// A layer with what its experts take together, and what they do.
struct Whole {
    id: u16,
    bytes: u64,
    decode: u64,
}

/// llama.cpp keeps the experts of a layer in one tensor, and places tensors: the options name layers.
fn options(input: &Input, balance: &Balance, budget_mib: f64) -> Vec<LlamaOption> {
    let budget = (budget_mib * MIB).round() as u64;
    let whole = |(layer, of): (&Layer, &super::balance::LayerBalance)| {
        Some(Whole {
            id: layer.id,
            bytes: layer.expert_bytes? * u64::from(layer.n_expert),
            decode: of.decode.as_ref().map_or(0, |decode| decode.activations),
        })
    };
    let layers: Option<Vec<Whole>> = input
        .layers
        .iter()
        .zip(&balance.layers)
        .map(whole)
        .collect();
    let Some(layers) = layers else {
        return Vec::new();
    };
    let all: u64 = layers.iter().map(|layer| layer.decode).sum();
    let held = |option: String, layers: &[&Whole]| {
        let decode: u64 = layers.iter().map(|layer| layer.decode).sum();
        LlamaOption {
            option,
            holds_mib: layers.iter().map(|layer| layer.bytes).sum::<u64>() as f64 / MIB,
            percent: (all > 0).then(|| 100.0 * decode as f64 / all as f64),
        }
    };
    let mut left = budget;
    let fits = |layer: &&Whole| {
        let rest = left.checked_sub(layer.bytes);
        left = rest.unwrap_or(left);
        rest.is_some()
    };
    let last: Vec<&Whole> = layers.iter().rev().take_while(fits).collect();
    let on_host = layers.len() - last.len();
    let first_on_device = on_host
        .checked_sub(1)
        .map_or(0, |index| layers[index].id + 1);
    let by_number = held(format!("-ncmoe {first_on_device}"), &last);

    let mut order: Vec<&Whole> = layers.iter().collect();
    order.sort_by(|a, b| {
        let [of_a, of_b] =
            [(a, b), (b, a)].map(|(x, y)| u128::from(x.decode) * u128::from(y.bytes));
        of_b.cmp(&of_a).then(b.id.cmp(&a.id))
    });
    let mut left = budget;
    order.retain(|layer| {
        let rest = left.checked_sub(layer.bytes);
        left = rest.unwrap_or(left);
        rest.is_some()
    });
    let on_host: Vec<String> = layers
        .iter()
        .filter(|layer| order.iter().all(|held| held.id != layer.id))
        .map(|layer| layer.id.to_string())
        .collect();
    let named = held(
        format!(
            r"-ot 'blk\.({})\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU'",
            on_host.join("|")
        ),
        &order,
    );
    let is_better = named.percent > by_number.percent.map(|percent| percent + WORTH_NAMING);
    let mut options = vec![by_number];
    if is_better && !on_host.is_empty() {
        options.push(named);
    }
    options
}

fn cannot_know(input: &Input) -> Vec<String> {
    let mut cannot = vec![
        "How fast anything is: hits say how often an expert is there, not what a copy, or computing on the CPU, \
         takes."
            .to_owned(),
        "Whether the budget is free beside dense weights, KV cache and compute buffers.".to_owned(),
        "What other prompts would do: this is one recorded workload.".to_owned(),
        "What prefetching would hide: a miss is a miss here, however early it could be seen coming.".to_owned(),
        "llama.cpp places whole tensors, which have all experts of a layer: its options above hold layers; a pin of \
         single experts, or a cache, takes a program that has one."
            .to_owned(),
    ];
    if input
        .context
        .layers
        .iter()
        .any(|layer| layer.prefill_tokens > 0)
    {
        cannot.push(
            "Prompts: hits are those of generated tokens; prompts fill the caches, and are not counted.".to_owned(),
        );
    }
    cannot
}

/// A size for people.
pub fn mib(mib: f64) -> String {
    match mib {
        mib if mib < 0.1 => format!("{:.1} KiB", mib * 1024.0),
        mib if mib < 10.0 => format!("{mib:.2} MiB"),
        _ => format!("{mib:.0} MiB"),
    }
}
