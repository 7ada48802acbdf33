//! Reading a trace, also one that is being written, was cut, or is damaged.

use std::{
    cell::Cell,
    collections::HashMap,
    fs::File,
    io::{BufReader, Read},
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    sync::{Arc, Once},
};

use arrow_array::{
    Array, ArrayRef, ArrowPrimitiveType, DictionaryArray, Float32Array, Int32Array, ListArray,
    PrimitiveArray, RecordBatch, StringArray, TimestampNanosecondArray, UInt16Array, UInt32Array,
    cast::AsArray as _, types::UInt8Type,
};
use arrow_ipc::{
    MessageHeader,
    convert::try_fb_to_schema,
    reader::{read_dictionary, read_record_batch},
};
use arrow_schema::{ArrowError, Schema, SchemaRef};
use expert_trace_common::Phase;
use thiserror::Error;

use super::{
    Kind, PHASES, Reason, Row,
    frames::{FrameError, Frames, Next},
    schema::{self, CAPTURE_KEY, Capture, FORMAT, FORMAT_KEY, VERSION, VERSION_KEY, column},
};
use crate::profile::printable;

/// Why a file cannot be read as a trace.
#[derive(Debug, Error)]
pub enum ReadError {
    /// It cannot be opened or read.
    #[error("cannot read {}: {error}", shown(path))]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// It is something else.
    #[error("{} is no trace of expert-trace: {why}", shown(path))]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it lacks.
        why: String,
    },
    /// This build cannot read its rows.
    #[error("cannot read {}: {}", shown(path), FrameError::Compressed)]
    Compressed {
        /// The file.
        path: PathBuf,
    },
    /// It was written by a newer program.
    #[error(
        "{} has version {found} of the trace format, and this program reads {VERSION}: use a newer \
         expert-trace",
        shown(path)
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: String,
    },
}

/// The name of a file, which can be anything, for a terminal.
fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

/// How a trace ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// As it should: with a summary, or in the next file of several.
    Whole,
    /// The writer was killed, is still at work, or the file was cut: what stands before is whole.
    Cut,
    /// What follows cannot be read, for this reason.
    Damaged(String),
}

/// Batches of a trace.
#[derive(Debug)]
pub struct Reader<R = BufReader<File>> {
    path: PathBuf,
    frames: Frames<R>,
    schema: SchemaRef,
    dictionaries: HashMap<i64, ArrayRef>,
    capture: Capture,
    ending: Option<Ending>,
}

impl Reader {
    /// Opens a trace.
    ///
    /// # Errors
    /// When it cannot be opened, is none, or was written by a newer program.
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        let file = File::open(path).map_err(|error| ReadError::Io {
            path: path.to_owned(),
            error,
        })?;
        Self::new(BufReader::with_capacity(1 << 20, file), path)
    }
}

impl<R: Read> Reader<R> {
    /// Begins to read a trace; `path` is for messages.
    ///
    /// # Errors
    /// Those of [`open`](Reader::open).
    pub fn new(input: R, path: &Path) -> Result<Self, ReadError> {
        let path = path.to_owned();
        let foreign = |why: String| ReadError::Foreign {
            path: path.clone(),
            why,
        };
        let mut frames = Frames::new(input);
        let frame = match frames.read() {
            Ok(Next::Frame(frame)) => frame,
            Ok(Next::End | Next::NoMore) => return Err(foreign("it is empty".into())),
            Err(FrameError::Io(error)) => {
                let path = path.clone();
                return Err(ReadError::Io { path, error });
            }
            Err(FrameError::Cut(_)) => {
                return Err(foreign("it ends before its schema does".into()));
            }
            Err(FrameError::Compressed) => return Err(ReadError::Compressed { path }),
            Err(FrameError::Damaged { .. }) => {
                return Err(foreign("it does not begin as an Arrow IPC stream".into()));
            }
        };
        let message = frame
            .message()
            .map_err(|error| foreign(error.to_string()))?;
        let Some(schema) = message.header_as_schema() else {
            return Err(foreign("it does not begin with a schema".into()));
        };
        let schema = try_fb_to_schema(schema).map_err(|error| foreign(error.to_string()))?;
        let metadata = |key| schema.metadata().get(key).map(String::as_str);
        if metadata(FORMAT_KEY) != Some(FORMAT) {
            return Err(foreign(format!(
                "its schema does not have {FORMAT_KEY} = {FORMAT}"
            )));
        }
        let version = metadata(VERSION_KEY).unwrap_or_default();
        match version.parse::<u32>() {
            Ok(VERSION) => {}
            Ok(newer) if newer > VERSION => {
                let found = version.to_owned();
                return Err(ReadError::Newer { path, found });
            }
            _ => return Err(foreign(format!("its version is '{version}'"))),
        }
        check_columns(&schema).map_err(foreign)?;
        let capture = metadata(CAPTURE_KEY).unwrap_or("{}");
        let capture = serde_json::from_str(capture).unwrap_or_default();
        Ok(Self {
            path,
            frames,
            schema: Arc::new(schema),
            dictionaries: HashMap::new(),
            capture,
            ending: None,
        })
    }

