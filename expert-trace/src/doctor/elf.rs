//! What of an ELF file decides which libraries come with it, and what can be found in it. No I/O.

use std::{ffi::OsString, os::unix::ffi::OsStringExt as _};

use object::{
    Endianness, ReadRef,
    elf::{
        DF_1_NODEFLIB, DF_1_PIE, DT_FLAGS_1, DT_NEEDED, DT_NULL, DT_RPATH, DT_RUNPATH, DT_SONAME,
        DT_STRSZ, DT_STRTAB, PT_DYNAMIC, PT_INTERP, PT_LOAD,
    },
    read::elf::{Dyn as _, ElfFile64, FileHeader as _, ProgramHeader as _, Sym as _},
};

use crate::{
    eval_callback::CALLBACK_TYPE,
    placement::DEVICES,
    symbols::{self, MAX_NAME, Strings},
};

/// What the dynamic linker goes by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dynamic {
    /// `DT_NEEDED`, in their order.
    pub needed: Vec<OsString>,
    /// Whether there are more of them, or a longer search path, than are read.
    pub has_more: bool,
    /// `DT_SONAME`: its own name.
    pub soname: Option<OsString>,
    /// `DT_RUNPATH`: directories, separated by colons.
    pub runpath: Option<OsString>,
    /// `DT_RPATH`, which a runpath makes void.
    pub rpath: Option<OsString>,
    /// `DF_1_NODEFLIB`: not from the system's directories.
    pub no_default: bool,
    /// `DF_1_PIE`: a program, and no library.
    pub program: bool,
}

/// What a file is like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Anatomy {
    /// None where it has none, as programs that are linked statically to fixed addresses.
    pub dynamic: Option<Dynamic>,
    /// Whether it names a dynamic linker, as programs do.
    pub interpreter: bool,
    /// Whether it has a `.symtab`.
    pub symtab: bool,
    /// Device backends that it defines, by ggml's names for them.
    pub devices: Vec<&'static str>,
    /// Whether it has to do with the scheduler's eval callback: calls or defines
    /// `ggml_backend_sched_set_eval_callback`.
    pub eval_callback: bool,
    /// Symbols of functions that have the type of one, as C++ writes it.
    pub eval_callbacks: Vec<String>,
}

impl Anatomy {
    /// Whether it is a program that no dynamic linker loads libraries for. One that moves itself to
    /// where it is loaded (`-static-pie`) has a dynamic section.
    pub fn is_static(&self) -> bool {
        let moves_itself = |dynamic: &Dynamic| dynamic.program && !self.interpreter;
        self.dynamic.as_ref().is_none_or(moves_itself)
    }
}

/// Longest string of a dynamic section that is read: a search path.
const MAX_STRING: u64 = 64 << 10;
/// Entries of a dynamic section that are read; each of a real one is there for a library, or of some
/// dozens of kinds.
const MAX_ENTRIES: usize = 4096;
/// Bytes of the names of libraries that are read, of one file.
const MAX_NEEDED_BYTES: usize = 64 << 10;

/// Start of the symbols of functions that are in a class, which take an object before, or in a namespace.
const NESTED: &str = "_ZN";
/// … that has no name, which classes are seldom in.
const IN_NO_NAMESPACE: &str = "_ZN12_GLOBAL__N_1";
/// Of more, no program of a kind that we know has use.
const MAX_CALLBACKS: usize = 16;

/// By which a program has itself called with what was computed (ggml-backend.cpp).
const SET_EVAL_CALLBACK: &str = "ggml_backend_sched_set_eval_callback";

