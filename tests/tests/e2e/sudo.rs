//! `sudo expert-trace run`, as an ordinary user types it: a real `sudo`, a real user, and a real
//! terminal where one matters.
//!
//! The traced program is the user's: it has the user's rights, environment, files and terminal, and
//! only the tracer is root. The `sudo_itself` tests hold for `sudo` without the tracer. Where one of
//! them fails, the system is not as the others assume.

use std::{
    fs::{self, Permissions},
    io::Write as _,
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _, symlink},
        process::CommandExt as _,
    },
    path::PathBuf,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use expert_trace_tests::{
    account::{Account, SECURE_PATH},
    models::Expected,
    oracle::Oracle,
    reachable::Reachable,
    terminal::Terminal,
    tracer::{self, Counts, Stats, count, read_log},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, Uid, setsid},
};
use tempfile::TempDir;

use crate::support::{Known, driver, ids, known_small, llama, scratch};

/// What the interactive shell of a test asks with; nothing else says so.
const PROMPT: &str = "next command> ";

/// A user who can use `sudo`, and a tracer within the user's reach, though not in the path.
struct Stage {
    user: Account,
    files: Reachable,
    tracer: PathBuf,
}

impl Stage {
    fn new() -> Self {
        let user = Account::create().unwrap();
        let files = Reachable::new().unwrap();
        let tracer = files.copy(&tracer::program().unwrap()).unwrap();
        Self {
            user,
            files,
            tracer,
        }
    }

    fn tracer(&self) -> &str {
        self.tracer.to_str().unwrap()
    }

    /// `sudo expert-trace run ARGUMENTS`.
    fn sudo_run(&self, arguments: &[&str]) -> Command {
        let mut sudo = self.user.command("sudo");
        sudo.args([self.tracer(), "run"]).args(arguments);
        sudo
    }

    /// The result of that without a terminal.
    fn output(&self, arguments: &[&str]) -> Output {
        detached(self.sudo_run(arguments))
    }

    /// A program of the user, in `bin` of its home.
    fn script(&self, name: &str, text: &str) {
        let bin = self.user.home().join("bin");
        fs::create_dir_all(&bin).unwrap();
        let path = bin.join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    }

    /// What the user's `describe` wrote about the process that it was, when run as `command`.
    fn description(&self, command: Command, terminal: bool) -> Vec<String> {
        self.script("describe", DESCRIBE);
        let path = self.user.home().join("description");
        let (succeeded, said) = if terminal {
            let terminal = Terminal::spawn(command, self.user.uid()).unwrap();
            let (status, said) = terminal.wait().unwrap();
            (status.success(), said)
        } else {
            let output = detached(command);
            (output.status.success(), said(&output))
        };
        assert!(succeeded, "{said}");
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().uid(), self.user.uid().as_raw());
        fs::remove_file(&path).unwrap();
        // That `sudo` was used is no secret.
        let lines = text.lines().filter(|line| !line.starts_with("SUDO_"));
        lines.map(str::to_owned).collect()
    }

    fn in_home(&self, name: &str) -> PathBuf {
        self.user.home().join(name)
    }
}

/// Writes all that a process gets from the one that started it.
const DESCRIBE: &str = "exec >description; id; id -ru; id -rg; umask; env | sort";

