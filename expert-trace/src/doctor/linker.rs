//! The libraries that the dynamic linker will load with a program, found as ld.so(8) says.
//!
//! The linker itself could tell (`LD_TRACE_LOADED_OBJECTS`, which is what ldd does). But that runs the
//! linker that the file names, and maps a file that need not be the caller's into it: an untrusted file
//! must only be read. What is not followed here: `LD_AUDIT`, `dlopen`, and the directories of a processor's
//! abilities (`glibc-hwcaps`), where the system keeps faster copies of libraries that are not
//! llama.cpp's.

use std::{
    collections::{HashSet, VecDeque},
    ffi::{OsStr, OsString},
    fs::{self, File},
    io, iter,
    os::{
        fd::AsRawFd as _,
        unix::{
            ffi::{OsStrExt as _, OsStringExt as _},
            fs::MetadataExt as _,
        },
    },
    path::{Path, PathBuf},
};

use super::elf::{self, Anatomy, Dynamic};
use crate::{
    bounded::{self, Bounded},
    symbols,
    target::open_regular,
};

/// A program or library, open.
#[derive(Debug)]
pub struct Code {
    /// The file.
    pub file: File,
    /// Its path, without links.
    pub path: PathBuf,
    /// What it is like.
    pub anatomy: Anatomy,
}

impl Code {
    /// Opens a file with the rights of the calling thread.
    ///
    /// # Errors
    /// When it cannot be opened, or is no ELF file of this machine.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = open_regular(path)?;
        let anatomy = {
            let cache = bounded::cache(&file);
            symbols::check_executable(Bounded(&cache)).map_err(io::Error::other)?;
            elf::look(Bounded(&cache)).map_err(io::Error::other)?
        };
        let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        Ok(Self {
            file,
            path,
            anatomy,
        })
    }

    /// Whether two are the same file.
    pub fn is(&self, other: &Code) -> bool {
        let id = |code: &Code| code.file.metadata().map(|of| (of.dev(), of.ino())).ok();
        id(self) == id(other)
    }
}

/// What comes with a program.
#[derive(Debug, Default)]
pub struct Closure {
    /// The program, and its libraries in the order in which they are mapped.
    pub files: Vec<Code>,
    /// Libraries that were not found.
    pub missing: Vec<OsString>,
}

/// Most libraries that are looked at.
const MAX_FILES: usize = 512;
/// Most names of libraries that are looked for.
const MAX_NAMES: usize = 4096;
/// Most directories of one search path.
const MAX_DIRECTORIES: usize = 256;
/// Longest path that the kernel takes.
const MAX_PATH: usize = libc::PATH_MAX as usize;
/// Most paths that are tried, in all.
const MAX_TRIED: usize = 64 << 10;

/// Where the linker looks beside what files say.
#[derive(Debug, Default)]
pub struct Search {
    /// `LD_LIBRARY_PATH`.
    pub library_path: Option<OsString>,
    /// `LD_PRELOAD`.
    pub preload: Option<OsString>,
}

/// What finds libraries as the dynamic linker does.
#[derive(Debug, Default)]
pub struct Linker {
    search: Search,
    cache: Cache,
    /// Paths that were tried.
    tried: usize,
    /// Whether there was more than is looked at: what was found is then not all.
    pub gave_up: bool,
}

/// A library that something asks for.
struct Wanted {
    /// Who, by index.
    by: usize,
    name: OsString,
    /// The linker goes on without a library of `LD_PRELOAD` that is not there.
    preloaded: bool,
}

impl Linker {
    /// One for the environment of a program.
    pub fn new(search: Search) -> Self {
        Self {
            search,
            cache: Cache::read(),
            ..Self::default()
        }
    }

