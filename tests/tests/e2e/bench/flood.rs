//! What the tracer can take in, and what it needs for it: a program that shows ids as llama.cpp does, and
//! computes nothing.
//!
//! Losses are those that the tracer reports itself; that its sums are right is checked with each.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use expert_trace_tests::{
    comparison::{self, Ratio},
    cpu_time,
    oracle::Oracle,
    records::Records,
    tracer::{Attached, Stats},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{layouts::compile, support::scratch};

/// What passes look like.
#[derive(Clone, Copy)]
struct Shape {
    contexts: u32,
    rows: u32,
    layers: u32,
    k: u32,
    experts: u32,
}

/// The prompts of the flood.
const PROMPT: Shape = Shape {
    contexts: 1,
    rows: 2048,
    layers: 48,
    k: 10,
    experts: 512,
};

/// Generated tokens of a model of the usual size.
const DECODE: Shape = Shape {
    rows: 1,
    k: 8,
    experts: 128,
    ..PROMPT
};

/// Prompts of such a model, whose rows are near enough to each other to be read together.
const NEAR_PROMPT: Shape = Shape {
    rows: PROMPT.rows,
    ..DECODE
};

/// Prompts of the widest model that memory has to suffice for, in ubatches of llama.cpp's own size.
const WIDE: Shape = Shape {
    contexts: 1,
    rows: 512,
    layers: 128,
    k: 10,
    experts: 512,
};

impl Shape {
    /// Rows of a pass in all layers.
    fn rows_of_pass(self) -> u64 {
        u64::from(self.rows) * u64::from(self.layers)
    }

    /// Records of a pass.
    fn records_of_pass(self) -> u64 {
        let of_layer = Records::of_layer(self.rows, self.k, self.experts).number;
        let of_ubatch = Records::of_ubatch(self.rows).number;
        u64::from(self.layers) * u64::from(of_layer) + u64::from(of_ubatch)
    }
}

/// The program, waiting for commands.
struct Flood {
    target: Oracle,
    _program: TempDir,
    directory: TempDir,
}

/// A tracer of it.
struct Tracer {
    attached: Attached,
    document: PathBuf,
}

impl Flood {
    fn start() -> Self {
        let (directory, program) = compile("flood.c", &[]);
        let mut command = std::process::Command::new(program);
        Self {
            target: Oracle::spawn(&mut command).unwrap(),
            _program: directory,
            directory: scratch(),
        }
    }

    fn trace(&self, buffer: Option<u64>) -> Tracer {
        let document = self.directory.path().join("stats.json");
        let mut options = vec![format!("--output={}", document.display())];
        options.extend(buffer.map(|bytes| format!("--buffer-size={bytes}")));
        Tracer {
            attached: Attached::to(self.target.pid(), &options).unwrap(),
            document,
        }
    }

    /// So many passes in a second, or as many as are possible. Gives how many they were.
    fn pass(&mut self, shape: Shape, passes: u64, per_second: Option<f64>) -> f64 {
        let ns = per_second.map_or(0.0, |per_second| 1e9 / per_second);
        let Shape {
            contexts,
            rows,
            layers,
            k,
            experts,
        } = shape;
        let command = format!("passes {passes} {ns:.0} {contexts} {rows} {layers} {k} {experts}");
        let ns: f64 = self.target.command(&command).unwrap().parse().unwrap();
        passes as f64 / ns * 1e9
    }

    fn end(self) {
        assert!(self.target.quit().unwrap().success());
    }
}

impl Tracer {
    /// Ends it, and gives how many rows of so many passes it has lost by its own account, which must be
    /// right.
    fn lost(self, shape: Shape, passes: u64) -> u64 {
        let said = self.attached.interrupt().unwrap();
        let stats = Stats::read(&self.document).unwrap();
        let number = |pointer: &str| stats.number(&format!("/integrity{pointer}"));
        let rows = passes * shape.rows_of_pass();
        assert_eq!(number("/rows/seen"), rows);
        let lost = number("/rows/dropped/ring_full");
        assert_eq!(number("/rows/emitted") + lost, rows);
        assert_eq!(number("/received/rows"), number("/rows/emitted"));
        assert_eq!(number("/received/events"), number("/events/emitted"));
        let events_lost = number("/events/dropped/ring_full");
        let events = passes * shape.records_of_pass();
        assert_eq!(number("/events/emitted") + events_lost, events);
        let complete = &stats.0["integrity"]["complete"];
        assert_eq!(*complete, events_lost == 0, "{said}");
        if lost > 0 {
            let reported = format!("INCOMPLETE: {lost} rows lost: ring buffer full");
            assert!(said.contains(&reported), "{said}");
        }
        lost
    }
}