/// Runs a command that has no terminal, whatever the tests were started from, and no input.
fn detached(mut command: Command) -> Output {
    // SAFETY: the closure makes one system call.
    unsafe { command.pre_exec(|| Ok(setsid().map(drop)?)) };
    command.stdin(Stdio::null()).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn printed(output: &Output) -> String {
    assert!(output.status.success(), "{}", said(output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An interactive shell that does not show what is typed, at its prompt.
struct Shell(Terminal);

impl Shell {
    /// `bash` is a command line of bash without arguments.
    fn start(mut bash: Command, owner: Uid) -> Self {
        bash.args(["--norc", "--noprofile", "--noediting", "-i"]);
        bash.env("PS1", PROMPT);
        let mut terminal = Terminal::spawn(bash, owner).unwrap();
        terminal.expect(PROMPT).unwrap();
        terminal.send("stty -echo\n").unwrap();
        terminal.expect(PROMPT).unwrap();
        Self(terminal)
    }

    fn of(user: &Account) -> Self {
        Self::start(user.command("bash"), user.uid())
    }

    /// Starts a command that goes on; `sign` is what shows that it has got somewhere.
    fn start_command(&mut self, command: &str, sign: &str) {
        self.0.send(&format!("{command}\n")).unwrap();
        let (which, shown) = self.0.expect_either(&[sign, PROMPT]).unwrap();
        assert_eq!(which, 0, "{command} ended without a {sign:?}: {shown}");
    }

    fn await_prompt(&mut self) -> String {
        self.0.expect(PROMPT).unwrap()
    }

    /// Runs a command to its end, and gives what it showed.
    fn command(&mut self, command: &str) -> String {
        self.0.send(&format!("{command}\n")).unwrap();
        let shown = self.await_prompt();
        shown.strip_suffix(PROMPT).unwrap().to_owned()
    }

    /// Exit status of the command before.
    fn status(&mut self) -> u8 {
        let shown = self.command("echo $?");
        shown
            .trim()
            .parse()
            .unwrap_or_else(|_| panic!("a status: {shown}"))
    }

    /// A traced driver to talk to in the terminal, and its process id.
    fn start_driver(&mut self, command: &str) -> u32 {
        self.start_command(command, "ready ");
        let line = self.0.expect("\n").unwrap();
        line.trim().parse().unwrap()
    }

    /// A command of the driver in the foreground.
    fn ask_driver(&mut self, command: &str) -> Vec<u32> {
        self.start_command(command, "ok");
        ids(self.0.expect("\n").unwrap().trim())
    }

    /// Fails unless the shell has the driver and its tracer as one stopped job.
    fn assert_stopped(&mut self, driver: u32) {
        let jobs = self.command("jobs -s");
        assert!(
            jobs.contains("[1]+  Stopped") && jobs.lines().count() == 1,
            "{jobs}"
        );
        // A stop is complete when the last thread has left the kernel or the processor.
        let deadline = Instant::now() + Duration::from_secs(10);
        for pid in [driver, parent(driver)] {
            while state(pid) != 'T' {
                assert!(Instant::now() < deadline, "process {pid} goes on");
                std::thread::yield_now();
            }
        }
    }
}

/// State, and what follows it in `/proc/PID/stat`.
fn stat(pid: u32) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, from_state) = stat.rsplit_once(") ").unwrap();
    from_state.to_owned()
}

fn state(pid: u32) -> char {
    stat(pid).chars().next().unwrap()
}

fn parent(pid: u32) -> u32 {
    stat(pid)
        .split(' ')
        .nth(1)
        .and_then(|pid| pid.parse().ok())
        .unwrap()
}

/// Counts of a model with known routing: of all tokens, and in the last layer of those whose output
/// was wanted.
fn known_counts(expected: &Expected, tokens: &[u32], outputs: &[u32]) -> Counts {
    let last = expected.layers() - 1;
    (0..=last)
        .map(|layer| {
            let of_layer = if layer == last { outputs } else { tokens };
            let rows = of_layer
                .iter()
                .map(|token| (layer, expected.ids(layer, *token)));
            (layer, count(rows).remove(&layer).unwrap_or_default())
        })
        .collect()
}

/// The driver and a model where the user can read them, and how the user's shell names them.
struct Reached {
    program: String,
    libraries: String,
    model: PathBuf,
}

impl Reached {
    fn in_stage(stage: &Stage, known: &Known) -> Self {
        let driver = stage.files.copy_driver(llama()).unwrap();
        let path = |path: PathBuf| path.into_os_string().into_string().unwrap();
        Self {
            program: path(driver.program),
            libraries: path(driver.libraries),
            model: stage.files.copy(&known.path).unwrap(),
        }
    }

    /// The driver's command line, with a context for some thousand tokens. One thread: two wait for
    /// each other at every node of the graph, which takes minutes on a machine with other work.
    fn command_line(&self) -> [&str; 7] {
        let model = self.model.to_str().unwrap();
        [&self.program, "-m", model, "-t", "1", "-c", "4096"]
    }
}

mod sudo_itself {
    use super::*;

    #[test]
    fn has_the_rules_of_debian() {
        let user = Account::create().unwrap();
        let with_sudo = |arguments: &[&str]| {
            let mut sudo = user.command("sudo");
            sudo.env("OWN", "1").env("LD_LIBRARY_PATH", "/own");
            printed(&detached({
                sudo.args(arguments);
                sudo
            }))
        };
        assert_eq!(with_sudo(&["id", "-u"]), "0\n");
        let environment = with_sudo(&["env"]);
        let has = |line: &str| environment.lines().any(|other| other == line);
        assert!(has(&format!("PATH={SECURE_PATH}")), "{environment}");
        assert!(has(&format!("SUDO_UID={}", user.uid())), "{environment}");
        assert!(!environment.contains("OWN="), "{environment}");
        assert!(!environment.contains("LD_LIBRARY_PATH="), "{environment}");

        let (_, terminals) = {
            let mut command = user.command("sh");
            command.args(["-c", "tty; sudo tty"]);
            let terminal = Terminal::spawn(command, user.uid()).unwrap();
            terminal.wait().unwrap()
        };
        let lines: Vec<&str> = terminals.lines().collect();
        assert_eq!(lines.len(), 2, "{terminals}");
        assert_ne!(lines[0], lines[1], "no terminal of its own: no use_pty");
    }

    #[test]
    fn hands_on_control_c() {
        let user = Account::create().unwrap();
        let mut shell = Shell::of(&user);
        shell.start_command("sudo sh -c 'echo started; cat'", "started\r\n");
        shell.start_command("typed", "typed\r\n");
        shell.0.send_control('c').unwrap();
        shell.await_prompt();
        assert_eq!(shell.status(), 130);
    }

    #[test]
    fn hands_on_control_z_and_fg() {
        let user = Account::create().unwrap();
        let mut shell = Shell::of(&user);
        shell.start_command("sudo yes", "y\r\n");
        shell.0.send_control('z').unwrap();
        let shown = shell.await_prompt();
        assert!(shown.contains("Stopped"), "{shown}");
        shell.start_command("fg", "sudo yes\r\n");
        shell.0.expect("y\r\n").unwrap();
        shell.0.send_control('c').unwrap();
        shell.await_prompt();
        assert_eq!(shell.status(), 130);
    }
}

/// Every id, variable and mask that the child has is what it would be without `sudo` and the tracer,
/// and the program is found where the user's own `PATH` says.
#[test]
fn the_child_is_the_users() {
    let stage = Stage::new();
    let with_variables = |mut command: Command| {
        command.envs([
            ("LD_LIBRARY_PATH", "/the/users/own:/other"),
            ("LLAMA_EXPERT_TRACE_STATS", "1"),
            ("LLAMA_EXPERT_TRACE_OWN", "a b\tc"),
            ("OWN", "'quoted' $and =signs= ü"),
            ("EMPTY", ""),
        ]);
        command
    };
    for terminal in [false, true] {
        let mut plain = stage.user.command("sh");
        plain.args(["-c", "exec describe"]);
        let alone = stage.description(with_variables(plain), terminal);
        assert!(alone.contains(&format!("HOME={}", stage.user.home().display())));
        assert!(
            alone.contains(&"EMPTY=".to_owned()),
            "of the user: {alone:#?}"
        );
        assert!(alone[0].contains("(users)"), "{}", alone[0]);
        let traced = with_variables(stage.sudo_run(&["--", "describe"]));
        assert_eq!(stage.description(traced, terminal), alone);
    }
}

#[test]
fn variables_can_be_set_on_the_way() {
    let stage = Stage::new();
    stage.script("describe", DESCRIBE);
    let mut sudo = stage.user.command("sudo");
    sudo.args(["env", "FOO=1 2", "LD_LIBRARY_PATH=/given"]);
    sudo.args([stage.tracer(), "run", "--env", "BAR=3=4", "--", "describe"]);
    let description = stage.description(sudo, false);
    let path = format!("PATH={}/bin:", stage.user.home().display());
    for line in ["FOO=1 2", "LD_LIBRARY_PATH=/given", "BAR=3=4"] {
        assert!(description.iter().any(|other| other == line), "{line}");
    }
    assert!(description.iter().any(|line| line.starts_with(&path)));
}

#[test]
fn another_user_can_be_asked_for() {
    let stage = Stage::new();
    let nobody = printed(&Command::new("id").arg("nobody").output().unwrap());
    let traced = stage.output(&["--user", "nobody", "--", "id"]);
    assert_eq!(printed(&traced), nobody);

    // Also without sudo, by root.
    let user = printed(&stage.user.command("id").output().unwrap());
    let mut root = tracer::command().unwrap();
    root.args(["run", "--user", stage.user.name(), "--", "id"]);
    assert_eq!(printed(&detached(root)), user);
}

/// Runs a program as root without `sudo`, with these variables, and fails unless it is root's.
#[test]
fn without_sudo_root_is_root() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let mut command = tracer::command().unwrap();
    command.env("OWN", "1");
    command.args(["run", "-o", path.to_str().unwrap(), "--"]);
    command.args(["sh", "-c", "id -u; id -g; echo $HOME $PATH $OWN"]);
    let environment = |name: &str| std::env::var(name).unwrap_or_default();
    assert_eq!(
        printed(&detached(command)),
        format!("0\n0\n{} {} 1\n", environment("HOME"), environment("PATH"))
    );
    assert_eq!(fs::metadata(&path).unwrap().uid(), 0);
}

#[test]
fn without_its_process_sudos_caller_is_known_by_the_user_database() {
    let stage = Stage::new();
    let home = stage.in_home("");
    let mut command = tracer::command().unwrap();
    let owner = fs::metadata(&home).unwrap();
    command.env("SUDO_UID", owner.uid().to_string());
    command.env("SUDO_GID", owner.gid().to_string());
    command.args(["run", "--", "sh", "-c", "id -u; id -g; echo $HOME/; env"]);
    let output = detached(command);
    let printed = printed(&output);
    let expected = format!("{}\n{}\n{}\n", owner.uid(), owner.gid(), home.display());
    assert!(printed.starts_with(&expected), "{printed}");
    assert!(!printed.contains("SUDO_"), "{printed}");
    let said = said(&output);
    assert!(
        said.contains("cannot read the environment that sudo was called with"),
        "{said}"
    );
}

#[test]
fn without_sudo_a_user_is_told() {
    let stage = Stage::new();
    let mut command = stage.user.command(stage.tracer());
    command.env("SUDO_UID", "0").env("SUDO_USER", "root");
    command.args(["run", "-o", "stats.json", "--", "touch", "ran"]);
    let output = detached(command);
    assert_eq!(output.status.code(), Some(125));
    let said = said(&output);
    assert!(
        said.contains("CAP_SYS_ADMIN") && said.contains("run it with sudo"),
        "{said}"
    );
    assert!(!stage.in_home("ran").exists());
}

#[test]
fn output_files_are_the_users() {
    let stage = Stage::new();
    let user = &stage.user;
    let options = ["-o", "stats.json", "--log=routes.log", "--", "true"];
    // The second time they are there already.
    for _ in 0..2 {
        printed(&stage.output(&options));
        for name in ["stats.json", "routes.log"] {
            let file = fs::metadata(stage.in_home(name)).unwrap();
            assert_eq!(
                (file.uid(), file.gid()),
                (user.uid().as_raw(), user.gid().as_raw())
            );
            assert_eq!(file.mode() & 0o7777, 0o644, "{name}");
        }
    }
    Stats::read(&stage.in_home("stats.json")).unwrap();
}

/// `-o` and `--log` open no file that the user could not write, by whatever name it is given.
#[test]
fn what_the_user_may_not_write_stays_as_it_is() {
    const TEXT: &str = "root's own words\n";
    let stage = Stage::new();
    let victim = stage.files.path().join("victim");
    fs::write(&victim, TEXT).unwrap();
    symlink(&victim, stage.in_home("symlink")).unwrap();
    let new = stage.files.path().join("new");
    symlink(&new, stage.in_home("dangling")).unwrap();
    // In the same file system, where a hard link can be.
    let linked = stage.in_home("of-root");
    fs::write(&linked, TEXT).unwrap();
    fs::hard_link(&linked, stage.in_home("hardlink")).unwrap();

    let names = ["symlink", "dangling", "hardlink", "of-root"].map(PathBuf::from);
    for path in names.iter().chain([&victim, &new]) {
        let path = path.to_str().unwrap();
        for option in [format!("--output={path}"), format!("--log={path}")] {
            let output = stage.output(&[&option, "--", "touch", "ran"]);
            let said = said(&output);
            assert_eq!(output.status.code(), Some(125), "{option}: {said}");
            assert!(
                said.contains("Failed to open") && said.contains(path),
                "{option}: {said}"
            );
        }
    }
    let output = stage.output(&["-o", new.to_str().unwrap(), "--", "true"]);
    let message = format!("Failed to open output file: {}", new.display());
    assert!(said(&output).contains(&message), "{}", said(&output));

    assert!(!stage.in_home("ran").exists(), "the program was started");
    assert!(!new.exists());
    for file in [&victim, &linked] {
        assert_eq!(fs::read_to_string(file).unwrap(), TEXT);
        let status = fs::metadata(file).unwrap();
        assert_eq!((status.uid(), status.mode() & 0o7777), (0, 0o644));
    }
}

#[test]
fn the_exit_status_comes_through_sudo() {
    let stage = Stage::new();
    for (script, status) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("kill -KILL $$", 137),
        ("kill -TERM $$", 143),
        ("kill -INT $$", 130),
    ] {
        for options in [&[][..], &["--strict"]] {
            let arguments = [options, &["--", "sh", "-c", script]].concat();
            let output = stage.output(&arguments);
            assert_eq!(output.status.code(), Some(status), "{}", said(&output));
        }
    }
    let output = stage.output(&["--", "no-such-command-anywhere"]);
    assert_eq!(output.status.code(), Some(127), "{}", said(&output));
}

