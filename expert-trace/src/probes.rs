//! Which functions answer for the routing of a process, and where they are in the files it maps.

mod hook;
mod needs;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{File, Metadata},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use expert_trace_common::{Route, Site};
use serde::Serialize;

pub use self::hook::Hook;
use self::needs::{Needs, Traits};
use crate::{
    bounded::{self, Bounded},
    calls,
    layout::{self, Declared},
    placement::{Backends, DEVICES, Options},
    routes::Routes,
    same_file::FirstPage,
    symbols::{self, Definition, SymbolError},
    target::{self, MappedFile, open_regular, printable},
};

/// One probe to attach, at a file offset.
#[derive(Clone, Debug, Serialize)]
pub struct Probe {
    /// What it is for.
    pub hook: Hook,
    /// Symbol it was found by.
    pub symbol: &'static str,
    /// File it is in, as the target sees it.
    pub file: String,
    /// The file's build id, in hex.
    pub build_id: Option<String>,
    /// Where in the file.
    #[serde(flatten)]
    pub definition: Definition,
    /// What the BPF programs call it by.
    #[serde(skip)]
    pub site: Site,
    /// The layout that its library declares, for expert ids.
    #[serde(skip)]
    pub declared: Option<Declared>,
    /// The file itself.
    #[serde(skip)]
    pub file_id: FileId,
    /// Path by which we reach the file.
    #[serde(skip)]
    pub attach_path: PathBuf,
}

/// The probes of a capture. It grows as processes map more files.
#[derive(Debug, Default)]
pub struct Plan {
    /// The probes, in the order they are to be attached.
    pub probes: Vec<Probe>,
    looked_at: HashMap<Inode, LookedAt>,
    /// Files that have functions to probe, or had.
    files: Vec<Probed>,
    sources: u32,
    /// Probes that were ever planned.
    numbered: u32,
    /// Something else than a probe tells when libraries are loaded.
    gated: bool,
    /// Ways to read routing. Hooks of others alone are left out.
    routes: Routes,
    /// Probes that show nothing by what is mapped now.
    waiting: Vec<Probe>,
    /// Their files, of processes that wait at the gate: what was opened there is closed when they go on.
    held: HashMap<FileId, File>,
    /// What processes need, by what they map.
    needs: Needs<Inode>,
}

/// How many probes there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Load {
    /// All.
    pub probes: usize,
    /// Places in code that they sit on: those on the entry and on the return of a function share one.
    pub places: usize,
    /// Longest time that a capture takes to end where perf events carry the probes, in milliseconds. The
    /// kernel waits for a grace period with each of them, one after the other.
    pub perf_event_detach_ms: u64,
}

impl Load {
    /// That of these probes.
    pub fn of(probes: &[Probe]) -> Self {
        const MS: u64 = 100;
        const MS_EACH: u64 = 90;
        let place = |probe: &Probe| (probe.file_id.0, probe.definition.file_offset);
        let places: BTreeSet<(usize, u64)> = probes.iter().map(place).collect();
        Self {
            probes: probes.len(),
            places: places.len(),
            perf_event_detach_ms: MS + MS_EACH * probes.len() as u64,
        }
    }
}

/// Who maps a file.
#[derive(Clone, Copy)]
pub struct Mapper<'a> {
    /// Process; none when it is not known.
    pub process: Option<u32>,
    /// Gives the options that it computes with; none when they are not known.
    pub options: &'a dyn Fn() -> Option<Options>,
}

impl Mapper<'_> {
    /// Nobody in particular.
    pub const UNKNOWN: Mapper<'static> = Mapper {
        process: None,
        options: &|| None,
    };
}

/// Options of a process, by what it was started with.
pub fn options_of(pid: u32) -> Option<Options> {
    let command = target::command_line(pid).ok()?;
    let environment = target::environment(pid);
    let options = Options::parse(&command, |name| environment.get(name));
    let root = target::root(pid);
    Some(options.beside(target::has_config_file(&root, |name| environment.get(name))))
}

/// A file in which probes are, by its number among those.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FileId(usize);

/// Device and inode: a file's name, if not its identity (see [`crate::same_file`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Inode {
    device: u64,
    number: u64,
}

impl Inode {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            number: metadata.ino(),
        }
    }
}

/// What was behind a device and inode when they were looked at.
#[derive(Debug)]
struct LookedAt {
    written: Written,
    /// Where there were functions to probe.
    file: Option<FileId>,
    traits: Traits,
}

