//! Maps and programs of a BPF object, made and loaded.
//!
//! aya 0.14 would do this, too. But its loader reads all types that the kernel has, which takes longer than
//! everything else and is of no use to programs that follow none of them; it loads uprobes for perf events
//! alone; and one program after the other. So objects are read and relocated by aya's own `aya-obj`, and
//! aya makes and accesses the maps.

use std::{
    collections::{HashMap, HashSet},
    ffi::CStr,
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
    panic::resume_unwind,
    thread,
};

use aya::maps::{MapData, MapError};
use aya_obj::{
    Function, Object, ParseError, ProgramSection, btf::BtfError, relocation::EbpfRelocationError,
};
use nix::{
    errno::Errno,
    sys::signal::{SigSet, SigmaskHow},
};
use thiserror::Error;

use crate::bpf::{self, Command, PROG_TYPE_KPROBE, PROG_TYPE_RAW_TRACEPOINT, ProgLoad};

/// What the verifier tells of a program that it refuses: instruction by instruction (BPF_LOG_LEVEL1).
const LOG_LEVEL: u32 = 1;
/// Room for it: kernels before 6.4 tell nothing when it is not enough.
const LOG_BYTES: usize = 16 << 20;
/// The end of it is what counts.
const LOG_SHOWN: usize = 64 << 10;

/// How often the kernel may break off, as it does when we are stopped meanwhile.
const ATTEMPTS: u32 = 5;

/// Start of `bpf_attr` for BPF_BTF_LOAD.
#[repr(C)]
struct BtfLoad {
    types: u64,
    log: u64,
    size: u32,
    log_size: u32,
}