/// Looks at a file of this machine's class.
///
/// # Errors
/// When it is none.
pub fn look<'data, R: ReadRef<'data>>(data: R) -> object::Result<Anatomy> {
    let file = ElfFile64::<Endianness, R>::parse(data)?;
    let endian = file.endian();
    let headers = file.elf_header().program_headers(endian, data)?;
    let mut anatomy = Anatomy {
        dynamic: dynamic(data, endian, headers),
        interpreter: headers.iter().any(|of| of.p_type(endian) == PT_INTERP),
        // The first symbol of every table is none.
        symtab: file.elf_symbol_table().iter().nth(1).is_some(),
        ..Anatomy::default()
    };
    for symbols in [file.elf_symbol_table(), file.elf_dynamic_symbol_table()] {
        let Some(strings) = Strings::of(&file, symbols, MAX_NAME) else {
            continue;
        };
        for symbol in symbols.iter() {
            let Ok(name) = strings.name(symbol.st_name(endian)) else {
                break;
            };
            let is = |wanted: &str| name == Some(wanted.as_bytes());
            anatomy.eval_callback |= is(SET_EVAL_CALLBACK);
            if let Some((_, device)) = DEVICES.iter().find(|(function, _)| is(function))
                && symbols::defines_function(symbol, endian)
                && !anatomy.devices.contains(device)
            {
                anatomy.devices.push(device);
            }
            if let Some(name) = name.and_then(|name| str::from_utf8(name).ok())
                && name.ends_with(CALLBACK_TYPE)
                && name.starts_with("_Z")
                && (!name.starts_with(NESTED) || name.starts_with(IN_NO_NAMESPACE))
                && symbols::defines_function(symbol, endian)
                && anatomy.eval_callbacks.len() < MAX_CALLBACKS
                && anatomy.eval_callbacks.iter().all(|known| known != name)
            {
                anatomy.eval_callbacks.push(name.to_owned());
            }
        }
    }
    Ok(anatomy)
}

fn dynamic<'data, R: ReadRef<'data>>(
    data: R,
    endian: Endianness,
    headers: &[object::elf::ProgramHeader64<Endianness>],
) -> Option<Dynamic> {
    let of_kind = |kind| headers.iter().find(|of| of.p_type(endian) == kind);
    let entries = of_kind(PT_DYNAMIC)?.dynamic(endian, data).ok()??;
    let mut has_more = entries.len() > MAX_ENTRIES;
    let entries: Vec<(i64, u64)> = entries
        .iter()
        .take(MAX_ENTRIES)
        .map(|entry| (entry.tag(endian), entry.val(endian)))
        .take_while(|(tag, _)| *tag != DT_NULL)
        .collect();
    let values = |tag| {
        let of_tag = entries.iter().filter(move |(of, _)| *of == tag);
        of_tag.map(|(_, value)| *value)
    };
    let value = |tag| values(tag).next().unwrap_or(0);
    let (strings, size) = (value(DT_STRTAB), value(DT_STRSZ));
    let start = file_offset(endian, headers, strings)?;
    let text = |offset: u64| -> Option<OsString> {
        let from = start.checked_add(offset).filter(|_| offset < size)?;
        let to = from.checked_add(MAX_STRING.min(size - offset))?;
        let bytes = data.read_bytes_at_until(from..to, 0).ok()?;
        Some(OsString::from_vec(bytes.to_vec()))
    };
    has_more &= entries.len() == MAX_ENTRIES;
    let (mut needed, mut bytes) = (Vec::new(), 0);
    for name in values(DT_NEEDED).map(text) {
        bytes += name.as_ref().map_or(0, |name| name.len());
        match name {
            Some(name) if bytes <= MAX_NEEDED_BYTES => needed.push(name),
            _ => {
                has_more = true;
                break;
            }
        }
    }
    let paths = [DT_RUNPATH, DT_RPATH].map(|tag| values(tag).next().map(text));
    has_more |= paths.iter().any(|path| path == &Some(None));
    let [runpath, rpath] = paths.map(Option::flatten);
    Some(Dynamic {
        needed,
        has_more,
        soname: values(DT_SONAME).find_map(text),
        runpath,
        rpath,
        no_default: value(DT_FLAGS_1) & u64::from(DF_1_NODEFLIB) != 0,
        program: value(DT_FLAGS_1) & u64::from(DF_1_PIE) != 0,
    })
}

fn file_offset(
    endian: Endianness,
    headers: &[object::elf::ProgramHeader64<Endianness>],
    address: u64,
) -> Option<u64> {
    let mut loaded = headers.iter().filter(|of| of.p_type(endian) == PT_LOAD);
    loaded.find_map(|of| {
        let into = address.checked_sub(of.p_vaddr(endian))?;
        (into < of.p_filesz(endian)).then(|| of.p_offset(endian).checked_add(into))?
    })
}

/// Whether the kernel has to single-step an instruction, given the bytes that begin with it; `None`
/// where that is not known here.
///
/// On x86_64 it emulates `push` of a register, `nop`, calls and jumps (`arch_uprobe_analyze_insn` in
/// arch/x86/kernel/uprobes.c), and single-steps the rest. On other machines versions differ.
pub fn is_single_stepped(code: &[u8]) -> Option<bool> {
    if !cfg!(target_arch = "x86_64") {
        return None;
    }
    let emulated = match *code {
        [0x50..=0x57 | 0x90 | 0xe8 | 0xe9 | 0xeb | 0x70..=0x7f, ..] => true,
        [0x41, 0x50..=0x57, ..] | [0x66, 0x90, ..] => true,
        [0x0f, 0x1f | 0x80..=0x8f, ..] | [0x66, 0x0f, 0x1f, ..] => true,
        [] => return None,
        _ => false,
    };
    Some(!emulated)
}

