//! Would it work, and how: the machine, what we may do on it, and what would be probed in a target.
//!
//! Facts are gathered at the edges (`machine`, `trial`, `survey`), judged by plain functions
//! (`coverage`), and told by one writer each for people and for programs. `doctor` and
//! the `--dry-run` of `run` and `attach` are the same.

mod age;
mod callback;
mod coverage;
mod elf;
mod linker;
mod machine;
mod report;
mod survey;
mod text;
mod trial;

use std::{
    ffi::OsStr,
    io::{self, Write as _},
    path::Path,
};

use anyhow::Context as _;
use expert_trace_common::Route;
use nix::unistd::geteuid;

pub use self::{report::Answer, survey::Command};
use self::{
    report::{Check, Machine, Report, SCHEMA_NAME, SCHEMA_VERSION, Target},
    survey::Survey,
};
use crate::{
    caller::Caller,
    cli::Doctor,
    placement::Backends,
    probes::Load,
    requirements::Purpose,
    router_on_cpu,
    routes::Routes,
    stats::{Schema, Tool},
    visibility,
};

/// What is asked about.
#[derive(Debug)]
pub enum Subject<'a> {
    /// The machine alone.
    Machine,
    /// A process, as `attach` would trace it.
    Process {
        /// The process.
        pid: u32,
        /// Whether its router logits are to be read.
        router_on_cpu: bool,
        /// Ways to read routing; all when there is none.
        routes: &'a [Route],
        /// Whether to look for a moment, with a probe, whether it has an eval callback.
        watch: bool,
    },
    /// A command, as `run` would start it.
    Command(Command<'a>),
    /// A program or a library.
    Binary {
        /// The file.
        path: &'a Path,
        /// Who asks.
        caller: &'a Caller,
    },
}

/// Answers `expert-trace doctor`; gives the exit status.
///
/// # Errors
/// When the caller is not known, or the answer cannot be written.
pub fn doctor(arguments: &Doctor) -> anyhow::Result<u8> {
    let caller = Caller::detect()?;
    let (account, environment) = caller.program(None, &[])?;
    let override_tensor = environment.get(router_on_cpu::OVERRIDE_VARIABLE);
    let subject = match arguments {
        Doctor { pid: Some(pid), .. } => Subject::Process {
            pid: pid.get(),
            router_on_cpu: false,
            routes: &[],
            watch: true,
        },
        Doctor {
            binary: Some(path), ..
        } => Subject::Binary {
            path,
            caller: &caller,
        },
        Doctor { command, .. } if command.is_empty() => Subject::Machine,
        Doctor { command, .. } => Subject::Command(Command {
            arguments: command,
            environment: &environment,
            account: &account,
            routes: Routes::asked_for(&[], router_on_cpu::is_asked_for(command, override_tensor)),
        }),
    };
    let form = if arguments.json {
        Form::Json
    } else {
        Form::Text
    };
    Ok(tell(&subject, form, None)?.exit_status())
}

/// Why nothing would be recorded of a target, whatever it is.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// Why.
    pub why: String,
    /// What to change.
    pub fix: &'static str,
}

/// Answers a `--dry-run`, in which nothing is traced.
///
/// # Errors
/// When the answer cannot be written.
pub fn dry_run(subject: &Subject<'_>, refusal: Option<&Refusal>) -> anyhow::Result<Answer> {
    tell(subject, Form::Text, refusal)
}

#[derive(Clone, Copy)]
enum Form {
    Text,
    Json,
}

fn tell(subject: &Subject<'_>, form: Form, refusal: Option<&Refusal>) -> anyhow::Result<Answer> {
    let report = examine(subject, refusal);
    let written = match form {
        Form::Text => {
            let mut text = String::new();
            text::write(&mut text, &report)?;
            text
        }
        Form::Json => serde_json::to_string_pretty(&report)? + "\n",
    };
    let mut out = io::stdout().lock();
    match out.write_all(written.as_bytes()).and_then(|()| out.flush()) {
        // Whoever reads has read enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        result => result.context("cannot write the report")?,
    }
    Ok(report.answer)
}

