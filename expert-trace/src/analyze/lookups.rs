//! What a cache is asked for: one lookup for each distinct expert of a batch.
//!
//! Experts of a batch are loaded together, so that it does not matter which of its tokens comes first, but
//! for recency: that of an expert is its last occurrence in the batch.

use super::routing::{Batch, Routing};

/// Marks lookups of generated tokens.
const DECODE: u32 = 1 << 31;

/// A lookup: an expert among those of all layers, and whether a generated token has chosen it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup(u32);

impl Lookup {
    /// One of that expert.
    pub fn new(key: usize, decode: bool) -> Self {
        Self(key as u32 | if decode { DECODE } else { 0 })
    }

    /// The expert among those of all layers.
    #[inline]
    pub fn key(self) -> usize {
        (self.0 & !DECODE) as usize
    }

    /// Whether a generated token has chosen it.
    #[inline]
    pub fn is_decode(self) -> bool {
        self.0 & DECODE != 0
    }
}

/// Finds the distinct experts of batches.
#[derive(Debug)]
pub struct Distinct {
    /// By expert: one more than the batch where it was seen last, and where a generated token chose it.
    seen: Vec<[u32; 2]>,
}

impl Distinct {
    /// Of so many experts in all layers.
    pub fn new(keys: usize) -> Self {
        Self {
            seen: vec![[0; 2]; keys],
        }
    }

    /// Appends the lookups of a batch in the order of their last occurrence.
    pub fn find(&mut self, routing: &Routing, batch: &Batch<'_>, out: &mut Vec<Lookup>) {
        let first_key = routing.layers()[batch.layer].first_key as usize;
        let stamp = batch.index as u32 + 1;
        let start = out.len();
        for row in batch.rows().rev() {
            for expert in row.experts.iter().rev() {
                let key = first_key + usize::from(*expert);
                let [seen, decode] = &mut self.seen[key];
                if row.decode {
                    *decode = stamp;
                }
                if *seen != stamp {
                    *seen = stamp;
                    out.push(Lookup::new(key, false));
                }
            }
        }
        out[start..].reverse();
        for lookup in &mut out[start..] {
            let key = lookup.key();
            *lookup = Lookup::new(key, self.seen[key][1] == stamp);
        }
    }
}

/// Lookups of several batches, in memory: 4 bytes each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lookups {
    all: Vec<Lookup>,
    ends: Vec<u32>,
    /// Decode lookups.
    pub decode: u64,
}

impl Lookups {
    /// Those of a trace, up to the batch with which so many activations are reached.
    pub fn of(routing: &Routing, sample: usize) -> Self {
        let mut distinct = Distinct::new(routing.keys());
        let mut lookups = Self::default();
        let mut activations = 0;
        for batch in routing.batches() {
            if activations >= sample {
                break;
            }
            activations += batch.rows().map(|row| row.experts.len()).sum::<usize>();
            distinct.find(routing, &batch, &mut lookups.all);
            lookups.end_batch();
        }
        lookups
    }

    /// Adds a batch.
    pub fn push(&mut self, batch: impl IntoIterator<Item = Lookup>) {
        self.all.extend(batch);
        self.end_batch();
    }

    fn end_batch(&mut self) {
        let start = self.ends.last().map_or(0, |end| *end as usize);
        let decode = self.all[start..].iter().filter(|lookup| lookup.is_decode());
        self.decode += decode.count() as u64;
        self.ends.push(self.all.len() as u32);
    }

    /// All of them.
    pub fn all(&self) -> &[Lookup] {
        &self.all
    }

    /// Batches that there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Where the lookups of a batch are.
    pub fn range(&self, batch: usize) -> std::ops::Range<usize> {
        let start = batch.checked_sub(1).map_or(0, |before| self.ends[before]);
        start as usize..self.ends[batch] as usize
    }

    /// The batches, in order.
    pub fn batches(&self) -> impl Iterator<Item = &[Lookup]> {
        (0..self.len()).map(|batch| &self.all[self.range(batch)])
    }

    /// Those of each layer alone, whose first experts are these; experts are numbered within the layer.
    pub fn by_layer(&self, first_keys: &[usize]) -> Vec<Self> {
        let mut layers = vec![Self::default(); first_keys.len()];
        for batch in self.batches().filter(|batch| !batch.is_empty()) {
            let layer = first_keys.partition_point(|first| *first <= batch[0].key()) - 1;
            let first = first_keys[layer];
            let within = batch.iter();
            layers[layer].push(within.map(|of| Lookup::new(of.key() - first, of.is_decode())));
        }
        layers
    }

    /// Bytes of memory that they take.
    pub fn bytes(&self) -> usize {
        4 * (self.all.len() + self.ends.len())
    }
}
