//! DWARF to the layout of ggml's structs, for libraries that were built with it.
//!
//! Nothing else in a library says where the fields of `ggml_tensor` are. Without DWARF the BPF programs
//! find out by the names of tensors.

use std::{collections::BTreeMap, fmt, sync::Arc};

use expert_trace_common::{
    DeclaredLayout, TENSOR_LAYOUT_BUILDS, TENSOR_LAYOUTS, TENSOR_NB, TENSOR_NE, TensorLayout,
};
use gimli::{
    Abbreviations, AttributeValue, DebugAddrBase, DebugLocListsBase, DebugRngListsBase,
    DebugStrOffsetsBase, DebuggingInformationEntry, Dwarf, DwarfFileType, DwarfSections,
    EndianSlice, NativeEndian, SectionId, Unit, UnitHeader, UnitRef,
};
use object::{CompressionFormat, Object as _, ObjectSection as _, ReadRef};
use serde::Serialize;

use crate::bounded::MAX_READ;

type Slice<'a> = EndianSlice<'a, NativeEndian>;

/// What a library declares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Declared {
    /// One of the layouts that are tried without DWARF, too: its index in [`TENSOR_LAYOUTS`].
    Candidate(usize),
    /// Another one.
    Other(DeclaredLayout),
}

/// How the layout of a library was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FoundBy {
    /// The library has DWARF.
    Dwarf,
    /// A tensor had a name that is there only when the offsets are right.
    Names,
}

/// The layout of a library, as far as it is known; offsets in bytes from the start of the struct.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Layout {
    /// `None` while it is not known.
    pub found_by: Option<FoundBy>,
    /// llama.cpp builds that have it; `None` also when it is none of the candidates.
    pub builds: Option<&'static str>,
    /// `src` in `ggml_tensor`.
    pub src: Option<u32>,
    /// `data` there.
    pub data: Option<u32>,
    /// `ith` in `ggml_compute_params`.
    pub ith: Option<u32>,
}

impl Layout {
    /// The layout of a library that has declared one, or of which tensors have shown a candidate.
    pub fn new(declared: Option<Declared>, shown: Option<usize>) -> Self {
        let (found_by, index, layout) = match (declared, shown) {
            (Some(Declared::Other(layout)), _) => (FoundBy::Dwarf, None, layout),
            (Some(Declared::Candidate(index)), _) => {
                (FoundBy::Dwarf, Some(index), candidate(index))
            }
            (None, Some(index)) => (FoundBy::Names, Some(index), candidate(index)),
            (None, None) => return Self::default(),
        };
        Self {
            found_by: Some(found_by),
            builds: index.map(|index| TENSOR_LAYOUT_BUILDS[index]),
            src: Some(layout.tensor.src),
            data: Some(layout.tensor.data),
            ith: Some(layout.ith),
        }
    }
}

fn candidate(index: usize) -> DeclaredLayout {
    DeclaredLayout {
        tensor: TENSOR_LAYOUTS[index],
        ith: 0,
    }
}

/// Why nothing is declared that could be used.
#[derive(Debug)]
pub enum Undeclared {
    /// There is no DWARF, or none about the function.
    Absent,
    /// It cannot be read.
    Unreadable(String),
    /// It declares structs that the BPF programs could not read.
    Unknown(&'static str),
}

impl fmt::Display for Undeclared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("no DWARF"),
            Self::Unreadable(why) => write!(f, "its DWARF cannot be read: {why}"),
            Self::Unknown(what) => write!(f, "its DWARF declares {what}"),
        }
    }
}

impl From<gimli::Error> for Undeclared {
    fn from(error: gimli::Error) -> Self {
        Self::Unreadable(error.to_string())
    }
}

impl Undeclared {
    fn because(why: &str) -> Self {
        Self::Unreadable(why.to_owned())
    }
}

/// Whether there is still time to read on: an error when not.
type GoOn<'a> = &'a dyn Fn() -> Result<(), Undeclared>;

