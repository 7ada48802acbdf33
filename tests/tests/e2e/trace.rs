//! Full traces: every routed token, where it was lost, and what is left of a trace that was cut.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::FileTypeExt as _,
    path::Path,
    process::Command,
    time::{Duration, Instant, SystemTime},
};

use expert_trace::trace::{Ending, Kind, Reader, Reason, Row};
use expert_trace_common::Phase;
use expert_trace_tests::{
    oracle::Oracle,
    tracer::{self, Attached, Counts, Stats},
};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::{Traced, driver, ids, known_small, known_wide, llama, random_small, scratch};

/// A row of a trace, for longer than its batch.
#[derive(Clone, Debug)]
struct OwnRow {
    kind: Kind,
    context: Option<u32>,
    pass: Option<u32>,
    phase: Option<Phase>,
    layer: Option<u16>,
    row: Option<u32>,
    rows: Option<u32>,
    sequence: Option<u16>,
    position: Option<i32>,
    token: Option<i32>,
    time_ns: i64,
    experts: Vec<u32>,
    reason: Option<Reason>,
    detail: Option<String>,
}

impl OwnRow {
    fn new(row: &Row<'_>) -> Self {
        Self {
            kind: row.kind,
            context: row.context,
            pass: row.pass,
            phase: row.phase,
            layer: row.layer,
            row: row.row,
            rows: row.rows,
            sequence: row.sequence,
            position: row.position,
            token: row.token,
            time_ns: row.time_ns,
            experts: row.experts.iter().map(|id| u32::from(*id)).collect(),
            reason: row.reason,
            detail: row.detail.map(str::to_owned),
        }
    }

    fn is(&self, kind: Kind) -> bool {
        self.kind == kind
    }
}

fn read(path: &Path) -> (Vec<OwnRow>, Ending) {
    let mut reader = Reader::open(path).unwrap();
    let mut rows = Vec::new();
    while let Some(batch) = reader.next().unwrap() {
        rows.extend(batch.rows().map(|row| OwnRow::new(&row)));
    }
    (rows, reader.ending().unwrap().clone())
}

/// Reads a trace that is being written until it is as wanted.
fn read_until(path: &Path, wanted: impl Fn(&[OwnRow]) -> bool) -> Vec<OwnRow> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        // Its schema may still be on its way.
        if let Ok(mut reader) = Reader::open(path) {
            let mut rows = Vec::new();
            while let Some(batch) = reader.next().unwrap() {
                rows.extend(batch.rows().map(|row| OwnRow::new(&row)));
            }
            if wanted(&rows) {
                return rows;
            }
        }
        assert!(Instant::now() < deadline, "the trace does not get there");
        std::thread::yield_now();
    }
}

fn routed(rows: &[OwnRow]) -> impl Iterator<Item = &OwnRow> {
    rows.iter().filter(|row| row.is(Kind::Routed))
}

/// Counts by layer and expert of one context.
fn recount(rows: &[OwnRow], context: u32) -> Counts {
    let mut counts = Counts::new();
    for row in routed(rows).filter(|row| row.context == Some(context)) {
        let layer = counts.entry(u32::from(row.layer.unwrap())).or_default();
        for id in &row.experts {
            *layer.entry(*id).or_default() += 1;
        }
    }
    counts
}

/// Fails unless each context of the document is what the trace has of it.
fn assert_same_counts(stats: &Stats, rows: &[OwnRow]) {
    let contexts = stats.0["contexts"].as_array().unwrap();
    for (id, context) in contexts.iter().enumerate() {
        let number = context["trace_context"].as_u64().unwrap() as u32;
        assert_eq!(recount(rows, number), stats.context_counts(id));
        for layer in context["layers"].as_array().unwrap() {
            let of_layer = |row: &&OwnRow| {
                row.context == Some(number)
                    && row.layer.map(u64::from) == layer["layer_id"].as_u64()
            };
            for (phase, key) in [
                (Phase::Prefill, "prefill_tokens"),
                (Phase::Decode, "decode_tokens"),
            ] {
                let of_phase = |row: &&OwnRow| row.phase == Some(phase);
                let tokens = routed(rows).filter(of_layer).filter(of_phase).count();
                assert_eq!(layer[key], tokens, "{key} of {layer:#}");
            }
        }
    }
    assert_eq!(stats.0["trace"]["rows"], routed(rows).count());
}

