//! What tracing costs a program, next to doing nothing, and to what one would use instead.
//!
//! All arms are copies of one process, made before it has decoded anything: they share the weights in
//! memory, and have no past. Each decodes the same tokens by turns.
//!
//! Other tracers on the machine can set breakpoints in all processes that map llama.cpp's libraries: rounds
//! in which an untraced process has one are dropped.

use std::{
    collections::BTreeMap,
    num::NonZero,
    panic::{self, AssertUnwindSafe},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use expert_trace_tests::{
    bpftrace::{self, Running, Script},
    breakpoints::Places,
    comparison::{self, Goal, Ratio, Verdict},
    cpu_time,
    oracle::{Callback, Oracle},
    tracer::{self, Attached, Counts, Stats},
};
use serde_json::{Value, json};

use super::Effort;
use crate::support::{Files, driver, known_small, known_wide, reference};

/// A way to run the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Arm {
    Untraced,
    /// Another process of that kind: what is found here is not the tracer's.
    UntracedToo,
    Attached,
    Logged,
    Traced,
    /// After a tracer was there.
    Detached,
    TopK,
    MulMatId,
    CountScript,
    EveryNodeScript,
}

impl Arm {
    fn name(self) -> &'static str {
        match self {
            Arm::Untraced => "untraced",
            Arm::UntracedToo => "untraced, another process",
            Arm::Attached => "attach",
            Arm::Logged => "attach --log",
            Arm::Traced => "attach --trace",
            Arm::Detached => "after attach has ended",
            Arm::TopK => "callback on ffn_moe_topk",
            Arm::MulMatId => "callback on MUL_MAT_ID",
            Arm::CountScript => "bpftrace, the same counts",
            Arm::EveryNodeScript => "bpftrace, empty probe on every node",
        }
    }

    fn callback(self) -> Callback {
        match self {
            Arm::TopK => Callback::TopK,
            Arm::MulMatId => Callback::MulMatId,
            _ => Callback::None,
        }
    }

    /// Every how many rounds it has its turn: what has no goal needs not be known as well.
    fn every(self) -> u64 {
        match self {
            Arm::UntracedToo | Arm::MulMatId => 2,
            _ => 1,
        }
    }
}

/// Those that are processes side by side.
const COPIES: [Arm; 8] = [
    Arm::Untraced,
    Arm::UntracedToo,
    Arm::Attached,
    Arm::Logged,
    Arm::Traced,
    Arm::Detached,
    Arm::TopK,
    Arm::MulMatId,
];

/// Those that take turns on one process, because bpftrace probes all that map the library.
const SCRIPTED: [Arm; 3] = [Arm::Untraced, Arm::CountScript, Arm::EveryNodeScript];

struct Comparison {
    arm: Arm,
    baseline: Arm,
    goal: Option<Goal>,
}

const fn compare(arm: Arm, baseline: Arm, goal: Option<Goal>) -> Comparison {
    Comparison {
        arm,
        baseline,
        goal,
    }
}

const COMPARISONS: [Comparison; 10] = [
    compare(Arm::UntracedToo, Arm::Untraced, None),
    compare(Arm::Attached, Arm::Untraced, Some(Goal::AtMost(0.005))),
    compare(Arm::Logged, Arm::Untraced, Some(Goal::AtMost(0.01))),
    compare(Arm::Traced, Arm::Untraced, Some(Goal::AtMost(0.01))),
    compare(Arm::Detached, Arm::Untraced, Some(Goal::Unchanged)),
    compare(Arm::TopK, Arm::Untraced, None),
    compare(Arm::Attached, Arm::TopK, Some(Goal::NotMore)),
    compare(Arm::MulMatId, Arm::Untraced, None),
    compare(Arm::CountScript, Arm::Untraced, None),
    compare(Arm::EveryNodeScript, Arm::Untraced, None),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Prompt,
    Decode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Measure {
    /// What a clock shows.
    Wall,
    /// What the target's threads use of processors.
    Cpu,
}

const ASPECTS: [(Phase, Measure); 4] = [
    (Phase::Prompt, Measure::Wall),
    (Phase::Prompt, Measure::Cpu),
    (Phase::Decode, Measure::Wall),
    (Phase::Decode, Measure::Cpu),
];

/// Seconds.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    wall: f64,
    cpu: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    prompt: Times,
    decode: Times,
}

