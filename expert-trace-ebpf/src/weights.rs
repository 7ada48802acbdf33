//! Weights of the chosen experts: what GET_ROWS is about to gather by their ids.
//!
//! Its `src[0]` has a value for each expert and token, `[1, n_expert, n_tokens]`: the router's probabilities,
//! or its logits where only those of the chosen experts become probabilities (llama-graph.cpp,
//! `build_moe_ffn`). Whoever asks for weights gets what the node copies to `ffn_moe_weights-N`, before it is
//! normalised or scaled.

use core::ptr;

use expert_trace_common::{Header, Kind, MAX_EXPERTS, payload};

use crate::{
    rows::{Copy, RowsWalk, copy_piece, emit_rows, run_chunks},
    target::Address,
    tensor::{ELEMENT_SIZE, Shape, TYPE_F32},
};

/// Where GET_ROWS finds what it gathers: a tensor.
#[derive(Clone, Copy)]
pub struct Gathered {
    pub tensor: Address,
    /// Bytes to its `data`.
    pub data: u32,
}

/// The values of all experts.
#[repr(C)]
#[derive(Clone, Copy)]
struct Weights {
    data: Address,
    experts: u64,
    /// Bytes from an expert to the next.
    expert_stride: u64,
    /// Bytes from a token to the next.
    token_stride: u64,
}

impl Weights {
    /// Those that a tensor has, from a token on; none where it cannot be read, or has something else.
    #[inline(always)]
    fn read(of: Gathered, tokens: u32, first: u32) -> Option<Self> {
        let Shape { kind, ne, nb, .. } = of.tensor.read()?;
        let fits = kind == TYPE_F32
            && ne[0] == 1
            && ne[1] >= 1
            && ne[1] <= MAX_EXPERTS as i64
            && ne[2] == i64::from(tokens)
            && ne[3] == 1;
        if !fits {
            return None;
        }
        let data: u64 = of.tensor.offset(u64::from(of.data)).read()?;
        Some(Self {
            data: Address(data).offset(u64::from(first) * nb[2]),
            experts: ne[1] as u64,
            expert_stride: nb[1],
            token_stride: nb[2],
        })
    }
}

/// Rows that take their weights with them.
#[repr(C)]
struct WeightedWalk {
    rows: *const RowsWalk,
    gathered: Gathered,
    /// Kind of a record whose weights cannot be read.
    plain: u8,
}

/// Emits all rows with their weights. Those of a record whose weights cannot be read come without.
#[inline(always)]
pub fn emit_weighted(rows: &mut RowsWalk, gathered: Gathered) {
    let plain = rows.header.kind;
    rows.header.kind = if plain == Kind::SecondBlock as u8 {
        Kind::WeightedSecondBlock as u8
    } else {
        Kind::WeightedRows as u8
    };
    let total_rows = rows.header.total_rows;
    let row_bytes = 2 * rows.row_bytes;
    let bytes = u64::from(total_rows) * u64::from(row_bytes);
    rows.chunk_rows = if bytes <= payload::MEDIUM as u64 {
        total_rows
    } else {
        // At least one: a record has room for all experts that are believed.
        payload::LARGE as u32 / row_bytes.max(1)
    };
    let chunks = total_rows.div_ceil(rows.chunk_rows.max(1)).max(1);
    let mut walk = WeightedWalk {
        rows,
        gathered,
        plain,
    };
    let walk = &mut walk;
    if bytes <= payload::SMALL as u64 {
        run_chunks(
            1,
            weighted_chunk::<{ payload::SMALL }, { payload::SMALL / 2 }>,
            walk,
        );
    } else if bytes <= payload::MEDIUM as u64 {
        run_chunks(
            1,
            weighted_chunk::<{ payload::MEDIUM }, { payload::MEDIUM / 2 }>,
            walk,
        );
    } else {
        run_chunks(
            chunks,
            weighted_chunk::<{ payload::LARGE }, { payload::LARGE / 2 }>,
            walk,
        );
    }
}

/// Emits one record of rows and weights, which take at most `HALF` of its payload each. Returns 0 to go on
/// (the contract of `bpf_loop`).
#[inline(never)]
extern "C" fn weighted_chunk<const PAYLOAD: usize, const HALF: usize>(
    index: u32,
    walk: *mut WeightedWalk,
) -> i64 {
    // SAFETY: the caller keeps both on its stack during the loop.
    let (walk, gathered, plain) = unsafe {
        let walk = &*walk;
        (&*walk.rows, walk.gathered, walk.plain)
    };
    let (first_row, rows) = walk.chunk(index);
    emit_rows::<PAYLOAD>(walk, (first_row, rows), |to| {
        let mut ids = Copy {
            to,
            from: walk.data.offset(u64::from(first_row) * walk.row_stride),
            stride: walk.row_stride,
            bytes: walk.row_bytes,
            failed: 0,
        };
        ids.run(rows, copy_piece::<PAYLOAD, HALF>)?;
        let weights = Weights::read(gathered, walk.header.total_rows, first_row);
        let is_gathered = weights.is_some_and(|weights| {
            let k = u32::from(walk.header.k);
            let mut gather = Gather {
                ids: to,
                weights,
                k,
                pairs: rows * k,
                failed: 0,
            };
            run_chunks(rows * k, gather_weight::<PAYLOAD, HALF>, &mut gather);
            // Volatile: the compiler does not see that the callback writes there.
            // SAFETY: a read of a live variable.
            unsafe { ptr::read_volatile(&gather.failed) == 0 }
        });
        if !is_gathered {
            // SAFETY: the header stands before the payload, and `kind` is its first field.
            unsafe { to.sub(size_of::<Header>()).write(plain) };
        }
        Some(())
    })
}

/// Weights on their way to a payload, behind the ids that they belong to.
#[repr(C)]
struct Gather {
    ids: *mut u8,
    /// Of the record's tokens.
    weights: Weights,
    k: u32,
    /// Ids of the record.
    pairs: u32,
    failed: u32,
}

/// Copies the `index`th weight. Returns 0 to go on.
#[inline(never)]
extern "C" fn gather_weight<const PAYLOAD: usize, const HALF: usize>(
    index: u32,
    gather: *mut Gather,
) -> i64 {
    // SAFETY: the caller keeps it on its stack during the loop.
    let gather = unsafe { &mut *gather };
    // Volatile: the verifier has to see bounds where they are checked, and the compiler not to know them.
    // SAFETY: reads of a live reference.
    let (ids, pairs) = unsafe {
        (
            ptr::read_volatile(&gather.ids),
            ptr::read_volatile(&gather.pairs),
        )
    };
    let at = u64::from(index) * ELEMENT_SIZE;
    let put = u64::from(pairs) * ELEMENT_SIZE + at;
    if at <= HALF as u64 - ELEMENT_SIZE && put <= PAYLOAD as u64 - ELEMENT_SIZE {
        // SAFETY: both are within the payload by the checks before.
        let (id, to) = unsafe {
            (
                ids.add(at as usize).cast::<u32>().read(),
                ids.add(put as usize),
            )
        };
        let Weights {
            data,
            experts,
            expert_stride,
            token_stride,
            ..
        } = gather.weights;
        let token = u64::from(index / gather.k.max(1));
        let from = data.offset(token * token_stride + u64::from(id) * expert_stride);
        // SAFETY: there is room for one element.
        let is_read =
            u64::from(id) < experts && unsafe { from.read_to(to, ELEMENT_SIZE as u32) }.is_some();
        if is_read {
            return 0;
        }
    }
    // SAFETY: a write to a live reference.
    unsafe { ptr::write_volatile(&mut gather.failed, 1) };
    1
}
