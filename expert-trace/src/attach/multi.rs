//! Uprobes by links of the kind `uprobe_multi`, which aya 0.14 does not make (0.16 does, and when that can be
//! used this module goes).
//!
//! Perf events are closed one after the other: each waits for grace periods of the kernel under a lock that
//! all share (`perf_uprobe_destroy` in kernel/trace/trace_event_perf.c). These links share no lock while
//! they wait (`bpf_uprobe_unregister` in kernel/trace/bpf_trace.c), so that many are closed in the time of
//! one.
//!
//! A program is loaded for one kind of link. aya makes the maps; from the same object file the programs
//! are relocated to them by aya's own `aya-obj`, and loaded here.

use std::{
    collections::{HashMap, HashSet},
    ffi::CStr,
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
    panic::resume_unwind,
    thread,
};

use aya::{Ebpf, maps::Map};
use aya_obj::{Function, Object, ParseError, btf::BtfError, relocation::EbpfRelocationError};
use nix::errno::Errno;
use thiserror::Error;

use super::leave_signals;
use crate::bpf::{self, Command, PROG_TYPE_KPROBE, ProgLoad};

/// BPF_TRACE_UPROBE_MULTI
const ATTACH_TYPE: u32 = 48;
/// BPF_F_UPROBE_MULTI_RETURN
const ON_RETURN: u32 = 1;

/// What the verifier tells of a program that it refuses: instruction by instruction (BPF_LOG_LEVEL1).
const LOG_LEVEL: u32 = 1;
/// Room for it. The end is what counts, and what kernels with these links keep.
const LOG_BYTES: usize = 64 << 10;

/// How often the kernel may break off, as it does when we are stopped meanwhile.
const ATTEMPTS: u32 = 5;

/// `bpf_attr` for BPF_LINK_CREATE with this attach type.
#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    path: u64,
    offsets: u64,
    reference_counters: u64,
    cookies: u64,
    count: u32,
    multi_flags: u32,
    process: i32,
    _padding: u32,
}

/// Start of `bpf_attr` for BPF_BTF_LOAD.
#[repr(C)]
struct BtfLoad {
    types: u64,
    log: u64,
    size: u32,
    log_size: u32,
}

