//! ELF bytes to definitions and file offsets.
//!
//! Only definitions count: an executable that merely imports `ggml_*` has undefined symbols of the
//! same name. `.symtab` is looked at first, since until b5066 the function of interest was local;
//! `.dynsym` survives stripping.

use std::collections::BTreeMap;

use object::{
    Architecture, Endianness, Object as _, ReadRef,
    elf::{
        ELF_NOTE_GNU, FileHeader64, NT_GNU_BUILD_ID, PF_X, PT_LOAD, PT_NOTE, SHN_LORESERVE,
        SHN_UNDEF, SHN_XINDEX, SHT_NOTE, STT_FUNC, Sym64,
    },
    read::elf::{ElfFile64, ProgramHeader as _, SectionHeader as _, Sym as _, SymbolTable},
};
use serde::Serialize;
use thiserror::Error;

use crate::prologue::{self, Point, Step};

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
    /// The names of the symbols are beyond the end of the file, or more than we read.
    #[error("the names of its symbols cannot be read")]
    Names,
    /// A function is defined so often that no compiler can have done it.
    #[error(
        "it defines {name} more than {MAX_DEFINITIONS} times, so that no definition is believed"
    )]
    TooMany {
        /// The function.
        name: String,
    },
}

/// Most definitions of one name that are looked at. A file has several when versions of ggml were
/// linked together, or a local function of the same name is in several sources.
const MAX_DEFINITIONS: usize = 32;

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
    /// How the kernel gets past that instruction at each hit; none where that is not known.
    pub instruction: Option<Step>,
}

/// What is asked of an ELF file.
#[derive(Debug, Default)]
pub struct Elf {
    /// `.note.gnu.build-id`, as hex digits.
    pub build_id: Option<String>,
    /// The definitions found, by name. Several when local functions share a name.
    pub definitions: BTreeMap<String, Vec<Definition>>,
}

/// Looks up `names`.
///
/// # Errors
/// When the bytes are no ELF file for this machine. A name without a definition is no error.
pub fn resolve<'data, R: ReadRef<'data>>(data: R, names: &[&str]) -> Result<Elf, SymbolError> {
    let file = ElfFile64::<Endianness, R>::parse(data)?;
    check_architecture(file.architecture())?;
    let endian = file.endian();
    let mut elf = Elf {
        build_id: build_id(&file),
        ..Elf::default()
    };
    let code = Code::of(&file);
    // Addresses of functions, by name.
    let mut seen: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for (table, symbols) in [
        (Table::Symtab, file.elf_symbol_table()),
        (Table::Dynsym, file.elf_dynamic_symbol_table()),
    ] {
        if symbols.is_empty() || names.is_empty() {
            continue;
        }
        let longest = names.iter().map(|name| name.len()).max().unwrap_or(0);
        let strings = Strings::of(&file, symbols, longest).ok_or(SymbolError::Names)?;
        for symbol in symbols.iter().filter(|of| defines_function(of, endian)) {
            let found = strings.name(symbol.st_name(endian))?;
            let Some(name) = names.iter().find(|name| Some(name.as_bytes()) == found) else {
                continue;
            };
            let address = symbol.st_value(endian);
            let seen = seen.entry(name).or_default();
            if seen.contains(&address) {
                continue;
            }
            if seen.len() == MAX_DEFINITIONS {
                let name = (*name).to_owned();
                return Err(SymbolError::TooMany { name });
            }
            seen.push(address);
            let Some(definition) = code.definition(data, table, address, symbol.st_size(endian))
            else {
                continue;
            };
            let found = elf.definitions.entry((*name).to_owned()).or_default();
            if found
                .iter()
                .all(|known| known.address != definition.address)
            {
                found.push(definition);
            }
        }
    }
    Ok(elf)
}

/// Longest name of a function that is believed to be one, in bytes.
pub const MAX_NAME: usize = 1024;

