//! All tests, in the order in which a failure says most: what is committed, then units, then real
//! llama.cpp processes under the program.

mod offline;
mod steps;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use expert_trace_tests::{
    builds::Build, llama::LlamaCpp, prebuilt::Prebuilt, python::PYTHON, tracer::OFFLINE_BIN,
};

use crate::{bench, command, ebpf, llama, packages, prebuilt, python, results, system, workspace};
use steps::{Results, Steps};

/// File in the directory of build products with the list of builds that tests trace by their names.
pub const BUILDS: &str = "test-builds.json";

#[derive(clap::Args)]
pub struct Arguments {
    /// Run only the tests whose names contain this
    #[arg(long, value_name = "NAME")]
    filter: Option<String>,
}

pub fn run(root: &Path, arguments: &Arguments) -> Result<ExitCode> {
    let filter = arguments.filter.as_deref();
    let mut steps = Steps::default();
    steps.run("The committed BPF objects are of these sources", |_| {
        ebpf::check(root)
    });
    let fresh = rebuild(root, filter, &mut steps);
    steps.run("Unit tests", |results| {
        let mut cargo = workspace::cargo(root);
        cargo.args(["test", "--no-fail-fast", "--workspace"]);
        cargo.args(["--exclude", "expert-trace-tests"]);
        results.cargo_test(cargo.arg("--").args(filter))
    });
    let offline = steps.run("Built without what traces", |_| offline::build(root));
    offline::check(root, filter, &mut steps);
    let objects = fresh.as_deref();
    end_to_end(root, filter, objects, offline.as_deref(), &mut steps);
    steps.run("Results of suites that do not run here", |_| {
        results::run(root, &results::Arguments::default())
    });
    Ok(steps.finish())
}

/// Builds the BPF objects from source, where the toolchain is. Returns the directory of those that
/// are not the committed ones, and so have to be tested too.
fn rebuild(root: &Path, filter: Option<&str>, steps: &mut Steps) -> Option<PathBuf> {
    const STEP: &str = "BPF objects built from source";
    if filter.is_some() {
        steps.skip(STEP, "only tests with a certain name were asked for");
        return None;
    }
    if !system::is_root() {
        steps.skip(
            STEP,
            "this does not run as root; `cargo xtask build-ebpf` may work",
        );
        return None;
    }
    if !system::is_debian_12() {
        let reason = format!(
            "the BPF toolchain is that of Debian 12, and this is {}",
            system::distribution()
        );
        steps.skip(STEP, &reason);
        return None;
    }
    steps.run(STEP, |_| {
        let fresh = workspace::target()?.join("ebpf/fresh");
        ebpf::build(root, Some(&fresh))?;
        let differing = ebpf::differing(root, &fresh)?;
        if differing.is_empty() {
            println!("They are byte for byte the committed ones.");
            return Ok(None);
        }
        for object in differing {
            println!("{} has other bytes than the fresh one.", object.display());
        }
        println!("End-to-end tests will run with both.");
        Ok(Some(fresh))
    })?
}

fn end_to_end(
    root: &Path,
    filter: Option<&str>,
    fresh: Option<&Path>,
    offline: Option<&Path>,
    steps: &mut Steps,
) {
    const STEP: &str = "End-to-end tests";
    if !system::is_root() {
        steps.skip(STEP, "tracing another process needs root");
        return;
    }
    let Some(llama) = steps.run("llama.cpp and the oracle", |_| llama::provision(root)) else {
        steps.skip(STEP, "there is no llama.cpp to trace");
        return;
    };
    let provision = || Ok((prebuilt::provision()?, prebuilt::some(root)?));
    let Some((prebuilt, builds)) = steps.run("Prebuilt llama.cpp", |_| provision()) else {
        steps.skip(STEP, "there is no prebuilt llama.cpp to trace");
        return;
    };
    let Some(offline) = offline else {
        steps.skip(STEP, "there is no program without what traces");
        return;
    };
    steps.run("sudo", |_| ensure_sudo());
    steps.run("bpftrace", |_| {
        packages::ensure(bench::BPFTRACE, "measuring against scripts")
    });
    steps.run("tmux", |_| {
        packages::ensure(&["tmux"], "testing the live view in a terminal")
    });
    steps.run("Chromium", |_| {
        packages::ensure(&["chromium"], "testing reports in a browser")
    });
    let Some(python) = steps.run("Python's data tools", |_| python::provision()) else {
        steps.skip(STEP, "there is nothing to read our files back with");
        return;
    };
    let targets = Targets {
        llama,
        prebuilt,
        builds,
        python,
        offline: offline.to_owned(),
    };
    steps.run(STEP, |results| {
        end_to_end_with(root, filter, &targets, None, results)
    });
    if let Some(fresh) = fresh {
        steps.run("End-to-end tests with the fresh BPF objects", |results| {
            end_to_end_with(root, filter, &targets, Some(fresh), results)
        });
    }
}

/// What the end-to-end tests trace.
struct Targets {
    llama: LlamaCpp,
    prebuilt: Prebuilt,
    builds: Vec<Build>,
    /// The interpreter with the tools that read our files back.
    python: PathBuf,
    /// The program without what traces.
    offline: PathBuf,
}

/// Some tests are those of a user who comes through `sudo`. They make the user and its rules.
fn ensure_sudo() -> Result<()> {
    let needed: Vec<&str> = [("sudo", "sudo"), ("useradd", "passwd")]
        .into_iter()
        .filter(|(program, _)| !packages::on_path(program))
        .map(|(_, package)| package)
        .collect();
    packages::ensure(&needed, "testing with an ordinary user's rights")
}

/// Runs the end-to-end tests with the committed BPF objects, or with those in the directory
/// `objects`.
fn end_to_end_with(
    root: &Path,
    filter: Option<&str>,
    targets: &Targets,
    objects: Option<&Path>,
    results: &mut Results,
) -> Result<()> {
    let objects = objects.map(|directory| ("EXPERT_TRACE_EBPF_DIR", directory));
    command::run(workspace::release_build(root).envs(objects))?;
    let list = workspace::target()?.join(BUILDS);
    let mut cargo = workspace::cargo(root);
    cargo
        .args(["test", "--no-fail-fast", "--package", "expert-trace-tests"])
        .env("EXPERT_TRACE_TEST_BIN", workspace::release_program()?)
        .envs(targets.llama.to_env())
        .envs(targets.prebuilt.to_env())
        .envs([Build::write_list(&list, &targets.builds)?])
        .env(PYTHON, &targets.python)
        .env(OFFLINE_BIN, &targets.offline)
        .envs(objects)
        .arg("--")
        .args(filter)
        // Several traced processes at once would slow each other down on a small machine.
        .arg("--test-threads=1");
    results.cargo_test(&mut cargo)
}