fn now_ns() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap().as_nanos() as i64
}

/// Prompts, generation, several sequences in a pass, and another context.
#[test]
fn every_row_has_its_token_sequence_and_experts() {
    for known in [known_small(), known_wide()] {
        let directory = scratch();
        let path = directory.path().join("routes.arrows");
        let option = format!("--trace={}", path.display());
        let began = now_ns();
        let options = ["-t", "2", "-c", "4096", "-b", "2048", "-ub", "64"];
        let mut traced = Traced::start_with(&[&option, "--tokens"], &known.path, &options);
        // Token, by context, sequence and position.
        let mut tokens: BTreeMap<(u32, u16, i32), (u32, Phase)> = BTreeMap::new();
        let mut add = |context, sequence, first: i32, of: &[u32], phase| {
            for (position, token) in (first..).zip(of) {
                tokens.insert((context, sequence, position), (*token, phase));
            }
        };
        traced.command("prompt 0 150 20");
        add(0, 0, 0, &(20..170).collect::<Vec<u32>>(), Phase::Prefill);
        let generated = traced.command("generate 0 20 7");
        let decoded = [&[7], &generated[..19]].concat();
        add(0, 0, 150, &decoded, Phase::Decode);
        traced.command("decode 1 5 6 7");
        add(0, 1, 0, &[5, 6, 7], Phase::Prefill);
        traced.command("batch 0:30 1:31");
        add(0, 0, 170, &[30], Phase::Decode);
        add(0, 1, 3, &[31], Phase::Decode);
        traced.command("context");
        traced.command("prompt 0 10 300");
        add(1, 0, 0, &(300..310).collect::<Vec<u32>>(), Phase::Prefill);
        let (stats, _) = traced.finish();
        let ended = now_ns();

        let (rows, ending) = read(&path);
        assert_eq!(ending, Ending::Whole);
        assert_same_counts(&stats, &rows);
        for row in routed(&rows) {
            let layer = u32::from(row.layer.unwrap());
            let token = row.token.unwrap() as u32;
            assert_eq!(row.experts, known.expected.ids(layer, token));
            assert!((began..=ended).contains(&row.time_ns));
            assert!(row.rows.is_none() && row.reason.is_none() && row.detail.is_none());
        }
        // All layers but the last work on every token.
        for layer in 0..known.expected.layers() as u16 {
            let of_layer = routed(&rows).filter(|row| row.layer == Some(layer));
            let found: BTreeMap<(u32, u16, i32), (u32, Phase)> = of_layer
                .map(|row| {
                    let place = (row.context, row.sequence, row.position);
                    let (Some(context), Some(sequence), Some(position)) = place else {
                        panic!("{row:?} is of no known place");
                    };
                    let token = row.token.unwrap() as u32;
                    ((context, sequence, position), (token, row.phase.unwrap()))
                })
                .collect();
            if layer + 1 < known.expected.layers() as u16 {
                assert_eq!(found, tokens, "layer {layer}");
            } else {
                assert!(!found.is_empty() && found.len() < tokens.len());
                assert!(found.iter().all(|(place, token)| tokens[place] == *token));
            }
        }
        // Passes are numbered without holes, rows within them too.
        for context in 0..2 {
            let of_context = |row: &&OwnRow| row.context == Some(context);
            let passes: BTreeSet<u32> = routed(&rows)
                .filter(of_context)
                .map(|row| row.pass.unwrap())
                .collect();
            let excluded = rows.iter().filter(|row| row.is(Kind::Excluded)).count();
            assert_eq!(excluded, 0);
            assert!(passes.iter().copied().eq(0..passes.len() as u32));
            for pass in passes {
                let first_layer = routed(&rows)
                    .filter(of_context)
                    .filter(|row| row.pass == Some(pass) && row.layer == Some(0));
                let numbers = first_layer.map(|row| row.row.unwrap());
                assert!(numbers.eq(0..64.min(numbers_of(&rows, context, pass))));
            }
        }
        assert!(!rows.iter().any(|row| row.is(Kind::Gap)));
        check_facts(&rows, &stats);
    }
}

