//! The environment variables of the in-process tracer that this program takes the place of:
//! `LLAMA_EXPERT_TRACE_STATS`, `LLAMA_EXPERT_TRACE_LOGGING` and `LLAMA_EXPERT_TRACE_OUTPUT`.
//!
//! Who has them in a script gets what they always meant: an option is on when its variable is exactly
//! `1` (`strcmp(value, "1") == 0`), and nothing is traced when they are set and ask for nothing. Flags
//! of the command line say more than variables, and win.

use std::path::{Path, PathBuf};

use crate::caller::Environment;

const STATS: &str = "LLAMA_EXPERT_TRACE_STATS";
const LOGGING: &str = "LLAMA_EXPERT_TRACE_LOGGING";
const OUTPUT: &str = "LLAMA_EXPERT_TRACE_OUTPUT";

/// The variables ask for a file of what is not counted.
const OUTPUT_NEEDS_STATS: &str =
    "LLAMA_EXPERT_TRACE_OUTPUT needs LLAMA_EXPERT_TRACE_STATS=1: no file is written";

/// The same, where nothing else is asked for.
const OUTPUT_ALONE: &str = "LLAMA_EXPERT_TRACE_OUTPUT needs LLAMA_EXPERT_TRACE_STATS=1: no file is \
     written, and the program runs untraced";

/// Flags of the command line that bear on what is traced.
#[derive(Clone, Copy, Debug, Default)]
pub struct Flags<'a> {
    /// File of `--output`.
    pub output: Option<&'a Path>,
    /// `--log`, wherever it goes.
    pub log: bool,
    /// A flag that only makes sense with counts, such as `--top` and `--trace`.
    pub summary: bool,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The program runs as if there were no tracer, and the tracer prints nothing but a warning.
    Untraced,
    /// The program is traced.
    Traced {
        /// Count, and print the summary.
        stats: bool,
        /// Print a line per token and layer.
        log: bool,
        /// File for the counts.
        output: Option<PathBuf>,
    },
}