/// Status 3 is for --strict, a capture that lost something, and a program that did well.
#[test]
fn strict_tells_of_a_loss() {
    let known = known_small();
    let status = |options: &[&str], killed: bool| {
        let options = [&["--buffer-size=4K"], options].concat();
        let mut command = tracer::run(&options, &driver(&known.path, &["-t", "1"])).unwrap();
        let mut target = Oracle::spawn(&mut command).unwrap();
        let pid = Pid::from_raw(target.pid() as i32);
        let tracer = Pid::from_raw(parent(target.pid()) as i32);
        kill(tracer, Signal::SIGSTOP).unwrap();
        target.command("generate 0 100 21").unwrap();
        kill(tracer, Signal::SIGCONT).unwrap();
        if killed {
            kill(pid, Signal::SIGTERM).unwrap();
            target.wait().unwrap().code()
        } else {
            target.quit().unwrap().code()
        }
    };
    assert_eq!(status(&[], false), Some(0));
    assert_eq!(status(&["--strict"], false), Some(3));
    assert_eq!(status(&["--strict"], true), Some(143));
}

#[test]
fn input_and_output_are_the_childs() {
    let stage = Stage::new();
    let script = "read first; echo \"got $first\"; echo complaint >&2; cat";
    let mut command = stage.sudo_run(&["--", "sh", "-c", script]);
    // SAFETY: the closure makes one system call.
    unsafe { command.pre_exec(|| Ok(setsid().map(drop)?)) };
    let numbers: String = (0..200_000).map(|number| format!("{number}\n")).collect();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(|| {
            stdin.write_all(format!("words\n{numbers}").as_bytes())?;
            drop(stdin);
            std::io::Result::Ok(())
        });
        child.wait_with_output().unwrap()
    });
    assert!(
        printed(&output) == format!("got words\n{numbers}"),
        "{}",
        said(&output)
    );
    assert!(said(&output).contains("complaint\n"), "{}", said(&output));
    assert!(said(&output).contains("No expert routing was seen"));
}

