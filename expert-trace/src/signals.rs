//! Signals to the tracer.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
};

use nix::sys::signal;
use tokio::signal::unix::{self, SignalKind};

/// Whether SIGPIPE was ignored when we were started. Rust's start-up code ignores it in any case.
pub static SIGPIPE_WAS_IGNORED: AtomicBool = AtomicBool::new(false);

/// Whether SIGCHLD was ignored when we were started. We cannot do without it.
pub static SIGCHLD_WAS_IGNORED: AtomicBool = AtomicBool::new(false);

/// Runs before Rust's start-up code, as the dynamic linker and libc run what this section lists.
#[used]
#[unsafe(link_section = ".init_array")]
static REMEMBER: extern "C" fn() = {
    extern "C" fn remember() {
        SIGPIPE_WAS_IGNORED.store(is_ignored(signal::Signal::SIGPIPE), Ordering::Relaxed);
        SIGCHLD_WAS_IGNORED.store(is_ignored(signal::Signal::SIGCHLD), Ordering::Relaxed);
    }
    remember
};

/// A signal that we wait for; never, if it is to stay ignored.
#[derive(Debug)]
pub struct OwnSignal(Option<unix::Signal>);

impl OwnSignal {
    /// Waits for it from now on. Its default action does not happen any more.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn listen(signal: signal::Signal) -> io::Result<Self> {
        let kind = SignalKind::from_raw(signal as i32);
        Ok(Self(Some(unix::signal(kind)?)))
    }

    /// The same, unless it was ignored when we were started: nohup and shells do that on purpose, and
    /// a handler of ours would undo it in our children.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn unless_ignored(signal: signal::Signal) -> io::Result<Self> {
        if is_ignored(signal) {
            Ok(Self(None))
        } else {
            Self::listen(signal)
        }
    }

    /// Waits until it comes.
    pub async fn came(&mut self) {
        match &mut self.0 {
            Some(signal) => {
                signal.recv().await;
            }
            None => std::future::pending().await,
        }
    }
}

fn is_ignored(signal: signal::Signal) -> bool {
    // SAFETY: the structure is made of integers; the call fills it, and changes nothing.
    let (result, action) = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let result = libc::sigaction(signal as i32, std::ptr::null(), &raw mut action);
        (result, action)
    };
    result == 0 && action.sa_sigaction == libc::SIG_IGN
}
