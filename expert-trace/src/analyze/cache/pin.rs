//! Experts that stay for the whole run.

/// Hits when the experts with most lookups per byte are held, as far as they fit: chosen by `learned`, hits
/// counted in `tested`, both lookups by expert. One number for each of the budgets, which ascend.
pub fn hits(learned: &[u64], tested: &[u64], sizes: &[u64], budgets: &[u64]) -> Vec<u64> {
    let mut order: Vec<usize> = (0..sizes.len()).filter(|key| learned[*key] > 0).collect();
    // By count / size, without rounding; of equals the first expert.
    order.sort_by_key(|key| *key);
    order.sort_by(|a, b| {
        let of = |x: usize, y: usize| u128::from(learned[x]) * u128::from(sizes[y]);
        of(*b, *a).cmp(&of(*a, *b))
    });
    let held = |budget: &u64| {
        let mut left = *budget;
        let mut hits = 0;
        for key in &order {
            if let Some(rest) = left.checked_sub(sizes[*key]) {
                left = rest;
                hits += tested[*key];
            }
        }
        hits
    };
    budgets.iter().map(held).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_most_lookups_per_byte_is_held_as_far_as_it_fits() {
        let (counts, sizes) = ([10, 9, 8, 0], [4, 2, 2, 1]);
        for (budget, expected) in [(1, 0), (2, 9), (4, 17), (7, 17), (8, 27), (100, 27)] {
            assert_eq!(hits(&counts, &counts, &sizes, &[budget]), [expected]);
        }
        // What is too large is passed over for what fits.
        assert_eq!(hits(&[9, 1], &[5, 3], &[8, 1], &[4]), [3]);
    }
}
