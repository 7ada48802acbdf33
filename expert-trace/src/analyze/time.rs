//! How the choice of experts changes from token to token.

use serde::Serialize;

use super::{
    Stage,
    cache::MIB,
    lookups::Distinct,
    routing::{Routing, Step},
    sequences::Sequences,
};

/// How far back tokens are compared.
const LAGS: [usize; 4] = [1, 2, 4, 8];

/// Why nothing is said of sequences.
const NO_SEQUENCES: &str = "sequences are not known, and decode passes have several rows: which of them is the \
                            token after which is not known; trace with a build whose ubatch can be read (doctor), \
                            or one sequence at a time";

/// Answers over time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Time {
    /// Why nothing is said of tokens that follow each other: `overlap` is empty then, and no predictor known.
    pub refused: Option<String>,
    /// Of a generated token's experts, how many the token so far back had chosen, too: same sequence, same
    /// layer, both generated.
    pub overlap: Vec<Overlap>,
    /// What can be guessed before a token is routed.
    pub predictors: Predictors,
    /// How long ago an expert was used last when a decode pass uses it.
    pub reuse: Reuse,
    /// Distinct experts of decode passes.
    pub growth: Vec<Growth>,
}

/// How alike tokens are that stand so far apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Overlap {
    /// Tokens back.
    pub lag: usize,
    /// Experts in common / experts chosen, in percent; `None` without such pairs.
    pub percent: Option<f64>,
    /// Pairs of rows that were compared.
    pub pairs: u64,
}

/// Share of the chosen experts that a list of k experts of the layer has, in percent. The first three are tested
/// on the same tokens: those whose token before is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Predictors {
    /// Tokens that were tested, summed over the layers.
    pub tested: u64,
    /// Those of the token before.
    pub previous_token: Option<f64>,
    /// The k experts that generated tokens chose most often in the whole run.
    pub static_hot: Option<f64>,
    /// The k experts that prompts chose most often; `None` without prompts.
    pub prompt_hot: Option<f64>,
    /// The k experts that generated tokens chose most often in the first half of the run, tested on the rest.
    pub first_half_hot: Option<f64>,
    /// The token before, tested on the same rest.
    pub previous_token_second_half: Option<f64>,
}

/// Distances between uses of an expert, in passes of its layer: 1 when the pass before used it, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Reuse {
    /// Decode lookups whose expert was used before.
    pub uses: u64,
    /// Decode lookups of experts that were not used since the beginning, or since a gap.
    pub first_uses: u64,
    /// Half of the distances are at most this.
    pub p50: Option<u64>,
    /// 90 % are.
    pub p90: Option<u64>,
    /// The longest one.
    pub max: Option<u64>,
}

/// The working set after so many decode passes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Growth {
    /// Decode passes.
    pub passes: u64,
    /// Distinct experts that they have used, per layer on average.
    pub experts: f64,
    /// Their bytes over all layers, in MiB, where sizes are known.
    pub mib: Option<f64>,
}

impl Time {
    /// What a trace tells. `sizes` are those of all experts, where they are known.
    pub fn of(
        routing: &Routing,
        sizes: Option<&[u64]>,
        progress: &mut dyn FnMut(Stage, u64, u64),
    ) -> Self {
        let (reuse, growth) = uses(routing, sizes, progress);
        let refused = has_unknown_sequences(routing);
        let (overlap, predictors) = match refused {
            true => (Vec::new(), Predictors::default()),
            false => overlap(routing, progress),
        };
        Self {
            refused: refused.then(|| NO_SEQUENCES.to_owned()),
            overlap,
            predictors,
            reuse,
            growth,
        }
    }
}

fn has_unknown_sequences(routing: &Routing) -> bool {
    routing.batches().any(|batch| {
        let decode = batch.rows().filter(|row| row.decode);
        let unknown = decode.clone().any(|row| row.sequence.is_none());
        unknown && decode.count() > 1
    })
}

/// Activations by expert: of prompts, of generated tokens, and of those in the first half.
struct Counts {
    prefill: Vec<u64>,
    decode: Vec<u64>,
    first_half: Vec<u64>,
    /// The pass after which the first half ends is the one of the batch before this one.
    half: usize,
}

