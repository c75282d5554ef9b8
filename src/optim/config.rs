//! The `training.optimizer:` section of an experiment file.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::deferred::{Rates, Rule};

/// The optimizer. Default `adamw`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
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

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdamConfig {
    /// Highest learning rate of the schedule. Default 2e-3.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub learning_rate: f64,
    /// Decay rates of the two moment estimates. Default [0.9, 0.999].
    pub betas: (f64, f64),
    /// Added to the square root of the second moment. Default 1e-8.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub epsilon: f64,
    /// Weight decay: decoupled in `adamw`, an L2 term in `adam`. Default 0.01.
    #[schemars(range(min = 0))]
    pub weight_decay: f64,
    /// Apply weight decay to biases, other vectors (such as a CRF's start scores) and the whole `embedding`, characters
    /// included, as well. Default false.
    pub decay_all: bool,
    /// Update only embedding rows whose tokens occur in the step, and that of the unknown token; leave the optimizer
    /// state of the others unchanged. Faster with large vocabularies, but not the same optimizer. Default false.
    pub lazy_rows: bool,
}

impl Default for AdamConfig {
    fn default() -> Self {
        AdamConfig {
            learning_rate: 2e-3,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay: 0.01,
            decay_all: false,
            lazy_rows: false,
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SgdConfig {
    /// Highest learning rate of the schedule. Default 0.1.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub learning_rate: f64,
    /// Momentum: share of the previous step's update that is added to the next. Default 0.9.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub momentum: f64,
    /// Weight decay, as an L2 term of the gradient. Default 0.
    #[schemars(range(min = 0))]
    pub weight_decay: f64,
    /// Apply weight decay to biases, other vectors (such as a CRF's start scores) and the whole `embedding`, characters
    /// included, as well. Default false.
    pub decay_all: bool,
    /// Update only embedding rows whose tokens occur in the step, and that of the unknown token; leave the optimizer
    /// state of the others unchanged. Faster with large vocabularies, but not the same optimizer. Default false.
    pub lazy_rows: bool,
}

impl Default for SgdConfig {
    fn default() -> Self {
        SgdConfig { learning_rate: 0.1, momentum: 0.9, weight_decay: 0.0, decay_all: false, lazy_rows: false }
    }
}

impl OptimizerConfig {
    pub fn set_learning_rate(&mut self, rate: f64) {
        match self {
            OptimizerConfig::Adamw(config) | OptimizerConfig::Adam(config) => config.learning_rate = rate,
            OptimizerConfig::Sgd(config) => config.learning_rate = rate,
        }
    }

    pub(super) fn decay_all(&self) -> bool {
        match self {
            OptimizerConfig::Adamw(config) | OptimizerConfig::Adam(config) => config.decay_all,
            OptimizerConfig::Sgd(config) => config.decay_all,
        }
    }

    pub(super) fn lazy_rows(&self) -> bool {
        match self {
            OptimizerConfig::Adamw(config) | OptimizerConfig::Adam(config) => config.lazy_rows,
            OptimizerConfig::Sgd(config) => config.lazy_rows,
        }
    }

    /// The numbers of step `count` (from 1) at learning rate `rate` that the update of a table row needs.
    pub(super) fn rates(&self, rate: f64, count: f64, decays: bool) -> Rates {
        let decay = |weight_decay: f64| if decays { weight_decay } else { 0.0 };
        let (keep, l2, rule) = match self {
            OptimizerConfig::Adamw(config) | OptimizerConfig::Adam(config) => {
                let (beta1, beta2) = config.betas;
                let (decay, decoupled) = (decay(config.weight_decay), matches!(self, OptimizerConfig::Adamw(_)));
                let rule = Rule::Adam {
                    betas: (beta1 as f32, beta2 as f32),
                    rests: ((1.0 - beta1) as f32, (1.0 - beta2) as f32),
                    size: (rate / (1.0 - beta1.powf(count))) as f32,
                    spread: (1.0 - beta2.powf(count)).sqrt().recip() as f32,
                    epsilon: config.epsilon as f32,
                };
                if decoupled { (1.0 - rate * decay, 0.0, rule) } else { (1.0, decay, rule) }
            }
            OptimizerConfig::Sgd(config) => {
                let rule = Rule::Sgd { momentum: config.momentum as f32, rate: rate as f32 };
                (1.0, decay(config.weight_decay), rule)
            }
        };
        Rates { keep: keep as f32, l2: l2 as f32, rule }
    }

    /// The `Rule` of optimizer.cu: Adam or SGD, decoupled decay, both betas (SGD: momentum), epsilon, decay.
    pub(super) fn rule(&self, decays: bool) -> [f64; 6] {
        let decay = |weight_decay: f64| if decays { weight_decay } else { 0.0 };
        match self {
            OptimizerConfig::Adamw(config) | OptimizerConfig::Adam(config) => {
                let decoupled = f64::from(u8::from(matches!(self, OptimizerConfig::Adamw(_))));
                let (beta1, beta2) = config.betas;
                [1.0, decoupled, beta1, beta2, config.epsilon, decay(config.weight_decay)]
            }
            OptimizerConfig::Sgd(config) => [0.0, 0.0, config.momentum, 0.0, 0.0, decay(config.weight_decay)],
        }
    }

    pub fn learning_rate(&self) -> f64 {
        match self {
            OptimizerConfig::Adamw(config) | OptimizerConfig::Adam(config) => config.learning_rate,
            OptimizerConfig::Sgd(config) => config.learning_rate,
        }
    }
}
