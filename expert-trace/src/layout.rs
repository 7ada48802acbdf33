//! DWARF to the layout of ggml's structs, for libraries that were built with it.
//!
//! Nothing else in a library says where the fields of `ggml_tensor` are. Without DWARF the BPF programs
//! find out by the names of tensors.

use std::{borrow::Cow, fmt};

use expert_trace_common::{
    DeclaredLayout, TENSOR_LAYOUT_BUILDS, TENSOR_LAYOUTS, TENSOR_NB, TENSOR_NE, TensorLayout,
};
use gimli::{
    AttributeValue, DebuggingInformationEntry, Dwarf, DwarfSections, EndianSlice, NativeEndian,
    Unit, UnitRef,
};
use object::{CompressionFormat, Object as _, ObjectSection as _, ReadRef};
use serde::Serialize;

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

/// The layouts that the function at `address` was compiled with. Only its own compilation unit is
/// looked at, so that of two versions of ggml in one file each has its own.
///
/// # Errors
/// Says why there are none.
pub fn declared<'data, R: ReadRef<'data>>(data: R, address: u64) -> Result<Declared, Undeclared> {
    let file = object::File::parse(data).map_err(|_| Undeclared::Absent)?;
    if file.section_by_name(".debug_info").is_none() {
        return Err(Undeclared::Absent);
    }
    let sections = DwarfSections::load(|id| section(&file, id.name()))?;
    let dwarf = sections.borrow(|bytes| EndianSlice::new(bytes, NativeEndian));
    let unit = unit_of(&dwarf, address)?.ok_or(Undeclared::Absent)?;
    let structs = Structs::of(UnitRef::new(&dwarf, &unit))?;
    structs.layout()
}

/// Bytes of a section; none where it is missing, or compressed, which debug information is in files of
/// its own, that processes do not map.
fn section<'data, R: ReadRef<'data>>(
    file: &object::File<'data, R>,
    name: &str,
) -> Result<Cow<'data, [u8]>, gimli::Error> {
    let data = file.section_by_name(name).and_then(|section| {
        let data = section.compressed_data().ok()?;
        (data.format == CompressionFormat::None).then_some(data.data)
    });
    Ok(Cow::Borrowed(data.unwrap_or_default()))
}

fn unit_of<'a>(
    dwarf: &Dwarf<Slice<'a>>,
    address: u64,
) -> Result<Option<Unit<Slice<'a>>>, gimli::Error> {
    let mut headers = dwarf.units();
    while let Some(header) = headers.next()? {
        let unit = dwarf.unit(header)?;
        let mut ranges = dwarf.unit_ranges(&unit)?;
        while let Some(range) = ranges.next()? {
            if (range.begin..range.end).contains(&address) {
                return Ok(Some(unit));
            }
        }
    }
    Ok(None)
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
    fn of(unit: UnitRef<'_, Slice<'_>>) -> Result<Self, gimli::Error> {
        let mut structs = Self::default();
        let mut entries = unit.entries();
        // From the unit itself to the first of its children.
        entries.next_dfs()?;
        let mut entry = entries.next_dfs()?;
        while let Some(found) = entry {
            if found.tag() == gimli::DW_TAG_structure_type
                && found.attr(gimli::DW_AT_declaration).is_none()
            {
                match name(unit, found)? {
                    b"ggml_tensor" => structs.tensor = Some(Tensor::of(unit, found)?),
                    b"ggml_compute_params" => {
                        for_each_member(unit, found, |name, offset| {
                            if name == b"ith" {
                                structs.ith = Some(offset);
                            }
                        })?;
                    }
                    _ => {}
                }
            }
            if structs.tensor.is_some() && structs.ith.is_some() {
                break;
            }
            entry = entries.next_sibling()?;
        }
        Ok(structs)
    }

    fn layout(self) -> Result<Declared, Undeclared> {
        let tensor = self.tensor.ok_or(Undeclared::Absent)?.layout()?;
        let ith = self.ith.ok_or(Undeclared::Unknown(
            "no ggml_compute_params with a member ith",
        ))?;
        let layout = DeclaredLayout { tensor, ith };
        let known = (0..TENSOR_LAYOUTS.len()).find(|index| candidate(*index) == layout);
        Ok(known.map_or(Declared::Other(layout), Declared::Candidate))
    }
}

impl Tensor {
    fn of(
        unit: UnitRef<'_, Slice<'_>>,
        entry: &DebuggingInformationEntry<Slice<'_>>,
    ) -> Result<Self, gimli::Error> {
        let mut tensor = Self::default();
        for_each_member(unit, entry, |name, offset| {
            let member = match name {
                b"type" => &mut tensor.kind,
                b"ne" => &mut tensor.ne,
                b"nb" => &mut tensor.nb,
                b"src" => &mut tensor.src,
                b"view_src" => &mut tensor.view_src,
                b"data" => &mut tensor.data,
                b"name" => &mut tensor.name,
                _ => return,
            };
            *member = Some(offset);
        })?;
        Ok(tensor)
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

fn for_each_member(
    unit: UnitRef<'_, Slice<'_>>,
    of: &DebuggingInformationEntry<Slice<'_>>,
    mut take: impl FnMut(&[u8], u32),
) -> Result<(), gimli::Error> {
    let mut tree = unit.entries_tree(Some(of.offset()))?;
    let mut members = tree.root()?.children();
    while let Some(member) = members.next()? {
        let member = member.entry();
        let offset = member.attr(gimli::DW_AT_data_member_location);
        let offset = offset.and_then(|offset| offset.udata_value());
        if member.tag() == gimli::DW_TAG_member
            && let Some(offset) = offset.and_then(|offset| u32::try_from(offset).ok())
        {
            take(name(unit, member)?, offset);
        }
    }
    Ok(())
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
    use super::*;

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
        let address = every_truncation_is_an_error_or_an_answer as *const () as u64;
        for length in (0..bytes.len()).step_by(bytes.len() / 100) {
            let _ = declared(&bytes[..length], address);
        }
        // Rust's own DWARF knows no ggml.
        assert!(matches!(
            declared(bytes.as_slice(), address),
            Err(Undeclared::Absent)
        ));
    }
}