impl Sample {
    fn of(&self, (phase, measure): (Phase, Measure)) -> f64 {
        let times = match phase {
            Phase::Prompt => self.prompt,
            Phase::Decode => self.decode,
        };
        match measure {
            Measure::Wall => times.wall,
            Measure::Cpu => times.cpu,
        }
    }
}

/// What an arm decodes in its turn: from an empty context each time, a prompt and tokens after it.
#[derive(Clone, Copy)]
struct Unit {
    repeats: u64,
    /// Tokens, in one pass.
    prompt: u64,
    /// Tokens, in a pass each.
    decode: u64,
}

impl Unit {
    const PROMPT_START: u64 = 1000;
    const DECODE_START: u64 = 5000;

    fn passes(&self) -> u64 {
        self.repeats * (1 + self.decode)
    }

    fn tokens(&self, phase: Phase) -> u64 {
        self.repeats
            * match phase {
                Phase::Prompt => self.prompt,
                Phase::Decode => self.decode,
            }
    }

    fn passes_of(&self, phase: Phase) -> u64 {
        match phase {
            Phase::Prompt => self.repeats,
            Phase::Decode => self.repeats * self.decode,
        }
    }

    fn run(&self, target: &mut Oracle) -> Sample {
        // What had its turn before has come to rest.
        thread::sleep(REST);
        let prompt = format!("prompt 0 {} {}", self.prompt, Self::PROMPT_START);
        let decode = format!("forced 0 {} {}", self.decode, Self::DECODE_START);
        let mut sample = Sample::default();
        for _ in 0..self.repeats {
            time(target, &prompt, &mut sample.prompt);
            time(target, &decode, &mut sample.decode);
            target.command("clear 0").unwrap();
        }
        sample
    }
}

/// libgomp's threads look for work in a loop for some milliseconds after an answer, and CPU time of running
/// threads is known by ticks of the scheduler alone. After this, they wait.
const REST: Duration = Duration::from_millis(20);

fn time(target: &mut Oracle, command: &str, times: &mut Times) {
    let (computed, start) = (cpu_time::of(target.pid()).unwrap(), Instant::now());
    target.command(command).unwrap();
    times.wall += start.elapsed().as_secs_f64();
    thread::sleep(REST);
    let computed = cpu_time::of(target.pid()).unwrap() - computed;
    times.cpu += computed.as_secs_f64();
}

/// Hits of all probes, and in how many passes.
#[derive(Clone, Copy, Debug, Default)]
struct Hits {
    hits: u64,
    passes: u64,
}

impl Hits {
    fn add(&mut self, hits: u64, passes: u64) {
        self.hits += hits;
        self.passes += passes;
    }

    fn per_pass(&self) -> f64 {
        self.hits as f64 / self.passes as f64
    }
}

/// What arms took, one after the other.
type Round = BTreeMap<Arm, Sample>;

/// An arm's times as a share of another's.
struct Measured {
    ratio: Ratio,
    pairs: usize,
    blocks: usize,
}

/// A model, with so many threads.
struct Configuration {
    model: &'static str,
    path: &'static Path,
    threads: usize,
    unit: Unit,
    /// Rounds of the same processes are a block.
    blocks: Vec<Vec<Round>>,
    /// Rounds that were begun.
    begun: u64,
    /// Those in which another tracer probed what is to be untraced.
    dropped: u64,
    hits: BTreeMap<Arm, Hits>,
    /// Activations of one unit, as the callback on ffn_moe_topk counts them.
    counts: Counts,
}

impl Configuration {
    fn new(model: &'static str, path: &'static Path, threads: usize, unit: Unit) -> Self {
        Self {
            model,
            path,
            threads,
            unit,
            blocks: Vec::new(),
            begun: 0,
            dropped: 0,
            hits: BTreeMap::new(),
            counts: Counts::new(),
        }
    }

    /// Begins everything anew, and ends it at that time. One round of each kind is made in any case.
    fn add_block(&mut self, root: &mut Oracle, until: Instant) {
        let now = Instant::now();
        let mut rounds = self.compare_copies(root, now + (until - now) * 3 / 4);
        rounds.extend(self.compare_scripts(root, until));
        // Not before all who count have come to the same.
        self.blocks.push(rounds);
    }

