//! Whether a target has set an eval callback of its own, and which function that can be.

use std::{
    num::NonZeroU32,
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;

use super::report::Answer;
use crate::{
    attach::{AttachError, Scope, Session},
    decode::{Body, decode},
    eval_callback::{self, EvalCallback},
    probes::{Hook, Plan},
    target::printable,
};

/// Whether a target has an eval callback.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Callbacks {
    /// Whether one is set.
    pub answer: Answer,
    /// How that is known, or why not.
    pub finding: &'static str,
    /// The one that is set, or those that can be.
    pub functions: Vec<Function>,
}

/// A function that is an eval callback, or can be one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Function {
    /// Its name, as its source has it; none where the file does not name it.
    pub function: Option<String>,
    /// File that it is in; none when no file has it.
    pub file: Option<String>,
    /// Whether the process has set it. Otherwise it has the type of an eval callback, no more.
    pub set: bool,
}

impl Default for Callbacks {
    fn default() -> Self {
        Self {
            answer: Answer::No,
            finding: "no file has to do with eval callbacks",
            functions: Vec::new(),
        }
    }
}

impl Callbacks {
    /// A file has to do with eval callbacks, and has these functions of their type, as symbols.
    pub fn add(&mut self, file: &str, symbols: &[String]) {
        self.answer = Answer::CouldNotTell;
        self.finding = "whether the program sets one shows when it computes";
        self.functions.extend(symbols.iter().map(|symbol| Function {
            function: Some(eval_callback::as_written(symbol)),
            file: Some(file.to_owned()),
            set: false,
        }));
    }

    /// Looks for a moment whether a process computes with one.
    pub fn watch(&mut self, pid: u32, plan: &Plan) {
        if plan.found(Hook::EvalCallback).next().is_none() {
            return;
        }
        match watch(pid, plan) {
            Ok(Seen::Set(callback)) => {
                self.answer = Answer::Yes;
                self.finding = "set: llama.cpp computes graphs piece by piece for it";
                self.functions = vec![Function {
                    function: callback.function,
                    file: callback.file,
                    set: true,
                }];
            }
            Ok(Seen::NotSet) => {
                *self = Self {
                    answer: Answer::No,
                    finding: "the process computed without one in the second that was looked",
                    functions: Vec::new(),
                };
            }
            Ok(Seen::Nothing) => {
                self.finding = "the process allocated no graph in the second that was looked";
            }
            Err(error) => tracing::debug!("eval callbacks of process {pid}: {error}"),
        }
    }

    /// For a person.
    pub fn text(&self) -> String {
        let names: Vec<String> = self.functions.iter().map(Function::shown).collect();
        match (names.as_slice(), self.answer) {
            ([], _) => self.finding.to_owned(),
            (names, Answer::Yes) => format!("{} is {}", names.join(" and "), self.finding),
            (names, _) => format!("{}; it could be {}", self.finding, names.join(" or ")),
        }
    }
}

impl Function {
    fn shown(&self) -> String {
        let name = self.function.as_deref().unwrap_or("a function");
        let name = printable(Path::new(name));
        match &self.file {
            Some(file) => format!("{name} in {}", printable(file.as_ref())),
            None => format!("{name} that no file has"),
        }
    }
}

enum Seen {
    Set(EvalCallback),
    NotSet,
    Nothing,
}

/// Sets a probe in the process, and waits until it is hit, for at most a second. llama.cpp sets the
/// callback, or none, whenever it allocates a graph (`llama_context::process_ubatch`).
fn watch(pid: u32, plan: &Plan) -> Result<Seen, AttachError> {
    const RING_BYTES: u32 = 64 << 10;
    const PATIENCE: Duration = Duration::from_secs(1);
    const LOOK_AGAIN: u16 = 100;
    let probes: Vec<_> = plan.found(Hook::EvalCallback).collect();
    let Some(process) = NonZeroU32::new(pid) else {
        return Ok(Seen::Nothing);
    };
    let (mut session, mut events) = Session::load(RING_BYTES, Scope::Process(process))?;
    for probe in &probes {
        session.attach(probe)?;
    }
    session.set_active(true)?;
    let end = Instant::now() + PATIENCE;
    let (mut set, mut hits) = (None, 0);
    // Of several contexts, some can have none.
    while set.is_none() && Instant::now() < end {
        let mut readable = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        // It fails only when a signal comes.
        let _ = poll(&mut readable, PollTimeout::from(LOOK_AGAIN));
        hits = 0;
        for probe in &probes {
            hits += session.hits(probe)?;
        }
        events.drain(|bytes| {
            if let Ok(event) = decode(bytes)
                && let Body::EvalCallback(address) = event.body
            {
                set = Some(EvalCallback::at(pid, address));
            }
        });
    }
    session.detach();
    Ok(match set {
        Some(callback) => Seen::Set(callback),
        None if hits > 0 => Seen::NotSet,
        None => Seen::Nothing,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_that_can_be_one_are_named() {
        let mut callbacks = Callbacks::default();
        assert_eq!(callbacks.text(), "no file has to do with eval callbacks");
        callbacks.add("/opt/libggml-base.so", &[]);
        assert_eq!(callbacks.answer, Answer::CouldNotTell);
        callbacks.add("/opt/x", &["_Z7cb_evalP11ggml_tensorbPv".to_owned()]);
        assert_eq!(
            callbacks.text(),
            "whether the program sets one shows when it computes; it could be \
             cb_eval(ggml_tensor*, bool, void*) in /opt/x"
        );
    }
}
