//! Forks, execs, and libraries that come late.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    thread,
};

use expert_trace_tests::tracer::{self, Attached, Stats, read_log};
use nix::{
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};
use tempfile::TempDir;

use crate::{
    errors::without_uprobe_multi,
    layouts::compile,
    support::{Waiting, driver, ids, known_small, llama, scratch},
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
fn the_first_row_of_a_library_opened_late_is_there() {
    first_rows(2);
}

#[test]
#[ignore = "takes a minute and a half: cargo test --test e2e -- --ignored 200_times"]
fn the_first_row_of_a_library_opened_late_is_there_200_times() {
    first_rows(25);
}

/// Runs eight times as often as `runs` says.
fn first_rows(runs: u32) {
    let command = || {
        let mut command = Command::new(late());
        command.arg(libggml_cpu()).args(SHAPE);
        command
    };
    // Each run spends most of its time on waiting for the kernel.
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..runs {
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
    let (_directory, forker) = compile("loader.c", &["-ldl", "-DFORK"]);
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

/// Changes to a file that leave its code alone change nothing, and those that do not are seen: neither
/// is a row counted twice, nor does a breakpoint stay where other code is now.
#[test]
fn a_file_that_changes_during_the_run_is_probed_once() {
    let directory = scratch();
    let [one, other] = ["-O1", "-O0"].map(|level| compile("standin.c", &[level]));
    let program = directory.path().join("program");
    let text = format!(
        "p={program}; run() {{ $p new 4 3 4 128 none; }}; cp {one} $p; run; chmod 700 $p; run; touch $p; \
         run; ln $p $p.2; run; cat {other} >$p; run; cat {one} >$p; run; cp {other} $p.3; mv $p.3 $p; run",
        program = program.display(),
        one = one.1.display(),
        other = other.1.display()
    );
    let (stats, rows) = run(&[], &shell(&script(directory.path(), &text)));
    stats.assert_complete();
    let contexts = stats.0["contexts"].as_array().unwrap();
    assert_eq!(contexts.len(), 7);
    for (id, context) in contexts.iter().enumerate() {
        assert_eq!(context["passes"], 1, "context {id}");
        assert_eq!(context["layers"][0]["total_tokens"], 3, "context {id}");
    }
    assert_eq!(rows.len(), 7 * 9);
    assert_eq!(rows[..9], rows[6 * 9..]);
}

/// The functions are in the executable itself, which is named by a descriptor.
#[test]
fn a_program_executed_by_its_descriptor_is_traced() {
    let (_directory, program) = compile("standin.c", &["-static"]);
    let directory = scratch();
    for path in ["/dev/fd/3", "/proc/self/fd/3", "/proc/$$/fd/3"] {
        let text = format!(
            "exec 3<{}; exec {path} new 4 3 4 128 none",
            program.display()
        );
        let (stats, rows) = run(&[], &shell(&script(directory.path(), &text)));
        stats.assert_complete();
        assert_eq!(rows.len(), 9, "{path}");
    }
}

/// A process that is ended by another thread, or by an exec, in the middle of a pass.
#[test]
fn a_pass_that_was_cut_is_not_counted() {
    let (_directory, program) = compile("standin.c", &[]);
    let mut command = Command::new(&program);
    command.args(["new", "4", "3", "4", "128", "half"]);
    let (stats, rows) = run(&[], &command);
    stats.assert_complete();
    assert_eq!(rows.len(), 9);
    assert_eq!(stats.excluded("partial"), (1, 3));
}

/// What a run leaves behind goes on, also when it is just about to start something.
#[test]
fn what_outlives_the_run_goes_on() {
    for _ in 0..5 {
        let directory = scratch();
        let fifo = directory.path().join("fifo");
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        let script = script(
            directory.path(),
            "{ >$0.begun; i=0; while [ $i -lt 300 ]; do /bin/true; i=$((i+1)); done; \
             echo done >${0%/*}/fifo; } >/dev/null 2>&1 &\n\
             while [ ! -e $0.begun ]; do :; done",
        );
        let output = tracer::run::<&str>(&[], &shell(&script))
            .unwrap()
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert!(
            said.contains("go on; they are not traced any more"),
            "{said}"
        );
        assert_eq!(fs::read_to_string(&fifo).unwrap(), "done\n");
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

/// Where probes are perf events, those of one process end with its main thread.
#[test]
fn a_process_that_goes_on_without_its_main_thread() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let options = ["-o", path.to_str().unwrap(), "--strict"];
    let (_directory, program) = compile("mainexit.c", &["-pthread"]);
    let (_library_directory, library) = compile("standin.c", &["-shared", "-fPIC"]);
    let start = || {
        let mut target = Command::new(&program);
        let target = target.arg(&library).stdin(Stdio::piped());
        target.spawn().unwrap()
    };
    // It calls the function once for each byte after the first.
    let calls = |stats: &Stats| {
        let hooks = stats.0["target"]["hooks"].as_array().unwrap().iter();
        let of_function = hooks.filter(|hook| hook["symbol"] == "ggml_backend_sched_free");
        let hits = of_function.map(|hook| hook["hits"].as_u64().unwrap());
        hits.sum::<u64>()
    };
    let has_no_main_thread = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.contains(") Z ")
    };

    let mut target = start();
    let mut stdin = target.stdin.take().unwrap();
    let attached = Attached::to(target.id(), &options).unwrap();
    stdin.write_all(b"x").unwrap();
    while !has_no_main_thread(target.id()) {
        thread::yield_now();
    }
    stdin.write_all(b"123").unwrap();
    drop(stdin);
    let (status, said) = attached.wait().unwrap();
    assert_eq!(status.code(), Some(0), "{said}");
    assert!(target.wait().unwrap().success());
    let stats = Stats::read(&path).unwrap();
    assert_eq!(stats.0["capture"]["attached_by"], "uprobe_multi");
    assert_eq!(calls(&stats), 3);

    // What it loads then cannot be probed.
    let mut target = start();
    let mut stdin = target.stdin.take().unwrap();
    let mut attached = Attached::to(target.id(), &options).unwrap();
    stdin.write_all(b"x").unwrap();
    while !has_no_main_thread(target.id()) {
        thread::yield_now();
    }
    stdin.write_all(b"l").unwrap();
    let words = "was loaded after the target's main thread had ended";
    attached.wait_for(words).unwrap();
    drop(stdin);
    let (status, said) = attached.wait().unwrap();
    assert_eq!(status.code(), Some(3), "{said}");
    assert!(target.wait().unwrap().success());

    let mut target = start();
    let mut stdin = target.stdin.take().unwrap();
    let mut tracer = without_uprobe_multi();
    tracer.args(["attach", "--pid", &target.id().to_string()]);
    let mut attached = Attached::by(tracer.args(options)).unwrap();
    stdin.write_all(b"x").unwrap();
    attached
        .wait_for("the target's main thread has ended")
        .unwrap();
    stdin.write_all(b"123").unwrap();
    drop(stdin);
    let (status, said) = attached.wait().unwrap();
    assert_eq!(status.code(), Some(3), "{said}");
    assert!(target.wait().unwrap().success());
    let stats = Stats::read(&path).unwrap();
    assert_eq!(stats.0["capture"]["attached_by"], "perf_event");
    assert_eq!(stats.0["integrity"]["complete"], false);
    assert_eq!(calls(&stats), 0);
    let problems = stats.0["integrity"]["problems"].to_string();
    assert!(
        problems.contains("the target's main thread has ended"),
        "{problems}"
    );

    let mut command = tracer::run(&options, &Command::new(&program)).unwrap();
    let mut run = command.stdin(Stdio::piped()).spawn().unwrap();
    run.stdin.take().unwrap().write_all(b"x123").unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(0));
    let stats = Stats::read(&path).unwrap();
    assert_eq!(stats.0["integrity"]["complete"], true);
    assert_eq!(calls(&stats), 3);
}

fn waiting_late() -> Command {
    let mut command = Command::new(late());
    command.arg(libggml_cpu()).args(SHAPE).arg("wait");
    command
}

/// A `late` that waits for the first time; it does so before each thing it does.
fn waiting(command: Command) -> Waiting {
    let mut target = Waiting::start(command);
    target.until_it_waits();
    target
}

/// Lets it go on until it waits again.
fn step(target: &mut Waiting) {
    target.go_on();
    target.until_it_waits();
}

/// The child does not depend on its tracer, not even when it opens a library.
#[test]
fn a_program_survives_its_tracer() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let options = ["-o", path.to_str().unwrap()];
    let mut command = tracer::run(&options, &waiting_late()).unwrap();
    command.stderr(Stdio::null());
    let mut target = waiting(command);
    let tracer = Pid::from_raw(target.pid() as i32);
    kill(tracer, Signal::SIGKILL).unwrap();
    // It opens libggml-cpu and computes, twice.
    step(&mut target);
    step(&mut target);
    assert!(!target.end().1.success());
    assert!(!path.exists());
}

/// Nor does it when it waits for the tracer in the moment when that is killed.
#[test]
fn a_program_that_waits_for_its_tracer_survives_it() {
    let mut command = tracer::run::<&str>(&[], &waiting_late()).unwrap();
    command.stderr(Stdio::null());
    let mut target = waiting(command);
    let tracer = Pid::from_raw(target.pid() as i32);
    let children = fs::read_to_string(format!("/proc/{tracer}/task/{tracer}/children")).unwrap();
    let is_late =
        |pid: &&str| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == late());
    let pid = children.split(' ').find(is_late).unwrap();
    kill(tracer, Signal::SIGSTOP).unwrap();
    target.go_on();
    let waits = || {
        let wchan = fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap();
        wchan.starts_with("seccomp_do_user_notification")
    };
    while !waits() {
        thread::yield_now();
    }
    kill(tracer, Signal::SIGKILL).unwrap();
    target.until_it_waits();
    assert!(!target.end().1.success());
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
    let mut target = waiting(waiting_late());
    let mut attached = Attached::to(target.pid(), &options).unwrap();
    step(&mut target);
    attached.wait_for("libggml-cpu").unwrap();
    step(&mut target);
    step(&mut target);
    let said = attached.interrupt().unwrap();
    assert!(target.end().1.success());
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
    let mut target = waiting(waiting_late());
    let mut attached = Attached::to(target.pid(), &options).unwrap();
    attached.signal(Signal::SIGSTOP).unwrap();
    step(&mut target);
    step(&mut target);
    attached.signal(Signal::SIGCONT).unwrap();
    attached.wait_for("libggml-cpu").unwrap();
    step(&mut target);
    let said = attached.interrupt().unwrap();
    assert!(target.end().1.success());
    let stats = Stats::read(&path).unwrap();
    let late = &stats.0["capture"]["late_libraries"][0];
    assert_eq!(late["passes"], 2, "{said}");
    assert!(late["files"][0].as_str().unwrap().contains("libggml-cpu"));
    assert_eq!(stats.0["integrity"]["complete"], false);
    assert!(said.contains("2 passes began in the"), "{said}");
    assert_eq!(stats.tokens()[&0], 3);
}