/// A file in which probes are set.
#[derive(Debug)]
struct Probed {
    /// What it was first found by.
    inode: Inode,
    page: Option<FirstPage>,
    places: Vec<Place>,
}

impl Probed {
    fn is(&self, inode: Inode, page: Option<&FirstPage>) -> bool {
        let pages = self.page.as_ref().zip(page);
        pages
            .and_then(|(one, other)| one.is(other))
            .unwrap_or(self.inode == inode)
    }
}

/// When a file was last written, and how long it was: while this is the same, so are its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Written {
    seconds: i64,
    nanoseconds: i64,
    size: u64,
}

impl Written {
    fn of(metadata: &Metadata) -> Self {
        Self {
            seconds: metadata.mtime(),
            nanoseconds: metadata.mtime_nsec(),
            size: metadata.size(),
        }
    }
}

/// Where a probe is, with the code that it sits on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    hook: Hook,
    file_offset: u64,
    code: Vec<u8>,
}

/// Longest instruction of our architectures, in bytes.
const LONGEST_INSTRUCTION: usize = 16;

/// What a look at a file changes.
#[derive(Debug, Default)]
pub struct Change {
    /// A file that has been written anew, so that the probes in it sit on other code than before.
    pub stale: Option<FileId>,
    /// Probes to attach: of this file, and of others that show something with it.
    pub probes: Vec<Probe>,
    /// Why a file is passed over that has functions to probe.
    pub refusal: Option<String>,
    /// The file, if it brings probes.
    pub brings: Option<String>,
}

/// What was found at a look at a file.
struct Look {
    shown: String,
    stale: Option<FileId>,
    refusal: Option<String>,
    /// Whose probes were added to those that wait.
    added: Option<(FileId, File)>,
}

impl Plan {
    /// A plan for processes that wait at the [`crate::gate`] with each file they map.
    pub fn gated() -> Self {
        Self {
            gated: true,
            ..Self::default()
        }
    }

    /// The same plan, for these ways to read routing.
    pub fn with_routes(self, routes: Routes) -> Self {
        Self { routes, ..self }
    }

    /// The ways to read routing.
    pub fn routes(&self) -> Routes {
        self.routes
    }

    /// Whether router logits are read.
    pub fn reads_logits(&self) -> bool {
        self.routes.has(Route::Logits)
    }

    /// Whether there is a function that shows expert ids.
    pub fn can_see_experts(&self) -> bool {
        self.has(Hook::ExpertIds)
    }

    /// Whether there is a probe for this.
    pub fn has(&self, hook: Hook) -> bool {
        self.of(hook).next().is_some()
    }

    /// The probes for this.
    pub fn of(&self, hook: Hook) -> impl Iterator<Item = &Probe> {
        self.probes.iter().filter(move |probe| probe.hook == hook)
    }

    /// The probes for this, and those that would be set if the program had a use for them.
    pub fn found(&self, hook: Hook) -> impl Iterator<Item = &Probe> {
        let probes = self.probes.iter().chain(&self.waiting);
        probes.filter(move |probe| probe.hook == hook)
    }

    /// Whether passes begin in schedulers, too.
    pub fn probes_schedulers(&self) -> bool {
        self.has(Hook::PassBegin)
    }

    /// A process becomes another program.
    pub fn forget(&mut self, process: u32) {
        self.needs.forget(process);
    }

    /// A probe in llama.cpp, if there is one.
    pub fn of_llama_cpp(&self) -> Option<&Probe> {
        let mut probes = self.probes.iter().chain(&self.waiting);
        probes.find(|probe| probe.hook != Hook::Libraries)
    }

    /// Adds the probes of files that a process maps and that were not looked at before, and returns what is
    /// to be done.
    ///
    /// A file that cannot be read as ELF is passed over with a message: a process maps many files
    /// that are none of our business.
    pub fn extend(&mut self, pid: u32, files: &[MappedFile]) -> Vec<Change> {
        let mapper = Mapper {
            process: Some(pid),
            options: &|| options_of(pid),
        };
        let mut looks = Vec::new();
        for file in files.iter().filter(|file| file.is_executable()) {
            let attach_path = file.reachable_path(pid);
            match open_regular(&attach_path)
                .and_then(|open| self.look_at(&open, &file.path, &attach_path, mapper))
            {
                Ok(look) => looks.push(look),
                Err(error) => tracing::debug!("{}: {error}", printable(&file.path)),
            }
        }
        self.changes(looks)
    }

