//! The batches of a trace, for formats that are written as it is read.

use std::path::Path;

use super::progress::Progress;
use crate::trace::{Batch, Capture, Ending, Kind, Reader, Row, reader::ReadError};

/// Batches that are still to be read.
#[derive(Debug)]
pub struct Batches<'a> {
    reader: Reader,
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
        Ok(Self {
            reader: Reader::open(path)?,
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
        Ok(batch)
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
