//! Dropout with a mask per element, or with one mask for all tokens of a sentence ("locked").
//!
//! Locked: y[b, t] = x[b, t] * m[b] / (1 - p), m[b, f] ~ Bernoulli(1 - p) (Gal & Ghahramani 2016, arXiv 1512.05287).
//! Differs from the paper in: only inputs and outputs of layers are dropped, nothing within the recurrence.

use tch::Tensor;

use super::{Mode, Site};
use crate::libtorch::{bernoulli, dropout as dropout_by_kernel};

/// Which elements share a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Masks {
    /// Every element has its own.
    PerElement,
    /// All tokens of a row share one.
    Locked,
}

/// `x` [B, ...], for `Locked` [B, T, F], with a fraction `rate` of its elements set to 0 and the others scaled up;
/// unchanged in evaluation.
pub fn dropout(x: &Tensor, rate: f64, masks: Masks, mode: Mode, site: Site) -> Tensor {
    let Some(draws) = mode.draws(site).filter(|_| rate > 0.0) else { return x.shallow_clone() };
    // A sentence's vector is a sentence of one position.
    let positions = if x.dim() == 2 { x.unsqueeze(1) } else { x.shallow_clone() };
    if let Some(dropped) = dropout_by_kernel(&positions, rate, masks == Masks::Locked, draws) {
        return if x.dim() == 2 { dropped.squeeze_dim(1) } else { dropped };
    }
    let mut size = x.size();
    if masks == Masks::Locked {
        size[1] = 1;
    }
    let mask = bernoulli(&size, 1.0 - rate, draws, x.device()) * (1.0 / (1.0 - rate));
    x * mask.to_kind(x.kind())
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::libtorch::Draws;

    #[test]
    fn a_share_is_dropped_the_rest_scaled_and_a_sentence_may_share_its_mask() {
        let x = Tensor::ones([50, 6, 80], (Kind::Float, Device::Cpu));
        let train = Mode::Train(Draws::new(7));
        for (masks, one_a_row) in [(Masks::Locked, true), (Masks::PerElement, false)] {
            let y = dropout(&x, 0.3, masks, train, Site::Embedding);
            let dropped = y.eq(0.0);
            let share = dropped.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
            assert!((share - 0.3).abs() < 0.03, "{masks:?}: {share}");
            let kept = y.masked_select(&dropped.logical_not());
            assert!((kept - 1.0 / 0.7).abs().max().double_value(&[]) < 1e-6);
            assert_eq!(y == y.narrow(1, 0, 1).expand_as(&y), one_a_row, "{masks:?}");
            assert_ne!(y.get(0), y.get(1), "rows draw by themselves");
            assert_ne!(y, dropout(&x, 0.3, masks, train, Site::Layer(0)), "and so do places");
        }
        assert_eq!(dropout(&x, 0.3, Masks::Locked, Mode::Eval, Site::Embedding), x);
    }
}