/// The layouts that functions, by their addresses, were compiled with. Only the compilation unit of each
/// is looked at, so that of two versions of ggml in one file each has its own.
///
/// A file can be made so that its DWARF takes hours to read. Each step here is short, and before each
/// `time_is_up` is asked.
///
/// # Errors
/// Says why there are none.
pub fn declared<'data, R: ReadRef<'data>>(
    data: R,
    functions: &[u64],
    time_is_up: impl Fn() -> bool,
) -> Result<BTreeMap<u64, Result<Declared, Undeclared>>, Undeclared> {
    let go_on = || match time_is_up() {
        true => Err(Undeclared::because("it takes too long")),
        false => Ok(()),
    };
    let file = object::File::parse(data).map_err(|_| Undeclared::Absent)?;
    let sections = sections(&file, &go_on)?;
    let dwarf = sections.borrow(|bytes| EndianSlice::new(bytes, NativeEndian));
    let mut found = BTreeMap::new();
    let mut left = functions.to_vec();
    let mut headers = dwarf.units();
    let mut abbreviations = None;
    while !left.is_empty() {
        go_on()?;
        let Some(header) = headers.next()? else {
            break;
        };
        // Compilers give each unit its own, or one to all units of an object file, in a row.
        let offset = header.debug_abbrev_offset();
        let shared = match abbreviations.take() {
            Some((of, shared)) if of == offset => shared,
            _ => Arc::new(dwarf.debug_abbrev.abbreviations(offset)?),
        };
        abbreviations = Some((offset, Arc::clone(&shared)));
        let unit = unit(&dwarf, header, shared)?;
        let unit = UnitRef::new(&dwarf, &unit);
        let within = within(unit, &left, &go_on)?;
        if within.is_empty() {
            continue;
        }
        let structs = Structs::of(unit, &go_on)?;
        left.retain(|function| !within.contains(function));
        for function in within {
            found.insert(function, structs.layout());
        }
    }
    found.extend(
        left.into_iter()
            .map(|function| (function, Err(Undeclared::Absent))),
    );
    Ok(found)
}

/// What is read of DWARF: neither the code's lines nor the places of variables.
const NEEDED: [SectionId; 8] = [
    SectionId::DebugInfo,
    SectionId::DebugAbbrev,
    SectionId::DebugStr,
    SectionId::DebugLineStr,
    SectionId::DebugStrOffsets,
    SectionId::DebugAddr,
    SectionId::DebugRanges,
    SectionId::DebugRngLists,
];

/// Largest table of abbreviations, in bytes: ten times the largest one that we know. Read, it takes some
/// twenty times as much memory.
const MAX_ABBREVIATIONS: u64 = 8 << 20;

/// The sections needed; empty where they are missing, or compressed, which debug information is in files
/// of its own, that processes do not map.
fn sections<'data, R: ReadRef<'data>>(
    file: &object::File<'data, R>,
    go_on: GoOn<'_>,
) -> Result<DwarfSections<&'data [u8]>, Undeclared> {
    let mut found: [Option<&[u8]>; NEEDED.len()] = [None; NEEDED.len()];
    let mut size = 0_u64;
    for section in file.sections() {
        go_on()?;
        let Ok(name) = section.name_bytes() else {
            continue;
        };
        let Some(index) = NEEDED.iter().position(|id| id.name().as_bytes() == name) else {
            continue;
        };
        if found[index].is_some() {
            continue;
        }
        size = size.saturating_add(section.size());
        if size > MAX_READ {
            return Err(Undeclared::because("there is too much of it"));
        }
        if NEEDED[index] == SectionId::DebugAbbrev && section.size() > MAX_ABBREVIATIONS {
            return Err(Undeclared::because("it has too many abbreviations"));
        }
        let data = section.compressed_data();
        let data = data.map_err(|error| Undeclared::Unreadable(error.to_string()))?;
        let plain = data.format == CompressionFormat::None;
        found[index] = Some(if plain { data.data } else { &[] });
    }
    if found[0].is_none() {
        return Err(Undeclared::Absent);
    }
    DwarfSections::load(|id| {
        let index = NEEDED.iter().position(|needed| *needed == id);
        Ok(index.and_then(|index| found[index]).unwrap_or_default())
    })
}

