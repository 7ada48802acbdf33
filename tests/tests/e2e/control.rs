//! What can be asked of a capture that goes on, and who may ask.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::{UnixListener, UnixStream},
    },
    path::Path,
    process::{Command, Output},
};

use expert_trace_tests::{
    oracle::Oracle,
    tracer::{self, Attached, Stats},
};

use crate::support::{assert_schema, driver, known_small, scratch};

/// Asks a capture.
pub fn ctl(request: &str, socket: &Path, options: &[&str]) -> Output {
    let mut command = tracer::command().unwrap();
    command.args(["ctl", request]).arg(socket).args(options);
    command.output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn target() -> Oracle {
    Oracle::spawn(&mut driver(&known_small().path, &["-t", "1"])).unwrap()
}

/// The counts up to now, of tokens that are known.
pub fn dump(socket: &Path) -> Stats {
    let output = ctl("dump", socket, &[]);
    assert!(output.status.success(), "{}", said(&output));
    let stats = Stats(serde_json::from_slice(&output.stdout).unwrap());
    assert_schema(&stats);
    stats.assert_complete();
    assert_eq!(stats.0["capture"]["ended"], "running");
    stats
}

#[test]
fn counts_are_told_begun_anew_and_ended() {
    let known = known_small();
    let directory = scratch();
    let [socket, json, trace] =
        ["control", "stats.json", "routes.arrows"].map(|name| directory.path().join(name));
    let mut target = target();
    let option = format!("--trace={}", trace.display());
    let options = [
        "--control",
        socket.to_str().unwrap(),
        "-o",
        json.to_str().unwrap(),
        &option,
    ];
    let tracer = Attached::to(target.pid(), &options).unwrap();
    let mode = fs::symlink_metadata(&socket).unwrap();
    assert!(mode.file_type().is_socket());
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);

    // A pass is counted when the next one begins.
    target.command("prompt 0 10 20").unwrap();
    target.command("decode 0 3").unwrap();
    let before = dump(&socket);
    assert_eq!(before.tokens()[&0], 10);
    assert!(before.0["capture"]["counted_since"].is_null());

    let output = ctl("reset", &socket, &[]);
    assert!(output.status.success(), "{}", said(&output));
    // The one under way is in neither.
    target.command("decode 0 4").unwrap();
    target.command("decode 0 5").unwrap();
    let after = dump(&socket);
    assert_eq!(after.tokens()[&0], 1);
    assert_eq!(after.excluded("partial"), (1, 1));
    let experts = known.expected.ids(0, 4);
    let counted = after.counts();
    for expert in experts {
        assert_eq!(counted[&0][expert], 1);
    }
    assert_eq!(counted[&0].values().sum::<u64>(), experts.len() as u64);

    let output = ctl("stop", &socket, &[]);
    assert!(output.status.success(), "{}", said(&output));
    // It is there when `stop` is done, and not only when the tracer is.
    let last = Stats::read(&json).unwrap();
    let (status, text) = tracer.wait().unwrap();
    assert!(status.success(), "{text}");
    assert!(text.contains("when counting began anew"), "{text}");
    assert_schema(&last);
    last.assert_complete();
    assert_eq!(last.0["capture"]["ended"], "stopped");
    assert_eq!(last.tokens()[&0], 2);
    assert_eq!(
        last.0["capture"]["counted_since"],
        after.0["capture"]["counted_since"]
    );
    assert!(!socket.exists());
    let output = ctl("dump", &socket, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said(&output).contains("cannot reach a capture"),
        "{}",
        said(&output)
    );
    // The target goes on, and the trace has what was before, too.
    target.command("prompt 0 5 600").unwrap();
    assert!(target.quit().unwrap().success());
    // Its last layer works on tokens with an output alone.
    let layers = u64::from(known.expected.layers());
    assert_eq!(last.number("/trace/rows"), 13 * (layers - 1) + 4);
}

