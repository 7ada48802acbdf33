//! Which functions answer for the routing of a process, and where they are in the files it maps.

use std::path::{Path, PathBuf};

use object::read::ReadCache;
use serde::Serialize;

use crate::{
    symbols::{self, Bounded, Definition, SymbolError},
    target::{FileId, MappedFile, open_regular, printable},
};

/// A function to probe, and what its probe is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Hook {
    /// Expert ids, when the router runs on the CPU.
    ExpertIds,
    /// A pass begins.
    PassBegin,
    /// Positions and sequences of a pass' tokens.
    Ubatch,
    /// Whose pass it is, and the same as `Ubatch`.
    Context,
    /// A `llama_context` ends.
    ContextEnd,
    /// A scheduler ends, which is the context of programs that use ggml without llama.cpp.
    SchedulerEnd,
}

impl Hook {
    /// All hooks. The one that makes a library worth probing comes first.
    pub const ALL: [Hook; 6] = [
        Hook::ExpertIds,
        Hook::PassBegin,
        Hook::Ubatch,
        Hook::Context,
        Hook::ContextEnd,
        Hook::SchedulerEnd,
    ];

    /// Symbol of the function.
    pub const fn symbol(self) -> &'static str {
        match self {
            Hook::ExpertIds => "ggml_compute_forward_get_rows",
            Hook::PassBegin => "ggml_backend_sched_graph_compute_async",
            // llm_graph_result::set_inputs(llama_ubatch const *), since b5922.
            Hook::Ubatch => "_ZN16llm_graph_result10set_inputsEPK12llama_ubatch",
            // llama_context::process_ubatch(llama_ubatch const &, llm_graph_type,
            // llama_memory_context_i *, ggml_status &): as of b11434. Where the signature differs,
            // schedulers stand for contexts.
            Hook::Context => {
                "_ZN13llama_context14process_ubatchERK12llama_ubatch14llm_graph_type\
                 P22llama_memory_context_iR11ggml_status"
            }
            Hook::ContextEnd => "llama_free",
            Hook::SchedulerEnd => "ggml_backend_sched_free",
        }
    }

    /// BPF program that answers for it.
    pub const fn program(self) -> &'static str {
        match self {
            Hook::ExpertIds => "get_rows",
            Hook::PassBegin => "graph_compute",
            Hook::Ubatch => "set_inputs",
            Hook::Context => "process_ubatch",
            Hook::ContextEnd | Hook::SchedulerEnd => "leave_context",
        }
    }
}

/// One probe to attach: an entry probe at a file offset.
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
    /// Number of the file among those with expert ids: the probe's attach cookie.
    #[serde(skip)]
    pub source: u32,
    /// Path by which we reach the file.
    #[serde(skip)]
    pub attach_path: PathBuf,
}

/// The probes of one process. It grows as the process maps more libraries.
#[derive(Debug, Default)]
pub struct Plan {
    /// The probes, in the order they are to be attached.
    pub probes: Vec<Probe>,
    looked_at: Vec<FileId>,
    sources: u32,
}

impl Plan {
    /// Whether there is a function that shows expert ids.
    pub fn can_see_experts(&self) -> bool {
        self.probes
            .iter()
            .any(|probe| probe.hook == Hook::ExpertIds)
    }

    /// Libraries that show expert ids: their probes have the cookies 0 to this.
    pub fn sources(&self) -> u32 {
        self.sources
    }

    /// Adds the probes of files not looked at before, and returns them.
    ///
    /// A file that cannot be read as ELF is passed over with a message: a process maps many files
    /// that are none of our business.
    pub fn extend(&mut self, pid: u32, files: &[MappedFile]) -> &[Probe] {
        let known = self.probes.len();
        for file in files.iter().filter(|file| file.executable) {
            if self.looked_at.contains(&file.id) {
                continue;
            }
            self.looked_at.push(file.id.clone());
            let attach_path = file.reachable_path(pid);
            match look_up(&attach_path) {
                Ok(elf) => self.add(elf, &file.path, &attach_path),
                Err(error) => tracing::debug!("{}: {error}", printable(&file.path)),
            }
        }
        &self.probes[known..]
    }

    /// Adds the probes of an executable that nobody has mapped yet.
    ///
    /// # Errors
    /// When the file cannot be opened or is no ELF file for this machine.
    pub fn extend_from_file(&mut self, path: &Path) -> Result<&[Probe], LookUpError> {
        let known = self.probes.len();
        let elf = look_up(path)?;
        self.add(elf, path, path);
        Ok(&self.probes[known..])
    }

    fn add(&mut self, mut elf: symbols::Elf, file: &Path, attach_path: &Path) {
        for hook in Hook::ALL {
            let definitions = elf.definitions.remove(hook.symbol()).unwrap_or_default();
            for definition in definitions {
                self.probes.push(Probe {
                    hook,
                    symbol: hook.symbol(),
                    file: file.to_string_lossy().into_owned(),
                    build_id: elf.build_id.clone(),
                    definition,
                    source: self.sources,
                    attach_path: attach_path.to_owned(),
                });
                if hook == Hook::ExpertIds {
                    self.sources += 1;
                }
            }
        }
    }
}

/// Why an ELF file could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum LookUpError {
    /// It could not be opened.
    #[error("cannot open: {0}")]
    Open(#[from] std::io::Error),
    /// It is no ELF file for this machine.
    #[error(transparent)]
    Symbols(#[from] SymbolError),
}

fn look_up(path: &Path) -> Result<symbols::Elf, LookUpError> {
    let names = Hook::ALL.map(Hook::symbol);
    // Read on demand: the file can be large, and can be truncated under us.
    let cache = ReadCache::new(open_regular(path)?);
    Ok(symbols::resolve(Bounded(&cache), &names)?)
}

/// Build id of an ELF file, in hex.
pub fn build_id(path: &Path) -> Option<String> {
    look_up(path).ok()?.build_id
}

/// Offset of the function that glibc's and musl's dynamic linkers call whenever the list of loaded
/// libraries changes, before any code of a new library runs (elf/dl-debug.c).
///
/// # Errors
/// When the file cannot be opened or is no ELF file for this machine.
pub fn linker_hook(linker: &Path) -> Result<Option<Definition>, LookUpError> {
    let name = "_dl_debug_state";
    let cache = ReadCache::new(open_regular(linker)?);
    let mut elf = symbols::resolve(Bounded(&cache), &[name])?;
    Ok(elf
        .definitions
        .remove(name)
        .and_then(|mut found| found.pop()))
}