fn examine(subject: &Subject<'_>, refusal: Option<&Refusal>) -> Report {
    let purpose = match subject {
        Subject::Process { .. } => Purpose::Attach,
        Subject::Command(command) if command.account.uid != geteuid() => Purpose::RunAsOther,
        _ => Purpose::Run,
    };
    let machine = machine::Facts::gather(purpose);
    let mut checks = machine.checks(&as_root(subject));
    if let Some(Refusal { why, fix }) = refusal {
        checks.push(Check::no("recording", why, *fix));
    }
    let survey = match subject {
        Subject::Machine => None,
        Subject::Process {
            pid,
            router_on_cpu,
            routes,
            watch,
        } => {
            let mut survey = survey::process(*pid, *router_on_cpu, routes);
            if *watch {
                survey.callbacks.watch(*pid, &survey.plan);
            }
            Some(survey)
        }
        Subject::Command(command) => Some(survey::command(command)),
        Subject::Binary { path, caller } => {
            Some(survey::binary(path, &caller.environment, &caller.account))
        }
    };
    let target = survey.and_then(|survey| {
        let (of_target, target) = describe(survey);
        checks.extend(of_target);
        target
    });
    Report {
        schema: Schema {
            name: SCHEMA_NAME,
            version: SCHEMA_VERSION,
        },
        tool: Tool {
            name: env!("CARGO_PKG_NAME"),
            version: env!("CARGO_PKG_VERSION"),
        },
        answer: Answer::worst(checks.iter().map(|check| check.answer)),
        machine: Machine {
            hit_ns: machine.costs(),
            kernel: machine.release,
            architecture: std::env::consts::ARCH,
        },
        checks,
        target,
    }
}

/// The checks of a target, and what it is, unless nothing of it was found.
fn describe(mut survey: Survey) -> (Vec<Check>, Option<Target>) {
    let routes = coverage::routes(&survey.plan);
    let devices = survey.devices();
    let backends = Backends::of_devices(&devices);
    let options = survey.options.clone().of_process(backends, None, None);
    let facts = coverage::Facts {
        options: &options,
        devices: &devices,
        routes: &routes,
        read: survey.plan.routes(),
        main_model: survey.main_model(),
        sees_streams: visibility::sees_streams(survey.plan.probes.iter()),
        router_on_cpu: survey.plan.reads_logits(),
        attached: survey.pid.is_some(),
    };
    // Where the functions are not found yet, or not to be found, nothing can be expected.
    let expected = match survey.plan.can_see_experts() {
        true => coverage::expectations(&survey.models, &facts),
        false => Vec::new(),
    };
    survey.check_coverage(&expected);
    let checks = std::mem::take(&mut survey.checks);
    if survey.files.is_empty() {
        return (checks, None);
    }
    let (hooks, possible_hooks) = survey.planned();
    let probes = Load::of(&survey.plan.probes[..survey.certain]);
    let target = Target {
        kind: survey.kind,
        pid: survey.pid,
        tensor_layouts: survey.layouts(),
        command: survey.command,
        files: survey.files,
        probes,
        hooks,
        possible_hooks,
        routes,
        eval_callback: survey.callbacks,
        models: survey.models,
        coverage: expected,
    };
    (checks, Some(target))
}

/// The command line that asks again with all rights. What a command is given can be a secret.
fn as_root(subject: &Subject<'_>) -> String {
    let of = match subject {
        Subject::Machine => String::new(),
        Subject::Process { pid, .. } => format!(" --pid {pid}"),
        Subject::Binary { path, .. } => format!(" --binary {}", quoted(path.as_os_str())),
        Subject::Command(_) => " -- COMMAND".to_owned(),
    };
    format!("sudo expert-trace doctor{of}")
}

/// A word as a shell takes it.
fn quoted(word: &OsStr) -> String {
    let word = crate::target::printable(word.as_ref());
    let plain = |c: char| c.is_alphanumeric() || "/._-+=:@,".contains(c);
    match word.chars().all(plain) {
        true => word,
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_a_shell() {
        assert_eq!(quoted("/opt/llama-cli".as_ref()), "/opt/llama-cli");
        assert_eq!(quoted("/a b/it's".as_ref()), r"'/a b/it'\''s'");
    }
}
