//! Optimizer of one value per task (GradNorm's weights, uncertainty's log-variances): Adam (Kingma & Ba 2015) with
//! betas 0.9 and 0.999 and epsilon 1e-8, or plain SGD. No weight decay, no schedule; absent tasks are unchanged.

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::{from_json, mask, to_json};

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
}

/// What a kernel needs from a [`WeightOptimizer`].
pub struct KernelInputs<'a> {
    /// Learning rate, both betas, epsilon.
    pub numbers: [f64; 4],
    pub moments: [&'a Tensor; 2],
    pub steps: &'a Tensor,
}

impl WeightOptimizer {
    pub fn new(kind: WeightOptimizerKind, learning_rate: f64, n: usize, device: Device) -> Self {
        let zeros = || Tensor::zeros([n as i64], (Kind::Double, device));
        WeightOptimizer { kind, learning_rate, first: zeros(), second: zeros(), steps: zeros() }
    }

    /// `values` `[T]` after one descent step along `gradient` `[T]`. Values of absent tasks are unchanged; all are
    /// unchanged if `gradient` is not finite.
    pub fn step(&mut self, values: &Tensor, gradient: &Tensor, present: &[bool]) -> Tensor {
        let device = values.device();
        let here = mask(present, device).gt(0.0).logical_and(&gradient.sum(Kind::Double).isfinite());
        let moved = match self.kind {
            WeightOptimizerKind::Sgd => values - gradient * self.learning_rate,
            WeightOptimizerKind::Adam => {
                self.steps = &self.steps + here.to_kind(Kind::Double);
                let first = &self.first * BETAS.0 + gradient * (1.0 - BETAS.0);
                let second = &self.second * BETAS.1 + gradient.square() * (1.0 - BETAS.1);
                self.first = first.where_self(&here, &self.first);
                self.second = second.where_self(&here, &self.second);
                let correction = |beta: f64| -> Tensor { 1.0 - Tensor::pow_scalar(beta, &self.steps.clamp_min(1.0)) };
                let (mean, variance) = (&self.first / correction(BETAS.0), &self.second / correction(BETAS.1));
                values - mean / (variance.sqrt() + EPSILON) * self.learning_rate
            }
        };
        moved.where_self(&here, values)
    }

    /// Inputs for a kernel that takes the step and updates moments and steps in place.
    pub fn for_kernel(&self) -> KernelInputs<'_> {
        KernelInputs {
            numbers: [self.learning_rate, BETAS.0, BETAS.1, EPSILON],
            moments: [&self.first, &self.second],
            steps: &self.steps,
        }
    }

    pub fn save(&self) -> Value {
        json!({"first": to_json(&self.first), "second": to_json(&self.second), "steps": to_json(&self.steps)})
    }

    pub fn load(&mut self, state: &Value) -> Result<()> {
        let (n, device) = (self.first.numel(), self.first.device());
        self.first = from_json(state, "first", n, device)?;
        self.second = from_json(state, "second", n, device)?;
        self.steps = from_json(state, "steps", n, device)?;
        Ok(())
    }
}
