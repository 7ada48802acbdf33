//! Layouts, shapes and faults that the llama.cpp at hand does not have, in a program that stands in
//! for it.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use expert_trace_tests::tracer::{self, Stats, read_log};
use serde_json::json;
use tempfile::TempDir;

use crate::support::scratch;

/// Compiles one of our C programs, with the compiler that linking Rust needs anyway.
pub fn compile(source: &str, flags: &[&str]) -> (TempDir, PathBuf) {
    let directory = scratch();
    let program = directory.path().join("program");
    compile_to(&program, &[source], flags);
    (directory, program)
}

/// The same, for one of several sources.
pub fn compile_to(file: &Path, sources: &[&str], flags: &[&str]) {
    let oracle = Path::new(env!("CARGO_MANIFEST_DIR")).join("oracle");
    let status = Command::new("cc")
        .args(["-O1", "-o"])
        .arg(file)
        .args(sources.iter().map(|source| oracle.join(source)))
        .args(flags)
        .status()
        .unwrap();
    assert!(status.success());
}

fn standin() -> Command {
    static PROGRAM: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, program) = PROGRAM.get_or_init(|| compile("standin.c", &[]));
    Command::new(program)
}

struct Shape {
    k: u32,
    rows: u32,
    id_stride: u32,
    row_stride: u32,
}

/// `rows` rows, k of `n_expert` experts, as llama.cpp has them.
fn argsort(k: u32, rows: u32, n_expert: u32) -> Shape {
    Shape {
        k,
        rows,
        id_stride: 4,
        row_stride: 4 * n_expert,
    }
}

fn trace(
    command: Command,
    layout: &str,
    shape: &Shape,
    fault: &str,
) -> (Stats, Vec<(u32, Vec<u32>)>) {
    let (stats, rows, _said) = trace_and_listen(command, layout, shape, fault);
    (stats, rows)
}

/// The same, with what the tracer says.
fn trace_and_listen(
    mut command: Command,
    layout: &str,
    shape: &Shape,
    fault: &str,
) -> (Stats, Vec<(u32, Vec<u32>)>, String) {
    let directory = scratch();
    let [path, log] = ["stats.json", "log"].map(|name| directory.path().join(name));
    let numbers = [shape.k, shape.rows, shape.id_stride, shape.row_stride];
    command
        .arg(layout)
        .args(numbers.map(|n| n.to_string()))
        .arg(fault);
    let options = [
        format!("--output={}", path.display()),
        format!("--log={}", log.display()),
        "--top=0".to_owned(),
    ];
    let output = tracer::run(&options, &command).unwrap().output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    (Stats::read(&path).unwrap(), read_log(&log).unwrap(), said)
}

/// What the stand-in computes, by its own description.
fn expected(shape: &Shape) -> Vec<(u32, Vec<u32>)> {
    let n_expert = if shape.id_stride == 4 {
        shape.row_stride / 4
    } else {
        1024
    };
    let row = |layer, row| {
        (0..shape.k)
            .map(|j| (31 * layer + 7 * row + j) % n_expert)
            .collect()
    };
    (0..3)
        .flat_map(|layer| (0..shape.rows).map(move |r| (layer, r)))
        .map(|(layer, r)| (layer, row(layer, r)))
        .collect()
}

fn assert_exact(layout: &str, shape: &Shape) -> Stats {
    let (stats, rows) = trace(standin(), layout, shape, "none");
    stats.assert_complete();
    assert!(
        rows == expected(shape),
        "{} rows, k {}",
        shape.rows,
        shape.k
    );
    stats
}

#[test]
fn both_tensor_layouts_are_found_by_the_first_row() {
    for (layout, builds) in [("new", "b4106 or newer"), ("old", "b3209 to b4105")] {
        let stats = assert_exact(layout, &argsort(4, 2, 32));
        let found = &stats.0["target"]["tensor_layouts"][0];
        assert_eq!(found["builds"], builds);
        assert_eq!(found["found_by"], "names");
        assert_eq!(stats.number("/integrity/hits/layout_unknown"), 0);
        assert_eq!(stats.0["contexts"][0]["pass_source"], "layer_order");
        assert_eq!(stats.0["contexts"][0]["phase_source"], "rows");
    }
}

/// Where a library has DWARF, its layout is known before anything runs, and need not be one of ours.
#[test]
fn a_declared_layout_is_taken_from_dwarf() {
    let shape = argsort(4, 10, 32);
    let (_directory, program) = compile("standin.c", &["-g", "-DDECLARED"]);
    let (stats, rows) = trace(Command::new(&program), "wide", &shape, "none");
    stats.assert_complete();
    assert_eq!(rows, expected(&shape));
    let found = &stats.0["target"]["tensor_layouts"][0];
    let declared = json!({
        "found_by": "dwarf", "builds": null, "src": 160, "data": 304, "ith": 4,
    });
    assert_eq!(*found, declared);
    // Two threads, three layers.
    assert_eq!(stats.0["target"]["hooks"][0]["hits"], 6);
}

