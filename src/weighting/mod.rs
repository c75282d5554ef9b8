//! Loss weighting: how the task losses of a step become one. Strategies know losses, not models.

mod equal;
mod fixed;

use anyhow::Result;
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Device, Tensor};

/// The `weighting:` of an experiment; `strategy:` names the variant.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightingConfig {
    /// Every task counts the same: w_i = 1.
    Equal(EqualConfig),
    /// Weights given in the file.
    Fixed(FixedConfig),
}

impl Default for WeightingConfig {
    fn default() -> Self {
        WeightingConfig::Equal(EqualConfig {})
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EqualConfig {}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FixedConfig {
    /// A weight for every task by name, more than 0; scaled so that they sum to the number of tasks.
    pub weights: IndexMap<String, f64>,
}

/// A way to combine the unweighted losses of the tasks present in a step.
pub trait LossWeighting {
    /// The loss to differentiate; absent tasks have no part in it. `losses` by task: scalars in nats.
    fn total(&self, losses: &[Option<Tensor>]) -> Tensor;

    /// Learns from the step that was just taken.
    fn after_backward(&mut self, losses: &[Option<Tensor>]) -> Result<()>;

    /// Current weights by task, priorities included, summing to the number of tasks where priorities are 1.
    fn weights(&self) -> Vec<f64>;

    /// State for a checkpoint; what [`Self::load`] takes.
    fn save(&self) -> Value;

    fn load(&mut self, state: &Value) -> Result<()>;
}

impl WeightingConfig {
    /// The strategy for tasks of these names and priorities.
    pub fn build(&self, names: &[&str], priorities: &[f64]) -> Box<dyn LossWeighting> {
        match self {
            WeightingConfig::Equal(_) => Box::new(equal::equal(priorities)),
            WeightingConfig::Fixed(config) => Box::new(fixed::Fixed::new(config, names, priorities)),
        }
    }
}

/// sum_i w_i L_i over the tasks present, on the losses' device.
fn weighted_sum(losses: &[Option<Tensor>], weights: &[f64]) -> Tensor {
    let present = losses.iter().zip(weights).filter_map(|(loss, &weight)| Some(loss.as_ref()? * weight));
    present.reduce(|a, b| a + b).unwrap_or_else(|| Tensor::zeros([], (tch::Kind::Float, Device::Cpu)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total(config: WeightingConfig, priorities: &[f64], losses: &[Option<f32>]) -> (Vec<f64>, f64) {
        let strategy = config.build(&["a", "b", "c"], priorities);
        let losses: Vec<_> = losses.iter().map(|loss| loss.map(Tensor::from)).collect();
        (strategy.weights(), strategy.total(&losses).double_value(&[]))
    }

    #[test]
    fn equal_and_fixed_weights() {
        let (weights, sum) = total(WeightingConfig::default(), &[1.0, 1.0, 2.0], &[Some(1.0), None, Some(0.5)]);
        assert_eq!((weights, sum), (vec![1.0, 1.0, 2.0], 2.0));
        let weights = [("c", 4.0), ("a", 1.0), ("b", 1.0)].map(|(name, weight)| (name.to_owned(), weight));
        let config = WeightingConfig::Fixed(FixedConfig { weights: weights.into_iter().collect() });
        let (weights, sum) = total(config, &[1.0; 3], &[Some(2.0), Some(2.0), Some(1.0)]);
        assert_eq!((weights, sum), (vec![0.5, 0.5, 2.0], 4.0));
    }
}
