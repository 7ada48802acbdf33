//! The command line: definitions and help, no logic.

#[cfg(can_trace)]
mod tracing;

use std::{
    io::{self, Write},
    path::PathBuf,
};

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;

#[cfg(can_trace)]
pub use self::tracing::{Attach, Ctl, Doctor, Recording, Rotation, Run, Top};
use crate::{
    analyze::budget::Budget,
    formats::{Format, ImportFormat},
    report::ReportFormat,
};

#[cfg(can_trace)]
use self::tracing::EXAMPLES;
#[cfg(not(can_trace))]
const EXAMPLES: &str = "\
Examples:
  A table of every routed token, for DuckDB, Polars or pandas:
    expert-trace export trace.arrows --format parquet -o trace.parquet

  In which layers do two workloads use other experts?
    expert-trace diff chat.json code.json";

/// Why there are no commands that trace.
#[cfg(not(can_trace))]
pub const CANNOT_TRACE: &str = "this build cannot trace, and has no run, attach, doctor and ctl: it is for \
                                another system than Linux, or was built without the feature `capture`; \
                                trace on Linux, and read the files here";

const MERGE_EXAMPLES: &str = "\
Examples:
  Add up what ten runs of a model have counted:
    expert-trace merge run-*.json -o merged.json

  Add another one later:
    expert-trace merge merged.json another.json -o merged.json";

const DIFF_EXAMPLES: &str = "\
Examples:
  In which layers do two workloads use other experts?
    expert-trace diff chat.json code.json

  List the ten experts of each layer whose share differs most:
    expert-trace diff --top 10 chat.json code.json

  Compare two contexts of one file, for a script:
    expert-trace diff --context-a 0 --context-b 1 --json chat.json chat.json";

const DIFF_STATUS: &str = "\
Exit status:
  0  They were compared, be they equal or not
  1  They could not be compared";

const VERIFY_EXAMPLES: &str = "\
Examples:
  Has a trace of llama-imatrix the counts that llama-imatrix has written?
    expert-trace verify stats.json imatrix.gguf

  The same for a script:
    expert-trace verify --json stats.json imatrix.gguf";

const VERIFY_STATUS: &str = "\
Exit status:
  0  Every expert of every layer has the same count in both
  1  They differ: the lines after the table say what can be the reason
  2  They could not be compared";

const ANALYZE_EXAMPLES: &str = "\
Examples:
  Would a cache of experts pay, and how large must it be?
    expert-trace analyze trace.arrows

  Hits of caches of 500 MiB and 4 GiB, for a script:
    expert-trace analyze trace.arrows --json --budgets 500,4000

  A trace that does not say how many bytes an expert takes:
    expert-trace analyze trace.arrows --model model.gguf

  What counts alone tell:
    expert-trace analyze stats.json";

const ANALYZE_NOTES: &str = "\
Time, pairs of experts and caches need a trace, or a route_trace of BigMoeOnEdge; balance and a static pin \
are also told of statistics (run -o) and profiles. A question that the file does not answer is listed \
with the reason.

Exit status:
  0  Done
  1  Something could not be read or written";

const EXPORT_EXAMPLES: &str = "\
Examples:
  A table of every routed token, for DuckDB, Polars or pandas:
    expert-trace export trace.arrows --format parquet -o trace.parquet

  Layer and expert of every activation, on stdout:
    expert-trace export trace.arrows --format csv -o - | sort | uniq -c

  The statistics of a capture that has recorded a trace alone:
    expert-trace export trace.arrows --format json -o counts.json

  Counts for NumPy, of the context with most tokens:
    expert-trace export stats.json --format npy -o counts.npy";

const EXPORT_NOTES: &str = "\
json, csv, turbospark, imatrix-counts and npy are also made of statistics (run -o) and profiles; \
the others need a trace. json, jsonl and parquet have all contexts, the others one. What a format does not \
hold of what is there is said on stderr.

Exit status:
  0  Done; of a trace that was cut, all that is there
  1  Something could not be read or written; of a damaged trace, all before is exported";

const IMPORT_EXAMPLES: &str = "\
Examples:
  A trace of a route_trace of BigMoeOnEdge:
    expert-trace import route.csv --format route-trace -o trace.arrows

  Counts of llama-imatrix, to be compared with others:
    expert-trace import imatrix.gguf --format imatrix -o counts.json

  Counts of lines `layer,expert`, of a model that uses 8 experts per token:
    expert-trace import moe.csv --format csv --k 8 -o counts.json";