    /// Rounds of [`COPIES`], after one that warms everything up.
    fn compare_copies(&mut self, root: &mut Oracle, until: Instant) -> Vec<Round> {
        let places = Places::of_probes(root.pid()).unwrap();
        let mut copies: Vec<Copy> = COPIES
            .iter()
            .map(|arm| Copy::start(root, *arm, self.threads, self.unit))
            .collect();
        for copy in &mut copies {
            copy.run();
        }
        let untraced = copies.iter().filter(|copy| copy.tracer.is_none());
        let untraced: Vec<u32> = untraced.map(|copy| copy.target.pid()).collect();
        let rounds = self.rounds(&places, &untraced, until, |number, seed| {
            let mut round = Round::new();
            for copy in comparison::order(copies.len(), seed) {
                let copy = &mut copies[copy];
                if number.is_multiple_of(copy.arm.every()) {
                    round.insert(copy.arm, copy.run());
                }
            }
            Some(round)
        });
        for copy in &mut copies {
            if copy.arm == Arm::TopK {
                self.counts = divided(copy.target.counts().unwrap(), copy.units);
            }
        }
        for copy in copies {
            for (arm, hits, passes) in copy.finish(&self.counts) {
                self.hits.entry(arm).or_default().add(hits, passes);
            }
        }
        rounds
    }

    /// The same of [`SCRIPTED`], after the others.
    fn compare_scripts(&mut self, root: &mut Oracle, until: Instant) -> Vec<Round> {
        let mut target = root.copy(self.threads, Callback::None).unwrap();
        let pid = target.pid();
        let places = Places::of_probes(pid).unwrap();
        let unit = self.unit;
        if let Some(count_nodes) = Running::on(pid, Script::CountNodes).unwrap() {
            unit.run(&mut target);
            let hits = bpftrace::hits(&count_nodes.end().unwrap()).unwrap();
            let of_nodes = self.hits.entry(Arm::EveryNodeScript).or_default();
            of_nodes.add(hits, unit.passes());
        }
        let expected = self.counts.clone();
        self.rounds(&places, &[pid], until, |_, seed| {
            let mut round = Round::new();
            for arm in comparison::order(SCRIPTED.len(), seed) {
                let arm = SCRIPTED[arm];
                if places.are_probed(pid).unwrap() {
                    return None;
                }
                let running = match arm {
                    Arm::CountScript => Some(Running::on(pid, Script::Count).unwrap()?),
                    Arm::EveryNodeScript => Some(Running::on(pid, Script::EveryNode).unwrap()?),
                    _ => None,
                };
                // The target has slept while bpftrace came up.
                unit.run(&mut target);
                round.insert(arm, unit.run(&mut target));
                let printed = running.map(|running| running.end().unwrap());
                if arm == Arm::CountScript {
                    let counts = bpftrace::counts(&printed.unwrap_or_default()).unwrap();
                    assert_eq!(divided(counts, 2), expected, "{}", arm.name());
                }
            }
            Some(round)
        })
    }

    /// Rounds until it is time, and one at least: each is called with its number and that of all that were
    /// begun. Those are dropped which give nothing, or in which somebody else has set breakpoints in what
    /// is to be untraced.
    fn rounds(
        &mut self,
        places: &Places,
        untraced: &[u32],
        until: Instant,
        mut round: impl FnMut(u64, u64) -> Option<Round>,
    ) -> Vec<Round> {
        /// Beyond the end, for others to take their breakpoints away.
        const PATIENCE: Duration = Duration::from_secs(60);
        let is_clean = || {
            let mut untraced = untraced.iter();
            untraced.all(|pid| !places.are_probed(*pid).unwrap())
        };
        let mut rounds = Vec::new();
        loop {
            let now = Instant::now();
            if now >= until && (!rounds.is_empty() || now >= until + PATIENCE) {
                return rounds;
            }
            if !is_clean() {
                thread::sleep(Duration::from_millis(10));
                continue;
            }
            self.begun += 1;
            match round(rounds.len() as u64, self.begun) {
                Some(round) if is_clean() => rounds.push(round),
                _ => self.dropped += 1,
            }
        }
    }

    /// The ratio of two arms in rounds that have both; nothing if there are none.
    fn measured(&self, comparison: &Comparison, aspect: (Phase, Measure)) -> Option<Measured> {
        let of_round = |round: &Round| {
            let time = round.get(&comparison.arm)?.of(aspect);
            Some(time / round.get(&comparison.baseline)?.of(aspect))
        };
        let blocks = self.blocks.iter();
        let blocks = blocks.map(|rounds| rounds.iter().filter_map(of_round).collect());
        let blocks: Vec<Vec<f64>> = blocks
            .filter(|block: &Vec<f64>| !block.is_empty())
            .collect();
        (!blocks.is_empty()).then(|| Measured {
            ratio: comparison::clustered(&blocks),
            pairs: blocks.iter().map(Vec::len).sum(),
            blocks: blocks.len(),
        })
    }

