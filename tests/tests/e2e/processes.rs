//! Forks, execs, and libraries that come late.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
    sync::OnceLock,
    thread,
};

use expert_trace_tests::tracer::{self, Attached, Stats, read_log};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::{
    layouts::compile,
    support::{driver, ids, known_small, llama, scratch},
};

/// Experts, k and tokens of a pass of `late`.
const SHAPE: [&str; 3] = ["32", "4", "3"];

/// A program that opens the real libggml-cpu at run time.
fn late() -> &'static Path {
    static PROGRAM: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, program) = PROGRAM.get_or_init(|| {
        let bin = llama().bin.display();
        let headers = format!("-I{}", llama().ggml_headers().display());
        let libraries = [format!("-L{bin}"), format!("-Wl,-rpath,{bin}")];
        let [search, load] = &libraries;
        compile("late.c", &[&headers, search, load, "-lggml-base", "-ldl"])
    });
    program
}

fn libggml_cpu() -> PathBuf {
    llama().bin.join("libggml-cpu.so")
}

/// What one pass of `late` routes, by its own description.
fn rows_of_late() -> Vec<(u32, Vec<u32>)> {
    (0..3)
        .map(|row| (0, (0..4).map(|i| (row * 4 + i) % 32).collect()))
        .collect()
}

/// A script that a shell runs.
fn script(directory: &Path, text: &str) -> PathBuf {
    let path = directory.join("start.sh");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A run's document, and the rows of its log.
fn run(options: &[&str], command: &Command) -> (Stats, Vec<(u32, Vec<u32>)>) {
    let directory = scratch();
    let [path, log] = ["stats.json", "log"].map(|name| directory.path().join(name));
    let mut all = vec![
        format!("--output={}", path.display()),
        format!("--log={}", log.display()),
        "--top=0".to_owned(),
    ];
    all.extend(options.iter().map(|option| (*option).to_owned()));
    let output = tracer::run(&all, command).unwrap().output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    (Stats::read(&path).unwrap(), read_log(&log).unwrap())
}

fn shell(script: &Path) -> Command {
    Command::new(script)
}

#[test]
fn the_first_row_of_a_library_opened_late_is_there_200_times() {
    let command = || {
        let mut command = Command::new(late());
        command.arg(libggml_cpu()).args(SHAPE);
        command
    };
    // Each run spends most of its time on waiting for the kernel.
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..25 {
                    let (stats, rows) = run(&[], &command());
                    stats.assert_complete();
                    assert_eq!(rows, rows_of_late());
                }
            });
        }
    });
}

#[test]
fn what_a_script_forks_is_traced() {
    let known = known_small();
    let directory = scratch();
    let target = driver(&known.path, &["-t", "1"]);
    let target: Vec<_> = [target.get_program()]
        .into_iter()
        .chain(target.get_args())
        .map(|word| word.to_str().unwrap())
        .collect();
    // A command of its own in front, a pipe, a subshell and a background process.
    let script = script(
        directory.path(),
        &format!(
            "ls / >/dev/null\n\
             (printf 'prompt 0 5 7\\nquit\\n' | {target} | cat) &\n\
             wait\n\
             printf 'prompt 0 5 9\\nquit\\n' | {target} >/dev/null",
            target = target.join(" ")
        ),
    );
    let (stats, rows) = run(&[], &shell(&script));
    stats.assert_complete();
    let contexts = stats.0["contexts"].as_array().unwrap();
    assert_eq!(contexts.len(), 2, "{contexts:#?}");
    let pids: Vec<u64> = contexts
        .iter()
        .map(|c| c["pid"].as_u64().unwrap())
        .collect();
    assert_ne!(pids[0], pids[1]);
    let processes = stats.0["processes"].as_array().unwrap();
    for (process, pid) in processes.iter().zip(pids) {
        assert_eq!(process["pid"], pid);
        assert_eq!(process["exe"], llama().oracle.to_str().unwrap());
        assert_eq!(process["command"][2], known.path.to_str().unwrap());
    }
    assert_ne!(stats.number("/target/pid"), pids_of(&stats)[0]);
    let first: Vec<&[u32]> = rows
        .iter()
        .filter(|(layer, _)| *layer == 0)
        .map(|(_, ids)| ids.as_slice())
        .collect();
    let expected: Vec<&[u32]> = (7..12)
        .chain(9..14)
        .map(|token| known.expected.ids(0, token))
        .collect();
    assert_eq!(first, expected);

    let (stats, rows) = run(&["--no-follow"], &shell(&script));
    assert_eq!(rows, []);
    assert_eq!(stats.0["contexts"].as_array().map(Vec::len), Some(0));
}