impl Counts {
    fn of(routing: &Routing) -> Self {
        let keys = routing.keys();
        let all: usize = routing.batches().map(|batch| batch.decode_rows()).sum();
        let mut counts = Self {
            prefill: vec![0; keys],
            decode: vec![0; keys],
            first_half: Vec::new(),
            half: routing.len(),
        };
        let mut rows = 0;
        let mut last_pass = None;
        for batch in routing.batches() {
            let begins_pass = last_pass != Some(batch.pass);
            if begins_pass && counts.first_half.is_empty() && 2 * rows >= all && all > 0 {
                counts.first_half = counts.decode.clone();
                counts.half = batch.index;
            }
            last_pass = Some(batch.pass);
            rows += batch.decode_rows();
            let first_key = routing.layers()[batch.layer].first_key as usize;
            for row in batch.rows() {
                let of = match row.decode {
                    true => &mut counts.decode,
                    false => &mut counts.prefill,
                };
                row.experts
                    .iter()
                    .for_each(|id| of[first_key + usize::from(*id)] += 1);
            }
        }
        counts
    }
}

/// The k experts of each layer with most activations, of equals those with lower ids.
fn hottest(routing: &Routing, counts: &[u64]) -> Option<Vec<bool>> {
    if counts.iter().all(|count| *count == 0) {
        return None;
    }
    let mut hot = vec![false; counts.len()];
    for layer in routing.layers() {
        let mut keys: Vec<usize> = layer.keys().filter(|key| counts[*key] > 0).collect();
        keys.sort_by_key(|key| (std::cmp::Reverse(counts[*key]), *key));
        keys.iter()
            .take(layer.k as usize)
            .for_each(|key| hot[*key] = true);
    }
    Some(hot)
}

/// Hits of what was tested.
#[derive(Default)]
struct Score {
    hits: u64,
    of: u64,
}

impl Score {
    fn add(&mut self, hits: usize, of: usize) {
        self.hits += hits as u64;
        self.of += of as u64;
    }

    fn percent(&self) -> Option<f64> {
        (self.of > 0).then(|| 100.0 * self.hits as f64 / self.of as f64)
    }
}

fn overlap(
    routing: &Routing,
    progress: &mut dyn FnMut(Stage, u64, u64),
) -> (Vec<Overlap>, Predictors) {
    let counts = Counts::of(routing);
    let lists = [&counts.decode, &counts.prefill, &counts.first_half];
    let lists = lists.map(|counts| hottest(routing, counts));
    let mut hot: [Score; 3] = Default::default();
    let mut lagged: [Score; LAGS.len()] = Default::default();
    let mut pairs = [0_u64; LAGS.len()];
    let mut later = Score::default();
    let mut chosen = Chosen::default();
    let mut sequences = Sequences::default();
    for step in routing.steps() {
        let batch = match step {
            Step::Gap(layer) => {
                sequences.gap(layer);
                continue;
            }
            Step::Batch(batch) => batch,
        };
        if batch.index % (1 << 14) == 0 {
            progress(Stage::Time, batch.index as u64, routing.len() as u64);
        }
        let first_key = routing.layers()[batch.layer].first_key as usize;
        for row in batch.rows() {
            if !row.decode {
                sequences.prompt(batch.layer, &row);
                continue;
            }
            let tail = sequences.generated(batch.layer, &row);
            if tail.back(1).is_none() {
                continue;
            }
            let k = row.experts.len();
            chosen.set(row.experts);
            for (index, lag) in LAGS.iter().enumerate() {
                let Some(other) = tail.back(*lag) else { break };
                let common = chosen.common(routing.experts_of(other));
                lagged[index].add(common, k);
                pairs[index] += 1;
                if *lag == 1 && batch.index >= counts.half {
                    later.add(common, k);
                }
            }
            for (index, list) in lists.iter().enumerate() {
                // What was learned in the first half is tested on the second.
                let is_tested = index < 2 || batch.index >= counts.half;
                if let Some(list) = list.as_ref().filter(|_| is_tested) {
                    let ids = row.experts.iter();
                    let hits = ids.filter(|id| list[first_key + usize::from(**id)]);
                    hot[index].add(hits.count(), k);
                }
            }
        }
    }
    let overlap = LAGS.iter().zip(lagged.iter().zip(pairs));
    let overlap: Vec<Overlap> = overlap
        .map(|(lag, (score, pairs))| Overlap {
            lag: *lag,
            percent: score.percent(),
            pairs,
        })
        .collect();
    let predictors = Predictors {
        tested: pairs[0],
        previous_token: overlap[0].percent,
        static_hot: hot[0].percent(),
        prompt_hot: hot[1].percent(),
        first_half_hot: hot[2].percent(),
        previous_token_second_half: later.percent(),
    };
    (overlap, predictors)
}