    fn is_resolved(&self) -> bool {
        COMPARISONS.iter().all(|comparison| {
            ASPECTS.iter().all(|aspect| {
                let measured = self.measured(comparison, *aspect);
                measured.is_some_and(|measured| measured.met(comparison.goal) != NOT_RESOLVED)
            })
        })
    }

    /// Median of an untraced turn in these terms, in seconds.
    fn untraced(&self, aspect: (Phase, Measure)) -> f64 {
        let rounds = self.blocks.iter().flatten();
        let untraced = rounds.filter_map(|round| Some(round.get(&Arm::Untraced)?.of(aspect)));
        comparison::median(&untraced.collect::<Vec<f64>>())
    }

    /// What an arm's hits come to, at so many nanoseconds each.
    fn hits(&self, arm: Arm, (phase, measure): (Phase, Measure), ns_per_hit: f64) -> Value {
        let Some(hits) = self.hits.get(&arm) else {
            return Value::Null;
        };
        // Threads are hit side by side.
        let at_once = match measure {
            Measure::Wall => self.threads,
            Measure::Cpu => 1,
        };
        let passes = self.unit.passes_of(phase) as f64;
        let seconds = passes * hits.per_pass() * ns_per_hit * 1e-9 / at_once as f64;
        json!({
            "per_pass": hits.per_pass(),
            "ns": ns_per_hit,
            "percent": 100.0 * seconds / self.untraced((phase, measure)),
        })
    }

    fn results(&self, ns_per_hit: f64) -> Vec<Value> {
        let mut results = Vec::new();
        for comparison in &COMPARISONS {
            for aspect in ASPECTS {
                let Some(measured) = self.measured(comparison, aspect) else {
                    continue;
                };
                let ratio = measured.ratio;
                let ends = [ratio.low, ratio.median, ratio.high];
                let percent = ends.map(|ratio| 100.0 * (ratio - 1.0));
                let (phase, measure) = aspect;
                results.push(json!({
                    "model": self.model,
                    "threads": self.threads,
                    "phase": match phase { Phase::Prompt => "prompt", Phase::Decode => "decode" },
                    "arm": comparison.arm.name(),
                    "compared_with": comparison.baseline.name(),
                    "measure": match measure { Measure::Wall => "wall", Measure::Cpu => "cpu" },
                    "percent_more": percent,
                    "pairs": measured.pairs,
                    "blocks": measured.blocks,
                    "dropped_rounds": self.dropped,
                    "goal": comparison.goal.map(goal_in_words),
                    "goal_percent": comparison.goal.and_then(goal_in_per_cent),
                    "met": measured.met(comparison.goal),
                    "hits": match comparison.baseline {
                        Arm::Untraced => self.hits(comparison.arm, aspect, ns_per_hit),
                        _ => Value::Null,
                    },
                    "untraced_ms_per_token":
                        1e3 * self.untraced(aspect) / self.unit.tokens(phase) as f64,
                    "unit": {
                        "repeats": self.unit.repeats,
                        "prompt": self.unit.prompt,
                        "decode": self.unit.decode,
                    },
                }));
            }
        }
        results
    }
}

fn goal_in_words(goal: Goal) -> String {
    match goal {
        Goal::AtMost(share) => format!("at most {} %", 100.0 * share),
        Goal::Unchanged => "no change".to_owned(),
        Goal::NotMore => "not more".to_owned(),
    }
}

/// Between what the interval has to be; the lower end can be open.
fn goal_in_per_cent(goal: Goal) -> Option<[Option<f64>; 2]> {
    let resolution = 100.0 * comparison::RESOLUTION;
    match goal {
        Goal::AtMost(share) => Some([None, Some(100.0 * share + resolution)]),
        Goal::Unchanged => Some([Some(-resolution), Some(resolution)]),
        Goal::NotMore => None,
    }
}

/// So often everything is begun anew, with other places in memory, before anything is judged.
const BLOCKS_TO_JUDGE: usize = 5;
/// Pairs of which fewer make no interval.
const PAIRS_TO_JUDGE: usize = 20;

const NOT_RESOLVED: &str = "not resolved";

