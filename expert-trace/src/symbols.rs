//! ELF bytes to definitions and file offsets.
//!
//! Only definitions count: an executable that merely imports `ggml_*` has undefined symbols of the
//! same name. `.symtab` is looked at first, since until b5066 the function of interest was local;
//! `.dynsym` survives stripping.

use std::{collections::BTreeMap, ops::Range};

use object::{
    Architecture, Endianness, Object as _, ObjectSegment as _, ObjectSymbol as _, ReadRef,
    SegmentFlags, SymbolKind, elf::PF_X, read::elf::ElfFile64,
};
use serde::Serialize;
use thiserror::Error;

/// Why a file gives no symbols.
#[derive(Debug, Error)]
pub enum SymbolError {
    /// The bytes are no ELF file, or a damaged one.
    #[error("not a readable ELF file: {0}")]
    Elf(#[from] object::Error),
    /// The file is for another processor than the one we run on.
    #[error(
        "built for {found:?}, but this machine is {host}: a foreign binary cannot be traced here"
    )]
    ForeignArchitecture {
        /// The file's architecture.
        found: Architecture,
        /// Rust's name of ours.
        host: &'static str,
    },
}

/// Symbol table a definition was found in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Table {
    /// The full table; gone from stripped files.
    #[serde(rename = ".symtab")]
    Symtab,
    /// The dynamic linker's table.
    #[serde(rename = ".dynsym")]
    Dynsym,
}

/// Where a function is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Definition {
    /// Table it was found in.
    pub table: Table,
    /// Virtual address of the probed instruction, before relocation.
    pub address: u64,
    /// Offset of the probed instruction from the start of the file, in bytes.
    pub file_offset: u64,
    /// Bytes between the function's entry and the probed instruction.
    pub skipped: u64,
}

/// What is asked of an ELF file.
#[derive(Debug, Default)]
pub struct Elf {
    /// `.note.gnu.build-id`, as hex digits.
    pub build_id: Option<String>,
    /// The definitions found, by name. Several when local functions share a name.
    pub definitions: BTreeMap<String, Vec<Definition>>,
}

/// Bytes of which no more than a symbol table can need is read at once: a file of another user's can
/// promise any size.
#[derive(Clone, Copy, Debug)]
pub struct Bounded<R>(pub R);

/// Ten times the symbol table of the largest llama.cpp builds, with CUDA kernels in them.
const MAX_READ: u64 = 256 << 20;

impl<'data, R: ReadRef<'data>> ReadRef<'data> for Bounded<R> {
    fn len(self) -> Result<u64, ()> {
        self.0.len()
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'data [u8], ()> {
        if size > MAX_READ {
            return Err(());
        }
        self.0.read_bytes_at(offset, size)
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'data [u8], ()> {
        self.0.read_bytes_at_until(range, delimiter)
    }
}

/// Looks up `names`.
///
/// # Errors
/// When the bytes are no ELF file for this machine. A name without a definition is no error.
pub fn resolve<'data, R: ReadRef<'data>>(data: R, names: &[&str]) -> Result<Elf, SymbolError> {
    let file = object::File::parse(data)?;
    check_architecture(file.architecture())?;
    let mut elf = Elf {
        build_id: file.build_id().ok().flatten().map(hex),
        ..Elf::default()
    };
    for (table, symbols) in [
        (Table::Symtab, file.symbols()),
        (Table::Dynsym, file.dynamic_symbols()),
    ] {
        for symbol in symbols {
            let Ok(name) = symbol.name() else { continue };
            // Versioned names of `.symtab` (`name@@VERSION`) are the same function.
            let name = name.split('@').next().unwrap_or(name);
            if !names.contains(&name)
                || !symbol.is_definition()
                || symbol.kind() != SymbolKind::Text
            {
                continue;
            }
            let Some((file_offset, skipped)) = probe_offset(&file, symbol.address()) else {
                continue;
            };
            let found = elf.definitions.entry(name.to_owned()).or_default();
            let address = symbol.address() + skipped;
            if found.iter().all(|known| known.address != address) {
                found.push(Definition {
                    table,
                    address,
                    file_offset,
                    skipped,
                });
            }
        }
    }
    Ok(elf)
}

/// Makes sure that the kernel can run the file on this machine.
///
/// # Errors
/// When it is no ELF file for it.
pub fn check_executable<'data, R: ReadRef<'data>>(data: R) -> Result<(), SymbolError> {
    let file = ElfFile64::<Endianness, R>::parse(data)?;
    check_architecture(file.architecture())
}

fn check_architecture(found: Architecture) -> Result<(), SymbolError> {
    let host = std::env::consts::ARCH;
    let ours = match host {
        "x86_64" => Architecture::X86_64,
        "aarch64" => Architecture::Aarch64,
        _ => Architecture::Unknown,
    };
    if found == ours {
        Ok(())
    } else {
        Err(SymbolError::ForeignArchitecture { found, host })
    }
}