/// What [`Unit::new_with_abbreviations`] makes, without the table of source files: that can name any
/// number of them, and nobody asks.
fn unit<'a>(
    dwarf: &Dwarf<Slice<'a>>,
    header: UnitHeader<Slice<'a>>,
    abbreviations: Arc<Abbreviations>,
) -> Result<Unit<Slice<'a>>, gimli::Error> {
    let (encoding, main) = (header.encoding(), DwarfFileType::Main);
    let mut str_offsets_base = DebugStrOffsetsBase::default_for_encoding_and_file(encoding, main);
    let mut addr_base = DebugAddrBase(0);
    let mut rnglists_base = DebugRngListsBase::default_for_encoding_and_file(encoding, main);
    let mut low_pc = None;
    let mut entries = header.entries(&abbreviations);
    let root = entries.next_dfs()?.ok_or(gimli::Error::MissingUnitDie)?;
    for attribute in root.attrs() {
        match (attribute.name(), attribute.value()) {
            (gimli::DW_AT_low_pc, value) => low_pc = Some(value),
            (gimli::DW_AT_str_offsets_base, AttributeValue::DebugStrOffsetsBase(base)) => {
                str_offsets_base = base;
            }
            (gimli::DW_AT_addr_base, AttributeValue::DebugAddrBase(base)) => addr_base = base,
            (gimli::DW_AT_rnglists_base, AttributeValue::DebugRngListsBase(base)) => {
                rnglists_base = base;
            }
            _ => {}
        }
    }
    let mut unit = Unit {
        header,
        abbreviations,
        name: None,
        comp_dir: None,
        low_pc: 0,
        str_offsets_base,
        addr_base,
        loclists_base: DebugLocListsBase::default_for_encoding_and_file(encoding, main),
        rnglists_base,
        line_program: None,
        dwo_id: None,
    };
    if let Some(low_pc) = low_pc {
        unit.low_pc = dwarf.attr_address(&unit, low_pc)?.unwrap_or(0);
    }
    Ok(unit)
}

/// Those of `functions` that are in a unit.
fn within(
    unit: UnitRef<'_, Slice<'_>>,
    functions: &[u64],
    go_on: GoOn<'_>,
) -> Result<Vec<u64>, Undeclared> {
    let mut found = Vec::new();
    let mut ranges = unit.unit_ranges()?;
    while found.len() < functions.len() {
        go_on()?;
        let Some(range) = ranges.next()? else {
            break;
        };
        let range = range.begin..range.end;
        let here = functions.iter().filter(|function| range.contains(function));
        for function in here {
            if !found.contains(function) {
                found.push(*function);
            }
        }
    }
    Ok(found)
}

/// Offsets of members, in bytes, as far as there are such structs and members.
#[derive(Debug, Default)]
struct Structs {
    tensor: Option<Tensor>,
    /// `ith` in `ggml_compute_params`.
    ith: Option<u32>,
}

#[derive(Debug, Default)]
struct Tensor {
    kind: Option<u32>,
    ne: Option<u32>,
    nb: Option<u32>,
    src: Option<u32>,
    view_src: Option<u32>,
    data: Option<u32>,
    name: Option<u32>,
}

