//! The scale from cold to hot: viridis, of equal steps to the eye, also to one that tells few colours apart
//! (Smith and van der Walt, 2015).

/// Red, green and blue at equal distances, cold first.
const VIRIDIS: [[u8; 3]; 9] = [
    [68, 1, 84],
    [71, 44, 122],
    [59, 81, 139],
    [44, 113, 142],
    [33, 144, 141],
    [39, 173, 129],
    [92, 200, 99],
    [170, 220, 50],
    [253, 231, 37],
];

/// Of an expert that was never chosen.
pub const NEVER: [u8; 3] = [255, 255, 255];

/// The colour of a heat from 0 to 1.
pub fn of(heat: f64) -> [u8; 3] {
    let place = heat.clamp(0.0, 1.0) * (VIRIDIS.len() - 1) as f64;
    let below = (place as usize).min(VIRIDIS.len() - 2);
    let part = place - below as f64;
    let [from, to] = [VIRIDIS[below], VIRIDIS[below + 1]];
    let mixed = |index: usize| {
        let [from, to] = [from[index], to[index]].map(f64::from);
        (from + (to - from) * part).round() as u8
    };
    [mixed(0), mixed(1), mixed(2)]
}

/// The scale as CSS has colours.
pub fn scale() -> Vec<String> {
    VIRIDIS.map(css).to_vec()
}

/// A colour as CSS has it.
pub fn css([red, green, blue]: [u8; 3]) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_go_from_one_end_to_the_other() {
        assert_eq!(of(0.0), VIRIDIS[0]);
        assert_eq!(of(0.5), VIRIDIS[4]);
        assert_eq!(of(1.0), VIRIDIS[8]);
        assert_eq!(of(1.0 / 16.0), [70, 23, 103]);
        assert_eq!(css(of(2.0)), "#fde725");
    }

    /// Lighter is hotter, also without colours.
    #[test]
    fn the_scale_is_one_of_brightness_too() {
        let brightness = |heat: f64| {
            let [red, green, blue] = of(heat).map(f64::from);
            0.2126 * red + 0.7152 * green + 0.0722 * blue
        };
        let steps: Vec<f64> = (0..=100)
            .map(|step| brightness(f64::from(step) / 100.0))
            .collect();
        assert!(steps.is_sorted());
    }
}
