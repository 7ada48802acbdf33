//! From a plan to running probes. The only module that names aya.

mod multi;
mod perf_event;
mod programs;

use std::{
    collections::BTreeSet,
    ffi::{CStr, CString, c_void},
    fs::{self, File},
    io,
    num::{NonZeroU32, NonZeroUsize},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        linux::fs::MetadataExt as _,
        unix::{ffi::OsStrExt as _, fs::FileExt as _},
    },
    path::Path,
    ptr::NonNull,
    thread,
};

use aya::{
    Pod,
    maps::{Array, Map, MapData, PerCpuArray, RingBuf},
};
use expert_trace_common::{
    CONTROL_ACTIVE, CONTROL_EXIT_CODE_OFFSET, CONTROL_FIRST_CHILD, CONTROL_FOLLOW,
    CONTROL_LONE_SITE, CONTROL_NAMESPACE, CONTROL_ROUTES, CONTROL_SCHEDULERS, CONTROL_TGID_OFFSET,
    CONTROL_TOKENS, CONTROL_TRACER, CONTROL_WAKE_UP, CONTROL_WEIGHTS, COUNTERS, Counter,
    DeclaredLayout, Follow, LAYOUT_DECLARED, MAX_PROBES, MAX_SOURCES, ProbeCounts, TENSOR_LAYOUTS,
    WakeUp,
};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use thiserror::Error;
use tracing::level_filters::LevelFilter;

pub use self::multi::is_supported as has_uprobe_multi;
use self::programs::Programs;
use crate::{
    bpf::{self, Command, ProgLoad},
    kernel_types,
    layout::Declared,
    probes::{FileId, Hook, Probe},
    requirements::{self, Unmet},
    routes::Routes,
    target::printable,
};

#[repr(align(8))]
struct Aligned<T: ?Sized>(T);

/// The BPF programs for this machine, compiled by `cargo xtask build-ebpf`.
static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("EXPERT_TRACE_BPF_OBJECT")));

/// Why probes could not be set.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The kernel does not take the BPF object.
    #[error("the kernel refused the BPF programs: {0}")]
    Load(String),
    /// The kernel does not take the BPF object, and we know why.
    #[error("{cause}\n  The kernel's answer was: {answer}")]
    Unmet {
        /// Why.
        cause: Unmet,
        /// The kernel's answer.
        answer: String,
    },
    /// The kernel does not take a probe.
    #[error("cannot probe {symbol} at {file}+{offset:#x}: {reason}")]
    Probe {
        /// Function.
        symbol: String,
        /// File.
        file: String,
        /// File offset.
        offset: u64,
        /// The kernel's answer.
        reason: String,
    },
    /// Forks cannot be seen.
    #[error("cannot follow the program that is to be started; start it, and attach to it: {0}")]
    Follow(String),
    /// A map could not be read or written.
    #[error("cannot access a BPF map: {0}")]
    Map(String),
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

fn load_error(error: impl std::error::Error + 'static) -> AttachError {
    let answer = chain(&error);
    match requirements::behind(&error) {
        Some(cause) => AttachError::Unmet { cause, answer },
        None => AttachError::Load(answer),
    }
}

fn map_error(error: impl std::error::Error) -> AttachError {
    AttachError::Map(chain(&error))
}

/// Whose hits are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Those of one process, which must exist when a probe is attached. The kernel sets breakpoints in
    /// its memory alone; when its main thread has ended it sets no more, and
    /// [may take away](Session::outlives_main_thread) those that are there.
    Process(NonZeroU32),
    /// Those of the first process that we fork from now on, and perhaps of all that it forks.
    /// Breakpoints are in all processes that map the file; the BPF programs return at once in others.
    FirstChild {
        /// Whether those that it forks belong to it.
        forks: bool,
    },
}

/// A value of a map, made of integers without padding.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Plain<T>(T);

// SAFETY: three integers of the same size, valid for every pattern of bits.
unsafe impl Pod for Plain<DeclaredLayout> {}
// SAFETY: the same.
unsafe impl Pod for Plain<ProbeCounts> {}

