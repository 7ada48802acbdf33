//! Names of hits in the results of `bench hits` that others compute with.

/// A GET_ROWS node on another thread than the first.
pub const OTHER_THREAD: &str = "another thread";
/// A GET_ROWS node that is no router's.
pub const OTHER_TENSOR: &str = "another tensor";
/// A layer of a decoded token.
pub const ONE_ROW: &str = "one row, k 8";
/// A layer of a prompt.
pub const PROMPT: &str = "512 rows, k 8 of 128";
/// A pass of one token begins.
pub const PASS: &str = "a pass begins, 1 token";
/// A pass of [`PROMPT_TOKENS`] tokens begins.
pub const PROMPT_PASS: &str = "a pass begins, 512 tokens";
/// Tokens of that.
pub const PROMPT_TOKENS: u32 = 512;
