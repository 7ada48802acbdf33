//! What a terminal shows, as a page: text with the colours of xterm's 256.

use std::fmt::Write as _;

/// Pixels of a character.
const CHARACTER: (u32, u32) = (9, 19);
/// Pixels around the text.
const MARGIN: u32 = 12;

/// Pixels of the page of a terminal with so many columns and lines.
pub fn size((columns, lines): (u16, u16)) -> (u32, u32) {
    let (width, height) = CHARACTER;
    (
        u32::from(columns) * width + 2 * MARGIN,
        u32::from(lines) * height + 2 * MARGIN,
    )
}

/// How characters are drawn.
#[derive(Clone, Copy, Default)]
struct Look {
    ink: Option<u8>,
    ground: Option<u8>,
    bold: bool,
    dim: bool,
    underlined: bool,
    reversed: bool,
}

/// A page of text with escape sequences that choose colours (SGR of ECMA-48). Others are left out.
pub fn page(text: &str) -> String {
    let (width, height) = CHARACTER;
    let mut page = format!(
        "<!DOCTYPE html><meta charset=\"utf-8\"><style>\
         body {{ margin: 0; background: #101418; color: #d8dee4 }}\
         pre {{ margin: {MARGIN}px; font: 15px/{height}px monospace }}\
         span {{ display: inline-block; width: {width}px; height: {height}px; vertical-align: top; text-align: center }}\
         </style><pre>"
    );
    let mut look = Look::default();
    let mut rest = text.trim_end().chars();
    while let Some(character) = rest.next() {
        match character {
            '\n' => page.push('\n'),
            '\x1b' => {
                let sequence: String = rest
                    .by_ref()
                    .take_while(|c| !c.is_ascii_alphabetic())
                    .collect();
                look.choose(sequence.trim_start_matches('['));
            }
            character => look.draw(&mut page, character),
        }
    }
    page + "</pre>\n"
}

impl Look {
    fn choose(&mut self, sequence: &str) {
        let mut codes = sequence
            .split(';')
            .map(|code| code.parse::<u8>().unwrap_or(0));
        while let Some(code) = codes.next() {
            match code {
                0 => *self = Self::default(),
                1 => self.bold = true,
                2 => self.dim = true,
                4 => self.underlined = true,
                7 => self.reversed = true,
                39 => self.ink = None,
                49 => self.ground = None,
                38 => self.ink = codes.nth(1),
                48 => self.ground = codes.nth(1),
                _ => {}
            }
        }
    }

    fn draw(self, page: &mut String, character: char) {
        let [mut ink, mut ground] = [self.ink.map(colour), self.ground.map(colour)];
        if self.reversed {
            (ink, ground) = (ground.or(Some([16, 20, 24])), ink.or(Some([216, 222, 228])));
        }
        let mut style = String::new();
        // Writing to memory does not fail.
        for (name, value) in [("color", ink), ("background", ground)] {
            if let Some([red, green, blue]) = value {
                let _ = write!(style, "{name}:rgb({red},{green},{blue});");
            }
        }
        for (is_so, rule) in [
            (self.bold, "font-weight:bold;"),
            (self.dim, "opacity:.5;"),
            (self.underlined, "text-decoration:underline;"),
        ] {
            style += if is_so { rule } else { "" };
        }
        let text = match character {
            '<' => "&lt;".to_owned(),
            '&' => "&amp;".to_owned(),
            ' ' => "&nbsp;".to_owned(),
            other => other.to_string(),
        };
        let _ = write!(page, "<span style=\"{style}\">{text}</span>");
    }
}

/// One of xterm's 256 colours.
fn colour(number: u8) -> [u8; 3] {
    const STEPS: [u8; 6] = [0, 95, 135, 175, 215, 255];
    const FIRST: [[u8; 3]; 16] = [
        [0, 0, 0],
        [205, 0, 0],
        [0, 205, 0],
        [205, 205, 0],
        [0, 0, 238],
        [205, 0, 205],
        [0, 205, 205],
        [229, 229, 229],
        [127, 127, 127],
        [255, 0, 0],
        [0, 255, 0],
        [255, 255, 0],
        [92, 92, 255],
        [255, 0, 255],
        [0, 255, 255],
        [255, 255, 255],
    ];
    match number {
        0..16 => FIRST[usize::from(number)],
        16..232 => {
            let number = usize::from(number - 16);
            [number / 36, number / 6 % 6, number % 6].map(|step| STEPS[step])
        }
        232.. => [8 + 10 * (number - 232); 3],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_and_text_are_kept() {
        let page = page("a\x1b[48;5;196m<\x1b[49m\x1b[1mb\x1b[0m\nc");
        assert!(page.contains("background:rgb(255,0,0);\">&lt;</span>"));
        assert!(
            page.contains("<span style=\"font-weight:bold;\">b</span>\n<span style=\"\">c</span>")
        );
        assert_eq!(colour(232), [8; 3]);
        assert_eq!(colour(255), [238; 3]);
        assert_eq!(colour(17), [0, 0, 95]);
    }
}
