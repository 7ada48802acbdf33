//! What cannot be traced is said in one message, which names what it is about and what to do next.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Output, Stdio},
    sync::OnceLock,
};

use expert_trace_tests::tracer;
use nix::{
    sys::{
        stat::Mode,
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::{Pid, User, mkfifo},
};
use tempfile::TempDir;

use crate::{
    layouts::compile,
    rpc::Server,
    support::{dense, driver, known_small, llama_program, scratch},
};

/// Exit status when the tracer itself fails.
const TRACER_FAILED: i32 = 125;

/// A process that ends when it is dropped.
pub struct Idle {
    child: Child,
    stdin: Option<ChildStdin>,
    /// Another of its threads.
    thread: u32,
}

impl Idle {
    pub fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let thread = line.strip_prefix("ready ").unwrap().trim().parse().unwrap();
        Self {
            stdin: child.stdin.take(),
            child,
            thread,
        }
    }

    pub fn plain() -> Self {
        Self::start(Command::new(idle()))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.child.wait();
    }
}

/// A program that is nothing like llama.cpp.
pub fn idle() -> &'static Path {
    static PROGRAM: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, program) = PROGRAM.get_or_init(|| compile_idle(&[]));
    program
}

pub fn compile_idle(flags: &[&str]) -> (TempDir, PathBuf) {
    let (directory, program) = compile("idle.c", &[&["-pthread"], flags].concat());
    // Other users run it, too.
    let all = fs::Permissions::from_mode(0o755);
    fs::set_permissions(directory.path(), all).unwrap();
    (directory, program)
}

/// Makes bpf(2) fail.
pub fn nobpf() -> &'static Path {
    static PROGRAM: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, program) = PROGRAM.get_or_init(|| compile("nobpf.c", &[]));
    program
}

/// The tracer on a kernel without uprobe_multi links, as it was before Linux 6.6: it knows their attach
/// type not. They are told by the length of what asks for them, which is not that of aya's requests.
pub fn without_uprobe_multi() -> Command {
    const LINK_CREATE_OF_64_BYTES: &str = "28/64";
    under(nobpf(), &[LINK_CREATE_OF_64_BYTES, errno("EINVAL")])
}

fn expert_trace() -> Command {
    Command::new(tracer::program().unwrap())
}

/// `PROGRAM ARGUMENTS expert-trace`.
pub fn under<S: AsRef<OsStr>>(program: S, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).arg(tracer::program().unwrap());
    command
}

/// With these capabilities alone (`+sys_admin,+setuid`), still as root.
pub fn with_capabilities(capabilities: &str) -> Command {
    let set = format!("--bounding-set=-all{capabilities}");
    under("setpriv", &[&set, "--inh-caps=-all"])
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs the tracer, which has to fail, and gives its message.
#[track_caller]
fn refused(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(TRACER_FAILED), "{said}");
    assert_eq!(
        said.matches("expert-trace: error: ").count(),
        1,
        "one message: {said}"
    );
    said
}

#[track_caller]
fn attach_refused(pid: u32) -> String {
    refused(expert_trace().args(["attach", "--pid", &pid.to_string()]))
}

