//! Writes GGUF version 3 files.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use super::rng::Rng;

/// `GGUF_DEFAULT_ALIGNMENT`, of the data section and of each tensor in it.
const ALIGNMENT: u64 = 32;

/// A type that weights are stored in, by its name in `enum ggml_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightType {
    F32,
    F16,
    /// Blocks of 32.
    Q4_0,
    /// Blocks of 32.
    Q8_0,
    /// Blocks of 256.
    Q4K,
}

impl WeightType {
    /// Sizes are those of the blocks in ggml-common.h.
    fn storage(self) -> Storage {
        let (ggml_type, block, bytes) = match self {
            WeightType::F32 => (0, 1, 4),
            WeightType::F16 => (1, 1, 2),
            WeightType::Q4_0 => (2, 32, 18),
            WeightType::Q8_0 => (8, 32, 34),
            WeightType::Q4K => (12, 256, 144),
        };
        Storage {
            ggml_type,
            block,
            bytes,
        }
    }

    /// Elements that are stored together: rows are multiples of it.
    pub fn block(self) -> u32 {
        self.storage().block as u32
    }

    /// Bytes of so many elements, in rows of whole blocks.
    pub fn bytes(self, elements: u32) -> u64 {
        let Storage { block, bytes, .. } = self.storage();
        u64::from(elements) / block * bytes
    }
}

/// Where a tensor's elements come from, in the type they are stored in.
pub enum Data {
    F32(Vec<f32>),
    F16(Vec<u16>),
    /// A hole in the file: in every type, bytes of 0 are weights of 0.
    Zero(WeightType),
    /// Drawn while writing, so that large tensors are never in memory.
    NormalF16 {
        std: f32,
    },
    NormalF32 {
        std: f32,
    },
    /// Blocks of Q4_0 (`block_q4_0` in ggml-common.h) with this scale and uniformly drawn quants.
    RandomQ4 {
        scale: f32,
    },
}

/// How a type is stored: `enum ggml_type`, elements of a block, and its bytes.
struct Storage {
    ggml_type: u32,
    block: u64,
    bytes: u64,
}

pub struct Tensor {
    pub name: String,
    /// The contiguous dimension first.
    pub shape: Vec<u64>,
    pub data: Data,
}

impl Tensor {
    fn storage(&self) -> Storage {
        let weight_type = match self.data {
            Data::F32(_) | Data::NormalF32 { .. } => WeightType::F32,
            Data::F16(_) | Data::NormalF16 { .. } => WeightType::F16,
            Data::Zero(weight_type) => weight_type,
            Data::RandomQ4 { .. } => WeightType::Q4_0,
        };
        weight_type.storage()
    }

    fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    fn write(&self, out: &mut impl Write, rng: &mut Rng) -> io::Result<()> {
        match &self.data {
            Data::F32(values) => values
                .iter()
                .try_for_each(|x| out.write_all(&x.to_le_bytes())),
            Data::F16(values) => values
                .iter()
                .try_for_each(|x| out.write_all(&x.to_le_bytes())),
            Data::Zero(_) => Ok(()),
            Data::NormalF16 { std } => (0..self.elements())
                .try_for_each(|_| out.write_all(&f16(rng.normal() * std).to_le_bytes())),
            Data::NormalF32 { std } => (0..self.elements())
                .try_for_each(|_| out.write_all(&(rng.normal() * std).to_le_bytes())),
            Data::RandomQ4 { scale } => {
                let scale = f16(*scale).to_le_bytes();
                (0..self.elements() / 32).try_for_each(|_| {
                    out.write_all(&scale)?;
                    out.write_all(&rng.next().to_le_bytes())?;
                    out.write_all(&rng.next().to_le_bytes())
                })
            }
        }
    }
}

/// A file in the making. Keys and tensors are written in the order they are added.
#[derive(Default)]
pub struct GgufFile {
    n_kv: u64,
    kv: Vec<u8>,
    tensors: Vec<Tensor>,
}

impl GgufFile {
    pub fn u16(&mut self, key: &str, value: u16) {
        self.pair(key, 2, &value.to_le_bytes());
    }

    pub fn i32(&mut self, key: &str, value: i32) {
        self.pair(key, 5, &value.to_le_bytes());
    }

    pub fn u32(&mut self, key: &str, value: u32) {
        self.pair(key, 4, &value.to_le_bytes());
    }

    pub fn f32(&mut self, key: &str, value: f32) {
        self.pair(key, 6, &value.to_le_bytes());
    }

