//! Which context a record is of.

use std::collections::HashMap;

use expert_trace_common::Header;

/// What a record says of its context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    process: u32,
    address: u64,
    generation: u32,
}

impl Key {
    fn of(header: &Header) -> Self {
        Self {
            process: header.process,
            address: header.context,
            generation: header.generation,
        }
    }
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
    #[inline]
    pub(super) fn find(&mut self, header: &Header) -> Option<usize> {
        if let Some((last, index)) = &self.last
            && last.address == header.context
            && last.process == header.process
            && last.generation == header.generation
        {
            return Some(*index);
        }
        self.look_up(Key::of(header))
    }

    fn look_up(&mut self, key: Key) -> Option<usize> {
        let index = *self.indices.get(&key)?;
        self.last = Some((key, index));
        Some(index)
    }

    /// Adds a context, unless its key is another's.
    pub(super) fn insert_new(&mut self, header: &Header, index: usize) {
        self.indices.entry(Key::of(header)).or_insert(index);
    }

    pub(super) fn remove(&mut self, header: &Header) {
        self.last = None;
        self.indices.remove(&Key::of(header));
    }

    pub(super) fn forget_process(&mut self, process: u32) {
        self.last = None;
        self.indices.retain(|key, _| key.process != process);
    }

    /// Takes out the context that is known by this scheduler, whatever its generation.
    pub(super) fn take_scheduler(&mut self, process: u32, sched: u64) -> Option<usize> {
        self.last = None;
        let is_it = |key: &&Key| key.process == process && key.address == sched;
        let key = self.indices.keys().find(is_it).copied()?;
        self.indices.remove(&key)
    }
}