#[test]
fn an_unknown_layout_is_refused_with_the_reason() {
    for (layout, words) in [
        ("wide", "ggml_compute_params has a layout that is not known"),
        ("odd", "layout that is not known: nothing was read"),
        (
            "ancient",
            "ggml_compute_params has a layout that is not known",
        ),
    ] {
        let (stats, rows) = trace(standin(), layout, &argsort(4, 2, 32), "none");
        assert_eq!(rows, []);
        assert_eq!(stats.0["layers"].as_array().map(Vec::len), Some(0));
        assert_eq!(stats.0["integrity"]["complete"], false);
        let problems = stats.0["integrity"]["problems"].to_string();
        assert!(problems.contains(words), "{layout}: {problems}");
    }
}

#[test]
fn every_width_and_length_arrives_whole() {
    for (k, rows, n_expert) in [
        (1, 1, 8),
        (1, 5000, 8),
        (2, 300, 8),
        (16, 1, 128),
        (17, 1, 128),
        (10, 8192, 512),
        (64, 31, 64),
        (65, 9, 512),
        (512, 7, 512),
        (1024, 3, 1024),
    ] {
        assert_exact("new", &argsort(k, rows, n_expert));
    }
}

#[test]
fn ids_that_do_not_lie_side_by_side_are_read_by_their_stride() {
    for (id_stride, row_stride) in [(8, 256), (4 * 40, 4), (12, 4096)] {
        assert_exact(
            "new",
            &Shape {
                k: 6,
                rows: 40,
                id_stride,
                row_stride,
            },
        );
    }
}

#[test]
fn what_makes_no_sense_is_counted_and_never_shown() {
    let shape = argsort(4, 10, 32);
    for (fault, counter, hits) in [
        ("type", "/unknown_rows/malformed", 3),
        ("planes", "/unknown_rows/malformed", 3),
        ("absurd", "/unknown_rows/malformed", 3),
        // Each of two threads has three layers.
        ("meaning", "/hits/unreadable", 6),
        ("data", "/rows/dropped/unreadable", 30),
        ("range", "/received/rejected", 3),
        // Not even a name is there: no layout fits.
        ("tensor", "/hits/layout_unknown", 3),
    ] {
        let (stats, rows) = trace(standin(), "new", &shape, fault);
        assert_eq!(
            stats.number(&format!("/integrity{counter}")),
            hits,
            "{fault}"
        );
        assert_eq!(stats.0["integrity"]["complete"], false, "{fault}");
        assert_eq!(rows, [], "{fault}");
        assert_eq!(
            stats.0["layers"].as_array().map(Vec::len),
            Some(0),
            "{fault}"
        );
    }
    // Other names, as the scheduler's copies have, are other tensors.
    for fault in ["suffix", "copy", "long", "endless"] {
        let (stats, rows) = trace(standin(), "new", &shape, fault);
        assert_eq!(rows, [], "{fault}");
        assert_eq!(stats.number("/integrity/hits/routed"), 0, "{fault}");
    }
}

const CET: &str = "-fcf-protection=full";

/// However a program is linked and its functions begin, its one definition is found and fires.
#[test]
fn every_kind_of_executable() {
    let shape = argsort(4, 3, 32);
    // On x86-64: what is skipped, and what then is probed. An empty function is a mere return.
    let returns = (0, "single_stepped");
    for (flags, table, place) in [
        (&["-no-pie"][..], ".symtab", returns),
        (&["-pie", "-fPIE"], ".symtab", returns),
        (&["-static"], ".symtab", returns),
        (&["-static-pie", "-fPIE"], ".symtab", returns),
        (&["-rdynamic", "-s"], ".dynsym", returns),
        // push %rbp, behind endbr64; je, behind test; both.
        (&["-O0"], ".symtab", (0, "emulated")),
        (&["-O0", CET], ".symtab", (4, "emulated")),
        (&["-DCHECKED"], ".symtab", (3, "emulated")),
        (&["-DCHECKED", CET], ".symtab", (7, "emulated")),
    ] {
        // Arm's compilers know no -fcf-protection.
        if cfg!(not(target_arch = "x86_64")) && flags.contains(&CET) {
            continue;
        }
        let (_directory, program) = compile("standin.c", flags);
        let (stats, rows) = trace(Command::new(&program), "new", &shape, "none");
        stats.assert_complete();
        assert_eq!(rows, expected(&shape), "{flags:?}");
        let hook = &stats.0["target"]["hooks"][0];
        assert_eq!(hook["table"], table, "{flags:?}");
        let (skipped, instruction) = place;
        if cfg!(target_arch = "x86_64") {
            assert_eq!(hook["skipped"], skipped, "{flags:?}");
            assert_eq!(hook["instruction"], instruction, "{flags:?}");
        }
        // Two threads come by for each of three layers.
        assert_eq!(hook["hits"], 6, "{flags:?}");
    }
}

