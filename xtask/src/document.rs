//! Tables in Markdown documents that a command makes anew.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Lines of a document between which a table is.
pub struct Place {
    pub begin: &'static str,
    pub end: &'static str,
}

impl Place {
    /// Puts a table into the document, in the place of the last one.
    pub fn show(&self, root: &Path, document: &str, table: &str) -> Result<()> {
        let path = root.join(document);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {document}"))?;
        let text = self
            .with_table(&text, table)
            .with_context(|| format!("{document} has no place for a table"))?;
        fs::write(path, text).with_context(|| format!("cannot write {document}"))
    }

    fn with_table(&self, document: &str, table: &str) -> Option<String> {
        let Self { begin, end } = self;
        let (before, rest) = document.split_once(begin)?;
        let (_, after) = rest.split_once(end)?;
        Some(format!("{before}{begin}\n{table}\n{end}{after}"))
    }
}

/// The first lines of a table.
pub fn head(columns: &[&str]) -> String {
    let lines = "---|".repeat(columns.len());
    format!("| {} |\n|{lines}\n", columns.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_takes_the_place_of_the_last_one() {
        let places = [("<a>\n", "</a>\n"), ("<b>\n", "</b>\n")];
        let [first, second] = places.map(|(begin, end)| Place { begin, end });
        let text = |Place { begin, end }: &Place, table: &str| {
            format!("# Title\n{begin}\n{table}\n{end}The end.\n")
        };
        let old = text(&first, "| old |\n") + &text(&second, "| old |\n");
        let new = first.with_table(&old, "| new |\n").unwrap();
        assert_eq!(new, text(&first, "| new |\n") + &text(&second, "| old |\n"));
        let new = second.with_table(&old, "| new |\n").unwrap();
        assert_eq!(new, text(&first, "| old |\n") + &text(&second, "| new |\n"));
        assert_eq!(first.with_table("# Title\n", "| new |\n"), None);
    }
}