impl Measured {
    /// Whether a goal is met. Without a goal there is nothing to say but that the interval is too wide.
    fn met(&self, goal: Option<Goal>) -> Value {
        if self.blocks < BLOCKS_TO_JUDGE || self.pairs < PAIRS_TO_JUDGE {
            return NOT_RESOLVED.into();
        }
        match goal.map(|goal| goal.judge(&self.ratio)) {
            Some(Verdict::Met) => true.into(),
            Some(Verdict::Missed) => false.into(),
            None if self.ratio.half_width() <= comparison::RESOLUTION => Value::Null,
            None | Some(Verdict::NotResolved) => NOT_RESOLVED.into(),
        }
    }
}

/// A target, and what traces it.
struct Copy {
    arm: Arm,
    target: Oracle,
    tracer: Option<(Attached, Files)>,
    unit: Unit,
    /// How often it has had its turn.
    units: u64,
}

impl Copy {
    fn start(root: &mut Oracle, arm: Arm, threads: usize, unit: Unit) -> Self {
        let mut target = root.copy(threads, arm.callback()).unwrap();
        let pid = target.pid();
        let tracer = match arm {
            Arm::Attached | Arm::Logged | Arm::Traced => Some(attach(pid, arm)),
            Arm::Detached => {
                let (tracer, files) = attach(pid, arm);
                unit.run(&mut target);
                tracer.interrupt().unwrap();
                files.stats().assert_complete();
                None
            }
            _ => None,
        };
        Self {
            arm,
            target,
            tracer,
            unit,
            units: 0,
        }
    }

    fn run(&mut self) -> Sample {
        self.units += 1;
        self.unit.run(&mut self.target)
    }

    /// Ends it. Fails unless it has counted what one unit comes to, each time. Gives the hits of a
    /// tracer's probes, and in how many passes; also of other arms that have some of these probes.
    fn finish(mut self, of_unit: &Counts) -> Vec<(Arm, u64, u64)> {
        let name = self.arm.name();
        if self.arm == Arm::MulMatId {
            // For gate, up and down.
            let counts = self.target.counts().unwrap();
            assert_eq!(&divided(counts, 3 * self.units), of_unit, "{name}");
        }
        let Some((tracer, files)) = self.tracer else {
            return Vec::new();
        };
        tracer.interrupt().unwrap();
        let stats = files.stats();
        stats.assert_complete();
        assert_eq!(&divided(stats.counts(), self.units), of_unit, "{name}");
        let rows = match self.arm {
            Arm::Logged => Some(files.log()),
            Arm::Traced => Some(files.trace()),
            _ => None,
        };
        if let Some(rows) = rows {
            let rows = rows.iter().map(|(layer, ids)| (*layer, ids.as_slice()));
            assert_eq!(tracer::count(rows), stats.counts());
        }
        let passes = self.units * self.unit.passes();
        let mut found = vec![(self.arm, hits(&stats, |_| true), passes)];
        if self.arm == Arm::Attached {
            let of_script = hits(&stats, |symbol| symbol == "ggml_compute_forward_get_rows");
            found.push((Arm::CountScript, of_script, passes));
        }
        found
    }
}

fn attach(pid: u32, arm: Arm) -> (Attached, Files) {
    let files = Files::new();
    let mut options = files.options();
    options.retain(|option| arm == Arm::Logged || !option.starts_with("--log"));
    options.extend((arm == Arm::Traced).then(|| files.trace_option()));
    (Attached::to(pid, &options).unwrap(), files)
}

/// Hits of the probes on such functions.
fn hits(stats: &Stats, of: impl Fn(&str) -> bool) -> u64 {
    let hooks = stats.0["target"]["hooks"].as_array().unwrap().iter();
    let hooks = hooks.filter(|hook| of(hook["symbol"].as_str().unwrap()));
    hooks.map(|hook| hook["hits"].as_u64().unwrap()).sum()
}

/// The counts of one of `n` times the same; fails if it was not the same.
#[track_caller]
fn divided(mut counts: Counts, n: u64) -> Counts {
    for count in counts.values_mut().flat_map(BTreeMap::values_mut) {
        assert!(count.is_multiple_of(n), "{count} in {n} times the same");
        *count /= n;
    }
    counts
}