fn numbers_of(rows: &[OwnRow], context: u32, pass: u32) -> u32 {
    let of_pass =
        |row: &&OwnRow| (row.context, row.pass, row.layer) == (Some(context), Some(pass), Some(0));
    routed(rows).filter(of_pass).count() as u32
}

/// Fails unless contexts are described before anything of them, and the end of the trace is what the
/// document says.
fn check_facts(rows: &[OwnRow], stats: &Stats) {
    let mut described = BTreeSet::new();
    for row in rows {
        match (row.kind, row.context) {
            (Kind::Context, Some(context)) => {
                assert!(described.insert(context), "context {context} twice");
                let detail: Value = serde_json::from_str(row.detail.as_ref().unwrap()).unwrap();
                assert_eq!(detail["models"][0]["path"], stats.0["models"][0]["path"]);
            }
            (Kind::Summary, None) => {}
            (_, Some(context)) => assert!(described.contains(&context)),
            (kind, None) => panic!("a {kind:?} of no context"),
        }
    }
    let last = rows.last().unwrap();
    assert_eq!(last.kind, Kind::Summary);
    let summary: Value = serde_json::from_str(last.detail.as_ref().unwrap()).unwrap();
    for key in [
        "target",
        "models",
        "capture",
        "integrity",
        "excluded",
        "trace",
    ] {
        assert_eq!(summary[key], stats.0[key], "{key}");
    }
    assert!(summary["contexts"][0]["layers"][0].get("experts").is_none());
}

#[test]
fn token_ids_stay_in_the_process_unless_asked_for() {
    let directory = scratch();
    let path = directory.path().join("routes.arrows");
    let option = format!("--trace={}", path.display());
    let mut traced = Traced::start_with(&[&option], &known_small().path, &["-t", "1"]);
    // So few are looked at, to recognise a warm-up.
    traced.command("decode 0 5 6");
    traced.command("decode 0 9");
    let (stats, _) = traced.finish();
    let (rows, _) = read(&path);
    assert_eq!(routed(&rows).filter(|row| row.layer == Some(0)).count(), 3);
    assert!(rows.iter().all(|row| row.token.is_none()));
    assert_eq!(stats.0["trace"]["tokens"], false);
}

#[test]
fn a_warm_up_is_left_out_and_named() {
    let directory = scratch();
    let path = directory.path().join("routes.arrows");
    let stats_path = directory.path().join("stats.json");
    let mut command = Command::new(llama().program("llama-cli"));
    command.args(["-m", random_small().to_str().unwrap()]);
    command.args(["-p", "Hello", "-n", "8", "-st", "-t", "2", "-ngl", "0"]);
    let options = [
        format!("--trace={}", path.display()),
        format!("--output={}", stats_path.display()),
    ];
    let output = tracer::run(&options, &command).unwrap().output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let stats = Stats::read(&stats_path).unwrap();
    let (rows, ending) = read(&path);
    assert_eq!(ending, Ending::Whole);
    assert_same_counts(&stats, &rows);
    let excluded = rows.iter().filter(|row| row.is(Kind::Excluded));
    let warmups: Vec<u32> = excluded
        .inspect(|row| assert_eq!(row.reason, Some(Reason::Warmup)))
        .map(|row| row.rows.unwrap())
        .collect();
    let (passes, tokens) = stats.excluded("warmup");
    assert!(passes > 0);
    let sum: u32 = warmups.iter().sum();
    assert_eq!((warmups.len() as u64, u64::from(sum)), (passes, tokens));
}

