//! How long the tracer takes until its probes are set, and from the end of a capture to its own.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use expert_trace_tests::{
    builds::Build,
    comparison,
    oracle::Oracle,
    tracer::{self, Attached, Stats},
};
use nix::{
    fcntl::OFlag,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::Effort;
use crate::{
    errors::{Idle, compile_idle, idle, without_uprobe_multi},
    support::{driver, known_small, scratch},
};

/// Milliseconds until the probes of one library are set.
const ARMED: f64 = 150.0;
/// The same of a file of a hundred megabytes with DWARF.
const ARMED_LARGE: f64 = 1000.0;
/// Milliseconds to end in, without probes, and for each of them.
const END: (f64, f64) = (100.0, 90.0);
/// What is a large file, in bytes.
const LARGE: u64 = 100_000_000;

const RESULT: &str = "RESULT ";

/// Rounds that show the scatter of a start.
const ROUNDS: usize = 40;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    UprobeMulti,
    PerfEvents,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Interrupt,
    TargetEnds,
}

/// What is traced.
#[derive(Clone, Debug)]
enum Target {
    /// A program with one of the functions.
    Function(PathBuf),
    /// The driver, with llama.cpp's shared libraries and a model.
    LlamaCpp,
    /// A program that maps a large library.
    Large(PathBuf),
    /// Nothing, from its start on.
    True,
}

#[derive(Clone, Debug)]
struct Arm {
    target: Target,
    by: By,
    end: End,
}

struct Sample {
    armed_ms: f64,
    end_ms: f64,
    probes: usize,
}

impl Arm {
    fn measure(&self) -> Sample {
        let directory = scratch();
        let json = directory.path().join("stats.json");
        let mut command = match self.by {
            By::UprobeMulti => tracer::command().unwrap(),
            By::PerfEvents => without_uprobe_multi(),
        };
        let attach = |command: &mut Command, pid: u32| {
            command.args(["attach", "--top=0", "--pid", &pid.to_string(), "-o"]);
            command.arg(&json);
        };
        let (armed_ms, end_ms) = match &self.target {
            Target::Function(program) => {
                let idle = Idle::start(Command::new(program));
                attach(&mut command, idle.pid());
                self.times(&mut command, || drop(idle))
            }
            Target::Large(library) => {
                let mut maps = Command::new(idle());
                maps.arg(library);
                let idle = Idle::start(maps);
                attach(&mut command, idle.pid());
                self.times(&mut command, || drop(idle))
            }
            Target::LlamaCpp => {
                let mut target = driver(&known_small().path, &["-t", "1"]);
                let target = Oracle::spawn(&mut target).unwrap();
                attach(&mut command, target.pid());
                self.times(&mut command, || assert!(target.quit().unwrap().success()))
            }
            Target::True => {
                command.args(["run", "--top=0", "-o"]).arg(&json);
                command.args(["--", "true"]);
                self.times(&mut command, || {})
            }
        };
        let stats = Stats::read(&json).unwrap();
        assert_eq!(stats.0["integrity"]["complete"], true);
        let by = match self.by {
            By::UprobeMulti => "uprobe_multi",
            By::PerfEvents => "perf_event",
        };
        assert_eq!(stats.0["capture"]["attached_by"], by);
        let hooks = stats.0["target"]["hooks"].as_array();
        let hooks = hooks.map_or(&[][..], Vec::as_slice);
        if let Target::Large(library) = &self.target {
            let library = library.to_str().unwrap();
            assert!(
                hooks.iter().any(|hook| hook["file"] == library),
                "{hooks:?}"
            );
        }
        Sample {
            armed_ms,
            end_ms,
            probes: hooks.len(),
        }
    }

    /// Until it says that it traces, and from when it has to end until it has.
    fn times(&self, command: &mut Command, end_target: impl FnOnce()) -> (f64, f64) {
        let began = Instant::now();
        let tracer = Attached::by(command).unwrap();
        let armed = began.elapsed();
        let mut began = Instant::now();
        if self.end == End::Interrupt {
            tracer.interrupt().unwrap();
        } else {
            end_target();
            if !matches!(self.target, Target::True) {
                began = Instant::now();
            }
            let (status, said) = tracer.wait().unwrap();
            assert!(status.success(), "{said}");
        }
        (milliseconds(armed), milliseconds(began.elapsed()))
    }

