//! Headers of GGUF model files: what a model is, without its weights.
//!
//! Reads versions 2 and 3 in little-endian order, the ones llama.cpp itself accepts on the machines
//! this program runs on. The layout is in `ggml/include/gguf.h` of llama.cpp, the checks follow
//! `gguf_init_from_reader` in `ggml/src/gguf.cpp`.
//!
//! A model file is untrusted input. Nothing is allocated from a number found in it before that
//! number was held against a limit and against the file's length, so that a hostile header costs at
//! most [`MAX_HEADER`] bytes of reading and ends in a [`GgufError`].
//!
//! - [`Gguf`]: one file's key-value pairs and tensor directory
//! - [`ModelShape`]: layers, experts and routing of a model, over all files it is split into
//! - [`SpecialTokens`]: the ids llama.cpp uses for begin and end of text

mod shape;
mod sizes;
#[cfg(test)]
pub(crate) mod tests;
mod tokens;

use std::collections::BTreeMap;

use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;

pub use shape::{ExpertsUsed, ModelShape, shard_paths};
pub use sizes::LayerBytes;
pub use tokens::{SpecialTokens, special_tokens};

/// Header bytes read before giving up. The largest in use, with two copies of a vocabulary of
/// 256 k tokens, are below 32 MiB.
pub const MAX_HEADER: u64 = 256 << 20;
/// Longest key or tensor name in bytes.
const MAX_NAME: u64 = 64 << 10;
/// Longest string value that is kept, in bytes; longer ones become [`Value::Skipped`].
const MAX_STRING: u64 = 1 << 20;
/// Longest array that is kept, in elements; longer ones become [`Value::Skipped`].
const MAX_ARRAY: u64 = 4096;
const MAX_KV: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 20;
/// `GGML_MAX_DIMS`.
const MAX_DIMS: u32 = 4;
/// `GGUF_DEFAULT_ALIGNMENT`.
const DEFAULT_ALIGNMENT: u64 = 32;

/// Value types of `enum gguf_type` that are handled by number.
const TYPE_STRING: u32 = 8;
const TYPE_ARRAY: u32 = 9;

/// Why a file could not be understood. Offsets count bytes from the start of the file.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The operating system refused to open or read the file.
    #[error("cannot read at offset {offset}")]
    Io {
        /// Where reading was to go on; 0 when the file could not be opened.
        offset: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file does not start with `GGUF`.
    #[error("not a GGUF file: it starts with {0:02x?} instead of \"GGUF\"")]
    Magic([u8; 4]),
    /// A version, or a byte order, that this reader does not know.
    #[error("GGUF version {0} at offset 4 is not supported, only 2 and 3 in little-endian order")]
    Version(u32),
    /// The file ends inside its header, or before the data of one of its tensors.
    #[error("the file ends at {file_len}, in the middle of {what} at offset {offset}")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Where it starts.
        offset: u64,
        /// Length of the file in bytes.
        file_len: u64,
    },
    /// A count, length or position beyond what a real model has.
    #[error("{what} of {value} at offset {offset} exceeds the limit of {max}")]
    Limit {
        /// What the number means.
        what: &'static str,
        /// Where it stands.
        offset: u64,
        /// The number itself.
        value: u64,
        /// The largest number accepted.
        max: u64,
    },
    /// A value type that does not exist, or an array of arrays.
    #[error("unknown value type {value_type} at offset {offset}")]
    Type {
        /// Where the type stands.
        offset: u64,
        /// The number found there.
        value_type: u32,
    },
    /// A key or tensor name that is not text.
    #[error("the {what} at offset {offset} is not UTF-8")]
    NotUtf8 {
        /// `key` or `tensor name`.
        what: &'static str,
        /// Where it starts.
        offset: u64,
    },
    /// The same key twice.
    #[error("second occurrence of key {key:?} at offset {offset}")]
    Duplicate {
        /// The key.
        key: String,
        /// Where it stands the second time.
        offset: u64,
    },
    /// A key that the model cannot do without is missing, or has a value that makes no sense.
    #[error("key {key:?} {problem}")]
    Key {
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// The value of one key.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An unsigned integer of any width.
    Uint(u64),
    /// A signed integer of any width.
    Int(i64),
    /// A floating-point number of either width.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A string of up to 1 MiB; bytes that are not UTF-8 are replaced.
    String(String),
    /// An array of up to 4096 integers or truth values (0 or 1).
    Ints(Vec<i64>),
    /// A long string or any other array: known to be there, but not kept.
    Skipped {
        /// `enum gguf_type` of the elements; that of a string (8) for a long string.
        element_type: u32,
        /// Elements of the array, or bytes of the string.
        len: u64,
    },
}

