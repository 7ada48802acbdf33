//! The report for people.

use std::{
    fmt::{self, Write},
    path::Path,
};

use super::{
    coverage::Expectation,
    report::{Answer, Build, Check, Loaded, Planned, Report, Target, TargetKind},
};
use crate::{probes::Load, summary::ranges, target::printable};

/// Width of the column of answers.
const COLUMN: usize = "could not tell".len() + 2;

/// Writes a report.
///
/// # Errors
/// When `out` cannot be written.
pub fn write(out: &mut impl Write, report: &Report) -> fmt::Result {
    for check in &report.checks {
        write_check(out, check)?;
    }
    if let Some(target) = &report.target {
        write_target(out, target)?;
    }
    let needs = |check: &&Check| check.answer == Answer::No;
    let answer = match report.answer {
        Answer::Yes => "yes".to_owned(),
        Answer::CouldNotTell => "could not tell".to_owned(),
        Answer::No => {
            let names: Vec<&str> = report
                .checks
                .iter()
                .filter(needs)
                .map(|of| of.check)
                .collect();
            format!("no, see above: {}", names.join(", "))
        }
    };
    writeln!(out, "\nAnswer: {answer}")
}

fn said(answer: Answer) -> &'static str {
    match answer {
        Answer::Yes => "yes",
        Answer::No => "no",
        Answer::CouldNotTell => "could not tell",
    }
}

fn write_check(out: &mut impl Write, check: &Check) -> fmt::Result {
    let Check {
        check,
        answer,
        finding,
        fix,
    } = check;
    writeln!(out, "{:COLUMN$}{check}: {finding}", said(*answer))?;
    write_fix(out, *answer, fix.as_deref())
}

fn write_fix(out: &mut impl Write, answer: Answer, fix: Option<&str>) -> fmt::Result {
    let Some(fix) = fix else { return Ok(()) };
    let what = match answer {
        Answer::No => "  needs",
        _ => "  to find out",
    };
    writeln!(out, "{what:COLUMN$}{fix}")
}

fn write_target(out: &mut impl Write, target: &Target) -> fmt::Result {
    match (target.kind, target.pid) {
        (TargetKind::Process, Some(pid)) => writeln!(out, "\nProcess {pid}")?,
        (TargetKind::Binary, _) => writeln!(out, "\nBinary")?,
        _ => writeln!(
            out,
            "\nCommand: {}",
            printable(target.command.join(" ").as_ref())
        )?,
    }
    writeln!(out, "Files:")?;
    for build in &target.files {
        write_build(out, build)?;
    }
    let Load {
        probes,
        places,
        perf_event_detach_ms,
    } = target.probes;
    let returns = target.hooks.iter().filter(|of| of.on_return).count();
    writeln!(
        out,
        "Probes: {probes} in {places} places, {returns} of them on return; where perf events carry them, \
         the end takes up to {perf_event_detach_ms} ms"
    )?;
    write_hooks(out, &target.hooks)?;
    if !target.possible_hooks.is_empty() {
        writeln!(out, "Probes that come with files that it may load:")?;
        write_hooks(out, &target.possible_hooks)?;
    }
    let nothing = target.hooks.is_empty() && target.possible_hooks.is_empty();
    if nothing {
        return Ok(());
    }
    writeln!(out, "Routes:")?;
    for route in &target.routes {
        let answer = said(route.answer);
        writeln!(out, "  {answer:COLUMN$}{}: {}", route.route, route.finding)?;
    }
    let callbacks = &target.eval_callback;
    if callbacks.answer != Answer::No {
        let answer = said(callbacks.answer);
        writeln!(out, "  {answer:COLUMN$}eval callback: {}", callbacks.text())?;
    }
    if !target.coverage.is_empty() {
        writeln!(out, "Layers with experts:")?;
    }
    for expectation in &target.coverage {
        write_expectation(out, target, expectation)?;
    }
    Ok(())
}

fn write_build(out: &mut impl Write, build: &Build) -> fmt::Result {
    let mut words = Vec::new();
    match build.loaded {
        Loaded::Perhaps => words.push("may be loaded".to_owned()),
        Loaded::Mapped | Loaded::AtStart => {}
    }
    if build.is_static {
        words.push("static".to_owned());
    }
    if build.stripped {
        words.push("stripped".to_owned());
    }
    if !build.devices.is_empty() {
        words.push(format!("devices: {}", build.devices.join(", ")));
    }
    match &build.build_id {
        Some(id) => words.push(format!("build id {id}")),
        None => words.push("no build id".to_owned()),
    }
    let path = printable(Path::new(&build.path));
    writeln!(out, "  {path} ({})", words.join("; "))
}

fn write_hooks(out: &mut impl Write, hooks: &[Planned]) -> fmt::Result {
    for planned in hooks {
        let probe = &planned.probe;
        let file = Path::new(&probe.file).file_name().unwrap_or_default();
        let stepped = match planned.single_stepped {
            Some(true) => ", single-stepped",
            _ => "",
        };
        writeln!(
            out,
            "  {} in {}+{:#x}: once per {}{}{stepped}",
            probe.symbol,
            printable(file.as_ref()),
            probe.definition.file_offset,
            planned.hit_per,
            if planned.on_return { ", on return" } else { "" },
        )?;
    }
    Ok(())
}

fn write_expectation(
    out: &mut impl Write,
    target: &Target,
    expectation: &Expectation,
) -> fmt::Result {
    let Expectation {
        model,
        layers,
        answer,
        routes,
        finding,
        fix,
        remedies: _,
        always_run,
    } = expectation;
    let routes = match routes.as_slice() {
        [] => String::new(),
        routes => format!(", by {}", routes.join(", ")),
    };
    let of_model = match target.models.get(*model) {
        Some(file) if target.models.len() > 1 => {
            format!(" of {}", printable(Path::new(&file.path)))
        }
        _ => String::new(),
    };
    let if_they_run = if *always_run {
        ""
    } else {
        " (if they run: they predict further tokens)"
    };
    writeln!(
        out,
        "  {:COLUMN$}{}{of_model}{if_they_run}{routes}: {finding}",
        said(*answer),
        ranges(layers)
    )?;
    match fix {
        Some(fix) => writeln!(out, "  {:COLUMN$}{fix}", "  to see them"),
        None => Ok(()),
    }
}