    /// What was known when the capture began.
    pub fn capture(&self) -> &Capture {
        &self.capture
    }

    /// Bytes that have been read.
    pub fn position(&self) -> u64 {
        self.frames.position()
    }

    /// How the trace ends, once [`next`](Self::next) has given all of it.
    pub fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    /// The next batch; none at the end, and where the rest cannot be read.
    ///
    /// # Errors
    /// When the file itself cannot be read.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator could not tell how it ended"
    )]
    pub fn next(&mut self) -> Result<Option<Batch>, ReadError> {
        while self.ending.is_none() {
            match self.next_batch() {
                Ok(Some(batch)) => return Ok(Some(batch)),
                Ok(None) => {}
                Err(error) => {
                    self.ending = Some(match error {
                        FrameError::Cut(_) => Ending::Cut,
                        FrameError::Damaged { .. } => Ending::Damaged(error.to_string()),
                        FrameError::Compressed => {
                            let path = self.path.clone();
                            return Err(ReadError::Compressed { path });
                        }
                        FrameError::Io(error) => {
                            let path = self.path.clone();
                            return Err(ReadError::Io { path, error });
                        }
                    });
                }
            }
        }
        Ok(None)
    }

    fn next_batch(&mut self) -> Result<Option<Batch>, FrameError> {
        let frame = match self.frames.read()? {
            Next::Frame(frame) => frame,
            Next::End => {
                self.ending = Some(Ending::Whole);
                return Ok(None);
            }
            Next::NoMore => {
                self.ending = Some(Ending::Cut);
                return Ok(None);
            }
        };
        let at = frame.at;
        let damaged = |why: String| FrameError::Damaged { at, why };
        let message = frame.message()?;
        let version = message.version();
        match message.header_type() {
            MessageHeader::DictionaryBatch => {
                let Some(dictionary) = message.header_as_dictionary_batch() else {
                    return Err(damaged("a dictionary without content".into()));
                };
                let known = &mut self.dictionaries;
                let schema = &self.schema;
                without_panic(|| read_dictionary(&frame.body, dictionary, schema, known, &version))
                    .map_err(damaged)?;
                Ok(None)
            }
            MessageHeader::RecordBatch => {
                let Some(batch) = message.header_as_record_batch() else {
                    return Err(damaged("a batch without content".into()));
                };
                let schema = Arc::clone(&self.schema);
                let known = &self.dictionaries;
                let batch = without_panic(|| {
                    read_record_batch(&frame.body, batch, schema, known, None, &version)
                });
                let batch = batch.map_err(damaged)?;
                Batch::new(&batch).map(Some).map_err(damaged)
            }
            other => Err(damaged(format!("a message of the kind {other:?}"))),
        }
    }
}

thread_local! {
    /// Whether a panic of this thread is an answer.
    static EXPECTS_PANIC: Cell<bool> = const { Cell::new(false) };
}

/// Reads columns. Of some that are damaged, arrow-buffer 60.1 asserts what it would have to check
/// (`Buffer::typed_data`).
fn without_panic<T>(read: impl FnOnce() -> Result<T, ArrowError>) -> Result<T, String> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !EXPECTS_PANIC.get() {
                usual(info);
            }
        }));
    });
    EXPECTS_PANIC.set(true);
    let result = panic::catch_unwind(AssertUnwindSafe(read));
    EXPECTS_PANIC.set(false);
    match result {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("its columns contradict each other".to_owned()),
    }
}

/// Whether all columns are there that every trace has, and all that are known of the right types. Further
/// ones may be.
fn check_columns(found: &Schema) -> Result<(), String> {
    let optional = schema::weights();
    let wanted = schema::fields().into_iter().chain([optional.clone()]);
    for wanted in wanted {
        let name = wanted.name();
        match found.field_with_name(name) {
            Err(_) if name == optional.name() => {}
            Ok(found) if found.data_type() == wanted.data_type() => {}
            Ok(found) => {
                return Err(format!(
                    "its column {name} has the type {}, not {}",
                    found.data_type(),
                    wanted.data_type()
                ));
            }
            Err(_) => return Err(format!("it has no column {name}")),
        }
    }
    Ok(())
}

/// Rows of a trace that were written together.
#[derive(Debug)]
pub struct Batch {
    /// The columns as they are in the file.
    pub columns: RecordBatch,
    kinds: Vec<Kind>,
    phases: Vec<Option<Phase>>,
    reasons: Vec<Option<Reason>>,
    context: UInt32Array,
    pass: UInt32Array,
    layer: UInt16Array,
    row: UInt32Array,
    rows: UInt32Array,
    sequence: UInt16Array,
    position: Int32Array,
    token: Int32Array,
    time: TimestampNanosecondArray,
    experts: ListArray,
    ids: UInt16Array,
    weights: Option<Weights>,
    detail: StringArray,
}

/// The column `weights`: lists, and all that is in them.
#[derive(Debug)]
struct Weights {
    lists: ListArray,
    values: Float32Array,
}