/// Why programs could not be loaded for such links.
#[derive(Debug, Error)]
pub enum LoadError {
    #[error("cannot read the BPF object")]
    Object(#[from] ParseError),
    #[error("cannot adapt the type information of the BPF object")]
    Types(#[from] BtfError),
    #[error("cannot load the type information of the BPF object")]
    TypesRefused(#[source] io::Error),
    #[error("cannot relocate the BPF programs")]
    Relocation(#[from] EbpfRelocationError),
    #[error("the BPF object has no program {0}")]
    Missing(&'static str),
    #[error("the BPF object has a map {0} of a type that is not expected")]
    NoMap(String),
    /// With the verifier's words.
    #[error("the BPF program {name} was refused. Verifier output: {log}")]
    Refused {
        name: &'static str,
        source: io::Error,
        log: String,
    },
}

/// Whether the kernel has such links (since Linux 6.6), and those of one process mean all of its threads.
///
/// Before Linux 6.10 a process' number was taken for that of a thread. The change that mended it (to
/// `bpf_uprobe_multi_link_attach` in kernel/trace/bpf_trace.c, carried back to stable kernels) also
/// refuses negative numbers, and does so before it looks at the path: others look at that first, and find
/// no regular file.
pub fn is_supported() -> bool {
    let load = ProgLoad {
        expected_attach_type: ATTACH_TYPE,
        ..ProgLoad::nothing()
    };
    // SAFETY: the attributes are complete.
    let Ok(program) = (unsafe { bpf::descriptor(Command::ProgLoad, &load) }) else {
        return false;
    };
    let create = |process| {
        let place = Place {
            path: c"/",
            offset: 0,
            cookie: 0,
            process,
            on_return: false,
        };
        link(program.as_fd(), place)
    };
    matches!(create(0), Err(Errno::EBADF)) && matches!(create(-1), Err(Errno::EINVAL))
}

/// Where a probe is set, and what its hits are told.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The file.
    pub path: &'a CStr,
    /// Offset of the instruction in it.
    pub offset: u64,
    /// What the program gets from `bpf_get_attach_cookie`.
    pub cookie: u64,
    /// The process in whose memory, by its number; 0 for all that map the file.
    pub process: i32,
    /// Whether the function that begins there hits it when it returns.
    pub on_return: bool,
}

/// Makes a link, for which the program must have been loaded. The probe is there until all descriptors of
/// the link are closed; the last one to be closed waits until the program runs nowhere.
///
/// # Errors
/// When the kernel refuses.
fn link(program: BorrowedFd, place: Place) -> Result<OwnedFd, Errno> {
    let Place {
        path,
        offset,
        cookie,
        process,
        on_return,
    } = place;
    let create = LinkCreate {
        program: program.as_raw_fd() as u32,
        attach_type: ATTACH_TYPE,
        path: path.as_ptr() as u64,
        offsets: (&raw const offset) as u64,
        cookies: (&raw const cookie) as u64,
        count: 1,
        multi_flags: if on_return { ON_RETURN } else { 0 },
        process,
        ..LinkCreate::default()
    };
    // SAFETY: there is one offset and one cookie, and the path ends with a zero.
    unsafe { bpf::descriptor(Command::LinkCreate, &create) }
}

/// Programs for such links: those of an object, and of these the ones that are loaded, by their names.
pub struct Programs {
    object: Object,
    /// Types that the programs' functions are described by.
    types: Option<OwnedFd>,
    loaded: HashMap<&'static str, OwnedFd>,
}

impl Programs {
    /// The programs of an object whose maps aya has made.
    ///
    /// # Errors
    /// When the object is not what it should be, or the kernel refuses its types.
    pub fn of(object: &[u8], maps: &Ebpf) -> Result<Self, LoadError> {
        let mut object = Object::parse(object)?;
        let types = match aya::features().btf() {
            Some(features) => object.fixup_and_sanitize_btf(features)?,
            None => None,
        };
        let types = types
            .map(|types| load_types(&types.to_bytes()))
            .transpose()?;
        relocate(&mut object, maps)?;
        Ok(Self {
            object,
            types,
            loaded: HashMap::new(),
        })
    }

    /// Loads programs, unless they are. The kernel verifies them at the same time, on as many CPUs as it
    /// has for that.
    ///
    /// # Errors
    /// When the kernel refuses one, or the object does not have it. The others are loaded all the same.
    pub fn load(&mut self, names: impl IntoIterator<Item = &'static str>) -> Result<(), LoadError> {
        let Self {
            object,
            types,
            loaded,
        } = self;
        let missing = names.into_iter().filter(|name| !loaded.contains_key(name));
        let missing: Vec<&'static str> = missing.collect();
        let (object, types) = (&*object, types.as_ref());
        let results: Vec<_> = thread::scope(|scope| {
            let load = |name| {
                move || {
                    leave_signals();
                    load_program(name, object, types)
                }
            };
            let workers = missing.iter().map(|name| scope.spawn(load(*name)));
            let workers: Vec<_> = workers.collect();
            let joined = workers.into_iter().map(|worker| worker.join());
            joined
                .map(|result| result.unwrap_or_else(|panic| resume_unwind(panic)))
                .collect()
        });
        let mut refusal = Ok(());
        for (name, result) in missing.into_iter().zip(results) {
            match result {
                Ok(program) => {
                    loaded.insert(name, program);
                }
                Err(error) => refusal = refusal.and(Err(error)),
            }
        }
        refusal
    }

    /// Sets a probe, for as long as what it gives is open.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn attach(&self, name: &str, place: Place) -> Result<OwnedFd, Errno> {
        let program = self.loaded.get(name).ok_or(Errno::ENOENT)?;
        link(program.as_fd(), place)
    }
}

/// Puts the maps' descriptors into the programs, and behind each program the functions that it calls.
fn relocate(object: &mut Object, maps: &Ebpf) -> Result<(), LoadError> {
    let sections: HashSet<usize> = object
        .functions
        .keys()
        .map(|(section, _)| *section)
        .collect();
    let described = std::mem::take(&mut object.maps);
    let made = described.iter().map(|(name, described)| {
        let made = maps.map(name).and_then(descriptor);
        let made = made.ok_or_else(|| LoadError::NoMap(name.clone()))?;
        Ok((name.as_str(), made, described))
    });
    let made: Vec<_> = made.collect::<Result<_, LoadError>>()?;
    object.relocate_maps(made.into_iter(), &sections)?;
    object.relocate_calls(&sections)?;
    object.sanitize_functions(aya::features());
    Ok(())
}

/// Of the types that our object has.
fn descriptor(map: &Map) -> Option<RawFd> {
    match map {
        Map::Array(map)
        | Map::PerCpuArray(map)
        | Map::HashMap(map)
        | Map::LruHashMap(map)
        | Map::RingBuf(map) => Some(map.fd().as_fd().as_raw_fd()),
        _ => None,
    }
}

/// Gives the kernel the types that functions are described by: it asks for those of callbacks.
fn load_types(types: &[u8]) -> Result<OwnedFd, LoadError> {
    let load = BtfLoad {
        types: types.as_ptr() as u64,
        log: 0,
        size: types.len() as u32,
        log_size: 0,
    };
    // SAFETY: the types are as long as is said.
    let loaded = unsafe { bpf::descriptor(Command::BtfLoad, &load) };
    loaded.map_err(|error| LoadError::TypesRefused(error.into()))
}

fn load_program(
    name: &'static str,
    object: &Object,
    types: Option<&OwnedFd>,
) -> Result<OwnedFd, LoadError> {
    let program = object.programs.get(name);
    let program = program.ok_or(LoadError::Missing(name))?;
    let Function {
        instructions,
        func_info,
        func_info_rec_size,
        line_info,
        line_info_rec_size,
        ..
    } = &object.functions[&program.function_key()];
    let functions = func_info.func_info_bytes();
    let lines = line_info.line_info_bytes();
    let mut load = ProgLoad {
        kind: PROG_TYPE_KPROBE,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: program.license.as_ptr() as u64,
        name: bpf::name(name),
        expected_attach_type: ATTACH_TYPE,
        ..ProgLoad::default()
    };
    if let Some(types) = types {
        load = ProgLoad {
            types: types.as_raw_fd() as u32,
            func_info_record_size: *func_info_rec_size as u32,
            func_info: functions.as_ptr() as u64,
            func_info_count: func_info.len() as u32,
            line_info_record_size: *line_info_rec_size as u32,
            line_info: lines.as_ptr() as u64,
            line_info_count: line_info.len() as u32,
            ..load
        };
    }
    // SAFETY: instructions and records are as many as is said, and the license ends with a zero; so is
    // the room for the log.
    let once = |load: &ProgLoad| unsafe { bpf::descriptor(Command::ProgLoad, load) };
    let attempt = |load: &ProgLoad| {
        let mut attempts = (0..ATTEMPTS).map(|_| once(load));
        let settled = attempts.find(|loaded| !matches!(loaded, Err(Errno::EAGAIN)));
        settled.unwrap_or(Err(Errno::EAGAIN))
    };
    attempt(&load).or_else(|_| {
        // A log costs time, so that it is asked for when it is needed.
        let mut log = vec![0; LOG_BYTES];
        load.log_level = LOG_LEVEL;
        load.log = log.as_mut_ptr() as u64;
        load.log_size = LOG_BYTES as u32;
        attempt(&load).map_err(|error| LoadError::Refused {
            name,
            source: error.into(),
            log: CStr::from_bytes_until_nul(&log)
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
        })
    })
}
