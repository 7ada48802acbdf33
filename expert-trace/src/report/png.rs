//! The heat map as a PNG.

use std::io::Write;

use super::{HeatMap, glyphs};

const BACKGROUND: [u8; 3] = [242, 242, 242];
const INK: [u8; 3] = [34, 34, 34];

/// Writes it.
///
/// # Errors
/// When it cannot be written.
pub fn write(map: &HeatMap, out: &mut dyn Write) -> anyhow::Result<()> {
    let [width, height] = map.size;
    let mut pixels = BACKGROUND.repeat(width * height);
    let mut set = |x: usize, y: usize, colour: [u8; 3]| {
        if x < width && y < height {
            let at = 3 * (y * width + x);
            pixels[at..at + 3].copy_from_slice(&colour);
        }
    };
    let [left, top] = map.origin;
    for (layer, cells) in map.cells.iter().enumerate() {
        for (expert, colour) in cells.iter().enumerate() {
            for dot in 0..map.cell * map.cell {
                let (x, y) = (dot % map.cell, dot / map.cell);
                set(
                    left + expert * map.cell + x,
                    top + layer * map.cell + y,
                    *colour,
                );
            }
        }
    }
    for (word, [x, y]) in &map.words {
        for [dot_x, dot_y] in glyphs::dots(word) {
            set(x + dot_x, y + dot_y, INK);
        }
    }
    let mut encoder = png::Encoder::new(out, u32::try_from(width)?, u32::try_from(height)?);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header()?.write_image_data(&pixels)?;
    Ok(())
}