/// A set of experts of a layer.
#[derive(Default)]
struct Chosen {
    stamps: Vec<u64>,
    now: u64,
}

impl Chosen {
    fn set(&mut self, experts: &[u16]) {
        self.now += 1;
        for expert in experts {
            let index = usize::from(*expert);
            if index >= self.stamps.len() {
                self.stamps.resize(index + 1, 0);
            }
            self.stamps[index] = self.now;
        }
    }

    fn common(&self, experts: &[u16]) -> usize {
        let is_in = |expert: &&u16| self.stamps.get(usize::from(**expert)) == Some(&self.now);
        experts.iter().filter(is_in).count()
    }
}

/// Distances between uses, and the growth of the working set.
fn uses(
    routing: &Routing,
    sizes: Option<&[u64]>,
    progress: &mut dyn FnMut(Stage, u64, u64),
) -> (Reuse, Vec<Growth>) {
    let keys = routing.keys();
    let mut distinct = Distinct::new(keys);
    let mut lookups = Vec::new();
    // Passes of a layer are numbered from 1; 0 is never.
    let mut used_at = vec![0_u32; keys];
    let mut passes = vec![0_u32; routing.layers().len()];
    let mut known_since = vec![0_u32; routing.layers().len()];
    let mut distances: Vec<u64> = Vec::new();
    let mut first_uses = 0;
    let mut growing = Growing::new(keys, routing.layers().len());
    for step in routing.steps() {
        let batch = match step {
            Step::Gap(Some(layer)) => {
                known_since[layer] = passes[layer] + 1;
                continue;
            }
            Step::Gap(None) => {
                for (since, passes) in known_since.iter_mut().zip(&passes) {
                    *since = passes + 1;
                }
                continue;
            }
            Step::Batch(batch) => batch,
        };
        if batch.index % (1 << 14) == 0 {
            progress(Stage::Reuse, batch.index as u64, routing.len() as u64);
        }
        lookups.clear();
        distinct.find(routing, &batch, &mut lookups);
        passes[batch.layer] += 1;
        let now = passes[batch.layer];
        let since = known_since[batch.layer].max(1);
        for lookup in &lookups {
            let key = lookup.key();
            let before = std::mem::replace(&mut used_at[key], now);
            if !lookup.is_decode() {
                continue;
            }
            growing.add(batch.pass, key, sizes);
            if before < since {
                first_uses += 1;
                continue;
            }
            let distance = (now - before) as usize;
            if distance >= distances.len() {
                distances.resize(distance + 1, 0);
            }
            distances[distance] += 1;
        }
    }
    let uses: u64 = distances.iter().sum();
    let quantile = |percent: u64| {
        let mut seen = 0;
        let wanted = (u128::from(uses) * u128::from(percent)).div_ceil(100) as u64;
        let reached = distances.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        reached.filter(|_| uses > 0).map(|distance| distance as u64)
    };
    let reuse = Reuse {
        uses,
        first_uses,
        p50: quantile(50),
        p90: quantile(90),
        max: quantile(100),
    };
    (reuse, growing.end())
}

/// The working set while it grows.
struct Growing {
    used: Vec<bool>,
    experts: u64,
    bytes: Option<u64>,
    layers: usize,
    pass: Option<u32>,
    passes: u64,
    points: Vec<Growth>,
}

impl Growing {
    fn new(keys: usize, layers: usize) -> Self {
        Self {
            used: vec![false; keys],
            experts: 0,
            bytes: Some(0),
            layers,
            pass: None,
            passes: 0,
            points: Vec::new(),
        }
    }

    fn add(&mut self, pass: u32, key: usize, sizes: Option<&[u64]>) {
        if self.pass != Some(pass) {
            if self.passes.is_power_of_two() {
                self.point();
            }
            self.pass = Some(pass);
            self.passes += 1;
        }
        if !std::mem::replace(&mut self.used[key], true) {
            self.experts += 1;
            let size = sizes.map(|sizes| sizes[key]);
            self.bytes = self.bytes.zip(size).map(|(bytes, size)| bytes + size);
        }
    }

    fn point(&mut self) {
        self.points.push(Growth {
            passes: self.passes,
            experts: self.experts as f64 / self.layers as f64,
            mib: self.bytes.map(|bytes| bytes as f64 / MIB),
        });
    }

    fn end(mut self) -> Vec<Growth> {
        if self.passes > 0 {
            self.point();
        }
        self.points
    }
}
