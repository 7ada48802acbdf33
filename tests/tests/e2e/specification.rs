//! The tests of the original specification, by their numbers, and its own commands: what
//! `docs/specification.md` refers to.
//!
//! The specification sets variables and runs llama-cli. Here `expert-trace run --` stands before
//! the command, and the models have the shapes of those it names.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::{
        fs::PermissionsExt as _,
        process::{CommandExt as _, ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use expert_trace_tests::tracer::{self, Counts, Stats, count, read_log};
use serde_json::Value;

use crate::support::{
    Known, assert_tokens_of, known_medium, known_small, known_wide, llama, llama_program, scratch,
};

const STATS: &str = "LLAMA_EXPERT_TRACE_STATS";
const LOGGING: &str = "LLAMA_EXPERT_TRACE_LOGGING";
const OUTPUT: &str = "LLAMA_EXPERT_TRACE_OUTPUT";

const TITLE: &str = "=== Expert Usage Statistics ===";
const TAG: &str = "[EXPERT-TRACE] ";

type Variables<'a> = &'a [(&'a str, &'a str)];

/// `expert-trace run OPTIONS -- COMMAND` with these of the specification's variables and no others.
fn run(variables: Variables, options: &[&str], command: &Command) -> Command {
    let mut tracer = tracer::run(options, command).unwrap();
    for name in [STATS, LOGGING, OUTPUT] {
        tracer.env_remove(name);
    }
    tracer.envs(variables.iter().copied()).stdin(Stdio::null());
    tracer
}

/// The specification's `./llama-cli -m model.gguf -p PROMPT`, ending after a few tokens.
fn llama_cli(model: &Path, prompt: &str) -> Command {
    llama_program("llama-cli", model, &["-p", prompt, "-n", "4", "-st"])
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = said(&output);
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

/// What a run announced: whether it takes statistics, and whether it logs.
fn announced(said: &str) -> Option<(bool, bool)> {
    let mut lines = said
        .lines()
        .filter(|line| line.starts_with("Expert tracing enabled"));
    let line = lines.next()?;
    assert_eq!(lines.next(), None, "{said}");
    let modes = [(true, false), (false, true), (true, true)];
    let of_line = modes.into_iter().find(|(stats, logging)| {
        let [stats, logging] = [*stats, *logging].map(u8::from);
        line == format!("Expert tracing enabled (stats={stats}, logging={logging})")
    });
    assert!(of_line.is_some(), "{line:?}");
    of_line
}

/// Checks that no line of a traced run is there.
fn assert_silent(said: &str) {
    for ours in ["Expert tracing", TITLE, TAG, "Complete:", "exported"] {
        assert!(!said.contains(ours), "{ours:?} in {said}");
    }
}

/// Test 1: Configuration Loading.
#[test]
fn spec_1_configuration() {
    // Its four cases, on llama-cli. The last one differs: without variables, `run` takes statistics.
    let cases: [(Variables, (bool, bool)); 4] = [
        (&[(STATS, "1")], (true, false)),
        (&[(LOGGING, "1")], (false, true)),
        (&[(STATS, "1"), (LOGGING, "1")], (true, true)),
        (&[], (true, false)),
    ];
    for (variables, expected) in cases {
        let said = succeed(&mut run(
            variables,
            &[],
            &llama_cli(&known_small().path, "test"),
        ));
        assert_eq!(announced(&said), Some(expected), "{variables:?}: {said}");
        assert_eq!(said.contains(TITLE), expected.0, "{variables:?}: {said}");
        assert_eq!(said.contains(TAG), expected.1, "{variables:?}: {said}");
    }

    // Other combinations, on a program that ends at once. Only `1` switches something on.
    let combined = [None, Some("1"), Some("0"), Some("")];
    let alone = ["2", "01", " 1", "true"].map(|value| (Some(value), [None].as_slice()));
    let combined = combined.map(|stats| (stats, combined.as_slice()));
    for (stats, values) in combined.into_iter().chain(alone) {
        for logging in values.iter().copied() {
            let variables: Vec<(&str, &str)> = [(STATS, stats), (LOGGING, logging)]
                .into_iter()
                .filter_map(|(name, value)| Some((name, value?)))
                .collect();
            let said = succeed(&mut run(&variables, &[], &Command::new("true")));
            let expected = match (stats, logging) {
                (None, None) => Some((true, false)),
                (Some("1"), Some("1")) => Some((true, true)),
                (Some("1"), _) => Some((true, false)),
                (_, Some("1")) => Some((false, true)),
                _ => None,
            };
            assert_eq!(announced(&said), expected, "{variables:?}: {said}");
            if expected.is_none() {
                assert_eq!(said, "", "{variables:?}");
            }
        }
    }
}

#[test]
fn spec_1_options_win_over_variables() {
    let directory = scratch();
    let [by_option, by_variable, log] =
        ["option.json", "variable.json", "log"].map(|name| directory.path().join(name));
    let output_option = format!("--output={}", by_option.display());
    let log_option = format!("--log={}", log.display());
    let output_variable = by_variable.to_str().unwrap();
    let cases: [(Variables, &[&str], (bool, bool)); 5] = [
        (&[(STATS, "0")], &[&output_option], (true, false)),
        (&[(STATS, "0")], &[&log_option], (false, true)),
        (&[(LOGGING, "1")], &[&output_option], (true, true)),
        (&[(STATS, "1")], &[&log_option], (true, true)),
        (
            &[(STATS, "1"), (OUTPUT, output_variable)],
            &[&output_option],
            (true, false),
        ),
    ];
    for (variables, options, expected) in cases {
        let _ = fs::remove_file(&by_option);
        let said = succeed(&mut run(variables, options, &Command::new("true")));
        assert_eq!(
            announced(&said),
            Some(expected),
            "{variables:?} {options:?}: {said}"
        );
        assert_eq!(
            by_option.exists(),
            options.contains(&output_option.as_str()),
            "{variables:?} {options:?}"
        );
    }
    assert!(!by_variable.exists());
}

/// One layer of the printed statistics.
#[derive(Debug, PartialEq)]
struct Printed {
    layer: u32,
    tokens: u64,
    /// Expert, activations, percentage as printed.
    experts: Vec<(u32, u64, String)>,
}

/// Reads the printed statistics; panics at a line that is not as the specification prints it.
fn printed(said: &str) -> Vec<Printed> {
    let (_, after) = said.split_once(&format!("\n{TITLE}\n")).unwrap();
    let mut layers: Vec<Printed> = Vec::new();
    for line in after.lines() {
        if let Some(rest) = line.strip_prefix("Layer ") {
            let (layer, rest) = rest.split_once(" (").unwrap();
            layers.push(Printed {
                layer: layer.parse().unwrap(),
                tokens: rest.strip_suffix(" tokens):").unwrap().parse().unwrap(),
                experts: Vec::new(),
            });
        } else if let Some(rest) = line.strip_prefix("  Expert ") {
            let (expert, rest) = rest.split_once(": ").unwrap();
            let (activations, rest) = rest.split_once(" activations (").unwrap();
            let percentage = rest.strip_suffix("%)").unwrap();
            assert!(expert.len() >= 3 && activations.len() >= 5, "{line:?}");
            layers.last_mut().unwrap().experts.push((
                expert.trim_start().parse().unwrap(),
                activations.trim_start().parse().unwrap(),
                percentage.to_owned(),
            ));
        } else {
            break;
        }
    }
    layers
}

/// Test 2: Statistics Collection.
#[test]
fn spec_2_statistics() {
    let known = known_wide();
    let directory = scratch();
    let log = directory.path().join("log");
    let options = [format!("--log={}", log.display())];
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let command = llama_cli(&known.path, "Hello world");
    let said = succeed(&mut run(&[(STATS, "1")], &options, &command));

    let layers = printed(&said);
    let ids: Vec<u32> = layers.iter().map(|layer| layer.layer).collect();
    assert_eq!(ids, [0, 1, 2], "{said}");
    // What was printed is what was logged, and what was logged is what the model does.
    let rows = read_log(&log).unwrap();
    assert_tokens_of(known, &rows);
    let counts: Counts = layers
        .iter()
        .map(|layer| {
            let experts = layer.experts.iter().map(|(id, count, _)| (*id, *count));
            (layer.layer, experts.collect())
        })
        .collect();
    assert_eq!(
        counts,
        count(rows.iter().map(|(layer, ids)| (*layer, ids.as_slice())))
    );
    for layer in &layers {
        let of_layer = rows.iter().filter(|(of, _)| *of == layer.layer).count();
        assert_eq!(layer.tokens, of_layer as u64);
        assert!(layer.tokens > 0, "{said}");
        assert!(layer.experts.is_sorted_by(|(_, a, _), (_, b, _)| a >= b));
        for (_, activations, percentage) in &layer.experts {
            let exact = 100.0 * *activations as f64 / layer.tokens as f64;
            assert_eq!(*percentage, format!("{exact:.1}"));
        }
    }
}

/// Test 3: JSON Export.
#[test]
fn spec_3_json_export() {
    let directory = scratch();
    let variables = [(STATS, "1"), (OUTPUT, "expert_stats.json")];
    let command = llama_cli(&known_small().path, "test");
    let said = succeed(run(&variables, &[], &command).current_dir(&directory));
    assert!(
        said.contains("Statistics exported to: expert_stats.json"),
        "{said}"
    );

    let python = Command::new("sh")
        .args(["-c", "cat expert_stats.json | python3 -m json.tool"])
        .current_dir(&directory)
        .output()
        .unwrap();
    assert!(python.status.success(), "{}", self::said(&python));

    // What Python read is what we read, and what was printed.
    let stats = Stats::read(&directory.path().join("expert_stats.json")).unwrap();
    stats.assert_complete();
    let by_python: Value = serde_json::from_slice(&python.stdout).unwrap();
    assert_eq!(by_python, stats.0);
    let keys = |value: &Value| -> Vec<String> {
        let mut keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    };
    let layers = stats.0["layers"].as_array().unwrap();
    let printed = printed(&said);
    assert_eq!(layers.len(), 4);
    assert_eq!(layers.len(), printed.len());
    for (layer, printed) in layers.iter().zip(printed) {
        assert_eq!(keys(layer), ["experts", "layer_id", "total_tokens"]);
        assert_eq!(layer["layer_id"], printed.layer);
        assert_eq!(layer["total_tokens"], printed.tokens);
        let experts = layer["experts"].as_array().unwrap();
        assert_eq!(experts.len(), printed.experts.len());
        for (expert, (id, activations, percentage)) in experts.iter().zip(printed.experts) {
            assert_eq!(keys(expert), ["activations", "expert_id", "percentage"]);
            assert_eq!(expert["expert_id"], id);
            assert_eq!(expert["activations"], activations);
            let exact = expert["percentage"].as_f64().unwrap();
            assert_eq!(format!("{exact:.1}"), percentage);
        }
    }
}

#[test]
fn spec_3_an_output_needs_statistics() {
    let directory = scratch();
    let path = directory.path().join("expert_stats.json");
    let output = (OUTPUT, path.to_str().unwrap());
    let true_ = Command::new("true");
    let said = succeed(&mut run(&[(LOGGING, "1"), output], &[], &true_));
    assert_eq!(announced(&said), Some((false, true)));
    assert!(said.contains(OUTPUT), "no warning: {said}");
    assert!(!said.contains("exported"), "{said}");
    assert!(!path.exists());

    for variables in [&[output][..], &[(STATS, "0"), output]] {
        assert_silent(&succeed(&mut run(variables, &[], &true_)));
        assert!(!path.exists());
    }

    // An empty name is no file, as in the specification.
    let said = succeed(&mut run(&[(STATS, "1"), (OUTPUT, "")], &[], &true_));
    assert_eq!(announced(&said), Some((true, false)));
    assert!(!said.contains("exported"), "{said}");

    // A bad name is said before the program runs.
    let variables = [(STATS, "1"), (OUTPUT, "/no/such/directory/stats.json")];
    let witness = directory.path().join("ran");
    let output = run(&variables, &[], Command::new("touch").arg(&witness))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(
        self::said(&output).contains("Failed to open output file: /no/such/directory/stats.json"),
        "{}",
        self::said(&output)
    );
    assert!(!witness.exists());
}

/// Test 4: MoE Model Compatibility. The models it names do not fit a test; these have their numbers
/// of experts.
#[test]
fn spec_4_models() {
    let shapes: [(&Known, u32, u32); 3] = [
        // Qwen3-Next-80B and Qwen3-Coder-Next-80B.
        (known_wide(), 512, 10),
        // GPT-OSS-120B.
        (known_medium(), 128, 4),
        // GPT-OSS-20B.
        (known_small(), 32, 4),
    ];
    for (known, n_expert, k) in shapes {
        let directory = scratch();
        let [path, log] = ["expert_stats.json", "log"].map(|name| directory.path().join(name));
        let variables = [(STATS, "1"), (OUTPUT, path.to_str().unwrap())];
        let option = format!("--log={}", log.display());
        let command = llama_cli(&known.path, "test");
        succeed(&mut run(&variables, &[&option], &command));

        let stats = Stats::read(&path).unwrap();
        stats.assert_complete();
        let rows = read_log(&log).unwrap();
        assert_tokens_of(known, &rows);
        assert_eq!(
            stats.counts(),
            count(rows.iter().map(|(layer, ids)| (*layer, ids.as_slice())))
        );
        assert_eq!(stats.0["models"][0]["n_expert"], n_expert);
        let layers = stats.0["contexts"][0]["layers"].as_array().unwrap();
        assert_eq!(layers.len(), known.spec.layers as usize);
        for layer in layers {
            assert_eq!(layer["n_expert"], n_expert);
            assert_eq!(layer["k"], k);
        }
        for (layer, tokens) in stats.tokens() {
            let activations: u64 = stats.counts()[&layer].values().sum();
            assert_eq!(activations, u64::from(k) * tokens);
        }
    }
}

/// Bytes of a process's executable code that are not those of the file they come from: a uprobe
/// puts a breakpoint there.
fn patched_bytes(pid: u32) -> usize {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut patched = 0;
    let mut compared = 0;
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [range, "r-xp", offset, _, _, path] = fields[..] else {
            continue;
        };
        if !path.starts_with('/') {
            continue;
        }
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let (start, end) = (hex(start), hex(end));
        let file = fs::read(path).unwrap();
        let file = &file[hex(offset) as usize..];
        let mut code = vec![0; file.len().min((end - start) as usize)];
        memory.seek(SeekFrom::Start(start)).unwrap();
        memory.read_exact(&mut code).unwrap();
        patched += code.iter().zip(file).filter(|(a, b)| a != b).count();
        compared += code.len();
    }
    assert!(compared > 1 << 20, "{maps}");
    patched
}

/// Waits until a condition holds.
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        sleep(Duration::from_millis(10));
    }
}

