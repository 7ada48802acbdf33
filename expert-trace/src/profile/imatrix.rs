//! Counts of routed rows in the files that `llama-imatrix` writes.
//!
//! `imatrix.cpp` (llama.cpp b11434) looks at every multiplication by the weights of experts
//! (`MUL_MAT_ID`), and adds 1 to an expert's count for every row and rank with its id. Each of these weights has
//! its own counts, and all weights of a layer get the same ids: every activation is counted two times or three.
//! They are stored as `<weight>.counts`, F32 `[1, n_expert]`, in a GGUF whose `general.type` is `imatrix`.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

use expert_trace_common::{MAX_EXPERTS, MAX_LAYERS};
use thiserror::Error;

use super::printable;
use crate::gguf::{Gguf, GgufError, TensorInfo};

/// Number of F32 in `enum ggml_type`.
const F32: u32 = 0;
/// From here on, an F32 cannot tell neighbouring integers apart.
pub const EXACT_F32: f32 = 16_777_216.0;

/// Weights of a layer's router.
const ROUTER: &str = "ffn_gate_inp";
/// Weights of a layer that are multiplied for the chosen experts: `ffn_<name>_exps`.
const WEIGHTS: [&str; 4] = ["down", "gate", "up", "gate_up"];

/// What a file counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Imatrix {
    /// By layer and weight (`down`, `gate`, `up`, `gate_up`), the rows of each expert.
    pub layers: BTreeMap<u16, BTreeMap<&'static str, Vec<u64>>>,
    /// By layer, the rows of its router, which is used once for every token; of files that have them.
    pub routers: BTreeMap<u16, u64>,
    /// Whether there are counts of second blocks of experts (GroveMoE).
    pub second_block: bool,
    /// Chunks of text that were computed, and the tokens of each, where the file says so.
    pub chunks: Option<[u64; 2]>,
}

/// Why a file shows no counts.
#[derive(Debug, Error)]
pub enum ImatrixError {
    /// It cannot be opened or read.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// It is no GGUF that can be read.
    #[error(
        "cannot be understood: {0}. The older format (.dat) has no counts of experts: have llama-imatrix \
         write a .gguf"
    )]
    Gguf(#[from] GgufError),
    /// It is a GGUF of another kind.
    #[error("is a GGUF of type '{0}', and no imatrix")]
    Type(String),
    /// It has no counts of experts.
    #[error("has no counts of experts: it is of a dense model")]
    Dense,
    /// The counts of a weight have a form that cannot be.
    #[error("is damaged: {name} {why}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// One count for all experts, as files have it that were made of ones of the older format.
    #[error(
        "has one count for all experts ({0}): it was made from a file of the older format (.dat), which has no \
         counts of experts"
    )]
    Single(String),
}

/// Reads the counts of a file.
///
/// # Errors
/// When it has none, or none that are exact.
pub fn read(path: &Path) -> Result<Imatrix, ImatrixError> {
    read_from(&mut File::open(path)?)
}

/// The same of a file that is open.
///
/// # Errors
/// Those of [`read`].
pub fn read_from<R: Read + Seek>(file: &mut R) -> Result<Imatrix, ImatrixError> {
    let gguf = Gguf::read(file)?;
    match gguf.string("general.type") {
        Some("imatrix") => {}
        other => return Err(ImatrixError::Type(printable(other.unwrap_or("model")))),
    }
    let number = |key| gguf.u64(key).filter(|number| *number > 0);
    let mut imatrix = Imatrix {
        chunks: number("imatrix.chunk_count")
            .zip(number("imatrix.chunk_size"))
            .map(<[u64; 2]>::from),
        ..Imatrix::default()
    };
    for tensor in &gguf.tensors {
        let Some((layer, part)) = counts_of(&tensor.name) else {
            continue;
        };
        if part.ends_with("_chexps") {
            imatrix.second_block = true;
        }
        if part == ROUTER && matches!(tensor.shape[..], [1] | [1, 1]) {
            // More than an F32 counts exactly are none that help.
            let rows = values(file, &gguf, tensor, 1).unwrap_or_default();
            imatrix
                .routers
                .extend(rows.first().map(|rows| (layer, *rows)));
        }
        let Some(weight) = weight(part) else {
            continue;
        };
        let n_expert = match tensor.shape[..] {
            [1] | [1, 1] => return Err(ImatrixError::Single(printable(&tensor.name))),
            [1, n_expert] if (2..=MAX_EXPERTS as u64).contains(&n_expert) => n_expert as usize,
            _ => return Err(damaged(tensor, "is not [1, number of experts]")),
        };
        let counts = values(file, &gguf, tensor, n_expert)?;
        match imatrix.layers.entry(layer).or_default().entry(weight) {
            Entry::Vacant(place) => place.insert(counts),
            Entry::Occupied(_) => return Err(damaged(tensor, "is there twice")),
        };
    }
    match imatrix.layers.is_empty() {
        true => Err(ImatrixError::Dense),
        false => Ok(imatrix),
    }
}

