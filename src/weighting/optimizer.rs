//! Optimizer of one value per task (GradNorm's weights, uncertainty's log-variances): Adam (Kingma & Ba 2015) with
//! betas 0.9 and 0.999 and epsilon 1e-8, or plain SGD. No weight decay, no schedule; absent tasks are unchanged.

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::{Present, load_into, to_json, vector};
use crate::libtorch::{Kernel, LaunchConfig};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WeightOptimizerKind {
    #[default]
    Adam,
    Sgd,
}

const BETAS: (f64, f64) = (0.9, 0.999);
const EPSILON: f64 = 1e-8;

pub struct WeightOptimizer {
    kind: WeightOptimizerKind,
    learning_rate: f64,
    first: Tensor,
    second: Tensor,
    /// Number of steps of each task, `[T]` float64.
    steps: Tensor,
    /// Learning rate, both betas, epsilon.
    rule: Tensor,
}

impl WeightOptimizer {
    pub fn new(kind: WeightOptimizerKind, learning_rate: f64, n: usize, device: Device) -> Self {
        let zeros = || Tensor::zeros([n as i64], (Kind::Double, device));
        let rule = vector(&[learning_rate, BETAS.0, BETAS.1, EPSILON], device);
        WeightOptimizer { kind, learning_rate, first: zeros(), second: zeros(), steps: zeros(), rule }
    }

    /// `values` `[T]` after one descent step along `gradient` `[T]`. Values of absent tasks are unchanged; all are
    /// unchanged if `gradient` is not finite.
    pub fn step(&mut self, values: &Tensor, gradient: &Tensor, present: &Present) -> Result<Tensor> {
        let here = present.mask.gt(0.0).logical_and(&gradient.sum(Kind::Double).isfinite());
        let moved = match self.kind {
            WeightOptimizerKind::Sgd => values - gradient * self.learning_rate,
            WeightOptimizerKind::Adam => {
                let _ = self.steps.f_add_(&here.to_kind(Kind::Double))?;
                let first = &self.first * BETAS.0 + gradient * (1.0 - BETAS.0);
                let second = &self.second * BETAS.1 + gradient.square() * (1.0 - BETAS.1);
                self.first.f_copy_(&first.where_self(&here, &self.first))?;
                self.second.f_copy_(&second.where_self(&here, &self.second))?;
                let correction = |beta: f64| -> Tensor { 1.0 - Tensor::pow_scalar(beta, &self.steps.clamp_min(1.0)) };
                let (mean, variance) = (&self.first / correction(BETAS.0), &self.second / correction(BETAS.1));
                values - mean / (variance.sqrt() + EPSILON) * self.learning_rate
            }
        };
        Ok(moved.where_self(&here, values))
    }

    /// Launches a kernel that takes the step in place, on one thread; `tensors` are its first arguments.
    pub fn launch(&self, kernel: &Kernel, tensors: &[&Tensor]) -> Result<()> {
        let own = [&self.rule, &self.first, &self.second, &self.steps];
        let adam = i64::from(self.kind == WeightOptimizerKind::Adam);
        let shape = LaunchConfig { grid: [1, 1], block: [1, 1], shared: 0 };
        kernel.launch(shape, &[tensors, &own].concat(), &[self.steps.numel() as i64, adam])
    }

    pub fn save(&self) -> Value {
        json!({"first": to_json(&self.first), "second": to_json(&self.second), "steps": to_json(&self.steps)})
    }

    pub fn load(&mut self, state: &Value) -> Result<()> {
        load_into(&mut self.first, state, "first")?;
        load_into(&mut self.second, state, "second")?;
        load_into(&mut self.steps, state, "steps")
    }
}