/// Name of the function that has this offset of the file.
///
/// # Errors
/// When the bytes are no ELF file for this machine. A function without a name is no error.
pub fn function_at<'data, R: ReadRef<'data>>(
    data: R,
    file_offset: u64,
) -> Result<Option<String>, SymbolError> {
    let file = ElfFile64::<Endianness, R>::parse(data)?;
    check_architecture(file.architecture())?;
    let endian = file.endian();
    let Some(address) = Code::of(&file).address(file_offset) else {
        return Ok(None);
    };
    for symbols in [file.elf_symbol_table(), file.elf_dynamic_symbol_table()] {
        let has_it = |symbol: &&Sym64<Endianness>| {
            let start = symbol.st_value(endian);
            // A function that was written in assembler need not tell its size.
            let size = symbol.st_size(endian).max(1);
            defines_function(symbol, endian)
                && address.checked_sub(start).is_some_and(|into| into < size)
        };
        let Some(symbol) = symbols.iter().find(has_it) else {
            continue;
        };
        let strings = Strings::of(&file, symbols, MAX_NAME).ok_or(SymbolError::Names)?;
        if let Some(name) = strings.name(symbol.st_name(endian))? {
            return Ok(Some(String::from_utf8_lossy(name).into_owned()));
        }
    }
    Ok(None)
}

/// What `object` takes for a function that is defined here.
pub fn defines_function(symbol: &Sym64<Endianness>, endian: Endianness) -> bool {
    let section = symbol.st_shndx(endian);
    symbol.st_type() == STT_FUNC
        && section != SHN_UNDEF
        && (section < SHN_LORESERVE || section == SHN_XINDEX)
}

/// Names of symbols, which may overlap: they are read in pieces of the table that contains them.
pub struct Strings<R> {
    data: R,
    start: u64,
    end: u64,
    /// Length of the longest name that matters.
    longest: u64,
}

/// Piece of a table of names, in bytes.
const PIECE: u64 = 1 << 20;

impl<'data, R: ReadRef<'data>> Strings<R> {
    /// Those of a symbol table, in which no name matters that is longer than `longest` bytes.
    pub fn of(
        file: &ElfFile64<'data, Endianness, R>,
        symbols: &SymbolTable<'data, FileHeader64<Endianness>, R>,
        longest: usize,
    ) -> Option<Self> {
        let sections = file.elf_section_table();
        let table = sections.section(symbols.string_section()).ok()?;
        let (start, size) = table.file_range(file.endian())?;
        Some(Self {
            data: file.data(),
            start,
            end: start.checked_add(size)?,
            longest: longest as u64,
        })
    }

    /// A name without its version: `name@@VERSION` in `.symtab` is the same function. `None` when it is
    /// longer than all that matter.
    ///
    /// # Errors
    /// When the table cannot be read, or no more of the file.
    pub fn name(&self, offset: u32) -> Result<Option<&'data [u8]>, SymbolError> {
        let Self {
            data,
            start,
            end,
            longest,
        } = *self;
        let offset = u64::from(offset);
        if offset >= end - start {
            return Ok(None);
        }
        // A name that begins in a piece is all in what is read.
        let piece = start + offset / PIECE * PIECE;
        let size = (PIECE + longest + 1).min(end - piece);
        let bytes = data
            .read_bytes_at(piece, size)
            .map_err(|()| SymbolError::Names)?;
        let rest = &bytes[(offset % PIECE) as usize..];
        let rest = &rest[..rest.len().min(longest as usize + 1)];
        let length = rest.iter().position(|byte| matches!(byte, 0 | b'@'));
        Ok(length.map(|length| &rest[..length]))
    }
}

