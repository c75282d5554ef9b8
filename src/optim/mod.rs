//! Optimizers on libtorch's fused operators, with their state in the open so that a run resumes exactly; schedules.

mod average;
mod schedule;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

pub use average::Average;
pub use schedule::{RangeConfig, ScheduleConfig};

use crate::libtorch::{Adam, AdamLists, Sgd, fused_adam, fused_sgd};

/// The `training.optimizer:` of an experiment; `kind:` names the variant.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerConfig {
    /// Adam with decoupled weight decay (Loshchilov & Hutter 2019).
    Adamw(AdamConfig),
    /// Adam (Kingma & Ba 2015); weight decay is an L2 term of the gradient.
    Adam(AdamConfig),
    /// Stochastic gradient descent with momentum; weight decay is an L2 term of the gradient.
    Sgd(SgdConfig),
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        OptimizerConfig::Adamw(AdamConfig::default())
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamConfig {
    /// Default 2e-3, more than 0.
    pub learning_rate: f64,
    /// Decay rates of the two moments. Default [0.9, 0.999].
    pub betas: (f64, f64),
    /// Default 1e-8.
    pub epsilon: f64,
    /// Default 0.01.
    pub weight_decay: f64,
    /// Whether biases and embeddings decay too. Default false.
    pub decay_all: bool,
}

impl Default for AdamConfig {
    fn default() -> Self {
        AdamConfig { learning_rate: 2e-3, betas: (0.9, 0.999), epsilon: 1e-8, weight_decay: 0.01, decay_all: false }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SgdConfig {
    /// Default 0.1, more than 0.
    pub learning_rate: f64,
    /// Default 0.9, from 0 to below 1.
    pub momentum: f64,
    /// Default 0.
    pub weight_decay: f64,
    /// Whether biases and embeddings decay too. Default false.
    pub decay_all: bool,
}

impl Default for SgdConfig {
    fn default() -> Self {
        SgdConfig { learning_rate: 0.1, momentum: 0.9, weight_decay: 0.0, decay_all: false }
    }
}

impl OptimizerConfig {
    pub fn set_learning_rate(&mut self, rate: f64) {
        match self {
            OptimizerConfig::Adamw(config) | OptimizerConfig::Adam(config) => config.learning_rate = rate,
            OptimizerConfig::Sgd(config) => config.learning_rate = rate,
        }
    }

    fn decay_all(&self) -> bool {
        match self {
            OptimizerConfig::Adamw(config) | OptimizerConfig::Adam(config) => config.decay_all,
            OptimizerConfig::Sgd(config) => config.decay_all,
        }
    }

    pub fn learning_rate(&self) -> f64 {
        match self {
            OptimizerConfig::Adamw(config) | OptimizerConfig::Adam(config) => config.learning_rate,
            OptimizerConfig::Sgd(config) => config.learning_rate,
        }
    }
}

/// Biases, other vectors such as a CRF's first tags, and all of the embedding: their size says nothing of complexity.
fn is_spared(name: &str, parameter: &Tensor) -> bool {
    parameter.dim() < 2 || name.starts_with("embedding.")
}

/// One parameter with what the optimizer remembers of it.
struct Slot {
    name: String,
    parameter: Tensor,
    first: Tensor,
    second: Tensor,
    /// Steps that this parameter has had: a head absent from a step has none.
    step: Tensor,
    decays: bool,
}

pub struct Optimizer {
    config: OptimizerConfig,
    slots: Vec<Slot>,
}

impl Optimizer {
    pub fn new<'a>(config: &OptimizerConfig, parameters: impl Iterator<Item = (&'a str, &'a Tensor)>) -> Self {
        let slot = |(name, parameter): (&str, &Tensor)| Slot {
            name: name.to_owned(),
            parameter: parameter.shallow_clone(),
            first: parameter.detach().zeros_like(),
            second: match config {
                OptimizerConfig::Sgd(_) => Tensor::zeros([0], (Kind::Float, parameter.device())),
                _ => parameter.detach().zeros_like(),
            },
            step: Tensor::zeros([], (Kind::Float, parameter.device())),
            decays: config.decay_all() || !is_spared(name, parameter),
        };
        Optimizer { config: config.clone(), slots: parameters.map(slot).collect() }
    }

    /// One update of the parameters that have a gradient, at `learning_rate`. Where `skip` (one float on the device) is 1,
    /// nothing changes.
    pub fn step(&mut self, gradients: &[Tensor], learning_rate: f64, skip: &Tensor) -> Result<()> {
        for decays in [true, false] {
            self.step_some(gradients, learning_rate, skip, decays)?;
        }
        Ok(())
    }

    /// The update of the parameters that decay, or of those that do not.
    fn step_some(&mut self, gradients: &[Tensor], learning_rate: f64, skip: &Tensor, decays: bool) -> Result<()> {
        let here = |(slot, gradient): &(&Slot, &Tensor)| gradient.defined() && slot.decays == decays;
        let present: Vec<(&Slot, &Tensor)> = self.slots.iter().zip(gradients).filter(here).collect();
        if present.is_empty() {
            return Ok(());
        }
        let decay = |weight_decay: f64| if decays { weight_decay } else { 0.0 };
        let list = |of: fn(&Slot) -> &Tensor| present.iter().map(|(slot, _)| of(slot)).collect::<Vec<&Tensor>>();
        let gradients: Vec<&Tensor> = present.iter().map(|(_, gradient)| *gradient).collect();
        let (parameters, first) = (list(|slot| &slot.parameter), list(|slot| &slot.first));
        match &self.config {
            OptimizerConfig::Adamw(config) | OptimizerConfig::Adam(config) => {
                let lists = AdamLists {
                    parameters: &parameters,
                    gradients: &gradients,
                    first_moments: &first,
                    second_moments: &list(|slot| &slot.second),
                    steps: &list(|slot| &slot.step),
                };
                let adam = Adam {
                    learning_rate,
                    betas: config.betas,
                    epsilon: config.epsilon,
                    weight_decay: decay(config.weight_decay),
                    decoupled: matches!(self.config, OptimizerConfig::Adamw(_)),
                };
                fused_adam(&lists, adam, skip)
            }
            OptimizerConfig::Sgd(config) => {
                let sgd = Sgd { learning_rate, momentum: config.momentum, weight_decay: decay(config.weight_decay) };
                // A zero buffer times momentum plus the gradient is what a first step puts there.
                fused_sgd((&parameters, &gradients, &first), sgd, false, skip)
            }
        }
    }

    /// Moments and step counts by parameter name, for a checkpoint.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let each = |slot: &Slot| {
            [("first", &slot.first), ("second", &slot.second), ("step", &slot.step)]
                .map(|(part, tensor)| (format!("{}.{part}", slot.name), tensor.shallow_clone()))
        };
        self.slots.iter().flat_map(each).collect()
    }

    pub fn load(&mut self, mut state: BTreeMap<String, Tensor>) -> Result<()> {
        for slot in &mut self.slots {
            for (part, tensor) in [("first", &mut slot.first), ("second", &mut slot.second), ("step", &mut slot.step)] {
                let name = format!("{}.{part}", slot.name);
                let value = state.remove(&name).with_context(|| format!("the checkpoint lacks `{name}`"))?;
                anyhow::ensure!(value.size() == tensor.size(), "`{name}` in the checkpoint has another shape");
                tensor.f_copy_(&value)?;
            }
        }
        Ok(())
    }
}
