//! The page: its parts put together, with the content in it.

use std::io::Write;

use anyhow::Context as _;

use super::Content;

const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const CHARTS: &str = include_str!("charts.js");
const SCRIPT: &str = include_str!("page.js");

/// Writes it.
///
/// # Errors
/// When it cannot be written.
pub fn write(content: &Content, out: &mut dyn Write) -> anyhow::Result<()> {
    let json = serde_json::to_string(content).context("the report's content")?;
    let parts = [
        ("/*STYLE*/", STYLE.to_owned()),
        ("/*DATA*/", in_script(&json)),
        ("/*SCRIPT*/", format!("{CHARTS}\n{SCRIPT}")),
    ];
    let mut rest = PAGE;
    for (mark, part) in parts {
        let (before, after) = rest.split_once(mark).context("the page lacks a mark")?;
        out.write_all(before.as_bytes())?;
        out.write_all(part.as_bytes())?;
        rest = after;
    }
    Ok(out.write_all(rest.as_bytes())?)
}

/// JSON that nothing in it can end, or begin, an element of HTML: names are what the target made them.
fn in_script(json: &str) -> String {
    json.replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_cannot_leave_its_element() {
        let name = "</script><!--<script>&\u{2028}\"";
        let json = serde_json::to_string(name).unwrap();
        let escaped = in_script(&json);
        assert!(!escaped.contains(['<', '>', '&']), "{escaped}");
        assert_eq!(serde_json::from_str::<String>(&escaped).unwrap(), name);
    }

    #[test]
    fn the_page_asks_for_nothing_from_outside() {
        for part in [PAGE, STYLE, CHARTS, SCRIPT] {
            for word in [
                "http:",
                "https:",
                "@import",
                "url(",
                "fetch(",
                "src=",
                "innerHTML",
            ] {
                let without_namespace = part.replace("http://www.w3.org/2000/svg", "");
                assert!(!without_namespace.contains(word), "{word}");
            }
        }
        assert!(PAGE.contains("default-src 'none'"));
    }
}