impl Value {
    /// The value as a number that counts something, if it is one.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::Uint(n) => Some(n),
            Value::Int(n) => u64::try_from(n).ok(),
            _ => None,
        }
    }

    fn as_array_element(&self) -> Option<i64> {
        match *self {
            Value::Uint(n) => i64::try_from(n).ok(),
            Value::Int(n) => Some(n),
            Value::Bool(b) => Some(b.into()),
            _ => None,
        }
    }
}

/// An entry of the tensor directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Such as `blk.0.ffn_gate_inp.weight`.
    pub name: String,
    /// Elements per dimension, the contiguous one first (`ne` of ggml); at most four.
    pub shape: Vec<u64>,
    /// `enum ggml_type`: 0 is F32, 1 is F16.
    pub ggml_type: u32,
    /// Start of the data in bytes, counted from [`Gguf::data_offset`].
    pub offset: u64,
}

/// The header of one GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub struct Gguf {
    /// All key-value pairs.
    pub kv: BTreeMap<String, Value>,
    /// Where each pair lies in the file, from the length of its key to the end of its value, so that
    /// it can be copied without being understood.
    pub kv_spans: BTreeMap<String, Range<u64>>,
    /// The tensor directory, in the order of the file.
    pub tensors: Vec<TensorInfo>,
    /// Where tensor data starts, in bytes from the start of the file.
    pub data_offset: u64,
}

impl Gguf {
    /// Reads the header that starts at offset 0 of `source`. The position of `source` afterwards is
    /// unspecified.
    ///
    /// # Errors
    ///
    /// A [`GgufError`] that says where the file departs from the format, or ends too early. Of the
    /// keys only `general.alignment` is looked into.
    pub fn read<R: Read + Seek>(source: &mut R) -> Result<Gguf, GgufError> {
        let mut header = Header::new(source)?;
        let magic = header.bytes("the magic")?;
        if &magic != b"GGUF" {
            return Err(GgufError::Magic(magic));
        }
        let version = header.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Version(version));
        }
        let n_tensors = header.limited("number of tensors", MAX_TENSORS)?;
        let n_kv = header.limited("number of keys", MAX_KV)?;

        let mut kv = BTreeMap::new();
        let mut kv_spans = BTreeMap::new();
        for _ in 0..n_kv {
            let start = header.at;
            let key = header.name("key")?;
            if kv.contains_key(&key) {
                return Err(GgufError::Duplicate { key, offset: start });
            }
            let value = header.value()?;
            kv_spans.insert(key.clone(), start..header.at);
            kv.insert(key, value);
        }

        // Not preallocated: 24 bytes of file stand behind every element, but only once it was read.
        let mut tensors = Vec::new();
        for _ in 0..n_tensors {
            tensors.push(header.tensor_info()?);
        }

        let alignment = alignment(&kv)?;
        let data_offset = header.at.next_multiple_of(alignment);
        for tensor in &tensors {
            if header.len.checked_sub(data_offset) < Some(tensor.offset) {
                return Err(GgufError::Truncated {
                    what: "tensor data",
                    offset: data_offset.saturating_add(tensor.offset),
                    file_len: header.len,
                });
            }
        }
        Ok(Gguf {
            kv,
            kv_spans,
            tensors,
            data_offset,
        })
    }

    /// `general.architecture`, such as `qwen3moe`: the prefix of the model's own keys.
    pub fn arch(&self) -> Option<&str> {
        self.string("general.architecture")
    }

    /// The value of `key` if it is an integer that is not negative.
    pub fn u64(&self, key: &str) -> Option<u64> {
        self.kv.get(key)?.as_u64()
    }

    /// The value of `<arch>.<key>` if it is an integer that is not negative.
    pub fn arch_u64(&self, key: &str) -> Option<u64> {
        self.u64(&format!("{}.{key}", self.arch()?))
    }

    /// The value of `key` if it is a string that was kept.
    pub fn string(&self, key: &str) -> Option<&str> {
        match self.kv.get(key)? {
            Value::String(s) => Some(s),
            _ => None,
        }
    }
}

