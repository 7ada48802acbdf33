//! Parses, calls, and turns errors into exit statuses.

use std::{io, process::ExitCode};

use anyhow::Context as _;
use clap::Parser as _;
use expert_trace::{
    capture,
    cli::{Cli, Command},
    doctor, export, formats,
    launch::LaunchError,
    profile::command as profile,
    say,
};
use tracing_subscriber::EnvFilter;

/// Exit status when the tracer itself fails, as `env` and `timeout` have it.
const TRACER_FAILED: u8 = 125;
/// Exit status when files cannot be read or written, and nothing was to be traced.
const FAILED: u8 = 1;
/// The same for `verify`, of which 1 is an answer.
const COULD_NOT_TELL: u8 = 2;

fn main() -> ExitCode {
    export::remember_inherited();
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::from_env("EXPERT_TRACE_LOG"))
        .with_writer(io::stderr)
        .log_internal_errors(false)
        .init();
    match run(cli) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            say!("error: {error:#}");
            let status = error
                .downcast_ref::<LaunchError>()
                .map_or(TRACER_FAILED, LaunchError::exit_code);
            ExitCode::from(status)
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<u8> {
    match cli.command {
        Command::Run(arguments) => block_on(capture::run(arguments)),
        Command::Attach(arguments) => block_on(capture::attach(arguments)),
        Command::Doctor(arguments) => doctor::doctor(&arguments),
        Command::Merge(arguments) => Ok(or_status(profile::run_merge(&arguments), FAILED)),
        Command::Diff(arguments) => Ok(or_status(profile::run_diff(&arguments), FAILED)),
        Command::Verify(arguments) => {
            Ok(or_status(profile::run_verify(&arguments), COULD_NOT_TELL))
        }
        Command::Export(arguments) => Ok(formats::export(&arguments)),
        Command::Import(arguments) => Ok(formats::import(&arguments)),
        Command::Completions(completions) => match completions.write(&mut io::stdout()) {
            // Whoever reads has read enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(0),
            Err(error) => Err(error).context("cannot write the completions"),
            Ok(()) => Ok(0),
        },
    }
}

/// The status, or this one, when the error has been told.
fn or_status(result: anyhow::Result<u8>, status: u8) -> u8 {
    result.unwrap_or_else(|error| {
        say!("error: {error:#}");
        status
    })
}

fn block_on(capture: impl Future<Output = anyhow::Result<u8>>) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(capture)
}