#[track_caller]
fn assert_says(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

#[test]
fn no_such_process() {
    let none = i32::MAX as u32;
    let said = attach_refused(none);
    assert_says(
        &said,
        &[&format!("no process {none}: --pid takes a number")],
    );
    assert!(!said.contains("PID namespace of"), "{said}");
}

/// The first process of a PID namespace has the number 1 there. Outside, 1 is another one, and no
/// llama.cpp.
#[test]
fn a_number_of_another_pid_namespace() {
    let mut unshare = Command::new("unshare");
    unshare.args(["--pid", "--fork", "--mount-proc", "--kill-child"]);
    unshare.arg(idle());
    let inner = Idle::start(unshare);
    let children = format!("/proc/{0}/task/{0}/children", inner.pid());
    let pid = fs::read_to_string(children).unwrap();
    let pid = pid.trim();
    // Whatever our own 1 is: its message ends with those that have the number elsewhere.
    let said = attach_refused(1);
    let expected =
        format!("in the PID namespace of program, 1 is process {pid} here: use --pid {pid}");
    assert_says(&said, &[&expected]);
}

/// A number that nobody has here: the kernel is told to give it to the next process there.
#[test]
fn a_number_that_only_another_pid_namespace_has() {
    let number = (30_000..).find(|n| !Path::new(&format!("/proc/{n}")).exists());
    let number = number.unwrap();
    // A command that is not the last one is a process of its own.
    let script = format!(
        "echo {} > /proc/sys/kernel/ns_last_pid; \"$0\"; true",
        number - 1
    );
    let mut unshare = Command::new("unshare");
    unshare.args([
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
        "sh",
        "-c",
    ]);
    unshare.arg(script).arg(idle());
    let inner = Idle::start(unshare);
    let said = attach_refused(number);
    let expected = format!("in the PID namespace of program, {number} is process ");
    assert_says(&said, &[&format!("no process {number}"), &expected]);
    drop(inner);
}

#[test]
fn a_thread() {
    let target = Idle::plain();
    let (pid, thread) = (target.pid(), target.thread);
    let said = attach_refused(thread);
    let expected = format!("{thread} is a thread of process {pid} (program): use --pid {pid}");
    assert_says(&said, &[&expected]);
}

#[test]
fn a_zombie() {
    let mut child = Command::new("true").spawn().unwrap();
    let pid = child.id();
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    waitid(Id::Pid(Pid::from_raw(pid as i32)), flags).unwrap();
    let said = attach_refused(pid);
    assert_says(
        &said,
        &[&format!("process {pid} (true) has ended"), "zombie"],
    );
    child.wait().unwrap();
}

#[test]
fn a_thread_of_the_kernel() {
    // In a container it would be another one; tracing does not work there either.
    assert_eq!(fs::read_to_string("/proc/2/comm").unwrap(), "kthreadd\n");
    assert_says(
        &attach_refused(2),
        &["process 2 (kthreadd) is a thread of the kernel"],
    );
}

/// The tracer has looked at the process, and waits for a reader of its output, when the process ends.
#[test]
fn a_process_that_ends_while_it_is_attached_to() {
    let directory = scratch();
    let fifo = directory.path().join("stats.json");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let target = Idle::plain();
    let pid = target.pid();
    let tracer = expert_trace()
        .args(["attach", "--pid", &pid.to_string(), "-o"])
        .arg(&fifo)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let waits = format!("/proc/{}/wchan", tracer.id());
    while fs::read_to_string(&waits).unwrap() != "wait_for_partner" {
        std::thread::yield_now();
    }
    drop(target);
    let reader = fs::File::open(&fifo).unwrap();
    let output = tracer.wait_with_output().unwrap();
    drop(reader);
    assert_eq!(output.status.code(), Some(TRACER_FAILED));
    let expected =
        format!("expert-trace: error: process {pid} ended while it was being attached to\n");
    assert!(said(&output).ends_with(&expected), "{}", said(&output));
}

#[test]
fn a_process_of_another_user() {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=daemon", "--regid=daemon", "--clear-groups"]);
    command.arg(idle());
    let target = Idle::start(command);
    let pid = target.pid().to_string();
    let attach = ["attach", "--pid", &pid];
    let said = refused(with_capabilities(",+sys_admin").args(attach));
    let expected = format!("process {pid} (program, of user daemon) may not be looked at");
    assert_says(&said, &[&expected, "CAP_SYS_PTRACE is missing", "sudo"]);
    // With it, the process is looked at.
    let said = refused(with_capabilities(",+sys_admin,+sys_ptrace").args(attach));
    assert_says(&said, &["is not llama.cpp"]);
}

/// Mounted with hidepid, /proc shows nothing of others' processes.
#[test]
fn a_hidden_process_of_another_user() {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=daemon", "--regid=daemon", "--clear-groups"]);
    command.arg(idle());
    let target = Idle::start(command);
    let pid = target.pid().to_string();
    let script = "mount -t proc -o hidepid=invisible,gid=65534 none /proc && \
                  exec setpriv --bounding-set=-all,+sys_admin --inh-caps=-all \"$@\"";
    let mut tracer = under("unshare", &["--mount", "sh", "-c", script, "sh"]);
    let said = refused(tracer.args(["attach", "--pid", &pid]));
    let expected = format!("process {pid} may not be looked at");
    assert_says(&said, &[&expected, "CAP_SYS_PTRACE is missing"]);
}

#[test]
fn a_process_that_is_not_llama_cpp() {
    let target = Idle::plain();
    let said = attach_refused(target.pid());
    let expected = format!(
        "process {} ({}) is not llama.cpp",
        target.pid(),
        idle().display()
    );
    assert_says(
        &said,
        &[&expected, "give the PID of the program that computes"],
    );
    assert!(!said.contains("not searched"), "{said}");
}

#[test]
fn a_stripped_static_executable() {
    let (_directory, program) = compile_idle(&["-DHOOKED", "-DMARKED", "-static", "-s"]);
    let target = Idle::start(Command::new(&program));
    let said = attach_refused(target.pid());
    let without = format!(
        "{} of process {} contains llama.cpp without symbols",
        program.display(),
        target.pid()
    );
    assert_says(&said, &[&without, "use an unstripped build"]);

    // The stand-in has the tensor's name in a string, as llama.cpp does.
    let (_directory, program) = compile("standin.c", &["-static", "-s"]);
    let mut command = Command::new(&program);
    command.args(["new", "4", "3", "4", "128", "none"]);
    let output = tracer::run::<&str>(&[], &command).unwrap().output();
    let without = format!("{} contains llama.cpp without symbols", program.display());
    assert_says(&self::said(&output.unwrap()), &[&without]);
}

#[test]
fn llama_cpp_without_its_backend() {
    let (_directory, program) = compile_idle(&["-DCONTEXT", "-DMARKED"]);
    let target = Idle::start(Command::new(&program));
    let output = tracer::command()
        .unwrap()
        .args([
            "attach",
            "--pid",
            &target.pid().to_string(),
            "--duration",
            "1ms",
        ])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_says(
        &said,
        &["but no CPU backend yet", "as soon as it loads one"],
    );
}

/// A program for RISC-V, as far as its header goes.
pub fn foreign_program() -> (TempDir, PathBuf) {
    let directory = scratch();
    let path = directory.path().join("foreign");
    let mut header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xf3\0\x01\0\0\0".to_vec();
    header.resize(64, 0);
    fs::write(&path, header).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    (directory, path)
}

#[test]
fn a_program_for_another_machine() {
    let (_directory, foreign) = foreign_program();
    let output = expert_trace().args(["run", "--"]).arg(&foreign).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(126));
    let foreign_to = format!("but this machine is {}", std::env::consts::ARCH);
    let path = foreign.display().to_string();
    assert_says(&said(&output), &[&path, "Riscv64", &foreign_to]);

    // An emulator is a program of ours that has mapped one of theirs.
    let mut emulator = Command::new(idle());
    emulator.arg(&foreign);
    let target = Idle::start(emulator);
    let said = attach_refused(target.pid());
    assert_says(&said, &[&path, "built for RISC-V", &foreign_to]);
}

