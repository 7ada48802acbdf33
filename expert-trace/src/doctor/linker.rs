//! The libraries that the dynamic linker will load with a program, found as ld.so(8) says.
//!
//! The linker itself could tell (`LD_TRACE_LOADED_OBJECTS`, which is what ldd does). But that runs the
//! linker that the file names, and maps a file that need not be the caller's into it: an untrusted file
//! must only be read. What is not followed here: `LD_AUDIT`, `dlopen`, and the directories of a processor's
//! abilities (`glibc-hwcaps`), where the system keeps faster copies of libraries that are not
//! llama.cpp's.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd as _,
        unix::{
            ffi::{OsStrExt as _, OsStringExt as _},
            fs::MetadataExt as _,
        },
    },
    path::{Path, PathBuf},
};

use object::read::ReadCache;

use super::elf::{self, Anatomy, Dynamic};
use crate::{bounded::Bounded, symbols, target::open_regular};

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
            let cache = ReadCache::new(&file);
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

/// Where the linker looks beside what files say.
#[derive(Debug, Default)]
pub struct Search {
    /// `LD_LIBRARY_PATH`.
    pub library_path: Option<OsString>,
    /// `LD_PRELOAD`.
    pub preload: Option<OsString>,
}

/// Finds what comes with a program, breadth first, as the linker maps it. To be called with the rights
/// of who will run it.
pub fn closure(program: Code, search: &Search) -> Closure {
    let cache = Cache::read();
    let mut closure = Closure::default();
    // Who asks for it, by index, and its name.
    let mut wanted: VecDeque<(usize, OsString)> = VecDeque::new();
    let mut asked: Vec<OsString> = Vec::new();
    let separator = |byte: &u8| matches!(byte, b':' | b' ');
    let preload = search.preload.clone().unwrap_or_default();
    let preload = preload.as_bytes().split(separator);
    wanted.extend(
        preload
            .filter(|name| !name.is_empty())
            .map(|name| (0, OsString::from_vec(name.to_vec()))),
    );
    wanted.extend(needed(&program, 0));
    closure.files.push(program);
    while let Some((by, name)) = wanted.pop_front() {
        if asked.contains(&name) || closure.files.len() >= MAX_FILES {
            continue;
        }
        asked.push(name.clone());
        let found = candidates(&closure.files, by, &name, search, &cache)
            .into_iter()
            .find_map(|path| Code::open(&path).ok());
        match found {
            Some(code) if closure.files.iter().any(|known| known.is(&code)) => {}
            Some(code) => {
                wanted.extend(needed(&code, closure.files.len()));
                closure.files.push(code);
            }
            None => closure.missing.push(name),
        }
    }
    closure
}

fn needed(code: &Code, index: usize) -> Vec<(usize, OsString)> {
    let dynamic = code.anatomy.dynamic.iter();
    dynamic
        .flat_map(|dynamic| &dynamic.needed)
        .map(|name| (index, name.clone()))
        .collect()
}

/// Paths under which a library is looked for, in their order (`_dl_map_object` in elf/dl-load.c).
fn candidates(
    files: &[Code],
    by: usize,
    name: &OsStr,
    search: &Search,
    cache: &Cache,
) -> Vec<PathBuf> {
    if name.as_bytes().contains(&b'/') {
        return vec![PathBuf::from(name)];
    }
    let empty = Dynamic::default();
    let loader = &files[by];
    let dynamic = loader.anatomy.dynamic.as_ref().unwrap_or(&empty);
    let mut directories = Vec::new();
    if dynamic.runpath.is_none() {
        // Those of the program hold for what its libraries need, too.
        for code in [loader, &files[0]] {
            let rpath = code
                .anatomy
                .dynamic
                .as_ref()
                .and_then(|of| of.rpath.as_ref());
            directories.extend(rpath.iter().flat_map(|path| expand(path, &code.path)));
        }
    }
    let library_path = search.library_path.iter();
    directories.extend(library_path.flat_map(|path| expand(path, &files[0].path)));
    let runpath = dynamic.runpath.iter();
    directories.extend(runpath.flat_map(|path| expand(path, &loader.path)));
    let mut paths: Vec<PathBuf> = directories.into_iter().map(|of| of.join(name)).collect();
    if !dynamic.no_default {
        paths.extend(cache.get(name));
        paths.extend(default_directories().map(|directory| directory.join(name)));
    }
    paths
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
/// others (ld.so(8), "Dynamic string tokens").
fn expand(path: &OsStr, of: &Path) -> Vec<PathBuf> {
    let origin = of.parent().unwrap_or(Path::new("/")).as_os_str().as_bytes();
    let lib = system_lib();
    let platform = std::env::consts::ARCH.as_bytes();
    let directories = path.as_bytes().split(|byte| matches!(byte, b':' | b';'));
    directories
        .map(|directory| {
            let mut text = directory.to_vec();
            for (token, value) in [
                ("ORIGIN", origin),
                ("LIB", lib.as_bytes()),
                ("PLATFORM", platform),
            ] {
                for form in [format!("${{{token}}}"), format!("${token}")] {
                    text = replace(&text, form.as_bytes(), value);
                }
            }
            match text.is_empty() {
                true => PathBuf::from("."),
                false => PathBuf::from(OsString::from_vec(text)),
            }
        })
        .collect()
}

fn replace(text: &[u8], what: &[u8], by: &[u8]) -> Vec<u8> {
    let mut result = Vec::with_capacity(text.len());
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
    }
    result
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
        let found = closure(own, &Search::default());
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

    #[test]
    fn words_of_search_paths() {
        let of = Path::new("/opt/llama/bin/llama-cli");
        let expanded = |path: &str| expand(OsStr::new(path), of);
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
