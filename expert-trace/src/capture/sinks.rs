//! Where results go: opened before anything is traced, so that a bad place fails at once.

use std::{
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use crate::{
    caller::Account,
    cli::Recording,
    export::{self, Output},
    summary::Log,
};

/// What is wanted of a capture, by flags and variables.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Count, and print the summary.
    pub stats: bool,
    /// Print a line per token and layer.
    pub log: bool,
    /// File for the counts.
    pub output: Option<PathBuf>,
}

/// Open outputs.
pub struct Sinks {
    /// Whether the summary is wanted.
    pub stats: bool,
    /// The document's place.
    pub output: Option<(PathBuf, Output)>,
    /// Gets the rows of each pass.
    pub log: Option<Log<Box<dyn Write>>>,
}

impl Sinks {
    /// Opens what is wanted, with the rights of the account.
    ///
    /// # Errors
    /// When a place cannot be written.
    pub fn open(wanted: Wanted, recording: &Recording, account: &Account) -> anyhow::Result<Self> {
        let failed = |path: &Path| format!("Failed to open output file: {}", path.display());
        let output = match wanted.output {
            Some(path) => {
                let output = Output::create(&path, account).with_context(|| failed(&path))?;
                Some((path, output))
            }
            None => None,
        };
        let log: Option<Box<dyn Write>> = match &recording.log {
            Some(Some(path)) => {
                let file = export::open_log(path, account).with_context(|| failed(path))?;
                Some(Box::new(BufWriter::new(file)))
            }
            _ if wanted.log => Some(Box::new(BufWriter::new(io::stderr()))),
            _ => None,
        };
        Ok(Self {
            stats: wanted.stats,
            output,
            log: log.map(Log::new),
        })
    }
}
