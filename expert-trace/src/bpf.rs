//! bpf(2), for what aya does not do.

use std::os::fd::{FromRawFd as _, OwnedFd};

use nix::errno::Errno;

/// A command that gives a descriptor (include/uapi/linux/bpf.h).
#[derive(Clone, Copy, Debug)]
pub enum Command {
    /// BPF_MAP_CREATE
    MapCreate = 0,
    /// BPF_PROG_LOAD
    ProgLoad = 5,
    /// BPF_BTF_LOAD
    BtfLoad = 18,
    /// BPF_LINK_CREATE
    LinkCreate = 28,
}

/// The type of programs that uprobes run (BPF_PROG_TYPE_KPROBE).
pub const PROG_TYPE_KPROBE: u32 = 2;

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
/// `Attributes` is the start of the command's `bpf_attr`, without padding that is not named, and what
/// its addresses point to is as long as it says.
///
/// # Errors
/// The kernel's.
pub unsafe fn descriptor<Attributes>(
    command: Command,
    attributes: &Attributes,
) -> Result<OwnedFd, Errno> {
    // SAFETY: the attributes are as large as is said, and live during the call; the rest is promised.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_long,
            attributes,
            size_of::<Attributes>(),
        )
    };
    let fd = Errno::result(fd)?;
    // SAFETY: the descriptor is new and ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
