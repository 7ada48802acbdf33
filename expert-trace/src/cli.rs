//! The command line: definitions and help, no logic.

use std::{
    ffi::{OsStr, OsString},
    io::{self, Write},
    num::NonZeroU32,
    os::unix::ffi::OsStrExt as _,
    path::PathBuf,
    time::Duration,
};

use anyhow::ensure;
use clap::{
    Args, CommandFactory as _, Parser, Subcommand,
    builder::{OsStringValueParser, PossibleValuesParser, TypedValueParser as _},
};
use clap_complete::Shell;
use expert_trace_common::Route;

use crate::{
    formats::{Format, ImportFormat},
    routes::{self, Routes},
};

const EXAMPLES: &str = "\
Examples:
  Trace a program from its first instruction to its end:
    sudo expert-trace run -o stats.json -- llama-cli -m model.gguf -p \"Hello\"

  Trace a running server for half a minute; it goes on unharmed:
    sudo expert-trace attach --pid 4242 --duration 30s -o stats.json

  See the choice of every token in every layer as it is made:
    sudo expert-trace run --log -- llama-cli -m model.gguf -p \"Hello\"";

const RUN_EXAMPLES: &str = "\
Examples:
  Write all counts to a file:
    sudo expert-trace run -o stats.json -- llama-cli -m model.gguf -p \"Hello\"

  Print the five experts of each layer that were chosen most:
    sudo expert-trace run --top 5 -- llama-cli -m model.gguf -f prompt.txt

  Write the choice of every token in every layer to a file:
    sudo expert-trace run --log=routes.log -- llama-cli -m model.gguf -p \"Hello\"

  Let a script notice that something was lost:
    sudo expert-trace run --strict -- llama-cli -m model.gguf -p \"Hello\"

  Set a variable of the program, which sudo would remove from the environment:
    sudo expert-trace run --env OMP_NUM_THREADS=4 -- ./start.sh

  Trace the program's first process alone:
    sudo expert-trace run --no-follow -- ./start.sh

  See the routing of a model that is fully on a GPU:
    sudo expert-trace run --router-on-cpu -- llama-cli -m model.gguf -p \"Hello\"

  Record every token's experts in every layer:
    sudo expert-trace run --trace routes.arrows -- \\
      llama-cli -m model.gguf -p \"Hello\"

  Run the program as somebody else:
    sudo expert-trace run --user nobody -- llama-cli -m model.gguf -p \"Hello\"

  Say by variables what is to be recorded:
    sudo LLAMA_EXPERT_TRACE_STATS=1 LLAMA_EXPERT_TRACE_OUTPUT=stats.json \\
      expert-trace run -- llama-cli -m model.gguf -p \"Hello\"";

const RUN_VARIABLES: &str = "\
Environment:
  LLAMA_EXPERT_TRACE_STATS=1      Print the summary
  LLAMA_EXPERT_TRACE_LOGGING=1    Print one line per token and layer, as --log does
  LLAMA_EXPERT_TRACE_OUTPUT=FILE  Write the counts to this file, as -o does; needs STATS=1
  EXPERT_TRACE_LOG=debug          Say what expert-trace itself does

  None of the first three is set: the summary is printed.
  One is set, and neither STATS nor LOGGING is exactly 1: the program runs untraced.
  Options win over variables. The program gets all of them.";

const ATTACH_EXAMPLES: &str = "\
Examples:
  Trace a process until Ctrl-C:
    sudo expert-trace attach --pid 4242

  Trace a server for half a minute, and write all counts to a file:
    sudo expert-trace attach -p $(pidof llama-server) -d 30s -o stats.json

  Write the choice of every token in every layer to a file:
    sudo expert-trace attach --pid 4242 --log=routes.log --duration 30s

  Record every token's experts of a server, an hour in each file:
    sudo expert-trace attach --pid 4242 --trace routes.arrows --rotate 1h

  Trace every process that uses a library, and write a file for each:
    sudo expert-trace attach --all --library bin/libggml-cpu.so -d 30s \\
      -o stats-%p.json";

const DOCTOR_EXAMPLES: &str = "\
Examples:
  Can this machine trace, and may I?
    sudo expert-trace doctor

  How would a program be traced, and which layers would be seen?
    sudo expert-trace doctor -- llama-cli -m model.gguf -p \"Hello\"

  The same of a running process:
    sudo expert-trace doctor --pid 4242

  What can be probed in a program or a library, for a script?
    sudo expert-trace doctor --binary /opt/llama/libggml-cpu.so --json";