    /// Finds what comes with a program, breadth first, as the linker maps it. To be called with the
    /// rights of who will run it.
    pub fn closure(&mut self, program: Code) -> Closure {
        let mut closure = Closure::default();
        // Who had each file loaded, by index.
        let mut loaders: Vec<Option<usize>> = vec![None];
        let mut names = 0;
        let mut wanted: VecDeque<Wanted> = self.preloads().collect();
        let mut asked: HashSet<OsString> = HashSet::new();
        self.want_needed(&mut wanted, &program, 0);
        closure.files.push(program);
        while let Some(Wanted {
            by,
            name,
            preloaded,
        }) = wanted.pop_front()
        {
            if asked.contains(&name) {
                continue;
            }
            names += 1;
            if names > MAX_NAMES || closure.files.len() >= MAX_FILES {
                self.gave_up = true;
                break;
            }
            // One that is there already counts by its own name, too.
            let is_named = |code: &Code| {
                let dynamic = code.anatomy.dynamic.as_ref();
                dynamic.is_some_and(|of| of.soname.as_ref() == Some(&name))
            };
            if closure.files.iter().any(is_named) {
                asked.insert(name);
                continue;
            }
            match self.find(&closure.files, &loaders, by, &name) {
                Some(code) => {
                    asked.insert(name);
                    if !closure.files.iter().any(|known| known.is(&code)) {
                        self.want_needed(&mut wanted, &code, closure.files.len());
                        closure.files.push(code);
                        loaders.push(Some(by));
                    }
                }
                None if preloaded => {}
                None => {
                    asked.insert(name.clone());
                    closure.missing.push(name);
                }
            }
        }
        closure
    }

    fn preloads(&self) -> impl Iterator<Item = Wanted> {
        let preload = self.search.preload.clone().unwrap_or_default();
        let names: Vec<Wanted> = preload
            .as_bytes()
            .split(|byte| matches!(byte, b':' | b' '))
            .filter(|name| !name.is_empty())
            .map(|name| Wanted {
                by: 0,
                name: OsStr::from_bytes(name).to_owned(),
                preloaded: true,
            })
            .collect();
        names.into_iter()
    }

    fn want_needed(&mut self, wanted: &mut VecDeque<Wanted>, code: &Code, index: usize) {
        let Some(dynamic) = &code.anatomy.dynamic else {
            return;
        };
        let room = MAX_NAMES.saturating_sub(wanted.len());
        self.gave_up |= dynamic.has_more || dynamic.needed.len() > room;
        wanted.extend(dynamic.needed.iter().take(room).map(|name| Wanted {
            by: index,
            name: name.clone(),
            preloaded: false,
        }));
    }

    fn find(
        &mut self,
        files: &[Code],
        loaders: &[Option<usize>],
        by: usize,
        name: &OsStr,
    ) -> Option<Code> {
        for path in self.candidates(files, loaders, by, name) {
            if self.tried >= MAX_TRIED {
                self.gave_up = true;
                return None;
            }
            self.tried += 1;
            if let Ok(code) = Code::open(&path) {
                return Some(code);
            }
        }
        None
    }

    /// Paths under which a library is looked for, in their order (`_dl_map_object` in elf/dl-load.c).
    fn candidates(
        &mut self,
        files: &[Code],
        loaders: &[Option<usize>],
        by: usize,
        name: &OsStr,
    ) -> Vec<PathBuf> {
        if name.as_bytes().contains(&b'/') {
            return vec![PathBuf::from(name)];
        }
        let empty = Dynamic::default();
        let dynamic_of = |code: usize| files[code].anatomy.dynamic.as_ref().unwrap_or(&empty);
        let dynamic = dynamic_of(by);
        let mut paths: Vec<(&OsStr, &Path)> = Vec::new();
        if dynamic.runpath.is_none() {
            // Those of who had the loader loaded hold, too, up to the program; and those of the program
            // in any case.
            let chain = iter::successors(Some(by), |code| loaders[*code]);
            let program = (!chain.clone().any(|code| code == 0)).then_some(0);
            for code in chain.chain(program) {
                let dynamic = dynamic_of(code);
                if let (Some(rpath), None) = (&dynamic.rpath, &dynamic.runpath) {
                    paths.push((rpath, &files[code].path));
                }
            }
        }
        let library_path = self.search.library_path.iter();
        paths.extend(library_path.map(|path| (path.as_os_str(), files[0].path.as_path())));
        let runpath = dynamic.runpath.iter();
        paths.extend(runpath.map(|path| (path.as_os_str(), files[by].path.as_path())));
        let directories = paths.into_iter().flat_map(|(path, of)| expand(path, of));
        let mut directories: Vec<PathBuf> = directories.take(MAX_DIRECTORIES + 1).collect();
        if directories.len() > MAX_DIRECTORIES {
            self.gave_up = true;
            directories.truncate(MAX_DIRECTORIES);
        }
        let mut paths: Vec<PathBuf> = directories.into_iter().map(|of| of.join(name)).collect();
        if !dynamic.no_default {
            paths.extend(self.cache.get(name));
            paths.extend(default_directories().map(|directory| directory.join(name)));
        }
        paths
    }
}