impl Structs {
    fn of(unit: UnitRef<'_, Slice<'_>>, go_on: GoOn<'_>) -> Result<Self, Undeclared> {
        /// The struct whose members come.
        #[derive(Clone, Copy)]
        enum In {
            Tensor,
            ComputeParams,
            Another,
        }
        let mut structs = Self::default();
        let mut within = In::Another;
        let mut entries = unit.entries();
        // Entry by entry: to the next sibling, or to the next child, can be a long way.
        loop {
            go_on()?;
            let Some(entry) = entries.next_dfs()? else {
                break;
            };
            match entry.depth() {
                // A child of the unit itself.
                1 => {
                    if structs.tensor.is_some() && structs.ith.is_some() {
                        break;
                    }
                    within = In::Another;
                    if entry.tag() == gimli::DW_TAG_structure_type
                        && entry.attr(gimli::DW_AT_declaration).is_none()
                    {
                        match name(unit, entry)? {
                            b"ggml_tensor" => {
                                structs.tensor = Some(Tensor::default());
                                within = In::Tensor;
                            }
                            b"ggml_compute_params" => within = In::ComputeParams,
                            _ => {}
                        }
                    }
                }
                2 => match (within, &mut structs.tensor) {
                    (In::Tensor, Some(tensor)) => {
                        if let Some((name, offset)) = member(unit, entry)? {
                            tensor.add(name, offset);
                        }
                    }
                    (In::ComputeParams, _) => {
                        if let Some((b"ith", offset)) = member(unit, entry)? {
                            structs.ith = Some(offset);
                        }
                    }
                    _ => {}
                },
                _ => {}
            }
        }
        Ok(structs)
    }

    fn layout(&self) -> Result<Declared, Undeclared> {
        let tensor = self.tensor.as_ref().ok_or(Undeclared::Absent)?.layout()?;
        let ith = self.ith.ok_or(Undeclared::Unknown(
            "no ggml_compute_params with a member ith",
        ))?;
        let layout = DeclaredLayout { tensor, ith };
        let known = (0..TENSOR_LAYOUTS.len()).find(|index| candidate(*index) == layout);
        Ok(known.map_or(Declared::Other(layout), Declared::Candidate))
    }
}

impl Tensor {
    fn add(&mut self, name: &[u8], offset: u32) {
        let member = match name {
            b"type" => &mut self.kind,
            b"ne" => &mut self.ne,
            b"nb" => &mut self.nb,
            b"src" => &mut self.src,
            b"view_src" => &mut self.view_src,
            b"data" => &mut self.data,
            b"name" => &mut self.name,
            _ => return,
        };
        *member = Some(offset);
    }

    fn layout(&self) -> Result<TensorLayout, Undeclared> {
        let (Some(src), Some(data)) = (self.src, self.data) else {
            return Err(Undeclared::Unknown("a ggml_tensor without src or data"));
        };
        let as_in_all = self.kind == Some(0)
            && self.ne == Some(TENSOR_NE)
            && self.nb == Some(TENSOR_NB)
            && self.view_src == data.checked_sub(16)
            && self.name == data.checked_add(8);
        if as_in_all {
            Ok(TensorLayout { src, data })
        } else {
            Err(Undeclared::Unknown(
                "a ggml_tensor whose members are in another order than in all known versions",
            ))
        }
    }
}

/// Name and offset of a member; `None` for what is none.
fn member<'a>(
    unit: UnitRef<'_, Slice<'a>>,
    entry: &DebuggingInformationEntry<Slice<'a>>,
) -> Result<Option<(&'a [u8], u32)>, gimli::Error> {
    let offset = entry.attr(gimli::DW_AT_data_member_location);
    let offset = offset.and_then(|offset| offset.udata_value());
    let offset = offset.and_then(|offset| u32::try_from(offset).ok());
    match offset {
        Some(offset) if entry.tag() == gimli::DW_TAG_member => {
            Ok(Some((name(unit, entry)?, offset)))
        }
        _ => Ok(None),
    }
}

