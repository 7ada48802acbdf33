//! Heat in the colours, and the characters, that a terminal has.

use std::env;

use ratatui::style::{Color, Modifier, Style};

/// What a terminal can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Palette {
    pub colours: Colours,
    /// Whether its characters are those of UTF-8.
    pub utf8: bool,
}

/// Colours of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colours {
    /// None, or none is wanted.
    None,
    /// The eight of ECMA-48.
    Eight,
    /// The 256 of xterm.
    Indexed,
}

/// Cold to hot, in xterm's colour cube: dark blue, violet, red, orange, yellow.
const INDEXED: [u8; 12] = [17, 18, 54, 90, 126, 162, 197, 202, 208, 214, 220, 228];
const EIGHT: [Color; 6] = [
    Color::Blue,
    Color::Cyan,
    Color::Green,
    Color::Yellow,
    Color::Red,
    Color::White,
];
const SHADES: [&str; 4] = ["░", "▒", "▓", "█"];
const LETTERS: [&str; 9] = [".", ":", "-", "=", "+", "*", "#", "%", "@"];

impl Palette {
    /// What the environment says of the terminal. `NO_COLOR` (no-color.org) asks for none.
    pub fn of_environment() -> Self {
        Self::of(&|name| env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn of(variable: &dyn Fn(&str) -> Option<String>) -> Self {
        let term = variable("TERM").unwrap_or_default();
        let colours = if variable("NO_COLOR").is_some()
            || ["", "dumb"].contains(&&*term)
            || term.starts_with("vt")
            || term.ends_with("-mono")
            || term.ends_with("-m")
        {
            Colours::None
        } else if term.contains("256") || term.contains("direct") || variable("COLORTERM").is_some()
        {
            Colours::Indexed
        } else {
            Colours::Eight
        };
        // As setlocale(3) looks for them.
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
            .into_iter()
            .find_map(variable);
        let locale = locale.unwrap_or_default().to_ascii_lowercase();
        Self {
            colours,
            utf8: locale.contains("utf-8") || locale.contains("utf8"),
        }
    }

    /// A cell of this heat, from 0 to 1; 0 is that of an expert that was never chosen.
    pub fn cell(self, heat: f64) -> (&'static str, Style) {
        let none = match self.utf8 {
            true => "·",
            false => " ",
        };
        if heat <= 0.0 {
            return (none, Style::new().add_modifier(self.dim()));
        }
        let step = |steps: usize| ((heat * steps as f64) as usize).min(steps - 1);
        let background = |colour| (" ", Style::new().bg(colour));
        match (self.colours, self.utf8) {
            (Colours::Indexed, _) => background(Color::Indexed(INDEXED[step(INDEXED.len())])),
            (Colours::Eight, _) => background(EIGHT[step(EIGHT.len())]),
            (Colours::None, true) => (SHADES[step(SHADES.len())], Style::new()),
            (Colours::None, false) => (LETTERS[step(LETTERS.len())], Style::new()),
        }
    }

    /// The cell at the cursor.
    pub fn at_cursor(self, (symbol, style): (&'static str, Style)) -> (&'static str, Style) {
        let symbol = match symbol {
            " " => "+",
            other => other,
        };
        match self.colours {
            Colours::None => (symbol, style.add_modifier(Modifier::REVERSED)),
            _ => ("X", style.fg(Color::White).add_modifier(Modifier::BOLD)),
        }
    }

    /// Text that something is wrong.
    pub fn warning(self) -> Style {
        match self.colours {
            Colours::None => Style::new().add_modifier(Modifier::BOLD),
            _ => Style::new().fg(Color::Red).add_modifier(Modifier::BOLD),
        }
    }

    /// Text that is of less interest.
    pub fn dim(self) -> Modifier {
        match self.colours {
            Colours::None => Modifier::empty(),
            _ => Modifier::DIM,
        }
    }

    /// Between parts of a line.
    pub fn separator(self) -> &'static str {
        match self.utf8 {
            true => " · ",
            false => " | ",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> (Colours, bool) {
        let palette = Palette::of(&|name| {
            let mut variables = variables.iter();
            let found = variables.find(|(of, _)| *of == name);
            found.map(|(_, value)| (*value).to_owned())
        });
        (palette.colours, palette.utf8)
    }

    #[test]
    fn terminals_are_known_by_their_environment() {
        let utf8 = ("LANG", "de_DE.UTF-8");
        for (variables, expected) in [
            (&[][..], (Colours::None, false)),
            (
                &[("TERM", "xterm-256color"), utf8],
                (Colours::Indexed, true),
            ),
            (&[("TERM", "linux"), utf8], (Colours::Eight, true)),
            (
                &[("TERM", "xterm"), ("COLORTERM", "truecolor")],
                (Colours::Indexed, false),
            ),
            (
                &[("TERM", "xterm-256color"), ("NO_COLOR", "1")],
                (Colours::None, false),
            ),
            (
                &[("TERM", "vt100"), utf8, ("LC_ALL", "C")],
                (Colours::None, false),
            ),
        ] {
            assert_eq!(of(variables), expected, "{variables:?}");
        }
    }

    #[test]
    fn what_was_chosen_once_is_told_from_what_was_never() {
        for colours in [Colours::None, Colours::Eight, Colours::Indexed] {
            for utf8 in [false, true] {
                let palette = Palette { colours, utf8 };
                let cells = [0.0, 1e-9, 0.5, 1.0].map(|heat| palette.cell(heat));
                for (index, cell) in cells.iter().enumerate() {
                    assert!(!cells[..index].contains(cell), "{palette:?}: {cells:?}");
                }
            }
        }
    }
}