    /// Adds the probes of a file that somebody maps, unless it has been looked at before and is the same,
    /// and returns what is to be done.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn add_file(
        &mut self,
        file: &File,
        shown: &Path,
        attach_path: &Path,
        mapper: Mapper<'_>,
    ) -> io::Result<Change> {
        let look = self.look_at(file, shown, attach_path, mapper)?;
        let change = self.changes(vec![look]).pop();
        Ok(change.unwrap_or_default())
    }

    /// What is to be done after looks at files, one for each. Probes of files that were known before come
    /// with the last one.
    fn changes(&mut self, mut looks: Vec<Look>) -> Vec<Change> {
        // Those that are not waited for any more have been attached since.
        let waits = |id: &FileId, waiting: &[Probe]| waiting.iter().any(|of| of.file_id == *id);
        self.held.retain(|id, _| waits(id, &self.waiting));
        let mut ready = self.take_ready();
        for look in &mut looks {
            if self.held.len() >= MAX_HELD
                && let Some((id, _)) = &look.added
                && waits(id, &self.waiting)
            {
                self.waiting.retain(|probe| probe.file_id != *id);
                let shown = &look.shown;
                look.refusal.get_or_insert(format!(
                    "{shown} is not traced: {MAX_HELD} files wait for a device by now"
                ));
            }
        }
        let last = looks.len().saturating_sub(1);
        let mut added = Vec::new();
        for look in &mut looks {
            let its = look.added.take();
            added.push(its.as_ref().map(|(id, _)| *id));
            if let Some((id, file)) = its.filter(|(id, _)| self.gated && waits(id, &self.waiting)) {
                let path = own_path(&file);
                for probe in self.waiting.iter_mut().filter(|of| of.file_id == id) {
                    probe.attach_path.clone_from(&path);
                }
                self.held.insert(id, file);
            }
        }
        let changes = looks.into_iter().zip(added).enumerate();
        let changes = changes.map(|(index, (look, added))| {
            let is_its = |probe: &mut Probe| index == last || Some(probe.file_id) == added;
            let probes: Vec<Probe> = ready.extract_if(.., is_its).collect();
            Change {
                stale: look.stale,
                refusal: look.refusal,
                brings: (!probes.is_empty()).then_some(look.shown),
                probes,
            }
        });
        changes.collect()
    }

    fn look_at(
        &mut self,
        file: &File,
        shown: &Path,
        attach_path: &Path,
        mapper: Mapper<'_>,
    ) -> io::Result<Look> {
        let mut look = Look {
            shown: shown.to_string_lossy().into_owned(),
            stale: None,
            refusal: None,
            added: None,
        };
        let metadata = file.metadata()?;
        let inode = Inode::of(&metadata);
        let written = Written::of(&metadata);
        let known = self.looked_at.get(&inode);
        let mut page = None;
        // Where it had functions, what is behind the name now need not be what was.
        let before = known.and_then(|known| known.file).filter(|file_id| {
            page = FirstPage::of(file).ok();
            self.files[file_id.0].is(inode, page.as_ref())
        });
        if let Some(known) = known
            && known.written == written
            && known.file == before
        {
            let traits = known.traits;
            self.note(mapper, inode, traits);
            return Ok(look);
        }
        let elf = look_up(file).unwrap_or_else(|error| {
            let shown = printable(shown);
            match error {
                SymbolError::TooMany { .. } => {
                    look.refusal = Some(format!("{shown} is not traced: {error}"));
                }
                _ => tracing::debug!("{shown}: {error}"),
            }
            symbols::Elf::default()
        });
        let traits = traits(file, shown, &elf);
        self.note(mapper, inode, traits);
        let places = self.places(file, &elf);
        if page.is_none() && !places.is_empty() {
            page = FirstPage::of(file).ok();
        }
        let known = before.or_else(|| {
            let mut files = self.files.iter();
            let index = files.position(|probed| probed.is(inode, page.as_ref()));
            index.map(FileId)
        });
        let looked_at = |file| LookedAt {
            written,
            file,
            traits,
        };
        let id = match known {
            Some(id) => {
                let old = std::mem::replace(&mut self.files[id.0].places, places);
                let same = old == self.files[id.0].places;
                self.looked_at.insert(inode, looked_at(Some(id)));
                // It has another name, its time was changed, or the same was written again.
                if same {
                    return Ok(look);
                }
                look.stale = (!old.is_empty()).then_some(id);
                id
            }
            None => {
                let file = (!places.is_empty()).then_some(FileId(self.files.len()));
                self.looked_at.insert(inode, looked_at(file));
                let Some(id) = file else {
                    return Ok(look);
                };
                self.files.push(Probed {
                    inode,
                    page,
                    places,
                });
                id
            }
        };
        // Those that wait sit where the functions were.
        self.waiting.retain(|probe| probe.file_id != id);
        self.add(file, elf, id, shown, attach_path);
        look.added = Some((id, file.try_clone()?));
        Ok(look)
    }

    fn note(&mut self, mapper: Mapper<'_>, inode: Inode, traits: Traits) {
        let may_use_rpc = || (mapper.options)().is_none_or(|options| options.may_use_rpc());
        self.needs.map(mapper.process, inode, traits, may_use_rpc);
    }

    fn places(&self, file: &File, elf: &symbols::Elf) -> Vec<Place> {
        let mut places = Vec::new();
        for hook in self.hooks() {
            let symbols = hook.symbols().iter();
            let definitions = symbols.filter_map(|symbol| elf.definitions.get(*symbol));
            for definition in definitions.flatten() {
                let mut code = vec![0; LONGEST_INSTRUCTION];
                let read = file.read_at(&mut code, definition.file_offset).unwrap_or(0);
                code.truncate(read);
                places.push(Place {
                    hook,
                    file_offset: definition.file_offset,
                    code,
                });
            }
        }
        places
    }

    fn hooks(&self) -> impl Iterator<Item = Hook> + use<> {
        let Self { gated, routes, .. } = *self;
        let serves = move |hook: &Hook| {
            let of = hook.routes();
            of.is_empty() || of.iter().any(|route| routes.has(*route))
        };
        let hooks = Hook::ALL.into_iter().filter(serves);
        hooks.filter(move |hook| *hook != Hook::Libraries || !gated)
    }

    fn add(
        &mut self,
        file: &File,
        elf: symbols::Elf,
        id: FileId,
        shown: &Path,
        attach_path: &Path,
    ) {
        // A file without a library's function for expert ids can be part of the next one.
        let library = self.sources;
        let mut declared = declared_layouts(file, shown, &elf);
        for hook in self.hooks() {
            for symbol in hook.symbols() {
                for definition in elf.definitions.get(*symbol).into_iter().flatten() {
                    let shows_ids = hook == Hook::ExpertIds;
                    self.waiting.push(Probe {
                        hook,
                        symbol,
                        file: shown.to_string_lossy().into_owned(),
                        build_id: elf.build_id.clone(),
                        definition: definition.clone(),
                        site: Site {
                            source: if shows_ids { self.sources } else { library },
                            probe: self.numbered,
                        },
                        declared: shows_ids
                            .then(|| declared.remove(&entry(definition)))
                            .flatten(),
                        file_id: id,
                        attach_path: attach_path.to_owned(),
                    });
                    self.numbered += 1;
                    self.sources += u32::from(shows_ids);
                }
            }
        }
    }

    /// Moves those that wait and have a use to those that are to be attached, and gives them.
    fn take_ready(&mut self) -> Vec<Probe> {
        self.needs.settle();
        let mut waiting = std::mem::take(&mut self.waiting);
        let first = self.probes.len();
        for takes_another in [false, true] {
            let is_ready = |probe: &mut Probe| match probe.hook.needs() {
                None => !takes_another && self.has_use(probe),
                Some(other) => takes_another && self.has_use(probe) && self.has(other),
            };
            let ready: Vec<Probe> = waiting.extract_if(.., is_ready).collect();
            self.probes.extend(ready);
        }
        self.waiting = waiting;
        self.probes[first..].to_vec()
    }

    /// Whether a probe can show something, or was asked for.
    fn has_use(&self, probe: &Probe) -> bool {
        let Probe { hook, symbol, .. } = probe;
        let routes = match hook {
            // Without it, more is read than there is.
            Hook::EvalCallback => &[Route::Callback],
            hook => hook.routes(),
        };
        let mut routes = routes.iter();
        let is_api = *symbol == hook.symbols()[0];
        self.needs.has(*hook, is_api) || routes.any(|route| self.routes.has_named(*route))
    }
}