#[test]
fn a_command_that_is_not_there() {
    let output = expert_trace()
        .args(["run", "--", "no-such-command"])
        .output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(127));
    assert_says(
        &said(&output),
        &["no-such-command: command not found", "PATH"],
    );
}

#[test]
fn outputs_that_cannot_be_written() {
    let directory = scratch();
    let path = directory.path().to_str().unwrap();
    let refused_at = |path: &str, words: &str| {
        // Root without the right to pass over permissions.
        let mut tracer = with_capabilities(",+sys_admin");
        let said = refused(tracer.args(["run", "-o", path, "--", "true"]));
        let failed = format!("Failed to open output file: {path}");
        assert_says(&said, &[&failed, words]);
    };
    refused_at(path, "is a directory; name a file in it");
    refused_at("/proc/stats.json", "no file can be created in /proc");
    refused_at(
        "/no/such/directory/stats.json",
        "there is no directory /no/such/directory; create it first",
    );
    let daemon = User::from_name("daemon").unwrap().unwrap();
    std::os::unix::fs::chown(path, Some(daemon.uid.as_raw()), None).unwrap();
    refused_at(
        &format!("{path}/stats.json"),
        "(permission denied); name another place",
    );
}

#[test]
fn missing_capabilities() {
    let run = ["run", "--", "true"];
    for capabilities in ["", ",+bpf,+perfmon,+sys_ptrace"] {
        let said = refused(with_capabilities(capabilities).args(run));
        assert_says(
            &said,
            &["CAP_SYS_ADMIN, which is missing", "run it with sudo"],
        );
    }
    // No more than that one is needed.
    let output = with_capabilities(",+sys_admin").args(run).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
}