    pub fn u32s(&mut self, key: &str, values: &[u32]) {
        let (array, u32_type) = (9, 4_u32);
        let mut value = u32_type.to_le_bytes().to_vec();
        value.extend((values.len() as u64).to_le_bytes());
        value.extend(values.iter().flat_map(|n| n.to_le_bytes()));
        self.pair(key, array, &value);
    }

    pub fn bool(&mut self, key: &str, value: bool) {
        self.pair(key, 7, &[value.into()]);
    }

    pub fn string(&mut self, key: &str, value: &str) {
        self.pair(key, 8, &string(value));
    }

    /// Adds a pair with the bytes it has in another file.
    pub fn copied(&mut self, pair: &[u8]) {
        self.n_kv += 1;
        self.kv.extend_from_slice(pair);
    }

    fn pair(&mut self, key: &str, value_type: u32, value: &[u8]) {
        self.copied(&[&string(key), &value_type.to_le_bytes()[..], value].concat());
    }

    pub fn tensor(&mut self, tensor: Tensor) {
        self.tensors.push(tensor);
    }

    /// Makes `n` files of this one, as llama-gguf-split does it with `--no-tensor-first-split`: the first
    /// has all keys, the others have all tensors, in order.
    pub fn split(self, n: u16) -> Vec<GgufFile> {
        let tensors = self.tensors.len();
        let per_file = tensors.div_ceil(usize::from(n - 1));
        let mut rest = self.tensors.into_iter();
        (0..n)
            .map(|no| {
                let mut file = if no == 0 {
                    GgufFile {
                        n_kv: self.n_kv,
                        kv: self.kv.clone(),
                        tensors: Vec::new(),
                    }
                } else {
                    GgufFile {
                        tensors: rest.by_ref().take(per_file).collect(),
                        ..GgufFile::default()
                    }
                };
                file.u16("split.no", no);
                file.u16("split.count", n);
                file.i32("split.tensors.count", tensors as i32);
                file
            })
            .collect()
    }

    /// Writes everything; random tensors take their draws from `rng` in the order of the file.
    pub fn write(&self, path: &Path, rng: &mut Rng) -> io::Result<()> {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
        let mut header = b"GGUF\x03\0\0\0".to_vec();
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend(self.n_kv.to_le_bytes());
        header.extend_from_slice(&self.kv);
        let mut offsets = Vec::new();
        let mut end = 0;
        for tensor in &self.tensors {
            let Storage {
                ggml_type,
                block,
                bytes,
            } = tensor.storage();
            header.extend(string(&tensor.name));
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            header.extend(tensor.shape.iter().flat_map(|n| n.to_le_bytes()));
            header.extend(ggml_type.to_le_bytes());
            header.extend(u64::to_le_bytes(end));
            offsets.push(end);
            end = (end + tensor.elements() / block * bytes).next_multiple_of(ALIGNMENT);
        }
        out.write_all(&header)?;
        let data = (header.len() as u64).next_multiple_of(ALIGNMENT);
        for (tensor, offset) in self.tensors.iter().zip(offsets) {
            out.seek(SeekFrom::Start(data + offset))?;
            tensor.write(&mut out, rng)?;
        }
        out.flush()?;
        out.get_ref().set_len(data + end)
    }
}

fn string(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
}

/// The bits of the IEEE 754 half-precision number next to `x`, ties to even.
///
/// Right for magnitudes below 65504, far above any weight.
pub fn f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    debug_assert!(f32::from_bits(magnitude) < 65504.0);
    let smallest_normal = 0x3880_0000;
    let half = if magnitude < smallest_normal {
        // Subnormal halves count multiples of 2^-24.
        (f32::from_bits(magnitude) * (1 << 24) as f32).round_ties_even() as u32
    } else {
        let rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
        (rounded >> 13) - ((127 - 15) << 10)
    };
    sign | half as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f16_rounds_to_nearest_even() {
        for (x, bits) in [
            (0.0, 0),
            (-0.0, 0x8000),
            (1.0, 0x3c00),
            (-2.0, 0xc000),
            (1.0 + 1.0 / 2048.0, 0x3c00),
            (1.0 + 3.0 / 2048.0, 0x3c02),
            (0.1, 0x2e66),
            (65503.0, 0x7bff),
            (6.103_515_6e-5, 0x0400),
            (6.0e-5, 0x03ef),
            (5.960_464_5e-8, 0x0001),
            (2.0e-8, 0x0000),
        ] {
            assert_eq!(f16(x), bits, "{x}");
        }
    }
}
