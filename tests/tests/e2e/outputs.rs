//! Where results go: a bad place fails before anything starts, and what was there is not lost.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output},
    thread::sleep,
    time::Duration,
};

use expert_trace_tests::{
    oracle::Oracle,
    tracer::{self, Attached, Stats},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::support::{assert_schema, driver, known_small, scratch};

/// A shell script, in which `$0` is the tracer and `$1` a path.
fn script(text: &str, path: &Path) -> Output {
    let mut shell = Command::new("sh");
    shell.args(["-c", text]).arg(tracer::program().unwrap());
    tracer::without_sudo(&mut shell);
    shell.arg(path).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn descriptors_that_nobody_opened_are_refused() {
    let directory = scratch();
    let witness = directory.path().join("ran");
    for number in 3..24 {
        for option in ["-o", "--log"] {
            let text = format!("exec \"$0\" run {option}=/dev/fd/{number} -- touch \"$1\"");
            let text = text.replace("-o=", "-o ");
            let output = script(&text, &witness);
            assert_eq!(output.status.code(), Some(125), "{text}: {}", said(&output));
            let words = format!("descriptor {number} is not open");
            assert!(said(&output).contains(&words), "{}", said(&output));
        }
    }
    assert!(!witness.exists());
    let text = "exec \"$0\" run -o /dev/fd/9 --log=/dev/fd/7 -- true 9>\"$1\" 7>&9";
    let output = script(text, &witness);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(Stats::read(&witness).unwrap().0["capture"]["mode"], "run");
}

#[test]
fn a_capture_that_does_not_begin_leaves_the_log() {
    let directory = scratch();
    let log = directory.path().join("log");
    fs::write(&log, "an older one\n").unwrap();
    // A shell is no llama.cpp.
    let output = script("exec \"$0\" attach --pid $$ --log=\"$1\"", &log);
    assert_eq!(output.status.code(), Some(125), "{}", said(&output));
    let child = "sleep 60 & \"$0\" attach --pid $! --log=\"$1\"; status=$?; kill $!; exit $status";
    let output = script(child, &log);
    assert_eq!(output.status.code(), Some(125), "{}", said(&output));
    assert_eq!(fs::read_to_string(&log).unwrap(), "an older one\n");

    let output = script("exec \"$0\" run --log=\"$1\" -- true", &log);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(fs::read_to_string(&log).unwrap(), "");
}

#[test]
fn one_file_for_both_is_refused() {
    let directory = scratch();
    let text = "ln -s . \"$1/here\"; exec \"$0\" run -o \"$1/out\" --log=\"$1/here/out\" -- touch \"$1/ran\"";
    let output = script(text, directory.path());
    assert_eq!(output.status.code(), Some(125), "{}", said(&output));
    assert!(said(&output).contains("in one file"), "{}", said(&output));
    for name in ["out", "ran"] {
        assert!(!directory.path().join(name).exists(), "{name}");
    }
}

#[test]
fn bad_places_have_one_message_for_both_options() {
    let directory = scratch();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("file"), "kept").unwrap();
    std::os::unix::fs::symlink("nowhere", at("dangling")).unwrap();
    for (name, words) in [
        ("no/x", "create it first"),
        ("nodir/", "names a directory"),
        ("file/x", "file is no directory"),
        ("dangling", "is a link to nowhere"),
        (".", "is a directory; name a file in it"),
    ] {
        for option in ["--output", "--log"] {
            let text = format!("exec \"$0\" run {option}=\"$1\" -- true");
            let output = script(&text, &at(name));
            assert_eq!(output.status.code(), Some(125), "{name}: {}", said(&output));
            assert!(said(&output).contains(words), "{name}: {}", said(&output));
        }
    }
    assert_eq!(fs::read_to_string(at("file")).unwrap(), "kept");
}

#[test]
fn permissions_are_those_of_the_file_that_is_replaced() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
    let text = "umask 027; exec \"$0\" run -o \"$1\" -- true";
    let output = script(text, &path);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(mode(), 0o640);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let output = script(text, &path);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(mode(), 0o600);
}

