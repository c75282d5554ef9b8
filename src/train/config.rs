//! The `training:` section of an experiment file.

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::{OneOrMany, SamplingConfig};
use crate::model::Precision;
use crate::optim::{OptimizerConfig, ScheduleConfig};

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingConfig {
    /// Sentences per batch. Default 32.
    #[schemars(range(min = 1))]
    pub batch_size: usize,
    /// Batches per step; their gradients add up to that of one large batch. Default 1.
    #[schemars(range(min = 1))]
    pub accumulate_steps: usize,
    /// Largest number of epochs; `sampling` sets what an epoch is. Default 20.
    #[schemars(range(min = 1))]
    pub max_epochs: usize,
    /// Largest number of steps, if it is reached before max_epochs. Default: no limit.
    #[schemars(range(min = 1))]
    pub max_steps: Option<usize>,
    pub optimizer: OptimizerConfig,
    pub schedule: ScheduleConfig,
    /// Limit of the gradient's 2-norm over all parameters; 0 turns it off. Default 5.
    #[schemars(range(min = 0))]
    pub clip_norm: f64,
    /// Decay of the exponential moving average of the weights, which is evaluated and kept in place of the weights; 0
    /// turns it off. It warms up as (1 + t) / (10 + t) after t steps. Default 0.999, which averages over about 1,000
    /// steps.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub ema_decay: f64,
    /// Parts of the model that are frozen for the given number of epochs: `embedding`, `trunk`, `trunk.l0` (one layer,
    /// from 0), `heads.TASK`, or a parameter by its full name. Default: none.
    pub freeze_epochs: IndexMap<String, usize>,
    /// Precision of the trunk's LSTM layers in training: `float32`, `bfloat16`, or `float16` (CUDA only). Weights,
    /// heads, losses and evaluation are always float32. Default `float32`, with TF32 matrix products on CUDA.
    pub precision: Precision,
    /// On CUDA, record steps of the same shape once and replay each as one CUDA graph. Default true.
    pub cuda_graphs: bool,
    /// Whether LSTM layers on the CPU are computed by oneDNN instead of libtorch's step-by-step code; results differ by
    /// rounding. `polytask bench` measures which is faster. Default true.
    pub onednn: bool,
    pub sampling: SamplingConfig,
    pub early_stopping: EarlyStopping,
    /// Steps between records of losses; an epoch with fewer steps has one record. Default 50.
    #[schemars(range(min = 1))]
    pub log_every_steps: usize,
    /// Record the norms of the tasks' gradients, and the cosines between them, with the first record of losses and every
    /// N-th after it (see `log_every_steps`), taken at the highest LSTM layer that all tasks read; 0 turns it off. Default 4.
    pub log_gradients_every: usize,
    /// Steps between checkpoints within an epoch. Default: only at the end of each epoch.
    #[schemars(range(min = 1))]
    pub checkpoint_every_steps: Option<usize>,
}

impl TrainingConfig {
    /// The settings that determine when training ends.
    pub fn end(&self) -> (usize, Option<usize>, Option<usize>) {
        (self.max_epochs, self.max_steps, self.early_stopping.patience_epochs)
    }

    /// Takes from `other` the settings that may change once training has begun.
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
            onednn: true,
            sampling: SamplingConfig::default(),
            early_stopping: EarlyStopping::default(),
            log_every_steps: 50,
            log_gradients_every: 4,
            checkpoint_every_steps: None,
        }
    }
}

/// How the best checkpoint is chosen, and when training stops early.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EarlyStopping {
    /// The score on dev that chooses the best checkpoint: a task's name for its main score (accuracy, or span F1);
    /// another score such as `intent.macro_f1` or `slots.loss`; `mean` of the tasks' main scores; or
    /// `sentence_accuracy`. A list such as `[intent, slots]` counts as the mean of its scores. Ties go to the lower loss.
    /// Default `mean`.
    pub metric: OneOrMany,
    /// Stop training after this many epochs without a better score. Default: never.
    #[schemars(range(min = 1))]
    pub patience_epochs: Option<usize>,
}

impl Default for EarlyStopping {
    fn default() -> Self {
        EarlyStopping { metric: OneOrMany(vec!["mean".to_owned()]), patience_epochs: None }
    }
}
