//! Reads of files that another user can have made: they can promise any size, and any number of things
//! that are in the same place.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
};

use object::{ReadRef, read::ReadCache};

/// Most that is read of a file in one look, in bytes: ten times the symbol table of the largest llama.cpp
/// builds, with CUDA kernels in them, and three times the largest one with DWARF that we know.
pub const MAX_READ: u64 = 256 << 20;

/// A file, read on demand: it can be large, and can be truncated under us. What has been read stays in
/// memory.
pub fn cache(file: &File) -> ReadCache<Rationed<'_>> {
    ReadCache::new(Rationed {
        file,
        left: MAX_READ,
    })
}

/// A file that cannot be read any more once [`MAX_READ`] bytes have been.
#[derive(Debug)]
pub struct Rationed<'a> {
    file: &'a File,
    left: u64,
}

impl Read for Rationed<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let size = into
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if size < into.len() && size == 0 {
            return Err(io::Error::other("too much of the file has been read"));
        }
        let read = self.file.read(&mut into[..size])?;
        self.left -= read as u64;
        Ok(read)
    }
}

impl Seek for Rationed<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// Bytes of which no more than [`MAX_READ`] are asked for at once: memory is taken before they are read.
#[derive(Clone, Copy, Debug)]
pub struct Bounded<R>(pub R);

impl<'data, R: ReadRef<'data>> ReadRef<'data> for Bounded<R> {
    fn len(self) -> Result<u64, ()> {
        self.0.len()
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'data [u8], ()> {
        if size > MAX_READ {
            return Err(());
        }
        self.0.read_bytes_at(offset, size)
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'data [u8], ()> {
        self.0.read_bytes_at_until(range, delimiter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_file_no_more_is_read_than_the_ration() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 40).unwrap();
        let cache = ReadCache::new(Rationed {
            file: &file,
            left: 100,
        });
        assert_eq!(cache.read_bytes_at(0, 60), Ok([0; 60].as_slice()));
        assert_eq!(cache.read_bytes_at(30, 50), Err(()));
        // What has been read is there.
        assert_eq!(cache.read_bytes_at(0, 60), Ok([0; 60].as_slice()));
    }

    #[test]
    fn nothing_is_asked_for_that_is_larger_than_the_ration() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 40).unwrap();
        let cache = cache(&file);
        assert_eq!(Bounded(&cache).read_bytes_at(0, MAX_READ + 1), Err(()));
    }
}
