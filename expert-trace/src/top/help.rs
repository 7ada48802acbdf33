//! What the keys do.

use ratatui::{
    buffer::Buffer,
    layout::Rect,
    style::Style,
    widgets::{Clear, Widget},
};

/// Every key.
pub const KEYS: [(&str, &str); 13] = [
    (
        "arrows, h j k l",
        "move the cursor; the line below the map tells its counts",
    ),
    (
        "PgUp PgDn Home End",
        "the same by a screen, or to the first or last expert",
    ),
    ("+ -", "fewer or more experts in a cell; 0: as many as fit"),
    ("a", "all layers on the screen, several in a line"),
    ("s", "experts by id, or each layer's hottest first"),
    ("n", "hottest colour: of all layers, or of each one"),
    ("f", "all tokens, those of prompts, or generated ones"),
    ("c, Tab", "the next context"),
    ("p, space", "stop to look; counting goes on"),
    ("r", "begin to count anew"),
    ("w", "write the counts: to the file of -o, or a new one"),
    ("q", "leave the view"),
    ("Ctrl-C", "end the capture, or the program that was started"),
];

/// A box of them.
pub struct Help;

impl Widget for Help {
    fn render(self, area: Rect, buffer: &mut Buffer) {
        let height = (KEYS.len() as u16 + 2).min(area.height);
        let width = 80.min(area.width);
        let place = Rect {
            x: area.x + (area.width - width) / 2,
            y: area.y + (area.height - height) / 2,
            width,
            height,
        };
        Clear.render(place, buffer);
        let lines = KEYS.map(|(key, what)| format!("  {key:<19} {what}"));
        let heading = " Keys (any key goes back)".to_owned();
        let lines = [heading, String::new()].into_iter().chain(lines);
        for (y, line) in (place.y..place.bottom()).zip(lines) {
            buffer.set_stringn(place.x, y, line, width.into(), Style::new());
        }
    }
}
