//! Means, spreads and intervals over few seeds.

use serde::Serialize;
use statrs::distribution::{ContinuousCDF, StudentsT};
use statrs::statistics::Statistics;

/// A mean with the 95 % confidence interval of Student's t; no interval with fewer than two different values.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    pub mean: f64,
    pub low: Option<f64>,
    pub high: Option<f64>,
}

pub fn mean(values: &[f64]) -> f64 {
    values.mean()
}

/// The sample's standard deviation, with n - 1; `None` with fewer than two values.
pub fn deviation(values: &[f64]) -> Option<f64> {
    (values.len() > 1).then(|| values.std_dev())
}

pub fn estimate(values: &[f64]) -> Estimate {
    let center = mean(values);
    let half = deviation(values).and_then(|sd| {
        let n = values.len() as f64;
        let t = StudentsT::new(0.0, 1.0, n - 1.0).ok()?.inverse_cdf(0.975);
        // Few seeds may agree by chance: that says nothing of how others would spread.
        (sd > 0.0).then(|| t * sd / n.sqrt())
    });
    Estimate { mean: center, low: half.map(|half| center - half), high: half.map(|half| center + half) }
}

/// delta-m: the mean over tasks of (multi - single) / single, of scores of which more is better (Maninis, Radosavovic,
/// Kokkinos 2019, arXiv 1904.08918, eq. 4). `pairs` are (multi, single).
pub fn delta_m(pairs: &[(f64, f64)]) -> f64 {
    mean(&pairs.iter().map(|(multi, single)| (multi - single) / single).collect::<Vec<_>>())
}

/// How much of the data a score takes, as far as a curve says.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Needed {
    Share(f64),
    /// The curve's smallest share is already as good.
    SmallestOrLess,
    /// Not reached within the curve.
    MoreThanAll,
}

/// The share of the data at which a curve of (share, score), by ascending share, first reaches `score`, read off linearly
/// over log share.
pub fn share_that_reaches(curve: &[(f64, f64)], score: f64) -> Needed {
    if curve.first().is_some_and(|&(_, first)| first >= score) {
        return Needed::SmallestOrLess;
    }
    let Some(step) = curve.windows(2).find(|pair| pair[0].1 < score && pair[1].1 >= score) else {
        return Needed::MoreThanAll;
    };
    let ((x0, y0), (x1, y1)) = (step[0], step[1]);
    Needed::Share((x0.ln() + (x1.ln() - x0.ln()) * (score - y0) / (y1 - y0)).exp())
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
        assert_eq!(estimate(&[1.0]), Estimate { mean: 1.0, low: None, high: None });
    }

    #[test]
    fn shares_are_read_off_the_curve() {
        let curve = [(0.01, 0.2), (0.1, 0.4), (1.0, 0.8)];
        let found = share_that_reaches(&curve, 0.6);
        assert!(matches!(found, Needed::Share(share) if (share - 0.1 * 10f64.sqrt()).abs() < 1e-9), "{found:?}");
        assert_eq!(share_that_reaches(&curve, 0.9), Needed::MoreThanAll);
        assert_eq!(share_that_reaches(&curve, 0.1), Needed::SmallestOrLess);
    }
}
