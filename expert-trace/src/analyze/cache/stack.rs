//! LRU for all budgets in one pass: stack distances in bytes.
//!
//! An LRU cache of B bytes that evicts after a batch, and nothing that the batch has touched, holds the
//! longest run of most recently used experts that fits into B, or the last batch when that alone is larger.
//! This is so with experts of different sizes, too, since eviction ends as soon as the rest fits. So a
//! lookup hits in every cache that can hold the expert and all that were used since.

use crate::analyze::lookups::Lookup;

/// Marks experts that were not used yet, and times at which nobody was used last.
const NONE: u32 = u32::MAX;

/// The experts by recency.
#[derive(Debug)]
pub struct Stack<'a> {
    sizes: &'a [u64],
    /// Time of the last use, by expert.
    used_at: Vec<u32>,
    /// The expert that was used last at a time.
    by_time: Vec<u32>,
    /// Fenwick tree over time: bytes of the experts that were used last then.
    tree: Vec<u64>,
    /// The next time.
    now: usize,
    /// When the batch before began.
    before: u32,
    total: u64,
}

impl<'a> Stack<'a> {
    /// Nothing was used yet, of experts of these sizes.
    pub fn new(sizes: &'a [u64]) -> Self {
        // Times are renumbered when they are used up: the fewer experts, the cheaper it is.
        let times = (4 * sizes.len()).max(64);
        Self {
            sizes,
            used_at: vec![NONE; sizes.len()],
            by_time: vec![NONE; times],
            tree: vec![0; times + 1],
            now: 0,
            before: 0,
            total: 0,
        }
    }

    /// Looks up a batch, and tells of each lookup how many bytes a cache needs for a hit; none at the first
    /// use. An expert of the batch before is in every cache.
    pub fn look_up(&mut self, batch: &[Lookup], mut tell: impl FnMut(Lookup, Option<u64>)) {
        for lookup in batch {
            let at = self.used_at[lookup.key()];
            tell(
                *lookup,
                match at {
                    NONE => None,
                    at if at >= self.before => Some(0),
                    at => Some(self.bytes_since(at)),
                },
            );
        }
        if self.now + batch.len() > self.by_time.len() {
            self.renumber();
        }
        self.before = self.now as u32;
        for lookup in batch {
            self.use_now(lookup.key());
        }
    }

    /// Bytes of the experts that were used last at this time, or later.
    fn bytes_since(&self, at: u32) -> u64 {
        let mut index = at as usize;
        let mut earlier = 0;
        while index > 0 {
            earlier += self.tree[index];
            index &= index - 1;
        }
        self.total - earlier
    }

    fn use_now(&mut self, key: usize) {
        let size = self.sizes[key];
        let at = std::mem::replace(&mut self.used_at[key], self.now as u32);
        if at == NONE {
            self.total += size;
        } else {
            self.by_time[at as usize] = NONE;
            self.add(at as usize, size.wrapping_neg());
        }
        self.by_time[self.now] = key as u32;
        self.add(self.now, size);
        self.now += 1;
    }

    fn add(&mut self, time: usize, bytes: u64) {
        let mut index = time + 1;
        while index < self.tree.len() {
            self.tree[index] = self.tree[index].wrapping_add(bytes);
            index += index & index.wrapping_neg();
        }
    }

    /// Gives the experts the first times, in their order.
    fn renumber(&mut self) {
        let mut now = 0;
        self.tree.fill(0);
        for time in 0..self.now {
            let key = std::mem::replace(&mut self.by_time[time], NONE);
            if key == NONE {
                continue;
            }
            self.by_time[now] = key;
            self.used_at[key as usize] = now as u32;
            self.tree[now + 1] = self.sizes[key as usize];
            now += 1;
        }
        for index in 1..self.tree.len() {
            let parent = index + (index & index.wrapping_neg());
            if parent < self.tree.len() {
                self.tree[parent] = self.tree[parent].wrapping_add(self.tree[index]);
            }
        }
        self.now = now;
    }
}
