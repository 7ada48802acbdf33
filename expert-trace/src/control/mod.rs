//! Control of a capture that goes on, by a Unix socket.
//!
//! A connection asks once: the [`name`](Request::name) of a request, and a line feed. The answer is a line,
//! `ok` or `error: ` with the reason, and after `ok` what was asked for, up to the end of the connection.

mod client;
mod server;

use clap::ValueEnum;

pub use self::{
    client::ctl,
    server::{Asked, Control},
};

/// What can be asked of a capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Request {
    /// Write the counts as they are now
    Dump,
    /// Begin to count anew
    Reset,
    /// End the capture of attach, as Ctrl-C does
    Stop,
}

impl Request {
    /// All of them.
    const ALL: [Request; 3] = [Request::Dump, Request::Reset, Request::Stop];

    /// Its name on the socket.
    pub const fn name(self) -> &'static str {
        match self {
            Request::Dump => "dump",
            Request::Reset => "reset",
            Request::Stop => "stop",
        }
    }
}

/// First line of an answer that is given.
const OK: &str = "ok\n";
/// Begins the line of one that is refused.
const ERROR: &str = "error: ";

#[cfg(test)]
mod tests;
