//! Which probes would show nothing, by what processes map. Pure.
//!
//! Each probe costs time when it is set and when it is taken away, and some of them at every hit. What is
//! needed by one process is needed from then on.

use std::{collections::HashMap, hash::Hash};

use super::Hook;
use crate::placement::Backends;

/// What of a file decides which probes are needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traits {
    /// It has ggml's scheduler.
    pub scheduler: bool,
    /// It has `llama_context::process_ubatch`, and calls it.
    pub contexts: bool,
    /// Its device backends.
    pub backends: Backends,
    /// The device's own functions copy from and to it, and can be probed.
    pub own_copies: bool,
}

impl Traits {
    fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

/// What processes need, by the files they map; `File` identifies those.
#[derive(Debug)]
pub struct Needs<File> {
    schedulers: bool,
    devices: Backends,
    /// Some device is reached by ggml's functions alone.
    api_copies: bool,
    processes: HashMap<u32, HashMap<File, Traits>>,
}

impl<File> Default for Needs<File> {
    fn default() -> Self {
        Self {
            schedulers: false,
            devices: Backends::None,
            api_copies: false,
            processes: HashMap::new(),
        }
    }
}

impl<File: Eq + Hash> Needs<File> {
    /// A process maps a file; none when it is not known which one, as of a process in a PID namespace that
    /// is not ours. RPC servers are devices only where `may_use_rpc` says so.
    pub fn map(
        &mut self,
        process: Option<u32>,
        file: File,
        traits: Traits,
        may_use_rpc: impl FnOnce() -> bool,
    ) {
        if traits.is_nothing() {
            return;
        }
        let Traits {
            backends,
            own_copies,
            scheduler,
            ..
        } = traits;
        let devices = match backends {
            Backends::Rpc if !may_use_rpc() => Backends::None,
            backends => backends,
        };
        self.devices = self.devices.max(devices);
        self.api_copies |= devices == Backends::Any && !own_copies;
        match process {
            Some(process) => {
                self.processes
                    .entry(process)
                    .or_default()
                    .insert(file, traits);
            }
            None => self.schedulers |= scheduler,
        }
    }

    /// A process becomes another program.
    pub fn forget(&mut self, process: u32) {
        self.processes.remove(&process);
    }

    /// Decides about the files that processes map by now.
    ///
    /// Passes of a scheduler begin in `process_ubatch` when llama.cpp is what enters it: it is in the same
    /// file, or each scheduler that is in a library of its own has a llama.cpp beside it.
    pub fn settle(&mut self) {
        let is_uncovered = |files: &HashMap<File, Traits>| {
            let count = |test: fn(&Traits) -> bool| files.values().filter(|of| test(of)).count();
            let schedulers = count(|of| of.scheduler && !of.contexts);
            let contexts = count(|of| of.contexts && !of.scheduler);
            schedulers > contexts
        };
        self.schedulers |= self.processes.values().any(is_uncovered);
    }

    /// Whether a hook can show something; `is_api` says that the function is ggml's own, behind which a
    /// device can have others.
    pub fn has(&self, hook: Hook, is_api: bool) -> bool {
        match hook {
            Hook::PassBegin | Hook::Ubatch | Hook::SchedulerEnd => self.schedulers,
            Hook::Split
            | Hook::SplitDone
            | Hook::TensorGet
            | Hook::TensorGetDone
            | Hook::EvalCallback => self.devices > Backends::None,
            Hook::Fetch | Hook::WeightsFollow if is_api => self.api_copies,
            Hook::Fetch | Hook::WeightsFollow | Hook::DeviceMulMatId | Hook::DeviceMemcpy => {
                self.devices == Backends::Any
            }
            Hook::ExpertIds | Hook::Context | Hook::ContextEnd | Hook::Libraries => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEDULER: Traits = Traits {
        scheduler: true,
        contexts: false,
        backends: Backends::None,
        own_copies: false,
    };
    const LLAMA: Traits = Traits {
        contexts: true,
        scheduler: false,
        ..SCHEDULER
    };
    const BOTH: Traits = Traits {
        contexts: true,
        ..SCHEDULER
    };

    fn needs(files: &[(Option<u32>, Traits)]) -> Needs<usize> {
        let mut needs = Needs::default();
        for (number, (process, traits)) in files.iter().enumerate() {
            needs.map(*process, number, *traits, || true);
            needs.settle();
        }
        needs
    }

    #[test]
    fn schedulers_are_needed_where_llama_cpp_does_not_enter_them() {
        let of = |files: &[(Option<u32>, Traits)]| needs(files).has(Hook::PassBegin, true);
        let one = Some(1);
        assert!(!of(&[(one, LLAMA), (one, SCHEDULER)]));
        assert!(!of(&[(one, BOTH)]));
        assert!(of(&[(one, SCHEDULER)]));
        // Some code may run before the other library is there.
        assert!(of(&[(one, SCHEDULER), (one, LLAMA)]));
        // Another ggml, whose llama.cpp is older, or none.
        assert!(of(&[(one, LLAMA), (one, SCHEDULER), (one, SCHEDULER)]));
        assert!(of(&[(one, BOTH), (one, SCHEDULER)]));
        let two = [LLAMA, LLAMA, SCHEDULER, SCHEDULER].map(|traits| (one, traits));
        assert!(!of(&two));
        // Each process for itself, and one that is not known for nobody.
        assert!(of(&[(one, LLAMA), (Some(2), SCHEDULER)]));
        assert!(of(&[(one, LLAMA), (None, SCHEDULER)]));
    }

    #[test]
    fn files_count_once_and_until_the_process_is_another_program() {
        let mut needs = Needs::default();
        for file in [1, 2, 2] {
            let traits = if file == 1 { LLAMA } else { SCHEDULER };
            needs.map(Some(1), file, traits, || true);
        }
        needs.settle();
        assert!(!needs.has(Hook::PassBegin, true));
        needs.forget(1);
        needs.map(Some(1), 2, SCHEDULER, || true);
        needs.settle();
        assert!(needs.has(Hook::PassBegin, true));
    }

    #[test]
    fn hooks_of_devices_wait_for_one() {
        let with = |backends, own_copies, may_use_rpc: bool| {
            let mut needs = Needs::default();
            let traits = Traits {
                backends,
                own_copies,
                ..SCHEDULER
            };
            needs.map(Some(1), 0, traits, || may_use_rpc);
            let of = [
                (Hook::Split, false),
                (Hook::TensorGet, false),
                (Hook::Fetch, true),
                (Hook::Fetch, false),
                (Hook::DeviceMemcpy, false),
            ];
            of.map(|(hook, is_api)| needs.has(hook, is_api))
        };
        assert_eq!(with(Backends::None, false, true), [false; 5]);
        assert_eq!(with(Backends::Rpc, false, false), [false; 5]);
        let rpc = with(Backends::Rpc, false, true);
        assert_eq!(rpc, [true, true, false, false, false]);
        assert_eq!(with(Backends::Any, false, false), [true; 5]);
        let own = with(Backends::Any, true, false);
        assert_eq!(own, [true, true, false, true, true]);
    }
}
