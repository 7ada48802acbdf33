//! The live view in a real terminal: what it shows is what the document has.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use expert_trace_tests::{
    oracle::Oracle,
    tmux::Tmux,
    tracer::{self, Stats},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::support::{driver, known_small, known_wide, scratch};

const UTF8: (&str, &str) = ("LC_ALL", "C.UTF-8");
const XTERM: (&str, &str) = ("TERM", "xterm-256color");

fn program() -> String {
    tracer::program().unwrap().display().to_string()
}

/// Activations of an expert, by a document.
fn activations(stats: &Stats, layer: usize, expert: u64) -> (u64, u64) {
    let layer = &stats.0["contexts"][0]["layers"][layer];
    let mut experts = layer["experts"].as_array().unwrap().iter();
    let found = experts.find(|of| of["expert_id"] == expert);
    let number = |key: &str| found.map_or(0, |of| of[key].as_u64().unwrap());
    (number("prefill"), number("decode"))
}

fn read(path: &Path) -> Stats {
    Stats::read(path).unwrap()
}

/// Counts at the cursor, expert after expert and layer after layer, against those of the file that a key
/// writes; then the summary, and the terminal as it was.
#[test]
fn counts_on_the_screen_are_those_of_the_document() {
    let directory = scratch();
    let json = directory.path().join("stats.json");
    let known = known_small();
    let mut target = Oracle::spawn(&mut driver(&known.path, &["-t", "1"])).unwrap();
    let line = format!(
        "{} top --pid {} -o {}",
        program(),
        target.pid(),
        json.display()
    );
    let tmux = Tmux::spawn(100, 30, &[XTERM, UTF8], &line).unwrap();
    tmux.wait_for("No routing has been counted yet").unwrap();
    target.command("prompt 0 40 20").unwrap();
    target.command("generate 0 20 7").unwrap();
    // The last pass is not known to be over.
    let shown = tmux.wait_for("decode 19").unwrap();
    assert!(shown[1].contains("tokens/s"), "{shown:#?}");
    tmux.press(&["w"]).unwrap();
    tmux.wait_for("counts written to").unwrap();
    let stats = read(&json);
    assert_eq!(stats.0["capture"]["ended"], "running");
    let layers = stats.0["contexts"][0]["layers"].as_array().unwrap().len();
    let text = |layer: usize, expert: u64| {
        let (prefill, decode) = activations(&stats, layer, expert);
        let sum = prefill + decode;
        format!(
            "layer {layer}, expert {expert}: {sum} activations (prefill {prefill}, decode {decode})"
        )
    };
    for layer in 0..layers {
        if layer > 0 {
            tmux.press(&["Down", "Home"]).unwrap();
        }
        for expert in 0..8 {
            if expert > 0 {
                tmux.press(&["Right"]).unwrap();
            }
            tmux.wait_for(&text(layer, expert)).unwrap();
        }
    }
    let total: u64 = (0..8).map(|expert| activations(&stats, 0, expert).1).sum();
    assert!(total > 0, "none of the first experts was used");

    // What is counted from now on.
    tmux.press(&["r"]).unwrap();
    tmux.wait_for("counting begins anew").unwrap();
    tmux.wait_for("No routing has been counted yet").unwrap();
    target.command("generate 0 5 9").unwrap();
    tmux.wait_for("prefill 0, decode 4").unwrap();
    // While one looks, nothing changes.
    tmux.press(&["p"]).unwrap();
    tmux.wait_for("PAUSED").unwrap();
    target.command("generate 0 5 9").unwrap();
    let shown = tmux.shown().unwrap();
    assert!(shown[1].contains("decode 4"), "{shown:#?}");
    tmux.press(&["p"]).unwrap();
    tmux.wait_for("prefill 0, decode 9").unwrap();

    tmux.press(&["q"]).unwrap();
    let shown = tmux.wait_for("[over: 0]").unwrap();
    assert!(
        shown.iter().any(|line| line.contains("Complete: ")),
        "{shown:#?}"
    );
    assert_eq!(tmux.modes().unwrap(), (false, true));
    assert_eq!(read(&json).0["capture"]["ended"], "interrupted");
    assert!(target.quit().unwrap().success());
}

/// 512 experts on 80 × 24, other sizes, and terminals without colours or UTF-8.
#[test]
fn small_and_plain_terminals_work() {
    let known = known_wide();
    let mut target = Oracle::spawn(&mut driver(&known.path, &["-t", "1"])).unwrap();
    for (variables, plain) in [
        (&[XTERM, UTF8][..], false),
        (&[("TERM", "vt100"), ("LC_ALL", "C")], true),
        (&[XTERM, ("NO_COLOR", "1"), ("LC_ALL", "C")], true),
    ] {
        let line = format!("{} top --pid {}", program(), target.pid());
        let tmux = Tmux::spawn(80, 24, variables, &line).unwrap();
        tmux.wait_for("No routing has been counted yet").unwrap();
        target.command("clear 0").unwrap();
        target.command("prompt 0 40 20").unwrap();
        target.command("generate 0 5 7").unwrap();
        let shown = tmux.wait_for("experts by id, 9 in each cell").unwrap();
        assert!(shown.iter().all(|line| line.chars().count() <= 80));
        let coloured = tmux.shown_with_colours().unwrap();
        assert_eq!(!coloured.contains("48;5;"), plain, "{coloured}");
        assert_eq!(shown.concat().is_ascii(), plain, "{shown:#?}");
        tmux.resize(60, 12).unwrap();
        tmux.wait_for("experts by id, 14 in each cell").unwrap();
        tmux.press(&["?"]).unwrap();
        tmux.wait_for("Keys (any key goes back)").unwrap();
        tmux.press(&["x", "C-c"]).unwrap();
        tmux.wait_for("[over: 0]").unwrap();
    }
    assert!(target.quit().unwrap().success());
}