const REPORT_EXAMPLES: &str = "\
Examples:
  A page to look at, of all that a trace tells:
    expert-trace report trace.arrows -o report.html

  The same of counts:
    expert-trace report stats.json -o report.html

  The heat map of layers and experts as a picture:
    expert-trace report stats.json --format png -o heat-map.png";

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  Bash, in this shell (or as a line of ~/.bashrc):
    source <(expert-trace completions bash)

  Zsh, with the file put into a directory of $fpath:
    expert-trace completions zsh > _expert-trace

  Fish:
    expert-trace completions fish > ~/.config/fish/completions/expert-trace.fish";

/// Shows which experts a Mixture-of-Experts model really uses, by tracing an unmodified llama.cpp.
#[derive(Debug, Parser)]
#[command(version, before_help = EXAMPLES, arg_required_else_help = true)]
#[cfg_attr(not(can_trace), command(after_help = CANNOT_TRACE))]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a program and trace it from its first instruction to its end
    #[cfg(can_trace)]
    #[command(before_help = tracing::RUN_EXAMPLES, after_help = tracing::RUN_VARIABLES)]
    Run(Run),
    /// Trace a running process until Ctrl-C, --duration, or its end; it goes on unharmed
    #[cfg(can_trace)]
    #[command(before_help = tracing::ATTACH_EXAMPLES)]
    Attach(Attach),
    /// Watch a running process: which experts are hot in which layers, as it is counted
    #[cfg(can_trace)]
    #[command(before_help = tracing::TOP_EXAMPLES, after_help = tracing::TOP_KEYS)]
    Top(Top),
    /// Say whether it would work, with which probes, and what would be seen; nothing is started or traced,
    /// but for a look of a second at the eval callback of --pid
    #[cfg(can_trace)]
    #[command(before_help = tracing::DOCTOR_EXAMPLES, after_help = tracing::DOCTOR_STATUS)]
    Doctor(Doctor),
    /// Ask a capture that goes on for its counts, or have it begin anew, or end
    #[cfg(can_trace)]
    #[command(before_help = tracing::CTL_EXAMPLES)]
    Ctl(Ctl),
    /// What this build has not
    #[cfg(not(can_trace))]
    #[command(name = "run", aliases = ["attach", "top", "doctor", "ctl"], hide = true, disable_help_flag = true)]
    CannotTrace(CannotTrace),
    /// Add up the counts of several runs of a model; their contexts stay apart beside the sum
    #[command(before_help = MERGE_EXAMPLES)]
    Merge(Merge),
    /// Say how two files differ: by layer, which experts they use, and how much
    #[command(before_help = DIFF_EXAMPLES, after_help = DIFF_STATUS)]
    Diff(Diff),
    /// Compare counts with those that llama-imatrix made itself in the same run
    #[command(before_help = VERIFY_EXAMPLES, after_help = VERIFY_STATUS)]
    Verify(Verify),
    /// Say whether caching, pinning or splitting experts pays on what was traced, and how evenly experts
    /// are used
    #[command(before_help = ANALYZE_EXAMPLES, after_help = ANALYZE_NOTES)]
    Analyze(Analyze),
    /// Make a page, or a picture, of what was traced, to look at
    #[command(before_help = REPORT_EXAMPLES)]
    Report(Report),
    /// Write a trace, or counts, in a format that others read
    #[command(before_help = EXPORT_EXAMPLES, after_help = EXPORT_NOTES)]
    Export(Export),
    /// Make a trace, or counts, of what others have written
    #[command(before_help = IMPORT_EXAMPLES)]
    Import(Import),
    /// Print a script that completes expert-trace's arguments in a shell
    #[command(before_help = COMPLETIONS_EXAMPLES)]
    Completions(Completions),
}

/// Arguments of a command that this build has not: any.
#[cfg(not(can_trace))]
#[derive(Debug, Args)]
pub struct CannotTrace {
    /// They are not looked at
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub arguments: Vec<std::ffi::OsString>,
}

/// Arguments of `merge`.
#[derive(Debug, Args)]
pub struct Merge {
    /// Statistics (-o), profiles (of an earlier merge), traces (--trace)
    #[arg(value_name = "FILE", required = true)]
    pub inputs: Vec<PathBuf>,
    /// Write the profile to this file; - is stdout
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
}

