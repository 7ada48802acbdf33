//! `analyze`, as it is called: a file in, answers out.

use crate::{cli, formats::progress::Progress, output, profile::printable};

use super::{Analysis, Stage, cache, input};

/// Analyzes a file, and writes the answers.
///
/// # Errors
/// When a file cannot be read, or the answers not be written.
pub fn run(arguments: &cli::Analyze) -> anyhow::Result<u8> {
    let cli::Analyze {
        input: path,
        json,
        budgets,
        model,
        context,
        sample,
        seed,
    } = arguments;
    let read = input::read(path, *context, model.as_deref())?;
    for note in &read.notes {
        say!("{note}");
    }
    let options = cache::Options {
        budgets: budgets.iter().map(|budget| budget.bytes()).collect(),
        sample: *sample,
        seed: *seed,
    };
    let mut shown: Option<(Stage, Progress)> = None;
    let mut progress = |stage: Stage, done: u64, total: u64| {
        if shown.as_ref().is_none_or(|(of, _)| *of != stage) {
            shown = Some((stage, Progress::of_work(stage.name(), total)));
        }
        if let Some((_, progress)) = &mut shown {
            progress.update(done);
        }
    };
    let file = printable(&path.to_string_lossy());
    let analysis = Analysis::of(&file, &read, &options, &mut progress);
    drop(shown);
    output::print(&match json {
        true => {
            let mut json = serde_json::to_vec_pretty(&analysis)?;
            json.push(b'\n');
            json
        }
        false => format!("{analysis:#?}\n").into_bytes(),
    })?;
    Ok(0)
}