/// As a container engine hands over single files.
#[test]
fn a_mounted_file_is_written_in_place() {
    let directory = scratch();
    let text = "cd \"$1\"; echo old, and by no means a document >a; echo >b; \
                exec unshare -m sh -c 'mount --bind a b && exec \"$0\" run -o b -- true' \"$0\"";
    let output = script(text, directory.path());
    assert!(output.status.success(), "{}", said(&output));
    let stats = Stats::read(&directory.path().join("a")).unwrap();
    assert_eq!(stats.0["capture"]["mode"], "run");
}

#[test]
fn a_capture_that_goes_on_tells_what_it_has_counted() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let mut target = Oracle::spawn(&mut driver(&known_small().path, &["-t", "1"])).unwrap();
    let mut tracer = Attached::to(target.pid(), &["-o", path.to_str().unwrap()]).unwrap();
    for (command, tokens) in [("decode 0 3", 10), ("decode 0 4", 21)] {
        // A pass is counted when the next one begins.
        target.command("prompt 0 10 20").unwrap();
        target.command(command).unwrap();
        tracer.signal(Signal::SIGUSR1).unwrap();
        tracer.wait_for("statistics up to now exported").unwrap();
        let stats = Stats::read(&path).unwrap();
        assert_schema(&stats);
        stats.assert_complete();
        assert_eq!(stats.0["capture"]["ended"], "running");
        assert_eq!(stats.tokens()[&0], tokens);
    }
    tracer.interrupt().unwrap();
    let stats = Stats::read(&path).unwrap();
    assert_eq!(stats.0["capture"]["ended"], "interrupted");
    assert_eq!(stats.tokens()[&0], 22);
    stats.assert_complete();
    let names = fs::read_dir(directory.path()).unwrap();
    assert_eq!(names.count(), 1);

    let mut tracer = Attached::to(target.pid(), &["--log"]).unwrap();
    tracer.signal(Signal::SIGUSR1).unwrap();
    tracer.wait_for("name one with -o").unwrap();
    tracer.interrupt().unwrap();
    assert!(target.quit().unwrap().success());
}

/// The program that runs under the tracer asks for it, and reads it.
#[test]
fn a_program_can_ask_for_what_was_counted_up_to_now() {
    let directory = scratch();
    let text = "exec \"$0\" run -o \"$1\" -- sh -c 'kill -USR1 $PPID; \
                while ! grep -q running \"$0\"; do :; done; cp \"$0\" \"$0.copy\"' \"$1\"";
    let path = directory.path().join("stats.json");
    let output = script(text, &path);
    assert!(output.status.success(), "{}", said(&output));
    let stats = Stats::read(&directory.path().join("stats.json.copy")).unwrap();
    assert_schema(&stats);
    assert_eq!(stats.0["capture"]["mode"], "run");
    let stats = Stats::read(&path).unwrap();
    assert_eq!(stats.0["capture"]["ended"], "target_exited");
}

#[test]
fn nothing_is_left_of_a_tracer_that_is_killed() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let option = format!("--output={}", path.display());
    let mut target = Oracle::spawn(&mut driver(&known_small().path, &["-t", "1"])).unwrap();
    let mut tracer = tracer::command().unwrap();
    tracer.args(["attach", "--pid", &target.pid().to_string(), &option]);
    let log = directory.path().join("log");
    tracer.arg(format!("--log={}", log.display()));
    let mut tracer = tracer.spawn().unwrap();
    while !log.exists() {
        sleep(Duration::from_millis(5));
    }
    target.command("prompt 0 5 7").unwrap();
    kill(Pid::from_raw(tracer.id() as i32), Signal::SIGKILL).unwrap();
    tracer.wait().unwrap();
    assert!(target.quit().unwrap().success());
    let names = fs::read_dir(directory.path()).unwrap();
    let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["log"]);
}
