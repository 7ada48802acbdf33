//! Where everything stands on the screen.

use std::time::Instant;

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
};

use super::{
    heat_map::{HeatMap, pointed},
    help::Help,
    palette::Palette,
    state::State,
    status::{Foot, Head},
};

/// Head, map and foot.
pub fn places(area: Rect) -> [Rect; 3] {
    Layout::vertical([
        Constraint::Length(2),
        Constraint::Min(1),
        Constraint::Length(3),
    ])
    .areas(area)
}

/// Draws a frame.
pub fn draw(frame: &mut Frame<'_>, state: &State, palette: Palette, title: &str, now: Instant) {
    let [head, map, foot] = places(frame.area());
    frame.render_widget(
        Head {
            state,
            palette,
            title,
            now,
        },
        head,
    );
    frame.render_widget(HeatMap { state, palette }, map);
    let pointed = pointed(state, map);
    frame.render_widget(
        Foot {
            state,
            palette,
            pointed,
        },
        foot,
    );
    if state.help {
        frame.render_widget(Help, frame.area());
    }
}
