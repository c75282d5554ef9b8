//! Words seen once in training become the unknown token now and then, so that its embedding gets trained.
//!
//! Source: Lample 2016 ("Neural Architectures for Named Entity Recognition"), section 4.1, with probability 0.5.

use tch::{Device, Tensor};

use crate::data::EncodedSet;
use crate::libtorch::{Draws, bernoulli};

pub struct UnknownWords {
    /// True for tokens that the training set holds once, [vocabulary].
    singletons: Tensor,
    rate: f64,
    unknown: i64,
}

impl UnknownWords {
    /// `None` when nothing is to be replaced.
    pub fn new(train: &EncodedSet, n_tokens: usize, unknown: u32, rate: f64, device: Device) -> Option<Self> {
        let mut counts = vec![0u32; n_tokens];
        for &id in &train.token_ids {
            counts[id as usize] += 1;
        }
        let singletons: Vec<bool> = counts.iter().map(|&count| count == 1).collect();
        let any = rate > 0.0 && singletons.contains(&true);
        any.then(|| UnknownWords {
            singletons: Tensor::from_slice(&singletons).to_device(device),
            rate,
            unknown: unknown.into(),
        })
    }

    /// [B, T] ids with some replaced.
    pub fn replace(&self, token_ids: &Tensor, draws: Draws) -> Tensor {
        let drawn = bernoulli(&token_ids.size(), self.rate, draws, token_ids.device()).gt(0.5);
        token_ids.masked_fill(&self.singletons.take(token_ids).logical_and(&drawn), self.unknown)
    }
}