/// Capabilities count, not the user.
#[test]
fn a_user_with_the_capability() {
    let directory = scratch();
    let all = fs::Permissions::from_mode(0o755);
    fs::set_permissions(directory.path(), all).unwrap();
    let program = directory.path().join("expert-trace");
    fs::copy(tracer::program().unwrap(), &program).unwrap();
    for (capabilities, status) in [("+sys_admin", 0), ("+bpf,+perfmon", TRACER_FAILED)] {
        let sets = ["inh-caps", "ambient-caps", "bounding-set"]
            .map(|set| format!("--{set}=-all,{capabilities}"));
        let output = Command::new("setpriv")
            .args(["--reuid=daemon", "--regid=daemon", "--clear-groups"])
            .args(sets)
            .arg(&program)
            .args(["run", "--", "true"])
            .output()
            .unwrap();
        let said = said(&output);
        assert_eq!(output.status.code(), Some(status), "{capabilities}: {said}");
    }
}

#[test]
fn a_user_namespace() {
    let said =
        refused(under("unshare", &["--user", "--map-root-user"]).args(["run", "--", "true"]));
    assert_says(
        &said,
        &["count only inside this user namespace", "on the host"],
    );
}

#[test]
fn a_kernel_without_uprobes() {
    let script = "mount -t tmpfs none /sys/bus/event_source/devices && exec \"$@\"";
    let mut command = under("unshare", &["--mount", "sh", "-c", script, "sh"]);
    let said = refused(command.args(["run", "--", "true"]));
    assert_says(
        &said,
        &[
            "CONFIG_UPROBE_EVENTS",
            "/sys/bus/event_source/devices/uprobe",
        ],
    );
}

#[test]
fn a_kernel_that_refuses_bpf() {
    const LOAD: &str = "5";
    let [enosys, eperm, einval] = [errno("ENOSYS"), errno("EPERM"), errno("EINVAL")];
    let run = ["run", "--", "true"];
    for (command, errno, words) in [
        ("all", enosys, "no bpf() system call (CONFIG_BPF_SYSCALL)"),
        ("all", eperm, "a seccomp filter"),
        (LOAD, eperm, "a seccomp filter"),
        // For a reason that nobody knows: the kernel's own words.
        (LOAD, einval, "the kernel refused the BPF programs: "),
    ] {
        let said = refused(under(nobpf(), &[command, errno]).args(run));
        assert_says(&said, &[words]);
    }

    let old = ["--uname-2.6", nobpf().to_str().unwrap(), LOAD, einval];
    let said = refused(under("setarch", &old).args(run));
    assert_says(&said, &["this is Linux 2.6.", "needs Linux 5.17 or newer"]);

    let script = "mount -t tmpfs none /sys/kernel/security && \
                  echo 'none integrity [confidentiality]' > /sys/kernel/security/lockdown && \
                  exec \"$@\"";
    let nobpf = nobpf().to_str().unwrap();
    let locked = ["--mount", "sh", "-c", script, "sh", nobpf, LOAD, eperm];
    let said = refused(under("unshare", &locked).args(run));
    assert_says(&said, &["lockdown=confidentiality"]);
}

/// Numbers of include/uapi/asm-generic/errno-base.h and errno.h.
pub fn errno(name: &str) -> &'static str {
    match name {
        "EPERM" => "1",
        "EINVAL" => "22",
        "ENOSYS" => "38",
        _ => unreachable!(),
    }
}

fn decode(model: &Path, commands: &str) -> String {
    let mut child = tracer::run(&["--top=0"], &driver(model, &[]))
        .unwrap()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(commands.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    said(&output)
}

#[test]
fn nothing_decoded() {
    let said = decode(dense(), "quit\n");
    assert_says(&said, &["No expert routing was seen: no token was decoded"]);
}

#[test]
fn a_dense_model() {
    let said = decode(dense(), "prompt 0 5 500\nquit\n");
    let expected = format!(
        "No expert routing was seen: tokens were decoded, but the model is dense: {} has no MoE layer.",
        dense().display()
    );
    assert_says(&said, &[&expected]);
}

/// The client of an RPC server computes on another device, as with a GPU.
#[test]
fn a_router_on_another_device() {
    let server = Server::start();
    let endpoint = server.endpoint();
    let model = &known_small().path;
    let options = ["-p", "Hello", "-n", "2", "-no-cnv", "--no-warmup"];
    let rpc = ["--rpc", &endpoint, "-ngl", "99"];
    let command = llama_program("llama-completion", model, &[&options[..], &rpc].concat());
    let output = tracer::run(&["--top=0"], &command)
        .unwrap()
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let expected = format!("{} has 4 MoE layers, and none", model.display());
    assert_says(
        &said(&output),
        &["MoE layers are not visible", &expected, "-ngl 0"],
    );
}
