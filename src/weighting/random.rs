//! w = T softmax(z), z ~ N(0, 1) drawn each step.
//!
//! Random loss weighting: Lin, Ye, Zhang, Tsang 2022 (arXiv 2111.10603), eq. 3 with normal z. A strategy that does not
//! beat it has learned nothing. Absent tasks do not change the weights of the others; each weight has mean 1.

use anyhow::Result;
use rand_distr::{Distribution, StandardNormal};
use tch::{Device, Kind, Tensor};

use super::{LossWeighting, Present};
use crate::libtorch::upload_into;
use crate::rng::{Purpose, Seed};

pub struct Random {
    seed: Seed,
    weights: Tensor,
}

impl Random {
    pub fn new(seed: Seed, n: usize, device: Device) -> Self {
        Random { seed, weights: Tensor::ones([n as i64], (Kind::Double, device)) }
    }
}

impl LossWeighting for Random {
    fn learns(&self) -> bool {
        false
    }

    fn prepare(&mut self, step: usize, _: &Present) -> Result<bool> {
        let mut generator = self.seed.generator(Purpose::Weighting, step as u64);
        let shares: Vec<f64> = (0..self.weights.numel())
            .map(|_| {
                let z: f64 = StandardNormal.sample(&mut generator);
                z.exp()
            })
            .collect();
        let scale = shares.len() as f64 / shares.iter().sum::<f64>();
        let bits: Vec<i64> = shares.iter().map(|share| i64::from_ne_bytes((share * scale).to_ne_bytes())).collect();
        upload_into(&bits, &self.weights.view_dtype(Kind::Int64))?;
        Ok(true)
    }

    fn weights(&self, _: &Present, _: Option<&Tensor>) -> Tensor {
        self.weights.shallow_clone()
    }
}
