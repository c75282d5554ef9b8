//! total = sum_i exp(-s_i) L_i + s_i / 2, s_i = log sigma_i^2; so w_i = exp(-s_i) and ds_i = 1/2 - exp(-s_i) L_i.
//!
//! Kendall, Gal, Cipolla 2018 (arXiv 1705.07115), eq. 10, the form for classification. Optimum: w_i = 1 / (2 L_i).
//! Differs from the paper in: s has its own optimizer (Adam, its own learning rate, no decay, no schedule), and s_i
//! does not change in steps without the task, where it would only decrease.

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::optimizer::WeightOptimizer;
use super::{LossWeighting, Observed, Present, WeightOptimizerKind, load_into, to_json};
use crate::libtorch::{Kernel, sources};

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct UncertaintyConfig {
    /// Learning rate of s = log sigma^2. Default 0.01.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub learning_rate: f64,
    /// Optimizer of s: `adam` or `sgd`. Default `adam`.
    pub optimizer: WeightOptimizerKind,
}

impl Default for UncertaintyConfig {
    fn default() -> Self {
        UncertaintyConfig { learning_rate: 0.01, optimizer: WeightOptimizerKind::Adam }
    }
}

pub struct Uncertainty {
    log_variances: Tensor,
    /// exp(-s)
    weights: Tensor,
    optimizer: WeightOptimizer,
}

static KERNEL: Kernel = Kernel::new(sources::WEIGHTING, "uncertainty");

impl Uncertainty {
    pub fn new(config: &UncertaintyConfig, n: usize, device: Device) -> Self {
        Uncertainty {
            log_variances: Tensor::zeros([n as i64], (Kind::Double, device)),
            weights: Tensor::ones([n as i64], (Kind::Double, device)),
            optimizer: WeightOptimizer::new(config.optimizer, config.learning_rate, n, device),
        }
    }

    /// Replaces s, `[T]`.
    pub(super) fn set(&mut self, log_variances: &Tensor) -> Result<()> {
        self.log_variances.f_copy_(log_variances)?;
        self.weigh()
    }

    fn weigh(&mut self) -> Result<()> {
        Ok(self.weights.f_copy_(&self.log_variances.neg().exp())?)
    }

    fn learn_by_kernel(&self, step: &Observed) -> Result<()> {
        let tensors = [step.losses, &step.present.mask, &self.log_variances, &self.weights];
        self.optimizer.launch(&KERNEL, &tensors)
    }

    /// d total / ds, `[T]`.
    pub(super) fn gradient(&self, losses: &Tensor) -> Tensor {
        0.5 - self.log_variances.neg().exp() * losses
    }
}

impl LossWeighting for Uncertainty {
    fn weights(&self, _: &Present, _: Option<&Tensor>) -> Tensor {
        self.weights.shallow_clone()
    }

    fn learn(&mut self, step: &Observed) -> Result<()> {
        if KERNEL.serves(step.losses.device()) {
            return self.learn_by_kernel(step);
        }
        let gradient = self.gradient(step.losses);
        let moved = self.optimizer.step(&self.log_variances, &gradient, step.present)?;
        self.set(&moved)
    }

    fn details(&self) -> Vec<(&'static str, Tensor)> {
        vec![("sigma", (&self.log_variances * 0.5).exp())]
    }

    fn save(&self) -> Value {
        json!({"log_variances": to_json(&self.log_variances), "optimizer": self.optimizer.save()})
    }

    fn load(&mut self, state: &Value) -> Result<()> {
        load_into(&mut self.log_variances, state, "log_variances")?;
        self.weigh()?;
        self.optimizer.load(&state["optimizer"])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weighting::numbers;

    #[test]
    fn the_kernel_computes_what_operators_do() {
        for optimizer in [WeightOptimizerKind::Adam, WeightOptimizerKind::Sgd] {
            let config = UncertaintyConfig { optimizer, learning_rate: 0.1 };
            let [ours, mut theirs] = [0, 1].map(|_| Uncertainty::new(&config, 3, Device::Cpu));
            tch::manual_seed(8);
            for step in 0..12 {
                let present = Present::new(&[true, step % 3 != 1, step % 4 != 2], Device::Cpu);
                let mut losses = Tensor::rand([3], (Kind::Double, Device::Cpu)) * &present.mask;
                if step == 5 {
                    losses *= f64::NAN;
                }
                let seen = Observed { losses: &losses, present: &present, norms: None };
                ours.learn_by_kernel(&seen).unwrap();
                theirs.observe(step, &seen).unwrap();
                for (a, b) in [(&ours.log_variances, &theirs.log_variances), (&ours.weights, &theirs.weights)] {
                    assert!(a.allclose(b, 1e-12, 1e-12, false), "step {step}: {:?} {:?}", numbers(a), numbers(b));
                }
            }
            assert!(numbers(&ours.log_variances).iter().all(|&s| s != 0.0));
        }
    }
}