/// `general.alignment`, held to the rule of llama.cpp and to a size that cannot overflow.
fn alignment(kv: &BTreeMap<String, Value>) -> Result<u64, GgufError> {
    let key = "general.alignment";
    match kv.get(key) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::Uint(n)) if n.is_power_of_two() && *n <= u64::from(u32::MAX) => Ok(*n),
        Some(_) => Err(GgufError::Key {
            key: key.to_owned(),
            problem: "is not a power of two of 32 bits",
        }),
    }
}

/// A cursor over the header that knows the file's length, so that skipping is checked as well.
struct Header<'a, R> {
    source: BufReader<&'a mut R>,
    at: u64,
    len: u64,
}

impl<'a, R: Read + Seek> Header<'a, R> {
    fn new(source: &'a mut R) -> Result<Self, GgufError> {
        let seek = |source: &mut R, to| {
            source
                .seek(to)
                .map_err(|source| GgufError::Io { offset: 0, source })
        };
        let len = seek(source, SeekFrom::End(0))?;
        seek(source, SeekFrom::Start(0))?;
        Ok(Header {
            source: BufReader::new(source),
            at: 0,
            len,
        })
    }

    /// Checks that `n` more bytes are there and may be read; returns the offset after them.
    fn end_of(&self, what: &'static str, n: u64) -> Result<u64, GgufError> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.len);
        let end = end.ok_or(GgufError::Truncated {
            what,
            offset: self.at,
            file_len: self.len,
        })?;
        if end > MAX_HEADER {
            return Err(GgufError::Limit {
                what: "header size",
                offset: self.at,
                value: end,
                max: MAX_HEADER,
            });
        }
        Ok(end)
    }

    fn fill(&mut self, what: &'static str, buf: &mut [u8]) -> Result<(), GgufError> {
        let end = self.end_of(what, buf.len() as u64)?;
        self.source
            .read_exact(buf)
            .map_err(|source| GgufError::Io {
                offset: self.at,
                source,
            })?;
        self.at = end;
        Ok(())
    }

    /// Reads `n` bytes; the caller has bounded `n`.
    fn vec(&mut self, what: &'static str, n: u64) -> Result<Vec<u8>, GgufError> {
        self.end_of(what, n)?;
        let mut buf = vec![0; n as usize];
        self.fill(what, &mut buf)?;
        Ok(buf)
    }