/// What had a second to be written is there, and whole.
#[test]
fn a_killed_tracer_leaves_what_it_wrote() {
    let known = known_small();
    let directory = scratch();
    let path = directory.path().join("routes.arrows");
    let mut target = Oracle::spawn(&mut driver(&known.path, &["-t", "1", "-c", "4096"])).unwrap();
    let option = format!("--trace={}", path.display());
    let tracer = Attached::to(target.pid(), &[&option]).unwrap();
    target.command("prompt 0 100 20").unwrap();
    // Until the next pass begins, nobody knows that this one is over.
    target.command("decode 0 3").unwrap();
    let layers = known.expected.layers() as usize;
    let wanted = 100 * (layers - 1) + 1;
    read_until(&path, |rows| routed(rows).count() >= wanted);
    tracer.signal(Signal::SIGKILL).unwrap();
    tracer.wait().unwrap();
    target.command("decode 0 4").unwrap();
    assert!(target.quit().unwrap().success());

    let (rows, ending) = read(&path);
    assert_eq!(ending, Ending::Cut);
    assert_eq!(routed(&rows).count(), wanted);
    assert!(!rows.iter().any(|row| row.is(Kind::Summary)));
    for row in routed(&rows).filter(|row| row.layer == Some(0)) {
        let token = 20 + row.position.unwrap() as u32;
        assert_eq!(row.experts, known.expected.ids(0, token));
    }
}

/// The smallest ring buffer, with the reader stopped, and work before and after.
#[test]
fn what_is_lost_is_a_gap_where_it_was() {
    const BEFORE: usize = 3;
    const LOST: u32 = 100;
    const AFTER: usize = 5;

    let known = known_small();
    let directory = scratch();
    let path = directory.path().join("routes.arrows");
    let stats_path = directory.path().join("stats.json");
    let mut target = Oracle::spawn(&mut driver(&known.path, &["-t", "1"])).unwrap();
    let options = [
        format!("--trace={}", path.display()),
        format!("--output={}", stats_path.display()),
        "--buffer-size=4K".to_owned(),
    ];
    let tracer = Attached::to(target.pid(), &options).unwrap();
    let mut decoded = vec![21];
    let mut generate = |target: &mut Oracle, tokens: usize| {
        let last = decoded.pop().unwrap();
        let generated = ids(&target
            .command(&format!("generate 0 {tokens} {last}"))
            .unwrap());
        decoded.push(last);
        decoded.extend(generated);
    };
    let seen = |rows: &[OwnRow]| routed(rows).filter(|row| row.layer == Some(0)).count();
    // So few fit in the buffer, and are taken before more come. The last one is not known to be over.
    generate(&mut target, BEFORE);
    read_until(&path, |rows| seen(rows) >= BEFORE - 1);
    tracer.signal(Signal::SIGSTOP).unwrap();
    generate(&mut target, LOST as usize);
    tracer.signal(Signal::SIGCONT).unwrap();
    read_until(&path, |rows| seen(rows) > BEFORE);
    generate(&mut target, AFTER);
    tracer.interrupt().unwrap();
    assert!(target.quit().unwrap().success());

    let (rows, ending) = read(&path);
    assert_eq!(ending, Ending::Whole);
    let stats = Stats::read(&stats_path).unwrap();
    assert_eq!(stats.0["integrity"]["complete"], false);
    assert_same_counts(&stats, &rows);
    // Every row is that of the token which its pass decoded, on both sides of the gap.
    let mut passes = BTreeSet::new();
    for row in routed(&rows) {
        let token = decoded[row.pass.unwrap() as usize];
        let layer = u32::from(row.layer.unwrap());
        assert_eq!(row.experts, known.expected.ids(layer, token), "{row:?}");
        passes.insert(row.pass.unwrap());
    }
    let lost: Vec<&OwnRow> = rows
        .iter()
        .filter(|row| row.reason == Some(Reason::PassesLost))
        .collect();
    assert_eq!(lost.len(), 1, "{lost:?}");
    let first_lost = lost[0].pass.unwrap();
    let after = BEFORE as u32 + LOST;
    assert!(
        passes
            .iter()
            .all(|pass| *pass < first_lost || *pass >= after)
    );
    assert!(passes.contains(&after) && passes.contains(&(first_lost - 1)));
    let at = |wanted: &OwnRow| {
        rows.iter()
            .position(|row| std::ptr::eq(row, wanted))
            .unwrap()
    };
    let is_after = |row: &&OwnRow| row.pass.is_some_and(|pass| pass >= after);
    let first_after = routed(&rows).find(is_after).unwrap();
    assert!(at(lost[0]) < at(first_after));
    // Of the pass that was cut by the loss, the layers that are missing are named.
    let missing: BTreeSet<(u32, u16)> = rows
        .iter()
        .filter(|row| row.reason == Some(Reason::LayerNotSeen))
        .map(|row| (row.pass.unwrap(), row.layer.unwrap()))
        .collect();
    let seen: BTreeSet<(u32, u16)> = routed(&rows)
        .map(|row| (row.pass.unwrap(), row.layer.unwrap()))
        .collect();
    let layers = 0..known.expected.layers() as u16;
    let all: BTreeSet<(u32, u16)> = passes
        .iter()
        .flat_map(|pass| layers.clone().map(|layer| (*pass, layer)))
        .collect();
    assert!(seen.is_disjoint(&missing));
    assert_eq!(&seen | &missing, all);
}

