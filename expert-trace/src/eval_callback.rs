//! The eval callback that a program gives to ggml's scheduler: which function it is.
//!
//! With one, the scheduler computes graphs piece by piece, and calls it in between
//! (`ggml_backend_sched_compute_splits` in ggml-backend.cpp); what it asks a device for is then on the
//! host.

use std::{ffi::OsStr, path::Path};

use cpp_demangle::{DemangleOptions, Symbol};
use serde::Serialize;

use crate::{
    bounded, symbols,
    target::{MappedFile, mapped_files, printable},
};

/// An eval callback that a process has set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EvalCallback {
    /// The process.
    pub pid: u32,
    /// Name of the function, as its source has it; none where the file does not name it, or nothing is
    /// known of the file.
    pub function: Option<String>,
    /// File that it is in, as the process sees it; none when it was made at run time (as by Python's
    /// ctypes), or the process had ended before it was looked at.
    pub file: Option<String>,
    /// Where in the file, in bytes.
    pub file_offset: Option<u64>,
}

impl EvalCallback {
    /// The function at an address of a process.
    pub fn at(pid: u32, address: u64) -> Self {
        let files = mapped_files(pid).unwrap_or_default();
        let mut places = files.iter();
        let place = places.find_map(|file| Some((file, file.offset_of(address)?)));
        Self {
            pid,
            function: place.and_then(|(file, offset)| function_name(pid, file, offset)),
            file: place.map(|(file, _)| file.path.to_string_lossy().into_owned()),
            file_offset: place.map(|(_, offset)| offset),
        }
    }

    /// What it is called on the terminal.
    pub fn shown(&self) -> String {
        let file = self.file.as_ref().map(|file| printable(file.as_ref()));
        match (&self.function, file, self.file_offset) {
            (Some(function), Some(file), _) => {
                format!("{} in {file}", printable(Path::new(function)))
            }
            (None, Some(file), Some(offset)) => format!("a function at {file}+{offset:#x}"),
            _ => "a function that no file has".to_owned(),
        }
    }
}

fn function_name(pid: u32, file: &MappedFile, offset: u64) -> Option<String> {
    let open = file.open(pid).ok()?;
    let cache = bounded::cache(&open);
    let name = symbols::function_at(bounded::Bounded(&cache), offset).ok()??;
    Some(as_written(&name))
}

/// Whether a program is one of llama.cpp's whose eval callback asks for the expert ids of every layer
/// (tools/imatrix/imatrix.cpp; common/debug.cpp, which prints all tensors).
pub fn asks_for_ids(program: &OsStr) -> bool {
    let name = Path::new(program).file_name().and_then(OsStr::to_str);
    name.is_some_and(|name| ["llama-imatrix", "llama-eval-callback"].contains(&name))
}

/// Longest name that is shown, in bytes: a mangled one can stand for any length.
const MAX_SHOWN: usize = 512;

/// A symbol's name as the source has it, or as it is where that cannot be told.
pub fn as_written(symbol: &str) -> String {
    const NESTED: u32 = 64;
    let options = DemangleOptions::new().recursion_limit(NESTED);
    let mut shown = Limited(String::new());
    let demangled = Symbol::new(symbol)
        .is_ok_and(|parsed| parsed.structured_demangle(&mut shown, &options).is_ok());
    match demangled {
        true => shown.0,
        false => symbol.to_owned(),
    }
}

/// Text up to a length; more is an error.
struct Limited(String);

impl std::fmt::Write for Limited {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        if self.0.len() + text.len() > MAX_SHOWN {
            return Err(std::fmt::Error);
        }
        self.0.push_str(text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_as_its_source_has_it() {
        assert_eq!(
            as_written("_ZL18ik_collect_imatrixP11ggml_tensorbPv"),
            "ik_collect_imatrix(ggml_tensor*, bool, void*)"
        );
        assert_eq!(as_written("my_callback"), "my_callback");
    }

    #[test]
    fn a_short_name_cannot_become_a_long_one() {
        // Each substitution doubles what the last one stands for.
        let mut bomb = "_Z1f1SI1aE".to_owned();
        for i in 0..30 {
            let digit = char::from_digit(i, 36).map(|c| c.to_ascii_uppercase());
            let last = digit.map_or_else(String::new, String::from);
            bomb += &format!("1SIS{last}_S{last}_E");
        }
        assert!(as_written(&bomb).len() <= MAX_SHOWN.max(bomb.len()));
    }

    #[test]
    fn an_address_without_a_file() {
        let callback = EvalCallback::at(std::process::id(), 8);
        assert_eq!((&callback.file, callback.file_offset), (&None, None));
        assert_eq!(callback.shown(), "a function that no file has");
    }

    #[test]
    fn a_function_of_this_process() {
        let address = an_address_without_a_file as fn() as usize as u64;
        let callback = EvalCallback::at(std::process::id(), address);
        let function = callback.function.unwrap_or_default();
        assert!(function.contains("an_address_without_a_file"), "{function}");
    }
}
