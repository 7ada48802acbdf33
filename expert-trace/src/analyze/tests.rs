//! Random traces for the tests of this module, and what is known of a real one.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use expert_trace_common::Phase;
use tempfile::NamedTempFile;

use super::{
    Analysis, cache,
    input::{self, FileKind},
    routing::{Layer, Routing},
    time::Time,
};
use crate::{
    formats::tests::TraceOnDisk,
    profile::{
        document,
        tests::{context, layer, profile},
    },
    trace::{Kind, Reason, Row},
};

/// Numbers that are the same in every run: xorshift64.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// From 0 to less than `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }

    /// So many different experts.
    pub fn choose(&mut self, k: u64, n_expert: u64) -> Vec<u16> {
        let mut chosen: Vec<u16> = Vec::new();
        while (chosen.len() as u64) < k {
            // Low numbers more often.
            let expert = (self.below(n_expert) * self.below(n_expert) / n_expert.max(1)) as u16;
            let expert = if chosen.contains(&expert) {
                self.below(n_expert) as u16
            } else {
                expert
            };
            if !chosen.contains(&expert) {
                chosen.push(expert);
            }
        }
        chosen
    }
}

/// A row that a test remembers.
#[derive(Clone, Debug)]
pub struct Known {
    pub decode: bool,
    pub pass: u32,
    pub layer: usize,
    pub experts: Vec<u16>,
}

/// A trace of one sequence, whose prompts have several rows in a pass, and some checks of drafts, too.
pub struct RandomTrace {
    pub layers: Vec<Layer>,
    pub rows: Vec<Known>,
    pub routing: Routing,
    pub sizes: Vec<u64>,
}

impl RandomTrace {
    /// One of at most four layers with at most eight experts each; with `one_size`, all experts are of one.
    pub fn new(seed: u64, one_size: bool) -> Self {
        let mut dice = Dice::new(seed);
        let several_rows = dice.below(2) == 0;
        let mut layers = Vec::new();
        let mut first_key = 0;
        for id in 0..1 + dice.below(4) as u16 {
            let n_expert = 2 + dice.below(7) as u32;
            let size = if one_size { 3 } else { 1 + dice.below(5) };
            layers.push(Layer {
                id: 3 * id,
                n_expert,
                k: 1 + dice.below(n_expert.min(3).into()) as u32,
                expert_bytes: Some(size),
                first_key,
            });
            first_key += n_expert;
        }
        let mut rows = Vec::new();
        for pass in 0..10 + dice.below(30) as u32 {
            let decode = dice.below(6) > 0;
            let tokens = match (decode, several_rows) {
                (true, false) => 1,
                _ => 1 + dice.below(4),
            };
            for (index, layer) in layers.iter().enumerate() {
                for token in 0..tokens {
                    rows.push(Known {
                        // The last one of a prompt can come with the first generated ones.
                        decode: decode && (tokens == 1 || token > 0),
                        pass,
                        layer: index,
                        experts: dice.choose(layer.k.into(), layer.n_expert.into()),
                    });
                }
            }
        }
        let sizes = layers
            .iter()
            .flat_map(|layer| vec![layer.expert_bytes.unwrap_or(0); layer.n_expert as usize]);
        Self {
            sizes: sizes.collect(),
            routing: routing(&layers, &rows),
            layers,
            rows,
        }
    }

    /// It, with all rows generated.
    pub fn without_prompts(mut self) -> Self {
        self.rows.iter_mut().for_each(|row| row.decode = true);
        self.routing = routing(&self.layers, &self.rows);
        self
    }

    /// Rows by pass and layer, in their order.
    pub fn batches(&self) -> Vec<Vec<&Known>> {
        let mut batches: BTreeMap<(u32, usize), Vec<&Known>> = BTreeMap::new();
        for row in &self.rows {
            batches.entry((row.pass, row.layer)).or_default().push(row);
        }
        batches.into_values().collect()
    }

    pub fn key(&self, row: &Known, expert: u16) -> usize {
        self.layers[row.layer].first_key as usize + usize::from(expert)
    }
}