#[cfg(test)]
pub(super) mod tests {
    use object::elf::{EM_X86_64, ET_DYN};

    use super::*;

    /// A library that needs these, by offsets into its strings, and has a runpath.
    pub fn library(strings: &[u8], needed: &[u64], runpath: u64) -> Vec<u8> {
        const STRINGS: u64 = 64 + 2 * 56;
        let of_dynamic = STRINGS + strings.len() as u64;
        let mut entries: Vec<(i64, u64)> = vec![
            (DT_STRTAB, STRINGS),
            (DT_STRSZ, strings.len() as u64),
            (DT_RUNPATH, runpath),
        ];
        entries.extend(needed.iter().map(|name| (DT_NEEDED, *name)));
        entries.push((DT_NULL, 0));
        let dynamic: Vec<u8> = entries
            .iter()
            .flat_map(|(tag, value)| [tag.to_le_bytes(), value.to_le_bytes()].concat())
            .collect();
        let total = of_dynamic + dynamic.len() as u64;
        let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        bytes.extend([ET_DYN, EM_X86_64].map(u16::to_le_bytes).as_flattened());
        bytes.extend(1_u32.to_le_bytes());
        bytes.extend([0_u64, 64, 0].map(u64::to_le_bytes).as_flattened());
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend(
            [64_u16, 56, 2, 0, 0, 0]
                .map(u16::to_le_bytes)
                .as_flattened(),
        );
        for (kind, start, size) in [
            (PT_LOAD, 0, total),
            (PT_DYNAMIC, of_dynamic, dynamic.len() as u64),
        ] {
            bytes.extend([kind, 5].map(u32::to_le_bytes).as_flattened());
            let fields = [start, start, start, size, size, 1];
            bytes.extend(fields.map(u64::to_le_bytes).as_flattened());
        }
        bytes.extend(strings);
        bytes.extend(dynamic);
        bytes
    }

    #[test]
    fn more_names_than_are_read_are_told_of() {
        let dynamic = |needed: &[u64], length: usize| {
            let strings = [vec![b'a'; length], vec![0]].concat();
            let bytes = library(&strings, needed, 0);
            look(bytes.as_slice()).unwrap().dynamic.unwrap()
        };
        let few = dynamic(&[0, 2], 3);
        assert_eq!(few.needed, ["aaa", "a"]);
        assert!(!few.has_more);
        for (count, length) in [(MAX_ENTRIES, 1), (100, 4000)] {
            let many = dynamic(&vec![0; count], length);
            assert!(many.has_more && many.needed.len() < count);
            assert!(many.needed.len() * length <= MAX_NEEDED_BYTES);
        }
    }

    fn own() -> Vec<u8> {
        std::fs::read("/proc/self/exe").unwrap()
    }

    #[test]
    fn our_own_program_needs_libc() {
        let anatomy = look(own().as_slice()).unwrap();
        assert!(anatomy.interpreter && anatomy.symtab && !anatomy.eval_callback);
        assert_eq!(anatomy.devices, Vec::<&str>::new());
        let needed = anatomy.dynamic.unwrap().needed;
        assert!(needed.iter().any(|name| name == "libc.so.6"), "{needed:?}");
    }

    #[test]
    fn every_truncation_is_an_error_or_an_answer() {
        let bytes = own();
        for length in (0..4096).chain((4096..bytes.len()).step_by(bytes.len() / 100)) {
            let _ = look(&bytes[..length]);
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn instructions_that_the_kernel_emulates() {
        let cases: [(&[u8], Option<bool>); 8] = [
            (&[0x55, 0x48], Some(false)),
            (&[0x41, 0x57], Some(false)),
            (&[0x0f, 0x1f, 0x44], Some(false)),
            (&[0x48, 0x83, 0xec, 0x08], Some(true)),
            (&[0xf3, 0x0f, 0x1e, 0xfa], Some(true)),
            (&[0x41, 0x89], Some(true)),
            (&[0xe9, 0, 0], Some(false)),
            (&[], None),
        ];
        for (code, expected) in cases {
            assert_eq!(is_single_stepped(code), expected, "{code:02x?}");
        }
    }
}