/// Decides by the variables and flags. The text is a warning for the user.
pub fn decide(environment: &Environment, flags: Flags) -> (Decision, Option<&'static str>) {
    let is_one = |name| environment.get(name).is_some_and(|value| value == "1");
    let is_set = |name| environment.get(name).is_some();
    let stats_variable = is_one(STATS);
    let output_variable = environment.get(OUTPUT).filter(|value| !value.is_empty());

    let by_default = !is_set(STATS) && !is_set(LOGGING) && output_variable.is_none();
    let stats = stats_variable || by_default || flags.summary || flags.output.is_some();
    let log = is_one(LOGGING) || flags.log;

    let traced = stats || log;
    let (output, warning) = match (flags.output, output_variable) {
        (Some(path), _) => (Some(path.to_owned()), None),
        (None, Some(path)) if stats_variable => (Some(path.into()), None),
        (None, Some(_)) if traced => (None, Some(OUTPUT_NEEDS_STATS)),
        (None, Some(_)) => (None, Some(OUTPUT_ALONE)),
        (None, None) => (None, None),
    };
    let decision = match traced {
        true => Decision::Traced { stats, log, output },
        false => Decision::Untraced,
    };
    (decision, warning)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(
        stats: Option<&str>,
        logging: Option<&str>,
        output: Option<&str>,
    ) -> Environment {
        let mut environment = Environment::default();
        for (name, value) in [(STATS, stats), (LOGGING, logging), (OUTPUT, output)] {
            if let Some(value) = value {
                environment.set(name, value);
            }
        }
        environment
    }

    /// S: summary. L: log. V: JSON to the variable's file. F: JSON to the flag's. w: warning.
    fn decided(environment: &Environment, flags: Flags) -> String {
        let (decision, warning) = decide(environment, flags);
        if let Some(warning) = warning {
            let untraced = decision == Decision::Untraced;
            assert_eq!(warning.contains("untraced"), untraced, "{warning}");
        }
        let mut text = String::new();
        match decision {
            Decision::Untraced => text.push('-'),
            Decision::Traced { stats, log, output } => {
                let file = output.map(|path| match path.to_str() {
                    Some("variable") => 'V',
                    Some("flag") => 'F',
                    _ => panic!("{path:?}"),
                });
                text.extend(stats.then_some('S'));
                text.extend(log.then_some('L'));
                text.extend(file);
            }
        }
        text.extend(warning.map(|_| 'w'));
        text
    }

    fn columns() -> [Flags<'static>; 8] {
        let output = Some(Path::new("flag"));
        [
            (None, false, false),
            (None, false, true),
            (None, true, false),
            (None, true, true),
            (output, false, false),
            (output, false, true),
            (output, true, false),
            (output, true, true),
        ]
        .map(|(output, log, summary)| Flags {
            output,
            log,
            summary,
        })
    }

    #[test]
    #[rustfmt::skip]
    fn every_combination() {
        const N: Option<&str> = None;
        const ONE: Option<&str> = Some("1");
        const ZERO: Option<&str> = Some("0");
        const FILE: Option<&str> = Some("variable");
        let table = [
            // STATS, LOGGING, OUTPUT: no flag, --top, --log, both, and the same with -o
            (N,    N,    N,    ["S",   "S",   "SL",  "SL",  "SF",  "SF",  "SLF", "SLF"]),
            (N,    N,    FILE, ["-w",  "Sw",  "Lw",  "SLw", "SF",  "SF",  "SLF", "SLF"]),
            (N,    ZERO, N,    ["-",   "S",   "L",   "SL",  "SF",  "SF",  "SLF", "SLF"]),
            (N,    ZERO, FILE, ["-w",  "Sw",  "Lw",  "SLw", "SF",  "SF",  "SLF", "SLF"]),
            (N,    ONE,  N,    ["L",   "SL",  "L",   "SL",  "SLF", "SLF", "SLF", "SLF"]),
            (N,    ONE,  FILE, ["Lw",  "SLw", "Lw",  "SLw", "SLF", "SLF", "SLF", "SLF"]),
            (ZERO, N,    N,    ["-",   "S",   "L",   "SL",  "SF",  "SF",  "SLF", "SLF"]),
            (ZERO, N,    FILE, ["-w",  "Sw",  "Lw",  "SLw", "SF",  "SF",  "SLF", "SLF"]),
            (ZERO, ZERO, N,    ["-",   "S",   "L",   "SL",  "SF",  "SF",  "SLF", "SLF"]),
            (ZERO, ZERO, FILE, ["-w",  "Sw",  "Lw",  "SLw", "SF",  "SF",  "SLF", "SLF"]),
            (ZERO, ONE,  N,    ["L",   "SL",  "L",   "SL",  "SLF", "SLF", "SLF", "SLF"]),
            (ZERO, ONE,  FILE, ["Lw",  "SLw", "Lw",  "SLw", "SLF", "SLF", "SLF", "SLF"]),
            (ONE,  N,    N,    ["S",   "S",   "SL",  "SL",  "SF",  "SF",  "SLF", "SLF"]),
            (ONE,  N,    FILE, ["SV",  "SV",  "SLV", "SLV", "SF",  "SF",  "SLF", "SLF"]),
            (ONE,  ZERO, N,    ["S",   "S",   "SL",  "SL",  "SF",  "SF",  "SLF", "SLF"]),
            (ONE,  ZERO, FILE, ["SV",  "SV",  "SLV", "SLV", "SF",  "SF",  "SLF", "SLF"]),
            (ONE,  ONE,  N,    ["SL",  "SL",  "SL",  "SL",  "SLF", "SLF", "SLF", "SLF"]),
            (ONE,  ONE,  FILE, ["SLV", "SLV", "SLV", "SLV", "SLF", "SLF", "SLF", "SLF"]),
        ];
        for (stats, logging, output, expected) in table {
            let decided_with = |environment: Environment| {
                columns().map(|flags| decided(&environment, flags))
            };
            let context = format!("{stats:?} {logging:?} {output:?}");
            assert_eq!(decided_with(environment(stats, logging, output)), expected, "{context}");
            if output.is_none() {
                let empty = environment(stats, logging, Some(""));
                assert_eq!(decided_with(empty), expected, "{context}, empty");
            }
        }
    }

    #[test]
    fn on_is_exactly_one() {
        for value in ["", "0", "2", "01", "1 ", " 1", "true", "yes", "on"] {
            let environment = environment(Some(value), Some(value), None);
            assert_eq!(decided(&environment, Flags::default()), "-", "{value:?}");
        }
    }
}