#[test]
fn a_trace_of_several_files() {
    let directory = scratch();
    let path = directory.path().join("routes.arrows");
    let option = format!("--trace={}", path.display());
    let options = [option.as_str(), "--rotate=1K"];
    let mut traced = Traced::start_with(&options, &known_small().path, &["-t", "1", "-c", "4096"]);
    for start in 0..20 {
        traced.command(&format!("prompt 0 100 {start}"));
    }
    let (stats, _) = traced.finish();

    let files: Vec<String> = stats.0["trace"]["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|file| file.as_str().unwrap().to_owned())
        .collect();
    assert!(files.len() > 1, "{files:?}");
    assert!(!path.exists());
    let mut all = Vec::new();
    for (number, file) in files.iter().enumerate() {
        assert!(
            file.ends_with(&format!("routes.{number:04}.arrows")),
            "{file}"
        );
        let (rows, ending) = read(file.as_ref());
        assert_eq!(ending, Ending::Whole, "{file}");
        assert_eq!(
            Reader::open(file.as_ref()).unwrap().capture().part,
            number as u32
        );
        let is_last = number + 1 == files.len();
        assert_eq!(rows.iter().any(|row| row.is(Kind::Summary)), is_last);
        if let Some(first) = rows.iter().find(|row| row.context.is_some()) {
            assert_eq!(first.kind, Kind::Context, "{file}");
        }
        all.extend(rows);
    }
    assert_same_counts(&stats, &all);
}

/// What was recorded up to then is in the files before.
#[test]
fn a_file_that_cannot_be_begun_ends_the_trace_and_loses_nothing() {
    let known = known_small();
    let directory = scratch();
    let at = |name: &str| directory.path().join(name);
    fs::create_dir(at("routes.0001.arrows")).unwrap();
    let mut target = Oracle::spawn(&mut driver(&known.path, &["-t", "1", "-c", "4096"])).unwrap();
    let option = format!("--trace={}", at("routes.arrows").display());
    let mut tracer = Attached::to(target.pid(), &[&option, "--rotate=1K"]).unwrap();
    target.command("prompt 0 100 20").unwrap();
    // Until the next pass begins, nobody knows that this one is over.
    target.command("decode 0 3").unwrap();
    tracer.wait_for("the trace ends here").unwrap();
    let said = tracer.interrupt().unwrap();
    assert!(said.contains("INCOMPLETE"), "{said}");
    assert!(target.quit().unwrap().success());
    let (rows, _) = read(&at("routes.0000.arrows"));
    let layers = known.expected.layers() as usize;
    assert_eq!(routed(&rows).count(), 100 * (layers - 1) + 1);
}

#[test]
fn a_full_disk_ends_the_trace_and_not_the_capture() {
    let directory = scratch();
    let stats_path = directory.path().join("stats.json");
    let full = Path::new("/dev/full");
    assert!(fs::metadata(full).unwrap().file_type().is_char_device());
    let options = [
        "--trace=/dev/full".to_owned(),
        format!("--output={}", stats_path.display()),
    ];
    let mut command = tracer::run(&options, &driver(&known_small().path, &["-t", "1"])).unwrap();
    let mut target = Oracle::spawn(&mut command).unwrap();
    target.command("prompt 0 10 20").unwrap();
    assert!(target.quit().unwrap().success());
    let stats = Stats::read(&stats_path).unwrap();
    assert_eq!(stats.tokens()[&0], 10);
    assert_eq!(stats.0["integrity"]["complete"], false);
    assert_eq!(
        stats.number("/integrity/received/rows"),
        stats.number("/integrity/rows/seen")
    );
    let problems = stats.0["integrity"]["problems"].to_string();
    assert!(problems.contains("No space left on device"), "{problems}");
}

/// Who reads a pipe has the rows a second after they came.
#[test]
fn a_pipe_is_a_trace_that_goes_on() {
    let directory = scratch();
    let path = directory.path().join("pipe");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let (send, rows) = std::sync::mpsc::channel();
    let reader = {
        let path = path.clone();
        std::thread::spawn(move || {
            let mut reader = Reader::open(&path).unwrap();
            while let Some(batch) = reader.next().unwrap() {
                for row in batch.rows() {
                    let _ = send.send(row.kind);
                }
            }
            reader.ending().unwrap().clone()
        })
    };
    let option = format!("--trace={}", path.display());
    let mut traced = Traced::start_with(&[&option], &known_small().path, &["-t", "1"]);
    traced.command("prompt 0 10 20");
    traced.command("decode 0 3");
    let wait = Duration::from_secs(60);
    assert_eq!(rows.recv_timeout(wait), Ok(Kind::Context));
    assert_eq!(rows.recv_timeout(wait), Ok(Kind::Routed));
    traced.finish();
    assert_eq!(reader.join().unwrap(), Ending::Whole);
    assert_eq!(rows.into_iter().last(), Some(Kind::Summary));
}

/// A reader that has stopped to read does not keep the tracer, nor the counts.
#[test]
fn a_pipe_that_nobody_reads_is_given_up() {
    let directory = scratch();
    let [pipe, json] = ["pipe", "stats.json"].map(|name| directory.path().join(name));
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Both ends, so that nobody waits for the other; and a page holds less than the trace.
    let reader = fs::File::options()
        .read(true)
        .write(true)
        .open(&pipe)
        .unwrap();
    nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    let option = format!("--trace={}", pipe.display());
    let arguments = ["-t", "1", "-c", "4096"];
    let mut target = Oracle::spawn(&mut driver(&known_small().path, &arguments)).unwrap();
    let options = [&*option, "-o", json.to_str().unwrap()];
    let mut tracer = Attached::to(target.pid(), &options).unwrap();
    target.command("prompt 0 300 20").unwrap();
    target.command("generate 0 50 7").unwrap();
    tracer.signal(Signal::SIGINT).unwrap();
    tracer.wait_for("Ctrl-C gives up the rest of it").unwrap();
    tracer.signal(Signal::SIGINT).unwrap();
    let (status, said) = tracer.wait().unwrap();
    assert!(status.success(), "{said}");
    assert!(said.contains("the trace is not complete"), "{said}");
    let stats = Stats::read(&json).unwrap();
    assert_eq!(stats.tokens()[&0], 350);
    assert_eq!(stats.0["integrity"]["complete"], false);
    assert!(target.quit().unwrap().success());
}

#[test]
fn places_that_cannot_be_are_refused_before_anything_runs() {
    let directory = scratch();
    let file = directory.path().join("one").display().to_string();
    let trace = format!("--trace={file}");
    let later = directory.path().join("one.0003").display().to_string();
    for (options, why) in [
        (
            vec![format!("--output={file}"), trace.clone()],
            "in one file",
        ),
        (vec![format!("--log={file}"), trace.clone()], "in one file"),
        (
            vec![
                format!("--output={later}"),
                trace.clone(),
                "--rotate=1G".to_owned(),
            ],
            "one of the trace's files",
        ),
        (vec!["--trace=/nowhere/x".to_owned()], "/nowhere"),
        (vec!["--tokens".to_owned()], "--trace"),
        (vec![trace, "--rotate=10".to_owned()], "such as 1G"),
    ] {
        let command = tracer::run(&options, Command::new("true").arg("x"));
        let output = command.unwrap().output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{options:?}: {said}");
        assert!(said.contains(why), "{options:?}: {said}");
    }
}