    fn skip(&mut self, what: &'static str, n: u64) -> Result<(), GgufError> {
        let end = self.end_of(what, n)?;
        // `end_of` keeps n below MAX_HEADER, far from overflowing an i64.
        self.source
            .seek_relative(n as i64)
            .map_err(|source| GgufError::Io {
                offset: self.at,
                source,
            })?;
        self.at = end;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufError> {
        let mut buf = [0; N];
        self.fill(what, &mut buf)?;
        Ok(buf)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        self.bytes(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        self.bytes(what).map(u64::from_le_bytes)
    }

    fn limited(&mut self, what: &'static str, max: u64) -> Result<u64, GgufError> {
        let offset = self.at;
        let value = self.u64(what)?;
        if value > max {
            return Err(GgufError::Limit {
                what,
                offset,
                value,
                max,
            });
        }
        Ok(value)
    }

    fn name(&mut self, what: &'static str) -> Result<String, GgufError> {
        let n = self.limited("name length", MAX_NAME)?;
        let offset = self.at;
        let bytes = self.vec(what, n)?;
        String::from_utf8(bytes).map_err(|_| GgufError::NotUtf8 { what, offset })
    }

    fn value(&mut self) -> Result<Value, GgufError> {
        let offset = self.at;
        let value_type = self.u32("a value type")?;
        match value_type {
            TYPE_STRING => self.string(),
            TYPE_ARRAY => self.array(),
            _ => {
                let size = scalar_size(value_type).ok_or(GgufError::Type { offset, value_type })?;
                let raw = self.vec("a value", size)?;
                scalar(value_type, &raw).ok_or(GgufError::Type { offset, value_type })
            }
        }
    }

    fn string(&mut self) -> Result<Value, GgufError> {
        let len = self.u64("a string length")?;
        if len > MAX_STRING {
            self.skip("a string", len)?;
            return Ok(Value::Skipped {
                element_type: TYPE_STRING,
                len,
            });
        }
        let bytes = self.vec("a string", len)?;
        Ok(Value::String(String::from_utf8_lossy(&bytes).into_owned()))
    }

    fn array(&mut self) -> Result<Value, GgufError> {
        let offset = self.at;
        let element_type = self.u32("an array's element type")?;
        let len = self.u64("an array's length")?;
        let skipped = Value::Skipped { element_type, len };
        if element_type == TYPE_STRING {
            for _ in 0..len {
                let n = self.u64("a string length")?;
                self.skip("a string in an array", n)?;
            }
            return Ok(skipped);
        }
        let size = scalar_size(element_type).ok_or(GgufError::Type {
            offset,
            value_type: element_type,
        })?;
        if len > MAX_ARRAY {
            self.skip("an array", len.saturating_mul(size))?;
            return Ok(skipped);
        }
        let raw = self.vec("an array", len * size)?;
        let ints: Option<Vec<i64>> = raw
            .chunks_exact(size as usize)
            .map(|element| scalar(element_type, element)?.as_array_element())
            .collect();
        Ok(ints.map_or(skipped, Value::Ints))
    }

    fn tensor_info(&mut self) -> Result<TensorInfo, GgufError> {
        let name = self.name("tensor name")?;
        let offset = self.at;
        let n_dims = self.u32("a number of dimensions")?;
        if n_dims > MAX_DIMS {
            return Err(GgufError::Limit {
                what: "number of dimensions",
                offset,
                value: n_dims.into(),
                max: MAX_DIMS.into(),
            });
        }
        let shape = (0..n_dims)
            .map(|_| self.u64("a tensor's shape"))
            .collect::<Result<_, _>>()?;
        Ok(TensorInfo {
            name,
            shape,
            ggml_type: self.u32("a tensor's type")?,
            offset: self.u64("a tensor's offset")?,
        })
    }
}

/// Bytes of a value of `enum gguf_type` that has a fixed size.
fn scalar_size(value_type: u32) -> Option<u64> {
    match value_type {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// Decodes a value of fixed size, in the numbering of `enum gguf_type`.
fn scalar(value_type: u32, raw: &[u8]) -> Option<Value> {
    fn le<const N: usize>(raw: &[u8]) -> Option<[u8; N]> {
        raw.try_into().ok()
    }
    Some(match value_type {
        0 => Value::Uint(u8::from_le_bytes(le(raw)?).into()),
        1 => Value::Int(i8::from_le_bytes(le(raw)?).into()),
        2 => Value::Uint(u16::from_le_bytes(le(raw)?).into()),
        3 => Value::Int(i16::from_le_bytes(le(raw)?).into()),
        4 => Value::Uint(u32::from_le_bytes(le(raw)?).into()),
        5 => Value::Int(i32::from_le_bytes(le(raw)?).into()),
        6 => Value::Float(f32::from_le_bytes(le(raw)?).into()),
        7 => Value::Bool(le(raw)? != [0]),
        10 => Value::Uint(u64::from_le_bytes(le(raw)?)),
        11 => Value::Int(i64::from_le_bytes(le(raw)?)),
        12 => Value::Float(f64::from_le_bytes(le(raw)?)),
        _ => return None,
    })
}
