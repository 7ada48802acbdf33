//! What is read of a `ggml_tensor`, and how its name tells what it is.

use expert_trace_common::{MAX_EXPERTS, MAX_LAYERS, MAX_ROWS, TensorLayout};

use crate::target::Address;

/// `GGML_TYPE_F32` (ggml.h).
pub const TYPE_F32: u32 = 0;
/// `GGML_TYPE_I32` (ggml.h).
pub const TYPE_I32: u32 = 26;
/// Bytes of an element of either type: `nb[0]` of a plain tensor.
pub const ELEMENT_SIZE: u64 = 4;

/// Start of a tensor's name.
pub type Name = [u8; 32];

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

#[inline(always)]
pub fn starts_with<const N: usize>(name: &Name, prefix: &[u8; N]) -> bool {
    let mut i = 0;
    while i < N {
        if name[i] != prefix[i] {
            return false;
        }
        i += 1;
    }
    true
}

/// The number between `prefix` and `end`, when there is nothing else.
#[inline(always)]
pub fn layer_behind<const N: usize>(name: &Name, prefix: &[u8; N], end: u8) -> Option<u16> {
    if !starts_with(name, prefix) {
        return None;
    }
    let mut layer = 0u16;
    let mut digits = 0;
    let mut i = N;
    while i < N + 5 {
        let byte = name[i];
        if byte == end {
            break;
        }
        if !byte.is_ascii_digit() || digits == 4 {
            return None;
        }
        layer = layer * 10 + u16::from(byte - b'0');
        digits += 1;
        i += 1;
    }
    (digits > 0 && layer < MAX_LAYERS).then_some(layer)
}
