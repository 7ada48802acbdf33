//! `attach --all`: every process that maps a library, each with a document of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use expert_trace_tests::{
    oracle::Oracle,
    tracer::{self, Attached, Stats, count, read_log},
};
use tempfile::TempDir;

use crate::{
    control::{ctl, dump},
    support::{Known, driver, known_draft, known_small, llama, scratch},
};

/// A libggml-cpu that no other process on this machine maps.
struct Library {
    directory: TempDir,
}

impl Library {
    fn new() -> Self {
        let directory = scratch();
        let name = "libggml-cpu.so.0";
        fs::copy(llama().bin.join(name), directory.path().join(name)).unwrap();
        // Whoever asks for it may do so by another name.
        std::os::unix::fs::symlink(name, directory.path().join("link.so")).unwrap();
        Self { directory }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts a driver with it.
    fn start(&self, model: &Known) -> Oracle {
        let mut command = driver(&model.path, &["-t", "1"]);
        command.env("LD_LIBRARY_PATH", self.directory.path());
        Oracle::spawn(&mut command).unwrap()
    }

    fn attach(&self, options: &[&str]) -> Command {
        let mut command = tracer::command().unwrap();
        command.args(["attach", "--all", "--top=0", "--library"]);
        command.arg(self.at("link.so")).args(options);
        command
    }

    /// What the tracer says, which has to refuse; else it would end soon.
    fn refusal(&self, name: &str, options: &[&str]) -> String {
        let mut command = tracer::command().unwrap();
        command.args(["attach", "--all", "-d", "10ms", "--library"]);
        let output = command.arg(self.at(name)).args(options).output().unwrap();
        assert_eq!(output.status.code(), Some(125), "{}", said(&output));
        said(&output)
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Fails unless a process' document and log hold these tokens of its model, and nothing else.
fn assert_tokens(known: &Known, stats: &Path, log: &Path, tokens: &[u32]) -> Stats {
    let stats = Stats::read(stats).unwrap();
    stats.assert_complete();
    let rows = read_log(log).unwrap();
    let first = || rows.iter().filter(|(layer, _)| *layer == 0);
    let seen: Vec<&[u32]> = first().map(|(_, ids)| ids.as_slice()).collect();
    let expected: Vec<&[u32]> = tokens
        .iter()
        .map(|token| known.expected.ids(0, *token))
        .collect();
    assert_eq!(seen, expected);
    let expected = expected.into_iter().map(|ids| (0, ids));
    assert_eq!(stats.counts()[&0], count(expected)[&0]);
    stats
}

#[test]
fn each_process_has_its_own_document() {
    let library = Library::new();
    let models = [known_small(), known_draft(), known_small()];
    let mut targets = models.map(|model| library.start(model));
    let pids = [0, 1, 2].map(|i: usize| targets[i].pid());
    let place = |name: &str, pid: u32| library.at(&format!("{name} of {pid}"));
    let [stats, log] = ["stats of %p", "log of %p"].map(|name| library.at(name));
    let log_option = format!("--log={}", log.display());
    let options = ["-o", stats.to_str().unwrap(), &log_option, "--strict"];
    let mut attached = Attached::by(&mut library.attach(&options)).unwrap();
    // It has the library, too, and is none of those that had it then.
    let mut late = library.start(known_small());

    for (target, start) in targets.iter_mut().zip([100, 200, 300]) {
        target.command(&format!("prompt 0 20 {start}")).unwrap();
    }
    late.command("prompt 0 20 400").unwrap();
    let [first, mut second, mut third] = targets;
    // One ends, and is done with at once; the others go on.
    assert!(first.quit().unwrap().success());
    let written = place("stats", pids[0]);
    attached
        .wait_for(&format!("Statistics exported to: {}", written.display()))
        .unwrap();
    second.command("decode 0 7").unwrap();
    third.command("prompt 0 5 700").unwrap();
    attached.interrupt().unwrap();
    for target in [second, third, late] {
        assert!(target.quit().unwrap().success());
    }

    let tokens: [Vec<u32>; 3] = [
        (100..120).collect(),
        (200..220).chain([7]).collect(),
        (300..320).chain(700..705).collect(),
    ];
    let ends = ["target_exited", "interrupted", "interrupted"];
    for i in 0..3 {
        let [stats, log] = ["stats", "log"].map(|name| place(name, pids[i]));
        let stats = assert_tokens(models[i], &stats, &log, &tokens[i]);
        assert_eq!(stats.0["capture"]["ended"], ends[i]);
        assert_eq!(stats.number("/target/pid"), u64::from(pids[i]));
        assert_eq!(stats.0["contexts"].as_array().map(Vec::len), Some(1));
        assert_eq!(stats.0["models"][0]["n_expert"], models[i].spec.n_expert);
    }
    let written = fs::read_dir(library.directory.path()).unwrap();
    // The library, the link to it, and two files for each of three.
    assert_eq!(written.count(), 2 + 6);
}

#[test]
fn each_process_can_be_asked_about() {
    let library = Library::new();
    let mut targets = [known_small(), known_draft()].map(|model| library.start(model));
    let refused = library.refusal(
        "link.so",
        &["--control", library.at("one").to_str().unwrap()],
    );
    assert!(refused.contains("%p"), "{refused}");
    let pattern = library.at("control %p");
    let sockets = [0, 1].map(|i: usize| library.at(&format!("control {}", targets[i].pid())));
    let options = ["--control", pattern.to_str().unwrap()];
    let attached = Attached::by(&mut library.attach(&options)).unwrap();
    for (target, tokens) in targets.iter_mut().zip([5, 6]) {
        // A pass is counted when the next one begins.
        target.command(&format!("prompt 0 {tokens} 20")).unwrap();
        target.command("decode 0 3").unwrap();
    }
    assert_eq!(dump(&sockets[0]).tokens()[&0], 5);
    assert!(ctl("reset", &sockets[0], &[]).status.success());
    assert!(dump(&sockets[0]).0["layers_context"].is_null());
    // The other one goes on, and so it does when the first has ended.
    assert_eq!(dump(&sockets[1]).tokens()[&0], 6);
    assert!(ctl("stop", &sockets[0], &[]).status.success());
    assert!(!ctl("dump", &sockets[0], &[]).status.success());
    assert_eq!(dump(&sockets[1]).tokens()[&0], 6);
    assert!(ctl("stop", &sockets[1], &[]).status.success());
    let (status, said) = attached.wait().unwrap();
    assert!(status.success(), "{said}");
    assert!(sockets.iter().all(|socket| !socket.exists()));
    for target in targets {
        assert!(target.quit().unwrap().success());
    }
}

/// A process that cannot be traced does not keep us from the others, and is no success for --strict.
#[test]
fn what_cannot_be_traced_is_said() {
    let library = Library::new();
    let mut target = library.start(known_small());
    let dead = library.start(known_small());
    let [stats, place] = ["%p.json", "place"].map(|name| library.at(name));
    // Where the second process' document is to be, there is a directory.
    fs::create_dir(library.at(&format!("{}.json", dead.pid()))).unwrap();
    let options = ["-o", stats.to_str().unwrap(), "--strict"];
    let attached = Attached::by(&mut library.attach(&options)).unwrap();
    target.command("prompt 0 20 100").unwrap();
    attached.signal(nix::sys::signal::Signal::SIGINT).unwrap();
    let (status, said) = attached.wait().unwrap();
    assert_eq!(status.code(), Some(3), "{said}");
    let written = library.at(&format!("{}.json", target.pid()));
    assert_eq!(Stats::read(&written).unwrap().tokens()[&0], 20);
    drop(dead);

    // One process needs no place of its own.
    let options = ["-o", place.to_str().unwrap(), "-d", "10ms"];
    let output = library.attach(&options).output().unwrap();
    assert!(output.status.success(), "{}", self::said(&output));
    Stats::read(&place).unwrap().assert_complete();
}

#[test]
fn refusals() {
    let library = Library::new();
    let text = library.refusal("link.so", &[]);
    assert!(text.contains("none of"), "{text}");
    let other = library.refusal("/bin/sh", &[]);
    assert!(other.contains("defines none of the functions"), "{other}");
    let missing = library.refusal("missing.so", &[]);
    assert!(missing.contains("cannot read"), "{missing}");

    let targets = [(); 2].map(|()| library.start(known_small()));
    // A copy is another file, of which nobody knows.
    let name = "libggml-cpu.so.0";
    let text = Library::new().refusal(name, &[]);
    let mapped = library.at(name);
    let namesake = format!("maps another file of that name: {}", mapped.display());
    assert!(text.contains(&namesake), "{text}");

    let place = library.at("place");
    let log = format!("--log={}", place.display());
    let output = place.to_str().unwrap();
    for options in [
        &["-o", output][..],
        &[&log],
        &["--log"],
        &["-o", "-"],
        &["-o", output, "--log=%p"],
    ] {
        let text = library.refusal("link.so", options);
        assert!(text.contains("2 processes map"), "{text}");
        assert!(text.contains("-o stats-%p.json"), "{text}");
        assert!(!place.exists());
    }
    let dry = library
        .attach(&["--dry-run", "-o", output])
        .output()
        .unwrap();
    assert_eq!(dry.status.code(), Some(1), "{}", said(&dry));
    let told = String::from_utf8_lossy(&dry.stdout);
    assert_eq!(told.matches("2 processes map").count(), 2, "{told}");

    // What they map has been replaced since: only the kernel has a path for it.
    let copy = library.at("copy");
    fs::copy(&mapped, &copy).unwrap();
    fs::rename(&copy, &mapped).unwrap();
    let text = library.refusal(name, &[]);
    assert!(text.contains("replaced or deleted"), "{text}");
    let words = text.split([' ', ',']);
    let here = words.into_iter().find(|word| word.contains("/map_files/"));
    let mut command = tracer::command().unwrap();
    command.args(["attach", "--all", "-d", "10ms", "--top=0", "--library"]);
    let output = command.arg(here.unwrap()).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(said(&output).matches("is traced").count(), 2);
    drop(targets);
}

/// `%p` is the process, `%%` a percent sign, also where there is one process.
#[test]
fn names_of_files_name_the_process() {
    let library = Library::new();
    let pattern = library.at("%%p %p %d");
    let log = format!("--log={}", library.at("log %p").display());
    let options = ["-o", pattern.to_str().unwrap(), &log];
    let mut command = tracer::run(&options, &driver(&known_small().path, &["-t", "1"])).unwrap();
    let mut target = Oracle::spawn(&mut command).unwrap();
    let pid = target.pid();
    target.command("prompt 0 20 100").unwrap();
    assert!(target.quit().unwrap().success());
    let tokens: Vec<u32> = (100..120).collect();
    let places = [format!("%p {pid} %d"), format!("log {pid}")].map(|name| library.at(&name));
    assert_tokens(known_small(), &places[0], &places[1], &tokens);

    // A place that cannot be written is known before the program begins.
    let witness = library.at("witness");
    let mut target = Command::new("touch");
    target.arg(&witness);
    let output = tracer::run(&["-o", "/no/such/directory/%p"], &target)
        .unwrap()
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", said(&output));
    assert!(!witness.exists());
}
