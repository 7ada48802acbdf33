//! Lines of numbers: writing them fast, and reading them from files that nobody vouches for.

use std::io::{self, BufRead, Read as _};

use anyhow::{Context as _, bail};

use crate::profile::printable;

/// Longest line that is read, in bytes.
const MAX_LINE: u64 = 64 << 10;

/// Appends a number.
pub fn push_number(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0; 20];
    let mut first = digits.len();
    loop {
        first -= 1;
        digits[first] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[first..]);
}

/// The lines of a file, one by one.
#[derive(Debug)]
pub struct Lines<R> {
    input: R,
    line: Vec<u8>,
    number: u64,
}

impl<R: BufRead> Lines<R> {
    /// Those of a file that stands at its beginning.
    pub fn new(input: R) -> Self {
        Self {
            input,
            line: Vec::new(),
            number: 0,
        }
    }

    /// The number of the line that was read last, from 1.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The next line, without its end.
    ///
    /// # Errors
    /// When the file cannot be read, or the line is too long or no text.
    pub fn next(&mut self) -> anyhow::Result<Option<&str>> {
        self.line.clear();
        let read = self
            .input
            .by_ref()
            .take(MAX_LINE + 1)
            .read_until(b'\n', &mut self.line)
            .context("cannot read on")?;
        if read == 0 {
            return Ok(None);
        }
        self.number += 1;
        if read as u64 > MAX_LINE {
            bail!(
                "line {} is longer than {MAX_LINE} bytes: this is no list of experts",
                self.number
            );
        }
        let line = str::from_utf8(&self.line)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
            .with_context(|| format!("line {}", self.number))?;
        Ok(Some(line.trim_end_matches(['\n', '\r'])))
    }
}

/// Places of columns in a table with commas, by the names in its first line.
#[derive(Debug)]
pub struct Header<const N: usize> {
    places: [usize; N],
}

impl<const N: usize> Header<N> {
    /// Finds columns.
    ///
    /// # Errors
    /// When one is missing.
    pub fn find(line: &str, names: [&str; N]) -> anyhow::Result<Self> {
        let mut places = [0; N];
        for (place, name) in places.iter_mut().zip(names) {
            *place = line
                .split(',')
                .position(|column| column.trim() == name)
                .with_context(|| format!("there is no column '{name}'"))?;
        }
        Ok(Self { places })
    }

    /// The place of a column that need not be there.
    pub fn optional(line: &str, name: &str) -> Option<usize> {
        line.split(',').position(|column| column.trim() == name)
    }

    /// The columns of a line, which must be whole numbers.
    ///
    /// # Errors
    /// When one is missing or none.
    pub fn numbers(&self, line: &str) -> anyhow::Result<[i64; N]> {
        let mut numbers = [0; N];
        let mut missing = N;
        for (column, text) in line.split(',').enumerate() {
            for (number, place) in numbers.iter_mut().zip(self.places) {
                if place == column {
                    let text = text.trim();
                    *number = text
                        .parse()
                        .with_context(|| format!("'{}' is no number", printable(text)))?;
                    missing -= 1;
                }
            }
        }
        if missing > 0 {
            bail!("{missing} of {N} columns are missing");
        }
        Ok(numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_others_do() {
        for number in [0, 7, 10, 65_535, 1_000_000, u64::MAX] {
            let mut out = b"x".to_vec();
            push_number(&mut out, number);
            assert_eq!(out, format!("x{number}").into_bytes());
        }
    }

    #[test]
    fn lines_end_in_several_ways() {
        let mut lines = Lines::new(&b"a\r\nb\n\nc"[..]);
        for (number, line) in (1..).zip(["a", "b", "", "c"]) {
            assert_eq!(lines.next().unwrap(), Some(line));
            assert_eq!(lines.number(), number);
        }
        assert_eq!(lines.next().unwrap(), None);
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let fits = vec![b'1'; MAX_LINE as usize];
        assert!(Lines::new(&*fits).next().is_ok());
        let endless = vec![b'1'; MAX_LINE as usize + 1];
        assert!(Lines::new(&*endless).next().is_err());
        assert!(Lines::new(&b"\xff\n"[..]).next().is_err());
    }

    #[test]
    fn columns_are_found_by_name() {
        let header = Header::find("b, a,c", ["a", "b"]).unwrap();
        assert_eq!(header.numbers("1,2,x").unwrap(), [2, 1]);
        for line in ["", "1", "1,x", "1,99999999999999999999"] {
            assert!(header.numbers(line).is_err(), "{line}");
        }
        assert!(Header::find("a,b", ["a", "z"]).is_err());
    }
}
