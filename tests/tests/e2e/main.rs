//! Everything the program promises, on real llama.cpp processes, against something that is not us.
//!
//! `cargo xtask test` prepares what these tests need and runs them, one at a time, as root.

mod all;
mod analyze;
mod attach;
mod bench;
mod callback;
mod compat;
mod control;
mod cost;
mod cuda;
mod cuda_standin;
mod devices;
mod doctor;
mod environments;
mod errors;
mod formats;
mod help;
mod imatrix;
mod known_routing;
mod layouts;
mod llama_cli;
mod loss;
mod offline;
mod outputs;
mod passes;
mod prebuilt;
mod processes;
mod report;
mod rpc;
mod servers;
mod shapes;
mod shell;
mod specification;
mod sudo;
mod support;
mod top;
mod trace;
mod untrusted;
mod vulkan;
mod warmup;
mod weights;
