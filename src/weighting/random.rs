//! w = T softmax(z), z ~ N(0, 1) drawn each step.
//!
//! Random loss weighting: Lin, Ye, Zhang, Tsang 2022 (arXiv 2111.10603), eq. 3 with normal z. A strategy that does not
//! beat it has learned nothing. Absent tasks do not change the weights of the others; each weight has mean 1.

use rand_distr::{Distribution, StandardNormal};
use tch::{Device, Kind, Tensor};

use super::{LossWeighting, vector};
use crate::rng::{Purpose, Seed};

pub struct Random {
    pub seed: Seed,
    pub device: Device,
    pub n: usize,
}

impl LossWeighting for Random {
    fn learns(&self) -> bool {
        false
    }

    fn weights(&self, step: usize, _: &[bool], _: Option<&Tensor>) -> Tensor {
        let mut generator = self.seed.generator(Purpose::Weighting, step as u64);
        let draws: Vec<f64> = (0..self.n).map(|_| StandardNormal.sample(&mut generator)).collect();
        vector(&draws, self.device).softmax(0, Kind::Double) * self.n as f64
    }
}
