//! The batches of a trace, for formats that are written as it is read.

use std::path::Path;

use super::progress::Progress;
use crate::trace::{Batch, Capture, Ending, Kind, Reader, Row, parts::Parts, reader::ReadError};

/// Batches that are still to be read.
#[derive(Debug)]
pub struct Batches<'a> {
    reader: Reader,
    parts: Parts,
    /// How many are to be read at most: a trace can have grown since somebody counted.
    left: u64,
    progress: &'a mut Progress,
}

impl<'a> Batches<'a> {
    /// Those of a file, of which only the first `limit` are wanted.
    ///
    /// # Errors
    /// When it is no trace.
    pub fn open(path: &Path, limit: u64, progress: &'a mut Progress) -> Result<Self, ReadError> {
        let reader = Reader::open(path)?;
        let mut parts = Parts::default();
        parts.begin(reader.capture());
        Ok(Self {
            reader,
            parts,
            left: limit,
            progress,
        })
    }

    /// What was known when the capture began.
    pub fn capture(&self) -> &Capture {
        self.reader.capture()
    }

    /// The next batch.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn next(&mut self) -> Result<Option<Batch>, ReadError> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        let batch = self.reader.next()?;
        self.progress.update(self.reader.position());
        let last = batch.as_ref().filter(|batch| !batch.is_empty());
        let last = last.map(|batch| batch.row(batch.len() - 1).kind);
        if last == Some(Kind::Summary) {
            self.parts.end();
        }
        Ok(batch)
    }

    /// What is missing when all of it was read, because it stands in other files: a sentence each.
    pub fn missing(&self, shown: &str) -> Vec<String> {
        self.parts
            .missing(shown, self.ending() == Some(&Ending::Whole))
    }

    /// How the trace ends, when all of it was read.
    pub fn ending(&self) -> Option<&Ending> {
        self.reader.ending()
    }
}

/// Rows of a batch that were routed in a context.
pub fn routed(batch: &Batch, context: u32) -> impl Iterator<Item = Row<'_>> {
    let rows = batch.rows();
    rows.filter(move |row| row.kind == Kind::Routed && row.context == Some(context))
}

#[cfg(test)]
mod tests {
    use crate::{
        formats::tests::{TraceOnDisk, routed},
        trace::{Capture, Kind, Row, file::TraceFile},
    };

    #[test]
    fn a_file_that_goes_on_elsewhere_is_told_from_a_whole_one() {
        let missing = |rows: &[Row<'_>]| {
            let capture = Capture {
                mode: "run".to_owned(),
                ..Capture::default()
            };
            let mut bytes = Vec::new();
            let mut trace = TraceFile::begin(&mut bytes, &capture).unwrap();
            rows.iter().for_each(|row| trace.push(row).unwrap());
            trace.finish().unwrap();
            TraceOnDisk::of(&bytes).batches(|batches| {
                while batches.next().unwrap().is_some() {}
                batches.missing("a").len()
            })
        };
        assert_eq!(missing(&[routed(0, 1, &[2])]), 1);
        assert_eq!(missing(&[routed(0, 1, &[2]), Row::of(Kind::Summary)]), 0);
        assert_eq!(missing(&[]), 1);
    }
}
