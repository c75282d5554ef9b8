//! w = T softmax(r / temperature), r_i = L_i(t-1) / L_i(t-2), L_i(t) the mean training loss of task i over epoch t.
//!
//! Dynamic weight average: Liu, Johns, Davison 2019 (arXiv 1803.10704), eq. 7. In the first two epochs r = 1.
//! Differs from the paper in: a task that was absent from an epoch keeps r = 1 until it has two epochs to compare.

use anyhow::{Context, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::{LossWeighting, Observed, Present, load_into, numbers, to_json, vector};

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DwaConfig {
    /// Large values approach equal weights. Default 2.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub temperature: f64,
}

impl Default for DwaConfig {
    fn default() -> Self {
        DwaConfig { temperature: 2.0 }
    }
}

pub struct Dwa {
    temperature: f64,
    weights: Tensor,
    /// Each task's summed losses in this epoch, and the number of steps that had it.
    sums: Tensor,
    counts: Vec<u32>,
    /// Mean losses of the last epoch and of the one before it.
    history: [Vec<Option<f64>>; 2],
}

impl Dwa {
    pub fn new(config: &DwaConfig, n: usize, device: Device) -> Self {
        Dwa {
            temperature: config.temperature,
            weights: Tensor::ones([n as i64], (Kind::Double, device)),
            sums: Tensor::zeros([n as i64], (Kind::Double, device)),
            counts: vec![0; n],
            history: [vec![None; n], vec![None; n]],
        }
    }

    /// The weights after the epochs in `history`.
    fn weigh(&mut self) -> Result<()> {
        let weights = (self.rates() / self.temperature).softmax(0, Kind::Double) * self.counts.len() as f64;
        Ok(self.weights.f_copy_(&weights)?)
    }

    fn rates(&self) -> Tensor {
        let rate = |(last, before): (&Option<f64>, &Option<f64>)| match (last, before) {
            (Some(last), Some(before)) if *before > 0.0 => last / before,
            _ => 1.0,
        };
        let rates: Vec<f64> = self.history[0].iter().zip(&self.history[1]).map(rate).collect();
        vector(&rates, self.sums.device())
    }
}

impl LossWeighting for Dwa {
    fn prepare(&mut self, _: usize, present: &Present) -> Result<bool> {
        for (count, &present) in self.counts.iter_mut().zip(&present.flags) {
            *count += u32::from(present);
        }
        Ok(true)
    }

    fn weights(&self, _: &Present, _: Option<&Tensor>) -> Tensor {
        self.weights.shallow_clone()
    }

    fn learn(&mut self, step: &Observed) -> Result<()> {
        let _ = self.sums.f_add_(step.losses)?;
        Ok(())
    }

    fn epoch_ended(&mut self) -> Result<()> {
        let sums = numbers(&self.sums);
        let means = sums.iter().zip(&self.counts).map(|(sum, &n)| (n > 0).then(|| sum / f64::from(n)));
        let means: Vec<Option<f64>> = means.collect();
        self.history.swap(0, 1);
        self.history[0] = means;
        let _ = self.sums.f_zero_()?;
        self.counts.fill(0);
        self.weigh()
    }

    fn details(&self) -> Vec<(&'static str, Tensor)> {
        vec![("loss_ratio", self.rates())]
    }

    fn save(&self) -> Value {
        json!({"sums": to_json(&self.sums), "counts": self.counts, "history": self.history})
    }

    fn load(&mut self, state: &Value) -> Result<()> {
        load_into(&mut self.sums, state, "sums")?;
        self.counts = serde_json::from_value(state["counts"].clone()).context("`counts` is missing or damaged")?;
        self.history = serde_json::from_value(state["history"].clone()).context("`history` is missing or damaged")?;
        self.weigh()
    }
}
