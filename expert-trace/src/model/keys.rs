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

#[cfg(test)]
mod tests {
    use super::*;

    fn one() -> Header {
        Header {
            process: 7,
            context: 0x5000,
            generation: 3,
            ..Header::default()
        }
    }

    #[test]
    fn what_was_found_last_is_forgotten_with_its_key() {
        let forget: [fn(&mut Keys); 3] = [
            |keys| keys.remove(&one()),
            |keys| keys.forget_process(7),
            |keys| assert_eq!(keys.take_scheduler(7, 0x5000), Some(4)),
        ];
        for forget in forget {
            let mut keys = Keys::default();
            keys.insert_new(&one(), 4);
            assert_eq!(keys.find(&one()), Some(4));
            assert_eq!(keys.find(&one()), Some(4));
            for other in [
                Header {
                    process: 8,
                    ..one()
                },
                Header {
                    context: 0x5008,
                    ..one()
                },
                Header {
                    generation: 4,
                    ..one()
                },
            ] {
                assert_eq!(keys.find(&other), None);
            }
            forget(&mut keys);
            assert_eq!(keys.find(&one()), None);
        }
    }
}