/// Rows of one sequence, in memory.
pub fn routing(layers: &[Layer], rows: &[Known]) -> Routing {
    let mut routing = Routing::new(layers.to_vec(), rows.len(), 0);
    for row in rows {
        let row = Row {
            pass: Some(row.pass),
            layer: Some(layers[row.layer].id),
            phase: Some(if row.decode {
                Phase::Decode
            } else {
                Phase::Prefill
            }),
            sequence: Some(0),
            experts: &row.experts,
            ..Row::of(Kind::Routed)
        };
        routing.push(&row).unwrap();
    }
    routing
}

fn options(budgets: &[u64]) -> cache::Options {
    cache::Options {
        budgets: budgets.iter().map(|mib| mib << 20).collect(),
        sample: usize::MAX,
        seed: 1,
    }
}

fn analyze(path: &Path, budgets: &[u64]) -> Analysis {
    let input = input::read(path, None, None).unwrap();
    Analysis::of("test", &input, &options(budgets), &mut |_, _, _| {})
}

/// Of 128 tokens that Qwen3-30B-A3B has generated, as the README beside the file has it: each figure to the
/// digits that are printed there.
#[test]
fn published_figures_of_a_real_trace() {
    let path = env::var_os("EXPERT_TRACE_ROUTE_TRACE").map_or_else(
        || {
            let root = Path::new(env!("CARGO_MANIFEST_DIR"));
            root.join("../../shared/data/routes/qwen3-30b-a3b.route.csv")
        },
        PathBuf::from,
    );
    if !path.exists() {
        say!(
            "{} is not there: no published figures were compared",
            path.display()
        );
        return;
    }
    let budgets = [500, 1000, 2000, 4000, 6000];
    let analysis = analyze(&path, &budgets);
    assert_eq!(analysis.source.kind, FileKind::RouteTrace);
    let one = |value: Option<f64>| format!("{:.1}", value.unwrap());
    let cache = analysis.cache.unwrap();
    let table = cache.table.iter().map(|row| {
        [row.belady, row.lru, row.lfu, row.layer_lru, row.layer_lfu]
            .map(one)
            .join(" ")
    });
    let expected = [
        "45.3 0.0 26.6 38.3 38.3",
        "62.7 37.7 40.2 42.3 45.1",
        "79.4 56.5 58.6 59.4 63.3",
        "92.7 80.3 80.8 79.7 81.7",
        "96.6 92.1 92.0 90.3 91.0",
    ];
    assert_eq!(table.collect::<Vec<_>>(), expected);
    let used = analysis.balance.decode.used.unwrap();
    let mean = format!("{:.0}", used.mean);
    assert_eq!((&*mean, used.min, used.max), ("64", 33, 107));
    let first = analysis.balance.layers[0].decode.as_ref().unwrap();
    assert_eq!(first.used, 107);
    let time = analysis.time.unwrap();
    let overlap = time.overlap.iter().map(|of| (of.lag, one(of.percent)));
    let overlap: Vec<_> = overlap.filter(|(lag, _)| [1, 8].contains(lag)).collect();
    assert_eq!(overlap, [(1, "38.0".to_owned()), (8, "26.7".to_owned())]);
    let guess = time.predictors;
    let guess = [guess.previous_token, guess.static_hot, guess.prompt_hot];
    assert_eq!(guess.map(one), ["38.0", "37.6", "17.9"]);
    assert!(cache.table[0].below_working_set && !cache.table[1].below_working_set);
    assert!(
        cache.table[0]
            .layer_holds_mib
            .is_some_and(|mib| mib > 500.0)
    );
}

/// Sets of experts, one after the other, of each layer.
fn by_layer(trace: &RandomTrace) -> Vec<Vec<&Known>> {
    let of = |layer| {
        trace
            .rows
            .iter()
            .filter(move |row| row.layer == layer)
            .collect()
    };
    (0..trace.layers.len()).map(of).collect()
}

fn common(a: &[u16], b: &[u16]) -> usize {
    let (a, b): (BTreeSet<_>, BTreeSet<_>) = (a.iter().collect(), b.iter().collect());
    a.intersection(&b).count()
}

