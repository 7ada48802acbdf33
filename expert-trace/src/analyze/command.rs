//! `analyze`, as it is called: a file in, answers out.

use std::time::Instant;

use crate::{cli, formats::progress::Progress, output, profile::printable};

use super::{Analysis, Cost, Stage, cache, input};

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
    let mut clock = Clock::default();
    let file = printable(&path.to_string_lossy());
    let mut analysis = Analysis::of(&file, &read, &options, &mut |stage, done, total| {
        clock.update(stage, done, total);
    });
    analysis.cost = clock.end();
    output::print(&match json {
        true => {
            let mut json = serde_json::to_vec_pretty(&analysis)?;
            json.push(b'\n');
            json
        }
        false => analysis.to_text().into_bytes(),
    })?;
    Ok(0)
}

/// Shows how far the work is, and takes its time.
#[derive(Default)]
struct Clock {
    stage: Option<(Stage, Instant, Progress)>,
    costs: Vec<Cost>,
}

impl Clock {
    fn update(&mut self, stage: Stage, done: u64, total: u64) {
        if self.stage.as_ref().is_none_or(|(of, _, _)| *of != stage) {
            self.finish();
            let progress = Progress::of_work(stage.name(), total);
            self.stage = Some((stage, Instant::now(), progress));
        }
        if let Some((_, _, progress)) = &mut self.stage {
            progress.update(done);
        }
    }

    fn finish(&mut self) {
        if let Some((stage, began, _)) = self.stage.take() {
            self.costs.push(Cost {
                work: stage.name(),
                seconds: began.elapsed().as_secs_f64(),
            });
        }
    }

    fn end(mut self) -> Vec<Cost> {
        self.finish();
        self.costs
    }
}
