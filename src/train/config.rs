//! The `training:` of an experiment.

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::SamplingConfig;
use crate::model::Precision;
use crate::optim::{OptimizerConfig, ScheduleConfig};

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingConfig {
    /// Sentences a batch. Default 32, at least 1.
    pub batch_size: usize,
    /// Batches a step: their gradients add up to that of one large batch. Default 1, at least 1.
    pub accumulate_steps: usize,
    /// Epochs at most; `sampling` says what an epoch is. Default 20, at least 1.
    pub max_epochs: usize,
    /// Steps at most, should they be fewer than max_epochs. Default: no limit.
    pub max_steps: Option<usize>,
    pub optimizer: OptimizerConfig,
    pub schedule: ScheduleConfig,
    /// Limit of the gradient's 2-norm over all parameters; 0 is off. Default 5.
    pub clip_norm: f64,
    /// Decay of the moving average of the weights, which is evaluated and kept in their place; 0 is off. It rises to this
    /// number, as (1 + t) / (10 + t) after t steps. Default 0.999, which averages over about 1,000 steps; below 1.
    pub ema_decay: f64,
    /// Parts of the model that stay as they are for so many epochs: `embedding`, `trunk`, `trunk.l0` (a layer, from 0),
    /// `heads.TASK`, or a parameter by its whole name. Default: none.
    pub freeze_epochs: IndexMap<String, usize>,
    /// Precision in which the trunk's LSTM layers train: `float32`, `bfloat16`, or `float16` (CUDA alone). Weights, heads and
    /// losses are float32, and so is evaluation. Default `float32`, whose products are TF32 on CUDA.
    pub precision: Precision,
    /// Steps of one shape are recorded once and replayed as one call, on CUDA. Default true.
    pub cuda_graphs: bool,
    /// Whether LSTM layers on the CPU are computed by oneDNN, or by libtorch step by step; numbers differ by rounding. Default:
    /// what is faster, measured when a run begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub onednn: Option<bool>,
    pub sampling: SamplingConfig,
    pub early_stopping: EarlyStopping,
    /// Steps between records of losses; where an epoch has fewer, one record an epoch. Default 50, at least 1.
    pub log_every_steps: usize,
    /// Every `log_every_steps` times so many steps a record also holds the norms of the tasks' gradients at the highest
    /// LSTM layer that all read, and the cosines between them; 0 is off. Default 4.
    pub log_gradients_every: usize,
    /// Steps between checkpoints within an epoch. Default: at the end of each epoch alone.
    pub checkpoint_every_steps: Option<usize>,
}

impl TrainingConfig {
    /// What says when training ends.
    pub fn end(&self) -> (usize, Option<usize>, Option<usize>) {
        (self.max_epochs, self.max_steps, self.early_stopping.patience_epochs)
    }

    /// Takes from another what may change once training has begun.
    pub fn take_changeable(&mut self, other: &TrainingConfig) {
        (self.max_epochs, self.max_steps, self.early_stopping.patience_epochs) = other.end();
        self.log_every_steps = other.log_every_steps;
        self.log_gradients_every = other.log_gradients_every;
        self.checkpoint_every_steps = other.checkpoint_every_steps;
        self.cuda_graphs = other.cuda_graphs;
    }
}

impl Default for TrainingConfig {
    fn default() -> Self {
        TrainingConfig {
            batch_size: 32,
            accumulate_steps: 1,
            max_epochs: 20,
            max_steps: None,
            optimizer: OptimizerConfig::default(),
            schedule: ScheduleConfig::default(),
            clip_norm: 5.0,
            ema_decay: 0.999,
            freeze_epochs: IndexMap::new(),
            precision: Precision::Float32,
            cuda_graphs: true,
            onednn: None,
            sampling: SamplingConfig::default(),
            early_stopping: EarlyStopping::default(),
            log_every_steps: 50,
            log_gradients_every: 4,
            checkpoint_every_steps: None,
        }
    }
}

/// Which checkpoint is best, and when there is no point in going on.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EarlyStopping {
    /// What is best on dev: a task, whose main score counts (accuracy, or F1 of spans); another of its scores, as in
    /// `intent.macro_f1` or `slots.loss`; `mean`, that of the tasks' main scores; or `sentence_accuracy`. Of equal scores the one
    /// with the lower loss is better. Default `mean`.
    pub metric: String,
    /// Epochs without a better score after which training ends. Default: never.
    pub patience_epochs: Option<usize>,
}

impl Default for EarlyStopping {
    fn default() -> Self {
        EarlyStopping { metric: "mean".to_owned(), patience_epochs: None }
    }
}