#[test]
fn overlap_is_that_of_sets() {
    let mut compared = 0;
    for seed in 0..200 {
        let trace = RandomTrace::new(seed, true);
        let time = Time::of(&trace.routing, None, &mut |_, _, _| {});
        for of in &time.overlap {
            let (mut hits, mut chosen, mut pairs) = (0, 0, 0);
            for rows in by_layer(&trace) {
                for (index, row) in rows.iter().enumerate() {
                    // All from that one on were generated.
                    let Some(from) = index.checked_sub(of.lag) else {
                        continue;
                    };
                    if rows[from..=index].iter().all(|row| row.decode) {
                        hits += common(&row.experts, &rows[from].experts);
                        chosen += row.experts.len();
                        pairs += 1;
                    }
                }
            }
            assert_eq!(of.pairs, pairs, "{seed}");
            let expected = (pairs > 0).then(|| 100.0 * hits as f64 / chosen as f64);
            assert_eq!(of.percent, expected, "{seed}");
            compared += pairs;
        }
    }
    assert!(compared > 5_000, "{compared}");
}

#[test]
fn hot_lists_are_those_of_counts() {
    for seed in 0..200 {
        let trace = RandomTrace::new(seed, true);
        let guess = Time::of(&trace.routing, None, &mut |_, _, _| {}).predictors;
        let score = |learn: &dyn Fn(&Known) -> bool| {
            let (mut hits, mut chosen) = (0, 0);
            for (layer, rows) in trace.layers.iter().zip(by_layer(&trace)) {
                let mut counts: BTreeMap<u16, i64> = BTreeMap::new();
                for row in rows.iter().filter(|row| learn(row)) {
                    row.experts
                        .iter()
                        .for_each(|id| *counts.entry(*id).or_default() -= 1);
                }
                let mut order: Vec<(i64, u16)> = counts.iter().map(|(id, n)| (*n, *id)).collect();
                order.sort();
                let hot: Vec<u16> = order
                    .iter()
                    .take(layer.k as usize)
                    .map(|(_, id)| *id)
                    .collect();
                let pairs = rows
                    .windows(2)
                    .filter(|pair| pair.iter().all(|row| row.decode));
                for pair in pairs {
                    hits += common(&pair[1].experts, &hot);
                    chosen += hot.len().max(layer.k as usize);
                }
            }
            let learned = trace.rows.iter().any(learn);
            (learned && chosen > 0).then(|| 100.0 * hits as f64 / chosen as f64)
        };
        assert_eq!(guess.static_hot, score(&|row| row.decode), "{seed}");
        assert_eq!(guess.prompt_hot, score(&|row| !row.decode), "{seed}");
    }
}

#[test]
fn reuse_and_growth_are_those_of_sets() {
    for seed in 0..200 {
        let trace = RandomTrace::new(seed, false);
        let time = Time::of(&trace.routing, Some(&trace.sizes), &mut |_, _, _| {});
        let mut distances: Vec<u64> = Vec::new();
        let mut first_uses = 0;
        let batches = trace.batches();
        let uses = |batch: &[&Known], of: usize, decode: bool| {
            let mut rows = batch.iter().filter(|row| row.decode || !decode);
            rows.any(|row| row.experts.iter().any(|id| trace.key(row, *id) == of))
        };
        for key in 0..trace.sizes.len() {
            let layer = trace
                .layers
                .iter()
                .rposition(|layer| layer.first_key as usize <= key);
            let of_layer = batches.iter().filter(|batch| Some(batch[0].layer) == layer);
            let of_layer: Vec<_> = of_layer.collect();
            for (index, batch) in of_layer.iter().enumerate() {
                if !uses(batch, key, true) {
                    continue;
                }
                let before = (0..index)
                    .rev()
                    .find(|before| uses(of_layer[*before], key, false));
                match before {
                    Some(before) => distances.push((index - before) as u64),
                    None => first_uses += 1,
                }
            }
        }
        distances.sort_unstable();
        assert_eq!(time.reuse.first_uses, first_uses, "{seed}");
        assert_eq!(time.reuse.uses, distances.len() as u64, "{seed}");
        assert_eq!(time.reuse.max, distances.last().copied(), "{seed}");
        let rank = |percent: usize| (distances.len() * percent).div_ceil(100);
        for (percent, found) in [(50, time.reuse.p50), (90, time.reuse.p90)] {
            let expected = rank(percent).checked_sub(1).map(|rank| distances[rank]);
            assert_eq!(found, expected, "{seed}");
        }
        let passes = trace
            .rows
            .iter()
            .filter(|row| row.decode)
            .map(|row| row.pass);
        let passes: Vec<u32> = passes.collect::<BTreeSet<_>>().into_iter().collect();
        assert!(time.growth.len() >= 4);
        for point in &time.growth {
            let last = passes[point.passes as usize - 1];
            let rows = trace
                .rows
                .iter()
                .filter(|row| row.decode && row.pass <= last);
            let used: BTreeSet<usize> = rows
                .flat_map(|row| row.experts.iter().map(|id| trace.key(row, *id)))
                .collect();
            assert_eq!(point.experts, used.len() as f64 / trace.layers.len() as f64);
            let bytes: u64 = used.iter().map(|key| trace.sizes[*key]).sum();
            assert_eq!(point.mib, Some(bytes as f64 / cache::MIB));
        }
    }
}

