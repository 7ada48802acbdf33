//! Arguments of the commands that trace.

use std::{
    ffi::{OsStr, OsString},
    num::NonZeroU32,
    os::unix::ffi::OsStrExt as _,
    path::PathBuf,
    time::Duration,
};

use anyhow::ensure;
use clap::{
    Args,
    builder::{OsStringValueParser, PossibleValuesParser, TypedValueParser as _},
};
use expert_trace_common::Route;

use crate::{
    control::Request,
    routes::{self, Routes},
};

pub(super) const EXAMPLES: &str = "\
Examples:
  Trace a program from its first instruction to its end:
    sudo expert-trace run -o stats.json -- llama-cli -m model.gguf -p \"Hello\"

  Trace a running server for half a minute; it goes on unharmed:
    sudo expert-trace attach --pid 4242 --duration 30s -o stats.json

  See the choice of every token in every layer as it is made:
    sudo expert-trace run --log -- llama-cli -m model.gguf -p \"Hello\"";

pub(super) const RUN_EXAMPLES: &str = "\
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

  Watch what is counted while the program runs:
    sudo expert-trace run --live -- llama-cli -m model.gguf -p \"Hello\"

  Run the program as somebody else:
    sudo expert-trace run --user nobody -- llama-cli -m model.gguf -p \"Hello\"

  Say by variables what is to be recorded:
    sudo LLAMA_EXPERT_TRACE_STATS=1 LLAMA_EXPERT_TRACE_OUTPUT=stats.json \\
      expert-trace run -- llama-cli -m model.gguf -p \"Hello\"";

pub(super) const RUN_VARIABLES: &str = "\
Environment:
  LLAMA_EXPERT_TRACE_STATS=1      Print the summary
  LLAMA_EXPERT_TRACE_LOGGING=1    Print one line per token and layer, as --log does
  LLAMA_EXPERT_TRACE_OUTPUT=FILE  Write the counts to this file, as -o does; needs STATS=1
  EXPERT_TRACE_LOG=debug          Say what expert-trace itself does

  None of the first three is set: the summary is printed.
  One is set, and neither STATS nor LOGGING is exactly 1: the program runs untraced.
  Options win over variables. The program gets all of them.";

pub(super) const ATTACH_EXAMPLES: &str = "\
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

pub(super) const TOP_EXAMPLES: &str = "\
Examples:
  Watch the experts of a running server:
    sudo expert-trace top --pid 4242

  The same for half a minute, and write all counts to a file:
    sudo expert-trace top --pid 4242 --duration 30s -o stats.json";

pub(super) const TOP_KEYS: &str = "\
Keys:
  arrows       Move the cursor; the line below the map tells its counts
  + - 0        Fewer or more experts in a cell; as many as fit
  s f n a      Sort by heat; prompts or generated tokens; scale; all layers
  p r w        Pause; begin to count anew; write the counts
  ? q Ctrl-C   All keys; leave; end";

pub(super) const CTL_EXAMPLES: &str = "\
Examples:
  The counts of a capture, as they are now:
    expert-trace ctl dump /run/user/1000/expert-trace -o stats.json

  Count what comes from now on:
    expert-trace ctl reset /run/user/1000/expert-trace

  End it; what it was to write is written:
    expert-trace ctl stop /run/user/1000/expert-trace";

pub(super) const DOCTOR_EXAMPLES: &str = "\
Examples:
  Can this machine trace, and may I?
    sudo expert-trace doctor

  How would a program be traced, and which layers would be seen?
    sudo expert-trace doctor -- llama-cli -m model.gguf -p \"Hello\"

  The same of a running process:
    sudo expert-trace doctor --pid 4242

  What can be probed in a program or a library, for a script?
    sudo expert-trace doctor --binary /opt/llama/libggml-cpu.so --json";

pub(super) const DOCTOR_STATUS: &str = "\
Exit status:
  0  Yes
  1  No: the lines that say `no` are followed by what it needs
  2  Could not tell: the lines that say so are followed by how to find out";

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
    /// Show what is counted as `top` does, while the program runs. What it prints to the terminal is shown
    /// afterwards, and it reads nothing from there
    #[arg(long)]
    pub live: bool,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Arguments of `top`.
#[derive(Debug, Args)]
pub struct Top {
    /// Process to show
    #[arg(short, long, value_name = "PID")]
    pub pid: NonZeroU32,
    /// Stop after this time (30s, 5m, 1h30m)
    #[arg(short, long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub duration: Option<Duration>,
    /// Choose the experts from the routers' logits, as with attach
    #[arg(long)]
    pub router_on_cpu: bool,
    /// How to record.
    #[command(flatten)]
    pub recording: Recording,
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

/// Arguments of `ctl`.
#[derive(Debug, Args)]
pub struct Ctl {
    /// What to ask for
    #[arg(value_name = "REQUEST", value_enum)]
    pub request: Request,
    /// The SOCKET of run or attach --control
    #[arg(value_name = "SOCKET")]
    pub socket: PathBuf,
    /// File for what `dump` gives; - is stdout
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    pub output: PathBuf,
}

/// What `run` and `attach` have in common.
#[derive(Clone, Debug, Args)]
pub struct Recording {
    /// Write the counts to this file as JSON. %p in its name, and in that of --log, is the process, %% a
    /// percent sign; with attach, - is stdout. SIGUSR1 to expert-trace has it written as it is now
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
    /// Record the router's weight of each chosen expert in the trace, too, where it can be read: where the
    /// CPU gathers it
    #[arg(long, requires = "trace")]
    pub weights: bool,
    /// Go on in another file when the trace's has this size (1G) or this age (10m); each has a number
    /// before the extension of its name
    #[arg(long, value_name = "SIZE|TIME", requires = "trace", value_parser = rotation)]
    pub rotate: Option<Rotation>,
    /// Let `ctl` ask the capture by a Unix socket of this name, which only its owner and root can use. %p
    /// and %% as in --output
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
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
