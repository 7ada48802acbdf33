//! Python with DuckDB, pandas, Polars and PyArrow: `cargo xtask prebuilt` installs them, and prints the
//! environment variable that says where.

use std::path::PathBuf;

use anyhow::Result;

use crate::environment::existing;

/// Variable by which `cargo xtask` names the interpreter.
pub const PYTHON: &str = "EXPERT_TRACE_TEST_PYTHON";

/// The interpreter.
///
/// # Errors
///
/// If it is not named in the environment.
pub fn interpreter() -> Result<PathBuf> {
    existing(PYTHON, "cargo xtask prebuilt")
}