/// `.note.gnu.build-id`, as hex digits.
fn build_id<'data, R: ReadRef<'data>>(file: &ElfFile64<'data, Endianness, R>) -> Option<String> {
    // Of this, files have a handful, of some hundred bytes each.
    const MAX_NOTES: usize = 64;
    const MAX_SIZE: u64 = 64 << 10;
    let (endian, data) = (file.endian(), file.data());
    let sections = file
        .elf_section_table()
        .iter()
        .filter(|of| of.sh_type(endian) == SHT_NOTE && of.sh_size(endian) <= MAX_SIZE)
        .filter_map(|section| section.notes(endian, data).ok()?);
    let segments = file
        .elf_program_headers()
        .iter()
        .filter(|of| of.p_type(endian) == PT_NOTE && of.p_filesz(endian) <= MAX_SIZE)
        .filter_map(|segment| segment.notes(endian, data).ok()?);
    for mut notes in sections.chain(segments).take(MAX_NOTES) {
        while let Ok(Some(note)) = notes.next() {
            if note.name() == ELF_NOTE_GNU && note.n_type(endian) == NT_GNU_BUILD_ID {
                return Some(hex(note.desc()));
            }
        }
    }
    None
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

/// The executable parts of a file.
struct Code(Vec<Segment>);

struct Segment {
    address: u64,
    file_offset: u64,
    /// In the file, in bytes.
    size: u64,
}

impl Code {
    fn of<'data, R: ReadRef<'data>>(file: &ElfFile64<'data, Endianness, R>) -> Self {
        let endian = file.endian();
        let segments = file
            .elf_program_headers()
            .iter()
            // More than dynamic linkers can count (`e_phnum`).
            .take(usize::from(u16::MAX))
            .filter(|of| of.p_type(endian) == PT_LOAD && of.p_flags(endian) & PF_X != 0);
        let segments = segments.map(|segment| Segment {
            address: segment.p_vaddr(endian),
            file_offset: segment.p_offset(endian),
            size: segment.p_filesz(endian),
        });
        Self(segments.collect())
    }

    /// Virtual address, before relocation, of a byte of the file.
    fn address(&self, file_offset: u64) -> Option<u64> {
        let mut segments = self.0.iter();
        segments.find_map(|segment| {
            let into = file_offset.checked_sub(segment.file_offset)?;
            (into < segment.size).then(|| segment.address.checked_add(into))?
        })
    }

    /// A function that begins at this address, and its instruction to probe.
    fn definition<'data, R: ReadRef<'data>>(
        &self,
        data: R,
        table: Table,
        address: u64,
        size: u64,
    ) -> Option<Definition> {
        /// Bytes of a function that does not tell its size.
        const BEGINNING: u64 = 256;
        let segment = self.0.iter().find(|segment| {
            address >= segment.address && address - segment.address < segment.size
        })?;
        let into = address - segment.address;
        let entry = segment.file_offset.checked_add(into)?;
        let wanted = match size {
            0 => BEGINNING,
            _ => size.min(prologue::MAX_CODE),
        };
        let code = data.read_bytes_at(entry, wanted.min(segment.size - into));
        let Point { offset, step } = prologue::point(code.unwrap_or_default(), size);
        Some(Definition {
            table,
            address: address.checked_add(offset)?,
            file_offset: entry.checked_add(offset)?,
            skipped: offset,
            instruction: step,
        })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use object::{
        BinaryFormat, Endianness, SymbolFlags, SymbolKind, SymbolScope,
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
    fn definitions_of_one_name_without_end_are_refused() {
        let defined = |times: usize| {
            let mut object =
                Object::new(BinaryFormat::Elf, host_architecture(), Endianness::Little);
            let text = object.section_id(StandardSection::Text);
            object.append_section_data(text, &[0xc3; 64], 16);
            for value in 0..times as u64 {
                object.add_symbol(Symbol {
                    name: NAME.into(),
                    value,
                    size: 1,
                    kind: SymbolKind::Text,
                    scope: SymbolScope::Linkage,
                    weak: false,
                    section: SymbolSection::Section(text),
                    flags: SymbolFlags::None,
                });
            }
            resolve(object.write().unwrap().as_slice(), &[NAME])
        };
        assert!(defined(MAX_DEFINITIONS).is_ok());
        let error = defined(MAX_DEFINITIONS + 1).unwrap_err();
        assert!(error.to_string().contains(NAME), "{error}");
    }

    #[test]
    fn names_that_overlap_are_read_once() {
        // Read one by one, these would be several times what is read of a file.
        let mut table = vec![b'a'; 2 * PIECE as usize];
        table.iter_mut().step_by(4000).for_each(|byte| *byte = 0);
        // A name that goes on in the next piece.
        table[PIECE as usize + 3] = 0;
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &table).unwrap();
        let cache = crate::bounded::cache(&file);
        let strings = Strings {
            data: &cache,
            start: 0,
            end: table.len() as u64,
            longest: 10,
        };
        for offset in 0..table.len() {
            let name = strings.name(offset as u32).unwrap();
            let rest = &table[offset..table.len().min(offset + 11)];
            let length = rest.iter().position(|byte| *byte == 0);
            let expected = length.map(|length| &rest[..length]);
            assert_eq!(name, expected, "{offset}");
        }
        assert_eq!(strings.name(table.len() as u32).unwrap(), None);
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
