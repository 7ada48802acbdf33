//! Parses, calls, and turns errors into exit statuses.

use std::{io, process::ExitCode};

use anyhow::Context as _;
use clap::Parser as _;
use expert_trace::{
    analyze::command as analyze,
    cli::{Cli, Command},
    formats,
    profile::command as profile,
    report, say,
};
#[cfg(can_trace)]
use expert_trace::{capture, control, doctor, export, launch::LaunchError};

/// Exit status when the tracer itself fails, as `env` and `timeout` have it.
const TRACER_FAILED: u8 = 125;
/// Exit status when files cannot be read or written, and nothing was to be traced.
const FAILED: u8 = 1;
/// The same for `verify`, of which 1 is an answer.
const COULD_NOT_TELL: u8 = 2;

fn main() -> ExitCode {
    #[cfg(can_trace)]
    export::remember_inherited();
    let cli = Cli::parse();
    #[cfg(can_trace)]
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_env("EXPERT_TRACE_LOG"))
        .with_writer(io::stderr)
        .log_internal_errors(false)
        .init();
    match run(cli) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            say!("error: {error:#}");
            ExitCode::from(status_of(&error))
        }
    }
}

#[cfg(can_trace)]
fn status_of(error: &anyhow::Error) -> u8 {
    error
        .downcast_ref::<LaunchError>()
        .map_or(TRACER_FAILED, LaunchError::exit_code)
}

#[cfg(not(can_trace))]
fn status_of(_: &anyhow::Error) -> u8 {
    TRACER_FAILED
}

fn run(cli: Cli) -> anyhow::Result<u8> {
    match cli.command {
        #[cfg(can_trace)]
        Command::Run(arguments) => block_on(capture::run(arguments)),
        #[cfg(can_trace)]
        Command::Attach(arguments) => block_on(capture::attach(arguments)),
        #[cfg(can_trace)]
        Command::Top(arguments) => block_on(capture::top(arguments)),
        #[cfg(can_trace)]
        Command::Doctor(arguments) => doctor::doctor(&arguments),
        #[cfg(can_trace)]
        Command::Ctl(arguments) => Ok(or_status(control::ctl(&arguments).map(|()| 0), FAILED)),
        #[cfg(not(can_trace))]
        Command::CannotTrace(_) => anyhow::bail!(expert_trace::cli::CANNOT_TRACE),
        Command::Merge(arguments) => Ok(or_status(profile::run_merge(&arguments), FAILED)),
        Command::Diff(arguments) => Ok(or_status(profile::run_diff(&arguments), FAILED)),
        Command::Verify(arguments) => {
            Ok(or_status(profile::run_verify(&arguments), COULD_NOT_TELL))
        }
        Command::Analyze(arguments) => Ok(or_status(analyze::run(&arguments), FAILED)),
        Command::Report(arguments) => Ok(or_status(report::run(&arguments), FAILED)),
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

#[cfg(can_trace)]
fn block_on(capture: impl Future<Output = anyhow::Result<u8>>) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(capture)
}
