//! Which context a record is of.

use std::collections::HashMap;

use expert_trace_common::Header;

/// Process, address, and generation.
pub(super) type Key = (u32, u64, u32);

/// What a record says of its context.
pub(super) fn of(header: &Header) -> Key {
    (header.process, header.context, header.generation)
}

/// Contexts that go on, by what their records say of them.
#[derive(Debug, Default)]
pub(super) struct Keys {
    indices: HashMap<Key, usize>,
    /// Found last: nearly always what is asked for next, and a hash takes longer than all else that is
    /// done for a record of one row.
    last: Option<(Key, usize)>,
}

impl Keys {
    pub(super) fn find(&mut self, key: Key) -> Option<usize> {
        if let Some((last, index)) = self.last
            && last == key
        {
            return Some(index);
        }
        let index = *self.indices.get(&key)?;
        self.last = Some((key, index));
        Some(index)
    }

    /// Adds a context, unless its key is another's.
    pub(super) fn insert_new(&mut self, key: Key, index: usize) {
        self.indices.entry(key).or_insert(index);
    }

    pub(super) fn remove(&mut self, key: Key) {
        self.last = None;
        self.indices.remove(&key);
    }

    pub(super) fn forget_process(&mut self, process: u32) {
        self.last = None;
        self.indices.retain(|(of, ..), _| *of != process);
    }

    /// Takes out the context that is known by this scheduler, whatever its generation.
    pub(super) fn take_scheduler(&mut self, process: u32, sched: u64) -> Option<usize> {
        self.last = None;
        let is_it = |(of, address, _): &&Key| (*of, *address) == (process, sched);
        let key = self.indices.keys().find(is_it).copied()?;
        self.indices.remove(&key)
    }
}