#[test]
fn pairs_are_those_of_sets() {
    let mut listed = 0;
    for seed in 0..100 {
        let trace = RandomTrace::new(seed, true);
        let structure = super::structure::Structure::of(
            &context(vec![layer(0, 4, &[[1, 1]])]),
            &trace.layers,
            Some(&trace.routing),
            &mut |_, _, _| {},
        );
        let layer_of = |id: u16| {
            trace
                .layers
                .iter()
                .position(|layer| layer.id == id)
                .unwrap()
        };
        for pair in structure.co_activation.iter().chain(&structure.transitions) {
            let rows = by_layer(&trace);
            let [a, b] = pair.layers.map(|id| &rows[layer_of(id)]);
            let has = |row: &Known, of: usize| row.experts.contains(&pair.experts[of]);
            let tokens: Vec<_> = a.iter().zip(b).collect();
            let of_a = tokens.iter().filter(|(a, _)| has(a, 0)).count();
            let of_b = tokens.iter().filter(|(_, b)| has(b, 1)).count();
            let both = tokens
                .iter()
                .filter(|(a, b)| has(a, 0) && has(b, 1))
                .count();
            assert_eq!(pair.tokens, both as u64, "{seed} {pair:?}");
            assert_eq!(pair.percent, 100.0 * both as f64 / of_a as f64);
            let lift = both as f64 * tokens.len() as f64 / (of_a * of_b) as f64;
            assert_eq!(pair.lift, lift, "{seed} {pair:?}");
            listed += 1;
        }
    }
    assert!(listed > 200, "{listed}");
}

fn routed(pass: u32, sequence: Option<u16>, experts: &[u16]) -> Row<'_> {
    Row {
        context: Some(0),
        pass: Some(pass),
        phase: Some(Phase::Decode),
        layer: Some(4),
        sequence,
        experts,
        ..Row::of(Kind::Routed)
    }
}

#[test]
fn gaps_break_what_follows_and_unknown_sequences_are_refused() {
    let gap = Row {
        context: Some(0),
        pass: Some(2),
        reason: Some(Reason::PassesLost),
        ..Row::of(Kind::Gap)
    };
    let rows = |between: Option<Row<'static>>| {
        let mut rows = vec![routed(0, Some(1), &[0, 1]), routed(1, Some(1), &[0, 2])];
        rows.extend(between);
        rows.extend([routed(2, Some(1), &[0, 2]), routed(3, Some(1), &[5, 2])]);
        rows
    };
    let time = |rows: &[Row<'_>]| {
        let trace = TraceOnDisk::new(rows);
        analyze(trace.path(), &[]).time.unwrap()
    };
    let whole = time(&rows(None));
    assert_eq!((whole.overlap[0].pairs, whole.overlap[1].pairs), (3, 2));
    assert_eq!(whole.overlap[0].percent, Some(100.0 * 4.0 / 6.0));
    assert_eq!((whole.reuse.uses, whole.reuse.first_uses), (4, 4));
    let broken = time(&rows(Some(gap)));
    assert_eq!((broken.overlap[0].pairs, broken.overlap[1].pairs), (2, 0));
    assert_eq!((broken.reuse.uses, broken.reuse.first_uses), (2, 6));

    let several = [
        routed(0, None, &[0, 1]),
        routed(0, None, &[2, 3]),
        routed(1, None, &[0, 1]),
    ];
    let refused = time(&several);
    assert!(
        refused
            .refused
            .is_some_and(|why| why.contains("sequences are not known"))
    );
    assert_eq!(
        (refused.overlap.len(), refused.predictors.previous_token),
        (0, None)
    );
    assert_eq!(refused.reuse.uses, 2, "passes are known");
    assert_eq!(
        time(&[several[0], several[2]]).refused,
        None,
        "one row in each pass"
    );
}

