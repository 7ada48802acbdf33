//! The help text, whose examples are run as they stand, and the shell completions.

use std::{
    fs,
    io::Read as _,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::OnceLock,
};

use expert_trace::trace::Reader;
use expert_trace_tests::{
    oracle::Oracle,
    terminal::Terminal,
    tracer::{self, Attached, Stats},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};
use tempfile::TempDir;

use crate::support::{driver, known_small, llama, scratch};

/// A directory in which the examples work, of which other users can read everything.
struct World {
    directory: TempDir,
    path: String,
}

impl World {
    fn get() -> &'static World {
        static WORLD: OnceLock<World> = OnceLock::new();
        WORLD.get_or_init(World::new)
    }

    fn new() -> World {
        let directory = scratch();
        let at = directory.path();
        let bin = at.join("bin");
        for made in [&bin, &at.join(".config/fish/completions")] {
            fs::create_dir_all(made).unwrap();
        }
        for entry in fs::read_dir(&llama().bin).unwrap() {
            let path = entry.unwrap().path();
            let copy = bin.join(path.file_name().unwrap());
            match fs::read_link(&path) {
                Ok(goal) => symlink(goal, copy).unwrap(),
                Err(_) => fs::copy(path, copy).map(drop).unwrap(),
            }
        }
        fs::copy(tracer::program().unwrap(), bin.join("expert-trace")).unwrap();
        fs::copy(&known_small().path, at.join("model.gguf")).unwrap();
        fs::write(at.join("prompt.txt"), "Once upon a time there was a model.").unwrap();
        // Leaves its environment, to show what --env did.
        let start = "#!/bin/sh\nenv > environment\nexec llama-cli -m model.gguf -p Hello\n";
        let script = at.join("start.sh");
        fs::write(&script, start).unwrap();
        for public in [at, &bin, &script] {
            fs::set_permissions(public, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let path = std::env::var("PATH").unwrap();
        World {
            path: format!("{}:{path}", bin.display()),
            directory,
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A line of bash, run in this directory by a user whose home it is.
    fn bash(&self, line: &str) -> Command {
        let mut command = Command::new("bash");
        command
            .args(["--norc", "-c", line])
            .current_dir(&self.directory)
            .env("PATH", &self.path)
            .env("HOME", self.directory.path())
            // Interactive programs have nobody to talk to, and should not talk for long.
            .env("LLAMA_ARG_N_PREDICT", "8")
            .stdin(Stdio::null());
        for (name, _) in std::env::vars() {
            if name.starts_with("LLAMA_EXPERT_TRACE_") || name.starts_with("SUDO_") {
                command.env_remove(name);
            }
        }
        command
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn help(arguments: &[&str]) -> String {
    let output = Command::new(tracer::program().unwrap())
        .args(arguments)
        .arg("--help")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Command lines among the examples, which are what a help text starts with.
fn examples(help: &str) -> Vec<String> {
    let examples = help.strip_prefix("Examples:\n").unwrap();
    // Up to what the command is about, which is not indented.
    let indented = |line: &&str| line.is_empty() || line.starts_with(' ');
    let examples: Vec<&str> = examples.lines().take_while(indented).collect();
    let examples = examples.join("\n");
    assert!(
        examples.lines().all(|line| line.chars().count() <= 80),
        "an example that a terminal breaks cannot be copied: {help}"
    );
    // Commands are indented by four, what is said of them by two.
    let joined = examples.replace("\\\n     ", "");
    let examples = &joined;
    let lines = examples
        .lines()
        .filter_map(|line| line.strip_prefix("    "));
    let lines: Vec<String> = lines.map(str::to_owned).collect();
    assert!(
        lines.iter().all(|line| line.contains("expert-trace")),
        "{help}"
    );
    assert!(!lines.is_empty(), "{help}");
    lines
}

/// Runs an example. Checks that it traced something, and left the files that it names.
fn run_example(example: &str) {
    let world = World::get();
    let names = ["stats.json", "routes.log", "routes.arrows", "environment"];
    let files = names.map(|name| world.at(name));
    for file in &files {
        let _ = fs::remove_file(file);
    }
    let [stats, routes, trace, environment] = &files;

    // `exec`, so that the process is the tracer; `env`, as sudo takes variables too.
    let line = example.replacen("sudo ", "exec env ", 1);
    let output = if example.contains(" attach ") {
        attach(world, &line)
    } else if example.contains(" --live ") {
        let terminal = Terminal::spawn(world.bash(&line), geteuid()).unwrap();
        let (status, shown) = terminal.wait().unwrap();
        Output {
            status,
            stdout: Vec::new(),
            stderr: shown.into_bytes(),
        }
    } else {
        world.bash(&line).output().unwrap()
    };
    let said = said(&output);
    assert!(
        output.status.success(),
        "{example}\n{}: {said}",
        output.status
    );
    if example.contains(" completions ") {
        return;
    }
    assert!(said.contains("Complete:"), "{example}\n{said}");
    assert!(
        !said.contains("No expert routing was seen"),
        "{example}\n{said}"
    );
    assert!(said.contains("  Expert "), "{example}\n{said}");
    assert_eq!(
        stats.exists(),
        example.contains("stats.json") || example.contains("stats-%p.json"),
        "{example}\n{said}"
    );
    if stats.exists() {
        Stats::read(stats).unwrap().assert_complete();
    }
    assert_eq!(
        routes.exists(),
        example.contains("routes.log"),
        "{example}\n{said}"
    );
    if routes.exists() {
        assert!(!tracer::read_log(routes).unwrap().is_empty(), "{example}");
    }
    assert_eq!(
        trace.exists(),
        example.contains("routes.arrows"),
        "{example}\n{said}"
    );
    if trace.exists() {
        let mut trace = Reader::open(trace).unwrap();
        assert!(trace.next().unwrap().is_some(), "{example}");
    }
    if example.contains(" --log ") {
        assert!(
            said.contains("[EXPERT-TRACE] Layer 0: Experts ["),
            "{example}\n{said}"
        );
    }
    if let Some((_, variable)) = example.split_once("--env ") {
        let variable = variable.split(' ').next().unwrap();
        let text = fs::read_to_string(environment).unwrap();
        assert!(
            text.lines().any(|line| line == variable),
            "{example}\n{text}"
        );
    }
}

/// Runs an example that attaches, and has the process compute. Without a duration, Ctrl-C ends it.
fn attach(world: &World, line: &str) -> Output {
    let mut target = driver(&known_small().path, &["-t", "1"]);
    target.env("LD_LIBRARY_PATH", world.at("bin"));
    let mut target = Oracle::spawn(&mut target).unwrap();
    let pid = target.pid().to_string();
    let line = line
        .replace("4242", &pid)
        .replace("$(pidof llama-server)", &pid)
        .replace("--duration 30s", "--duration 2s")
        .replace("-d 30s", "-d 2s");
    assert!(line.contains(&pid) || line.contains("--all"), "{line}");
    let mut child = world
        .bash(&line)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = read_until(&mut child, "Expert tracing enabled");
    target.command("prompt 0 30 500").unwrap();
    let ends = line.contains(" 2s");
    if !ends {
        kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    }
    let mut output = child.wait_with_output().unwrap();
    said.extend(output.stderr);
    output.stderr = said;
    // It goes on unharmed.
    target.command("prompt 0 5 600").unwrap();
    assert!(target.quit().unwrap().success());
    // A trace of many hours has a file for each.
    let _ = fs::rename(world.at("routes.0000.arrows"), world.at("routes.arrows"));
    // Of several processes each has a file.
    let _ = fs::rename(
        world.at(&format!("stats-{pid}.json")),
        world.at("stats.json"),
    );
    output
}

/// Reads what a child says up to a text.
fn read_until(child: &mut Child, text: &str) -> Vec<u8> {
    let stderr = child.stderr.as_mut().unwrap();
    let mut said = Vec::new();
    let mut byte = [0];
    while !String::from_utf8_lossy(&said).contains(text) {
        if stderr.read(&mut byte).unwrap() == 0 {
            break;
        }
        said.push(byte[0]);
    }
    said
}

#[test]
fn every_subcommand_starts_with_examples() {
    let all = help(&[]);
    let (_, commands) = all.split_once("\nCommands:\n").unwrap();
    let commands = commands.lines().map_while(|line| line.strip_prefix("  "));
    // A second line of a description is indented further.
    let names: Vec<&str> = commands
        .filter(|line| !line.starts_with(' '))
        .filter_map(|line| line.split(' ').next())
        .filter(|name| *name != "help")
        .collect();
    // Each of them is a test below.
    assert_eq!(
        names,
        [
            "run",
            "attach",
            "top",
            "doctor",
            "ctl",
            "merge",
            "diff",
            "verify",
            "analyze",
            "report",
            "export",
            "import",
            "completions",
        ],
        "{all}"
    );
    for name in names {
        let of_command = examples(&help(&[name]));
        assert!(
            of_command
                .iter()
                .all(|line| format!("{line} ").contains(&format!("expert-trace {name} "))),
            "{of_command:#?}"
        );
    }
}

#[test]
fn examples_of_the_program_work() {
    examples(&help(&[]))
        .iter()
        .for_each(|line| run_example(line));
}

#[test]
fn examples_of_run_work() {
    examples(&help(&["run"]))
        .iter()
        .for_each(|line| run_example(line));
}

#[test]
fn examples_of_attach_work() {
    examples(&help(&["attach"]))
        .iter()
        .for_each(|line| run_example(line));
}

#[test]
fn examples_of_ctl_work() {
    let world = World::get();
    let mut target = Oracle::spawn(&mut driver(&known_small().path, &["-t", "1"])).unwrap();
    let socket = world.at("control").display().to_string();
    let tracer = Attached::to(target.pid(), &["--control", &socket]).unwrap();
    target.command("prompt 0 5 600").unwrap();
    for example in examples(&help(&["ctl"])) {
        let line = example.replace("/run/user/1000/expert-trace", &socket);
        let output = world.bash(&line).output().unwrap();
        assert!(output.status.success(), "{example}: {}", said(&output));
    }
    let stats = Stats::read(&world.at("stats.json")).unwrap();
    assert_eq!(stats.0["capture"]["ended"], "running");
    let (status, said) = tracer.wait().unwrap();
    assert!(status.success(), "{said}");
    assert!(target.quit().unwrap().success());
}

#[test]
fn examples_of_top_work() {
    let world = World::get();
    let mut target = Oracle::spawn(&mut driver(&known_small().path, &["-t", "1"])).unwrap();
    for example in examples(&help(&["top"])) {
        let _ = fs::remove_file(world.at("stats.json"));
        let line = example
            .replacen("sudo ", "stty cols 80 rows 24; exec env TERM=xterm ", 1)
            .replace("4242", &target.pid().to_string());
        let mut terminal = Terminal::spawn(world.bash(&line), geteuid()).unwrap();
        // Between words, the cursor is moved.
        terminal.expect("counted").unwrap();
        target.command("clear 0").unwrap();
        target.command("prompt 0 5 600").unwrap();
        target.command("generate 0 3 7").unwrap();
        terminal.expect("decode").unwrap();
        terminal.send("q").unwrap();
        let (status, shown) = terminal.wait().unwrap();
        assert!(status.success(), "{example}: {shown}");
        assert!(shown.contains("Complete: "), "{example}: {shown}");
        let named = example.contains("stats.json");
        assert_eq!(world.at("stats.json").exists(), named, "{example}");
    }
    assert!(target.quit().unwrap().success());
}

#[test]
fn examples_of_doctor_work() {
    let world = World::get();
    let target = Oracle::spawn(&mut driver(&known_small().path, &["-t", "1"])).unwrap();
    for example in examples(&help(&["doctor"])) {
        let line = example
            .replacen("sudo ", "exec env ", 1)
            .replace("4242", &target.pid().to_string())
            .replace("/opt/llama", &llama().bin.to_string_lossy());
        let output = world.bash(&line).output().unwrap();
        assert!(output.status.success(), "{example}: {}", said(&output));
        let answer = String::from_utf8(output.stdout).unwrap();
        match example.contains("--json") {
            true => assert!(answer.contains("\"answer\": \"yes\""), "{answer}"),
            false => assert!(answer.ends_with("\nAnswer: yes\n"), "{answer}"),
        }
    }
    assert!(target.quit().unwrap().success());
}

/// Traces a program into each of the files that the examples name.
fn trace_into(names: &[&str]) {
    for name in names {
        let line = format!("exec expert-trace run -o {name} -- llama-cli -m model.gguf -p Hello");
        let output = World::get().bash(&line).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
    }
}

#[test]
fn examples_of_merge_work() {
    trace_into(&["run-1.json", "run-2.json", "another.json"]);
    for example in examples(&help(&["merge"])) {
        let output = World::get().bash(&example).output().unwrap();
        assert!(output.status.success(), "{example}: {}", said(&output));
    }
    let merged = fs::read(World::get().at("merged.json")).unwrap();
    let merged: serde_json::Value = serde_json::from_slice(&merged).unwrap();
    assert_eq!(merged["sources"].as_array().unwrap().len(), 3);
    assert_eq!(merged["contexts"].as_array().unwrap().len(), 4);
    assert_eq!(merged["layers_context"], 3);
}

#[test]
fn examples_of_diff_work() {
    trace_into(&["chat.json", "code.json"]);
    for example in examples(&help(&["diff"])) {
        // llama-cli has one context.
        let line = example.replace("--context-b 1", "--context-b 0");
        let output = World::get().bash(&line).output().unwrap();
        assert!(output.status.success(), "{example}: {}", said(&output));
        let answer = String::from_utf8(output.stdout).unwrap();
        match example.contains("--json") {
            true => assert!(answer.contains("\"mean_jsd_bits\": 0.0"), "{answer}"),
            false => assert!(answer.contains("\nLayer  "), "{answer}"),
        }
    }
}

/// What they say of equal counts is tested with llama-imatrix.
#[test]
fn examples_of_verify_say_what_is_missing() {
    for example in examples(&help(&["verify"])) {
        let line = example.replace("stats.json", "missing.json");
        let output = World::get().bash(&line).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{example}");
        assert!(said(&output).contains("cannot read missing.json"));
    }
}

#[test]
fn examples_of_export_work() {
    let line = "exec expert-trace run -o stats.json --trace trace.arrows -- llama-cli -m model.gguf -p Hello";
    let output = World::get().bash(line).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    for example in examples(&help(&["export"])) {
        let output = World::get().bash(&example).output().unwrap();
        assert!(output.status.success(), "{example}: {}", said(&output));
        // In a pipe, the last command's status would hide another one's.
        assert!(
            !said(&output).contains("error"),
            "{example}: {}",
            said(&output)
        );
        match example.split_once("-o - |") {
            Some(_) => assert!(!output.stdout.is_empty(), "{example}"),
            None => {
                let name = example.rsplit(' ').next().unwrap();
                assert!(
                    fs::metadata(World::get().at(name)).unwrap().len() > 0,
                    "{example}"
                );
            }
        }
    }
}

#[test]
fn examples_of_analyze_work() {
    let line = "exec expert-trace run -o stats.json --trace trace.arrows -- llama-cli -m model.gguf -p Hello";
    let output = World::get().bash(line).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    for example in examples(&help(&["analyze"])) {
        let output = World::get().bash(&example).output().unwrap();
        assert!(output.status.success(), "{example}: {}", said(&output));
        let answer = String::from_utf8(output.stdout).unwrap();
        match example.contains("--json") {
            true => assert!(answer.contains("\"belady\": "), "{answer}"),
            false => assert!(answer.contains("=== Verdict ==="), "{answer}"),
        }
    }
}

#[test]
fn examples_of_report_work() {
    let line = "exec expert-trace run -o stats.json --trace trace.arrows -- llama-cli -m model.gguf -p Hello";
    let world = World::get();
    let output = world.bash(line).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    for example in examples(&help(&["report"])) {
        let files = ["report.html", "heat-map.png"].map(|name| world.at(name));
        files.iter().for_each(|file| drop(fs::remove_file(file)));
        let output = world.bash(&example).output().unwrap();
        assert!(output.status.success(), "{example}: {}", said(&output));
        let made = files.each_ref().map(|file| file.exists());
        let is_page = example.contains("report.html");
        assert_eq!(made, [is_page, !is_page], "{example}");
    }
}

#[test]
fn examples_of_import_say_what_is_missing() {
    for example in examples(&help(&["import"])) {
        let output = World::get().bash(&example).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{example}");
        assert!(
            said(&output).contains("cannot open"),
            "{example}: {}",
            said(&output)
        );
    }
}

#[test]
fn examples_of_completions_work() {
    let lines = examples(&help(&["completions"]));
    lines.iter().for_each(|line| run_example(line));
    for (file, shell) in [
        ("_expert-trace", "zsh"),
        (".config/fish/completions/expert-trace.fish", "fish"),
    ] {
        let written = fs::read(World::get().at(file)).unwrap();
        assert_eq!(written, completions(shell), "{shell}");
    }
}

fn completions(shell: &str) -> Vec<u8> {
    let output = Command::new(tracer::program().unwrap())
        .args(["completions", shell])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(said(&output), "");
    output.stdout
}

/// What a real bash offers for a command line whose last word is being written.
fn offered(script: &Path, words: &[&str]) -> Vec<String> {
    let line = r#"
        source "$1"; shift
        complete -p expert-trace >&2 || exit 1
        COMP_WORDS=(expert-trace "$@")
        COMP_CWORD=$#
        COMP_LINE="${COMP_WORDS[*]}"
        COMP_POINT=${#COMP_LINE}
        function=$(complete -p expert-trace | sed -n 's/.*-F \([^ ]*\).*/\1/p')
        "$function" expert-trace "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}" || exit 1
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let output = Command::new("bash")
        .args(["--norc", "-c", line, "bash"])
        .arg(script)
        .args(words)
        .output()
        .unwrap();
    let said = said(&output);
    assert!(output.status.success(), "{words:?}: {said}");
    assert!(said.contains("expert-trace"), "{said}");
    let offered = String::from_utf8(output.stdout).unwrap();
    offered.lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes() {
    let directory = scratch();
    let script = directory.path().join("expert-trace.bash");
    fs::write(&script, completions("bash")).unwrap();
    let syntax = Command::new("bash")
        .arg("-n")
        .arg(&script)
        .output()
        .unwrap();
    assert!(
        syntax.status.success() && syntax.stderr.is_empty(),
        "{}",
        said(&syntax)
    );

    let commands = offered(&script, &[""]);
    for command in [
        "run",
        "attach",
        "top",
        "doctor",
        "merge",
        "diff",
        "verify",
        "export",
        "import",
        "completions",
    ] {
        assert!(
            commands.iter().any(|offer| offer == command),
            "{commands:?}"
        );
    }
    assert_eq!(offered(&script, &["att"]), ["attach"]);
    assert_eq!(offered(&script, &["run", "--no-f"]), ["--no-follow"]);
    assert_eq!(offered(&script, &["attach", "--dur"]), ["--duration"]);
    assert_eq!(offered(&script, &["completions", "el"]), ["elvish"]);
}

/// Scripts for shells that are not installed are looked at for their contents alone.
#[test]
fn every_shell_has_a_script() {
    let directory = scratch();
    for (shell, syntax_check) in [
        ("bash", Some("-n")),
        ("zsh", Some("-n")),
        ("fish", Some("--no-execute")),
        ("elvish", Some("-compileonly")),
        ("powershell", None),
    ] {
        let script = completions(shell);
        let text = String::from_utf8(script.clone()).unwrap();
        for word in [
            "expert-trace",
            "attach",
            "no-follow",
            "duration",
            "completions",
        ] {
            assert!(text.contains(word), "{shell}: {word}");
        }
        let path = directory.path().join(shell);
        fs::write(&path, script).unwrap();
        let Some(option) = syntax_check else {
            println!("{shell}: syntax not checked");
            continue;
        };
        match Command::new(shell).arg(option).arg(&path).output() {
            Ok(output) => {
                assert!(output.status.success(), "{shell}: {}", said(&output));
                println!("{shell}: syntax checked");
            }
            Err(_) => println!("{shell}: not installed, syntax not checked"),
        }
    }
    let unknown = Command::new(tracer::program().unwrap())
        .args(["completions", "tcsh"])
        .output()
        .unwrap();
    assert_eq!(unknown.status.code(), Some(2));
}

#[test]
fn completions_end_quietly_when_nobody_reads() {
    let line = r#"expert-trace completions bash | true; echo "${PIPESTATUS[0]}"
        { sleep 0.2; expert-trace completions zsh; echo "status $?" >&2; } | true"#;
    let output = World::get().bash(line).output().unwrap();
    assert_eq!(output.stdout, b"0\n");
    assert_eq!(said(&output), "status 0\n");
}
