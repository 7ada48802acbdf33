//! Files of a trace that is divided into several (`--rotate`): which of them were read, and what is missing.

use super::Capture;

/// Files of one trace that were read, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// Their numbers; of a trace that was imported, which is one file and has no summary, none.
    numbers: Vec<u32>,
    has_summary: bool,
}

impl Parts {
    /// Another file begins, of which the metadata says this.
    pub fn begin(&mut self, capture: &Capture) {
        if capture.mode != Capture::IMPORT {
            self.numbers.push(capture.part);
        }
    }

    /// The summary was read: the capture has ended.
    pub fn end(&mut self) {
        self.has_summary = true;
    }

    /// What is missing of a trace whose last file is whole or not, a sentence each; `shown` names what was read.
    pub fn missing(&self, shown: &str, is_whole: bool) -> Vec<String> {
        const MERGE: &str = "`expert-trace merge` counts all files of a trace as one";
        let mut lines = Vec::new();
        let (Some(first), Some(last)) = (self.numbers.first(), self.numbers.last()) else {
            return lines;
        };
        if *first > 0 {
            lines.push(format!(
                "{shown}: the trace begins in another file, and this is part {first} (from 0) of it: {MERGE}"
            ));
        }
        for pair in self.numbers.windows(2) {
            if pair[0].checked_add(1) != Some(pair[1]) {
                lines.push(format!(
                    "{shown}: the trace has other parts between {} and {}, which are missing",
                    pair[0], pair[1]
                ));
            }
        }
        if is_whole && !self.has_summary {
            lines.push(format!(
                "{shown}: no summary stands at the end of part {last}: the trace goes on in another file, or could \
                 not be written to its end: {MERGE}"
            ));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_told() {
        let missing = |mode: &str, numbers: &[u32], has_summary, is_whole| {
            let mut parts = Parts::default();
            for part in numbers {
                parts.begin(&Capture {
                    mode: mode.to_owned(),
                    part: *part,
                    ..Capture::default()
                });
            }
            if has_summary {
                parts.end();
            }
            parts.missing("a", is_whole)
        };
        let [begins, between, goes_on] = ["begins in another", "between 1 and 3", "goes on in"];
        let none: [&str; 0] = [];
        for (numbers, has_summary, is_whole, expected) in [
            (&[0][..], true, true, &none[..]),
            (&[0], false, false, &none),
            (&[0], false, true, &[goes_on]),
            (&[0, 1, 2], true, true, &none),
            (&[2], true, true, &[begins]),
            (&[2], false, true, &[begins, goes_on]),
            (&[0, 1, 3], true, true, &[between]),
        ] {
            let lines = missing("run", numbers, has_summary, is_whole);
            assert_eq!(lines.len(), expected.len(), "{numbers:?}: {lines:?}");
            for (line, expected) in lines.iter().zip(expected) {
                assert!(line.starts_with("a: ") && line.contains(expected), "{line}");
            }
        }
        assert_eq!(missing(Capture::IMPORT, &[0], false, true), none);
    }
}
