//! What the live view asks of a capture.

use std::path::PathBuf;

use super::Capture;
use crate::{caller::Account, export::Output, target::printable, top::Asked};

/// What the view wants of whoever runs the capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// Nothing more.
    None,
    /// To end the capture, or the program.
    End,
    /// To go on without it.
    Leave,
}

impl Capture {
    /// Does what the view asks for. `account` writes the files.
    pub(super) async fn show(&mut self, asked: Asked, account: &Account) -> Wish {
        match asked {
            Asked::End => return Wish::End,
            Asked::Leave => return Wish::Leave,
            Asked::Stats(answer) => {
                // Whatever was seen has come as an event, or has been counted as lost.
                let now = self.session.counters().ok().map(|counters| counters.0);
                let is_new = now.is_none() || self.shown != now;
                let stats = match is_new {
                    true => self.so_far().await.ok(),
                    false => None,
                };
                if stats.is_some() {
                    self.shown = now;
                }
                let _ = answer.send(stats.map(Box::new));
            }
            Asked::Reset(answer) => {
                let error = self.reset().await.err();
                self.shown = None;
                let _ = answer.send(error.map(|error| format!("{error:#}")));
            }
            Asked::Save(answer) => {
                let saved = self.save(account).await;
                let text = match saved {
                    Ok(place) => format!("counts written to {place}"),
                    Err(error) => format!("counts cannot be written: {error:#}"),
                };
                let _ = answer.send(text);
            }
        }
        Wish::None
    }

    /// Writes the document to its file, or to one that is named after the process.
    async fn save(&mut self, account: &Account) -> anyhow::Result<String> {
        if self.sinks.output.is_some() {
            return self.write_so_far().await;
        }
        let path = PathBuf::from(format!("expert-trace-{}.json", self.pid));
        let stats = self.so_far().await?;
        Output::create(&path, account)?.write_json(&stats)?;
        Ok(printable(&path))
    }
}
