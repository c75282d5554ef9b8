//! `weighting` of an experiment file.

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DwaConfig, GradnormConfig, UncertaintyConfig, UncertaintySoftmaxConfig};

/// How the losses of the tasks are weighted.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WeightingConfig {
    /// Every task counts the same: w_i = 1. The baseline for all other strategies.
    Equal(EqualConfig),
    /// Constant weights given in the file.
    Fixed(FixedConfig),
    /// Homoscedastic uncertainty (Kendall, Gal, Cipolla 2018).
    Uncertainty(UncertaintyConfig),
    /// Softmax of inverse losses (Kirchdorfer 2024).
    UncertaintySoftmax(UncertaintySoftmaxConfig),
    /// Gradient normalization (Chen 2018).
    Gradnorm(GradnormConfig),
    /// Dynamic weight average (Liu 2019).
    Dwa(DwaConfig),
    /// New random weights at every step (Lin 2022): a baseline that the other strategies must beat.
    Random(RandomConfig),
}

impl Default for WeightingConfig {
    fn default() -> Self {
        WeightingConfig::Equal(EqualConfig {})
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EqualConfig {}

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RandomConfig {}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FixedConfig {
    /// The weight of every task by name, more than 0; the weights are scaled to sum to the number of tasks.
    pub weights: IndexMap<String, f64>,
}
