//! What is read of a `ggml_tensor`, and how its name tells what it is.

use expert_trace_common::{MAX_EXPERTS, MAX_LAYERS, MAX_ROWS, TensorLayout};

use crate::target::Address;

/// `GGML_TYPE_F32` (ggml.h).
pub const TYPE_F32: u32 = 0;
/// `GGML_TYPE_I32` (ggml.h).
pub const TYPE_I32: u32 = 26;
/// Bytes of an element of either type: `nb[0]` of a plain tensor.
pub const ELEMENT_SIZE: u64 = 4;

/// Start of a tensor's name, in words of eight bytes: compared byte by byte, the verifier would follow
/// every byte on a path of its own.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Name([u64; 4]);

impl Name {
    /// Whether it starts with `prefix`, which has at most 24 bytes.
    #[inline(always)]
    pub fn starts_with<const N: usize>(&self, prefix: &[u8; N]) -> bool {
        let mut differences = 0;
        let mut i = 0;
        while i < N.div_ceil(8) {
            let (word, mask) = word_of(prefix, i);
            differences |= (self.0[i] ^ word) & mask;
            i += 1;
        }
        differences == 0
    }

    /// The eight bytes from byte `N` on, which is below 24.
    #[inline(always)]
    fn behind<const N: usize>(&self) -> u64 {
        let shift = N % 8 * 8;
        if shift == 0 {
            self.0[N / 8]
        } else {
            self.0[N / 8] >> shift | self.0[N / 8 + 1] << (64 - shift)
        }
    }
}

/// The `index`th eight bytes of `prefix`, and which of their bits count.
#[inline(always)]
fn word_of<const N: usize>(prefix: &[u8; N], index: usize) -> (u64, u64) {
    let (mut word, mut mask) = (0, 0);
    let mut i = 0;
    while i < 8 && 8 * index + i < N {
        word |= u64::from(prefix[8 * index + i]) << (8 * i);
        mask |= 0xff << (8 * i);
        i += 1;
    }
    (word, mask)
}

/// `data` and the start of `name`, which follow each other in `ggml_tensor`.
#[repr(C)]
pub struct DataAndName {
    pub data: u64,
    pub name: Name,
}

impl DataAndName {
    #[inline(always)]
    pub fn read(tensor: Address, layout: &TensorLayout) -> Option<Self> {
        tensor.offset(u64::from(layout.data)).read()
    }
}

/// `src[1]` and the start of `name` of a tensor.
pub struct Gather {
    pub index: Address,
    pub name: Name,
}

impl Gather {
    #[inline(always)]
    pub fn read(tensor: Address, layout: &TensorLayout) -> Option<Self> {
        /// `src[1]` to `name`, as far as it is read.
        #[repr(C)]
        struct Together {
            index: u64,
            _between: [u64; SOURCES],
            _data: u64,
            name: Name,
        }
        /// Of `src[2]` to `view_offs`, in words: in all builds of llama.cpp that are known.
        const SOURCES: usize = 10;
        if layout.data.wrapping_sub(layout.src) == 8 * (SOURCES as u32 + 2) {
            let read: Together = tensor.offset(u64::from(layout.src) + 8).read()?;
            return Some(Self {
                index: Address(read.index),
                name: read.name,
            });
        }
        Some(Self {
            index: source(tensor, layout, 1)?,
            name: DataAndName::read(tensor, layout)?.name,
        })
    }
}

/// `type` to `nb` of `ggml_tensor`.
#[repr(C)]
pub struct Shape {
    pub kind: u32,
    padding: u32,
    buffer: u64,
    pub ne: [i64; 4],
    pub nb: [u64; 4],
}

impl Shape {
    /// Bytes from its first element to the end of its last (`ggml_nbytes`).
    #[inline(always)]
    pub fn bytes(&self) -> u64 {
        let mut bytes = ELEMENT_SIZE;
        let mut i = 0;
        while i < 4 {
            let steps = (self.ne[i] as u64).wrapping_sub(1);
            bytes = bytes.wrapping_add(steps.wrapping_mul(self.nb[i]));
            i += 1;
        }
        bytes
    }

