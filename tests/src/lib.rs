//! Models with known routing, oracles, and helpers for end-to-end tests.

pub mod account;
pub mod comparison;
mod environment;
pub mod imatrix;
pub mod llama;
pub mod models;
pub mod oracle;
pub mod prebuilt;
pub mod reachable;
pub mod server;
pub mod terminal;
pub mod tracer;