fn pids_of(stats: &Stats) -> Vec<u64> {
    let contexts = stats.0["contexts"].as_array().unwrap();
    contexts
        .iter()
        .map(|c| c["pid"].as_u64().unwrap())
        .collect()
}

/// The probes are in the memory of the parent when it forks.
#[test]
fn a_fork_without_an_exec_is_traced() {
    let (_library_directory, library) = compile("standin.c", &["-shared", "-fPIC"]);
    let (_directory, forker) = compile("forker.c", &["-ldl"]);
    let mut command = Command::new(&forker);
    command
        .arg(&library)
        .args(["new", "4", "3", "4", "128", "none"]);
    let (stats, rows) = run(&[], &command);
    stats.assert_complete();
    assert_eq!(rows.len(), 9);
    assert_ne!(stats.number("/target/pid"), pids_of(&stats)[0]);
    let (_, rows) = run(&["--no-follow"], &command);
    assert_eq!(rows, []);
}

/// Python wheels bring copies of a library. The one that is opened is probed, and no other.
#[test]
fn of_several_copies_the_mapped_one_is_probed() {
    let (_library_directory, library) = compile("standin.c", &["-shared", "-fPIC"]);
    let (_directory, loader) = compile("loader.c", &["-ldl"]);
    let directory = scratch();
    let copies = ["a.so", "b.so"].map(|name| directory.path().join(name));
    for copy in &copies {
        fs::copy(&library, copy).unwrap();
    }
    for copy in &copies {
        let mut command = Command::new(&loader);
        command
            .arg(copy)
            .args(["new", "4", "3", "4", "128", "none"]);
        let (stats, rows) = run(&[], &command);
        stats.assert_complete();
        assert_eq!(rows.len(), 9);
        for hook in stats.0["target"]["hooks"].as_array().unwrap() {
            assert_eq!(hook["file"], copy.to_str().unwrap());
        }
    }
}

/// Another process that maps the same files is none of ours.
#[test]
fn processes_that_are_not_ours_are_left_out() {
    let known = known_small();
    let mut ours = crate::support::Traced::start(&known.path, &["-t", "1"]);
    let mut other =
        expert_trace_tests::oracle::Oracle::spawn(&mut driver(&known.path, &["-t", "1"])).unwrap();
    assert_eq!(ids(&other.command("prompt 0 9 3").unwrap()).len(), 1);
    ours.command("prompt 0 4 3");
    assert_eq!(ids(&other.command("prompt 1 9 3").unwrap()).len(), 1);
    other.quit().unwrap();
    let (stats, _) = ours.finish();
    assert_eq!(stats.tokens()[&0], 4);
    assert_eq!(stats.0["processes"].as_array().map(Vec::len), Some(1));
}

/// The kernel ties probes of one process to its main thread; those of `run` to none.
#[test]
fn a_process_that_goes_on_without_its_main_thread() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let options = ["-o", path.to_str().unwrap(), "--strict"];
    let (_directory, program) = compile("mainexit.c", &["-pthread"]);
    let mut target = Command::new(&program)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = target.stdin.take().unwrap();
    let mut attached = Attached::to(target.id(), &options).unwrap();
    stdin.write_all(b"x").unwrap();
    attached
        .wait_for("the target's main thread has ended")
        .unwrap();
    drop(stdin);
    let (status, said) = attached.wait().unwrap();
    assert_eq!(status.code(), Some(3), "{said}");
    assert!(target.wait().unwrap().success());
    let stats = Stats::read(&path).unwrap();
    assert_eq!(stats.0["integrity"]["complete"], false);
    let problems = stats.0["integrity"]["problems"].to_string();
    assert!(
        problems.contains("the target's main thread has ended"),
        "{problems}"
    );

    let mut command = tracer::run(&options, &Command::new(&program)).unwrap();
    let mut run = command.stdin(Stdio::piped()).spawn().unwrap();
    run.stdin.take().unwrap().write_all(b"x").unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(0));
    assert_eq!(Stats::read(&path).unwrap().0["integrity"]["complete"], true);
}

