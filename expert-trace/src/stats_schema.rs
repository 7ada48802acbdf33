//! Name and version of the document of statistics, for who writes it and who reads it.

/// Its name.
pub const NAME: &str = "expert-trace-stats";
/// Its version: raised when a key changes its meaning or goes.
pub const VERSION: u32 = 2;
