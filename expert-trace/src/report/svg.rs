//! The heat map as an SVG.

use std::fmt::Write as _;

use super::{HeatMap, colour, heat_map::CHARACTER};

/// The picture. Cells of one colour that follow each other are one rectangle.
pub fn text(map: &HeatMap) -> String {
    let [width, height] = map.size;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"Activations by layer and expert\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#f2f2f2\"/>\n\
         <g shape-rendering=\"crispEdges\">\n"
    );
    let [left, top] = map.origin;
    let cell = map.cell;
    for (layer, cells) in map.cells.iter().enumerate() {
        let mut expert = 0;
        for run in cells.chunk_by(|one, other| one == other) {
            let fill = colour::css(run[0]);
            let (x, y) = (left + expert * cell, top + layer * cell);
            // Writing to memory does not fail.
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{cell}\" fill=\"{fill}\"/>",
                run.len() * cell
            );
            expert += run.len();
        }
    }
    svg += "</g>\n<g font-family=\"monospace\" font-size=\"10\" fill=\"#222\">\n";
    for (word, [x, y]) in &map.words {
        let _ = writeln!(
            svg,
            "<text x=\"{x}\" y=\"{}\">{word}</text>",
            y + CHARACTER[1]
        );
    }
    svg + "</g>\n</svg>\n"
}
