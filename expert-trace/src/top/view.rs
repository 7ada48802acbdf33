//! The capture's end of the view.

use std::{
    io,
    sync::mpsc::RecvTimeoutError,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Context as _;
use tokio::sync::{mpsc, oneshot};

use super::{screen, terminal::Screen};
use crate::stats::Stats;

/// What the view asks of the capture.
#[derive(Debug)]
pub enum Asked {
    /// The document as it is now; nothing when it is what it was.
    Stats(oneshot::Sender<Option<Box<Stats>>>),
    /// To begin to count anew. The answer is what went wrong.
    Reset(oneshot::Sender<Option<String>>),
    /// To write the document. The answer is for the user.
    Save(oneshot::Sender<String>),
    /// To end: the capture of a running process, or the program that was started.
    End,
    /// To go on without the view, which shows what the program prints from now on.
    Leave,
}

/// A view that is shown. The terminal is as it was before when this goes.
#[derive(Debug)]
pub struct View {
    asked: mpsc::Receiver<Asked>,
    thread: Option<JoinHandle<()>>,
    /// Ends with the thread.
    over: std::sync::mpsc::Receiver<()>,
}

/// How long we stay for the thread: reading from a terminal that is hung up at that moment, it would never end.
const LONGEST_END: Duration = Duration::from_secs(2);

impl View {
    /// Takes the terminal. Standard input, output and error, where they are the terminal, are not until
    /// the view is over: what is written there is shown then. What is started meanwhile inherits that.
    ///
    /// # Errors
    /// When there is no terminal, or there can be no thread.
    pub fn open(title: String) -> anyhow::Result<Self> {
        let screen = Screen::open().context("the live view needs a terminal")?;
        let (asks, asked) = mpsc::channel(1);
        let (running, over) = std::sync::mpsc::channel::<()>();
        let thread = thread::Builder::new()
            .name("view".into())
            .spawn(move || {
                screen::run(screen, &title, &asks);
                drop(running);
            })
            .context("the live view needs a thread")?;
        Ok(Self {
            asked,
            thread: Some(thread),
            over,
        })
    }

    /// Waits until it asks; for ever without one.
    pub async fn next(view: &mut Option<Self>) -> Asked {
        match view {
            Some(view) => view.asked.recv().await.unwrap_or(Asked::Leave),
            None => std::future::pending().await,
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // Whoever asks hears that nobody is there.
        self.asked.close();
        while self.asked.try_recv().is_ok() {}
        let ended = self.over.recv_timeout(LONGEST_END) != Err(RecvTimeoutError::Timeout);
        if let Some(thread) = self.thread.take().filter(|_| ended) {
            let _ = thread.join();
        }
    }
}

/// Asks, and waits for the answer. Nothing when the capture is over.
pub(super) fn ask<T>(
    asks: &mpsc::Sender<Asked>,
    question: impl FnOnce(oneshot::Sender<T>) -> Asked,
) -> io::Result<T> {
    let over = || io::Error::from(io::ErrorKind::BrokenPipe);
    let (answer, answered) = oneshot::channel();
    asks.blocking_send(question(answer)).map_err(|_| over())?;
    answered.blocking_recv().map_err(|_| over())
}
