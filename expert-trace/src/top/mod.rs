//! The live view: layers × experts as a heat map in the terminal, while a capture goes on.
//!
//! ```text
//! capture ── Stats ─▶ picture ─▶ state ─▶ draw ─▶ terminal
//!    ▲                             ▲
//!    └────────── Asked ────────────┴── keys
//! ```
//!
//! It runs on a thread of its own, so that a slow terminal keeps no event waiting. The capture answers it
//! as it answers `ctl`: the view shows the document that is written, and counts nothing itself.

mod draw;
mod heat_map;
mod help;
mod palette;
mod picture;
mod screen;
mod state;
mod status;
mod terminal;
mod view;

pub use self::view::{Asked, View};

#[cfg(test)]
mod tests;