/// The name of an entry; empty where it has none.
fn name<'a>(
    unit: UnitRef<'_, Slice<'a>>,
    entry: &DebuggingInformationEntry<Slice<'a>>,
) -> Result<&'a [u8], gimli::Error> {
    match entry.attr_value(gimli::DW_AT_name) {
        None | Some(AttributeValue::Flag(_)) => Ok(&[]),
        Some(value) => Ok(unit.attr_string(value)?.slice()),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use object::{Architecture, BinaryFormat, Endianness, SectionKind, write::Object};

    use super::*;
    use crate::symbols;

    /// `ggml_tensor` as of b11434 (ggml.h).
    const TODAY: Tensor = Tensor {
        kind: Some(0),
        ne: Some(16),
        nb: Some(48),
        src: Some(152),
        view_src: Some(232),
        data: Some(248),
        name: Some(256),
    };

    fn layout(tensor: Tensor, ith: u32) -> Result<Declared, Undeclared> {
        let structs = Structs {
            tensor: Some(tensor),
            ith: Some(ith),
        };
        structs.layout()
    }

    #[test]
    fn a_known_layout_is_a_candidate() {
        assert_eq!(layout(TODAY, 0).unwrap(), Declared::Candidate(0));
        let with_type = layout(TODAY, 4).unwrap();
        assert!(matches!(with_type, Declared::Other(layout) if layout.ith == 4));
    }

    #[test]
    fn members_that_the_probes_do_not_expect_are_refused() {
        for tensor in [
            Tensor {
                ne: Some(24),
                ..TODAY
            },
            Tensor { nb: None, ..TODAY },
            Tensor {
                name: Some(264),
                ..TODAY
            },
            Tensor {
                view_src: None,
                ..TODAY
            },
            Tensor {
                kind: Some(4),
                ..TODAY
            },
            Tensor {
                data: None,
                ..TODAY
            },
        ] {
            let refused = layout(tensor, 0);
            assert!(
                matches!(refused, Err(Undeclared::Unknown(_))),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn every_truncation_is_an_error_or_an_answer() {
        let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        // A function of this very program, by its address in the file.
        let name = "expert_trace_symbols_test_marker";
        let elf = symbols::resolve(bytes.as_slice(), &[name]).unwrap();
        let [ref marker] = elf.definitions[name][..] else {
            panic!("{:?}", elf.definitions);
        };
        let address = marker.address - marker.skipped;
        for length in (0..bytes.len()).step_by(bytes.len() / 100) {
            let _ = declared(&bytes[..length], &[address], || false);
        }
        // Rust's own DWARF knows no ggml.
        let found = declared(bytes.as_slice(), &[address], || false).unwrap();
        assert!(matches!(found[&address], Err(Undeclared::Absent)));
    }

    #[test]
    fn reading_stops_whenever_time_is_up() {
        let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let asked = Cell::new(0);
        let read_until = |last: u64| {
            asked.set(0);
            // In no unit, so that all are looked at.
            declared(bytes.as_slice(), &[u64::MAX], || {
                asked.set(asked.get() + 1);
                asked.get() > last
            })
        };
        assert!(read_until(u64::MAX).is_ok());
        let all = asked.get();
        for last in [0, all / 2, all - 1] {
            let refused = read_until(last);
            assert!(
                matches!(refused, Err(Undeclared::Unreadable(_))),
                "{refused:?}"
            );
            assert_eq!(asked.get(), last + 1);
        }
    }

    #[test]
    fn more_abbreviations_than_compilers_make_are_not_read() {
        let with = |abbreviations: u64| {
            let mut object =
                Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
            for (id, size) in [
                (SectionId::DebugInfo, 0),
                (SectionId::DebugAbbrev, abbreviations),
            ] {
                let name = id.name().as_bytes().to_vec();
                let section = object.add_section(Vec::new(), name, SectionKind::Debug);
                object.append_section_data(section, &vec![0; size as usize], 1);
            }
            declared(object.write().unwrap().as_slice(), &[1], || false)
        };
        assert!(with(MAX_ABBREVIATIONS).is_ok());
        let refused = with(MAX_ABBREVIATIONS + 1);
        assert!(
            matches!(refused, Err(Undeclared::Unreadable(_))),
            "{refused:?}"
        );
    }
}
