//! Writing a trace: batches go to a thread of their own, so that a slow disk keeps no event waiting.
//!
//! A batch is written when it is full, and a second after its first row came: who kills us loses no more.
//! What is waiting to be written is bounded by whoever asks [`Writer::has_room`] first.

use std::{
    fs::File,
    io::{self, BufWriter},
    mem,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use arrow_array::RecordBatch;
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{ArrowError, SchemaRef};
use tokio::sync::Notify;

use super::{Capture, Counts, Row, columns::Columns, file, schema::schema};

/// How long a row waits for others of its batch.
pub const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// Batches that may wait to be written before no more events are taken.
const WAITING_BATCHES: usize = 4;

/// What the thread gets.
enum Message {
    Batch(RecordBatch),
    /// This file is done; another one begins, whose bytes are counted here.
    Next(File, SchemaRef, Arc<AtomicU64>),
}

/// What the thread tells.
#[derive(Debug, Default)]
struct Shared {
    waiting: AtomicUsize,
    written: Notify,
    /// Bytes in all files.
    all_bytes: AtomicU64,
}

/// A trace that is being written.
#[derive(Debug)]
pub struct Writer {
    columns: Columns,
    /// When the first row of the next batch came.
    since: Option<Instant>,
    batches: mpsc::Sender<Message>,
    thread: JoinHandle<io::Result<()>>,
    shared: Arc<Shared>,
    /// Bytes in the file at hand.
    bytes: Arc<AtomicU64>,
    part_began: Instant,
    /// Whether the file at hand has rows, or will have.
    has_rows: bool,
    /// A batch could not be handed over.
    broken: bool,
}

impl Writer {
    /// Begins a trace in a file.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn begin(file: File, capture: &Capture) -> io::Result<Self> {
        let schema = schema(capture);
        let shared = Arc::new(Shared::default());
        let bytes = Arc::new(AtomicU64::new(0));
        let (batches, messages) = mpsc::channel();
        let thread = {
            let (schema, shared, bytes) =
                (Arc::clone(&schema), Arc::clone(&shared), Arc::clone(&bytes));
            thread::Builder::new()
                .name("trace".into())
                .spawn(move || write_all(file, schema, bytes, &messages, &shared))?
        };
        Ok(Self {
            columns: Columns::new(schema),
            since: None,
            batches,
            thread,
            shared,
            bytes,
            part_began: Instant::now(),
            has_rows: false,
            broken: false,
        })
    }

    /// Adds a row.
    pub fn push(&mut self, row: &Row<'_>) {
        if self.since.is_none() {
            self.since = Some(Instant::now());
        }
        self.has_rows = true;
        self.columns.push(row);
        if self.columns.is_full() {
            self.flush();
        }
    }

    /// When what is collected has to be written.
    pub fn due(&self) -> Option<Instant> {
        self.since.map(|since| since + LONGEST_WAIT)
    }

    /// Hands over what is collected.
    pub fn flush(&mut self) {
        if self.since.take().is_none() {
            return;
        }
        match self.columns.take() {
            Ok(batch) => self.send(Message::Batch(batch)),
            // A column of more than 2 GiB of text, which nobody writes.
            Err(_) => self.broken = true,
        }
    }

    fn send(&mut self, message: Message) {
        self.shared.waiting.fetch_add(1, Ordering::Relaxed);
        self.broken |= self.batches.send(message).is_err();
    }

    /// Whether nothing more is written: [`finish`](Self::finish) tells why.
    pub fn is_broken(&self) -> bool {
        self.broken || self.thread.is_finished()
    }

    /// Waits until there is room for another batch.
    pub async fn has_room(&self) {
        while !self.is_broken() && self.shared.waiting.load(Ordering::Relaxed) > WAITING_BATCHES {
            // A batch that is written in between has left a permit.
            self.shared.written.notified().await;
        }
    }

    /// Bytes of the file at hand, as far as they are written.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Whether the file at hand has rows, or will have.
    pub fn has_rows(&self) -> bool {
        self.has_rows
    }

    /// How long ago the file at hand was begun.
    pub fn age(&self) -> Duration {
        self.part_began.elapsed()
    }

    /// Goes on in another file.
    pub fn next_part(&mut self, file: File, capture: &Capture) {
        self.flush();
        let schema = schema(capture);
        let mut columns = Columns::new(Arc::clone(&schema));
        columns.go_on_from(&self.columns);
        self.columns = columns;
        self.part_began = Instant::now();
        self.has_rows = false;
        // What is still to be written to the last file is not counted in this one.
        self.bytes = Arc::new(AtomicU64::new(0));
        self.send(Message::Next(file, schema, Arc::clone(&self.bytes)));
    }

    /// Rows since the beginning.
    pub fn counts(&self) -> Counts {
        self.columns.counts()
    }

    /// Writes what is left, and the end of the trace. Waits for the disk. Gives the bytes of all files.
    ///
    /// # Errors
    /// When something could not be written.
    pub fn finish(mut self) -> io::Result<u64> {
        self.flush();
        let Self {
            batches,
            thread,
            shared,
            ..
        } = self;
        drop(batches);
        thread.join().unwrap_or_else(|_| {
            let message = "the thread that writes the trace has panicked";
            Err(io::Error::other(message))
        })?;
        Ok(shared.all_bytes.load(Ordering::Relaxed))
    }
}