/// Where glibc and musl look when a cache names nothing.
fn default_directories() -> impl Iterator<Item = PathBuf> {
    let lib = system_lib();
    let own = ["/", "/usr"].map(|directory| Path::new(directory).join(&lib));
    let others = ["/lib64", "/usr/lib64", "/lib", "/usr/local/lib", "/usr/lib"];
    own.into_iter().chain(others.map(PathBuf::from))
}

/// What `$LIB` stands for: Debian and its kin have libraries in directories of their own.
fn system_lib() -> String {
    let multiarch = format!("lib/{}-linux-gnu", std::env::consts::ARCH);
    match Path::new("/").join(&multiarch).is_dir() {
        true => multiarch,
        false => "lib64".to_owned(),
    }
}

/// Directories of a search path, in which an empty one is the current one, and some words stand for
/// others (ld.so(8), "Dynamic string tokens"). Those that are too long for a path are left out.
fn expand<'a>(path: &'a OsStr, of: &'a Path) -> impl Iterator<Item = PathBuf> + 'a {
    let origin = of.parent().unwrap_or(Path::new("/")).as_os_str();
    let tokens = [
        ("ORIGIN", origin.to_owned()),
        ("LIB", system_lib().into()),
        ("PLATFORM", std::env::consts::ARCH.into()),
    ];
    let directories = path.as_bytes().split(|byte| matches!(byte, b':' | b';'));
    directories.filter_map(move |directory| {
        let mut text = directory.to_vec();
        for (token, value) in &tokens {
            for form in [format!("${{{token}}}"), format!("${token}")] {
                text = replace(&text, form.as_bytes(), value.as_bytes())?;
            }
        }
        Some(match text.is_empty() {
            true => PathBuf::from("."),
            false => PathBuf::from(OsString::from_vec(text)),
        })
    })
}

/// None where it would be too long for a path.
fn replace(text: &[u8], what: &[u8], by: &[u8]) -> Option<Vec<u8>> {
    let mut result = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        match rest.strip_prefix(what) {
            Some(after) => {
                result.extend(by);
                rest = after;
            }
            None => {
                result.push(rest[0]);
                rest = &rest[1..];
            }
        }
        if result.len() > MAX_PATH {
            return None;
        }
    }
    Some(result)
}

/// `/etc/ld.so.cache`: where the system's libraries are.
#[derive(Debug, Default)]
struct Cache(Vec<u8>);

impl Cache {
    const PATH: &str = "/etc/ld.so.cache";
    /// `struct cache_file_new` (sysdeps/generic/dl-cache.h).
    const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
    const HEADER: usize = 48;
    const ENTRY: usize = 24;

    /// Reads it; empty where there is none.
    fn read() -> Self {
        Self(fs::read(Self::PATH).unwrap_or_default())
    }

    fn number(&self, at: usize) -> Option<usize> {
        let bytes = self.0.get(at..at.checked_add(4)?)?;
        usize::try_from(u32::from_ne_bytes(bytes.try_into().ok()?)).ok()
    }