/// Most processes that are followed at once, for which the kernel makes room beforehand.
fn most_followed(scope: Scope) -> u32 {
    /// Most process numbers that the kernel gives on 64-bit machines (PID_MAX_LIMIT in
    /// include/linux/threads.h).
    const LIMIT: u32 = 4 << 20;
    match scope {
        Scope::Process(_) => 1,
        Scope::FirstChild { .. } => {
            let most = fs::read_to_string("/proc/sys/kernel/pid_max").ok();
            let most = most.and_then(|most| most.trim().parse().ok());
            most.unwrap_or(LIMIT).clamp(1, LIMIT)
        }
    }
}

/// What keeps probes in their places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Means {
    /// Links of the kind `uprobe_multi`.
    Multi,
    /// Links of perf events.
    PerfEvents,
}

impl Means {
    /// What programs are loaded for.
    const fn attach_type(self) -> u32 {
        match self {
            Means::Multi => multi::ATTACH_TYPE,
            Means::PerfEvents => 0,
        }
    }
}

/// Where a probe is set, and what its hits are told.
#[derive(Clone, Copy, Debug)]
struct Place<'a> {
    /// The file.
    path: &'a CStr,
    /// Offset of the instruction in it.
    offset: u64,
    /// What the program gets from `bpf_get_attach_cookie`.
    cookie: u64,
    /// The process in whose memory, by its number; 0 for all that map the file.
    process: i32,
    /// Whether the function that begins there hits it when it returns.
    on_return: bool,
}

/// Loaded programs and attached probes. Probes are detached when it is dropped.
pub struct Session {
    programs: Programs,
    means: Means,
    scope: Scope,
    control: Array<MapData, u32>,
    counts: PerCpuArray<MapData, [u64; COUNTERS]>,
    layouts: Array<MapData, u32>,
    declared: Array<MapData, Plain<DeclaredLayout>>,
    hits: PerCpuArray<MapData, Plain<ProbeCounts>>,
    links: Links,
    /// Probes for expert ids that were ever set.
    id_probes: u32,
    /// Keep the tracepoints' programs attached.
    tracepoints: Vec<OwnedFd>,
}

impl Session {
    /// Makes the maps, with a ring buffer of `ring_bytes` (a power of two, at least a page), and loads the
    /// program that every capture needs: a kernel that refuses it is no use. Others are loaded when a
    /// probe needs them. Nothing is counted until [`Session::set_active`].
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn load(ring_bytes: u32, scope: Scope) -> Result<(Self, Events), AttachError> {
        let means = match has_uprobe_multi() {
            true => Means::Multi,
            false => {
                tracing::debug!("no uprobe_multi links: probes are set by perf events");
                Means::PerfEvents
            }
        };
        let entries = [("EVENTS", ring_bytes), ("FOLLOWED", most_followed(scope))];
        let (programs, mut maps) =
            Programs::of(&OBJECT.0, &entries, means.attach_type()).map_err(load_error)?;
        let mut take = |name: &str| {
            maps.remove(name)
                .ok_or_else(|| AttachError::Map(format!("the BPF object has no map {name}")))
        };
        let ring = RingBuf::try_from(Map::RingBuf(take("EVENTS")?)).map_err(map_error)?;
        let control = Array::try_from(Map::Array(take("CONTROL")?)).map_err(map_error)?;
        let counts = PerCpuArray::try_from(Map::PerCpuArray(take("COUNTS")?)).map_err(map_error)?;
        let layouts = Array::try_from(Map::Array(take("LAYOUT")?)).map_err(map_error)?;
        let declared = Array::try_from(Map::Array(take("DECLARED")?)).map_err(map_error)?;
        let hits = PerCpuArray::try_from(Map::PerCpuArray(take("HITS")?)).map_err(map_error)?;
        let mut session = Self {
            programs,
            means,
            scope,
            control,
            counts,
            layouts,
            declared,
            hits,
            links: Links::default(),
            id_probes: 0,
            tracepoints: Vec::new(),
        };
        session.load_programs([Hook::ExpertIds])?;
        match scope {
            Scope::Process(_) => {}
            Scope::FirstChild { forks: false } => session.follow(Follow::FirstChild)?,
            Scope::FirstChild { forks: true } => session.follow(Follow::Forks)?,
        }
        Ok((session, Events(ring)))
    }