/// File offset of the instruction to probe, and its distance from the function's entry.
///
/// `endbr64` would be single-stepped at every hit, while the `push` behind it is emulated, at a
/// twentieth of the cost; the arguments are still in their registers there.
fn probe_offset<'data, R: ReadRef<'data>>(
    file: &object::File<'data, R>,
    address: u64,
) -> Option<(u64, u64)> {
    const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
    let segment = file.segments().find(|segment| {
        let (_, size) = segment.file_range();
        let executable =
            matches!(segment.flags(), SegmentFlags::Elf { p_flags } if p_flags & PF_X != 0);
        executable && address >= segment.address() && address - segment.address() < size
    })?;
    let entry = segment.file_range().0 + (address - segment.address());
    let skipped = match segment.data_range(address, ENDBR64.len() as u64) {
        Ok(Some(bytes)) if bytes == ENDBR64 => ENDBR64.len() as u64,
        _ => 0,
    };
    Some((entry + skipped, skipped))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use object::{
        BinaryFormat, Endianness, SymbolFlags, SymbolScope,
        write::{Object, StandardSection, Symbol, SymbolSection},
    };

    const NAME: &str = "ggml_compute_forward_get_rows";

    fn host_architecture() -> Architecture {
        if cfg!(target_arch = "x86_64") {
            Architecture::X86_64
        } else {
            Architecture::Aarch64
        }
    }

    /// This test program itself: linked by the system's linker, with a symbol table.
    fn own_executable() -> Vec<u8> {
        std::fs::read(std::env::current_exe().unwrap()).unwrap()
    }

    #[unsafe(no_mangle)]
    #[inline(never)]
    extern "C" fn expert_trace_symbols_test_marker(x: u64) -> u64 {
        std::hint::black_box(x).wrapping_mul(3)
    }

    #[test]
    fn offset_of_a_linked_function_points_to_its_bytes() {
        let bytes = own_executable();
        let name = "expert_trace_symbols_test_marker";
        assert_eq!(expert_trace_symbols_test_marker(2), 6);
        let elf = resolve(bytes.as_slice(), &[name]).unwrap();
        let [definition] = elf.definitions[name].as_slice() else {
            panic!("{:?}", elf.definitions);
        };
        // The loaded function and the file have the same bytes at the resolved offset.
        let code = expert_trace_symbols_test_marker as *const u8;
        // SAFETY: the function is longer than this.
        let loaded =
            unsafe { std::slice::from_raw_parts(code.add(definition.skipped as usize), 4) };
        let start = definition.file_offset as usize;
        assert_eq!(&bytes[start..start + 4], loaded);
    }

    #[test]
    fn an_undefined_symbol_is_no_definition() {
        let mut object = Object::new(BinaryFormat::Elf, host_architecture(), Endianness::Little);
        object.add_symbol(Symbol {
            name: NAME.into(),
            value: 0,
            size: 0,
            kind: SymbolKind::Text,
            scope: SymbolScope::Unknown,
            weak: false,
            section: SymbolSection::Undefined,
            flags: SymbolFlags::None,
        });
        let bytes = object.write().unwrap();
        assert!(
            resolve(bytes.as_slice(), &[NAME])
                .unwrap()
                .definitions
                .is_empty()
        );
    }

    #[test]
    fn a_definition_outside_every_executable_segment_is_left_out() {
        // A relocatable object has no segments, hence no code that a process could have mapped.
        let mut object = Object::new(BinaryFormat::Elf, host_architecture(), Endianness::Little);
        let text = object.section_id(StandardSection::Text);
        object.append_section_data(text, &[0xc3; 16], 16);
        object.add_symbol(Symbol {
            name: NAME.into(),
            value: 4,
            size: 4,
            kind: SymbolKind::Text,
            scope: SymbolScope::Linkage,
            weak: false,
            section: SymbolSection::Section(text),
            flags: SymbolFlags::None,
        });
        let bytes = object.write().unwrap();
        assert!(
            resolve(bytes.as_slice(), &[NAME])
                .unwrap()
                .definitions
                .is_empty()
        );
    }

    #[test]
    fn a_foreign_architecture_is_named() {
        let bytes = Object::new(BinaryFormat::Elf, Architecture::Riscv64, Endianness::Little)
            .write()
            .unwrap();
        let error = resolve(bytes.as_slice(), &[NAME]).unwrap_err();
        assert!(error.to_string().contains("Riscv64"), "{error}");
    }

    #[test]
    fn every_truncation_is_an_error_or_an_answer() {
        let bytes = own_executable();
        for length in (0..4096).chain((4096..bytes.len()).step_by(bytes.len() / 200)) {
            let _ = resolve(&bytes[..length], &[NAME]);
            let _ = check_executable(&bytes[..length]);
        }
    }
}