/// A tracer that is told to end, or whose target does, leaves the terminal as it was.
#[test]
fn the_terminal_comes_back() {
    let known = known_small();
    for by_target in [false, true] {
        let mut target = Oracle::spawn(&mut driver(&known.path, &["-t", "1"])).unwrap();
        let directory = scratch();
        let file = directory.path().join("pid");
        let line = format!(
            "stty -a > {0}.stty; sh -c 'echo $$ > {0}; exec {1} top --pid {2}'",
            file.display(),
            program(),
            target.pid()
        );
        let tmux = Tmux::spawn(80, 24, &[XTERM, UTF8], &line).unwrap();
        tmux.wait_for("No routing has been counted yet").unwrap();
        assert_eq!(tmux.modes().unwrap(), (true, false));
        let before = fs::read_to_string(format!("{}.stty", file.display())).unwrap();
        assert_ne!(tmux.settings().unwrap(), before);
        if by_target {
            target.command("generate 0 5 7").unwrap();
            assert!(target.quit().unwrap().success());
        } else {
            let pid: i32 = fs::read_to_string(&file).unwrap().trim().parse().unwrap();
            kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
        }
        tmux.wait_for("[over: 0]").unwrap();
        assert_eq!(tmux.modes().unwrap(), (false, true));
        assert_eq!(tmux.settings().unwrap(), before);
    }
}

/// A terminal that is closed ends the capture, which takes no time of the processor for ever.
#[test]
fn a_terminal_that_is_gone_ends_it() {
    let directory = scratch();
    let json = directory.path().join("stats.json");
    let mut target = Oracle::spawn(&mut driver(&known_small().path, &["-t", "1"])).unwrap();
    let pid_file = directory.path().join("pid");
    let line = format!(
        "sh -c 'echo $$ > {0}; exec {1} top --pid {2} -o {3}'",
        pid_file.display(),
        program(),
        target.pid(),
        json.display()
    );
    let tmux = Tmux::spawn(80, 24, &[XTERM, UTF8], &line).unwrap();
    tmux.wait_for("No routing has been counted yet").unwrap();
    target.command("generate 0 5 7").unwrap();
    tmux.wait_for("decode 3").unwrap();
    let pid: i32 = fs::read_to_string(&pid_file)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    drop(tmux);
    let deadline = Instant::now() + Duration::from_secs(60);
    while kill(Pid::from_raw(pid), None).is_ok() {
        assert!(
            Instant::now() < deadline,
            "the tracer goes on without its terminal"
        );
        std::thread::yield_now();
    }
    assert_eq!(read(&json).0["capture"]["ended"], "interrupted");
    assert!(target.quit().unwrap().success());
}

/// What the program prints is shown when the view is over, and its status is ours.
#[test]
fn a_program_that_is_started_is_watched_to_its_end() {
    let directory = scratch();
    let json = directory.path().join("stats.json");
    let go_on = directory.path().join("go-on");
    nix::unistd::mkfifo(&go_on, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let commands = directory.path().join("commands.sh");
    let oracle = oracle_line(&known_small().path);
    fs::write(
        &commands,
        format!(
            "#!/bin/sh\n(echo 'prompt 0 10 20'; echo 'generate 0 5 7'; cat {}; echo quit) | {oracle}\nexit 7\n",
            go_on.display()
        ),
    )
    .unwrap();
    let line = format!(
        "{} run --live -o {} -- sh {}",
        program(),
        json.display(),
        commands.display()
    );
    let tmux = Tmux::spawn(100, 30, &[XTERM, UTF8], &line).unwrap();
    tmux.wait_for("prefill 10, decode 4").unwrap();
    fs::write(&go_on, "").unwrap();
    let shown = tmux.wait_for("[over: 7]").unwrap();
    let text = shown.join("\n");
    assert!(text.contains("Complete: "), "{text}");
    let stats = read(&json);
    assert_eq!(stats.0["capture"]["ended"], "target_exited");
    assert_eq!(stats.tokens()[&0], 15);
}

fn oracle_line(model: &Path) -> String {
    let command = driver(model, &["-t", "1"]);
    let parts = [command.get_program()]
        .into_iter()
        .chain(command.get_args());
    let parts: Vec<PathBuf> = parts.map(PathBuf::from).collect();
    let quoted: Vec<String> = parts
        .iter()
        .map(|part| format!("'{}'", part.display()))
        .collect();
    quoted.join(" ")
}

/// Without a terminal there is one clear error, and nothing has begun.
#[test]
fn without_a_terminal_it_says_so() {
    let target = Oracle::spawn(&mut driver(&known_small().path, &["-t", "1"])).unwrap();
    let mut command = Command::new("setsid");
    command.arg("-w").arg(tracer::program().unwrap());
    command.args(["top", "--pid", &target.pid().to_string()]);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("the live view needs a terminal"), "{said}");
    assert_eq!(output.status.code(), Some(125));
    assert!(target.quit().unwrap().success());
}
