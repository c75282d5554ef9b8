//! w = T softmax((1 / L) / temperature), L the step's losses, held constant.
//!
//! UW-SO: Kirchdorfer, Elich, Kutsche, Stuckenschmidt, Schott, Köhler 2024 (arXiv 2408.07985), eq. 8.
//! Differs from the paper in: weights sum to the number of tasks present, not to 1, so that one learning rate fits all
//! strategies.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{LossWeighting, Present, Wants};

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct UncertaintySoftmaxConfig {
    /// Small values favour the task with the smallest loss; large values approach equal weights. Default 1.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub temperature: f64,
}

impl Default for UncertaintySoftmaxConfig {
    fn default() -> Self {
        UncertaintySoftmaxConfig { temperature: 1.0 }
    }
}

/// Smaller losses are clamped to it, so that 1 / L stays finite.
const SMALLEST_LOSS: f64 = 1e-12;

pub struct UncertaintySoftmax {
    pub temperature: f64,
}

impl LossWeighting for UncertaintySoftmax {
    fn wants(&self, _: usize) -> Wants {
        Wants::Losses
    }

    fn learns(&self) -> bool {
        false
    }

    fn weights(&self, present: &Present, losses: Option<&Tensor>) -> Tensor {
        let losses = losses.expect("invariant: the caller gives what is wanted");
        let mut logits = losses.clamp_min(SMALLEST_LOSS).reciprocal() / self.temperature;
        if present.flags.contains(&false) {
            logits = logits.masked_fill(&present.mask.eq(0.0), f64::NEG_INFINITY);
        }
        logits.softmax(0, Kind::Double) * present.count() as f64
    }
}
