//! The messages of an Arrow IPC stream, one by one, with their places in the file.
//!
//! arrow-ipc believes the lengths that it finds: those of a damaged or hostile file would have it reserve
//! any amount of memory. Here they are checked before it sees them, so that a file ends in a place that we
//! can name, and what stands before it can be read.

use std::io::{self, Read};

use arrow_buffer::Buffer;
use arrow_ipc::{Message, MessageHeader, root_as_message};
use thiserror::Error;

/// Longest description of a message that is believed. Ours have less than 4 KiB, and the schema's.
const MAX_HEAD: u32 = 16 << 20;
/// Longest body of a message that is believed, and most bytes of all its columns: 64 Ki rows of 1,024
/// experts are 128 MiB.
const MAX_BODY: u64 = 512 << 20;

/// Stands before the length of every message (Arrow's "encapsulated message format").
const CONTINUATION: [u8; 4] = [0xff; 4];

/// Why no further message can be read.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The file ends in the middle of a message.
    #[error("it ends in the middle of a batch, at byte {0}")]
    Cut(u64),
    /// What is there is no message.
    #[error("it is damaged at byte {at}: {why}")]
    Damaged {
        /// Where the message begins, in bytes.
        at: u64,
        /// What is wrong with it.
        why: String,
    },
    /// This build cannot read it.
    #[error(
        "its rows are compressed with zstd, which this expert-trace was built without: build it with \
         the feature `zstd`"
    )]
    Compressed,
    /// The file could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A message.
#[derive(Debug)]
pub struct Frame {
    /// Where it begins, in bytes.
    pub at: u64,
    head: Vec<u8>,
    /// The columns that it describes.
    pub body: Buffer,
}

impl Frame {
    /// Its description.
    ///
    /// # Errors
    /// When that is none.
    pub fn message(&self) -> Result<Message<'_>, FrameError> {
        root_as_message(&self.head).map_err(|error| FrameError::Damaged {
            at: self.at,
            why: error.to_string(),
        })
    }
}

/// What comes next in a stream.
#[derive(Debug)]
pub enum Next {
    /// A message.
    Frame(Frame),
    /// The mark at the end of a stream that was finished.
    End,
    /// The file ends between two messages: whoever wrote it did not finish.
    NoMore,
}

/// Messages of a stream.
#[derive(Debug)]
pub struct Frames<R> {
    input: R,
    at: u64,
}

impl<R: Read> Frames<R> {
    /// Those of a file that stands at its beginning.
    pub fn new(input: R) -> Self {
        Self { input, at: 0 }
    }

    /// How many bytes have been read.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The next message.
    ///
    /// # Errors
    /// When the file ends within it, it is none, or the file cannot be read.
    pub fn read(&mut self) -> Result<Next, FrameError> {
        let at = self.at;
        let damaged = |why: String| FrameError::Damaged { at, why };
        let mut prefix = Vec::with_capacity(8);
        self.take(&mut prefix, 8)?;
        if prefix.is_empty() {
            return Ok(Next::NoMore);
        }
        let Some((mark, length)) = prefix.split_first_chunk::<4>() else {
            return Err(FrameError::Cut(at));
        };
        if *mark != CONTINUATION {
            return Err(damaged("no message begins here".into()));
        }
        let Some(length) = length.first_chunk() else {
            return Err(FrameError::Cut(at));
        };
        let head = u32::from_le_bytes(*length);
        if head == 0 {
            return Ok(Next::End);
        }
        if head > MAX_HEAD {
            return Err(damaged(format!("a message of {head} bytes")));
        }
        let mut frame = Frame {
            at,
            head: Vec::new(),
            body: Buffer::default(),
        };
        self.take(&mut frame.head, u64::from(head))?;
        if frame.head.len() < head as usize {
            return Err(FrameError::Cut(at));
        }
        let length = frame.message()?.bodyLength();
        let wanted = u64::try_from(length)
            .ok()
            .filter(|length| *length <= MAX_BODY)
            .ok_or_else(|| damaged(format!("a batch of {length} bytes")))?;
        let mut body = Vec::new();
        self.take(&mut body, wanted)?;
        if (body.len() as u64) < wanted {
            return Err(FrameError::Cut(at));
        }
        let is_compressed = check_columns(&frame.message()?, &body).map_err(damaged)?;
        if is_compressed && !cfg!(feature = "zstd") {
            return Err(FrameError::Compressed);
        }
        frame.body = Buffer::from(body);
        Ok(Next::Frame(frame))
    }

    /// Adds what there is of so many bytes. Memory grows with what is really there.
    fn take(&mut self, bytes: &mut Vec<u8>, wanted: u64) -> io::Result<()> {
        let read = self.input.by_ref().take(wanted).read_to_end(bytes)?;
        self.at += read as u64;
        Ok(())
    }
}

/// Checks that the columns of a message lie in its body, and are no longer than can be, each and together.
/// Gives whether they are compressed.
fn check_columns(message: &Message<'_>, body: &[u8]) -> Result<bool, String> {
    let batch = match message.header_type() {
        MessageHeader::RecordBatch => message.header_as_record_batch(),
        MessageHeader::DictionaryBatch => message
            .header_as_dictionary_batch()
            .and_then(|dictionary| dictionary.data()),
        _ => return Ok(false),
    };
    let Some(batch) = batch else {
        return Err("a batch without content".into());
    };
    let is_compressed = batch.compression().is_some();
    let mut left = MAX_BODY;
    for buffer in batch.buffers().iter().flatten() {
        let place = usize::try_from(buffer.offset())
            .ok()
            .zip(usize::try_from(buffer.length()).ok())
            .and_then(|(offset, length)| body.get(offset..offset.checked_add(length)?));
        let Some(column) = place else {
            return Err("a column lies outside of its batch".into());
        };
        // An uncompressed length stands before compressed bytes; -1 before others.
        if is_compressed && let Some(length) = column.first_chunk() {
            let length = match i64::from_le_bytes(*length) {
                -1 => column.len() as i64,
                length => length,
            };
            let fits = u64::try_from(length).ok();
            left = fits
                .and_then(|length| left.checked_sub(length))
                .ok_or_else(|| format!("a column of {length} bytes"))?;
        } else if is_compressed && !column.is_empty() {
            return Err("a column is shorter than its length".into());
        }
    }
    Ok(is_compressed)
}
