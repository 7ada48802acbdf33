//! `report`, as it is called.

use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};
use serde::Deserialize as _;

use super::{
    Content, HeatMap, ReportFormat,
    facts::{Document, Facts},
    page, png, svg,
};
use crate::{
    analyze::{Analysis, cache, input},
    cli::Report,
    output::Output,
    profile::printable,
};

/// Activations that caches are simulated with: some seconds.
const SAMPLE: usize = 20_000_000;

/// Longest document whose facts are looked at, in bytes.
const MAX_DOCUMENT: u64 = 256 << 20;

/// Writes a report of a file.
///
/// # Errors
/// When the file cannot be read, or the report not be written.
pub fn run(arguments: &Report) -> anyhow::Result<u8> {
    let Report {
        input: path,
        output,
        format,
        model,
        context,
        open,
    } = arguments;
    ensure!(
        !open || *output != Path::new("-"),
        "--open needs a file: name one with -o"
    );
    let out = Output::create(output, Some(path))?;
    let read = input::read(path, *context, model.as_deref())?;
    for note in &read.notes {
        say!("{note}");
    }
    let options = cache::Options {
        budgets: Vec::new(),
        sample: SAMPLE,
        seed: 1,
    };
    let file = printable(&path.to_string_lossy());
    let content = |analysis| Content::new(file.clone(), &read, analysis, facts(path, &read));
    match format {
        ReportFormat::Html => {
            let analysis = Analysis::of(&file, &read, &options, &mut |_, _, _| {});
            out.write(|out| page::write(&content(analysis), out))?;
        }
        ReportFormat::Png | ReportFormat::Svg => {
            let layers = read.context.layers.iter().map(super::LayerContent::of);
            let map = HeatMap::of(&layers.collect::<Vec<_>>());
            out.write(|out| match format {
                ReportFormat::Png => png::write(&map, out),
                _ => Ok(out.write_all(svg::text(&map).as_bytes())?),
            })?;
        }
    }
    if *open {
        show(output)?;
    }
    Ok(0)
}

/// What the file says of its capture. One that says nothing, or is no document, has none.
fn facts(path: &Path, read: &input::Input) -> Facts {
    let document = match &read.summary {
        Some(summary) => Document::deserialize(summary).ok(),
        None => of_statistics(path),
    };
    document.map(Facts::of).unwrap_or_default()
}

fn of_statistics(path: &Path) -> Option<Document> {
    let file = File::open(path).ok()?;
    if file.metadata().ok()?.len() > MAX_DOCUMENT {
        return None;
    }
    let mut file = BufReader::new(file);
    let is_json = file.fill_buf().ok()?.trim_ascii_start().starts_with(b"{");
    is_json.then(|| serde_json::from_reader(file).ok())?
}

/// Has the system show a file.
fn show(path: &Path) -> anyhow::Result<()> {
    let mut command = match std::env::consts::OS {
        "macos" => Command::new("open"),
        "windows" => Command::new("explorer"),
        _ => Command::new("xdg-open"),
    };
    let program = command.get_program().to_string_lossy().into_owned();
    let shown = printable(&path.to_string_lossy());
    let status = command.arg(path).stdin(Stdio::null()).status();
    let failed =
        || format!("{shown} is written; to open it, {program} is needed: open it yourself");
    let status = status.with_context(failed)?;
    // explorer's status tells nothing.
    ensure!(
        status.success() || program == "explorer",
        "{shown} is written; {program} could not open it ({status}): open it yourself"
    );
    Ok(())
}
