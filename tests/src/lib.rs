//! Models with known routing, oracles, and helpers for end-to-end tests.

pub mod account;
pub mod bpftrace;
pub mod breakpoints;
pub mod builds;
pub mod comparison;
pub mod cpu_time;
pub mod driver;
mod environment;
pub mod hits;
pub mod imatrix;
mod lines;
pub mod llama;
pub mod models;
pub mod oracle;
pub mod prebuilt;
pub mod python;
pub mod reachable;
pub mod records;
pub mod routes;
pub mod server;
pub mod synthetic;
pub mod terminal;
pub mod tmux;
pub mod tracer;
pub mod usage;