fn damaged(tensor: &TensorInfo, why: &'static str) -> ImatrixError {
    ImatrixError::Tensor {
        name: printable(&tensor.name),
        why,
    }
}

/// The first values of a tensor, which have to be counts.
fn values<R: Read + Seek>(
    file: &mut R,
    gguf: &Gguf,
    tensor: &TensorInfo,
    n: usize,
) -> Result<Vec<u64>, ImatrixError> {
    const BEYOND: &str = "lies beyond the end of the file";
    if tensor.ggml_type != F32 {
        return Err(damaged(tensor, "is not F32"));
    }
    let start = gguf.data_offset.checked_add(tensor.offset);
    file.seek(SeekFrom::Start(
        start.ok_or_else(|| damaged(tensor, BEYOND))?,
    ))?;
    let mut bytes = vec![0; 4 * n];
    file.read_exact(&mut bytes)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged(tensor, BEYOND),
            _ => error.into(),
        })?;
    let (values, _) = bytes.as_chunks::<4>();
    let counts = values.iter().map(|value| exact(f32::from_le_bytes(*value)));
    counts.collect::<Option<_>>().ok_or_else(|| {
        let why = "has counts that are no integers, or too large (2^24) to be exact";
        damaged(tensor, why)
    })
}

/// Layer and weight, such as `ffn_down_exps`, of the name of counts.
fn counts_of(name: &str) -> Option<(u16, &str)> {
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer = layer.parse().ok().filter(|layer| *layer < MAX_LAYERS)?;
    Some((layer, part.strip_suffix(".weight.counts")?))
}

fn weight(part: &str) -> Option<&'static str> {
    let name = part.strip_prefix("ffn_")?.strip_suffix("_exps")?;
    WEIGHTS.into_iter().find(|weight| *weight == name)
}

fn exact(value: f32) -> Option<u64> {
    ((0.0..EXACT_F32).contains(&value) && value.fract() == 0.0).then_some(value as u64)
}

#[cfg(test)]
pub mod tests {
    use std::io::Cursor;

    use super::*;

