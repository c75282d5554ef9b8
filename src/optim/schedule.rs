//! Learning-rate schedules: one factor per step.
//!
//! With s the step from 0, w warm-up steps and n steps in all: (s + 1) / w while s < w, then with
//! p = (s - w) / (n - w): constant 1; linear 1 - p; cosine (1 + cos(pi p)) / 2. Range, without warm-up:
//! f^(s / (n - 1)), f the final factor.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the learning rate changes over the steps. Default `linear`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleConfig {
    /// Constant after the warm-up.
    Constant(WarmupConfig),
    /// Falls linearly after the warm-up, to 0 after the last step.
    Linear(WarmupConfig),
    /// Falls along half a cosine after the warm-up, to 0 after the last step (Loshchilov & Hutter 2017).
    Cosine(WarmupConfig),
    /// Changes by the same factor at every step, up or down.
    Range(RangeConfig),
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        ScheduleConfig::Linear(WarmupConfig::default())
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct WarmupConfig {
    /// Fraction of all steps over which the learning rate rises from 0. Default 0.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub warmup_fraction: f64,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RangeConfig {
    /// Factor of the learning rate at the last step.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub final_factor: f64,
}

impl ScheduleConfig {
    pub fn warmup_fraction(&self) -> f64 {
        match self {
            ScheduleConfig::Range(_) => 0.0,
            ScheduleConfig::Constant(c) | ScheduleConfig::Linear(c) | ScheduleConfig::Cosine(c) => c.warmup_fraction,
        }
    }

    /// The factor at `step` (from 0) of `n_steps`.
    pub fn factor(&self, step: usize, n_steps: usize) -> f64 {
        let warmup = (self.warmup_fraction() * n_steps as f64).round() as usize;
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let progress = ((step - warmup) as f64 / (n_steps - warmup).max(1) as f64).min(1.0);
        match self {
            ScheduleConfig::Constant(_) => 1.0,
            ScheduleConfig::Range(config) => config.final_factor.powf(step as f64 / (n_steps.max(2) - 1) as f64),
            ScheduleConfig::Linear(_) => 1.0 - progress,
            ScheduleConfig::Cosine(_) => (1.0 + (std::f64::consts::PI * progress).cos()) / 2.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_rise_and_fall() {
        let warmup = WarmupConfig { warmup_fraction: 0.1 };
        let linear = ScheduleConfig::Linear(warmup.clone());
        let factors: Vec<f64> = [0, 9, 10, 55, 99].iter().map(|&step| linear.factor(step, 100)).collect();
        assert_eq!(factors, [0.1, 1.0, 1.0, 0.5, 1.0 - 89.0 / 90.0]);
        let cosine = ScheduleConfig::Cosine(warmup);
        assert!((cosine.factor(55, 100) - 0.5).abs() < 1e-12 && (cosine.factor(40, 100) - 0.75).abs() < 1e-12);
        let range = ScheduleConfig::Range(RangeConfig { final_factor: 1e4 });
        assert!((range.factor(50, 101) - 100.0).abs() < 1e-9 && (range.factor(100, 101) - 1e4).abs() < 1e-6);
        assert_eq!(ScheduleConfig::Constant(WarmupConfig::default()).factor(70, 100), 1.0);
    }
}
