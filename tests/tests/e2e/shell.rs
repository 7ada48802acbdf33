//! Exit statuses and errors of the command line.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead as _, BufReader, Read as _},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    process::{Command, Output, Stdio},
};

use expert_trace_tests::{
    oracle::Oracle,
    tracer::{self, Stats},
};
use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::signal::{SigHandler, Signal, kill, signal},
    unistd::Pid,
};
use serde_json::Value;

use crate::support::{Traced, driver, known_small, known_wide, scratch};

fn expert_trace<S: AsRef<OsStr>>(arguments: &[S]) -> Output {
    tracer::command().unwrap().args(arguments).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_exit_status_is_the_childs() {
    for (script, status) in [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)] {
        let output = expert_trace(&["run", "--", "sh", "-c", script]);
        assert_eq!(output.status.code(), Some(status), "{}", said(&output));
    }
}

#[test]
fn a_program_that_decodes_nothing_is_said_to() {
    let output = expert_trace(&["run", "--", "true"]);
    assert_eq!(output.status.code(), Some(0));
    let said = said(&output);
    assert!(said.contains("No expert routing was seen"), "{said}");
}

#[test]
fn what_cannot_start_is_said() {
    let output = expert_trace(&["run", "--", "no-such-command-anywhere"]);
    assert_eq!(output.status.code(), Some(127));
    assert!(
        said(&output).contains("command not found"),
        "{}",
        said(&output)
    );

    let output = expert_trace(&["run", "--", "/etc/passwd"]);
    assert_eq!(output.status.code(), Some(126));
    assert!(
        said(&output).contains("not executable"),
        "{}",
        said(&output)
    );
}

