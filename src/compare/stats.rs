//! Means, standard deviations and confidence intervals over few seeds.

use serde::Serialize;
use statrs::distribution::{ContinuousCDF, StudentsT};
use statrs::statistics::Statistics;

/// A mean of `n` values with the 95 % confidence interval of Student's t; no interval with fewer than two different values.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    pub n: usize,
    pub mean: f64,
    pub low: Option<f64>,
    pub high: Option<f64>,
}

/// A standard deviation below this, relative to the largest value (at least 1), is rounding error.
const ROUNDING: f64 = 1e-9;

pub fn mean(values: &[f64]) -> f64 {
    values.mean()
}

/// Sample standard deviation, with n - 1; `None` for fewer than two values.
pub fn deviation(values: &[f64]) -> Option<f64> {
    (values.len() > 1).then(|| values.std_dev())
}

pub fn estimate(values: &[f64]) -> Estimate {
    let center = mean(values);
    let half = deviation(values).and_then(|sd| {
        let n = values.len() as f64;
        let t = StudentsT::new(0.0, 1.0, n - 1.0).ok()?.inverse_cdf(0.975);
        // Few seeds can agree by chance, which says nothing about the spread of others. Equal differences can differ by
        // rounding.
        let largest = values.iter().fold(1.0, |largest: f64, value| largest.max(value.abs()));
        (sd > ROUNDING * largest).then(|| t * sd / n.sqrt())
    });
    Estimate {
        n: values.len(),
        mean: center,
        low: half.map(|half| center - half),
        high: half.map(|half| center + half),
    }
}

/// delta-m: the mean over tasks of (multi - single) / single, for scores where higher is better (Maninis, Radosavovic,
/// Kokkinos 2019, arXiv 1904.08918, eq. 4). `pairs` are (multi, single).
pub fn delta_m(pairs: &[(f64, f64)]) -> f64 {
    mean(&pairs.iter().map(|(multi, single)| (multi - single) / single).collect::<Vec<_>>())
}

/// The share of the data that a score needs, as far as the learning curve shows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Needed {
    Share(f64),
    /// The curve's smallest share is already as good.
    AtMost(f64),
    /// Not reached up to the curve's largest share.
    MoreThan(f64),
}

/// The share of the data at which a curve of (share, score), by ascending share, first reaches `score`, interpolated
/// linearly over log share. `None` for a curve of fewer than two shares.
pub fn share_that_reaches(curve: &[(f64, f64)], score: f64) -> Option<Needed> {
    let (&(smallest, first), &(largest, _)) = (curve.first()?, curve.last()?);
    if smallest == largest {
        return None;
    }
    if first >= score {
        return Some(Needed::AtMost(smallest));
    }
    let Some(step) = curve.windows(2).find(|pair| pair[0].1 < score && pair[1].1 >= score) else {
        return Some(Needed::MoreThan(largest));
    };
    let ((x0, y0), (x1, y1)) = (step[0], step[1]);
    Some(Needed::Share((x0.ln() + (x1.ln() - x0.ln()) * (score - y0) / (y1 - y0)).exp()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        let golden = delta_m(&[(0.91, 0.90), (0.76, 0.80)]);
        assert!((golden + 0.019444).abs() < 1e-6, "{golden}");
        // t(0.975, 2) = 4.302653; the standard deviation of 1, 2, 3 is 1.
        let found = estimate(&[1.0, 2.0, 3.0]);
        assert!((found.high.unwrap() - (2.0 + 4.302653 / 3f64.sqrt())).abs() < 1e-5, "{found:?}");
        assert_eq!(estimate(&[1.0]), Estimate { n: 1, mean: 1.0, low: None, high: None });
        // Four more correct of 500 with every seed; in floating point these differences differ in the last digit.
        let alike = [(470, 466), (468, 464), (475, 471)].map(|(a, b)| f64::from(a) / 500.0 - f64::from(b) / 500.0);
        assert!(alike[0] != alike[2] && estimate(&alike).low.is_none(), "{alike:?}");
    }

    #[test]
    fn shares_are_read_off_the_curve() {
        let curve = [(0.01, 0.2), (0.1, 0.4), (1.0, 0.8)];
        let found = share_that_reaches(&curve, 0.6);
        assert!(matches!(found, Some(Needed::Share(share)) if (share - 0.1 * 10f64.sqrt()).abs() < 1e-9), "{found:?}");
        assert_eq!(share_that_reaches(&curve, 0.9), Some(Needed::MoreThan(1.0)));
        assert_eq!(share_that_reaches(&curve, 0.1), Some(Needed::AtMost(0.01)));
        assert_eq!(share_that_reaches(&curve[..1], 0.1), None);
    }
}
