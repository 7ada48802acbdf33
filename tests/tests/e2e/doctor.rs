//! `doctor` and `--dry-run`: what they say would happen is what happens, and nothing happens.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    process::{Command, Output, Stdio},
};

use expert_trace_tests::{
    oracle::Oracle,
    tracer::{self, Attached, Stats},
};
use serde_json::{Value, json};

use crate::{
    errors::{Idle, errno, foreign_program, nobpf, under, with_capabilities},
    layouts::{compile, compile_to},
    support::{dense, driver, known_small, llama, llama_program, prebuilt, scratch},
};

/// The answer of `expert-trace doctor --json`, as its schema has it.
struct Answer(Value);

impl Answer {
    /// That of a command line to which the arguments are added.
    #[track_caller]
    fn of(mut command: Command, arguments: &[&str]) -> Answer {
        tracer::without_sudo(&mut command);
        let output = command.args(["doctor", "--json"]).args(arguments);
        let output = output.stdin(Stdio::null()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        let answer: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {text}"));
        let expected = match answer["answer"].as_str().unwrap() {
            "yes" => 0,
            "no" => 1,
            _ => 2,
        };
        assert_eq!(output.status.code(), Some(expected), "{answer:#}");
        let schema: Value =
            serde_json::from_str(include_str!("../../../docs/doctor.schema.json")).unwrap();
        let validator = jsonschema::validator_for(&schema).unwrap();
        let problems: Vec<String> = validator
            .iter_errors(&answer)
            .map(|error| format!("{error} at {}", error.instance_path()))
            .collect();
        assert_eq!(problems, Vec::<String>::new(), "{answer:#}");
        // The schema is strict enough to notice.
        let mut changed = answer.clone();
        changed["checks"][0]["surprise"] = 1.into();
        assert!(!validator.is_valid(&changed));
        Answer(answer)
    }

    #[track_caller]
    fn to(arguments: &[&str]) -> Answer {
        Self::of(tracer::command().unwrap(), arguments)
    }

    /// That to a question about files alone: without rights no probe is tried, which takes time.
    #[track_caller]
    fn to_files(arguments: &[&str]) -> Answer {
        Self::of(with_capabilities(""), arguments)
    }

    #[track_caller]
    fn to_command(command: &Command) -> Answer {
        Self::asked_by(tracer::command().unwrap(), command)
    }

    /// As [`Answer::to_files`].
    #[track_caller]
    fn to_files_of(command: &Command) -> Answer {
        Self::asked_by(with_capabilities(""), command)
    }

    #[track_caller]
    fn asked_by(mut doctor: Command, command: &Command) -> Answer {
        for (name, value) in command.get_envs() {
            doctor.env(name, value.unwrap());
        }
        let words = [command.get_program()];
        let words = words.into_iter().chain(command.get_args());
        let words: Vec<&str> = words.map(|word| word.to_str().unwrap()).collect();
        Self::of(doctor, &[&["--"], &words[..]].concat())
    }

    fn answer(&self) -> &str {
        self.0["answer"].as_str().unwrap()
    }

    #[track_caller]
    fn assert_yes(&self) {
        assert_eq!(self.answer(), "yes", "{:#}", self.0);
    }

    #[track_caller]
    fn check(&self, name: &str) -> &Value {
        let mut checks = self.0["checks"].as_array().unwrap().iter();
        checks
            .find(|check| check["check"] == name)
            .unwrap_or_else(|| panic!("no check {name} in {:#}", self.0))
    }

    /// Fails unless a check has this answer, and its finding and fix these words.
    #[track_caller]
    fn assert_check(&self, name: &str, answer: &str, words: &[&str]) {
        let check = self.check(name);
        assert_eq!(check["answer"], answer, "{check:#}");
        let text = format!("{} {}", check["finding"], check["fix"]);
        for word in words {
            assert!(text.contains(word), "{word:?} is not in {text}");
        }
    }

    /// Hooks as the document of a capture has them, by file.
    fn hooks(&self) -> Vec<Value> {
        let mut hooks = self.0["target"]["hooks"].as_array().unwrap().clone();
        for hook in &mut hooks {
            let hook = hook.as_object_mut().unwrap();
            for key in ["on_return", "hit_per", "single_stepped"] {
                hook.remove(key).unwrap();
            }
        }
        sorted(hooks)
    }
}

fn sorted(mut hooks: Vec<Value>) -> Vec<Value> {
    hooks.sort_by_key(|hook| format!("{}{}{}", hook["file"], hook["hook"], hook["symbol"]));
    hooks
}

fn captured_hooks(stats: &Path) -> Vec<Value> {
    let stats = Stats::read(stats).unwrap();
    let mut hooks = stats.0["target"]["hooks"].as_array().unwrap().clone();
    for hook in &mut hooks {
        hook.as_object_mut().unwrap().remove("hits").unwrap();
    }
    sorted(hooks)
}

#[test]
fn this_machine_traces() {
    let answer = Answer::to(&[]);
    answer.assert_yes();
    assert_eq!(answer.0["target"], Value::Null);
    let costs = &answer.0["machine"]["hit_ns"];
    assert!(costs["entry"].as_u64().unwrap() > 0, "{costs}");
    assert!(costs["return"].as_u64().unwrap() > 0, "{costs}");
}

/// The plan for a command is what `run` sets, and that for a process what `attach` sets.
#[test]
fn the_plan_is_what_is_set() {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let options = ["-o", path.to_str().unwrap(), "--top=0"];
    let command = driver(&known_small().path, &["-t", "1"]);

    let of_command = Answer::to_command(&command);
    of_command.assert_yes();
    let mut traced = Oracle::spawn(&mut tracer::run(&options, &command).unwrap()).unwrap();
    traced.command("prompt 0 3 500").unwrap();
    assert!(traced.quit().unwrap().success());
    assert_eq!(of_command.hooks(), captured_hooks(&path));
    assert_eq!(of_command.0["target"]["models"][0]["n_expert"], 32);
    let expected = json!([{
        "model": 0, "layers": [0, 1, 2, 3], "answer": "yes", "routes": ["router"],
        "finding": "computed on the CPU", "fix": null, "remedies": [], "always_run": true,
    }]);
    assert_eq!(of_command.0["target"]["coverage"], expected);

    let mut command = command;
    let target = Oracle::spawn(&mut command).unwrap();
    let of_process = Answer::to(&["--pid", &target.pid().to_string()]);
    of_process.assert_yes();
    let attached = Attached::to(target.pid(), &options).unwrap();
    attached.interrupt().unwrap();
    assert_eq!(of_process.hooks(), captured_hooks(&path));
    assert_eq!(of_process.0["target"]["models"][0]["found"], "mapped");
    assert!(target.quit().unwrap().success());

    let library = llama().bin.join("libggml-cpu.so");
    let of_library = Answer::to(&["--binary", library.to_str().unwrap()]);
    of_library.assert_yes();
    // Without llama.cpp beside it, passes begin in its scheduler.
    let of_scheduler =
        |hook: &Value| ["pass_begin", "scheduler_end"].contains(&hook["hook"].as_str().unwrap());
    let same = |hook: &Value| of_command.hooks().contains(hook) || of_scheduler(hook);
    assert!(of_library.hooks().iter().all(same), "{:#}", of_library.0);
    assert!(of_library.hooks().iter().any(of_scheduler));
    let shows_ids = |hook: &Value| hook["hook"] == "expert_ids";
    assert!(of_library.hooks().iter().any(shows_ids));
}

/// Without a device, nothing is probed that only devices hit; an RPC server that is named is one.
#[test]
fn a_plan_has_no_probe_too_many() {
    let probes = |options: &[&str]| {
        let program = llama_program("llama-completion", &known_small().path, options);
        let answer = Answer::to_command(&program);
        let hooks = answer.hooks();
        let names: BTreeSet<String> = hooks.iter().map(|hook| hook["hook"].to_string()).collect();
        (answer.0["target"]["probes"].clone(), names)
    };
    let (of_cpu, names) = probes(&[]);
    let expected = json!({ "probes": 3, "places": 3, "perf_event_detach_ms": 370 });
    assert_eq!(of_cpu, expected, "{names:?}");
    let (with_a_server, further) = probes(&["--rpc", "localhost:1"]);
    let expected = json!({ "probes": 7, "places": 6, "perf_event_detach_ms": 730 });
    assert_eq!(with_a_server, expected, "{further:?}");
    assert!(names.is_subset(&further));
}

#[test]
fn who_lacks_rights_is_told_which() {
    let as_root = "sudo expert-trace doctor";
    for capabilities in ["", ",+bpf,+perfmon"] {
        let answer = Answer::of(with_capabilities(capabilities), &[]);
        assert_eq!(answer.answer(), "no");
        answer.assert_check("privileges", "no", &["CAP_SYS_ADMIN", as_root]);
        answer.assert_check("probe", "could_not_tell", &[as_root]);
        assert_eq!(answer.0["machine"]["hit_ns"], Value::Null);
    }
    Answer::of(with_capabilities(",+sys_admin"), &[]).assert_yes();

    // An ordinary user learns of the target what can be read.
    let directory = scratch();
    let program = directory.path().join("expert-trace");
    fs::copy(tracer::program().unwrap(), &program).unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=daemon", "--regid=daemon", "--clear-groups"]);
    command.arg(program);
    let answer = Answer::of(command, &["--", "/bin/sh", "-c", "a secret"]);
    answer.assert_check("privileges", "no", &["sudo expert-trace doctor -- COMMAND"]);
    answer.assert_check("program", "yes", &["/bin/sh"]);
    assert!(!answer.0.to_string().contains("a secret"), "{:#}", answer.0);
}

#[test]
fn what_the_kernel_refuses_is_told() {
    const LOAD: &str = "5";
    let refusing = |errno| under(nobpf(), &[LOAD, errno]);
    let answer = Answer::of(refusing(errno("EPERM")), &[]);
    answer.assert_check("bpf", "no", &["a seccomp filter", "on the host"]);
    answer.assert_check("gate", "could_not_tell", &["--pid PID"]);
    let script = "mount -t tmpfs none /sys/bus/event_source/devices && exec \"$@\"";
    let without = under("unshare", &["--mount", "sh", "-c", script, "sh"]);
    let answer = Answer::of(without, &[]);
    answer.assert_check("uprobes", "no", &["CONFIG_UPROBE_EVENTS"]);
    assert_eq!(answer.answer(), "no");
}

#[test]
fn targets_that_cannot_be_traced() {
    let none = i32::MAX.to_string();
    let answer = Answer::to(&["--pid", &none]);
    answer.assert_check("program", "no", &[&format!("no process {none}")]);
    let idle = Idle::plain();
    let answer = Answer::to(&["--pid", &idle.pid().to_string()]);
    answer.assert_check("functions", "no", &["is not llama.cpp"]);
    let answer = Answer::to_files(&["--", "no-such-command"]);
    answer.assert_check("program", "no", &["command not found"]);
    let (_directory, foreign) = foreign_program();
    let answer = Answer::to_files(&["--binary", foreign.to_str().unwrap()]);
    answer.assert_check("program", "no", &["Riscv64"]);

    for linked in ["-static", "-static-pie"] {
        let (_directory, program) = compile("standin.c", &[linked, "-s"]);
        let answer = Answer::to_files(&["--binary", program.to_str().unwrap()]);
        answer.assert_check("functions", "no", &["contains llama.cpp without symbols"]);
        assert_eq!(answer.0["target"]["files"][0]["static"], true, "{linked}");
        assert_eq!(answer.0["target"]["files"][0]["stripped"], true);
    }

    // A program that is not llama.cpp, and may load it: nothing is expected of its model's layers.
    let mut launcher = Command::new("/bin/sh");
    launcher.arg("-m").arg(&known_small().path);
    let answer = Answer::to_files_of(&launcher);
    answer.assert_check("functions", "could_not_tell", &["--pid PID"]);
    assert_eq!(answer.0["target"]["coverage"], json!([]));

    let answer = Answer::to_files_of(&driver(dense(), &[]));
    answer.assert_check("model", "no", &["the model is dense"]);
    let answer = Answer::to_files_of(&driver(Path::new("/no/such.gguf"), &[]));
    answer.assert_check("model", "no", &["/no/such.gguf", "-m FILE"]);
    let mut unnamed = Command::new(llama().program("llama-completion"));
    let answer = Answer::to_files_of(unnamed.args(["-p", "Hello"]));
    answer.assert_check("model", "could_not_tell", &["-m FILE"]);
}

/// Without DWARF, words in the code tell a layout that is read from an older one.
#[test]
fn what_is_too_old_is_told() {
    let directory = scratch();
    let [source, program] = ["words.c", "program"].map(|name| directory.path().join(name));
    let since = "cplan->work_size == 0 || cplan->work_data != NULL";
    for (words, answer, told) in [
        (since, "yes", "b3209 or newer"),
        (
            "perf_total_per_op_us[%16s] = %7.3f ms",
            "no",
            "older than b3209",
        ),
        ("nothing", "could_not_tell", "trace it"),
    ] {
        fs::write(&source, format!("const char words[] = {words:?};")).unwrap();
        let sources = ["standin.c", source.to_str().unwrap()];
        compile_to(&program, &sources, &[]);
        let of_program = Answer::to_files(&["--binary", program.to_str().unwrap()]);
        of_program.assert_check("layout", answer, &[told]);
    }
}

/// As ld.so does: search paths of who had a library loaded, names that libraries give themselves, and
/// preloads that are not there.
#[test]
fn libraries_are_found_as_they_are_loaded() {
    let directory = scratch();
    let at = |name: &str| directory.path().join(name).display().to_string();
    fs::create_dir(at("lib")).unwrap();
    let build = |name: &str, source: &str, flags: &[&str]| {
        fs::write(at("source.c"), source).unwrap();
        compile_to(at(name).as_ref(), &[&at("source.c")], flags);
        at(name)
    };
    let own = build(
        "own.so",
        "int own() { return 0; }",
        &["-shared", "-Wl,-soname,libown.so"],
    );
    // libfar.so is found by the search path of who has libnear.so loaded.
    let here = format!("-L{}", at("lib"));
    build("lib/libfar.so", "int far() { return 0; }", &["-shared"]);
    let near = "int far(); int near() { return far(); }";
    build("lib/libnear.so", near, &["-shared", &here, "-lfar"]);
    let middle = "int near(); int middle() { return near(); }";
    let rpath = [
        "-shared",
        &here,
        "-lnear",
        "-Wl,--disable-new-dtags,-rpath,$ORIGIN/lib",
    ];
    let middle = build("libmiddle.so", middle, &rpath);
    let main = "int middle(), own(); int main() { return middle() + own(); }";
    let program = build(
        "program",
        main,
        &[&middle, &own, "-Wl,--allow-shlib-undefined"],
    );

    let mut command = Command::new(&program);
    let answer = Answer::to_files_of(&command);
    answer.assert_check("program", "no", &["needs libown.so, which"]);
    command.env("LD_PRELOAD", format!("{own}:no-such-library.so"));
    assert!(command.status().unwrap().success());
    let answer = Answer::to_files_of(&command);
    answer.assert_check("program", "yes", &[]);
}

/// A backend that lies beside the program: ggml loads it by itself, or not.
#[test]
fn what_may_be_loaded_is_told() {
    let directory = scratch();
    // With its links, which a copy of each file would make further libraries.
    let mut copy = Command::new("cp");
    copy.arg("-a").arg(llama().bin.join("."));
    assert!(copy.arg(directory.path()).status().unwrap().success());
    let cuda = directory.path().join("libggml-cuda.so");
    symlink(prebuilt().cuda_libraries.join("libggml-cuda.so"), cuda).unwrap();
    let program = directory.path().join("llama-completion");
    let mut command = Command::new(&program);
    command
        .arg("-m")
        .arg(&known_small().path)
        .args(["-ngl", "99", "-cmoe"]);
    let answer = Answer::to_files_of(&command);
    let target = &answer.0["target"];
    let mut files = target["files"].as_array().unwrap().iter();
    let backend = files
        .find(|file| file["loaded"] == "may_be_loaded")
        .unwrap();
    assert_eq!(backend["devices"], json!(["cuda"]), "{target:#}");
    let hooks = target["possible_hooks"].as_array().unwrap();
    let of_backend = |hook: &&Value| hook["file"] == backend["path"];
    assert!(hooks.iter().filter(of_backend).count() >= 3, "{hooks:#?}");
    // One that a variable names.
    let mut named = Command::new(llama().program("llama-completion"));
    named.env(
        "GGML_BACKEND_PATH",
        prebuilt().cuda_libraries.join("libggml-cuda.so"),
    );
    let answer_to_named = Answer::to_files_of(&named);
    let files = answer_to_named.0["target"]["files"].as_array().unwrap();
    let is_cuda = |file: &&Value| file["devices"] == json!(["cuda"]);
    assert_eq!(
        files.iter().find(is_cuda).unwrap()["loaded"],
        "may_be_loaded"
    );
    // Found by CUDA's own functions, which are called by pointer.
    let routes = json!(["split_input", "fetch"]);
    assert_eq!(target["coverage"][0]["routes"], routes, "{target:#}");
    assert_eq!(target["coverage"][0]["answer"], "yes", "{target:#}");
}

/// A prebuilt server with a Vulkan backend: what its options leave on the device.
#[test]
fn what_stays_on_a_device_is_told() {
    let expect = |options: &[&str]| {
        let server = &prebuilt().vulkan_server;
        let mut command = Command::new(server.join("llama-server"));
        command.env("LD_LIBRARY_PATH", server);
        command.arg("-m").arg(&known_small().path).args(options);
        let answer = Answer::to_files_of(&command);
        let coverage = answer.0["target"]["coverage"].as_array().unwrap().clone();
        let told = coverage.iter().map(|of| {
            let fix = of["fix"].as_str().unwrap_or_default();
            let remedies = of["remedies"].as_array().unwrap();
            let in_fix = |remedy: &Value| fix.contains(remedy["text"].as_str().unwrap());
            assert!(remedies.iter().all(in_fix), "{of:#}");
            (of["layers"].clone(), of["answer"].clone(), fix.to_owned())
        });
        let told: Vec<_> = told.collect();
        let worst = answer.check("coverage")["answer"].clone();
        (worst, told)
    };
    let all = json!([0, 1, 2, 3]);
    let (worst, told) = expect(&["-ngl", "99"]);
    assert_eq!((worst, &told[0].0), (json!("no"), &all));
    assert!(told[0].2.contains("--router-on-cpu"), "{told:?}");
    assert!(told[0].2.contains("--cpu-moe"), "{told:?}");

    let split = expect(&["-ngl", "99", "-ncmoe", "2", "--no-op-offload"]);
    let [on_host, on_device] = &split.1[..] else {
        panic!("{split:?}");
    };
    assert_eq!((&on_host.0, &on_host.1), (&json!([0, 1]), &json!("yes")));
    assert_eq!((&on_device.0, &on_device.1), (&json!([2, 3]), &json!("no")));
    assert!(on_device.2.contains("--n-cpu-moe 4"), "{split:?}");

    // Its backend's functions have lost their names: of longer prompts nothing is certain.
    for options in [&["-ngl", "99", "--cpu-moe"][..], &["-ngl", "0"]] {
        let (worst, told) = expect(options);
        assert_eq!(worst, "could_not_tell", "{options:?}");
        assert!(told[0].2.contains("--no-op-offload"), "{told:?}");
        assert_eq!(expect(&[options, &["--no-op-offload"]].concat()).0, "yes");
    }
    assert_eq!(expect(&[]).0, "could_not_tell");
    assert_eq!(expect(&["-dev", "none"]).0, "yes");
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_dry_run_starts_nothing() {
    let directory = scratch();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let script = format!("echo started > {}", path("started"));
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]);
    let options = [
        "--dry-run",
        "-o",
        &path("stats.json"),
        &format!("--log={}", path("log")),
    ];
    let output = tracer::run(&options, &shell).unwrap().output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stdout(&output));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);

    // What the options of `run` add is part of the plan.
    let server = &prebuilt().vulkan_server;
    let mut command = Command::new(server.join("llama-server"));
    command
        .arg("-m")
        .arg(&known_small().path)
        .args(["-ngl", "99"]);
    let options = ["--dry-run", "--router-on-cpu"];
    let mut dry = tracer::run(&options, &command).unwrap();
    let output = dry.env("LD_LIBRARY_PATH", server).output().unwrap();
    let plan = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{plan}");
    for words in [
        "2 of them on return",
        "0-3, by logits",
        "--no-op-offload",
        "Answer: yes",
    ] {
        assert!(plan.contains(words), "{words:?} is not in {plan}");
    }

    // Variables that make `run` trace nothing.
    let command = driver(&known_small().path, &[]);
    let mut dry = tracer::run(&["--dry-run"], &command).unwrap();
    let output = dry.env("LLAMA_EXPERT_TRACE_STATS", "0").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("would run untraced"));

    for place in ["-o/no/such/directory/x", "--log=/no/such/directory/x"] {
        let dry = tracer::run(&["--dry-run", place], &command)
            .unwrap()
            .output();
        let output = dry.unwrap();
        assert_eq!(output.status.code(), Some(1));
        let said = stdout(&output);
        assert!(
            said.contains("there is no directory /no/such/directory"),
            "{said}"
        );
    }

    let target = Idle::plain();
    let mut attach = tracer::command().unwrap();
    attach.args(["attach", "--dry-run", "--pid", &target.pid().to_string()]);
    let output = attach.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("is not llama.cpp"));
}
