//! The optimizer of one number a task (GradNorm's weights, uncertainty's log-variances): Adam (Kingma & Ba 2015) with
//! betas 0.9 and 0.999 and epsilon 1e-8, or plain SGD. No weight decay, no schedule; absent tasks stay as they are.

use anyhow::{Context, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::{from_json, mask, to_json, vector};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AdaptBy {
    #[default]
    Adam,
    Sgd,
}

const BETAS: (f64, f64) = (0.9, 0.999);
const EPSILON: f64 = 1e-8;

pub struct Adapter {
    by: AdaptBy,
    learning_rate: f64,
    first: Tensor,
    second: Tensor,
    /// Steps that each task has had.
    steps: Vec<i32>,
}

/// What a kernel needs of an [`Adapter`].
pub struct KernelInputs<'a> {
    /// Learning rate, both betas, epsilon.
    pub numbers: [f64; 4],
    /// What the moments are divided by, by task.
    pub corrections: [Vec<f64>; 2],
    pub moments: [&'a Tensor; 2],
}

impl Adapter {
    pub fn new(by: AdaptBy, learning_rate: f64, n: usize, device: Device) -> Self {
        let zeros = || Tensor::zeros([n as i64], (Kind::Double, device));
        Adapter { by, learning_rate, first: zeros(), second: zeros(), steps: vec![0; n] }
    }

    /// `values` `[T]` after one step against `gradient` `[T]`; those of absent tasks are unchanged, and all are where `gradient` is
    /// not finite.
    pub fn step(&mut self, values: &Tensor, gradient: &Tensor, present: &[bool]) -> Tensor {
        let device = values.device();
        let here = mask(present, device).gt(0.0).logical_and(&gradient.sum(Kind::Double).isfinite());
        let moved = match self.by {
            AdaptBy::Sgd => values - gradient * self.learning_rate,
            AdaptBy::Adam => {
                self.count(present);
                let first = &self.first * BETAS.0 + gradient * (1.0 - BETAS.0);
                let second = &self.second * BETAS.1 + gradient.square() * (1.0 - BETAS.1);
                self.first = first.where_self(&here, &self.first);
                self.second = second.where_self(&here, &self.second);
                let [of_first, of_second] = self.corrections().map(|values| vector(&values, device));
                let (mean, variance) = (&self.first / of_first, &self.second / of_second);
                values - mean / (variance.sqrt() + EPSILON) * self.learning_rate
            }
        };
        moved.where_self(&here, values)
    }

    /// Notes a step of the tasks present.
    fn count(&mut self, present: &[bool]) {
        for (steps, &present) in self.steps.iter_mut().zip(present) {
            *steps += i32::from(present);
        }
    }

    /// What Adam's moments are divided by, by task.
    fn corrections(&self) -> [Vec<f64>; 2] {
        [BETAS.0, BETAS.1].map(|beta| self.steps.iter().map(|&n| 1.0 - beta.powi(n.max(1))).collect())
    }

    /// For a step that a kernel takes, which changes the moments in place.
    pub fn for_kernel(&mut self, present: &[bool]) -> KernelInputs<'_> {
        if self.by == AdaptBy::Adam {
            self.count(present);
        }
        KernelInputs {
            numbers: [self.learning_rate, BETAS.0, BETAS.1, EPSILON],
            corrections: self.corrections(),
            moments: [&self.first, &self.second],
        }
    }

    pub fn save(&self) -> Value {
        json!({"first": to_json(&self.first), "second": to_json(&self.second), "steps": self.steps})
    }

    pub fn load(&mut self, state: &Value) -> Result<()> {
        let (n, device) = (self.steps.len(), self.first.device());
        self.first = from_json(state, "first", n, device)?;
        self.second = from_json(state, "second", n, device)?;
        self.steps = serde_json::from_value(state["steps"].clone()).context("`steps` is missing or damaged")?;
        Ok(())
    }
}
