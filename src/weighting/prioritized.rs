//! A strategy with the priorities of the tasks: what training uses of this module.

use anyhow::{Context, Result};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::{
    LossWeighting, Observed, Present, Wants, WeightedTask, WeightingConfig, dwa, fixed, gradnorm, numbers, random,
    uncertainty, uncertainty_softmax, vector,
};
use crate::rng::Seed;

/// A strategy and the priorities of the tasks.
pub struct Weighting {
    strategy: Box<dyn LossWeighting>,
    priorities: Tensor,
    /// Whether all priorities are 1.
    plain: bool,
    /// p_i w_i, if they never change.
    constant: Option<Tensor>,
    /// Which tasks were present in steps so far, without duplicates.
    known: Vec<Present>,
    /// The place there of the step that was prepared last.
    current: usize,
}

/// Weights for display, scaled so that, with priorities of 1, those of the present tasks sum to their number.
#[derive(Clone, Debug)]
pub struct WeightReport {
    /// NaN for absent tasks.
    pub weights: Vec<f64>,
    /// Named values per task that explain the weights; NaN where unknown.
    pub details: Vec<(&'static str, Vec<f64>)>,
    pub warning: Option<String>,
}

impl Weighting {
    pub fn new(config: &WeightingConfig, tasks: &[WeightedTask], seed: Seed, device: Device) -> Self {
        let n = tasks.len();
        let priorities = tasks.iter().map(|task| task.priority).collect::<Vec<_>>();
        let plain = priorities.iter().all(|&priority| priority == 1.0);
        let priorities = vector(&priorities, device);
        let strategy: Box<dyn LossWeighting> = match config {
            WeightingConfig::Equal(_) => Box::new(fixed::Fixed::equal(n, device)),
            WeightingConfig::Fixed(config) => Box::new(fixed::Fixed::new(config, tasks, device)),
            WeightingConfig::Uncertainty(config) => Box::new(uncertainty::Uncertainty::new(config, n, device)),
            WeightingConfig::UncertaintySoftmax(config) => {
                Box::new(uncertainty_softmax::UncertaintySoftmax { temperature: config.temperature })
            }
            WeightingConfig::Gradnorm(config) => Box::new(gradnorm::Gradnorm::new(config, tasks, device)),
            WeightingConfig::Dwa(config) => Box::new(dwa::Dwa::new(config, n, device)),
            WeightingConfig::Random(_) => Box::new(random::Random::new(seed, n, device)),
        };
        let known = vec![Present::new(&vec![true; n], device)];
        let mut own = Weighting { strategy, priorities, plain, constant: None, known, current: 0 };
        own.constant = own.strategy.constant().then(|| own.weights(None));
        own
    }

    /// The tasks of the step that was prepared last.
    fn present(&self) -> &Present {
        &self.known[self.current]
    }

    pub fn wants(&self, step: usize) -> Wants {
        self.strategy.wants(step)
    }

    /// Must be called before step `step` (from 0), in which the tasks `present` have labels. Returns whether a CUDA graph may
    /// take the place of [`Self::weights`] and [`Self::learn`] in this step, if it was recorded in one with the same tasks and
    /// [`Wants`], of which this is true too.
    pub fn prepare(&mut self, step: usize, present: &[bool]) -> Result<bool> {
        let device = self.priorities.device();
        self.current = self.known.iter().position(|known| known.flags == present).unwrap_or(self.known.len());
        if self.current == self.known.len() {
            self.known.push(Present::new(present, device));
        }
        self.strategy.prepare(step, &self.known[self.current])
    }

    /// p_i w_i of the step, `[T]` float32: factors of the losses.
    pub fn weights(&self, losses: Option<&Tensor>) -> Tensor {
        if let Some(weights) = &self.constant {
            return weights.shallow_clone();
        }
        let weights = self.strategy.weights(self.present(), losses);
        let weights = if self.plain { weights } else { weights * &self.priorities };
        weights.to_kind(Kind::Float)
    }

    pub fn learns(&self) -> bool {
        self.strategy.learns()
    }

    /// Learns from the step's losses and, if requested, norms: see [`Observed`].
    pub fn learn(&mut self, losses: &Tensor, norms: Option<&Tensor>) -> Result<()> {
        self.strategy.learn(&Observed { losses, present: &self.known[self.current], norms })
    }