#[test]
fn token_ids_are_told_of_when_they_are_there() {
    let experts = [[0, 1], [2, 3]];
    let row = |pass: u32| Row {
        token: Some(100 + pass as i32 % 2),
        ..routed(pass, Some(0), &experts[pass as usize % 2])
    };
    let rows: Vec<Row<'_>> = (0..30).map(row).collect();
    let tokens = analyze(TraceOnDisk::new(&rows).path(), &[])
        .structure
        .tokens
        .unwrap();
    assert_eq!((tokens.distinct, tokens.looked_at), (2, 2));
    let first = &tokens.by_token[0];
    assert_eq!((first.token, first.rows), (100, 15));
    let experts: Vec<_> = first
        .experts
        .iter()
        .map(|of| (of.expert_id, of.rows, of.lift))
        .collect();
    assert_eq!(experts, [(0, 15, 2.0), (1, 15, 2.0)]);
    assert_eq!(tokens.by_expert.len(), 4);
    let without = [routed(0, Some(0), &[1])];
    assert_eq!(
        analyze(TraceOnDisk::new(&without).path(), &[])
            .structure
            .tokens,
        None
    );
}

#[test]
fn counts_tell_what_they_can() {
    let mut of = profile(
        "a",
        vec![context(vec![layer(0, 4, &[[0, 8], [4, 0], [0, 2]])])],
    );
    let file = |of: &crate::profile::Profile| {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&document::to_json(of).unwrap()).unwrap();
        file
    };
    let unknown = analyze(file(&of).path(), &[1]);
    assert_eq!(unknown.source.kind, FileKind::Counts);
    assert_eq!((unknown.time, unknown.cache), (None, None));
    assert!(unknown.unanswered[1].why.contains("not known of layers 0"));
    of.models[0]["layer_bytes"] =
        serde_json::json!([{"layer_id": 0, "expert_bytes": 1 << 20, "dense_bytes": 0}]);
    let known = analyze(file(&of).path(), &[1, 2]);
    let cache = known.cache.as_ref().unwrap();
    let pins: Vec<_> = cache
        .table
        .iter()
        .map(|row| (row.static_pin, row.lru))
        .collect();
    assert_eq!(pins, [(Some(80.0), None), (Some(100.0), None)]);
    let text = known.to_text();
    for part in [
        "not known: With 2.00 MiB (50 %",
        "cache: of counts",
        "-ncmoe 1",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

/// Nothing but a message, whatever is in the file.
#[test]
fn files_that_nobody_vouches_for_are_refused() {
    let refused = |content: &[u8]| {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        format!("{:#}", input::read(file.path(), None, None).unwrap_err())
    };
    for (content, why) in [
        (&b""[..], "it is empty"),
        (b"GGUF....", "neither JSON nor an Arrow stream"),
        (b"# route_trace v2\n", "version 'v2'"),
        (
            b"# route_trace v1\nturn,phase,step,layer,slot,expert\n0,0,0,0,0,9999\n",
            "expert 9999",
        ),
        (
            b"# route_trace v1\nturn,phase,step,layer,slot,expert\n",
            "no context of it routed",
        ),
        (b"\xff\xff\xff\xff\x08\0\0\0", "before its schema"),
        (
            b"{\"schema\": {\"name\": \"x\", \"version\": 1}}",
            "its schema is 'x'",
        ),
    ] {
        let error = refused(content);
        assert!(error.contains(why), "{why}: {error}");
    }
    let rows = [routed(0, Some(1), &[0, 1]), routed(1, Some(1), &[0, 1])];
    let trace = fs::read(TraceOnDisk::new(&rows).path()).unwrap();
    let mut read = 0;
    for end in (0..trace.len()).step_by(3) {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&trace[..end]).unwrap();
        read += usize::from(input::read(file.path(), None, None).is_ok());
        let mut damaged = trace.clone();
        damaged[end] ^= 0x55;
        fs::write(file.path(), &damaged).unwrap();
        if let Ok(input) = input::read(file.path(), None, None) {
            let _ = Analysis::of("x", &input, &options(&[]), &mut |_, _, _| {});
        }
    }
    assert!(read > 0, "what stands before the cut is analyzed");
    let directory = tempfile::tempdir().unwrap();
    let error = input::read(directory.path(), None, None).unwrap_err();
    assert!(
        format!("{error:#}").contains("no regular file"),
        "{error:#}"
    );
}