    /// A tensor: name, shape, type, values.
    pub type Tensor<'a> = (&'a str, &'a [u64], u32, &'a [f32]);

    /// An imatrix file of these tensors.
    pub fn file(of_type: &str, tensors: &[Tensor<'_>]) -> Vec<u8> {
        let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend((tensors.len() as u64).to_le_bytes());
        bytes.extend(3_u64.to_le_bytes());
        bytes.extend(
            [
                &text("general.type")[..],
                &8_u32.to_le_bytes(),
                &text(of_type),
            ]
            .concat(),
        );
        for (key, value) in [("imatrix.chunk_count", 3_u32), ("imatrix.chunk_size", 64)] {
            bytes.extend(text(key));
            bytes.extend(4_u32.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        let mut data = Vec::new();
        for (name, shape, ggml_type, values) in tensors {
            bytes.extend(text(name));
            bytes.extend((shape.len() as u32).to_le_bytes());
            shape.iter().for_each(|n| bytes.extend(n.to_le_bytes()));
            bytes.extend(ggml_type.to_le_bytes());
            bytes.extend((data.len() as u64).to_le_bytes());
            values
                .iter()
                .for_each(|value| data.extend(value.to_le_bytes()));
            data.resize(data.len().next_multiple_of(32), 0);
        }
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(data);
        bytes
    }

    fn of(tensors: &[Tensor<'_>]) -> Result<Imatrix, ImatrixError> {
        read_from(&mut Cursor::new(file("imatrix", tensors)))
    }

    #[test]
    fn counts_of_every_weight_are_read() {
        let imatrix = of(&[
            ("blk.0.attn_k.weight.counts", &[1], 0, &[9.0]),
            ("blk.0.attn_k.weight.in_sum2", &[2], 0, &[0.5, 9.0]),
            ("blk.1.ffn_gate_inp.weight.counts", &[1], 0, &[5.0]),
            (
                "blk.1.ffn_down_exps.weight.counts",
                &[1, 3],
                0,
                &[0.0, 7.0, 2.0],
            ),
            (
                "blk.1.ffn_gate_up_exps.weight.counts",
                &[1, 3],
                0,
                &[0.0, 7.0, 2.0],
            ),
            ("blk.1.ffn_up_chexps.weight.counts", &[1, 2], 0, &[1.0, 1.0]),
            (
                "blk.2.ffn_up_exps.weight.counts",
                &[1, 2],
                0,
                &[16_777_215.0, 0.0],
            ),
            ("output.weight.counts", &[1], 0, &[9.0]),
        ])
        .unwrap();
        let first = BTreeMap::from([("down", vec![0, 7, 2]), ("gate_up", vec![0, 7, 2])]);
        let second = BTreeMap::from([("up", vec![16_777_215, 0])]);
        assert_eq!(imatrix.layers, BTreeMap::from([(1, first), (2, second)]));
        assert_eq!(imatrix.routers, BTreeMap::from([(1, 5)]));
        assert!(imatrix.second_block);
        assert_eq!(imatrix.chunks, Some([3, 64]));
    }

    #[test]
    fn what_has_no_exact_counts_is_refused() {
        let name = "blk.0.ffn_down_exps.weight.counts";
        for (tensors, reason) in [
            (vec![], "dense model"),
            (
                vec![("blk.0.attn_k.weight.counts", &[1][..], 0, &[1.0][..])],
                "dense model",
            ),
            (
                vec![(
                    "blk.9999.ffn_down_exps.weight.counts",
                    &[1, 2],
                    0,
                    &[1.0, 1.0],
                )],
                "dense",
            ),
            (vec![(name, &[1], 0, &[1.0])], "one count for all"),
            (vec![(name, &[2], 0, &[1.0, 2.0])], "is not [1, number"),
            (vec![(name, &[1, 1025], 0, &[])], "is not [1, number"),
            (vec![(name, &[1, u64::MAX], 0, &[])], "is not [1, number"),
            (vec![(name, &[1, 1024], 0, &[1.0])], "beyond the end"),
            (vec![(name, &[1, 2], 1, &[1.0, 2.0])], "is not F32"),
            (vec![(name, &[1, 2], 0, &[1.5, 2.0])], "no integers"),
            (vec![(name, &[1, 2], 0, &[-1.0, 2.0])], "no integers"),
            (vec![(name, &[1, 2], 0, &[f32::NAN, 2.0])], "no integers"),
            (
                vec![(name, &[1, 2], 0, &[16_777_216.0, 2.0])],
                "no integers",
            ),
            (vec![(name, &[1, 2], 0, &[1.0, 2.0]); 2], "is there twice"),
        ] {
            let error = of(&tensors).unwrap_err().to_string();
            assert!(error.contains(reason), "{tensors:?}: {error}");
        }
        let model = read_from(&mut Cursor::new(file("model", &[]))).unwrap_err();
        assert!(model.to_string().contains("type 'model'"), "{model}");
        let dat = read_from(&mut Cursor::new(b"\x05\0\0\0older format")).unwrap_err();
        assert!(dat.to_string().contains("older format (.dat)"), "{dat}");
    }

    #[test]
    fn every_truncation_is_an_error() {
        let name = "blk.0.ffn_down_exps.weight.counts";
        let whole = file("imatrix", &[(name, &[1, 8], 0, &[1.0; 8])]);
        assert!(read_from(&mut Cursor::new(&whole)).is_ok());
        for length in 0..whole.len() {
            assert!(
                read_from(&mut Cursor::new(&whole[..length])).is_err(),
                "{length}"
            );
        }
    }
}
