//! Whether two names lead to one file, as the kernel sees it when it sets uprobes.
//!
//! Device and inode do not tell: a file system that shows another one's files (overlayfs, as containers
//! have it) gives them devices of its own, keeps the inode's number when it replaces a file by its own
//! copy, and has the file below mapped (fs/overlayfs/file.c, `ovl_mmap`). What is mapped is pages of
//! memory, and those are the same when the file is.

use std::{ffi::c_void, fs::File, io, num::NonZeroUsize, os::unix::fs::FileExt as _, ptr::NonNull};

use nix::{
    sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap},
    unistd::{SysconfVar, sysconf},
};

/// The first page of a file, mapped. It stays that file's, whatever becomes of its names.
#[derive(Debug)]
pub struct FirstPage {
    address: NonNull<c_void>,
    size: NonZeroUsize,
}

/// The kernel can move a page while we look.
const LOOKS: u32 = 8;

impl FirstPage {
    /// That of a file.
    ///
    /// # Errors
    /// When it cannot be mapped.
    pub fn of(file: &File) -> io::Result<Self> {
        let size = sysconf(SysconfVar::PAGE_SIZE)?.unwrap_or(4096);
        let size = usize::try_from(size).ok().and_then(NonZeroUsize::new);
        let size = size.ok_or(io::ErrorKind::Unsupported)?;
        // Shared and not executable, so that nobody sets a breakpoint in it: that would be a copy.
        // SAFETY: a new mapping, which nobody reads.
        let address = unsafe {
            mmap(
                None,
                size,
                ProtFlags::PROT_READ,
                MapFlags::MAP_SHARED,
                file,
                0,
            )
        }?;
        Ok(Self { address, size })
    }

    /// Whether both are one page. None when the kernel does not tell: it numbers pages for who has
    /// CAP_SYS_ADMIN alone, and an empty file has none.
    pub fn is(&self, other: &Self) -> Option<bool> {
        for _ in 0..LOOKS {
            let (one, two, again) = (self.frame()?, other.frame()?, self.frame()?);
            if one == again {
                return Some(one == two);
            }
        }
        None
    }

    /// Where in the machine's memory it is, as a page number.
    fn frame(&self) -> Option<u64> {
        // Documentation/admin-guide/mm/pagemap.rst
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        let pagemap = File::open("/proc/self/pagemap").ok()?;
        let at = (self.address.addr().get() / self.size) as u64 * 8;
        for _ in 0..LOOKS {
            // Reading it ourselves would end us where the file has become shorter.
            // SAFETY: the range is our mapping; the call brings its page in, and changes nothing.
            unsafe {
                madvise(
                    self.address,
                    self.size.get(),
                    MmapAdvise::MADV_POPULATE_READ,
                )
            }
            .ok()?;
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, at).ok()?;
            let entry = u64::from_ne_bytes(entry);
            if entry & PRESENT != 0 {
                return Some(entry & FRAME).filter(|frame| *frame != 0);
            }
        }
        None
    }
}

impl Drop for FirstPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing points into it.
        let _ = unsafe { munmap(self.address, self.size.get()) };
    }
}

/// Whether two open files are one, as far as the kernel tells.
pub fn is_same(one: &File, other: &File) -> Option<bool> {
    FirstPage::of(one).ok()?.is(&FirstPage::of(other).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, io::Write as _};

    #[test]
    fn names_of_one_file_and_copies_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let open = |name: &str| File::open(at(name)).unwrap();
        fs::write(at("a"), "the same").unwrap();
        fs::hard_link(at("a"), at("link")).unwrap();
        fs::copy(at("a"), at("copy")).unwrap();
        File::create(at("empty")).unwrap();
        if !nix::unistd::geteuid().is_root() {
            assert_eq!(is_same(&open("a"), &open("link")), None);
            return;
        }
        assert_eq!(is_same(&open("a"), &open("link")), Some(true));
        assert_eq!(is_same(&open("a"), &open("copy")), Some(false));
        assert_eq!(is_same(&open("a"), &open("empty")), None);

        // Emptied and written anew, it is still the same file.
        let before = FirstPage::of(&open("a")).unwrap();
        File::create(at("a")).unwrap().write_all(b"new").unwrap();
        let after = FirstPage::of(&open("a")).unwrap();
        assert_eq!(before.is(&after), Some(true));
        // Another one of its name is not.
        fs::rename(at("copy"), at("a")).unwrap();
        assert_eq!(before.is(&FirstPage::of(&open("a")).unwrap()), Some(false));
    }
}