    /// Loads the programs that hooks need, at once: the kernel takes milliseconds to verify one, and
    /// [`Session::attach`] would load one after the other.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn load_programs(
        &mut self,
        hooks: impl IntoIterator<Item = Hook>,
    ) -> Result<(), AttachError> {
        let programs: BTreeSet<&str> = hooks.into_iter().map(Hook::program).collect();
        self.programs.load(programs).map_err(load_error)
    }

    fn follow(&mut self, follow: Follow) -> Result<(), AttachError> {
        let failed = |error: &dyn std::error::Error| AttachError::Follow(chain(error));
        let namespace = fs::metadata("/proc/self/ns/pid").map_err(|error| failed(&error))?;
        let [device, inode] = CONTROL_NAMESPACE;
        let [tgid, exit_code] = task_offsets(["tgid", "exit_code"]).map_err(AttachError::Follow)?;
        // The kernel's numbers, as the helper compares them, fit in 32 bits.
        let settings = [
            (CONTROL_TGID_OFFSET, tgid),
            (CONTROL_EXIT_CODE_OFFSET, exit_code),
            (CONTROL_TRACER, std::process::id()),
            (device, namespace.st_dev() as u32),
            (inode, namespace.st_ino() as u32),
            (CONTROL_FOLLOW, follow as u32),
        ];
        for (index, value) in settings {
            self.set(index, value)?;
        }
        let tracepoints = [
            ("new_task", c"task_newtask"),
            ("end_task", c"sched_process_exit"),
        ];
        for (program, tracepoint) in tracepoints {
            self.programs.load([program]).map_err(load_error)?;
            if let Some(program) = self.programs.get(program) {
                let link = bpf::attach_to_tracepoint(program, tracepoint);
                self.tracepoints.push(link.map_err(|error| failed(&error))?);
            }
        }
        Ok(())
    }

    /// The first child, as the initial PID namespace numbers it: 0 before there is one.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn first_child(&self) -> Result<u32, AttachError> {
        self.control.get(&CONTROL_FIRST_CHILD, 0).map_err(map_error)
    }

    /// Starts forwarding what the BPF programs log, where that is to be seen. Needs a tokio runtime.
    pub fn forward_log(&self) {
        if LevelFilter::current() < LevelFilter::DEBUG {
            return;
        }
        let program = self.programs.get(Hook::ExpertIds.program());
        let id = program.and_then(|program| bpf::program_id(program).ok());
        let logger = match aya_log::EbpfLogger::init_from_id(id.unwrap_or_default()) {
            Ok(logger) => logger,
            Err(error) => return tracing::debug!("no log from the BPF programs: {error}"),
        };
        // SAFETY: the logger owns its descriptor for as long as it lives.
        match unsafe { tokio::io::unix::AsyncFd::register(logger) } {
            Ok(mut logger) => {
                tokio::task::spawn(async move {
                    while let Ok(mut ready) = logger.readable_mut().await {
                        ready.get_inner_mut().flush();
                        ready.clear_ready();
                    }
                });
            }
            Err(error) => tracing::debug!("no log from the BPF programs: {error}"),
        }
    }

    /// What keeps the probes in their places, as the document has it.
    pub fn attached_by(&self) -> &'static str {
        match self.means {
            Means::Multi => "uprobe_multi",
            Means::PerfEvents => "perf_event",
        }
    }

    /// Whether the probes of a process are still hit when its main thread has ended.
    ///
    /// Perf events end with it (`perf_event_exit_task` in kernel/events/core.c). For links,
    /// `uprobe_prog_run` (kernel/trace/bpf_trace.c) has compared thread groups since late 2024; before, it
    /// compared memory, of which that thread has none any more. Nothing but the version tells which.
    pub fn outlives_main_thread(&self) -> bool {
        self.means == Means::Multi && requirements::kernel_is_at_least((6, 13))
    }

    /// Attaches a probe.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn attach(&mut self, probe: &Probe) -> Result<(), AttachError> {
        let Probe {
            symbol,
            definition,
            site,
            declared,
            attach_path,
            file,
            ..
        } = probe;
        let refused = |reason| AttachError::Probe {
            symbol: (*symbol).to_owned(),
            file: printable(Path::new(file)),
            offset: definition.file_offset,
            reason,
        };
        if site.probe >= MAX_PROBES || site.source >= MAX_SOURCES {
            return Err(refused("there are too many probes by now".to_owned()));
        }
        self.load_programs([probe.hook])?;
        if let Some(declared) = declared {
            self.declare(site.source, *declared)?;
        }
        let (process, code) = match self.scope {
            Scope::Process(pid) => (Some(pid), None),
            Scope::FirstChild { .. } => {
                // The kernel looks at the instruction when somebody maps it. If nobody did by now, a
                // refusal would come later, and be silent.
                let code = MappedCode::at(attach_path, definition.file_offset)
                    .map_err(|error| refused(error.to_string()))?;
                (None, Some(code))
            }
        };
        if probe.hook == Hook::ExpertIds {
            self.id_probes += 1;
            // Before there is a second one.
            if self.id_probes > 1 {
                self.set(CONTROL_LONE_SITE, 0)?;
            }
        }
        let link = self.link(probe, process).map_err(|error| {
            refused(match requirements::old_kernel() {
                Some(old) => format!("{error}; {old}"),
                None => error,
            })
        })?;
        if code.is_some_and(|code| !code.has_breakpoint()) {
            return Err(refused(OTHER_FILE.to_owned()));
        }
        self.links.0.push((probe.file_id, link));
        if probe.hook == Hook::ExpertIds && self.id_probes == 1 {
            self.set(CONTROL_LONE_SITE, site.lone())?;
        }
        Ok(())
    }

    /// Sets a probe of which the hits do nothing, in the memory of one process, whatever the scope. It is
    /// there until it is dropped.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn attach_empty(&self, probe: &Probe, process: NonZeroU32) -> Result<OwnedFd, AttachError> {
        let load = ProgLoad {
            expected_attach_type: self.means.attach_type(),
            ..ProgLoad::nothing()
        };
        // SAFETY: the attributes are complete.
        let program = unsafe { bpf::descriptor(Command::ProgLoad, &load) };
        let program = program.map_err(|error| AttachError::Load(error.to_string()))?;
        let link = self.link_program(program.as_fd(), probe, Some(process));
        link.map_err(|reason| AttachError::Probe {
            symbol: probe.symbol.to_owned(),
            file: printable(Path::new(&probe.file)),
            offset: probe.definition.file_offset,
            reason,
        })
    }

    /// Gives the kernel's answer when it refuses.
    fn link(&self, probe: &Probe, process: Option<NonZeroU32>) -> Result<OwnedFd, String> {
        let program = self.programs.get(probe.hook.program());
        let program = program.ok_or("its BPF program is not loaded")?;
        self.link_program(program, probe, process)
    }

    fn link_program(
        &self,
        program: BorrowedFd,
        probe: &Probe,
        process: Option<NonZeroU32>,
    ) -> Result<OwnedFd, String> {
        let path = CString::new(probe.attach_path.as_os_str().as_bytes());
        let place = Place {
            path: &path.map_err(|error| error.to_string())?,
            offset: probe.definition.file_offset,
            cookie: probe.site.cookie(),
            process: process.map_or(0, |pid| pid.get() as i32),
            on_return: probe.hook.on_return(),
        };
        let link = match self.means {
            Means::Multi => multi::link(program, place).map_err(io::Error::from),
            Means::PerfEvents => perf_event::link(program, place),
        };
        link.map_err(|error| error.to_string())
    }

    /// Detaches the probes of a file.
    pub fn detach_file(&mut self, file: FileId) {
        let of_file = self.links.0.extract_if(.., |(of, _)| *of == file);
        drop(Links(of_file.collect()));
    }

    fn set(&mut self, index: u32, value: u32) -> Result<(), AttachError> {
        self.control.set(index, value, 0).map_err(map_error)
    }

    /// Switches all probes at once.
    ///
    /// # Errors
    /// When the map cannot be written.
    pub fn set_active(&mut self, active: bool) -> Result<(), AttachError> {
        self.set(CONTROL_ACTIVE, u32::from(active))
    }

    /// Tells the BPF programs whether records are to wake us: if we have taken all, until it is called.
    ///
    /// # Errors
    /// When the map cannot be written.
    pub fn set_wake_up(&mut self, wake_up: WakeUp) -> Result<(), AttachError> {
        self.set(CONTROL_WAKE_UP, wake_up as u32)
    }

    /// Tells the BPF programs which routes to read: none before.
    ///
    /// # Errors
    /// When the map cannot be written.
    pub fn read(&mut self, routes: Routes) -> Result<(), AttachError> {
        let bits = routes.bits();
        self.set(CONTROL_ROUTES, bits)
    }

    /// Has the BPF programs read the token ids of all passes.
    ///
    /// # Errors
    /// When the map cannot be written.
    pub fn read_tokens(&mut self) -> Result<(), AttachError> {
        self.set(CONTROL_TOKENS, 1)
    }

    /// Has the BPF programs read the router's weights beside expert ids, where both are on the host.
    ///
    /// # Errors
    /// When the map cannot be written.
    pub fn read_weights(&mut self) -> Result<(), AttachError> {
        self.set(CONTROL_WEIGHTS, 1)
    }

    /// Tells the BPF programs whether schedulers are probed. Not before they are: a pass that has begun
    /// waits for the scheduler's entry then.
    ///
    /// # Errors
    /// When the map cannot be written.
    pub fn expect_schedulers(&mut self, probed: bool) -> Result<(), AttachError> {
        self.set(CONTROL_SCHEDULERS, u32::from(probed))
    }

    /// The kernel's counters, over all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn counters(&self) -> Result<Counters, AttachError> {
        let mut sums = [0; COUNTERS];
        for cpu in self.counts.get(&0, 0).map_err(map_error)?.iter() {
            for (sum, count) in sums.iter_mut().zip(cpu) {
                *sum += count;
            }
        }
        Ok(Counters(sums))
    }

    /// Tells the BPF programs the layout that a library declares.
    fn declare(&mut self, source: u32, declared: Declared) -> Result<(), AttachError> {
        let number = match declared {
            Declared::Candidate(index) => 1 + index as u32,
            Declared::Other(layout) => {
                let layout = Plain(layout);
                self.declared.set(source, layout, 0).map_err(map_error)?;
                LAYOUT_DECLARED
            }
        };
        self.layouts.set(source, number, 0).map_err(map_error)
    }

    /// Which of [`TENSOR_LAYOUTS`](expert_trace_common::TENSOR_LAYOUTS) a library has, once that is
    /// known; `None` also when it has declared another one.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn candidate_layout(&self, source: u32) -> Result<Option<usize>, AttachError> {
        if source >= MAX_SOURCES {
            // Its probe was refused.
            return Ok(None);
        }
        let number = self.layouts.get(&source, 0).map_err(map_error)?;
        let known = (1..=TENSOR_LAYOUTS.len() as u32).contains(&number);
        Ok(known.then(|| number as usize - 1))
    }

    /// How often a probe was hit while tracing was on.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn hits(&self, probe: &Probe) -> Result<u64, AttachError> {
        Ok(self.probe_counts(probe)?.hits)
    }

    /// What is counted of a probe, over all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn probe_counts(&self, probe: &Probe) -> Result<ProbeCounts, AttachError> {
        let of_cpus = self.hits.get(&probe.site.probe, 0).map_err(map_error)?;
        let mut sums = ProbeCounts::default();
        for Plain(counts) in of_cpus.iter() {
            sums.hits += counts.hits;
            sums.timed += counts.timed;
            sums.timed_ns += counts.timed_ns;
        }
        Ok(sums)
    }

    /// Keeps an empty probe, to be detached with the others at the end.
    pub fn keep(&mut self, empty: OwnedFd) {
        self.links.0.push((FileId::default(), empty));
    }

    /// Detaches all probes. The kernel waits for grace periods.
    pub fn detach(self) {
        drop(self);
    }
}

