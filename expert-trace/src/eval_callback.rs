//! The eval callback that a program gives to ggml's scheduler: which function it is.
//!
//! With one, the scheduler computes graphs piece by piece, and calls it in between
//! (`ggml_backend_sched_compute_splits` in ggml-backend.cpp); what it asks a device for is then on the
//! host.

use std::{ffi::OsStr, path::Path};

use serde::Serialize;

use crate::{
    bounded, symbols,
    target::{MappedFile, mapped_files, printable, thread_with_memory},
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
    /// Whether the process could be looked at.
    #[serde(skip)]
    looked_at: bool,
}

impl EvalCallback {
    /// The function at an address of a process.
    pub fn at(pid: u32, address: u64) -> Self {
        let shown_by = thread_with_memory(pid);
        let files = mapped_files(shown_by).unwrap_or_default();
        let mut places = files.iter();
        let place = places.find_map(|file| Some((file, file.offset_of(address)?)));
        Self {
            pid,
            function: place.and_then(|(file, offset)| function_name(shown_by, file, offset)),
            file: place.map(|(file, _)| file.path.to_string_lossy().into_owned()),
            file_offset: place.map(|(_, offset)| offset),
            looked_at: !files.is_empty(),
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
            _ if self.looked_at => "a function that no file has".to_owned(),
            _ => "a function of a process that had ended".to_owned(),
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

/// A symbol's name as the source has it, for functions that take what eval callbacks take; others as they
/// are. Of mangled names this reads no more than that (Itanium C++ ABI, 5.1): reading all that there can be
/// takes time without bounds.
pub fn as_written(symbol: &str) -> String {
    let written = symbol
        .strip_prefix("_Z")
        .and_then(|rest| rest.strip_suffix(CALLBACK_TYPE))
        .and_then(function);
    match written {
        Some(name) => format!("{name}(ggml_tensor*, bool, void*)"),
        None => symbol.to_owned(),
    }
}

/// What eval callbacks take, as symbols of C++ end with it: `ggml_tensor *`, `bool`, `void *`.
pub const CALLBACK_TYPE: &str = "P11ggml_tensorbPv";

/// A function's name, that may be local (`L`) or in namespaces (`N … E`).
fn function(mangled: &str) -> Option<String> {
    let parts = match mangled.strip_prefix('N') {
        Some(nested) => nested.strip_suffix('E')?,
        None => mangled.strip_prefix('L').unwrap_or(mangled),
    };
    let mut names = Vec::new();
    let mut rest = parts;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let length: usize = rest[..digits].parse().ok()?;
        let (name, behind) = rest[digits..].split_at_checked(length)?;
        names.push(match name {
            "_GLOBAL__N_1" => "(anonymous namespace)",
            name => name,
        });
        rest = behind;
    }
    let is_nested = mangled.starts_with('N');
    (names.len() == 1 || is_nested && !names.is_empty()).then(|| names.join("::"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_as_its_source_has_it() {
        for (symbol, written) in [
            (
                "_ZL18ik_collect_imatrixP11ggml_tensorbPv",
                "ik_collect_imatrix",
            ),
            ("_Z7cb_evalP11ggml_tensorbPv", "cb_eval"),
            (
                "_ZN12_GLOBAL__N_19on_tensorEP11ggml_tensorbPv",
                "(anonymous namespace)::on_tensor",
            ),
        ] {
            let written = format!("{written}(ggml_tensor*, bool, void*)");
            assert_eq!(as_written(symbol), written);
        }
    }

    /// Others are shown as they are, whatever they would stand for.
    #[test]
    fn other_names_are_left_alone() {
        let bomb = format!("_Z1fIX{}EEvP11ggml_tensorbPv", "nw".repeat(500));
        let long = format!("_Z{}xP11ggml_tensorbPv", "9".repeat(900));
        for symbol in [
            "my_callback",
            "_Z7cb_evalv",
            "_Z7cb_eval3P11ggml_tensorbPv",
            "_Z99cbP11ggml_tensorbPv",
            "_ZP11ggml_tensorbPv",
            "_ZNEP11ggml_tensorbPv",
            "_Z1f1gP11ggml_tensorbPv",
            "_Z2\u{e4}\u{e4}P11ggml_tensorbPv",
            &bomb,
            &long,
        ] {
            assert_eq!(as_written(symbol), symbol);
        }
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