    fn text(&self, at: usize) -> Option<&OsStr> {
        let rest = self.0.get(at..)?;
        let end = rest.iter().position(|byte| *byte == 0)?;
        Some(OsStr::from_bytes(&rest[..end]))
    }

    /// Paths of a library, of whatever machine.
    fn get(&self, name: &OsStr) -> Vec<PathBuf> {
        if !self.0.starts_with(Self::MAGIC) {
            return Vec::new();
        }
        let count = self.number(Self::MAGIC.len()).unwrap_or(0);
        let entries = self.0.len() / Self::ENTRY;
        (0..count.min(entries))
            .filter_map(|index| {
                let entry = Self::HEADER + index * Self::ENTRY;
                let is_it = self.text(self.number(entry + 4)?)? == name;
                is_it.then(|| Some(PathBuf::from(self.text(self.number(entry + 8)?)?)))?
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_libraries_are_those_that_we_map() {
        let own = Code::open(Path::new("/proc/self/exe")).unwrap();
        let mut linker = Linker::new(Search::default());
        let found = linker.closure(own);
        assert!(!linker.gave_up);
        assert_eq!(found.missing, Vec::<OsString>::new());
        // Other tests may have had more of them loaded.
        let mapped: Vec<PathBuf> = crate::target::mapped_files(std::process::id())
            .unwrap()
            .into_iter()
            .filter(|file| file.is_executable())
            .map(|file| file.path)
            .collect();
        let paths: Vec<PathBuf> = found.files.into_iter().map(|of| of.path).collect();
        assert!(paths.iter().all(|path| mapped.contains(path)), "{paths:?}");
        let names = ["libc.so.6", "libgcc_s.so.1"];
        let is_there = |name| paths.iter().any(|path| path.ends_with(name));
        assert!(names.into_iter().all(is_there), "{paths:?}");
    }

    /// As many names, and directories for each, as a file can hold.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn there_is_an_end_to_looking() {
        let names: Vec<u8> = (0..3000)
            .flat_map(|number| format!("{number:x}\0").into_bytes())
            .collect();
        let ends = (0..names.len()).filter(|at| names[*at] == 0);
        let needed: Vec<u64> = ends.map(|at| at as u64 - 1).collect();
        let open = |directories: usize| {
            let strings = [names.clone(), b"/x:".repeat(directories), vec![0]].concat();
            let bytes = elf::tests::library(&strings, &needed, names.len() as u64);
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), bytes).unwrap();
            let mut linker = Linker::new(Search::default());
            let closure = linker.closure(Code::open(file.path()).unwrap());
            assert_eq!(closure.files.len(), 1);
            (linker.gave_up, linker.tried)
        };
        // Of 3000 names that end alike, 16 are different.
        let (gave_up, tried) = open(2);
        assert!(!gave_up && tried < 1000, "{tried}");
        for directories in [1000, 20_000] {
            let (gave_up, tried) = open(directories);
            assert!(gave_up && tried < 5000, "{tried}");
        }
    }

    #[test]
    fn words_of_search_paths() {
        let of = Path::new("/opt/llama/bin/llama-cli");
        let expanded = |path: &str| expand(OsStr::new(path), of).collect::<Vec<_>>();
        assert_eq!(
            expanded("$ORIGIN:${ORIGIN}/../lib:"),
            ["/opt/llama/bin", "/opt/llama/bin/../lib", "."].map(PathBuf::from)
        );
        let lib = PathBuf::from(format!("/usr/{}/x", system_lib()));
        assert_eq!(expanded("/usr/$LIB/x"), [lib]);
    }

    #[test]
    fn a_damaged_cache_has_nothing() {
        let mut bytes = Cache::MAGIC.to_vec();
        bytes.extend(u32::MAX.to_ne_bytes());
        bytes.resize(200, 0xff);
        assert_eq!(
            Cache(bytes).get(OsStr::new("libc.so.6")),
            Vec::<PathBuf>::new()
        );
        assert_eq!(
            Cache::default().get(OsStr::new("libc.so.6")),
            Vec::<PathBuf>::new()
        );
    }
}