const DOCTOR_STATUS: &str = "\
Exit status:
  0  Yes
  1  No: the lines that say `no` are followed by what it needs
  2  Could not tell: the lines that say so are followed by how to find out";

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
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a program and trace it from its first instruction to its end
    #[command(before_help = RUN_EXAMPLES, after_help = RUN_VARIABLES)]
    Run(Run),
    /// Trace a running process until Ctrl-C, --duration, or its end; it goes on unharmed
    #[command(before_help = ATTACH_EXAMPLES)]
    Attach(Attach),
    /// Say whether it would work, with which probes, and what would be seen; nothing is started or traced,
    /// but for a look of a second at the eval callback of --pid
    #[command(before_help = DOCTOR_EXAMPLES, after_help = DOCTOR_STATUS)]
    Doctor(Doctor),
    /// Add up the counts of several runs of a model; their contexts stay apart beside the sum
    #[command(before_help = MERGE_EXAMPLES)]
    Merge(Merge),
    /// Say how two files differ: by layer, which experts they use, and how much
    #[command(before_help = DIFF_EXAMPLES, after_help = DIFF_STATUS)]
    Diff(Diff),
    /// Compare counts with those that llama-imatrix made itself in the same run
    #[command(before_help = VERIFY_EXAMPLES, after_help = VERIFY_STATUS)]
    Verify(Verify),
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

/// Arguments of `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// How to record.
    #[command(flatten)]
    pub recording: Recording,
    /// Run the program as this user (default: who called sudo, else who calls)
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
    /// Set a variable of the program's environment; can be given several times
    #[arg(long = "env", value_name = "K=V", value_parser = OsStringValueParser::new().try_map(variable))]
    pub variables: Vec<(OsString, OsString)>,
    /// Trace the program's first process alone, not those it forks
    #[arg(long)]
    pub no_follow: bool,
    /// Have the program compute the routers' logits on the CPU, and choose the experts from those: for
    /// models that are fully on a GPU. Adds options to its command line, and makes it slower
    #[arg(long)]
    pub router_on_cpu: bool,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Arguments of `attach`.
#[derive(Debug, Args)]
pub struct Attach {
    /// Process to trace
    #[arg(
        short,
        long,
        value_name = "PID",
        required_unless_present = "all",
        conflicts_with = "all"
    )]
    pub pid: Option<NonZeroU32>,
    /// Trace every process that maps the library now, each on its own; none that maps it later
    #[arg(long, requires = "library")]
    pub all: bool,
    /// File that the processes of --all map: libggml-cpu.so, or a program that has it built in. Any name
    /// of it will do, also one that leads into a container (/proc/PID/root/...)
    #[arg(long, value_name = "PATH", requires = "all")]
    pub library: Option<PathBuf>,
    /// Stop after this time (30s, 5m, 1h30m)
    #[arg(short, long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub duration: Option<Duration>,
    /// Choose the experts from the routers' logits, of a process that computes those on the CPU (assumed
    /// when its --override-tensor names ffn_gate_inp)
    #[arg(long)]
    pub router_on_cpu: bool,
    /// How to record.
    #[command(flatten)]
    pub recording: Recording,
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub struct Doctor {
    /// A process, as attach would trace it
    #[arg(short, long, value_name = "PID", conflicts_with_all = ["binary", "command"])]
    pub pid: Option<NonZeroU32>,
    /// A program or a library
    #[arg(long, value_name = "PATH", conflicts_with = "command")]
    pub binary: Option<PathBuf>,
    /// Write the answer as JSON
    #[arg(long)]
    pub json: bool,
    /// A program and its arguments, as run would start it
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
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

/// What `run` and `attach` have in common.
#[derive(Clone, Debug, Args)]
pub struct Recording {
    /// Write the counts to this file as JSON. %p in its name, and in that of --log, is the process, %% a
    /// percent sign; with attach, - is stdout
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Print one line per token and layer, to stderr or to a file
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    pub log: Option<Option<PathBuf>>,
    /// Record every routed token of every layer in this file, as an Arrow IPC stream. %p and %% as in
    /// --output
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Record token ids in the trace, too: whoever has them can read the text
    #[arg(long, requires = "trace")]
    pub tokens: bool,
    /// Go on in another file when the trace's has this size (1G) or this age (10m); each has a number
    /// before the extension of its name
    #[arg(long, value_name = "SIZE|TIME", requires = "trace", value_parser = rotation)]
    pub rotate: Option<Rotation>,
    /// List at most so many experts per layer in the summary
    #[arg(long, value_name = "N")]
    pub top: Option<usize>,
    /// Exit with status 3 when the program succeeded but the capture is incomplete. Processes that --all
    /// may not look at do not count
    #[arg(long)]
    pub strict: bool,
    /// Say what would be traced, and how, as doctor does; start and trace nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Count warm-up passes too
    #[arg(long)]
    pub include_warmup: bool,
    /// Read routing in these ways alone, separated by commas (default: all that apply)
    #[arg(
        long = "routes",
        value_name = "ROUTE",
        value_delimiter = ',',
        value_parser = PossibleValuesParser::new(Route::ALL.map(routes::name))
            .try_map(|name| routes::of_name(&name).ok_or("no such route"))
    )]
    pub routes: Vec<Route>,
    /// Size of the kernel's ring buffer (K, M, G; rounded up to a power of two) [default: 8M, or 64M
    /// with routers on the CPU]
    #[arg(long, value_name = "BYTES", value_parser = ring_buffer_bytes)]
    pub buffer_size: Option<u32>,
}