/// What one hit takes on this machine, in nanoseconds.
fn ns_per_hit() -> f64 {
    let mut doctor = tracer::command().unwrap();
    let output = doctor.args(["doctor", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    report["machine"]["hit_ns"]["entry"].as_f64().unwrap()
}

/// 1, 2, 4, … and all processors.
fn thread_counts() -> Vec<usize> {
    let all = thread::available_parallelism().map_or(1, NonZero::get);
    let mut counts: Vec<usize> = std::iter::successors(Some(1), |n| Some(2 * n))
        .take_while(|n| *n < all)
        .collect();
    counts.push(all);
    counts
}

fn root(path: &Path) -> Oracle {
    Oracle::spawn(&mut driver(path, &["-c", "1024"])).unwrap()
}

#[test]
#[ignore = "a benchmark: cargo xtask bench overhead"]
fn overhead() {
    /// Blocks of each configuration that fit into the time; the last ones are left out once there is
    /// nothing to resolve.
    const BLOCKS: u32 = 8;
    let Effort::Full { limit } = Effort::asked() else {
        unreachable!("that is what is asked for");
    };
    let models = [
        (
            "qwen3moe 128/8, n_embd 2048, 8 layers, Q4_0",
            reference(),
            Unit {
                repeats: 1,
                prompt: 32,
                decode: 16,
            },
        ),
        (
            "qwen3moe 512/10, n_embd 128, 3 layers, F16",
            known_wide().path.as_path(),
            Unit {
                repeats: 4,
                prompt: 128,
                decode: 32,
            },
        ),
    ];
    let start = Instant::now();
    let ns = ns_per_hit();
    let mut roots: BTreeMap<&Path, Oracle> = models
        .iter()
        .map(|(_, path, _)| (*path, root(path)))
        .collect();
    let mut configurations: Vec<Configuration> = models
        .into_iter()
        .flat_map(|(model, path, unit)| {
            let threads = thread_counts().into_iter();
            threads.map(move |threads| Configuration::new(model, path, threads, unit))
        })
        .collect();
    let turns = BLOCKS * configurations.len() as u32;
    let measured = panic::catch_unwind(AssertUnwindSafe(|| {
        for turn in 0..turns {
            let index = turn as usize % configurations.len();
            let configuration = &mut configurations[index];
            let end = start + limit * (turn + 1) / turns;
            // What is judged has its blocks, whatever the limit.
            let is_left_out = configuration.blocks.len() >= BLOCKS_TO_JUDGE
                && (Instant::now() >= end || configuration.is_resolved());
            if !is_left_out {
                let root = roots.get_mut(configuration.path).unwrap();
                configuration.add_block(root, end.max(Instant::now()));
            }
        }
    }));
    // Of what came to its end, also when something has failed since.
    for configuration in &configurations {
        for result in configuration.results(ns) {
            println!("RESULT {result}");
        }
    }
    if let Err(failure) = measured {
        panic::resume_unwind(failure);
    }
}

/// One round of everything. Whoever counts, counts what follows from the tokens.
#[test]
fn smoke() {
    let known = known_small();
    let unit = Unit {
        repeats: 1,
        prompt: 40,
        decode: 3,
    };
    let mut root = root(&known.path);
    let mut configuration = Configuration::new("small", &known.path, 1, unit);
    configuration.add_block(&mut root, Instant::now());

    let mut expected = Vec::new();
    for layer in 0..known.expected.layers() {
        // The last layer is computed for the last token of the prompt alone.
        let is_last = layer + 1 == known.expected.layers();
        let first = if is_last { unit.prompt - 1 } else { 0 };
        let prompt = first..unit.prompt;
        let tokens = prompt
            .map(|i| Unit::PROMPT_START + i)
            .chain((0..unit.decode).map(|i| Unit::DECODE_START + i));
        expected.extend(tokens.map(|token| (layer, known.expected.ids(layer, token as u32))));
    }
    assert_eq!(configuration.counts, tracer::count(expected));

    let results = configuration.results(1000.0);
    assert_eq!(results.len(), COMPARISONS.len() * ASPECTS.len());
    for result in results {
        let percent = result["percent_more"].as_array().unwrap();
        assert!(
            percent
                .iter()
                .all(|percent| percent.as_f64() > Some(-100.0))
        );
        assert_eq!(result["pairs"], 1, "{result:#}");
        assert_eq!(result["blocks"], 1, "{result:#}");
        assert!(result["dropped_rounds"].is_u64(), "{result:#}");
        // Of a single pair, with a goal or without.
        assert_eq!(result["met"], NOT_RESOLVED, "{result:#}");
        let with_probes = [
            "attach",
            "attach --log",
            "attach --trace",
            "bpftrace, the same counts",
            "bpftrace, empty probe on every node",
        ];
        let (arm, baseline) = (&result["arm"], &result["compared_with"]);
        let is_probed = baseline == "untraced" && with_probes.iter().any(|name| arm == name);
        let per_pass = result["hits"]["per_pass"].as_f64();
        assert_eq!(per_pass > Some(1.0), is_probed, "{result:#}");
    }
}
