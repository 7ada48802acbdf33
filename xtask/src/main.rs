//! Tasks of the workspace that Cargo alone cannot do: `cargo xtask --help`.

mod bench;
mod cache;
mod command;
mod compat;
mod cuda;
mod demo;
mod document;
mod driver;
mod ebpf;
mod examples;
mod llama;
mod npm;
mod packages;
mod pip;
mod planned;
mod plot;
mod prebuilt;
mod python;
mod results;
mod screen;
mod suite;
mod system;
mod test;
mod workspace;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use expert_trace_tests::builds::Build;
use expert_trace_tests::python::PYTHON;
use planned::Planned;

/// Builds the BPF objects, shows the program at work, and runs all tests.
///
/// What is missing is installed as a Debian package if this runs as root; what takes long to build
/// is kept in ~/.cache/expert-trace.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build the BPF objects that the program embeds, for all architectures
    BuildEbpf {
        /// Build nothing; fail if the committed objects are older than their sources
        #[arg(long, conflicts_with = "out")]
        check: bool,
        /// Directory to write them to, instead of replacing the committed ones
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Trace a small model in llama-cli, as root, and leave the statistics in a file
    Demo(demo::Arguments),
    /// Make the files in examples/, and the pictures in docs/images/, of a run that is traced, as root
    Examples,
    /// Run all tests as root, or those that need no root
    Test(test::Arguments),
    /// Build llama.cpp for the tests, and print the environment that they need
    ///
    /// `cargo xtask test` does this itself; this is for running a test by hand.
    Llama,
    /// Test and measure on an NVIDIA GPU, as root; writes docs/results/cuda.json
    Cuda(cuda::Arguments),
    /// Trace many builds of llama.cpp, as root; writes docs/results/compat.json, and the tables in
    /// docs/compatibility.md
    Compat(compat::Arguments),
    /// Measure what tracing costs, as root; writes docs/results/bench-NAME.json, and the tables in
    /// docs/performance.md
    Bench(bench::Arguments),
    /// Say which results of long suites are not of the code that is here, and what has changed
    Results(results::Arguments),
    /// Download builds of llama.cpp for the tests, and print the environment that they need
    Prebuilt {
        /// Also those that only `cargo xtask compat` traces
        #[arg(long)]
        all: bool,
    },
}

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode> {
    let task = Arguments::parse().task;
    let root = workspace::root()?;
    match task {
        Task::BuildEbpf { check: true, .. } => ebpf::check(&root)?,
        Task::BuildEbpf { out, .. } => ebpf::build(&root, out.as_deref())?,
        Task::Demo(arguments) => demo::run(&root, &arguments)?,
        Task::Examples => examples::run(&root)?,
        Task::Test(arguments) => return test::run(&root, &arguments),
        Task::Cuda(arguments) => cuda::run(&root, &arguments)?,
        Task::Compat(arguments) => compat::run(&root, &arguments)?,
        Task::Bench(arguments) => bench::run(&root, &arguments)?,
        Task::Results(arguments) => results::run(&root, &arguments)?,
        Task::Llama => export(&llama::provision(&root)?.to_env()),
        Task::Prebuilt { all } => {
            let builds = if all {
                let builds = prebuilt::all(&root).into_iter();
                builds.map(Planned::make).collect::<Result<Vec<_>>>()?
            } else {
                prebuilt::some(&root)?
            };
            let list = workspace::target()?.join(test::BUILDS);
            export(&prebuilt::provision()?.to_env());
            export(&[(PYTHON, &python::provision()?)]);
            export(&[Build::write_list(&list, &builds)?]);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints variables for a shell to read.
fn export(variables: &[(&str, &Path)]) {
    for (variable, path) in variables {
        println!("export {variable}={}", path.display());
    }
}
