//! w_i = T g_i / sum g, times the task's priority, for weights g given in the experiment file.

use anyhow::Result;
use serde_json::Value;
use tch::Tensor;

use super::{FixedConfig, LossWeighting, weighted_sum};

pub struct Fixed {
    pub(super) weights: Vec<f64>,
}

impl Fixed {
    /// A task that the file leaves out counts 1 before scaling; checking the file is the caller's part.
    pub fn new(config: &FixedConfig, names: &[&str], priorities: &[f64]) -> Self {
        let given: Vec<f64> = names.iter().map(|name| config.weights.get(*name).copied().unwrap_or(1.0)).collect();
        let scale = names.len() as f64 / given.iter().sum::<f64>();
        Fixed { weights: given.iter().zip(priorities).map(|(weight, priority)| weight * scale * priority).collect() }
    }
}

impl LossWeighting for Fixed {
    fn total(&self, losses: &[Option<Tensor>]) -> Tensor {
        weighted_sum(losses, &self.weights)
    }

    fn after_backward(&mut self, _: &[Option<Tensor>]) -> Result<()> {
        Ok(())
    }

    fn weights(&self) -> Vec<f64> {
        self.weights.clone()
    }

    fn save(&self) -> Value {
        Value::Null
    }

    fn load(&mut self, _: &Value) -> Result<()> {
        Ok(())
    }
}