impl Weights {
    /// That of a batch, if it has one.
    fn of(batch: &RecordBatch, experts: &ListArray) -> Result<Option<Self>, String> {
        let Some(column) = batch.column_by_name(column::WEIGHTS) else {
            return Ok(None);
        };
        let lists: ListArray = column.as_list().clone();
        let fits = |row| lists.is_null(row) || lists.value_length(row) == experts.value_length(row);
        if !(0..lists.len()).all(fits) {
            return Err("a row has not as many weights as experts".to_owned());
        }
        Ok(Some(Self {
            values: lists.values().as_primitive().clone(),
            lists,
        }))
    }

    fn at(&self, row: usize) -> Option<&[f32]> {
        let offsets = &self.lists.value_offsets()[row..row + 2];
        let of_row = offsets[0] as usize..offsets[1] as usize;
        self.lists
            .is_valid(row)
            .then(|| &self.values.values()[of_row])
    }
}

impl Batch {
    fn new(batch: &RecordBatch) -> Result<Self, String> {
        let column = |name: &str| batch.column_by_name(name).ok_or_else(|| name.to_owned());
        let keys = |name: &str, of: &[&str]| keys(column(name)?.as_dictionary(), of);
        let kinds = keys(column::RECORD, &Kind::ALL.map(Kind::name))?;
        let kinds: Option<Vec<Kind>> = kinds
            .into_iter()
            .map(|key| Some(Kind::ALL[usize::from(key?)]))
            .collect();
        let phases = keys(column::PHASE, &PHASES)?;
        let phase = |key| {
            if key == 0 {
                Phase::Prefill
            } else {
                Phase::Decode
            }
        };
        let reasons = keys(column::REASON, &Reason::ALL.map(Reason::name))?;
        let reason = |key: u8| Reason::ALL[usize::from(key)];
        let experts: ListArray = column(column::EXPERTS)?.as_list().clone();
        Ok(Self {
            kinds: kinds.ok_or("a row of no kind")?,
            phases: phases.into_iter().map(|key| key.map(phase)).collect(),
            reasons: reasons.into_iter().map(|key| key.map(reason)).collect(),
            context: column(column::CONTEXT)?.as_primitive().clone(),
            pass: column(column::PASS)?.as_primitive().clone(),
            layer: column(column::LAYER)?.as_primitive().clone(),
            row: column(column::ROW)?.as_primitive().clone(),
            rows: column(column::ROWS)?.as_primitive().clone(),
            sequence: column(column::SEQUENCE)?.as_primitive().clone(),
            position: column(column::POSITION)?.as_primitive().clone(),
            token: column(column::TOKEN)?.as_primitive().clone(),
            time: column(column::TIME)?.as_primitive().clone(),
            ids: experts.values().as_primitive().clone(),
            weights: Weights::of(batch, &experts)?,
            experts,
            detail: column(column::DETAIL)?.as_string().clone(),
            columns: batch.clone(),
        })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// The rows, in order.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = Row<'_>> {
        (0..self.len()).map(|index| self.row(index))
    }

    /// One row.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn row(&self, index: usize) -> Row<'_> {
        let offsets = &self.experts.value_offsets()[index..index + 2];
        let experts = offsets[0] as usize..offsets[1] as usize;
        Row {
            kind: self.kinds[index],
            context: at(&self.context, index),
            pass: at(&self.pass, index),
            phase: self.phases[index],
            layer: at(&self.layer, index),
            row: at(&self.row, index),
            rows: at(&self.rows, index),
            sequence: at(&self.sequence, index),
            position: at(&self.position, index),
            token: at(&self.token, index),
            time_ns: self.time.value(index),
            experts: &self.ids.values()[experts],
            weights: self.weights.as_ref().and_then(|weights| weights.at(index)),
            reason: self.reasons[index],
            detail: self
                .detail
                .is_valid(index)
                .then(|| self.detail.value(index)),
        }
    }
}

#[inline]
fn at<T: ArrowPrimitiveType>(array: &PrimitiveArray<T>, index: usize) -> Option<T::Native> {
    array.is_valid(index).then(|| array.value(index))
}

/// Of each row, which of `names` it has: a file can have them in another order.
fn keys(array: &DictionaryArray<UInt8Type>, names: &[&str]) -> Result<Vec<Option<u8>>, String> {
    let found: &StringArray = array
        .values()
        .as_any()
        .downcast_ref()
        .ok_or("names that are no text")?;
    let known: Vec<Option<u8>> = found
        .iter()
        .map(|name| {
            let index = names.iter().position(|known| Some(*known) == name)?;
            Some(index as u8)
        })
        .collect();
    let keys = array.keys();
    (0..keys.len())
        .map(|index| {
            if keys.is_null(index) {
                return Ok(None);
            }
            let key = usize::from(keys.value(index));
            match known.get(key) {
                Some(Some(known)) => Ok(Some(*known)),
                _ => {
                    let name = (key < found.len()).then(|| found.value(key));
                    Err(format!("'{}' is not known", name.unwrap_or("?")))
                }
            }
        })
        .collect()
}
