//! Writing a trace as its rows come: of a file that was read, and not of a capture.

use std::io::Write;

use arrow_ipc::{
    CompressionType,
    writer::{IpcWriteOptions, StreamWriter},
};
use arrow_schema::{ArrowError, SchemaRef};

use super::{Capture, Row, columns::Columns, schema::schema};

/// How all traces are compressed, where the build can do it.
const COMPRESSION: Option<CompressionType> = match cfg!(feature = "zstd") {
    true => Some(CompressionType::ZSTD),
    false => None,
};

/// Begins the stream of a trace.
pub(super) fn stream<W: Write>(out: W, schema: &SchemaRef) -> Result<StreamWriter<W>, ArrowError> {
    let options = IpcWriteOptions::default().try_with_compression(COMPRESSION)?;
    StreamWriter::try_new_with_options(out, schema, options)
}

/// A trace that is being written.
pub struct TraceFile<W: Write> {
    columns: Columns,
    stream: StreamWriter<W>,
}

impl<W: Write> TraceFile<W> {
    /// Begins a trace.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn begin(out: W, capture: &Capture) -> Result<Self, ArrowError> {
        let schema = schema(capture);
        let stream = stream(out, &schema)?;
        let columns = Columns::new(schema);
        Ok(Self { columns, stream })
    }

    /// Adds a row.
    ///
    /// # Errors
    /// When a batch is full and cannot be written.
    pub fn push(&mut self, row: &Row<'_>) -> Result<(), ArrowError> {
        self.columns.push(row);
        match self.columns.is_full() {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn flush(&mut self) -> Result<(), ArrowError> {
        self.stream.write(&self.columns.take()?)
    }

    /// Writes what is left, and the mark at the end.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(mut self) -> Result<(), ArrowError> {
        if !self.columns.is_empty() {
            self.flush()?;
        }
        self.stream.finish()
    }
}
