//! The heat map as rectangles and words, for a picture of any kind.

use super::{LayerContent, colour};

/// Pixels of a cell: as many as fit a picture of about a thousand of them, and no fewer than two.
const WIDTH: usize = 1024;
const CELLS: std::ops::RangeInclusive<usize> = 2..=16;
/// Pixels for the numbers of layers, and for those of experts.
const LEFT: usize = 40;
const TOP: usize = 34;
/// Around it.
const MARGIN: usize = 12;
/// Pixels from a number to the next, at least.
const TICK: usize = 32;

/// Layers × experts as they are drawn.
#[derive(Debug, PartialEq)]
pub struct HeatMap {
    /// Pixels of a cell.
    pub cell: usize,
    /// Pixels of the picture.
    pub size: [usize; 2],
    /// Pixel at which the first cell begins.
    pub origin: [usize; 2],
    /// Colours of the cells by layer and expert; none beyond a layer's experts.
    pub cells: Vec<Vec<[u8; 3]>>,
    /// Words, and the pixel at which they begin.
    pub words: Vec<(String, [usize; 2])>,
}

/// Pixels of a character, with the gap behind it.
pub const CHARACTER: [usize; 2] = [6, 8];

impl HeatMap {
    /// The activations of layers. A colour is the square root of the activations, of those of the hottest
    /// expert of all layers; an expert that was never chosen is white.
    pub fn of(layers: &[LayerContent]) -> Self {
        let width = layers
            .iter()
            .map(|layer| layer.prefill.len())
            .max()
            .unwrap_or(0);
        let cell = (WIDTH / width.max(1)).clamp(*CELLS.start(), *CELLS.end());
        let most = layers.iter().flat_map(LayerContent::activations).max();
        let most = most.unwrap_or(0).max(1) as f64;
        let colour = |count: u64| match count {
            0 => colour::NEVER,
            count => colour::of((count as f64 / most).sqrt()),
        };
        let cells = layers
            .iter()
            .map(|layer| layer.activations().map(colour).collect());
        let origin = [MARGIN + LEFT, MARGIN + TOP];
        let [character, line] = CHARACTER;
        let mut words = vec![
            ("expert".to_owned(), [origin[0], MARGIN]),
            ("layer".to_owned(), [MARGIN, origin[1] - line - 4]),
        ];
        let every = |pixels: usize| pixels.div_ceil(cell).next_power_of_two();
        for expert in (0..width).step_by(every(TICK)) {
            let at = [origin[0] + expert * cell, origin[1] - line - 4];
            words.push((expert.to_string(), at));
        }
        for (index, layer) in layers.iter().enumerate().step_by(every(line + 2)) {
            let number = layer.id.to_string();
            let x = origin[0] - 4 - number.len() * character;
            words.push((number, [x, origin[1] + index * cell]));
        }
        Self {
            cell,
            size: [
                origin[0] + (width * cell).max(8 * character) + MARGIN,
                origin[1] + layers.len() * cell + line + MARGIN,
            ],
            origin,
            cells: cells.collect(),
            words,
        }
    }
}
