//! The trace of a capture: finished passes to files.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{Instant, SystemTime},
};

use anyhow::{Context as _, bail};

use super::monotonic_ns;
use crate::{
    caller::Account,
    cli::{Recording, Rotation},
    export::{LogFile, Output},
    model::{Context, Finished},
    stats,
    target::printable,
    trace::{
        self, ContextDetail,
        recorder::{Recorder, Settings},
        writer::Writer,
    },
};

/// Where a trace goes.
#[derive(Debug)]
struct Place {
    /// As it was named, with the process in it.
    path: PathBuf,
    account: Account,
    rotation: Option<Rotation>,
}

impl Place {
    /// Name of one of the files: they sort as they follow each other.
    fn part(&self, number: u32) -> PathBuf {
        if self.rotation.is_none() {
            return self.path.clone();
        }
        let mut name = self.path.file_stem().unwrap_or_default().to_owned();
        name.push(format!(".{number:0DIGITS$}"));
        if let Some(extension) = self.path.extension() {
            name.push(".");
            name.push(extension);
        }
        self.path.with_file_name::<OsString>(name)
    }

    /// Whether one of the files, now or later, has this name.
    fn has_part(&self, other: &Path) -> bool {
        if self.rotation.is_none() {
            return false;
        }
        let directory = |path: &Path| {
            let directory = path.parent().filter(|parent| *parent != Path::new(""));
            let directory = directory.unwrap_or(Path::new("."));
            self.account
                .with_rights(|| fs::canonicalize(directory))
                .unwrap_or_else(|_| directory.to_owned())
        };
        let name = |path: &Path| {
            path.file_name()
                .map(|name| name.as_encoded_bytes().to_vec())
        };
        let (Some(first), Some(other_name)) = (name(&self.part(0)), name(other)) else {
            return false;
        };
        // All are named like the first, but for the digits of their number.
        let stem = self.path.file_stem().unwrap_or_default().len() + 1;
        let (before, after) = (&first[..stem], &first[stem + DIGITS..]);
        let number = other_name
            .strip_prefix(before)
            .and_then(|rest| rest.strip_suffix(after));
        number.is_some_and(|number| number.len() >= DIGITS && number.iter().all(u8::is_ascii_digit))
            && directory(other) == directory(&self.path)
    }

    /// Refuses other outputs that one of the files would overwrite.
    fn check_others(&self, others: &[PathBuf]) -> anyhow::Result<()> {
        match others.iter().find(|other| self.has_part(other)) {
            Some(other) => bail!(
                "{} is the name of one of the trace's files ({}): name another",
                printable(other),
                printable(&self.part(0))
            ),
            None => Ok(()),
        }
    }
}

/// Digits of a file's number, as long as they are enough.
const DIGITS: usize = 4;

/// A trace whose first file is open.
#[derive(Debug)]
pub(super) struct Opened {
    place: Place,
    tokens: bool,
    weights: bool,
    file: LogFile,
}

impl Opened {
    /// Opens the first file, with the rights of the account. `names` are those of other outputs.
    ///
    /// # Errors
    /// When it cannot be written, or is another output.
    pub(super) fn new(
        path: PathBuf,
        recording: &Recording,
        account: &Account,
        others: (Option<&Output>, Option<&LogFile>),
        names: &[PathBuf],
    ) -> anyhow::Result<Self> {
        let place = Place {
            path,
            account: account.clone(),
            rotation: recording.rotate,
        };
        place.check_others(names)?;
        let (output, log) = others;
        let path = place.part(0);
        let file = LogFile::open(&path, account, output).and_then(|file| {
            let shared = log.map(|log| log.is_same(&file)).transpose()?;
            match shared {
                Some(true) => Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "the log and the trace would be in one file; name two",
                )),
                _ => Ok(file),
            }
        });
        Ok(Self {
            file: file
                .with_context(|| format!("Failed to open output file: {}", path.display()))?,
            tokens: recording.tokens,
            weights: recording.weights,
            place,
        })
    }

    /// Why [`new`](Self::new) would fail. No file is created.
    pub(super) fn check(
        path: PathBuf,
        recording: &Recording,
        account: &Account,
        output: Option<&Output>,
        names: &[PathBuf],
    ) -> anyhow::Result<()> {
        let place = Place {
            path,
            account: account.clone(),
            rotation: recording.rotate,
        };
        place.check_others(names)?;
        let path = place.part(0);
        LogFile::check(&path, account, output)
            .with_context(|| format!("Failed to open output file: {}", path.display()))
    }

    /// Begins to record: what the file had before goes.
    ///
    /// # Errors
    /// When the file cannot be emptied, or there can be no thread.
    pub(super) fn begin(self, capture: trace::Capture) -> io::Result<Trace> {
        let Self {
            place,
            tokens,
            weights,
            file,
        } = self;
        file.begin()?;
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let monotonic_ns = monotonic_ns() as i64;
        let since_1970 = since_1970.map_or(0, |since| since.as_nanos() as i64);
        let settings = Settings {
            tokens,
            clock_offset_ns: since_1970 - monotonic_ns,
        };
        let capture = trace::Capture {
            tokens,
            weights: weights.then_some(trace::Weights::Router),
            ..capture
        };
        Ok(Trace {
            writer: Writer::begin(file.writer()?, &capture)?,
            recorder: Recorder::new(settings),
            files: vec![place.part(0)],
            place,
            capture,
        })
    }
}

