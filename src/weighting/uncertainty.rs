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
use super::{LossWeighting, Observed, WeightOptimizerKind, from_json, to_json};

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
    pub(super) log_variances: Tensor,
    pub(super) optimizer: WeightOptimizer,
}

impl Uncertainty {
    pub fn new(config: &UncertaintyConfig, n: usize, device: Device) -> Self {
        Uncertainty {
            log_variances: Tensor::zeros([n as i64], (Kind::Double, device)),
            optimizer: WeightOptimizer::new(config.optimizer, config.learning_rate, n, device),
        }
    }

    /// d total / ds, `[T]`.
    pub(super) fn gradient(&self, losses: &Tensor) -> Tensor {
        0.5 - self.log_variances.neg().exp() * losses
    }
}

impl LossWeighting for Uncertainty {
    fn weights(&self, _: usize, _: &[bool], _: Option<&Tensor>) -> Tensor {
        self.log_variances.neg().exp()
    }

    fn learn(&mut self, step: &Observed) -> Result<()> {
        let gradient = self.gradient(step.losses);
        self.log_variances = self.optimizer.step(&self.log_variances, &gradient, step.present);
        Ok(())
    }

    fn details(&self) -> Vec<(&'static str, Tensor)> {
        vec![("sigma", (&self.log_variances * 0.5).exp())]
    }

    fn save(&self) -> Value {
        json!({"log_variances": to_json(&self.log_variances), "optimizer": self.optimizer.save()})
    }

    fn load(&mut self, state: &Value) -> Result<()> {
        let n = self.log_variances.numel();
        self.log_variances = from_json(state, "log_variances", n, self.log_variances.device())?;
        self.optimizer.load(&state["optimizer"])
    }
}