/// Probes that are set, with the files that they are in.
#[derive(Default)]
struct Links(Vec<(FileId, OwnedFd)>);

impl Drop for Links {
    /// Takes them away at once: with each the kernel waits for grace periods, and those of several can
    /// be the same.
    fn drop(&mut self) {
        /// A capture has some dozens of probes; thousands take turns.
        const THREADS: usize = 64;
        let share = self.0.len().div_ceil(THREADS).max(1);
        thread::scope(|scope| {
            while !self.0.is_empty() {
                let links = self.0.split_off(self.0.len().saturating_sub(share));
                // Without a thread they are dropped with the closure, here.
                let _ = thread::Builder::new().spawn_scoped(scope, || drop(links));
            }
        });
    }
}

/// Why no breakpoint appears where one was set.
const OTHER_FILE: &str =
    "its file system maps another file in its place, which the kernel does not probe";

/// The page of a file that holds an instruction, mapped as code.
struct MappedCode {
    address: NonNull<c_void>,
    /// Of the instruction in what is mapped.
    offset: usize,
    before: [u8; BREAKPOINT],
}

/// Bytes of the instruction that the kernel puts in the place of another (`UPROBE_SWBP_INSN_SIZE`).
pub const BREAKPOINT: usize = if cfg!(target_arch = "x86_64") { 1 } else { 4 };