/// Path by which the kernel finds a file, for as long as it is open.
fn own_path(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// What of a file decides which probes are needed.
fn traits(file: &File, shown: &Path, elf: &symbols::Elf) -> Traits {
    // llama_context::encode and llama_context::decode. With fewer calls, one of them has it inlined.
    const CALLERS: usize = 2;
    let of = |hook: Hook| {
        let symbols = hook.symbols().iter();
        symbols.filter_map(|symbol| elf.definitions.get(*symbol))
    };
    let is_called = |definition: &Definition| {
        let cache = bounded::cache(file);
        let calls = calls::count(Bounded(&cache), entry(definition), CALLERS);
        calls == Some(CALLERS)
    };
    let mut devices: Vec<&str> = Vec::new();
    for (function, device) in DEVICES {
        if elf.definitions.contains_key(function) && !devices.contains(&device) {
            devices.push(device);
        }
    }
    let has_own = |hook: Hook| {
        let own = &hook.symbols()[1..];
        own.iter()
            .any(|symbol| elf.definitions.contains_key(*symbol))
    };
    let name = shown.file_name().unwrap_or_default().to_string_lossy();
    let has_device_code = of(Hook::DeviceMulMatId).next().is_some()
        || has_own(Hook::Fetch)
        || has_own(Hook::WeightsFollow);
    Traits {
        scheduler: of(Hook::PassBegin).next().is_some(),
        contexts: of(Hook::Context).flatten().any(is_called),
        backends: match has_device_code {
            true => Backends::Any,
            false => Backends::in_file(&name, &devices),
        },
        own_copies: has_own(Hook::Fetch)
            && has_own(Hook::WeightsFollow)
            && devices.iter().filter(|device| **device != "rpc").count() == 1,
    }
}

fn look_up(file: &File) -> Result<symbols::Elf, SymbolError> {
    let hooks = Hook::ALL.into_iter().flat_map(Hook::symbols).copied();
    let devices = DEVICES.iter().map(|(function, _)| *function);
    let names: Vec<&str> = hooks.chain(devices).collect();
    symbols::resolve(Bounded(&bounded::cache(file)), &names)
}

/// Files that can wait to be probed: each takes a descriptor, and time at every look at another one.
const MAX_HELD: usize = 64;

/// Time to find a layout in DWARF, a hundred times what the largest libraries take. Without it, names
/// tell the layout; meanwhile, the traced process waits.
const PATIENCE: Duration = Duration::from_secs(1);

/// The layouts that a file declares, by the addresses of the functions that show expert ids.
fn declared_layouts(file: &File, shown: &Path, elf: &symbols::Elf) -> BTreeMap<u64, Declared> {
    let symbols = Hook::ExpertIds.symbols().iter();
    let definitions = symbols.filter_map(|symbol| elf.definitions.get(*symbol));
    let functions: Vec<u64> = definitions.flatten().map(entry).collect();
    if functions.is_empty() {
        return BTreeMap::new();
    }
    let shown = printable(shown);
    let began = Instant::now();
    let cache = bounded::cache(file);
    let found = layout::declared(Bounded(&cache), &functions, || began.elapsed() > PATIENCE);
    let found = found.unwrap_or_else(|why| {
        tracing::debug!("{shown}: {why}");
        BTreeMap::new()
    });
    let layouts = found.into_iter().filter_map(|(function, declared)| {
        let declared = declared.inspect_err(|why| tracing::debug!("{shown}: {why}"));
        Some((function, declared.ok()?))
    });
    layouts.collect()
}

/// Address of the function itself.
fn entry(definition: &Definition) -> u64 {
    definition.address - definition.skipped
}

/// Build id of an ELF file, in hex.
pub fn build_id(path: &Path) -> Option<String> {
    let file = open_regular(path).ok()?;
    symbols::resolve(Bounded(&bounded::cache(&file)), &[])
        .ok()?
        .build_id
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::symbols::Table;

    #[test]
    fn all_probes_of_a_file_have_its_library() {
        let file = tempfile::tempfile().unwrap();
        let functions = ["ggml_compute_forward_get_rows", "ggml_graph_compute"];
        let named = Routes::asked_for(&Route::ALL, false);
        let mut plan = Plan::default().with_routes(named);
        for number in 0..2 {
            let definition = |address| Definition {
                table: Table::Symtab,
                address,
                file_offset: address,
                skipped: 0,
                instruction: None,
            };
            let definitions = functions.map(|name| (name.to_owned(), vec![definition(16)]));
            let elf = symbols::Elf {
                build_id: None,
                definitions: definitions.into(),
            };
            plan.add(&file, elf, FileId(number), "lib".as_ref(), "lib".as_ref());
            plan.take_ready();
        }
        let sources = |number| {
            let probes = plan.probes.iter();
            let probes = probes.filter(move |probe| probe.file_id == FileId(number));
            probes.map(|probe| probe.site.source).collect::<Vec<_>>()
        };
        assert_eq!([sources(0), sources(1)], [[0, 0], [1, 1]]);
    }
}
