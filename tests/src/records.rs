//! Which records the BPF programs make of a pass, for what computes with their number and size.
//!
//! A restatement of `emit_routed` (expert-trace-ebpf/src/rows.rs) and `emit_pass`
//! (expert-trace-ebpf/src/pass.rs), which the end-to-end test `bench::flood::smoke` holds against the
//! records that they emit.

use std::mem::size_of;

use expert_trace_common::{Header, MAX_EXPERTS, RowInfo, payload};

/// Of an id.
const ID: usize = 4;
/// Most rows of a record, and most bytes of a row and of the distance between two, for rows that are
/// read with what is between them (`STRIDED_ROWS`, `STRIDED_ROW` and `MAX_STRIDE` there).
const STRIDED: (usize, usize, usize) = (31, 64, 512);
/// Rows of at most so many bytes leave room for one of them at a record's end (`ROW_NARROW` there).
const ROW_NARROW: usize = 256;
/// What the kernel puts before each record (BPF_RINGBUF_HDR_SZ).
const KERNEL_HEADER: usize = 8;

/// Records that tell of some rows, as many in each as it has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Records {
    /// Bytes of each behind its header.
    pub payload: usize,
    /// Rows of each, of which the last one may have less.
    pub rows: u32,
    /// Records.
    pub number: u32,
}

impl Records {
    /// Of a layer with `rows` rows of `k` ids each, whose starts are `row_stride` ids apart; at least one
    /// of each.
    pub fn of_layer(rows: u32, k: u32, row_stride: u32) -> Self {
        let row = k as usize * ID;
        let stride = row_stride as usize * ID;
        let all = rows as usize * row;
        let (most_rows, most_row, most_stride) = STRIDED;
        // The last row has to have room for one of the largest size.
        let fitting = |payload: usize, largest: usize| (payload - largest) / row + 1;
        let (payload, fit) = if rows == 1 && row <= payload::SMALL {
            (payload::SMALL, 1)
        } else if stride == row && all <= payload::MEDIUM {
            (payload::MEDIUM, rows as usize)
        } else if stride == row {
            (payload::LARGE, payload::LARGE / row)
        } else if row <= most_row && stride <= most_stride {
            let fit = fitting(payload::MEDIUM, most_row).min(most_rows);
            (payload::MEDIUM, fit)
        } else if row > ROW_NARROW {
            (payload::LARGE, fitting(payload::LARGE, MAX_EXPERTS * ID))
        } else if all <= payload::MEDIUM - ROW_NARROW {
            (payload::MEDIUM, fitting(payload::MEDIUM, ROW_NARROW))
        } else {
            (payload::LARGE, fitting(payload::LARGE, ROW_NARROW))
        };
        Self::new(rows, payload, fit)
    }

    /// Of an ubatch of `tokens` tokens, which begins a pass.
    pub fn of_ubatch(tokens: u32) -> Self {
        let fitting = |payload: usize| payload / size_of::<RowInfo>();
        let small = fitting(payload::SMALL);
        if tokens as usize <= small {
            Self::new(tokens, payload::SMALL, small)
        } else {
            Self::new(tokens, payload::MEDIUM, fitting(payload::MEDIUM))
        }
    }

    fn new(of_rows: u32, payload: usize, rows: usize) -> Self {
        let rows = rows as u32;
        Self {
            payload,
            rows,
            number: of_rows.div_ceil(rows),
        }
    }

    /// What all of them take of the ring buffer.
    pub fn bytes(self) -> u64 {
        let one = KERNEL_HEADER + size_of::<Header>() + self.payload;
        u64::from(self.number) * one as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_layer(rows: u32, k: u32, row_stride: u32) -> (usize, u32, u32) {
        let Records {
            payload,
            rows,
            number,
        } = Records::of_layer(rows, k, row_stride);
        (payload, rows, number)
    }

    #[test]
    fn a_decoded_token_takes_a_small_record() {
        assert_eq!(of_layer(1, 8, 128), (64, 1, 1));
        assert_eq!(of_layer(1, 16, 1024), (64, 1, 1));
        assert_eq!(of_layer(1, 17, 512), (1024, 12, 1));
        assert_eq!(Records::of_layer(1, 8, 128).bytes(), 8 + 64 + 64);
    }

    #[test]
    fn rows_near_to_each_other_take_medium_records() {
        assert_eq!(of_layer(512, 8, 128), (1024, 31, 17));
        assert_eq!(of_layer(512, 16, 128), (1024, 16, 32));
        assert_eq!(Records::of_layer(512, 8, 128).bytes(), 17 * (8 + 64 + 1024));
    }

    #[test]
    fn rows_far_from_each_other_take_large_records() {
        assert_eq!(of_layer(2048, 10, 512), (8192, 199, 11));
        assert_eq!(of_layer(19, 10, 512), (1024, 20, 1));
        assert_eq!(of_layer(2, 100, 512), (8192, 11, 1));
    }

    #[test]
    fn rows_without_a_gap_fill_their_records() {
        assert_eq!(of_layer(32, 8, 8), (1024, 32, 1));
        assert_eq!(of_layer(512, 8, 8), (8192, 256, 2));
    }

    #[test]
    fn a_ubatch_takes_small_records() {
        let of_ubatch = |tokens| {
            let records = Records::of_ubatch(tokens);
            (records.payload, records.number)
        };
        assert_eq!(of_ubatch(8), (64, 1));
        assert_eq!(of_ubatch(9), (1024, 1));
        assert_eq!(of_ubatch(129), (1024, 2));
        assert_eq!(of_ubatch(2048), (1024, 16));
    }
}
