//! What the bytes of a file tell when its symbols do not.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read},
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use object::elf;

use crate::target::open_regular;

/// llama.cpp's name for the tensor with the chosen experts (src/llama-graph.cpp): a string that
/// every build of it contains.
const MARK: &[u8] = b"ffn_moe_topk";
/// Larger files are not searched: it would take seconds.
const MAX_SEARCHED: u64 = 1 << 30;
const CHUNK: usize = 256 << 10;

/// What a search of a file gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Search {
    /// The file contains llama.cpp.
    Found,
    /// It does not.
    NotFound,
    /// It is too large, or cannot be read.
    NotSearched,
}

/// Looks through a file for llama.cpp.
pub fn search_for_llama_cpp(path: &Path) -> Search {
    let search = || -> io::Result<Search> {
        let file = open_regular(path)?;
        // We name the tensor, too.
        if is_own_executable(&file) {
            return Ok(Search::NotFound);
        }
        if file.metadata()?.len() > MAX_SEARCHED {
            return Ok(Search::NotSearched);
        }
        // It can grow while it is read.
        Ok(if contains(file.take(MAX_SEARCHED), MARK)? {
            Search::Found
        } else {
            Search::NotFound
        })
    };
    search().unwrap_or(Search::NotSearched)
}

fn is_own_executable(file: &File) -> bool {
    let id = |metadata: Metadata| (metadata.dev(), metadata.ino());
    let own = fs::metadata("/proc/self/exe").map(id);
    own.is_ok_and(|own| file.metadata().is_ok_and(|file| id(file) == own))
}

/// Whether a stream contains `mark`, at the seam of two reads too.
fn contains(mut stream: impl Read, mark: &[u8]) -> io::Result<bool> {
    let mut buffer = vec![0; CHUNK];
    let mut kept = 0;
    loop {
        let read = match stream.read(&mut buffer[kept..]) {
            Ok(0) => return Ok(false),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let filled = kept + read;
        if find(&buffer[..filled], mark) {
            return Ok(true);
        }
        kept = filled.min(mark.len() - 1);
        buffer.copy_within(filled - kept..filled, 0);
    }
}

fn find(bytes: &[u8], mark: &[u8]) -> bool {
    // SAFETY: both slices are valid for their lengths.
    let found = unsafe {
        libc::memmem(
            bytes.as_ptr().cast(),
            bytes.len(),
            mark.as_ptr().cast(),
            mark.len(),
        )
    };
    !found.is_null()
}

/// `e_machine` of a program or library; `None` for other files. The fields are where they are in
/// both classes of ELF files.
pub fn machine(path: &Path) -> Option<u16> {
    let mut header = [0; 20];
    open_regular(path).ok()?.read_exact(&mut header).ok()?;
    machine_of(&header)
}

fn machine_of(header: &[u8; 20]) -> Option<u16> {
    let read = |at: usize| {
        let bytes = [header[at], header[at + 1]];
        match header[5] {
            elf::ELFDATA2MSB => u16::from_be_bytes(bytes),
            _ => u16::from_le_bytes(bytes),
        }
    };
    let runs = matches!(read(16), elf::ET_EXEC | elf::ET_DYN);
    (header.starts_with(&elf::ELFMAG) && runs).then(|| read(18))
}

/// Name of a machine, as people say it.
pub fn machine_name(machine: u16) -> String {
    let name = match machine {
        elf::EM_386 => "32-bit x86",
        elf::EM_X86_64 => "x86_64",
        elf::EM_ARM => "32-bit Arm",
        elf::EM_AARCH64 => "aarch64",
        elf::EM_RISCV => "RISC-V",
        elf::EM_PPC64 => "PowerPC",
        elf::EM_S390 => "s390x",
        elf::EM_LOONGARCH => "LoongArch",
        other => return format!("another machine (ELF number {other})"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives a few bytes at a time, as a pipe may.
    struct Dripping<'a>(&'a [u8], usize);

    impl Read for Dripping<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let size = self.1.min(buffer.len()).min(self.0.len());
            buffer[..size].copy_from_slice(&self.0[..size]);
            self.0 = &self.0[size..];
            Ok(size)
        }
    }

    #[test]
    fn a_mark_is_found_wherever_it_is() {
        for before in [
            0,
            1,
            CHUNK - 12,
            CHUNK - 6,
            CHUNK - 1,
            CHUNK,
            3 * CHUNK - 20,
        ] {
            let mut bytes = vec![b'f'; before];
            bytes.extend(MARK);
            bytes.extend(b"ffn");
            assert!(contains(bytes.as_slice(), MARK).unwrap(), "{before}");
            bytes[before + 11] = b'x';
            assert!(!contains(bytes.as_slice(), MARK).unwrap(), "{before}");
        }
        for step in 1..14 {
            let bytes = b"ffn_moe_ffn_moe_topk-3";
            assert!(contains(Dripping(bytes, step), MARK).unwrap(), "{step}");
            assert!(!contains(Dripping(&bytes[9..], step), MARK).unwrap());
        }
        assert!(!contains(&b""[..], MARK).unwrap());
    }

    #[test]
    fn what_is_too_large_or_unreadable_is_not_searched() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), MARK).unwrap();
        assert_eq!(search_for_llama_cpp(file.path()), Search::Found);
        file.as_file().set_len(MAX_SEARCHED + 1).unwrap();
        assert_eq!(search_for_llama_cpp(file.path()), Search::NotSearched);
        assert_eq!(
            search_for_llama_cpp(Path::new("/no/such")),
            Search::NotSearched
        );
        assert_eq!(
            search_for_llama_cpp(Path::new("/dev/zero")),
            Search::NotSearched
        );
    }

    #[test]
    fn we_are_not_llama_cpp() {
        let own = std::env::current_exe().unwrap();
        assert_eq!(search_for_llama_cpp(&own), Search::NotFound);
        let copy = tempfile::NamedTempFile::new().unwrap();
        fs::copy(own, copy.path()).unwrap();
        assert_eq!(search_for_llama_cpp(copy.path()), Search::Found);
    }

    #[test]
    fn machines() {
        let own = machine(Path::new("/proc/self/exe")).unwrap();
        assert_eq!(machine_name(own), std::env::consts::ARCH);
        let mut header = *b"\x7fELF\x02\x02\x01\0\0\0\0\0\0\0\0\0\0\x02\0\x16";
        assert_eq!(machine_of(&header).map(machine_name), Some("s390x".into()));
        header[17] = elf::ET_REL as u8;
        assert_eq!(machine_of(&header), None);
        assert_eq!(machine(Path::new("/etc/passwd")), None);
        assert!(machine_name(9999).contains("9999"));
    }
}
