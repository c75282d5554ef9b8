//! Loss weighting: combines the task losses of a step into one. Strategies know losses, not models.
//!
//! T tasks. The network is trained on sum_i p_i w_i L_i with p_i the task's priority and w_i the strategy's weight, held
//! constant: no gradient of a strategy's own loss ever reaches the network. Vectors are float64 on the training device, and
//! stay where they are in memory: a CUDA graph that was recorded in one step computes and updates them in others.

mod config;
mod dwa;
mod fixed;
pub mod golden;
mod gradnorm;
mod optimizer;
mod prioritized;
mod random;
mod uncertainty;
mod uncertainty_softmax;
mod vectors;

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

pub use config::{EqualConfig, FixedConfig, RandomConfig, WeightingConfig};
pub use dwa::DwaConfig;
pub use gradnorm::{GradnormConfig, InitialLoss};
pub use optimizer::WeightOptimizerKind;
pub use prioritized::{WeightReport, Weighting};
pub use uncertainty::UncertaintyConfig;
pub use uncertainty_softmax::UncertaintySoftmaxConfig;

pub use vectors::Present;
use vectors::{load_into, numbers, to_json, vector};

/// Where the norm of a task's gradient is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    /// At the weights of the highest LSTM layer that all tasks read, the paper's last shared layer: needs a backward
    /// pass through that layer for each task.
    LastLayer,
    /// At what a head reads from the trunk, after its mix of layers; almost free.
    #[default]
    Representation,
}

/// What a strategy needs from a step to compute or update its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wants {
    Nothing,
    /// The step's losses, before its weights are computed.
    Losses,
    /// The norms of the tasks' gradients, after the backward pass.
    Norms(Reference),
}

/// A step as a strategy sees it, without gradients. Vectors hold 0 for absent tasks.
pub struct Observed<'a> {
    /// Unweighted losses in nats, `[T]`.
    pub losses: &'a Tensor,
    /// Which tasks have labels in the step.
    pub present: &'a Present,
    /// 2-norms of the unweighted losses' gradients, before clipping, `[T]`; given if requested.
    pub norms: Option<&'a Tensor>,
}

/// A way to weight the losses of the tasks present in a step.
///
/// `weights` and `learn` are work of the device alone: a CUDA graph may repeat it in their place. What the host has to know
/// or to upload is the business of `prepare`.
pub trait LossWeighting {
    /// What step `step` (from 0) needs.
    fn wants(&self, step: usize) -> Wants {
        let _ = step;
        Wants::Nothing
    }

    /// Must be called before step `step` (from 0). Returns whether the device does in it what it does in every later step
    /// with the same tasks and the same [`Wants`].
    fn prepare(&mut self, step: usize, present: &Present) -> Result<bool> {
        let _ = (step, present);
        Ok(true)
    }

    /// The weights of the step, `[T]`, undefined for absent tasks; `losses` `[T]` are given if requested.
    fn weights(&self, present: &Present, losses: Option<&Tensor>) -> Tensor;

    /// Whether [`Self::weights`] are the same in all steps.
    fn constant(&self) -> bool {
        false
    }

    /// Whether [`Self::learn`] has an effect.
    fn learns(&self) -> bool {
        true
    }

    /// Learns from the step that was prepared last.
    fn learn(&mut self, _step: &Observed) -> Result<()> {
        Ok(())
    }

    /// A step without weights.
    fn observe(&mut self, number: usize, step: &Observed) -> Result<()> {
        self.prepare(number, step.present)?;
        self.learn(step)
    }

    fn epoch_ended(&mut self) -> Result<()> {
        Ok(())
    }

    /// Named values per task that explain the weights: `[T]` each, NaN where unknown.
    fn details(&self) -> Vec<(&'static str, Tensor)> {
        Vec::new()
    }

    /// A warning for the user, returned only once.
    fn warning(&mut self) -> Option<String> {
        None
    }

    /// State for a checkpoint, as [`Self::load`] takes it.
    fn save(&self) -> Value {
        Value::Null
    }

    fn load(&mut self, _state: &Value) -> Result<()> {
        Ok(())
    }
}

/// What a strategy knows about a task in advance.
#[derive(Clone, Debug)]
pub struct WeightedTask {
    pub name: String,
    /// Multiplies the weight in every strategy.
    pub priority: f64,
    pub n_labels: usize,
}
