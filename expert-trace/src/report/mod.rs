//! `report`: what was counted, to look at: one HTML file that needs nothing else, or its heat map as a picture.
//!
//! ```text
//! file ─▶ analyze::input ─▶ Content ─▶ page (HTML)
//!                                   └▶ heat map ─▶ svg, png
//! ```

mod colour;
mod command;
mod content;
mod facts;
mod glyphs;
mod heat_map;
mod page;
mod png;
mod svg;

pub use self::{
    command::run,
    content::{Content, LayerContent},
    heat_map::HeatMap,
};

use clap::ValueEnum;

/// What a report is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    /// A page for a browser, with everything in it
    Html,
    /// The heat map alone
    Png,
    /// The heat map alone, as lines and areas
    Svg,
}

#[cfg(test)]
mod tests;
