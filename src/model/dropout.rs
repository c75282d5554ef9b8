//! Dropout with one mask a number, or one for all tokens of a sentence.
//!
//! ByRow: y[b, t] = x[b, t] * m[b] / (1 - p), m[b] ~ Bernoulli(1 - p) a feature (Gal & Ghahramani 2016, arXiv 1512.05287).
//! Differs from the paper in: inputs and outputs of layers alone, not within the recurrence.

use tch::Tensor;

use super::{Mode, Site};
use crate::libtorch::bernoulli;

/// What shares a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Masks {
    /// Every number has its own.
    ByToken,
    /// The tokens of a row have one.
    ByRow,
}

/// `x` [B, ...], for `ByRow` [B, T, F], with a share `rate` of its numbers set to 0 and the others scaled up; as it is outside
/// training.
pub fn dropout(x: &Tensor, rate: f64, masks: Masks, mode: Mode, site: Site) -> Tensor {
    let Some(draws) = mode.draws(site).filter(|_| rate > 0.0) else { return x.shallow_clone() };
    let mut size = x.size();
    if masks == Masks::ByRow {
        size[1] = 1;
    }
    let mask = bernoulli(&size, 1.0 - rate, draws, x.device()) * (1.0 / (1.0 - rate));
    x * mask.to_kind(x.kind())
}