/// In a terminal, where only a part of the three is redirected.
#[test]
fn a_pipe_from_a_terminal_reaches_the_child() {
    let stage = Stage::new();
    let mut shell = Shell::of(&stage.user);
    let sudo_run = format!("sudo {} run", stage.tracer());
    shell.command(&format!(
        "seq 200000 | {sudo_run} -- cat >copy 2>complaints"
    ));
    let complaints = fs::read_to_string(stage.in_home("complaints")).unwrap();
    assert_eq!(shell.status(), 0, "{complaints}");
    let numbers: String = (1..=200_000).map(|number| format!("{number}\n")).collect();
    let copy = fs::read_to_string(stage.in_home("copy")).unwrap();
    assert!(copy == numbers, "{} bytes came: {complaints}", copy.len());

    // Without redirection, what the child has is a terminal.
    let shown = shell.command(&format!("{sudo_run} -- sh -c 'tty; tty <&1; tty <&2'"));
    let ttys = shown.matches("/dev/pts/").count();
    assert_eq!(ttys, 3, "{shown}");
}

#[test]
fn a_trace_under_sudo_is_exact() {
    let known = known_small();
    let stage = Stage::new();
    let reached = Reached::in_stage(&stage, known);
    let options = ["-o", "stats.json", "--log=routes.log", "--top=0", "--"];

    // The libraries are found by the user's own variable and by nothing else.
    let unset = stage.output(&[&options[..], &reached.command_line()].concat());
    assert_eq!(unset.status.code(), Some(127), "{}", said(&unset));
    assert!(said(&unset).contains("libllama"), "{}", said(&unset));

    let mut command = stage.sudo_run(&[&options[..], &reached.command_line()].concat());
    command.env("LD_LIBRARY_PATH", &reached.libraries);
    // SAFETY: the closure makes one system call.
    unsafe { command.pre_exec(|| Ok(setsid().map(drop)?)) };
    let mut target = Oracle::spawn(&mut command).unwrap();
    let owner = fs::metadata(format!("/proc/{}", target.pid()))
        .unwrap()
        .uid();
    assert_eq!(owner, stage.user.uid().as_raw());
    let next = ids(&target.command("prompt 0 300 1000").unwrap())[0];
    let generated = ids(&target.command(&format!("generate 0 50 {next}")).unwrap());
    assert!(target.quit().unwrap().success());

    let decoded = [&[next], &generated[..49]].concat();
    let tokens: Vec<u32> = (1000..1300).chain(decoded.iter().copied()).collect();
    let outputs = [&[1299], decoded.as_slice()].concat();
    let expected = known_counts(&known.expected, &tokens, &outputs);
    let stats = Stats::read(&stage.in_home("stats.json")).unwrap();
    stats.assert_complete();
    assert_eq!(stats.counts(), expected);
    let rows = read_log(&stage.in_home("routes.log")).unwrap();
    let logged = rows.iter().map(|(layer, ids)| (*layer, ids.as_slice()));
    assert_eq!(count(logged), expected);
}