/// A `late` that waits for us before each thing it does.
struct Waiting {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Waiting {
    /// Starts it, by a tracer or alone; returns when it waits for the first time.
    fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut waiting = Self {
            child,
            stdin,
            stdout,
        };
        waiting.settle();
        waiting
    }

    fn settle(&mut self) {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "waiting\n");
    }

    /// Lets it go on until it waits again.
    fn step(&mut self) {
        self.stdin.write_all(b"go\n").unwrap();
        self.settle();
    }

    /// Ends its input, and waits until it has ended, and then for the process we started.
    fn end(mut self) -> ExitStatus {
        drop(self.stdin);
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        self.child.wait().unwrap()
    }
}

fn waiting_late() -> Command {
    let mut command = Command::new(late());
    command.arg(libggml_cpu()).args(SHAPE).arg("wait");
    command
}

/// The child does not depend on its tracer, not even when it opens a library.
#[test]
fn a_program_survives_its_tracer() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let options = ["-o", path.to_str().unwrap()];
    let mut command = tracer::run(&options, &waiting_late()).unwrap();
    command.stderr(Stdio::null());
    let mut target = Waiting::start(command);
    let tracer = Pid::from_raw(target.child.id() as i32);
    kill(tracer, Signal::SIGKILL).unwrap();
    // It opens libggml-cpu and computes, twice.
    target.step();
    target.step();
    assert!(!target.end().success());
    assert!(!path.exists());
}

/// A library that the target loads after we have attached.
#[test]
fn attach_picks_up_a_library_that_comes_later() {
    let directory = scratch();
    let [path, log] = ["stats.json", "log"].map(|name| directory.path().join(name));
    let options = [
        format!("--output={}", path.display()),
        format!("--log={}", log.display()),
    ];
    let mut target = Waiting::start(waiting_late());
    let mut attached = Attached::to(target.child.id(), &options).unwrap();
    target.step();
    attached.wait_for("libggml-cpu").unwrap();
    target.step();
    target.step();
    let said = attached.interrupt().unwrap();
    assert!(target.end().success());
    let stats = Stats::read(&path).unwrap();
    let late = &stats.0["capture"]["late_libraries"];
    assert_eq!(late.as_array().map(Vec::len), Some(1), "{said}");
    // The first pass ran as soon as the library was there: before the probe or after it.
    let missed = late[0]["passes"].as_u64().unwrap();
    assert!(missed <= 1, "{late:#}");
    assert_eq!(stats.0["integrity"]["complete"], missed == 0, "{said}");
    let rows = read_log(&log).unwrap();
    let passes = 3 - missed as usize;
    assert_eq!(rows, vec![rows_of_late(); passes].concat());
}

/// What ran before the probe is reported: here everything, since the tracer was stopped meanwhile.
#[test]
fn what_ran_before_a_late_library_was_probed_is_reported() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let options = ["-o", path.to_str().unwrap()];
    let mut target = Waiting::start(waiting_late());
    let mut attached = Attached::to(target.child.id(), &options).unwrap();
    attached.signal(Signal::SIGSTOP).unwrap();
    target.step();
    target.step();
    attached.signal(Signal::SIGCONT).unwrap();
    attached.wait_for("libggml-cpu").unwrap();
    target.step();
    let said = attached.interrupt().unwrap();
    assert!(target.end().success());
    let stats = Stats::read(&path).unwrap();
    let late = &stats.0["capture"]["late_libraries"][0];
    assert_eq!(late["passes"], 2, "{said}");
    assert!(late["files"][0].as_str().unwrap().contains("libggml-cpu"));
    assert_eq!(stats.0["integrity"]["complete"], false);
    assert!(said.contains("2 passes began in the"), "{said}");
    assert_eq!(stats.tokens()[&0], 3);
}
