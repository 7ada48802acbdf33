//! What a traced program of an ordinary user has the tracer, which is root, open.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use expert_trace_tests::{
    reachable::Reachable,
    tracer::{self, Stats},
};
use nix::{sys::stat::Mode, unistd::mkfifo};

use crate::{
    layouts::compile,
    support::{known_draft, known_small, scratch},
};

/// `expert-trace run --user nobody OPTIONS -- sh -c SCRIPT ARGUMENTS`.
fn run_as_nobody(options: &[&str], script: &str, arguments: &[&str]) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", script]).args(arguments);
    let mut command = tracer::run(&[&["--user", "nobody"], options].concat(), &shell).unwrap();
    command.stdin(Stdio::null());
    command
}

/// Waits until a shell sleeps, which nothing but its open(2) has it do.
fn wait_until_asleep(child: &Child) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let stat = format!("/proc/{}/stat", child.id());
    let mut asleep = 0;
    while asleep < 5 {
        assert!(Instant::now() < deadline, "the writer does not wait");
        let is_asleep = fs::read_to_string(&stat).unwrap().contains("(sh) S ");
        asleep = if is_asleep { asleep + 1 } else { 0 };
        thread::sleep(Duration::from_millis(20));
    }
}

/// Somebody, root perhaps, waits for a reader of a FIFO. The traced program cannot make us one.
#[test]
fn a_fifo_that_is_executed_is_not_opened() {
    let files = Reachable::new().unwrap();
    let pipe = files.path().join("pipe");
    mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    fs::set_permissions(&pipe, Permissions::from_mode(0o755)).unwrap();
    // The shell itself opens the pipe, and has no child.
    let mut writer = Command::new("sh")
        .args(["-c", "echo written > \"$0\""])
        .arg(&pipe)
        .spawn()
        .unwrap();
    wait_until_asleep(&writer);
    let script = "\"$0\"; cd \"${0%/*}\" && ./pipe";
    let output = run_as_nobody(&[], script, &[pipe.to_str().unwrap()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(126), "{output:?}");
    thread::sleep(Duration::from_millis(100));
    assert_eq!(writer.try_wait().unwrap(), None, "somebody opened the pipe");
    assert_eq!(fs::read(&pipe).unwrap(), b"written\n");
    assert!(writer.wait().unwrap().success());
}

/// A model that is named, and not mapped, is read with the rights of the program that names it.
#[test]
fn a_model_that_the_program_cannot_read_is_not_shown() {
    let files = Reachable::new().unwrap();
    let (_directory, program) = compile("standin.c", &[]);
    let program = files.copy(&program).unwrap();
    let readable = files.copy(&known_small().path).unwrap();
    let secret = files.copy(&known_draft().path).unwrap();
    let directory = scratch();
    let stats = directory.path().join("stats.json");
    let output = format!("--output={}", stats.display());
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let [program, readable, secret_name] = [&program, &readable, &secret].map(|path| text(path));
    // It is seen alive, becomes the program that computes, and keeps its arguments.
    let script = "sleep 0.5; exec \"$0\" new 4 3 4 128 none";
    let models = |names: [&str; 2]| -> Vec<String> {
        let [first, last] = names;
        let arguments = [&program, "-m", first, "--model", last];
        let output = run_as_nobody(&[&output], script, &arguments).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{output:?}");
        let stats = Stats::read(&stats).unwrap();
        assert!(stats.number("/layers/0/total_tokens") > 0);
        let models = stats.0["models"].as_array().unwrap();
        let path = |model: &serde_json::Value| model["path"].as_str().unwrap().to_owned();
        models.iter().map(path).collect()
    };
    assert_eq!(models([&readable, &secret_name]), [&*secret_name]);
    fs::set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
    assert_eq!(models([&readable, &secret_name]), [""; 0]);
    assert_eq!(models([&secret_name, &readable]), [&*readable]);
}
