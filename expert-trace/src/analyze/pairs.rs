//! How often two things go together, and how often they would by chance.

/// Counts of pairs.
#[derive(Clone, Debug)]
pub struct Pairs {
    events: u64,
    a: Vec<u32>,
    b: Vec<u32>,
    both: Vec<u32>,
}

/// A pair that was counted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lift {
    /// The first one.
    pub a: usize,
    /// The second one.
    pub b: usize,
    /// Events that had both.
    pub both: u32,
    /// Those, of the events that had the first one, in percent.
    pub percent: f64,
    /// Those / what would be expected of two that know nothing of each other.
    pub lift: f64,
}

impl Pairs {
    /// Nothing yet, of so many first and second ones.
    pub fn new(a: usize, b: usize) -> Self {
        Self {
            events: 0,
            a: vec![0; a],
            b: vec![0; b],
            both: vec![0; a * b],
        }
    }

    /// An event that had these, each of them once.
    pub fn add(&mut self, a: &[u16], b: &[u16]) {
        self.events += 1;
        a.iter().for_each(|a| self.a[usize::from(*a)] += 1);
        b.iter().for_each(|b| self.b[usize::from(*b)] += 1);
        for a in a {
            let row = usize::from(*a) * self.b.len();
            let row = &mut self.both[row..row + self.b.len()];
            b.iter().for_each(|b| row[usize::from(*b)] += 1);
        }
    }

    /// The pairs with the highest lift among those that `is_wanted` and have the support, of equals those with
    /// more events, then by number.
    pub fn strongest(
        &self,
        support: u32,
        top: usize,
        is_wanted: impl Fn(usize, usize) -> bool,
    ) -> Vec<Lift> {
        let width = self.b.len().max(1);
        let supported = self
            .both
            .iter()
            .enumerate()
            .filter(|(_, both)| **both >= support);
        let mut lifts: Vec<Lift> = supported
            .map(|(cell, _)| (cell / width, cell % width))
            .filter(|(a, b)| is_wanted(*a, *b))
            .map(|(a, b)| self.lift(a, b))
            .collect();
        lifts.sort_by(|x, y| {
            let by_lift = y.lift.total_cmp(&x.lift).then(y.both.cmp(&x.both));
            by_lift.then((x.a, x.b).cmp(&(y.a, y.b)))
        });
        lifts.truncate(top);
        lifts
    }

    /// What was counted of a pair that there is.
    pub fn lift(&self, a: usize, b: usize) -> Lift {
        let both = self.both[a * self.b.len() + b];
        let [of_a, of_b] = [self.a[a], self.b[b]].map(f64::from);
        Lift {
            a,
            b,
            both,
            percent: 100.0 * f64::from(both) / of_a,
            lift: f64::from(both) * self.events as f64 / (of_a * of_b),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lift_is_relative_to_chance() {
        let mut pairs = Pairs::new(3, 3);
        // Always 0 with 1; 2 alone.
        for _ in 0..5 {
            pairs.add(&[0], &[1]);
            pairs.add(&[2], &[2]);
        }
        let strongest = pairs.strongest(5, 9, |_, _| true);
        let found: Vec<_> = strongest
            .iter()
            .map(|of| (of.a, of.b, of.both, of.lift))
            .collect();
        assert_eq!(found, [(0, 1, 5, 2.0), (2, 2, 5, 2.0)]);
        assert_eq!(strongest[0].percent, 100.0);
        assert_eq!(pairs.strongest(6, 9, |_, _| true), []);
        assert_eq!(pairs.strongest(5, 1, |a, b| a == b).len(), 1);
    }
}
