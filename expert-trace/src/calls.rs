//! How often a file's code calls one of its own functions. No I/O.
//!
//! A function whose symbol is there need not be entered: compilers copy code into its callers. Where a
//! call stays, its instruction has the distance to the function, or to the stub by which shared
//! libraries call what they export.

use object::{
    Endianness, Object as _, ObjectSymbol as _, ObjectSymbolTable as _, ReadRef, RelocationTarget,
    elf::{PF_X, PT_LOAD},
    read::elf::{ElfFile64, ProgramHeader as _},
};

/// Instructions of x86-64 with a distance of four bytes behind them, from the next instruction on.
const CALL: [u8; 1] = [0xe8];
const CALL_BY_POINTER: [u8; 2] = [0xff, 0x15];
const JUMP_BY_POINTER: [u8; 2] = [0xff, 0x25];
/// Bytes that a stub can have before its jump: none, `bnd`, `endbr64`, both.
const BEFORE_JUMP: [u64; 4] = [0, 1, 4, 5];

/// More executable segments, pointers to a function, or stubs that jump there, linkers do not make: each
/// makes the search longer.
const MAX_PLACES: usize = 8;

/// Calls of the function at `address` (before relocation) in the file's own code, counted up to `most`;
/// `None` where that cannot be told: the file cannot be read, is not for x86-64, or not as linkers make it.
pub fn count<'data, R: ReadRef<'data>>(data: R, address: u64, most: usize) -> Option<usize> {
    let file = ElfFile64::<Endianness, R>::parse(data).ok()?;
    if file.architecture() != object::Architecture::X86_64 {
        return None;
    }
    let endian = file.endian();
    let mut code: Vec<(u64, &[u8])> = Vec::new();
    for segment in file.elf_program_headers() {
        if segment.p_type(endian) == PT_LOAD && segment.p_flags(endian) & PF_X != 0 {
            if code.len() == MAX_PLACES {
                return None;
            }
            code.push((segment.p_vaddr(endian), segment.data(endian, data).ok()?));
        }
    }
    let pointers = pointers_to(&file, address)?;
    let by_pointer = |instruction: &[u8], most: usize| {
        let of_segment = |(start, bytes)| distances(bytes, start, instruction);
        let all = code.iter().copied().flat_map(of_segment);
        let to_it = all.filter(|(_, target)| pointers.contains(target));
        to_it.map(|(at, _)| at).take(most).collect::<Vec<u64>>()
    };
    let (mut functions, mut calls) = (vec![address], 0);
    if !pointers.is_empty() {
        calls = by_pointer(&CALL_BY_POINTER, most).len();
        let jumps = by_pointer(&JUMP_BY_POINTER, MAX_PLACES + 1);
        if jumps.len() > MAX_PLACES {
            return None;
        }
        for jump in jumps {
            functions.extend(BEFORE_JUMP.map(|before| jump.wrapping_sub(before)));
        }
    }
    let of_segment = |(start, bytes)| distances(bytes, start, &CALL);
    let all = code.into_iter().flat_map(of_segment);
    let to_it = all.filter(|(_, to)| functions.contains(to));
    Some(calls + to_it.take(most.saturating_sub(calls)).count())
}

/// Where the dynamic linker writes the function's address; `None` if in too many places.
fn pointers_to<'data, R: ReadRef<'data>>(
    file: &ElfFile64<'data, Endianness, R>,
    address: u64,
) -> Option<Vec<u64>> {
    let symbols = file.dynamic_symbol_table();
    let is_it = |target: RelocationTarget| {
        let RelocationTarget::Symbol(index) = target else {
            return false;
        };
        let symbols = symbols.as_ref();
        let symbol = symbols.and_then(|symbols| symbols.symbol_by_index(index).ok());
        symbol.is_some_and(|symbol| symbol.is_definition() && symbol.address() == address)
    };
    let relocations = file.dynamic_relocations().into_iter().flatten();
    let to_it = relocations.filter(|(_, relocation)| is_it(relocation.target()));
    let pointers: Vec<u64> = to_it.map(|(at, _)| at).take(MAX_PLACES + 1).collect();
    (pointers.len() <= MAX_PLACES).then_some(pointers)
}

/// Where bytes look like an instruction, and what its distance leads to. Few of them are one: what leads
/// to a given address by chance is one in four thousand million.
fn distances<'code>(
    code: &'code [u8],
    start: u64,
    instruction: &'code [u8],
) -> impl Iterator<Item = (u64, u64)> + 'code {
    let length = instruction.len();
    let windows = code.windows(length + 4).zip(start..);
    windows.filter_map(move |(bytes, at)| {
        let (head, distance) = bytes.split_at(length);
        let distance = i32::from_le_bytes(distance.try_into().ok()?);
        let next = at + length as u64 + 4;
        (head == instruction).then(|| (at, next.wrapping_add_signed(distance.into())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_begin_behind_the_instruction() {
        let code = [0x90, 0xe8, 0xfb, 0xff, 0xff, 0xff, 0xe8, 2, 0, 0, 0, 0xe8];
        let found: Vec<_> = distances(&code, 0x1000, &CALL).collect();
        assert_eq!(found, [(0x1001, 0x1001), (0x1006, 0x100d)]);
        let code = [0xff, 0x25, 4, 0, 0, 0];
        let found: Vec<_> = distances(&code, 0, &JUMP_BY_POINTER).collect();
        assert_eq!(found, [(0, 10)]);
    }

    #[inline(never)]
    extern "C" fn called_twice(number: u64) -> u64 {
        std::hint::black_box(number)
    }

    #[inline(never)]
    extern "C" fn never_called(number: u64) -> u64 {
        std::hint::black_box(number) + 1
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn calls_in_our_own_program() {
        let own = std::fs::read("/proc/self/exe").unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let base = u64::from_str_radix(maps.split('-').next().unwrap(), 16).unwrap();
        let calls = |function: extern "C" fn(u64) -> u64| {
            count(own.as_slice(), function as usize as u64 - base, 9)
        };
        assert_eq!(called_twice(1) + called_twice(2), 3);
        assert_eq!(calls(called_twice), Some(2));
        assert_eq!(calls(never_called), Some(0));
    }

    #[test]
    fn what_is_no_program_has_no_answer() {
        assert_eq!(count(&b"\x7fELF"[..], 0, 1), None);
    }
}
