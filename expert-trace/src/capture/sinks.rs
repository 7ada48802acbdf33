//! Where results go: opened before anything is traced, so that a bad place fails at once.

use std::{
    fs,
    io::{self, BufWriter, Write},
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};

use super::trace::{self, Trace};
use crate::{
    caller::Account,
    cli::Recording,
    control::Control,
    doctor::Refusal,
    export::{LogFile, Output, pattern},
    summary::Log,
    target::printable,
    trace::Capture,
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

impl Wanted {
    /// Whether all that is written goes to files that have the process in their names.
    pub fn tells_processes_apart(&self, recording: &Recording) -> bool {
        self.files(recording)
            .all(|path| pattern::tells_processes_apart(path))
            && !matches!(recording.log, Some(None))
    }

    /// Whether a file has the process in its name.
    pub fn names_process(&self, recording: &Recording) -> bool {
        self.files(recording)
            .any(|path| pattern::tells_processes_apart(path))
    }

    /// Refuses a socket where a file is to be: whatever is written last would take its place.
    fn check_control(&self, recording: &Recording, pid: u32, path: &Path) -> anyhow::Result<()> {
        let mut files = self.names(recording, pid);
        let trace = recording.trace.iter();
        files.extend(trace.map(|path| pattern::of_process(path, pid)));
        ensure!(
            !files.iter().any(|file| file == path),
            "{} would be the socket and a file; name two",
            printable(path)
        );
        Ok(())
    }

    /// Names of the files of a process beside its trace.
    fn names(&self, recording: &Recording, pid: u32) -> Vec<PathBuf> {
        let log = recording.log.iter().flatten();
        let files = self.output.iter().chain(log);
        files.map(|path| pattern::of_process(path, pid)).collect()
    }

    fn files<'a>(&'a self, recording: &'a Recording) -> impl Iterator<Item = &'a PathBuf> {
        let log = recording.log.iter().flatten();
        let files = self.output.iter().chain(log).chain(&recording.trace);
        files.chain(&recording.control)
    }
}

/// Why [`Sinks::open`] would fail. No file is created that stays.
pub fn refused(
    wanted: &Wanted,
    recording: &Recording,
    account: &Account,
    pid: u32,
) -> Option<Refusal> {
    check(wanted, recording, account, pid)
        .err()
        .map(|error| Refusal {
            why: format!("{error:#}"),
            fix: "name a place that can be written, with -o, --log, --trace or --control",
        })
}

fn check(
    wanted: &Wanted,
    recording: &Recording,
    account: &Account,
    pid: u32,
) -> anyhow::Result<()> {
    // To open a FIFO would let its reader go on, or make us wait for one.
    let is_fifo = |path: &Path| {
        let metadata = account.with_rights(|| fs::metadata(path));
        metadata.is_ok_and(|metadata| metadata.file_type().is_fifo())
    };
    let mut output = None;
    if let Some(path) = &wanted.output
        && let path = pattern::of_process(path, pid)
        && !is_fifo(&path)
    {
        // What it creates has no name, or goes with it.
        output = Some(Output::create(&path, account).with_context(|| failed(&path))?);
    }
    if let Some(Some(path)) = &recording.log
        && let path = pattern::of_process(path, pid)
        && !is_fifo(&path)
    {
        LogFile::check(&path, account, output.as_ref()).with_context(|| failed(&path))?;
    }
    if let Some(path) = &recording.trace
        && let path = pattern::of_process(path, pid)
        && !is_fifo(&path)
    {
        let names = wanted.names(recording, pid);
        trace::Opened::check(path, recording, account, output.as_ref(), &names)?;
    }
    if let Some(path) = &recording.control {
        let path = pattern::of_process(path, pid);
        wanted.check_control(recording, pid, &path)?;
        Control::check(&path, account).with_context(|| no_socket(&path))?;
    }
    Ok(())
}

fn failed(path: &Path) -> String {
    format!("Failed to open output file: {}", path.display())
}

fn no_socket(path: &Path) -> String {
    format!("Failed to open socket: {}", path.display())
}

/// Open outputs.
pub struct Sinks {
    /// Whether the summary is wanted.
    pub stats: bool,
    /// The document's place.
    pub output: Option<(PathBuf, Output)>,
    /// Gets the rows of each pass.
    pub log: Option<Log<Box<dyn Write>>>,
    /// The log's file, when it goes to one.
    log_file: Option<LogFile>,
    /// The trace's place, until it begins.
    trace_file: Option<trace::Opened>,
    /// Gets every pass.
    pub trace: Option<Trace>,
    /// By which the capture is asked, until it begins.
    pub control: Option<Control>,
}

impl Sinks {
    /// Opens what is wanted of a process, with the rights of the account.
    ///
    /// # Errors
    /// When a place cannot be written.
    pub fn open(
        wanted: &Wanted,
        recording: &Recording,
        account: &Account,
        pid: u32,
    ) -> anyhow::Result<Self> {
        let output = match &wanted.output {
            Some(path) => {
                let path = pattern::of_process(path, pid);
                let output = Output::create(&path, account).with_context(|| failed(&path))?;
                Some((path, output))
            }
            None => None,
        };
        let log_file = match &recording.log {
            Some(Some(path)) => {
                let path = pattern::of_process(path, pid);
                let output = output.as_ref().map(|(_, output)| output);
                let file = LogFile::open(&path, account, output);
                Some(file.with_context(|| failed(&path))?)
            }
            _ => None,
        };
        let trace_file = match &recording.trace {
            Some(path) => {
                let path = pattern::of_process(path, pid);
                let output = output.as_ref().map(|(_, output)| output);
                let others = (output, log_file.as_ref());
                let names = wanted.names(recording, pid);
                Some(trace::Opened::new(
                    path, recording, account, others, &names,
                )?)
            }
            None => None,
        };
        let log: Option<Box<dyn Write>> = match &log_file {
            Some(file) => Some(Box::new(BufWriter::new(file.writer()?))),
            None if wanted.log => Some(Box::new(BufWriter::new(io::stderr()))),
            None => None,
        };
        Ok(Self {
            stats: wanted.stats,
            output,
            log: log.map(Log::new),
            log_file,
            trace_file,
            trace: None,
            control: recording
                .control
                .as_ref()
                .map(|path| {
                    let path = pattern::of_process(path, pid);
                    wanted.check_control(recording, pid, &path)?;
                    Control::listen(&path, account).with_context(|| no_socket(&path))
                })
                .transpose()?,
        })
    }

    /// Removes what the files of log and trace had before. To be called when the capture is certain: one
    /// that fails before leaves older ones as they were.
    ///
    /// # Errors
    /// When a file cannot be emptied.
    pub fn begin(&mut self, capture: Capture) -> anyhow::Result<()> {
        if let Some(file) = self.log_file.take() {
            file.begin().context("cannot empty the log")?;
        }
        if let Some(trace) = self.trace_file.take() {
            self.trace = Some(trace.begin(capture).context("cannot begin the trace")?);
        }
        Ok(())
    }
}
