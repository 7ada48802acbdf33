//! `npy`: counts as an array for `numpy.load`, [layers, experts, 2 phases] of u64.
//!
//! Version 1.0 of the [format](https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).

use std::io::Write;

use super::counts;
use crate::profile::ContextProfile;

/// Data begins at a multiple of this.
const ALIGNMENT: usize = 64;

/// Writes the counts of a context. A layer with fewer experts than others has zeros in their places.
///
/// # Errors
/// When it cannot be written.
pub fn write(context: &ContextProfile, out: &mut dyn Write) -> anyhow::Result<()> {
    let width = counts::widest(context);
    out.write_all(&header(context.layers.len(), width))?;
    for layer in &context.layers {
        let counts = counts::by_phase(layer, width);
        let bytes: Vec<u8> = counts
            .as_flattened()
            .iter()
            .flat_map(|count| count.to_le_bytes())
            .collect();
        out.write_all(&bytes)?;
    }
    Ok(())
}

fn header(layers: usize, experts: usize) -> Vec<u8> {
    let mut text =
        format!("{{'descr': '<u8', 'fortran_order': False, 'shape': ({layers}, {experts}, 2), }}");
    // The magic, the version, and a length of two bytes stand before; a line end behind.
    let before = 10;
    let end = (before + text.len() + 1).next_multiple_of(ALIGNMENT);
    while before + text.len() + 1 < end {
        text.push(' ');
    }
    text.push('\n');
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    // Two numbers make no text of more than 64 KiB.
    header.extend((text.len() as u16).to_le_bytes());
    header.extend(text.into_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::tests::small_profile;

    #[test]
    fn an_array_is_written() {
        let mut out = Vec::new();
        write(&small_profile().contexts[0], &mut out).unwrap();
        let (header, data) = out.split_at(128);
        assert!(header.starts_with(b"\x93NUMPY\x01\x00\x76\x00{'descr': '<u8'"));
        assert!(header.ends_with(b" \n"));
        let text = String::from_utf8_lossy(header);
        assert!(text.contains("'shape': (2, 4, 2)"), "{text}");
        let numbers: Vec<u64> = data
            .as_chunks::<8>()
            .0
            .iter()
            .map(|bytes| u64::from_le_bytes(*bytes))
            .collect();
        assert_eq!(
            numbers,
            [1, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0],
            "layers 1 and 4"
        );
    }

    #[test]
    fn data_is_aligned() {
        for (layers, experts) in [(0, 0), (1, 8), (1024, 4096), (99_999, 123_456_789)] {
            assert_eq!(header(layers, experts).len() % ALIGNMENT, 0);
        }
    }
}