#[test]
fn a_bad_output_path_fails_before_the_program_starts() {
    let directory = scratch();
    let witness = directory.path().join("ran");
    for path in ["/no/such/directory/stats.json", "/tmp"] {
        let output = expert_trace(&["run", "-o", path, "--", "touch", witness.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(125));
        let said = said(&output);
        assert!(
            said.contains(&format!("Failed to open output file: {path}")),
            "{said}"
        );
        assert!(!witness.exists());
    }
}

/// Has the signal do to a command what it does by default, whoever has started us (nohup).
fn with_default(command: &mut Command, which: Signal) {
    // SAFETY: the closure makes one system call.
    unsafe { command.pre_exec(move || Ok(signal(which, SigHandler::SigDfl).map(drop)?)) };
}

/// The child gets what would end the tracer, and the trace is written when it has ended.
#[test]
fn signals_that_end_are_passed_on() {
    for (which, status) in [(Signal::SIGTERM, 143), (Signal::SIGHUP, 129)] {
        let directory = scratch();
        let path = directory.path().join("stats.json");
        let options = ["-o", path.to_str().unwrap(), "--top=0"];
        let mut command =
            tracer::run(&options, &driver(&known_small().path, &["-t", "1"])).unwrap();
        with_default(&mut command, which);
        let mut target = Oracle::spawn(&mut command).unwrap();
        target.command("prompt 0 5 7").unwrap();
        let stat = fs::read_to_string(format!("/proc/{}/stat", target.pid())).unwrap();
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        let tracer: i32 = fields.split(' ').nth(1).unwrap().parse().unwrap();
        kill(Pid::from_raw(tracer), which).unwrap();
        assert_eq!(target.wait().unwrap().code(), Some(status));
        let stats = Stats::read(&path).unwrap();
        stats.assert_complete();
        assert_eq!(stats.tokens()[&0], 5);
    }
}

/// nohup and shells ignore signals for what they start, and mean the child, too.
#[test]
fn what_is_ignored_stays_ignored() {
    let mut command = tracer::command().unwrap();
    command.args(["run", "--", "sh", "-c", "kill -HUP $$; echo alive"]);
    // SAFETY: the closure makes one system call.
    unsafe { command.pre_exec(|| Ok(signal(Signal::SIGHUP, SigHandler::SigIgn).map(drop)?)) };
    let output = command.output().unwrap();
    assert_eq!(output.stdout, b"alive\n", "{}", said(&output));

    for signals in ["PIPE", "CHLD", "PIPE CHLD"] {
        let status = "grep SigIgn /proc/self/status";
        let script = format!("trap '' {signals}; {status}; exec \"$0\" run -- {status}");
        let output = Command::new("sh")
            .args(["-c", &script])
            .arg(tracer::program().unwrap())
            .output()
            .unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        let lines: Vec<&str> = printed.lines().collect();
        assert!(lines.len() == 2 && lines[0] == lines[1], "{printed}");
    }

    let mut command = tracer::command().unwrap();
    command.args(["run", "--", "sh", "-c", "kill -HUP $$; echo alive"]);
    with_default(&mut command, Signal::SIGHUP);
    let output = command.output().unwrap();
    assert_eq!(output.stdout, b"");
    assert_eq!(output.status.code(), Some(129));
}

#[test]
fn stdout_is_the_programs() {
    let output = expert_trace(&["run", "-o", "-", "--", "echo", "ran"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(said(&output).contains("/dev/fd/"), "{}", said(&output));
    assert_eq!(output.stdout, b"");
}

#[test]
fn pipes_and_descriptors_are_written_in_place() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let script = "\"$0\" run -o /dev/fd/3 -- echo ran 3>\"$1\"; \
                  \"$0\" run -o /dev/fd/4 -- true 4>&1 | tail -n 1";
    let output = Command::new("sh")
        .args(["-c", script])
        .arg(tracer::program().unwrap())
        .arg(&path)
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"ran\n}\n", "{}", said(&output));
    assert_eq!(Stats::read(&path).unwrap().0["capture"]["mode"], "run");
}

/// In `attach` the second Ctrl-C skips the summary, here because nobody reads it. The document has
/// been written by then.
#[test]
fn the_second_control_c_skips_the_summary() {
    let mut target = Oracle::spawn(&mut driver(&known_wide().path, &["-t", "1"])).unwrap();
    let mut tracer = tracer::command()
        .unwrap()
        .args(["attach", "-o", "-", "--pid", &target.pid().to_string()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = tracer.stderr.take().unwrap();
    fcntl(&stderr, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    let mut stderr = BufReader::new(stderr);
    let mut line = String::new();
    while !line.contains("Expert tracing enabled") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0);
    }
    target.command("prompt 0 300 7").unwrap();
    let pid = Pid::from_raw(tracer.id() as i32);
    kill(pid, Signal::SIGINT).unwrap();
    let stdout = tracer.stdout.take().unwrap();
    let mut documents = serde_json::Deserializer::from_reader(stdout).into_iter::<Value>();
    let stats = Stats(documents.next().unwrap().unwrap());
    stats.assert_complete();
    assert_eq!(stats.tokens()[&0], 300);
    kill(pid, Signal::SIGINT).unwrap();
    assert_eq!(tracer.wait().unwrap().code(), Some(0));
    let mut said = String::new();
    stderr.read_to_string(&mut said).unwrap();
    assert!(said.contains("=== Expert Usage Statistics ==="), "{said}");
    assert!(!said.contains("Complete:"), "{said}");
    target.quit().unwrap();
}

#[test]
fn what_was_collected_outlives_a_full_disk() {
    let directory = scratch();
    let command = |options: &[&str]| {
        let mut command = tracer::run(options, &driver(&known_small().path, &["-t", "1"])).unwrap();
        command.env("TMPDIR", directory.path());
        command.stderr(Stdio::piped());
        command.stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        use std::io::Write as _;
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(b"prompt 0 5 7\nquit\n").unwrap();
        child.wait_with_output().unwrap()
    };
    let output = command(&["-o", "/dev/full"]);
    assert_eq!(output.status.code(), Some(125));
    let text = said(&output);
    assert!(
        text.contains("Failed to write output file: /dev/full"),
        "{text}"
    );
    let saved = fs::read_dir(directory.path())
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    assert!(text.contains(saved.path().to_str().unwrap()), "{text}");
    let stats = Stats::read(&saved.path()).unwrap();
    stats.assert_complete();
    assert_eq!(stats.tokens()[&0], 5);

    let path = directory.path().join("stats.json");
    let output = command(&["--log=/dev/full", "-o", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0));
    assert!(
        said(&output).contains("the log ends here"),
        "{}",
        said(&output)
    );
    let stats = Stats::read(&path).unwrap();
    assert_eq!(stats.tokens()[&0], 5);
    assert_eq!(stats.0["integrity"]["complete"], false);
}

/// Two captures at once, of two programs of the same build: none sees anything of the other.
#[test]
fn two_runs_at_once_are_two_captures() {
    let known = known_small();
    let mut first = Traced::start(&known.path, &["-t", "1"]);
    let mut second = Traced::start(&known.path, &["-t", "1"]);
    first.command("prompt 0 5 7");
    second.command("prompt 0 9 3");
    for (traced, tokens) in [(first, 5), (second, 9)] {
        let (stats, _) = traced.finish();
        assert_eq!(stats.tokens()[&0], tokens);
        assert_eq!(stats.number("/integrity/hits/passes"), 1);
    }
}

/// A terminal that is gone, and one that takes nothing, cost neither the program nor the document.
#[test]
fn nobody_needs_to_read_what_is_said() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    for stderr in ["2>/dev/full", "2>&-"] {
        let script = format!("\"$0\" run -o \"$1\" --log -- sh -c 'echo ran; exit 5' {stderr}");
        let output = Command::new("sh")
            .args(["-c", &script])
            .arg(tracer::program().unwrap())
            .arg(&path)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(5), "{stderr}");
        assert_eq!(output.stdout, b"ran\n", "{stderr}");
        assert!(Stats::read(&path).is_ok(), "{stderr}");
        fs::remove_file(&path).unwrap();
    }
    // A reader that has gone away.
    let script = "\"$0\" run -- sh -c 'echo ran >&3; exit 5' 2>&1 >/dev/null | true; \
                  echo \"$?\" >/dev/null";
    let output = Command::new("sh")
        .args(["-c", &format!("exec 3>&1; {script}")])
        .arg(tracer::program().unwrap())
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"ran\n");
}

#[test]
fn what_a_shell_runs_is_run() {
    let directory = scratch();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let script = directory.path().join("script");
    fs::write(&script, "echo \"$1\"\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("program");
    fs::copy("/bin/echo", &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o711)).unwrap();
    for untraced in [false, true] {
        for path in [&script, &program] {
            let mut command = tracer::command().unwrap();
            if untraced {
                command.env("LLAMA_EXPERT_TRACE_STATS", "0");
            }
            command.args(["run", "--user", "nobody", "--"]);
            let output = command.arg(path).arg("there").output().unwrap();
            assert_eq!(output.stdout, b"there\n", "{}", said(&output));
        }
    }
}

#[test]
fn a_missing_capability_is_named() {
    for arguments in [
        ["run", "--user", "nobody", "--", "true"].as_slice(),
        &["run", "--user", "nobody", "-o", "/tmp/x", "--", "true"],
    ] {
        let output = Command::new("setpriv")
            .arg("--bounding-set=-setuid,-setgid")
            .arg(tracer::program().unwrap())
            .args(arguments)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(125));
        let said = said(&output);
        assert!(said.contains("CAP_SETUID and CAP_SETGID"), "{said}");
    }
}
