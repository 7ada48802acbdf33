//! A cache of one budget, whose policy says what goes.
//!
//! All experts that a batch needs are brought in. Eviction comes after the batch, takes nothing that the
//! batch has touched, and ends as soon as the rest fits. A batch that is larger than the budget stays until
//! the next one has been computed.

use std::{cmp::Reverse, collections::BinaryHeap};

use crate::analyze::lookups::Lookups;

/// No expert, lookup or batch.
const NONE: u32 = u32::MAX;

/// Says what goes. Experts that are held, but for those of the batch at hand, are candidates.
pub trait Policy {
    /// An expert that is held is used again: it is no candidate until the batch is over.
    fn take(&mut self, key: usize);
    /// Chooses a candidate, which is one no longer.
    fn evict(&mut self) -> Option<usize>;
    /// Adds an expert of a batch that is over as a candidate; `lookup` is the number of its lookup.
    fn keep(&mut self, lookup: usize, key: usize);
}

/// Decode lookups that hit, in a cache of so many bytes.
pub fn hits(lookups: &Lookups, sizes: &[u64], budget: u64, policy: &mut impl Policy) -> u64 {
    let mut held = vec![false; sizes.len()];
    let mut bytes = 0;
    let mut hits = 0;
    for batch in 0..lookups.len() {
        let range = lookups.range(batch);
        let of_batch = &lookups.all()[range.clone()];
        for lookup in of_batch {
            let key = lookup.key();
            if held[key] {
                hits += u64::from(lookup.is_decode());
                policy.take(key);
            } else {
                held[key] = true;
                bytes += sizes[key];
            }
        }
        while bytes > budget {
            let Some(key) = policy.evict() else { break };
            held[key] = false;
            bytes -= sizes[key];
        }
        for (lookup, of) in range.zip(of_batch) {
            policy.keep(lookup, of.key());
        }
    }
    hits
}

/// Belady: the expert goes whose next batch is furthest; of equals one that only prompts will need. Of all
/// lookups, with experts of one size, nothing can have more hits; it takes knowledge of the future.
#[derive(Debug)]
pub struct Belady<'a> {
    lookups: &'a Lookups,
    next: &'a NextUse,
    /// The next batch of candidates, by expert.
    next_of: Vec<u32>,
    /// Batches that are next for a candidate, and for how long that is so: the furthest first.
    batches: BinaryHeap<u32>,
    is_in: Vec<bool>,
    /// Candidates that are never used again.
    dead: Vec<u32>,
}

/// The batch of the next lookup of the same expert, by lookup.
#[derive(Clone, Debug)]
pub struct NextUse(Vec<u32>);

impl NextUse {
    /// That of these lookups, of so many experts.
    pub fn of(lookups: &Lookups, keys: usize) -> Self {
        let mut next = vec![NONE; lookups.all().len()];
        let mut of_key = vec![NONE; keys];
        for batch in (0..lookups.len()).rev() {
            for index in lookups.range(batch) {
                let key = lookups.all()[index].key();
                next[index] = std::mem::replace(&mut of_key[key], batch as u32);
            }
        }
        Self(next)
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        4 * self.0.len()
    }
}

impl<'a> Belady<'a> {
    /// With nothing held, of so many experts.
    pub fn new(lookups: &'a Lookups, next: &'a NextUse, keys: usize) -> Self {
        Self {
            lookups,
            next,
            next_of: vec![NONE; keys],
            batches: BinaryHeap::new(),
            is_in: vec![false; lookups.len()],
            dead: Vec::new(),
        }
    }
}

impl Policy for Belady<'_> {
    fn take(&mut self, key: usize) {
        self.next_of[key] = NONE;
    }

    fn evict(&mut self) -> Option<usize> {
        if let Some(key) = self.dead.pop() {
            return Some(key as usize);
        }
        while let Some(batch) = self.batches.peek().copied() {
            let of_batch = &self.lookups.all()[self.lookups.range(batch as usize)];
            let mut found = None;
            for lookup in of_batch {
                if self.next_of[lookup.key()] == batch {
                    found = Some(lookup.key());
                    if !lookup.is_decode() {
                        break;
                    }
                }
            }
            if let Some(key) = found {
                self.next_of[key] = NONE;
                return Some(key);
            }
            self.batches.pop();
            self.is_in[batch as usize] = false;
        }
        None
    }

    fn keep(&mut self, lookup: usize, key: usize) {
        let next = self.next.0[lookup];
        if next == NONE {
            self.dead.push(key as u32);
            return;
        }
        self.next_of[key] = next;
        if !std::mem::replace(&mut self.is_in[next as usize], true) {
            self.batches.push(next);
        }
    }
}

/// LFU: the expert goes that was looked up least often since the beginning, also while it was not held; of
/// equals the least recently used one.
#[derive(Debug)]
pub struct Lfu<'a> {
    lookups: &'a Lookups,
    frequency: Vec<u32>,
    /// The last lookup of candidates, by expert.
    last: Vec<u32>,
    /// Frequency and last lookup. Those that hold no longer are passed over.
    order: BinaryHeap<Reverse<u64>>,
}

impl<'a> Lfu<'a> {
    /// With nothing held, of so many experts.
    pub fn new(lookups: &'a Lookups, keys: usize) -> Self {
        Self {
            lookups,
            frequency: vec![0; keys],
            last: vec![NONE; keys],
            order: BinaryHeap::new(),
        }
    }
}

impl Policy for Lfu<'_> {
    fn take(&mut self, key: usize) {
        self.last[key] = NONE;
    }

    fn evict(&mut self) -> Option<usize> {
        while let Some(Reverse(order)) = self.order.pop() {
            let lookup = order as u32;
            let key = self.lookups.all()[lookup as usize].key();
            if self.last[key] == lookup {
                self.last[key] = NONE;
                return Some(key);
            }
        }
        None
    }

    fn keep(&mut self, lookup: usize, key: usize) {
        self.frequency[key] += 1;
        self.last[key] = lookup as u32;
        if self.order.len() > 4 * self.last.len() {
            let (last, lookups) = (&self.last, self.lookups);
            self.order.retain(|Reverse(order)| {
                let lookup = *order as u32;
                last[lookups.all()[lookup as usize].key()] == lookup
            });
        }
        let order = (u64::from(self.frequency[key]) << 32) | lookup as u64;
        self.order.push(Reverse(order));
    }
}

/// Any of them goes, all with the same probability.
#[derive(Debug)]
pub struct Random {
    candidates: Vec<u32>,
    place: Vec<u32>,
    state: u64,
}

impl Random {
    /// With nothing held, of so many experts. The same seed gives the same choices.
    pub fn new(seed: u64, keys: usize) -> Self {
        Self {
            candidates: Vec::with_capacity(keys),
            place: vec![NONE; keys],
            state: seed,
        }
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn remove(&mut self, place: usize) -> usize {
        let key = self.candidates.swap_remove(place) as usize;
        if let Some(moved) = self.candidates.get(place) {
            self.place[*moved as usize] = place as u32;
        }
        key
    }
}

impl Policy for Random {
    fn take(&mut self, key: usize) {
        self.remove(self.place[key] as usize);
    }

    fn evict(&mut self) -> Option<usize> {
        if self.candidates.is_empty() {
            return None;
        }
        let place = (u128::from(self.next()) * self.candidates.len() as u128) >> 64;
        Some(self.remove(place as usize))
    }

    fn keep(&mut self, _: usize, key: usize) {
        self.place[key] = self.candidates.len() as u32;
        self.candidates.push(key as u32);
    }
}
