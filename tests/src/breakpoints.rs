//! Breakpoints that tracers have set in a process: code in memory that is not what its file has.
//!
//! A probe on a file can sit in every process that maps it, whomever it was meant for.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use expert_trace::bounded::{self, Bounded};
use expert_trace::probes::Hook;
use expert_trace::symbols;

/// As long as a breakpoint: INT3, or the first byte of the call that can come in the place of a NOP;
/// on aarch64 a whole instruction, BRK.
const LEN: usize = if cfg!(target_arch = "x86_64") { 1 } else { 4 };

/// What every thread calls for every node of a graph.
pub const EVERY_NODE: &str = "ggml_cpu_extra_compute_forward";

/// Places in the code of a process, and of its forks.
#[derive(Debug)]
pub struct Places(Vec<Place>);

#[derive(Debug)]
struct Place {
    /// In memory.
    address: u64,
    in_file: [u8; LEN],
}

impl Places {
    /// Where a tracer would probe these functions in a library of a process: their entries, and the
    /// instructions that expert-trace prefers to them. `library` begins the file's name.
    ///
    /// # Errors
    ///
    /// If there is none, or the process or the library cannot be read.
    pub fn of(pid: u32, library: &str, functions: &[&str]) -> Result<Places> {
        let mut places = Vec::new();
        for mapping in Mapping::all(pid)? {
            let Mapping { path, .. } = &mapping;
            if !mapping.file_name().starts_with(library) {
                continue;
            }
            let file = File::open(path).with_context(|| format!("open {path}"))?;
            let elf = symbols::resolve(Bounded(&bounded::cache(&file)), functions)
                .with_context(|| format!("look up functions in {path}"))?;
            for definition in elf.definitions.values().flatten() {
                let offset = definition.file_offset;
                for offset in [offset, offset - definition.skipped] {
                    let Some(address) = mapping.address(offset) else {
                        continue;
                    };
                    let mut in_file = [0; LEN];
                    file.read_exact_at(&mut in_file, offset)
                        .with_context(|| format!("read {path}"))?;
                    places.push(Place { address, in_file });
                }
            }
        }
        ensure!(!places.is_empty(), "{library} has none of {functions:?}");
        Ok(Places(places))
    }

    /// All that expert-trace can probe in llama.cpp's libraries, and [`EVERY_NODE`].
    ///
    /// # Errors
    ///
    /// As [`Places::of`].
    pub fn of_probes(pid: u32) -> Result<Places> {
        let functions = Hook::ALL.into_iter().flat_map(Hook::symbols).copied();
        let functions: Vec<&str> = functions.chain([EVERY_NODE]).collect();
        let mut places = Self::of(pid, "libggml", &functions)?;
        places.0.extend(Self::of(pid, "libllama", &functions)?.0);
        Ok(places)
    }

    /// Whether there is a breakpoint at one of them.
    ///
    /// # Errors
    ///
    /// If the memory of the process cannot be read.
    pub fn are_probed(&self, pid: u32) -> Result<bool> {
        let path = format!("/proc/{pid}/mem");
        let memory = File::open(&path).with_context(|| format!("open {path}"))?;
        for Place { address, in_file } in &self.0 {
            let mut in_memory = [0; LEN];
            memory
                .read_exact_at(&mut in_memory, *address)
                .with_context(|| format!("read {path} at {address:#x}"))?;
            if in_memory != *in_file {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Code of a file in a process.
#[derive(Debug, PartialEq)]
pub struct Mapping {
    pub path: String,
    /// In memory.
    start: u64,
    /// In the file.
    offset: u64,
    /// In bytes.
    len: u64,
}

impl Mapping {
    /// Those of a process.
    ///
    /// # Errors
    ///
    /// If there is no such process.
    pub fn all(pid: u32) -> Result<Vec<Mapping>> {
        let path = format!("/proc/{pid}/maps");
        let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        Ok(text.lines().filter_map(Self::parse).collect())
    }

    /// A line such as `7f00-7f08 r-xp 00001000 fe:00 5   /lib/libggml-cpu.so`.
    fn parse(line: &str) -> Option<Mapping> {
        let path = line.find('/').map(|start| &line[start..])?;
        let mut fields = line.split(' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let is_code = fields.next()? == "r-xp";
        let number = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end) = (number(start)?, number(end)?);
        is_code.then_some(Mapping {
            path: path.to_owned(),
            start,
            offset: number(fields.next()?)?,
            len: end - start,
        })
    }

    /// The last part of its path.
    pub fn file_name(&self) -> &str {
        let name = self.path.rsplit_once('/');
        name.map_or(self.path.as_str(), |(_, name)| name)
    }

    /// Where a byte of the file is in memory, if it is part of this mapping.
    fn address(&self, offset: u64) -> Option<u64> {
        let into = offset.checked_sub(self.offset)?;
        (into < self.len).then(|| self.start + into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_of_a_library_is_found() {
        let line = |permissions: &str, file: &str| {
            format!("7f0000001000-7f0000003000 {permissions} 00001000 fe:00 5    /a b/{file}")
        };
        let mapping = Mapping::parse(&line("r-xp", "libggml-cpu.so.0")).unwrap();
        let expected = Mapping {
            path: "/a b/libggml-cpu.so.0".to_owned(),
            start: 0x7f00_0000_1000,
            offset: 0x1000,
            len: 0x2000,
        };
        assert_eq!(mapping, expected);
        assert_eq!(mapping.file_name(), "libggml-cpu.so.0");
        assert_eq!(mapping.address(0xfff), None);
        assert_eq!(mapping.address(0x1234), Some(0x7f00_0000_1234));
        assert_eq!(mapping.address(0x3000), None);
        assert_eq!(Mapping::parse(&line("r--p", "libggml-cpu.so.0")), None);
        assert_eq!(Mapping::parse("7f00-7f08 r-xp 00000000 00:00 0"), None);
    }

    #[test]
    fn only_what_is_at_the_place_itself_counts() {
        let pid = std::process::id();
        let code = [0xcc_u8; 8];
        let at = |byte: u8| Place {
            address: code.as_ptr() as u64,
            in_file: [byte; LEN],
        };
        assert!(!Places(vec![at(0xcc)]).are_probed(pid).unwrap());
        assert!(Places(vec![at(0xcc), at(0x55)]).are_probed(pid).unwrap());
        assert!(Places::of(pid, "libggml", &[EVERY_NODE]).is_err());
    }
}
