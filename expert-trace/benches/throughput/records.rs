//! Records as the BPF programs emit them, one after the other as they lie in the ring buffer.

use std::{mem::size_of, ops::Range, slice};

use expert_trace_common::{Header, Kind, PassSource, ROW_OUTPUT, Route};
use expert_trace_tests::records::Records as Layout;

/// What is decoded.
#[derive(Clone, Copy)]
pub struct Passes {
    /// Tokens of a pass, all of one sequence.
    pub rows: u32,
    /// Layers with experts.
    pub layers: u16,
    /// Experts of a layer.
    pub n_expert: u32,
    /// Experts chosen per token.
    pub k: u16,
    /// Passes.
    pub passes: u32,
}

/// The bytes of many records.
pub struct Records {
    bytes: Vec<u8>,
    places: Vec<Range<usize>>,
}

impl Passes {
    /// Expert ids in all passes.
    pub fn ids(&self) -> u64 {
        u64::from(self.rows) * u64::from(self.layers) * u64::from(self.k) * u64::from(self.passes)
    }

    /// Their records, with ids drawn at random, each at most once in a row.
    pub fn records(&self) -> Records {
        let mut records = Records {
            bytes: Vec::new(),
            places: Vec::new(),
        };
        let mut draw = Draw::new(self.n_expert);
        let mut position = 0;
        for pass in 0..self.passes {
            let header = Header {
                pass_source: PassSource::Scheduler as u8,
                context: 0x5000,
                pass,
                process: 1,
                thread: 1,
                ubatch_tokens: self.rows,
                total_rows: self.rows,
                ..Header::default()
            };
            self.add_ubatch(&mut records, header, position);
            for layer in 0..self.layers {
                self.add_layer(&mut records, header, layer, &mut draw);
            }
            position += self.rows as i32;
        }
        records
    }

    fn add_ubatch(&self, records: &mut Records, header: Header, position: i32) {
        let layout = Layout::of_ubatch(self.rows);
        for first_row in (0..self.rows).step_by(layout.rows as usize) {
            let rows = layout.rows.min(self.rows - first_row);
            let header = Header {
                kind: Kind::Pass as u8,
                first_row,
                rows,
                ..header
            };
            let infos = (first_row..first_row + rows).flat_map(|row| {
                let flags = if row + 1 == self.rows { ROW_OUTPUT } else { 0 };
                let mut bytes = (position + row as i32).to_ne_bytes().to_vec();
                bytes.extend(0_u16.to_ne_bytes());
                bytes.extend(flags.to_ne_bytes());
                bytes
            });
            records.push(&header, infos, layout.payload);
        }
    }

    fn add_layer(&self, records: &mut Records, header: Header, layer: u16, draw: &mut Draw) {
        let layout = Layout::of_layer(self.rows, self.k.into(), self.n_expert);
        for first_row in (0..self.rows).step_by(layout.rows as usize) {
            let rows = layout.rows.min(self.rows - first_row);
            let header = Header {
                kind: Kind::Rows as u8,
                route: Route::Router as u8,
                layer,
                k: self.k,
                first_row,
                rows,
                row_stride: self.n_expert,
                ..header
            };
            let ids: Vec<u32> = (0..rows).flat_map(|_| draw.row(self.k)).collect();
            let ids = ids.into_iter().flat_map(u32::to_ne_bytes);
            records.push(&header, ids, layout.payload);
        }
    }
}

impl Records {
    /// The bytes of each record.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.places.iter().map(|place| &self.bytes[place.clone()])
    }

    /// Number of records.
    pub fn count(&self) -> usize {
        self.places.len()
    }

    fn push(&mut self, header: &Header, body: impl Iterator<Item = u8>, payload: usize) {
        let start = self.bytes.len();
        // SAFETY: the header is made of integers without padding (checked in the common crate).
        self.bytes.extend_from_slice(unsafe {
            slice::from_raw_parts((&raw const *header).cast::<u8>(), size_of::<Header>())
        });
        self.bytes.extend(body);
        let end = start + size_of::<Header>() + payload;
        assert!(self.bytes.len() <= end, "a payload fits its record");
        self.bytes.resize(end, 0);
        self.places.push(start..end);
        // The kernel's own header before the next one (BPF_RINGBUF_HDR_SZ).
        self.bytes.resize(end + 8, 0);
    }
}

/// Draws experts, by an LCG (Knuth's MMIX) whose upper bits are used.
struct Draw {
    state: u64,
    experts: Vec<u32>,
}

impl Draw {
    fn new(n_expert: u32) -> Self {
        Self {
            state: 1,
            experts: (0..n_expert).collect(),
        }
    }

    /// k experts, no two alike: the start of a shuffle.
    fn row(&mut self, k: u16) -> Vec<u32> {
        for i in 0..usize::from(k) {
            self.state = self
                .state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let left = (self.experts.len() - i) as u64;
            let other = i + ((self.state >> 33) % left) as usize;
            self.experts.swap(i, other);
        }
        self.experts[..usize::from(k)].to_vec()
    }
}