/// An interactive shell in which `expert-trace run` is tested.
struct Scene {
    stage: Stage,
    shell: Shell,
    /// How it is called there.
    run: String,
    /// Where the shell is.
    directory: PathBuf,
    /// That directory, if it is not the user's home.
    _scratch: Option<TempDir>,
}

impl Scene {
    /// The user's shell.
    fn with_sudo() -> Self {
        let stage = Stage::new();
        Self {
            shell: Shell::of(&stage.user),
            run: format!("sudo {} run", stage.tracer()),
            directory: stage.user.home().to_owned(),
            stage,
            _scratch: None,
        }
    }

    /// Root's own shell, without `sudo`.
    fn as_root() -> Self {
        let stage = Stage::new();
        let directory = scratch();
        let mut bash = Command::new("bash");
        bash.current_dir(directory.path());
        tracer::without_sudo(&mut bash);
        Self {
            shell: Shell::start(bash, Uid::current()),
            run: format!("{} run", stage.tracer()),
            directory: directory.path().to_owned(),
            stage,
            _scratch: Some(directory),
        }
    }

    /// Starts a driver under the tracer, in the foreground, and gives its process id.
    fn start_traced_driver(&mut self, known: &Known) -> u32 {
        let reached = Reached::in_stage(&self.stage, known);
        self.shell
            .command(&format!("export LD_LIBRARY_PATH={}", reached.libraries));
        let driver = reached.command_line().join(" ");
        let run = &self.run;
        self.shell
            .start_driver(&format!("{run} -o stats.json -- {driver}"))
    }