/// Anonymous memory of a process, in bytes; nothing when it has ended.
fn anonymous(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

#[test]
fn smoke() {
    let mut flood = Flood::start();
    // A stopped reader cannot keep up, whatever the machine.
    let tracer = flood.trace(Some(64 << 10));
    tracer.attached.signal(Signal::SIGSTOP).unwrap();
    flood.pass(PROMPT, 1, None);
    tracer.attached.signal(Signal::SIGCONT).unwrap();
    assert!(tracer.lost(PROMPT, 1) > 0);

    let tracer = flood.trace(None);
    flood.pass(DECODE, 100, Some(1000.0));
    assert!(anonymous(tracer.attached.pid()).unwrap() > 0);
    assert!(cpu_time::of(tracer.attached.pid()).unwrap() > Duration::ZERO);
    assert_eq!(tracer.lost(DECODE, 100), 0);

    let tracer = flood.trace(None);
    flood.pass(NEAR_PROMPT, 1, None);
    assert_eq!(tracer.lost(NEAR_PROMPT, 1), 0);
    flood.end();
}

/// Sizes of the ring buffer, in bytes; the one in the middle is the default.
const BUFFERS: [u64; 6] = [
    128 << 10,
    512 << 10,
    2 << 20,
    DEFAULT_BUFFER,
    32 << 20,
    128 << 20,
];
const DEFAULT_BUFFER: u64 = 8 << 20;

/// Prompts in a second; at last, as many as are possible.
const RATES: [Option<f64>; 7] = [
    Some(2.0),
    Some(4.0),
    Some(8.0),
    Some(16.0),
    Some(32.0),
    Some(64.0),
    None,
];

/// "Several times a second": up to here, nothing may be lost at the default buffer.
const SEVERAL: f64 = 8.0;

#[test]
#[ignore = "takes minutes: cargo xtask bench flood"]
fn losses() {
    const SECONDS: f64 = 2.0;
    let mut flood = Flood::start();
    for buffer in BUFFERS {
        for rate in RATES {
            let passes = (SECONDS * rate.unwrap_or(100.0)) as u64;
            let tracer = flood.trace((buffer != DEFAULT_BUFFER).then_some(buffer));
            let achieved = flood.pass(PROMPT, passes, rate);
            let lost = tracer.lost(PROMPT, passes);
            let has_goal = buffer == DEFAULT_BUFFER && rate.is_some_and(|rate| rate <= SEVERAL);
            let row = json!({
                "measured": "loss",
                "buffer_bytes": buffer,
                "default_buffer": buffer == DEFAULT_BUFFER,
                "wanted_passes_per_second": rate,
                "passes_per_second": achieved,
                "ids_per_second": achieved * PROMPT.rows_of_pass() as f64 * f64::from(PROMPT.k),
                "passes": passes,
                "rows": passes * PROMPT.rows_of_pass(),
                "rows_lost": lost,
                "goal": has_goal.then_some("no row lost"),
                "met": has_goal.then_some(lost == 0),
            });
            println!("RESULT {row}");
        }
    }
    flood.end();
}

/// Anonymous memory at the widest shape, in MiB.
const MEMORY_GOAL: f64 = 24.0;
/// What "flat" leaves to the allocator: so much more, in MiB, after the last tenth than after the first.
const FLAT: f64 = 0.25;

#[test]
#[ignore = "takes minutes: cargo xtask bench flood"]
fn memory() {
    memory_at(WIDE, true);
    let more = Shape {
        contexts: 4,
        rows: 2048,
        ..WIDE
    };
    memory_at(more, false);
}

/// Prints what the tracer needs, by prompts of this shape and generated tokens by turns. `is_judged`:
/// there are goals for it.
fn memory_at(shape: Shape, is_judged: bool) {
    const STEPS: u64 = 20;
    const DECODES: u64 = 400;
    const PROMPTS: u64 = 8;
    let decode = Shape { rows: 1, ..shape };
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut flood = Flood::start();
    let tracer = flood.trace(None);
    let pid = tracer.attached.pid();
    let at_start = anonymous(pid).unwrap();
    let mut readings = Vec::new();
    for _ in 0..STEPS {
        flood.pass(shape, PROMPTS, Some(prompts_per_second(shape)));
        flood.pass(decode, DECODES, Some(1000.0));
        readings.push(anonymous(pid).unwrap());
    }
    let (early, last) = (
        readings[STEPS as usize / 10 - 1],
        readings[STEPS as usize - 1],
    );
    let most = readings.iter().copied().max().unwrap();

    // The document is made when the capture has ended, and what is said then is more than a pipe holds.
    tracer.attached.signal(Signal::SIGINT).unwrap();
    let (ended, at_end) = thread::scope(|scope| {
        let at_end = scope.spawn(|| most_of(|| anonymous(pid)));
        (tracer.attached.wait().unwrap(), at_end.join().unwrap())
    });
    let (status, said) = ended;
    assert!(status.success(), "{said}");
    let stats = Stats::read(&tracer.document).unwrap();
    let lost = stats.number("/integrity/rows/dropped/ring_full");
    if is_judged {
        stats.assert_complete();
    }
    let rows = STEPS * (PROMPTS * shape.rows_of_pass() + DECODES * decode.rows_of_pass());
    assert_eq!(stats.number("/integrity/rows/seen"), rows);
    flood.end();

    let Shape {
        contexts,
        rows,
        layers,
        experts,
        ..
    } = shape;
    let what = match contexts {
        1 => "1 context".to_owned(),
        _ => format!("{contexts} contexts"),
    };
    let what = format!("{layers} layers × {experts} experts, {what}, prompts of {rows} tokens");
    let row = |measured, when, mib: f64, goal: Option<(String, bool)>| {
        let (goal, met) = goal.filter(|_| is_judged).unzip();
        let row = json!({
            "measured": measured,
            "shape": what,
            "when": when,
            "anonymous_mib": mib,
            "ring_buffer_mib": DEFAULT_BUFFER >> 20,
            "rows_lost": lost,
            "goal": goal,
            "met": met,
        });
        println!("RESULT {row}");
    };
    let most_allowed = |mib: f64| Some((format!("at most {MEMORY_GOAL} MiB"), mib <= MEMORY_GOAL));
    row("memory", "attached", mib(at_start), None);
    let most = mib(most);
    row(
        "memory",
        "while tracing, most of all",
        most,
        most_allowed(most),
    );
    let at_end = mib(at_end);
    let when = "while the document is made, most of all";
    row("memory", when, at_end, most_allowed(at_end));
    let growth = mib(last) - mib(early);
    let flat = (format!("flat: at most {FLAT} MiB"), growth <= FLAT);
    let when = "from the first tenth of the passes to the last";
    row("growth", when, growth, Some(flat));
}

/// Prompts of a shape that bring as many ids as those of the flood at [`SEVERAL`] a second.
fn prompts_per_second(shape: Shape) -> f64 {
    let ids = |shape: Shape| shape.rows_of_pass() as f64 * f64::from(shape.k);
    SEVERAL * ids(PROMPT) / ids(shape)
}

/// The largest of what `read` gives until it gives nothing.
fn most_of(mut read: impl FnMut() -> Option<u64>) -> u64 {
    let mut most = 0;
    while let Some(value) = read() {
        most = most.max(value);
        thread::yield_now();
    }
    most
}

/// Of one processor core.
const CPU_GOAL: f64 = 0.01;

#[test]
#[ignore = "takes minutes: cargo xtask bench flood"]
fn processor() {
    const WINDOWS: usize = 20;
    const TOKENS_PER_SECOND: f64 = 100.0;
    let mut flood = Flood::start();
    let tracer = flood.trace(None);
    let pid = tracer.attached.pid();
    let mut shares = Vec::new();
    for _ in 0..WINDOWS {
        let (begin, before) = (Instant::now(), cpu_time::of(pid).unwrap());
        flood.pass(DECODE, 200, Some(TOKENS_PER_SECOND));
        let used = cpu_time::of(pid).unwrap() - before;
        shares.push(used.as_secs_f64() / begin.elapsed().as_secs_f64());
    }
    assert_eq!(tracer.lost(DECODE, WINDOWS as u64 * 200), 0);
    flood.end();
    // A ratio to one is the value itself.
    let Ratio { median, low, high } = comparison::ratio(&shares, &[1.0; WINDOWS]);
    let met = match (high <= CPU_GOAL, low > CPU_GOAL) {
        (true, _) => Value::from(true),
        (_, true) => Value::from(false),
        _ => Value::from("not resolved"),
    };
    let row = json!({
        "measured": "processor",
        "when": "48 layers × 100 tokens/s, one at a time",
        "share_of_a_core": [low, median, high],
        "windows": WINDOWS,
        "goal": format!("at most {CPU_GOAL} of a core"),
        "met": met,
    });
    println!("RESULT {row}");
}
