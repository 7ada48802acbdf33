//! The program at work on a model that is made on the spot: nothing has to be downloaded but
//! llama.cpp.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use expert_trace_tests::models::{self, ModelSpec};

use crate::{command, llama, packages, system, workspace};

#[derive(clap::Args)]
pub struct Arguments {
    /// llama-cli to trace; without it the one on PATH, or else one that is built (5 minutes, once)
    #[arg(long, value_name = "PATH")]
    llama_cli: Option<PathBuf>,
    /// File for the statistics
    #[arg(long, value_name = "FILE", default_value = "stats.json")]
    output: PathBuf,
}

pub fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    ensure!(
        system::is_root(),
        "tracing another process needs root: run `sudo env \"PATH=$PATH\" \"HOME=$HOME\" cargo xtask demo`"
    );
    command::run(&mut workspace::release_build(root))?;
    let llama_cli = match &arguments.llama_cli {
        Some(path) => path.clone(),
        None if packages::on_path("llama-cli") => "llama-cli".into(),
        None => llama::llama_cli()?,
    };
    let model = model()?;
    command::run(
        Command::new(workspace::release_program()?)
            // Under sudo the program would be the calling user's, who may not be able to read root's
            // cache.
            .args(["run", "--user", "root", "-o"])
            .arg(&arguments.output)
            .arg("--")
            .arg(llama_cli)
            .arg("-m")
            .arg(model)
            // One answer of 16 tokens, without a conversation.
            .args(["-p", "Hello", "-n", "16", "--single-turn"])
            .stdin(Stdio::null()),
    )
}

/// A small mixture-of-experts model with a real tokenizer and random weights.
pub fn model() -> Result<PathBuf> {
    let spec = ModelSpec::SMALL;
    let vocabulary = llama::vocabulary()?;
    let model = llama::models_cache()?.join("demo.gguf");
    eprintln!(
        "Writing a model of {} layers with {} experts each: {}",
        spec.layers,
        spec.n_expert,
        model.display()
    );
    // Written anew each time, as it takes no time; renamed, as another demo may have it mapped.
    let partial = model.with_extension("partial");
    models::write_random(&partial, &vocabulary, &spec).context("cannot write the model")?;
    fs::rename(&partial, &model).with_context(|| format!("cannot rename {}", partial.display()))?;
    Ok(model)
}