    fn name(&self) -> &'static str {
        match self.target {
            Target::Function(_) => "a program with one of the functions",
            Target::LlamaCpp => "llama.cpp's shared libraries",
            Target::Large(_) => "a library of over 100 MB, with DWARF",
            Target::True => "run -- true",
        }
    }

    fn armed_goal(&self) -> Option<f64> {
        match self.target {
            Target::Function(_) | Target::LlamaCpp => Some(ARMED),
            Target::Large(_) => Some(ARMED_LARGE),
            Target::True => None,
        }
    }

    fn rows(&self, samples: &[Sample]) -> [Value; 2] {
        let probes = samples[0].probes;
        assert!(samples.iter().all(|sample| sample.probes == probes));
        let end_goal = END.0 + END.1 * probes as f64;
        let armed: Vec<f64> = samples.iter().map(|sample| sample.armed_ms).collect();
        let end: Vec<f64> = samples.iter().map(|sample| sample.end_ms).collect();
        let ended = match (&self.target, self.end) {
            (Target::True, _) => "start of the program to the tracer's end",
            (_, End::Interrupt) => "SIGINT to the tracer's end",
            (_, End::TargetEnds) => "the target's end to the tracer's",
        };
        [
            ("the tracer's start to probes set", armed, self.armed_goal()),
            (ended, end, Some(end_goal)),
        ]
        .map(|(measure, times, goal)| {
            // Of one arm alone: the interval of the median.
            let time = comparison::ratio(&times, &vec![1.0; times.len()]);
            let met = goal.map(|goal| match () {
                () if time.high <= goal => Value::from(true),
                () if time.low > goal => Value::from(false),
                () => Value::from("not resolved"),
            });
            json!({
                "target": self.name(),
                "attached_by": match self.by {
                    By::UprobeMulti => "uprobe_multi",
                    By::PerfEvents => "perf_event",
                },
                "probes": probes,
                "measure": measure,
                "rounds": times.len(),
                "ms": time.median,
                "low_ms": time.low,
                "high_ms": time.high,
                "goal_ms": goal,
                "met": met,
            })
        })
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn measure(effort: Effort) -> Vec<Value> {
    let (_directory, hooked) = compile_idle(&["-DHOOKED"]);
    let function = |by, end| Arm {
        target: Target::Function(hooked.clone()),
        by,
        end,
    };
    let mut arms = vec![
        function(By::UprobeMulti, End::Interrupt),
        function(By::PerfEvents, End::TargetEnds),
        Arm {
            target: Target::True,
            by: By::UprobeMulti,
            end: End::TargetEnds,
        },
    ];
    let large = Target::Large(large_library());
    let (rounds, until) = match effort {
        Effort::Smoke => {
            arms.push(Arm {
                target: large,
                by: By::UprobeMulti,
                end: End::Interrupt,
            });
            (1, None)
        }
        Effort::Full { limit } => {
            arms.push(function(By::UprobeMulti, End::TargetEnds));
            arms.push(function(By::PerfEvents, End::Interrupt));
            for target in [Target::LlamaCpp, large] {
                for by in [By::UprobeMulti, By::PerfEvents] {
                    arms.push(Arm {
                        target: target.clone(),
                        by,
                        end: End::Interrupt,
                    });
                }
            }
            (ROUNDS, Some(Instant::now() + limit))
        }
    };
    let mut samples: Vec<Vec<Sample>> = arms.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds {
        if until.is_some_and(|until| Instant::now() > until) {
            break;
        }
        for arm in comparison::order(arms.len(), round as u64) {
            samples[arm].push(arms[arm].measure());
        }
    }
    let rows = arms.iter().zip(&samples);
    let mut rows: Vec<Value> = rows.flat_map(|(arm, samples)| arm.rows(samples)).collect();
    rows.push(json!({
        "target": "a program with one of the functions",
        "attached_by": "uprobe_multi",
        "measure": "outputs are complete before detaching begins",
        "met": outputs_come_before_detaching(&hooked),
    }));
    rows
}

/// Of the builds that others publish, one that is large enough.
fn large_library() -> PathBuf {
    let builds = Build::list_from_env().unwrap();
    let mut files = builds.iter().flat_map(|build| &build.command);
    let is_large = |file: &&PathBuf| fs::metadata(file).is_ok_and(|file| file.len() >= LARGE);
    let file = files.find(is_large).expect("a large library");
    // As it is mapped.
    fs::canonicalize(file).unwrap()
}

/// Has a tracer end whose last words nobody reads, so that it waits before it detaches. Gives whether its
/// document is there and complete by then, while the breakpoint is still in the target.
fn outputs_come_before_detaching(program: &Path) -> bool {
    let directory = scratch();
    let json = directory.path().join("stats.json");
    let idle = Idle::start(Command::new(program));
    let (read, write) = io::pipe().unwrap();
    let mut command = tracer::command().unwrap();
    command.args(["attach", "--pid", &idle.pid().to_string(), "-o"]);
    let mut tracer = command
        .arg(&json)
        .stderr(write.try_clone().unwrap())
        .spawn()
        .unwrap();
    drop(command);
    let mut read = BufReader::new(read);
    let mut line = String::new();
    read.read_line(&mut line).unwrap();
    assert!(line.starts_with("Expert tracing enabled"), "{line}");
    fill(write.as_raw_fd());
    drop(write);

    kill(Pid::from_raw(tracer.id() as i32), Signal::SIGINT).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let stats = loop {
        match Stats::read(&json) {
            Ok(stats) => break stats,
            Err(error) => assert!(Instant::now() < deadline, "{error:#}"),
        }
        std::thread::yield_now();
    };
    let probed = at_the_probe(idle.pid(), program, &stats);
    let complete = stats.0["integrity"]["complete"] == true;
    let runs = tracer.try_wait().unwrap().is_none();

    io::copy(&mut read, &mut io::sink()).unwrap();
    assert!(tracer.wait().unwrap().success());
    let original = at_the_probe(idle.pid(), program, &stats);
    complete && runs && probed != original
}

/// Fills a pipe, for whoever else writes to it to wait.
fn fill(pipe: i32) {
    let mut pipe = OpenOptions::new()
        .write(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(format!("/proc/self/fd/{pipe}"))
        .unwrap();
    for chunk in [4096, 1] {
        while pipe.write(&vec![b'\n'; chunk]).is_ok() {}
    }
}

/// The instruction's first byte where a document has its first probe in a program, in the process' memory.
fn at_the_probe(pid: u32, program: &Path, stats: &Stats) -> u8 {
    let hooks = stats.0["target"]["hooks"].as_array().unwrap();
    let name = program.to_str().unwrap();
    let hook = hooks.iter().find(|hook| hook["file"] == name).unwrap();
    let offset = hook["file_offset"].as_u64().unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let address = maps.lines().filter(|line| line.ends_with(name));
    let mut address = address.filter_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let (from, to) = fields[0].split_once('-').unwrap();
        let into = offset.checked_sub(number(fields[2]))?;
        (into < number(to) - number(from)).then(|| number(from) + into)
    });
    let mut byte = [0];
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    memory
        .read_exact_at(&mut byte, address.next().unwrap())
        .unwrap();
    byte[0]
}

#[test]
fn smoke() {
    let rows = measure(Effort::Smoke);
    assert_eq!(rows.len(), 9);
    for row in &rows[..8] {
        assert!(row["ms"].as_f64().is_some_and(|ms| ms > 0.0), "{row}");
        assert_eq!(row["rounds"], 1);
    }
    // By kind: with a function there is a probe, and each means of attaching has had its turn.
    assert!(rows[0]["probes"].as_u64() >= Some(1), "{}", rows[0]);
    assert_eq!(rows[2]["attached_by"], "perf_event");
    assert!(rows[6]["probes"].as_u64() >= Some(1), "{}", rows[6]);
    assert_eq!(rows[8]["met"], true, "{}", rows[8]);
}

#[test]
#[ignore = "takes minutes; run by `cargo xtask bench start`"]
fn times() {
    for row in measure(Effort::asked()) {
        println!("{RESULT}{row}");
    }
}