    /// Whether it can be the shape of `rows` rows of expert ids or router logits, of this type.
    #[inline(always)]
    pub fn is_sane(&self, kind: u32) -> bool {
        let [k, rows, planes, volumes] = self.ne;
        let [element_stride, row_stride, ..] = self.nb;
        self.kind == kind
            && k >= 1
            && k <= MAX_EXPERTS as i64
            && rows >= 0
            && rows <= MAX_ROWS as i64
            && planes == 1
            && volumes == 1
            && element_stride >= ELEMENT_SIZE
            && element_stride <= ELEMENT_SIZE * MAX_EXPERTS as u64
            && row_stride >= ELEMENT_SIZE
            && row_stride <= ELEMENT_SIZE * (MAX_EXPERTS * MAX_EXPERTS) as u64
    }
}

/// `src[index]` of a tensor; null where it has none.
#[inline(always)]
pub fn source(tensor: Address, layout: &TensorLayout, index: u64) -> Option<Address> {
    tensor
        .offset(u64::from(layout.src) + 8 * index)
        .read()
        .map(Address)
}

/// Whether a tensor shows another one's data: `view_src` stands before `view_offs` and `data`.
#[inline(always)]
pub fn is_view(tensor: Address, layout: &TensorLayout) -> Option<bool> {
    let view_of: u64 = tensor.offset(u64::from(layout.data) - 16).read()?;
    Some(view_of != 0)
}

/// The layer in the name of an ids tensor.
#[inline(always)]
pub fn ids_layer(name: &Name) -> Option<u16> {
    layer_behind(name, b"ffn_moe_topk-", 0)
}

/// The layer in the name of a copy of an ids tensor that the scheduler has made for the CPU
/// (`<backend>#<name>#<number of the copy>`, ggml-backend.cpp).
#[inline(always)]
pub fn copied_ids_layer(name: &Name) -> Option<u16> {
    layer_behind(name, b"CPU#ffn_moe_topk-", b'#')
}

/// The layer in the name of a copy of an ids tensor that the scheduler has made for any backend. A
/// backend's name can be long: an RPC server's has its address.
#[inline(always)]
pub fn copied_layer(tensor: Address, layout: &TensorLayout) -> Option<u16> {
    const EVERY_BYTE: u64 = 0x0101_0101_0101_0101;
    /// Byte `7 - i` is `i`.
    const INDICES: u64 = 0x0001_0203_0405_0607;
    let name = tensor.offset(u64::from(layout.data) + 8);
    // Behind that, no name of a layer's ids has room.
    let words: [u64; 6] = name.read()?;
    let mut i = 0;
    while i < words.len() {
        let difference = words[i] ^ (EVERY_BYTE * b'#' as u64);
        // The highest bit of each byte that is zero, and perhaps of bytes above the lowest such one.
        let zeros = difference.wrapping_sub(EVERY_BYTE) & !difference & (EVERY_BYTE << 7);
        if zeros != 0 {
            let lowest = (zeros & zeros.wrapping_neg()) >> 7;
            let byte = lowest.wrapping_mul(INDICES) >> 56;
            let behind = name.offset(8 * i as u64 + byte + 1).read()?;
            return layer_behind(&behind, b"ffn_moe_topk-", b'#');
        }
        i += 1;
    }
    None
}

/// The number between `prefix` and `end`, when there is nothing else.
#[inline(always)]
pub fn layer_behind<const N: usize>(name: &Name, prefix: &[u8; N], end: u8) -> Option<u16> {
    if !name.starts_with(prefix) {
        return None;
    }
    let mut rest = name.behind::<N>();
    let mut layer = 0u16;
    let mut digits = 0;
    while digits < 5 {
        let byte = rest as u8;
        if byte == end {
            break;
        }
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 || digits == 4 {
            return None;
        }
        layer = layer * 10 + u16::from(digit);
        digits += 1;
        rest >>= 8;
    }
    (digits > 0 && layer < MAX_LAYERS).then_some(layer)
}
