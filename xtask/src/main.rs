//! Tasks of the workspace that Cargo alone cannot do: `cargo xtask --help`.

mod cache;
mod command;
mod llama;
mod packages;
mod system;
mod workspace;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Builds the BPF objects, shows the program at work, and runs all tests.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build llama.cpp for the tests, and print the environment that they need
    ///
    /// `cargo xtask test` does this itself; this is for running a test by hand.
    Llama,
}

fn main() -> Result<()> {
    match Arguments::parse().task {
        Task::Llama => {
            let llama = llama::provision(&workspace::root()?.join("tests/oracle/oracle.cpp"))?;
            for (variable, path) in llama.to_env() {
                println!("export {variable}={}", path.display());
            }
            Ok(())
        }
    }
}