#[test]
fn counting_begins_anew_as_often_as_asked() {
    let directory = scratch();
    let socket = directory.path().join("control");
    let mut target = target();
    let options = ["--control", socket.to_str().unwrap()];
    let tracer = Attached::to(target.pid(), &options).unwrap();
    for tokens in [5, 6] {
        target.command("prompt 0 5 20").unwrap();
        assert!(ctl("reset", &socket, &[]).status.success());
        target.command(&format!("prompt 0 {tokens} 20")).unwrap();
        target.command("decode 0 3").unwrap();
        assert_eq!(dump(&socket).tokens()[&0], tokens);
    }
    tracer.interrupt().unwrap();
    assert!(target.quit().unwrap().success());
}

#[test]
fn a_run_goes_on_to_its_end() {
    let directory = scratch();
    let socket = directory.path().join("control");
    let program = tracer::program().unwrap();
    let text = "\"$0\" ctl dump \"$1\" && ! \"$0\" ctl stop \"$1\"";
    let mut command = Command::new("sh");
    command.args(["-c", text]).arg(&program).arg(&socket);
    let option = format!("--control={}", socket.display());
    let output = tracer::run(&[option], &command).unwrap().output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let stats = Stats(serde_json::from_slice(&output.stdout).unwrap());
    assert_eq!(stats.0["capture"]["mode"], "run");
    assert!(said(&output).contains("up to its end"), "{}", said(&output));
    assert!(!socket.exists());
}

#[test]
fn places_of_others_stay_theirs() {
    let directory = scratch();
    let at = |name: &str| directory.path().join(name);
    let attach = |target: &Oracle, socket: &Path| {
        Attached::to(target.pid(), &["--control", socket.to_str().unwrap()])
    };
    let target = target();
    fs::write(at("file"), "kept").unwrap();
    let served = UnixListener::bind(at("served")).unwrap();
    for (name, why) in [
        ("file", "is no socket"),
        ("served", "another program that runs"),
        ("no/socket", "create it first"),
    ] {
        let error = attach(&target, &at(name)).err().unwrap().to_string();
        assert!(error.contains(why) && error.contains(name), "{error}");
    }
    assert_eq!(fs::read_to_string(at("file")).unwrap(), "kept");
    let both = at("both").display().to_string();
    let error = Attached::to(target.pid(), &["--control", &both, "-o", &both]);
    let error = error.err().unwrap().to_string();
    assert!(
        error.contains("name two") && !at("both").exists(),
        "{error}"
    );
    for (name, status) in [("file", 1), ("served", 1), ("free", 0)] {
        let mut dry = tracer::command().unwrap();
        dry.args(["attach", "--dry-run", "--pid", &target.pid().to_string()]);
        let output = dry.arg("--control").arg(at(name)).output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{}", said(&output));
    }
    assert!(!at("free").exists());
    drop(served);
    // What a tracer that was killed leaves.
    let tracer = attach(&target, &at("served")).unwrap();
    dump(&at("served"));

    // Whoever does not ask, or asks for something else, keeps nobody.
    let silent: Vec<UnixStream> = (0..7)
        .map(|_| UnixStream::connect(at("served")).unwrap())
        .collect();
    let mut odd = UnixStream::connect(at("served")).unwrap();
    odd.write_all(b"dump it all, and all of it at once\n")
        .unwrap();
    let mut answer = String::new();
    odd.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("error: no such request"), "{answer}");
    dump(&at("served"));
    drop(silent);

    // Another user, also where somebody has opened the door.
    let open = |mode| {
        for path in [directory.path().to_owned(), at("served")] {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
    };
    for (mode, why) in [(0o700, "ermission denied"), (0o777, "somebody else's")] {
        open(mode);
        let mut other = Command::new("setpriv");
        other.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        other.arg(tracer::program().unwrap());
        other.args(["ctl", "stop"]).arg(at("served"));
        tracer::without_sudo(&mut other);
        let output = other.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(said(&output).contains(why), "{}", said(&output));
    }
    dump(&at("served"));
    tracer.interrupt().unwrap();
    assert!(target.quit().unwrap().success());
}