    pub fn epoch_ended(&mut self) -> Result<()> {
        self.strategy.epoch_ended()
    }

    /// Reports on `weights`, those of the last step. Waits for the device.
    pub fn report(&mut self, weights: &Tensor) -> WeightReport {
        let (weights, present) = (weights.to_kind(Kind::Double), self.present());
        let scale = (&weights / &self.priorities * &present.mask).sum(Kind::Double);
        let scaled = weights * present.count() as f64 / scale;
        let weights = numbers(&scaled.where_self(&present.mask.gt(0.0), &scaled.full_like(f64::NAN)));
        let details = self.strategy.details().into_iter().map(|(name, values)| (name, numbers(&values))).collect();
        WeightReport { weights, details, warning: self.strategy.warning() }
    }

    pub fn save(&self) -> Value {
        self.strategy.save()
    }

    pub fn load(&mut self, state: &Value) -> Result<()> {
        self.strategy.load(state).context("the state of the loss weighting does not fit")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weighting::golden;

    const STRATEGIES: [&str; 8] = [
        r#"{"equal": {}}"#,
        r#"{"uncertainty": {}}"#,
        r#"{"uncertainty": {"optimizer": "sgd"}}"#,
        r#"{"uncertainty_softmax": {}}"#,
        r#"{"gradnorm": {}}"#,
        r#"{"gradnorm": {"initial_loss": {"mean_of_first": 3}, "reference": "last_layer", "update_every": 2}}"#,
        r#"{"gradnorm": {"initial_loss": "log_classes", "optimizer": "sgd", "learning_rate": 1e-12}}"#,
        r#"{"dwa": {}}"#,
    ];

    fn tasks() -> Vec<WeightedTask> {
        ["a", "b", "c"].map(|name| WeightedTask { name: name.into(), priority: 1.0, n_labels: 4 }).into()
    }

    fn build(config: &str) -> Weighting {
        Weighting::new(&serde_json::from_str(config).unwrap(), &tasks(), Seed(3), Device::Cpu)
    }

    /// Runs `steps` with losses and norms computed from the step number; returns the final weights.
    fn run(weighting: &mut Weighting, steps: std::ops::Range<usize>, order: [usize; 3], scale: f64) -> Vec<f64> {
        let mut weights = Vec::new();
        for step in steps {
            let values = |by: f64| order.map(|i| scale * (by + ((step * 3 + i * i) % 7) as f64 / (1.0 + i as f64)));
            let (losses, norms) = (values(0.5), values(0.2));
            let mut present = order.map(|i| (step + i) % 4 != 3);
            present[order.iter().position(|&i| i == 0).unwrap()] = true;
            let keep = |values: [f64; 3]| -> Vec<f64> {
                values.iter().zip(present).map(|(value, present)| if present { *value } else { 0.0 }).collect()
            };
            let losses = vector(&keep(losses), Device::Cpu);
            weighting.prepare(step, &present).unwrap();
            weights = numbers(&weighting.strategy.weights(weighting.present(), Some(&losses)));
            let norms = vector(&keep(norms), Device::Cpu);
            let norms = matches!(weighting.wants(step), Wants::Norms(_)).then_some(&norms);
            weighting.learn(&losses, norms).unwrap();
            if step % 5 == 4 {
                weighting.epoch_ended().unwrap();
            }
        }
        weights
    }

    #[test]
    fn known_answers() {
        for (name, check) in golden::CHECKS {
            check(Device::Cpu).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        }
    }

    #[test]
    fn fixed_weights_are_scaled_to_the_number_of_tasks() {
        let weighting = build(r#"{"fixed": {"weights": {"c": 4, "a": 1, "b": 1}}}"#);
        assert_eq!(numbers(&weighting.weights(None)), [0.5, 0.5, 2.0]);
    }

    #[test]
    fn the_order_of_the_tasks_does_not_matter() {
        for config in STRATEGIES {
            let straight = run(&mut build(config), 0..40, [0, 1, 2], 1.0);
            let turned = run(&mut build(config), 0..40, [2, 0, 1], 1.0);
            for (i, at) in [1, 2, 0].into_iter().enumerate() {
                // Sums in another order: float64 rounding over 40 steps.
                assert!((straight[i] - turned[at]).abs() < 1e-9, "{config}: {straight:?} against {turned:?}");
            }
        }
    }

    #[test]
    fn losses_of_any_size_leave_weights_finite_and_positive() {
        for config in STRATEGIES {
            let ordinary = run(&mut build(config), 0..40, [0, 1, 2], 1.0);
            for scale in [1e-10, 1e-5, 1e5, 1e10] {
                let weights = run(&mut build(config), 0..40, [0, 1, 2], scale);
                assert!(weights.iter().all(|w| w.is_finite() && *w >= 0.0), "{config} at {scale}: {weights:?}");
                // Loss ratios do not depend on the scale, nor does GradNorm with Adam while norms are far above
                // epsilon.
                if config.contains("dwa") || (scale > 1.0 && config == r#"{"gradnorm": {}}"#) {
                    let same = weights.iter().zip(&ordinary).all(|(a, b)| (a - b).abs() < 1e-5 * b);
                    assert!(same, "{config} at {scale}: {weights:?} is not {ordinary:?}");
                }
            }
        }
    }

    #[test]
    fn equal_tasks_stay_equal() {
        for config in STRATEGIES {
            let mut weighting = build(config);
            let same = vector(&[0.7; 3], Device::Cpu);
            for step in 0..20 {
                weighting.prepare(step, &[true; 3]).unwrap();
                weighting.learn(&same, Some(&same)).unwrap();
            }
            let weights = numbers(&weighting.weights(Some(&same)));
            assert!(weights.iter().all(|w| (w - weights[0]).abs() < 1e-12), "{config}: {weights:?}");
        }
    }

    #[test]
    fn saved_state_goes_on_bit_for_bit() {
        for config in STRATEGIES.into_iter().chain([r#"{"random": {}}"#]) {
            let mut whole = build(config);
            let expected = run(&mut whole, 0..40, [0, 1, 2], 1.0);
            let mut first = build(config);
            run(&mut first, 0..17, [0, 1, 2], 1.0);
            let text = first.save().to_string();
            let mut second = build(config);
            second.load(&serde_json::from_str(&text).unwrap()).unwrap();
            assert_eq!(run(&mut second, 17..40, [0, 1, 2], 1.0), expected, "{config}");
        }
    }

    #[test]
    fn random_weights_have_mean_one_and_repeat() {
        let mut weighting = build(r#"{"random": {}}"#);
        let mut draws = |step| {
            weighting.prepare(step, &[true; 3]).unwrap();
            numbers(&weighting.strategy.weights(weighting.present(), None))
        };
        assert_eq!(draws(5), draws(5));
        assert_ne!(draws(5), draws(6));
        assert!((draws(5).iter().sum::<f64>() - 3.0).abs() < 1e-12);
        let mean = (0..4000).map(|step| draws(step)[0]).sum::<f64>() / 4000.0;
        // The standard deviation of one draw is about 0.7, that of the mean 0.011.
        assert!((mean - 1.0).abs() < 0.05, "{mean}");
    }

    #[test]
    fn reports_sum_to_the_number_of_tasks() {
        let mut weighting = build(r#"{"uncertainty": {}}"#);
        run(&mut weighting, 0..40, [0, 1, 2], 1.0);
        weighting.prepare(40, &[true; 3]).unwrap();
        let report = weighting.report(&weighting.weights(None));
        assert!((report.weights.iter().sum::<f64>() - 3.0).abs() < 1e-12);
        assert_eq!(report.details[0].0, "sigma");
    }

    #[test]
    fn the_floor_holds_and_is_told_once() {
        let mut weighting = build(r#"{"gradnorm": {"learning_rate": 5.0, "optimizer": "sgd"}}"#);
        let (losses, norms) = (vector(&[1.0; 3], Device::Cpu), vector(&[9.0, 1.0, 1.0], Device::Cpu));
        weighting.prepare(0, &[true; 3]).unwrap();
        weighting.learn(&losses, Some(&norms)).unwrap();
        let weights = weighting.weights(None);
        // The first goes down to the floor and the others up to 6; then all are scaled to a sum of 3.
        let expected = [0.001, 6.0, 6.0].map(|weight| weight * 3.0 / 12.001);
        assert!(numbers(&weights).iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{weights:?}");
        assert!(weighting.report(&weights).warning.is_some_and(|text| text.contains("floor of 0.001")));
        assert!(weighting.report(&weights).warning.is_none());
    }
}