    fn stats(&self) -> Stats {
        Stats::read(&self.directory.join("stats.json")).unwrap()
    }
}

fn control_c_ends_the_child_and_not_the_trace(mut scene: Scene) {
    let known = known_small();
    scene.start_traced_driver(known);
    let shell = &mut scene.shell;
    shell.ask_driver("decode 0 5 6 7 8");
    shell.0.send_control('c').unwrap();
    let shown = shell.await_prompt();
    assert_eq!(shell.status(), 130, "{shown}");
    for line in [
        "=== Expert Usage Statistics ===",
        "Statistics exported to: stats.json",
    ] {
        assert!(shown.contains(line), "{shown}");
    }
    let stats = scene.stats();
    stats.assert_complete();
    let expected = known_counts(&known.expected, &[5, 6, 7, 8], &[8]);
    assert_eq!(stats.counts(), expected);
}

#[test]
fn control_c_ends_the_child_and_not_the_trace_with_sudo() {
    control_c_ends_the_child_and_not_the_trace(Scene::with_sudo());
}

#[test]
fn control_c_ends_the_child_and_not_the_trace_as_root() {
    control_c_ends_the_child_and_not_the_trace(Scene::as_root());
}

fn a_child_may_handle_control_c(mut scene: Scene) {
    let script = "trap 'echo caught; exit 5' INT; echo started; cat\n";
    fs::write(scene.directory.join("handler"), script).unwrap();
    let run = format!("{} -o stats.json -- sh handler", scene.run);
    let shell = &mut scene.shell;
    shell.start_command(&run, "started");
    // What `cat` shows, it is there to receive the signal.
    shell.start_command("typed", "typed");
    shell.0.send_control('c').unwrap();
    let shown = shell.await_prompt();
    assert_eq!(shell.status(), 5, "{shown}");
    assert_eq!(shown.matches("caught").count(), 1, "{shown}");
    assert_eq!(scene.stats().0["integrity"]["complete"], true);
}

