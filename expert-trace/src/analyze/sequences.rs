//! Which rows of a layer are the tokens before a token, in its sequence.

use std::collections::HashMap;

use super::routing::RoutedRow;

/// Tokens that are remembered.
pub const DEPTH: usize = 8;

/// The last generated tokens of every sequence in every layer.
#[derive(Debug, Default)]
pub struct Sequences {
    tails: HashMap<(Option<u16>, usize), Tail>,
    /// Counts what breaks sequences.
    now: u32,
    all: u32,
    by_layer: HashMap<usize, u32>,
    by_sequence: HashMap<(Option<u16>, usize), u32>,
}

/// The last generated tokens of a sequence in a layer, the last one first.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tail {
    since: u32,
    rows: [u32; DEPTH],
    len: usize,
    /// Position of the last one.
    position: Option<i32>,
}

impl Tail {
    /// The row so many tokens back; 1 is the token before.
    pub fn back(&self, lag: usize) -> Option<usize> {
        let rows = &self.rows[..self.len];
        rows.get(lag.checked_sub(1)?).map(|row| *row as usize)
    }

    fn follow(&mut self, position: Option<i32>) {
        let (Some(last), Some(next)) = (self.position, position) else {
            // From a position that is known to one that is not, nothing is known.
            if self.position != position {
                self.len = 0;
            }
            return;
        };
        // Tokens that were rejected, or replaced, are computed again.
        let again = (i64::from(last) - i64::from(next) + 1).max(0);
        let again = usize::try_from(again).unwrap_or(DEPTH).min(self.len);
        self.rows.rotate_left(again);
        self.len -= again;
        if i64::from(next) > i64::from(last) + 1 {
            self.len = 0;
        }
    }

    fn push(&mut self, row: &RoutedRow<'_>) {
        self.rows.rotate_right(1);
        self.rows[0] = row.index as u32;
        self.len = (self.len + 1).min(DEPTH);
        self.position = row.position;
    }
}

impl Sequences {
    /// Something is missing in a layer, or in all.
    pub fn gap(&mut self, layer: Option<usize>) {
        self.now += 1;
        match layer {
            Some(layer) => {
                self.by_layer.insert(layer, self.now);
            }
            None => self.all = self.now,
        }
    }

    /// A token of a prompt. What is not known to be another sequence is this one.
    pub fn prompt(&mut self, layer: usize, row: &RoutedRow<'_>) {
        self.now += 1;
        match row.sequence {
            Some(_) => self.by_sequence.insert((row.sequence, layer), self.now),
            None => self.by_layer.insert(layer, self.now),
        };
    }

    /// A generated token, which is the last one of its sequence now. Gives those before it.
    pub fn generated(&mut self, layer: usize, row: &RoutedRow<'_>) -> Tail {
        let broken = |at: Option<&u32>| at.copied().unwrap_or(0);
        let broken = broken(self.by_layer.get(&layer))
            .max(broken(self.by_sequence.get(&(row.sequence, layer))));
        let broken = broken.max(self.all);
        let tail = self.tails.entry((row.sequence, layer)).or_default();
        if tail.since < broken {
            *tail = Tail {
                since: self.now,
                ..Tail::default()
            };
        }
        if tail.len > 0 {
            tail.follow(row.position);
        }
        let before = *tail;
        tail.push(row);
        before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: [usize; 0] = [];

    fn row(index: usize, sequence: Option<u16>, position: Option<i32>) -> RoutedRow<'static> {
        RoutedRow {
            index,
            decode: true,
            sequence,
            position,
            token: None,
            experts: &[],
        }
    }

    fn back(tail: &Tail) -> Vec<usize> {
        (1..=DEPTH + 1).map_while(|lag| tail.back(lag)).collect()
    }

    #[test]
    fn tokens_follow_each_other_by_sequence_and_layer() {
        let mut sequences = Sequences::default();
        for index in 0..20 {
            let of_other = row(100 + index, Some(1), Some(7 + index as i32));
            sequences.generated(0, &of_other);
            let tail = sequences.generated(0, &row(index, Some(0), Some(index as i32)));
            let expected: Vec<usize> = (0..index).rev().take(DEPTH).collect();
            assert_eq!(back(&tail), expected);
        }
        assert_eq!(
            back(&sequences.generated(1, &row(0, Some(0), Some(20)))),
            NOBODY
        );
    }

    #[test]
    fn positions_tell_what_is_missing_and_what_comes_again() {
        let mut sequences = Sequences::default();
        let mut at =
            |index, position| back(&sequences.generated(0, &row(index, Some(0), position)));
        for index in 0..5 {
            at(index, Some(index as i32));
        }
        // Tokens 3 and 4 were rejected.
        assert_eq!(at(5, Some(3)), [2, 1, 0]);
        assert_eq!(at(6, Some(5)), NOBODY, "one is missing");
        assert_eq!(at(7, Some(0)), NOBODY, "a new text");
        assert_eq!(at(8, Some(1)), [7]);
        assert_eq!(at(9, None), NOBODY);
        assert_eq!(at(10, None), [9]);
        assert_eq!(at(11, Some(i32::MAX)), NOBODY);
        assert_eq!(at(12, Some(i32::MIN + 1)), NOBODY);
    }

    #[test]
    fn gaps_and_prompts_break_what_they_concern() {
        let mut sequences = Sequences::default();
        let generate = |sequences: &mut Sequences, layer, sequence| {
            sequences
                .generated(layer, &row(9, Some(sequence), None))
                .len
        };
        let all = |sequences: &mut Sequences| {
            [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(layer, of)| generate(sequences, layer, of))
        };
        all(&mut sequences);
        assert_eq!(all(&mut sequences), [1, 1, 1, 1]);
        sequences.gap(Some(1));
        assert_eq!(all(&mut sequences), [2, 2, 0, 0]);
        sequences.prompt(0, &row(0, Some(0), None));
        assert_eq!(all(&mut sequences), [0, 3, 1, 1]);
        sequences.prompt(1, &row(0, None, None));
        assert_eq!(all(&mut sequences), [1, 4, 0, 0]);
        sequences.gap(None);
        assert_eq!(all(&mut sequences), [0; 4]);
    }
}