/// A trace that is being written.
#[derive(Debug)]
pub(super) struct Trace {
    place: Place,
    capture: trace::Capture,
    recorder: Recorder,
    writer: Writer,
    files: Vec<PathBuf>,
}

impl Trace {
    /// Records a pass.
    pub(super) fn pass(
        &mut self,
        finished: &Finished<'_>,
        describe: &dyn Fn(&Context) -> ContextDetail,
    ) {
        let writer = &mut self.writer;
        self.recorder
            .pass(finished, describe, &mut |row| writer.push(row));
    }

    /// When what is collected has to be written.
    pub(super) fn due(&self) -> Option<Instant> {
        self.writer.due()
    }

    /// Waits until more can be recorded: what is waiting for the disk must not fill our memory.
    pub(super) async fn has_room(&self) {
        self.writer.has_room().await;
    }

    /// Writes what has waited for long enough, and begins another file when that is due.
    ///
    /// # Errors
    /// When there can be no other file.
    pub(super) fn keep_up(&mut self) -> io::Result<()> {
        if self.writer.due().is_some_and(|due| due <= Instant::now()) {
            self.writer.flush();
        }
        let is_over = match self.place.rotation {
            // One without rows has nothing to be told apart from the next.
            _ if !self.writer.has_rows() => false,
            None => false,
            Some(Rotation::Bytes(bytes)) => self.writer.bytes() >= bytes,
            Some(Rotation::Age(age)) => self.writer.age() >= age,
        };
        if is_over {
            self.capture.part += 1;
            let path = self.place.part(self.capture.part);
            let file = next_file(&path, &self.place.account).map_err(|error| {
                io::Error::new(error.kind(), format!("{}: {error}", printable(&path)))
            })?;
            self.writer.next_part(file, &self.capture);
            self.recorder.begin_part();
            self.files.push(path);
        }
        Ok(())
    }

    /// Whether nothing more is written.
    pub(super) fn is_broken(&self) -> bool {
        self.writer.is_broken()
    }

    /// Records what the kernel has lost and is in no gap. Gives what there is of the trace.
    pub(super) fn close(&mut self, lost_rows: u64) -> stats::Trace {
        let writer = &mut self.writer;
        self.recorder
            .rest(lost_rows, monotonic_ns(), &mut |row| writer.push(row));
        self.so_far()
    }

    /// What there is of the trace up to now.
    pub(super) fn so_far(&self) -> stats::Trace {
        let counts = self.writer.counts();
        let files = self.files.iter();
        stats::Trace {
            files: files.map(|path| path.display().to_string()).collect(),
            rows: counts.routed,
            gaps: counts.gaps,
            tokens: self.capture.tokens,
            rows_without_weights: self.capture.weights.map(|_| counts.without_weights),
        }
    }

    /// Records what is known at the end, a JSON document, and waits for the disk.
    ///
    /// # Errors
    /// When something could not be written.
    pub(super) fn finish(mut self, summary: &str) -> io::Result<u64> {
        let row = self.recorder.summary(summary, monotonic_ns());
        self.writer.push(&row);
        self.writer.finish()
    }

    /// Writes what is left of a trace that cannot go on. Gives what could not be written.
    pub(super) fn abandon(self) -> String {
        match self.writer.finish() {
            Ok(_) => "it cannot be written".to_owned(),
            Err(error) => error.to_string(),
        }
    }
}

fn next_file(path: &Path, account: &Account) -> io::Result<File> {
    let file = LogFile::open(path, account, None)?;
    file.begin()?;
    file.writer()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_numbered_before_their_extension() {
        let place = |path: &str, rotation| Place {
            path: path.into(),
            account: Account::current().unwrap(),
            rotation,
        };
        let rotation = Some(Rotation::Bytes(1));
        for (path, part) in [
            ("trace.arrows", "trace.0007.arrows"),
            ("/a.b/trace", "/a.b/trace.0007"),
            ("x/trace.tar.arrows", "x/trace.tar.0007.arrows"),
        ] {
            assert_eq!(place(path, rotation).part(7), Path::new(part));
            assert_eq!(place(path, None).part(0), Path::new(path));
        }
    }

    #[test]
    fn other_outputs_are_not_named_like_a_file_to_come() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let place = |rotation| Place {
            path: path("trace.arrows"),
            account: Account::current().unwrap(),
            rotation,
        };
        let rotated = place(Some(Rotation::Bytes(1)));
        for (name, is_part) in [
            ("trace.0000.arrows", true),
            ("trace.0007.arrows", true),
            ("trace.12345.arrows", true),
            ("../trace.0007.arrows", false),
            ("trace.007.arrows", false),
            ("trace.000x.arrows", false),
            ("trace.0007.json", false),
            ("trace.arrows", false),
        ] {
            assert_eq!(rotated.has_part(&path(name)), is_part, "{name}");
            assert!(!place(None).has_part(&path(name)));
            assert_eq!(rotated.check_others(&[path(name)]).is_err(), is_part);
        }
        let within = directory
            .path()
            .join("..")
            .join(directory.path().file_name().unwrap());
        assert!(rotated.has_part(&within.join("trace.0001.arrows")));
    }
}