impl MappedCode {
    fn at(path: &Path, offset: u64) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut before = [0; BREAKPOINT];
        file.read_exact_at(&mut before, offset)?;
        let page = PAGE.get() as u64;
        // SAFETY: a new private mapping, which nobody reads.
        let address = unsafe {
            mmap(
                None,
                PAGE,
                ProtFlags::PROT_READ | ProtFlags::PROT_EXEC,
                MapFlags::MAP_PRIVATE,
                &file,
                (offset / page * page) as libc::off_t,
            )
        }?;
        Ok(Self {
            address,
            offset: (offset % page) as usize,
            before,
        })
    }

    /// Whether there is another instruction now than in the file.
    fn has_breakpoint(&self) -> bool {
        // By a system call: a page that is gone ends no one so.
        let mut now = [0; BREAKPOINT];
        let memory = File::open("/proc/self/mem");
        let at = (self.address.addr().get() + self.offset) as u64;
        memory.is_ok_and(|memory| memory.read_exact_at(&mut now, at).is_ok() && now != self.before)
    }
}

impl Drop for MappedCode {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing points into it.
        let _ = unsafe { munmap(self.address, PAGE.get()) };
    }
}

/// A multiple of every page size that Linux has on our architectures.
const PAGE: NonZeroUsize = NonZeroUsize::new(64 << 10).unwrap();

