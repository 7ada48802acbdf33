//! Who asks.

use std::{
    io::{Read as _, Write as _},
    net::Shutdown,
    os::unix::net::UnixStream,
};

use anyhow::{Context as _, bail, ensure};

use super::{ERROR, OK, Request};
use crate::{cli::Ctl, output, target::printable};

/// Longest answer that is believed: many times the document of the largest model.
const MAX_ANSWER: u64 = 1 << 30;

/// Asks a capture, and writes what it answers.
///
/// # Errors
/// When nobody is there, or the answer is an error, or cannot be written.
pub fn ctl(arguments: &Ctl) -> anyhow::Result<()> {
    let shown = printable(&arguments.socket);
    let mut stream = UnixStream::connect(&arguments.socket).with_context(|| {
        format!("cannot reach a capture by {shown}: is it the SOCKET of run or attach --control?")
    })?;
    let failed = || format!("the capture at {shown} does not answer");
    writeln!(stream, "{}", arguments.request.name()).with_context(failed)?;
    stream.shutdown(Shutdown::Write).with_context(failed)?;
    let mut answer = Vec::new();
    stream
        .take(MAX_ANSWER)
        .read_to_end(&mut answer)
        .with_context(failed)?;
    let Some(content) = answer.strip_prefix(OK.as_bytes()) else {
        let text = String::from_utf8_lossy(&answer);
        match text.strip_prefix(ERROR) {
            Some(why) => bail!("{}", why.trim_end()),
            None => bail!("{}: it has ended", failed()),
        }
    };
    if arguments.request == Request::Dump {
        // A document ends with a line feed: one that was cut has none.
        ensure!(content.ends_with(b"\n"), "the answer was cut: ask again");
        output::write(&arguments.output, content)?;
    }
    Ok(())
}