/// A probe that the kernel refuses is a reason to be incomplete, and no probe that was set.
#[test]
#[cfg(target_arch = "x86_64")]
fn a_probe_that_cannot_be_set_is_no_silence() {
    let (_directory, program) = compile("standin.c", &["-DLOCKED"]);
    let (stats, rows) = trace(Command::new(&program), "new", &argsort(4, 3, 32), "none");
    assert_eq!(rows, []);
    assert_eq!(stats.0["integrity"]["complete"], false);
    let problems = stats.0["integrity"]["problems"].to_string();
    assert!(
        problems.contains("cannot probe ggml_compute_forward_get_rows"),
        "{problems}"
    );
    assert_eq!(stats.0["target"]["hooks"].as_array().map(Vec::len), Some(0));
}

/// A compiler may copy the function into its callers, and leave it for others: the probe is set where
/// nothing comes by.
#[test]
fn a_function_that_is_never_entered_is_no_silence() {
    let shape = argsort(4, 10, 32);
    let hits = |stats: &Stats| -> Vec<(String, u64)> {
        let hooks = stats.0["target"]["hooks"].as_array().unwrap().iter();
        let hits = hooks.map(|hook| {
            (
                hook["hook"].as_str().unwrap().to_owned(),
                hook["hits"].as_u64().unwrap(),
            )
        });
        hits.collect()
    };
    let all = |expert_ids: u64| {
        [("expert_ids", expert_ids), ("pass_begin", 1), ("ubatch", 1)]
            .map(|(hook, hits)| (hook.to_owned(), hits))
    };

    let (_directory, program) = compile("standin.c", &["-DSCHEDULED"]);
    let (stats, rows, _) = trace_and_listen(Command::new(program), "new", &shape, "none");
    stats.assert_complete();
    assert_eq!(rows, expected(&shape));
    assert_eq!(hits(&stats), all(6));
    assert_eq!(stats.0["contexts"][0]["pass_source"], "scheduler");
    assert_eq!(stats.0["contexts"][0]["phase_source"], "ubatch");

    let (_directory, program) = compile("standin.c", &["-DSCHEDULED", "-DINLINED"]);
    let (stats, rows, said) = trace_and_listen(Command::new(program), "new", &shape, "none");
    assert_eq!(rows, []);
    assert_eq!(hits(&stats), all(0));
    assert_eq!(stats.0["contexts"], json!([]));
    assert_eq!(stats.number("/integrity/hits/entered"), 0);
    assert_eq!(stats.number("/not_visible/0/passes"), 1);
    assert_eq!(stats.number("/not_visible/0/tokens"), 10);
    let why = &stats.0["not_visible"][0]["gaps"][0];
    assert_eq!(why["reason"], "never_entered");
    let words = "ggml_compute_forward_get_rows was never entered";
    assert!(
        why["explanation"].as_str().unwrap().starts_with(words),
        "{why}"
    );
    let seen = format!("No expert routing was seen: graphs were computed, and {words}");
    assert!(said.contains(&seen), "{said}");
}

/// The dynamic linker started as a program.
#[test]
fn a_program_started_by_its_linker() {
    let shape = argsort(4, 3, 32);
    let (_directory, program) = compile("standin.c", &[]);
    let linker = if cfg!(target_arch = "x86_64") {
        "/lib64/ld-linux-x86-64.so.2"
    } else {
        "/lib/ld-linux-aarch64.so.1"
    };
    let mut command = Command::new(linker);
    command.arg(&program);
    let (stats, rows) = trace(command, "new", &shape, "none");
    stats.assert_complete();
    assert_eq!(rows, expected(&shape));
}

/// Ids that the program's own code has asked a device for are read when they arrive, by either layout and
/// whatever device a copy is for; they are gone a moment later.
#[test]
fn ids_that_the_program_asks_for() {
    let (_directory, program) = compile("standin.c", &["-DSCHEDULED", "-DCALLBACK"]);
    let shape = argsort(8, 300, 128);
    for (layout, fault) in [("new", "none"), ("old", "none"), ("new", "device")] {
        let (stats, rows) = trace(Command::new(&program), layout, &shape, fault);
        stats.assert_complete();
        assert!(
            rows == expected(&shape),
            "{layout} {fault}: {} rows",
            rows.len()
        );
        assert_eq!(stats.number("/integrity/routes/callback_copies"), 9);
        assert_eq!(stats.number("/integrity/routes/repeated"), 6);
    }
    // A part of them is not taken for all, nor something else for ids.
    for (fault, partial) in [("part", 9), ("suffix", 0), ("long", 0), ("copy", 0)] {
        let (stats, rows) = trace(Command::new(&program), "new", &shape, fault);
        stats.assert_complete();
        assert_eq!(rows, [], "{fault}");
        assert_eq!(
            stats.number("/integrity/routes/partial"),
            partial,
            "{fault}"
        );
    }
}
