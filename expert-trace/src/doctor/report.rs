//! What is told: checks with one of three answers, and the plan of a target. Plain values.

use serde::{Serialize, ser::Serializer};

use super::{
    callback::Callbacks,
    coverage::{Expectation, RouteReport},
};
use crate::{
    layout::Layout,
    probes::{Load, Probe},
    stats::{ModelFile, Schema, Tool},
};

/// Name in `schema.name`.
pub const SCHEMA_NAME: &str = "expert-trace-doctor";
/// Raised when a key changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

/// Whether something is as tracing needs it. The worst of several answers is the largest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is.
    Yes,
    /// From here, now, or without running the target, this cannot be known.
    CouldNotTell,
    /// It is not.
    No,
}

impl Answer {
    /// The worst of them; yes when there is none.
    pub fn worst(answers: impl IntoIterator<Item = Answer>) -> Answer {
        answers.into_iter().max().unwrap_or(Answer::Yes)
    }

    /// Exit status that tells it.
    pub fn exit_status(self) -> u8 {
        match self {
            Answer::Yes => 0,
            Answer::No => 1,
            Answer::CouldNotTell => 2,
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Its name.
    pub check: &'static str,
    /// Whether it is as needed.
    pub answer: Answer,
    /// What was found.
    pub finding: String,
    /// A command, an option or a change that mends it, or that finds out; none where all is well.
    pub fix: Option<String>,
}

impl Check {
    /// All is well.
    pub fn yes(check: &'static str, finding: impl Into<String>) -> Self {
        Self {
            check,
            answer: Answer::Yes,
            finding: finding.into(),
            fix: None,
        }
    }

    /// It is not as needed.
    pub fn no(check: &'static str, finding: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            check,
            answer: Answer::No,
            finding: finding.into(),
            fix: Some(fix.into()),
        }
    }

    /// It cannot be known, but by what `fix` names.
    pub fn could_not_tell(
        check: &'static str,
        finding: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            check,
            answer: Answer::CouldNotTell,
            finding: finding.into(),
            fix: Some(fix.into()),
        }
    }
}

/// All that `doctor` and `--dry-run` tell.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Which document this is.
    pub schema: Schema,
    /// Who made it.
    pub tool: Tool,
    /// The worst answer of all checks.
    pub answer: Answer,
    /// The machine.
    pub machine: Machine,
    /// What was looked at, in the order in which tracing needs it.
    pub checks: Vec<Check>,
    /// What would be traced; none when no target was named, or it was not found.
    pub target: Option<Target>,
}

/// The machine.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// Release of the running kernel.
    pub kernel: String,
    /// Architecture, as Rust names it.
    pub architecture: &'static str,
    /// What a hit cost in our own process; none when no probe could be set.
    pub hit_ns: Option<HitCosts>,
}

/// Measured nanoseconds of one hit of a probe in our own process, above a call without a probe. The
/// entry probes' program writes one small record, the return probe's none.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct HitCosts {
    /// On an entry that most compilers write, such as `push`.
    #[serde(serialize_with = "whole")]
    pub entry: f64,
    /// On an entry that the kernel has to single-step.
    #[serde(serialize_with = "whole")]
    pub entry_single_stepped: f64,
    /// On the return of the first.
    #[serde(rename = "return", serialize_with = "whole")]
    pub on_return: f64,
}

fn whole<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(value.max(0.0).round() as u64)
}

/// What would be traced, and how.
#[derive(Debug, Serialize)]
pub struct Target {
    /// How it was named.
    pub kind: TargetKind,
    /// The process; none when there is none yet.
    pub pid: Option<u32>,
    /// Its command line, redacted; empty for a binary.
    pub command: Vec<String>,
    /// The program, and files with functions or devices of llama.cpp.
    pub files: Vec<Build>,
    /// How many of them, and what that costs.
    pub probes: Load,
    /// The probes that would be set, in this order: as `target.hooks` of the counts' document.
    pub hooks: Vec<Planned>,
    /// Probes in files that the program may load by itself, such as backends beside it. They are set
    /// when it does.
    pub possible_hooks: Vec<Planned>,
    /// For each `expert_ids` hook of both, in that order: the layout of ggml's structs that its library
    /// declares. Where it declares none, names of tensors show it later.
    pub tensor_layouts: Vec<Layout>,
    /// Which routes the hooks can serve.
    pub routes: Vec<RouteReport>,
    /// Whether the program sets an eval callback of its own, which has nodes computed one by one, and
    /// can have ids copied to the host; and which function that is.
    pub eval_callback: Callbacks,
    /// Model files.
    pub models: Vec<ModelFile>,
    /// Which layers are expected to be seen.
    pub coverage: Vec<Expectation>,
}

/// How a target was named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetKind {
    /// A running process.
    Process,
    /// A command that has not been started.
    Command,
    /// A program or library.
    Binary,
}

/// A file with code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Build {
    /// The file, as the target sees it.
    pub path: String,
    /// Its GNU build id, in hex.
    pub build_id: Option<String>,
    /// When the target has it.
    pub loaded: Loaded,
    /// Whether it is a program without a dynamic linker.
    #[serde(rename = "static")]
    pub is_static: bool,
    /// Whether it has lost its `.symtab`.
    pub stripped: bool,
    /// Device backends of ggml in it, such as `cuda`.
    pub devices: Vec<String>,
}

/// When a target has a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Loaded {
    /// It maps it.
    Mapped,
    /// The dynamic linker loads it before the program begins.
    AtStart,
    /// The program may load it by itself.
    #[serde(rename = "may_be_loaded")]
    Perhaps,
}

/// A probe that would be set.
#[derive(Debug, Serialize)]
pub struct Planned {
    /// Where, and for what.
    #[serde(flatten)]
    pub probe: Probe,
    /// Whether it is hit when the function returns, too.
    pub on_return: bool,
    /// How often it is hit.
    pub hit_per: &'static str,
    /// Whether the kernel has to single-step the instruction under it, at many times the cost; `null`
    /// where that is not known.
    pub single_stepped: Option<bool>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_answer_counts() {
        use Answer::{CouldNotTell, No, Yes};
        assert_eq!(Answer::worst([]), Yes);
        assert_eq!(Answer::worst([Yes, CouldNotTell, Yes]), CouldNotTell);
        assert_eq!(Answer::worst([CouldNotTell, No, Yes]), No);
        assert_eq!([Yes, No, CouldNotTell].map(Answer::exit_status), [0, 1, 2]);
    }
}