/// Offsets of members of the running kernel's `task_struct`, in bytes.
fn task_offsets<const N: usize>(names: [&str; N]) -> Result<[u32; N], String> {
    const BTF: &str = "/sys/kernel/btf/vmlinux";
    let btf = fs::read(BTF).map_err(|error| format!("{BTF}: {error}"))?;
    let offsets = kernel_types::member_offsets(&btf, "task_struct", names);
    offsets.map_err(|error| format!("{BTF}: {error}"))
}

/// Sums of the kernel's counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters(pub [u64; COUNTERS]);

impl Counters {
    /// One of them.
    pub fn get(&self, counter: Counter) -> u64 {
        self.0[counter as usize]
    }
}

/// Milliseconds of work, even when every record is written to a log.
const RECORDS_AT_ONCE: usize = 1024;

/// The ring buffer's end that is read. Readable when there are events.
pub struct Events(RingBuf<MapData>);

impl Events {
    /// Calls `take` with the bytes of each record that is there, up to a number that leaves time for
    /// other things. Gives whether that was all.
    pub fn drain(&mut self, mut take: impl FnMut(&[u8])) -> bool {
        for _ in 0..RECORDS_AT_ONCE {
            let Some(record) = self.0.next() else {
                return true;
            };
            take(&record);
        }
        false
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use aya_obj::{Object, ProgramSection};

    use super::*;

    /// `multi` goes by the hook, and aya by the section. `multi` relocates no kernel types.
    #[test]
    fn programs_are_what_links_are_made_for() {
        let object = Object::parse(&OBJECT.0).unwrap();
        for hook in Hook::ALL {
            let section = &object.programs[hook.program()].section;
            let on_return = matches!(section, ProgramSection::URetProbe { .. });
            assert_eq!(on_return, hook.on_return(), "{hook:?}");
        }
        assert!(!object.has_btf_relocations());
    }
}
