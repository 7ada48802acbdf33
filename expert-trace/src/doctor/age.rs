//! Whether ggml's structs are ones that the probes know, by what its code says of its age. Without DWARF
//! nothing in a library says where the fields are, but some of its words came and went with them.

use std::{
    fs::File,
    io::{self, Read, Seek as _, SeekFrom},
};

/// What the words of a file say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    /// Its ggml is of b3209 or newer.
    Known,
    /// It is older.
    TooOld,
    /// Neither word is there, or both are.
    Unknown,
}

/// An assertion of `ggml_graph_compute`, which b3209 brought, together with the `ggml_compute_params`
/// that the probes read (ggml-org/llama.cpp#8017). Assertions tell their text, also in stripped builds.
const SINCE: &[u8] = b"cplan->work_size == 0 || cplan->work_data != NULL";
/// From `ggml_graph_print`, as it was before.
const BEFORE: &[u8] = b"perf_total_per_op_us[";

/// Bytes of a file that are searched; the largest builds, with kernels for GPUs, have less.
const MAX_BYTES: u64 = 2 << 30;
const CHUNK: usize = 1 << 20;

/// Searches a file.
///
/// # Errors
/// When it cannot be read.
pub fn of(mut file: &File) -> io::Result<Age> {
    file.seek(SeekFrom::Start(0))?;
    search(file.take(MAX_BYTES))
}

fn search(mut from: impl Read) -> io::Result<Age> {
    let overlap = SINCE.len().max(BEFORE.len()) - 1;
    let mut buffer = vec![0; overlap + CHUNK];
    let (mut kept, mut since, mut before) = (0, false, false);
    loop {
        let read = from.read(&mut buffer[kept..])?;
        if read == 0 {
            break;
        }
        let filled = kept + read;
        since |= contains(&buffer[..filled], SINCE);
        before |= contains(&buffer[..filled], BEFORE);
        kept = overlap.min(filled);
        buffer.copy_within(filled - kept..filled, 0);
    }
    Ok(match (since, before) {
        (true, false) => Age::Known,
        (false, true) => Age::TooOld,
        _ => Age::Unknown,
    })
}

fn contains(bytes: &[u8], word: &[u8]) -> bool {
    let ends = word.len() - 1;
    let last = word[ends];
    let candidates = bytes.iter().enumerate().skip(ends);
    candidates
        .filter(|(_, byte)| **byte == last)
        .any(|(at, _)| bytes[at - ends..=at] == *word)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives little at a time, as files can.
    struct Slow<'a>(&'a [u8], usize);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let step = self.1.min(buffer.len());
            self.0.read(&mut buffer[..step])
        }
    }

    fn file(words: &[&[u8]]) -> Vec<u8> {
        let mut bytes = vec![0; CHUNK - 7];
        for word in words {
            bytes.extend(*word);
            bytes.extend([0; 100]);
        }
        bytes
    }

    #[test]
    fn words_tell_the_age_wherever_they_are() {
        let cases: [(&[&[u8]], Age); 4] = [
            (&[SINCE], Age::Known),
            (&[BEFORE], Age::TooOld),
            (&[SINCE, BEFORE], Age::Unknown),
            (&[], Age::Unknown),
        ];
        for (words, expected) in cases {
            let bytes = file(words);
            for step in [usize::MAX, CHUNK, 4093] {
                assert_eq!(search(Slow(&bytes, step)).unwrap(), expected, "{step}");
            }
        }
        let part = file(&[&SINCE[..SINCE.len() - 1]]);
        assert_eq!(search(part.as_slice()).unwrap(), Age::Unknown);
    }
}