fn executable(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// Process ids of what a process has started.
fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let ids = text.split_whitespace().map(|id| id.parse().unwrap());
    ids.collect()
}

/// Waits until a process sleeps on its input: it has loaded its model, and maps all its libraries.
fn wait_for_prompt(pid: u32) {
    wait_until("the CPU backend is mapped and input is read", || {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        let system_call = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
        // read(0, …) is system call 0 on x86_64 and 63 on aarch64.
        let reads = ["0 0x0 ", "63 0x0 "];
        maps.contains("libggml-cpu") && reads.iter().any(|start| system_call.starts_with(start))
    });
}

/// Test 5: Zero Overhead When Disabled. Nothing of ours is left to cost anything: the program has
/// taken our place.
#[test]
fn spec_5_zero_when_off() {
    let program = llama().program("llama-cli").canonicalize().unwrap();
    let chat = |variables: Variables| {
        let command = llama_program("llama-cli", &known_small().path, &["-n", "4"]);
        let mut child = run(variables, &[], &command)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_until("the program runs", || {
            let pids = [vec![child.id()], children(child.id())].concat();
            pids.into_iter()
                .any(|pid| executable(pid).as_ref() == Some(&program))
        });
        let runs_program = |pid: &u32| executable(*pid).as_ref() == Some(&program);
        let pid = match children(child.id()).into_iter().find(runs_program) {
            Some(pid) => pid,
            None => child.id(),
        };
        wait_for_prompt(pid);
        let patched = patched_bytes(pid);
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains("TracerPid:\t0\n"), "{status}");
        let in_place = pid == child.id();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(b"Hello\n/exit\n").unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        (in_place, patched, said(&output))
    };

    // Traced, it is our child, and has breakpoints: what we look for can be found.
    let (in_place, patched, said) = chat(&[(STATS, "1")]);
    assert!(!in_place && patched > 0, "{patched} bytes");
    assert_eq!(announced(&said), Some((true, false)));

    let (in_place, patched, said) = chat(&[(STATS, "0")]);
    assert!(in_place);
    assert_eq!(patched, 0);
    assert_silent(&said);
}