/// When a trace goes on in another file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// The file has so many bytes.
    Bytes(u64),
    /// The file was begun so long ago.
    Age(Duration),
}

impl Recording {
    /// Ways to read routing; `logits` tells whether the target computes router logits on the CPU, and
    /// `asked` whether it does so for us.
    ///
    /// # Errors
    /// When nothing is left to read, or what the target does for us is not read.
    pub fn routes(&self, logits: bool, asked: bool) -> anyhow::Result<Routes> {
        ensure!(
            !asked || self.routes.is_empty() || self.routes.contains(&Route::Logits),
            "--routes leaves out what --router-on-cpu is for: add logits to it"
        );
        let routes = Routes::asked_for(&self.routes, logits);
        ensure!(
            routes.iter().next().is_some(),
            "--routes=logits needs a program that computes router logits on the CPU: add \
             --router-on-cpu"
        );
        Ok(routes)
    }

    /// Size of the ring buffer, in bytes. Logits come in rows of all experts.
    pub fn ring_bytes(&self, reads_logits: bool) -> u32 {
        let default = if reads_logits { 64 << 20 } else { 8 << 20 };
        self.buffer_size.unwrap_or(default)
    }
}

fn variable(text: OsString) -> Result<(OsString, OsString), &'static str> {
    let bytes = text.as_bytes();
    match bytes.iter().position(|byte| *byte == b'=') {
        Some(end @ 1..) => Ok((
            OsStr::from_bytes(&bytes[..end]).into(),
            OsStr::from_bytes(&bytes[end + 1..]).into(),
        )),
        _ => Err("a name and a value are needed, such as OMP_NUM_THREADS=4"),
    }
}

/// Largest ring buffer: larger powers of two do not fit the kernel's interface.
const MAX_RING: u64 = 1 << 31;

/// A size with a unit of K, M or G, by powers of two.
fn bytes(text: &str) -> Option<u64> {
    let (digits, unit) = match text
        .trim_end_matches(['B', 'i'])
        .strip_suffix(['K', 'M', 'G'])
    {
        Some(digits) => (digits, text.as_bytes()[digits.len()]),
        None => (text, b' '),
    };
    let factor: u64 = match unit {
        b'K' => 1 << 10,
        b'M' => 1 << 20,
        b'G' => 1 << 30,
        _ => 1,
    };
    let bytes = digits.parse::<u64>().ok()?.checked_mul(factor)?;
    (bytes > 0).then_some(bytes)
}

fn rotation(text: &str) -> Result<Rotation, &'static str> {
    // M is a month elsewhere.
    let age = || humantime::parse_duration(text).ok().map(Rotation::Age);
    bytes(text)
        .filter(|_| !text.ends_with(|c: char| c.is_ascii_digit()))
        .map(Rotation::Bytes)
        .or_else(age)
        .filter(|rotation| *rotation != Rotation::Age(Duration::ZERO))
        .ok_or("a size with K, M or G is needed, such as 1G, or a time, such as 10m")
}

fn ring_buffer_bytes(text: &str) -> Result<u32, String> {
    let page = u64::try_from(
        nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
            .ok()
            .flatten()
            .unwrap_or(4096),
    )
    .unwrap_or(4096);
    let bytes = bytes(text)
        .filter(|bytes| *bytes <= MAX_RING)
        .ok_or_else(|| format!("a size up to {}G is needed, such as 8M", MAX_RING >> 30))?;
    u32::try_from(bytes.max(page).next_power_of_two()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn variables() {
        let pair = |name: &str, value: &str| Ok((name.into(), value.into()));
        assert_eq!(variable("A=b=c".into()), pair("A", "b=c"));
        assert_eq!(variable("A=".into()), pair("A", ""));
        for text in ["", "A", "=b"] {
            assert!(variable(text.into()).is_err(), "{text}");
        }
    }

    #[test]
    fn rotations() {
        let minutes = |minutes: u64| Ok(Rotation::Age(Duration::from_secs(60 * minutes)));
        assert_eq!(rotation("1G"), Ok(Rotation::Bytes(1 << 30)));
        assert_eq!(rotation("512KiB"), Ok(Rotation::Bytes(512 << 10)));
        assert_eq!(rotation("10M"), Ok(Rotation::Bytes(10 << 20)));
        assert_eq!(rotation("10m"), minutes(10));
        assert_eq!(rotation("1h30m"), minutes(90));
        for text in ["", "10", "0G", "0s", "G", "soon"] {
            assert!(rotation(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ring_buffer_sizes() {
        assert_eq!(ring_buffer_bytes("8M"), Ok(8 << 20));
        assert_eq!(ring_buffer_bytes("3MiB"), Ok(4 << 20));
        assert_eq!(ring_buffer_bytes("2G"), Ok(1 << 31));
        assert_eq!(ring_buffer_bytes("1"), ring_buffer_bytes("4K"));
        for text in ["", "0", "M", "-1", "3G", "99999999999999999999", "8X"] {
            assert!(ring_buffer_bytes(text).is_err(), "{text}");
        }
    }
}