#[test]
fn a_child_may_handle_control_c_with_sudo() {
    a_child_may_handle_control_c(Scene::with_sudo());
}

#[test]
fn a_child_may_handle_control_c_as_root() {
    a_child_may_handle_control_c(Scene::as_root());
}

/// Twice, in the middle of decoding; the shell has its prompt meanwhile.
fn control_z_stops_the_job_and_fg_continues_it(mut scene: Scene) {
    const TOKENS: usize = 1000;
    let known = known_small();
    let pid = scene.start_traced_driver(known);
    let shell = &mut scene.shell;
    shell.start_command(&format!("stream 0 {TOKENS} 21"), "\n");
    for _ in 0..2 {
        shell.0.send_control('z').unwrap();
        let shown = shell.await_prompt();
        assert!(shown.contains("Stopped"), "{shown}");
        assert!(!shown.contains("ok"), "it was done before: {shown}");
        shell.assert_stopped(pid);
        // Tokens appear again. Before, nothing may be typed: `sudo` discards it when it takes the
        // terminal.
        shell.start_command("fg", "run -o stats.json");
        for _ in 0..10 {
            shell.0.expect("\n").unwrap();
        }
    }
    shell.0.expect("ok\r\n").unwrap();
    shell.ask_driver("quit");
    let shown = shell.await_prompt();
    assert_eq!(shell.status(), 0, "{shown}");

    // The terminal throws output away when a key stops the program, so what was generated comes from
    // the same program, asked again.
    let mut again = Oracle::spawn(&mut driver(&known.path, &["-t", "1", "-c", "4096"])).unwrap();
    let answer = again.command(&format!("generate 0 {TOKENS} 21")).unwrap();
    let tokens = [&[21], &ids(&answer)[..TOKENS - 1]].concat();
    let stats = scene.stats();
    stats.assert_complete();
    let expected = known_counts(&known.expected, &tokens, &tokens);
    assert_eq!(stats.counts(), expected);
}

#[test]
fn control_z_stops_the_job_and_fg_continues_it_with_sudo() {
    control_z_stops_the_job_and_fg_continues_it(Scene::with_sudo());
}

#[test]
fn control_z_stops_the_job_and_fg_continues_it_as_root() {
    control_z_stops_the_job_and_fg_continues_it(Scene::as_root());
}
