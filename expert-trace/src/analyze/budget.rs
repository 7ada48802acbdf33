//! A size of a cache, as people write it.

use std::str::FromStr;

use super::cache::MIB;

/// A budget in MiB, which can be a fraction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    mib: f64,
}

impl Budget {
    /// It in bytes.
    pub fn bytes(self) -> u64 {
        (self.mib * MIB).round() as u64
    }
}

impl FromStr for Budget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const LARGEST: f64 = (1_u64 << 40) as f64;
        match text.trim().parse::<f64>() {
            Ok(mib) if mib > 0.0 && mib <= LARGEST => Ok(Self { mib }),
            _ => Err("name MiB, such as 500 or 1500.5; several with commas".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_mib() {
        let bytes = |text: &str| text.parse::<Budget>().map(Budget::bytes).ok();
        assert_eq!(bytes("500"), Some(500 << 20));
        assert_eq!(bytes(" 0.5"), Some(512 << 10));
        for text in ["", "0", "-1", "nan", "inf", "1e300", "4G"] {
            assert_eq!(bytes(text), None, "{text}");
        }
    }
}