/// Arguments of `diff`.
#[derive(Debug, Args)]
pub struct Diff {
    /// Statistics (-o), a profile (merge), or a trace (--trace)
    #[arg(value_name = "A")]
    pub a: PathBuf,
    /// What to compare it with: a file of any of these kinds
    #[arg(value_name = "B")]
    pub b: PathBuf,
    /// Context of A (default: its main one, or the sum if it was merged)
    #[arg(long, value_name = "N")]
    pub context_a: Option<usize>,
    /// Context of B (default: its main one, or the sum if it was merged)
    #[arg(long, value_name = "N")]
    pub context_b: Option<usize>,
    /// Hot experts are the fewest that have so much of the activations, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 80, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub hot: u8,
    /// List at most so many experts per layer whose share differs
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub top: usize,
    /// Write the answer as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `verify`.
#[derive(Debug, Args)]
pub struct Verify {
    /// Statistics (-o), a profile (merge), or a trace (--trace)
    #[arg(value_name = "STATS")]
    pub stats: PathBuf,
    /// What llama-imatrix has written, as GGUF
    #[arg(value_name = "IMATRIX")]
    pub imatrix: PathBuf,
    /// Context to compare (default: the main one, or the sum if STATS was merged)
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// Write the answer as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `analyze`.
#[derive(Debug, Args)]
pub struct Analyze {
    /// A trace (--trace), a route_trace, statistics (-o) or a profile (merge)
    #[arg(value_name = "FILE")]
    pub input: PathBuf,
    /// Write the answers as JSON
    #[arg(long)]
    pub json: bool,
    /// Sizes of the caches to try, in MiB (default: from 1/16 to 14/16 of all experts)
    #[arg(long, value_name = "MIB", value_delimiter = ',')]
    pub budgets: Vec<Budget>,
    /// The model's file (GGUF), for the bytes that an expert takes where FILE does not tell
    #[arg(long, value_name = "GGUF")]
    pub model: Option<PathBuf>,
    /// Context to analyze (default: the one that routed most tokens)
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// Simulate caches with the first N activations; LRU for all budgets, and all other answers, are always
    /// of all
    #[arg(long, value_name = "N", default_value_t = 20_000_000, value_parser = sample)]
    pub sample: usize,
    /// Seed of the random cache
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

fn sample(text: &str) -> Result<usize, String> {
    // Places of lookups are numbers of 32 bits.
    let number = text
        .parse()
        .ok()
        .filter(|n| (1..=1_000_000_000).contains(n));
    number.ok_or_else(|| "name a number from 1 to 1000000000".to_owned())
}

/// Arguments of `report`.
#[derive(Debug, Args)]
pub struct Report {
    /// A trace (--trace), a route_trace, statistics (-o) or a profile (merge)
    #[arg(value_name = "FILE")]
    pub input: PathBuf,
    /// File to write; it appears when it is complete. - is stdout
    #[arg(short, long, value_name = "OUT")]
    pub output: PathBuf,
    /// What to write: a page with everything in it, or the heat map alone
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value = "html")]
    pub format: ReportFormat,
    /// The model's file (GGUF), for the bytes that an expert takes where FILE does not tell
    #[arg(long, value_name = "GGUF")]
    pub model: Option<PathBuf>,
    /// Context to show (default: the one that routed most tokens)
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// Open it with the program that the desktop has for it
    #[arg(long)]
    pub open: bool,
}

/// Arguments of `export`.
#[derive(Debug, Args)]
pub struct Export {
    /// A trace, statistics or a profile
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// Format to write
    #[arg(short, long, value_name = "FORMAT", value_enum)]
    pub format: Format,
    /// File to write; it appears when it is complete. - is stdout, for formats that are text
    #[arg(short, long, value_name = "OUT")]
    pub output: PathBuf,
    /// Context to export, for formats that hold one (default: the one that routed most tokens)
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
}

/// Arguments of `import`.
#[derive(Debug, Args)]
pub struct Import {
    /// A file that another program has written
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// Its format
    #[arg(short, long, value_name = "FORMAT", value_enum)]
    pub format: ImportFormat,
    /// File to write; it appears when it is complete. - is stdout, for counts
    #[arg(short, long, value_name = "OUT")]
    pub output: PathBuf,
    /// Experts per token, where the file does not tell: tokens are counted by it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub k: Option<u32>,
}

/// Arguments of `completions`.
#[derive(Debug, Args)]
pub struct Completions {
    /// Shell to write for
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

impl Completions {
    /// Writes the script.
    ///
    /// # Errors
    /// When `out` cannot be written.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        // The generator panics where it cannot write.
        let mut script = Vec::new();
        let mut command = Cli::command();
        let name = command.get_name().to_owned();
        clap_complete::generate(self.shell, &mut command, name, &mut script);
        // For a program with a hyphen in its name, clap_complete 4.6.11 calls subcommands in its bash
        // script by two names, and never finds them (https://github.com/clap-rs/clap/issues/6421).
        let script = String::from_utf8(script).map_err(io::Error::other)?;
        let script = script.replace("expert__subcmd__trace", "expert__trace");
        out.write_all(script.as_bytes())?;
        out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_are_consistent() {
        Cli::command().debug_assert();
    }
}