/// Why maps could not be made, or programs not be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    #[error("cannot read the BPF object")]
    Object(#[from] ParseError),
    #[error("cannot adapt the type information of the BPF object")]
    Types(#[from] BtfError),
    #[error("cannot load the type information of the BPF object")]
    TypesRefused(#[source] io::Error),
    #[error("cannot make a map")]
    Map(#[from] MapError),
    #[error("cannot fill the map {0}")]
    Constants(String, #[source] io::Error),
    #[error("cannot relocate the BPF programs")]
    Relocation(#[from] EbpfRelocationError),
    #[error("the BPF object has no program {0}")]
    Missing(&'static str),
    /// With the verifier's words.
    #[error("the BPF program {name} was refused. Verifier output: {log}")]
    Refused {
        name: &'static str,
        source: io::Error,
        log: String,
    },
}

/// Maps, by their names.
pub type Maps = HashMap<String, MapData>;

/// The programs of an object, and of these the ones that are loaded, by their names.
pub struct Programs {
    object: Object,
    /// Types that the programs' functions are described by.
    types: Option<OwnedFd>,
    /// What uprobes are loaded for: a kind of link (BPF_TRACE_UPROBE_MULTI), or 0 for perf events.
    uprobe_attach_type: u32,
    loaded: HashMap<&'static str, OwnedFd>,
    /// The maps, which the programs have by these numbers.
    _maps: Vec<OwnedFd>,
}

impl Programs {
    /// Reads an object, and makes its maps, some of them with another number of entries.
    ///
    /// # Errors
    /// When the object is not what it should be, or the kernel refuses.
    pub fn of(
        object: &[u8],
        entries: &[(&str, u32)],
        uprobe_attach_type: u32,
    ) -> Result<(Self, Maps), LoadError> {
        let mut object = Object::parse(object)?;
        let types = match aya::features().btf() {
            Some(features) => object.fixup_and_sanitize_btf(features)?,
            None => None,
        };
        let types = types
            .map(|types| load_types(&types.to_bytes()))
            .transpose()?;
        for (name, entries) in entries {
            if let Some(map) = object.maps.get_mut(*name) {
                map.set_max_entries(*entries);
            }
        }
        let maps = make_maps(&object)?;
        let kept = relocate(&mut object, &maps)?;
        let programs = Self {
            object,
            types,
            uprobe_attach_type,
            loaded: HashMap::new(),
            _maps: kept,
        };
        Ok((programs, maps))
    }

    /// Loads programs, unless they are. The kernel verifies them at the same time, on as many CPUs as it
    /// has for that.
    ///
    /// # Errors
    /// When the kernel refuses one, or the object does not have it. The others are loaded all the same.
    pub fn load(&mut self, names: impl IntoIterator<Item = &'static str>) -> Result<(), LoadError> {
        let missing = names
            .into_iter()
            .filter(|name| !self.loaded.contains_key(name));
        let missing: Vec<&'static str> = missing.collect();
        let results = match missing.as_slice() {
            // Without a thread: the first one has glibc take a signal of its own, which a program that
            // we start is to find as it was.
            [name] => vec![without_signals(|| self.load_program(name))],
            _ => self.load_together(&missing),
        };
        let mut refusal = Ok(());
        for (name, result) in missing.into_iter().zip(results) {
            match result {
                Ok(program) => {
                    self.loaded.insert(name, program);
                }
                Err(error) => refusal = refusal.and(Err(error)),
            }
        }
        refusal
    }

    fn load_together(&self, names: &[&'static str]) -> Vec<Result<OwnedFd, LoadError>> {
        thread::scope(|scope| {
            let load = |name| move || without_signals(|| self.load_program(name));
            let workers = names.iter().map(|name| {
                let worker = thread::Builder::new().spawn_scoped(scope, load(*name));
                (*name, worker)
            });
            let workers: Vec<_> = workers.collect();
            let joined = workers.into_iter().map(|(name, worker)| match worker {
                Ok(worker) => worker.join().unwrap_or_else(|panic| resume_unwind(panic)),
                // There can be a limit on threads.
                Err(_) => load(name)(),
            });
            joined.collect()
        })
    }

    /// A program that is loaded.
    pub fn get(&self, name: &str) -> Option<BorrowedFd<'_>> {
        Some(self.loaded.get(name)?.as_fd())
    }

    fn load_program(&self, name: &'static str) -> Result<OwnedFd, LoadError> {
        let program = self.object.programs.get(name);
        let program = program.ok_or(LoadError::Missing(name))?;
        let Function {
            instructions,
            func_info,
            func_info_rec_size,
            line_info,
            line_info_rec_size,
            ..
        } = &self.object.functions[&program.function_key()];
        let functions = func_info.func_info_bytes();
        let lines = line_info.line_info_bytes();
        let (kind, expected_attach_type) = match program.section {
            ProgramSection::RawTracePoint => (PROG_TYPE_RAW_TRACEPOINT, 0),
            _ => (PROG_TYPE_KPROBE, self.uprobe_attach_type),
        };
        let mut load = ProgLoad {
            kind,
            instruction_count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: program.license.as_ptr() as u64,
            name: bpf::name(name),
            expected_attach_type,
            ..ProgLoad::default()
        };
        if let Some(types) = &self.types {
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
        // SAFETY: instructions and records are as many as is said, and the license ends with a zero; so
        // is the room for the log.
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
            attempt(&load).map_err(|error| {
                let log = CStr::from_bytes_until_nul(&log).unwrap_or_default();
                let log = log.to_bytes();
                let shown = &log[log.len().saturating_sub(LOG_SHOWN)..];
                LoadError::Refused {
                    name,
                    source: error.into(),
                    log: String::from_utf8_lossy(shown).into_owned(),
                }
            })
        })
    }
}

/// Does something while the thread takes no signals: when one is to be handled, the kernel breaks the
/// verification of a program off with EAGAIN.
fn without_signals<T>(work: impl FnOnce() -> T) -> T {
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
    let done = work();
    if let Ok(before) = before {
        // It does not fail with a set that was one.
        let _ = before.thread_set_mask();
    }
    done
}

fn make_maps(object: &Object) -> Result<Maps, LoadError> {
    let mut maps = Maps::new();
    for (name, described) in &object.maps {
        let map = MapData::create(described.clone(), name, None)?;
        if !described.data().is_empty() {
            // SAFETY: the compiler's constants are one value, as long as its data.
            let filled = unsafe { bpf::fill_and_freeze(map.fd().as_fd(), described.data()) };
            filled.map_err(|error| LoadError::Constants(name.clone(), error.into()))?;
        }
        maps.insert(name.clone(), map);
    }
    Ok(maps)
}

/// Puts the maps' descriptors into the programs, and behind each program the functions that it calls. Gives
/// those descriptors.
fn relocate(object: &mut Object, maps: &Maps) -> Result<Vec<OwnedFd>, LoadError> {
    let sections: HashSet<usize> = object
        .functions
        .keys()
        .map(|(section, _)| *section)
        .collect();
    let described = std::mem::take(&mut object.maps);
    let mut kept = Vec::new();
    let mut made: Vec<(&str, RawFd, &aya_obj::Map)> = Vec::new();
    for (name, described) in &described {
        let map = maps[name].fd().as_fd().try_clone_to_owned();
        let map = map.map_err(MapError::from)?;
        made.push((name, map.as_raw_fd(), described));
        kept.push(map);
    }
    object.relocate_maps(made.into_iter(), &sections)?;
    object.relocate_calls(&sections)?;
    object.sanitize_functions(aya::features());
    Ok(kept)
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