/// Counts what goes to a file.
struct Counting<'a> {
    file: File,
    bytes: Arc<AtomicU64>,
    shared: &'a Shared,
}

impl io::Write for Counting<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        for sum in [&*self.bytes, &self.shared.all_bytes] {
            sum.fetch_add(written as u64, Ordering::Relaxed);
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

type Stream<'a> = StreamWriter<BufWriter<Counting<'a>>>;

fn stream<'a>(
    file: File,
    schema: &SchemaRef,
    bytes: Arc<AtomicU64>,
    shared: &'a Shared,
) -> Result<Stream<'a>, ArrowError> {
    let counting = Counting {
        file,
        bytes,
        shared,
    };
    let file = BufWriter::with_capacity(256 << 10, counting);
    let mut stream = file::stream(file, schema)?;
    // Whoever reads a pipe learns at once what it is.
    stream.flush()?;
    Ok(stream)
}

/// Lets whoever waits for room see that the thread is gone, also when it has panicked.
struct Gone<'a>(&'a Shared);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.0.waiting.store(0, Ordering::Relaxed);
        self.0.written.notify_one();
    }
}

fn write_all(
    file: File,
    schema: SchemaRef,
    bytes: Arc<AtomicU64>,
    messages: &mpsc::Receiver<Message>,
    shared: &Shared,
) -> io::Result<()> {
    let _gone = Gone(shared);
    let result = write_messages(file, &schema, bytes, messages, shared);
    result.map_err(|error| match error {
        ArrowError::IoError(_, error) => error,
        error => io::Error::other(error),
    })
}

fn write_messages(
    file: File,
    schema: &SchemaRef,
    bytes: Arc<AtomicU64>,
    messages: &mpsc::Receiver<Message>,
    shared: &Shared,
) -> Result<(), ArrowError> {
    let mut stream = stream(file, schema, bytes, shared)?;
    for message in messages {
        match message {
            Message::Batch(batch) => {
                stream.write(&batch)?;
                stream.flush()?;
            }
            Message::Next(file, schema, bytes) => {
                let next = self::stream(file, &schema, bytes, shared)?;
                let mut done = mem::replace(&mut stream, next);
                done.finish()?;
            }
        }
        shared.waiting.fetch_sub(1, Ordering::Relaxed);
        shared.written.notify_one();
    }
    stream.finish()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::trace::Kind;

    #[test]
    fn each_file_counts_its_own_bytes_and_rows() {
        let files = [(); 2].map(|()| tempfile::NamedTempFile::new().unwrap());
        let open = |index: usize| files[index].reopen().unwrap();
        let capture = Capture::default();
        let mut writer = Writer::begin(open(0), &capture).unwrap();
        assert!(!writer.has_rows());
        let first = Arc::clone(&writer.bytes);
        let experts: Vec<u16> = (0..1000).collect();
        for _ in 0..1000 {
            writer.push(&Row {
                experts: &experts,
                ..Row::of(Kind::Routed)
            });
        }
        assert!(writer.has_rows());
        // Its rows are still to be written.
        writer.next_part(open(1), &capture);
        assert!(!writer.has_rows());
        let second = Arc::clone(&writer.bytes);
        let all = writer.finish().unwrap();
        let counted = [first, second].map(|bytes| bytes.load(Ordering::Relaxed));
        let sizes = files.map(|file| fs::metadata(file.path()).unwrap().len());
        assert_eq!((counted, all), (sizes, sizes.iter().sum()));
    }
}
