//! bpf(2), for what aya does not do, or only together with what takes too long.

use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::{ffi::CStr, fs, io};

use nix::errno::Errno;

/// A command (include/uapi/linux/bpf.h).
#[derive(Clone, Copy, Debug)]
pub enum Command {
    /// BPF_MAP_CREATE
    MapCreate = 0,
    /// BPF_MAP_UPDATE_ELEM
    MapUpdate = 2,
    /// BPF_PROG_LOAD
    ProgLoad = 5,
    /// BPF_RAW_TRACEPOINT_OPEN
    RawTracepointOpen = 17,
    /// BPF_BTF_LOAD
    BtfLoad = 18,
    /// BPF_MAP_FREEZE
    MapFreeze = 22,
    /// BPF_LINK_CREATE
    LinkCreate = 28,
}

/// The type of programs that uprobes run (BPF_PROG_TYPE_KPROBE).
pub const PROG_TYPE_KPROBE: u32 = 2;
/// The type of programs that raw tracepoints run (BPF_PROG_TYPE_RAW_TRACEPOINT).
pub const PROG_TYPE_RAW_TRACEPOINT: u32 = 17;

/// BPF_OBJ_NAME_LEN
const NAME_BYTES: usize = 16;

/// Start of `bpf_attr` for BPF_PROG_LOAD. The kernel takes what is left out as 0, and 0 as not given.
#[repr(C)]
#[derive(Debug, Default)]
pub struct ProgLoad {
    pub kind: u32,
    pub instruction_count: u32,
    pub instructions: u64,
    pub license: u64,
    pub log_level: u32,
    pub log_size: u32,
    pub log: u64,
    pub kernel_version: u32,
    pub flags: u32,
    pub name: [u8; NAME_BYTES],
    pub interface: u32,
    pub expected_attach_type: u32,
    pub types: u32,
    pub func_info_record_size: u32,
    pub func_info: u64,
    pub func_info_count: u32,
    pub line_info_record_size: u32,
    pub line_info: u64,
    pub line_info_count: u32,
    pub attach_btf_id: u32,
}

/// r0 = 0; exit
const NOTHING: [u8; 16] = [0xb7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];

impl ProgLoad {
    /// Those of a program for uprobes that does nothing.
    pub fn nothing() -> Self {
        Self {
            kind: PROG_TYPE_KPROBE,
            instruction_count: 2,
            instructions: NOTHING.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            ..Self::default()
        }
    }
}

/// A name as the kernel keeps it: what fits, and a zero.
pub fn name(name: &str) -> [u8; NAME_BYTES] {
    let mut bytes = [0; NAME_BYTES];
    for (byte, of_name) in bytes[..NAME_BYTES - 1].iter_mut().zip(name.bytes()) {
        *byte = of_name;
    }
    bytes
}

/// Calls bpf(2) for a descriptor, which an exec closes.
///
/// # Safety
/// The command gives one. `Attributes` is the start of the command's `bpf_attr`, without padding that is
/// not named, and what its addresses point to is as long as it says.
///
/// # Errors
/// The kernel's.
pub unsafe fn descriptor<Attributes>(
    command: Command,
    attributes: &Attributes,
) -> Result<OwnedFd, Errno> {
    // SAFETY: promised by our caller.
    let fd = unsafe { call(command, attributes) }?;
    // SAFETY: the descriptor is new and ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Calls bpf(2).
///
/// # Safety
/// As above.
unsafe fn call<Attributes>(command: Command, attributes: &Attributes) -> Result<i32, Errno> {
    // SAFETY: the attributes are as large as is said, and live during the call; the rest is promised.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_long,
            attributes,
            size_of::<Attributes>(),
        )
    };
    Ok(Errno::result(answer)? as i32)
}

/// Fills an array that has one value, and keeps everybody in user space from writing to it: programs are
/// verified with constants that are.
///
/// # Safety
/// The array's values are as long as this one.
///
/// # Errors
/// The kernel's.
pub unsafe fn fill_and_freeze(array: BorrowedFd, value: &[u8]) -> Result<(), Errno> {
    /// Start of `bpf_attr` for commands about elements of maps, and about maps.
    #[repr(C)]
    #[derive(Default)]
    struct Element {
        map: u32,
        _padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let first = 0_u32;
    let map = array.as_raw_fd() as u32;
    let element = Element {
        map,
        key: (&raw const first) as u64,
        value: value.as_ptr() as u64,
        ..Element::default()
    };
    // SAFETY: the key of an array is such a number, and the value is promised to be long enough.
    unsafe { call(Command::MapUpdate, &element) }?;
    // SAFETY: the attributes are a descriptor.
    unsafe { call(Command::MapFreeze, &map) }?;
    Ok(())
}

/// Has a program run at a raw tracepoint, until all descriptors of what it gives are closed.
///
/// # Errors
/// The kernel's.
pub fn attach_to_tracepoint(program: BorrowedFd, tracepoint: &CStr) -> Result<OwnedFd, Errno> {
    /// Start of `bpf_attr` for BPF_RAW_TRACEPOINT_OPEN.
    #[repr(C)]
    struct Open {
        name: u64,
        program: u32,
        _padding: u32,
    }
    let open = Open {
        name: tracepoint.as_ptr() as u64,
        program: program.as_raw_fd() as u32,
        _padding: 0,
    };
    // SAFETY: the name ends with a zero.
    unsafe { descriptor(Command::RawTracepointOpen, &open) }
}

/// The number by which the kernel lists a program, as it shows it of a descriptor.
///
/// # Errors
/// When it does not.
pub fn program_id(program: BorrowedFd) -> io::Result<u32> {
    let shown = fs::read_to_string(format!("/proc/self/fdinfo/{}", program.as_raw_fd()))?;
    let id = shown.lines().find_map(|line| line.strip_prefix("prog_id:"));
    let id = id.and_then(|id| id.trim().parse().ok());
    id.ok_or(io::ErrorKind::InvalidData.into())
}
