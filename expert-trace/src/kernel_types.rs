//! Where the running kernel has the members of its structs, by its type information (BTF); no I/O.
//!
//! The format is that of Documentation/bpf/btf.rst: a header, types one after the other, and names. A kernel
//! has more than a hundred thousand types, so that what is not asked for is passed over.

use thiserror::Error;

/// Why a member was not found.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum KernelTypesError {
    /// The bytes are not what they should be.
    #[error("it is no type information of this machine, or damaged")]
    Damaged,
    /// There is no such struct.
    #[error("it has no struct {0}")]
    NoStruct(String),
    /// The struct has no such member.
    #[error("{of} has no {member}")]
    NoMember {
        /// The struct.
        of: String,
        /// The member.
        member: String,
    },
}

/// BTF_MAGIC, in the byte order of the machine.
const MAGIC: u16 = 0xeb9f;
/// BTF_KIND_STRUCT
const STRUCT: u32 = 4;
/// Of a type, and of a member: `struct btf_type` and `struct btf_member` (include/uapi/linux/btf.h).
const RECORD: usize = 12;

/// Offsets of members of a struct, in bytes.
///
/// # Errors
/// When the bytes are damaged, or something is not there.
pub fn member_offsets<const N: usize>(
    btf: &[u8],
    of: &str,
    members: [&str; N],
) -> Result<[u32; N], KernelTypesError> {
    let Sections { types, names } = Sections::of(btf).ok_or(KernelTypesError::Damaged)?;
    let found = find(types, names, of).ok_or(KernelTypesError::Damaged)?;
    let found = found.ok_or_else(|| KernelTypesError::NoStruct(of.to_owned()))?;
    let mut offsets = [0; N];
    for (member, offset) in members.iter().zip(&mut offsets) {
        let is_it = |record: &&[u8; RECORD]| is_named(names, word(*record, 0), member);
        let record = found.members.iter().find(is_it);
        let record = record.ok_or_else(|| KernelTypesError::NoMember {
            of: of.to_owned(),
            member: (*member).to_owned(),
        })?;
        // With bit fields in the struct, the upper bits are a size.
        let bits = match found.has_bit_fields {
            true => word(record, 8) & 0x00ff_ffff,
            false => word(record, 8),
        };
        *offset = bits / 8;
    }
    Ok(offsets)
}

struct Sections<'a> {
    types: &'a [u8],
    names: &'a [u8],
}

impl<'a> Sections<'a> {
    fn of(btf: &'a [u8]) -> Option<Self> {
        let header: &[u8; 24] = btf.first_chunk()?;
        let [low, high, ..] = *header;
        if u16::from_ne_bytes([low, high]) != MAGIC {
            return None;
        }
        let body = btf.get(word(header, 4) as usize..)?;
        let section = |at| {
            let rest = body.get(word(header, at) as usize..)?;
            rest.get(..word(header, at + 4) as usize)
        };
        Some(Self {
            types: section(8)?,
            names: section(16)?,
        })
    }
}

struct Struct<'a> {
    members: &'a [[u8; RECORD]],
    has_bit_fields: bool,
}

/// The struct of this name, if there is one. `None` when the bytes are damaged.
fn find<'a>(mut types: &'a [u8], names: &[u8], name: &str) -> Option<Option<Struct<'a>>> {
    while !types.is_empty() {
        let (record, rest) = types.split_first_chunk::<RECORD>()?;
        let info = word(record, 4);
        let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        // What follows a type, by its kind, in bytes (BTF_KIND_… in include/uapi/linux/btf.h).
        let size = match kind {
            // Pointers, declarations, typedefs, qualifiers, functions, floats and tags of types.
            2 | 7..=12 | 16 | 18 => 0,
            // Integers, variables and tags of declarations.
            1 | 14 | 17 => 4,
            // Arrays.
            3 => 12,
            // Structs, unions, sections of data and 64-bit enums.
            STRUCT | 5 | 15 | 19 => count * 12,
            // Enums and prototypes.
            6 | 13 => count * 8,
            _ => return None,
        };
        let (about, rest) = rest.split_at_checked(size)?;
        if kind == STRUCT && is_named(names, word(record, 0), name) {
            let (members, _) = about.as_chunks();
            return Some(Some(Struct {
                members,
                has_bit_fields: info >> 31 == 1,
            }));
        }
        types = rest;
    }
    Some(None)
}

fn is_named(names: &[u8], offset: u32, name: &str) -> bool {
    let found = names.get(offset as usize..).unwrap_or_default();
    let rest = found.strip_prefix(name.as_bytes());
    rest.is_some_and(|rest| rest.first() == Some(&0))
}

/// A 32-bit number; the caller knows that it is there.
fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `int`, an array of it, `struct task` (the first of two names that begin alike), and `struct task_struct`
    /// with a bit field.
    fn btf() -> Vec<u8> {
        const NAMES: &[u8] = b"\0int\0task\0task_struct\0state\0tgid\0";
        let at = |name: &str| {
            let terminated = format!("\0{name}\0");
            let found = NAMES
                .windows(terminated.len())
                .position(|window| window == terminated.as_bytes());
            found.unwrap() as u32 + 1
        };
        let mut types: Vec<u32> = Vec::new();
        types.extend([at("int"), 1 << 24, 4, 32]);
        types.extend([0, 3 << 24, 0, 1, 1, 8]);
        types.extend([at("task"), STRUCT << 24 | 1, 4, at("tgid"), 1, 7 * 8]);
        types.extend([at("task_struct"), 1 << 31 | STRUCT << 24 | 2, 16]);
        types.extend([at("state"), 1, 3 << 24 | 5]);
        types.extend([at("tgid"), 1, 1200 * 8]);
        let types: Vec<u8> = types.into_iter().flat_map(u32::to_ne_bytes).collect();
        let mut btf = [&MAGIC.to_ne_bytes()[..], &[1, 0]].concat();
        for word in [24, 0, types.len(), types.len(), NAMES.len()] {
            btf.extend((word as u32).to_ne_bytes());
        }
        [&btf[..], &types, NAMES].concat()
    }

    #[test]
    fn a_member_is_found_in_the_struct_of_that_name() {
        let btf = btf();
        assert_eq!(member_offsets(&btf, "task", ["tgid"]), Ok([7]));
        assert_eq!(member_offsets(&btf, "task_struct", ["tgid"]), Ok([1200]));
        let missing = member_offsets(&btf, "task_struct", ["tgid", "exit_code"]).unwrap_err();
        assert_eq!(missing.to_string(), "task_struct has no exit_code");
        let missing = member_offsets(&btf, "tas", ["tgid"]).unwrap_err();
        assert_eq!(missing.to_string(), "it has no struct tas");
    }

    #[test]
    fn damage_is_an_error_and_no_panic() {
        let btf = btf();
        for length in 0..btf.len() {
            let cut = member_offsets(&btf[..length], "task_struct", ["tgid"]);
            assert_eq!(cut, Err(KernelTypesError::Damaged), "{length}");
        }
        for at in 0..btf.len() {
            for bit in 0..8 {
                let mut damaged = btf.clone();
                damaged[at] ^= 1 << bit;
                let _ = member_offsets(&damaged, "task_struct", ["tgid"]);
            }
        }
    }
}