/// Not a byte is printed by us, the exit is the program's own, and root is not needed.
#[test]
fn spec_5_off_is_as_without_us() {
    for variables in [&[(STATS, "0")][..], &[(LOGGING, "")], &[(STATS, "yes")]] {
        let script = shell("echo out; echo error >&2; exit 7");
        let output = run(variables, &[], &script).output().unwrap();
        assert_eq!(output.status.code(), Some(7));
        assert_eq!(output.stdout, b"out\n");
        assert_eq!(said(&output), "error\n");
    }
    // Died of its signal, not with status 128 + signal, and not deaf to a closed pipe as we are.
    let output = run(&[(STATS, "0")], &[], &shell("kill -PIPE $$"))
        .output()
        .unwrap();
    assert_eq!(output.status.signal(), Some(13));
    let output = run(&[(STATS, "0")], &[], &Command::new("no-such-command"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(127));

    // As a user without rights, who has to reach the program.
    const NOBODY: u32 = 65534;
    let directory = scratch();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
    let copy = directory.path().join("expert-trace");
    fs::copy(tracer::program().unwrap(), &copy).unwrap();
    let output = Command::new(&copy)
        .args(["run", "--", "id", "-u"])
        .env(STATS, "0")
        .current_dir("/")
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(output.stdout, format!("{NOBODY}\n").into_bytes());
    assert_eq!(said(&output), "");
}

/// The program gets the environment as it was given to us, traced or not.
#[test]
fn spec_5_the_environment_is_the_programs() {
    let environment = |command: &mut Command| -> BTreeMap<OsString, OsString> {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        let pairs = text.split_terminator('\0').map(|pair| {
            let (name, value) = pair.split_once('=').unwrap();
            (name.into(), value.into())
        });
        pairs.collect()
    };
    let mut command = Command::new("env");
    command.arg("-0");
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let output = (OUTPUT, path.to_str().unwrap());
    let cases: [Variables; 4] = [
        &[],
        &[(STATS, "1"), output],
        &[(LOGGING, "1")],
        &[(STATS, "0"), (LOGGING, "no"), output],
    ];
    for variables in cases {
        let mut alone = Command::new("env");
        alone.arg("-0");
        for name in [STATS, LOGGING, OUTPUT] {
            alone.env_remove(name);
        }
        alone.envs(variables.iter().copied());
        assert_eq!(
            environment(&mut run(variables, &[], &command)),
            environment(&mut alone),
            "{variables:?}"
        );
    }
}

/// Test 6 measures what statistics and logging cost. Here is what each of them does; no time is
/// measured.
#[test]
fn spec_6_stats_and_logging() {
    let known = known_small();
    let command = llama_cli(&known.path, "test");
    let directory = scratch();
    let both =
        |variables: Variables| succeed(run(variables, &[], &command).current_dir(&directory));

    let said = both(&[(STATS, "1")]);
    assert!(said.contains(TITLE) && said.contains("Complete:"), "{said}");
    assert!(!said.contains(TAG), "{said}");
    let statistics = printed(&said);

    let logging = both(&[(LOGGING, "1")]);
    assert!(!logging.contains(TITLE), "{logging}");
    assert!(!logging.contains("exported"), "{logging}");
    let all = both(&[(STATS, "1"), (LOGGING, "1")]);
    assert_eq!(printed(&all), statistics, "{all}");

    // The specification's two lines, and no others. The model is the same, and so is every line.
    let lines = |said: &str| -> Vec<String> {
        let lines = said.lines().filter(|line| line.starts_with(TAG));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(lines(&logging), lines(&all));
    let log = directory.path().join("log");
    fs::write(&log, lines(&logging).join("\n")).unwrap();
    let rows = read_log(&log).unwrap();
    assert_tokens_of(known, &rows);
    for layer in 0..known.spec.layers {
        let detected = format!("{TAG}Layer {layer}: MoE layer detected (tensor 'ffn_moe_topk')");
        let experts = format!("{TAG}Layer {layer}: Experts [");
        let lines = lines(&logging);
        let detected: Vec<usize> = (0..lines.len()).filter(|i| lines[*i] == detected).collect();
        let first = lines.iter().position(|line| line.starts_with(&experts));
        assert_eq!(detected.len(), 1, "{lines:#?}");
        assert!(Some(detected[0]) < first, "{lines:#?}");
    }
    // Neither leaves a file that was not asked for.
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
}
