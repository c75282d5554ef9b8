//! Known answers for every strategy, checked on any device: the tests run them on the CPU, `polytask selftest` on the
//! user's training device.
//!
//! The numbers were computed by hand and with NumPy from the formulas in each strategy's file. Losses [0.9, 2, 0.5],
//! initial losses [1, 2, 2], gradient norms [4, 1, 0.25], alpha 1.5.

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use super::dwa::Dwa;
use super::gradnorm::Gradnorm;
use super::uncertainty::Uncertainty;
use super::{
    DwaConfig, FixedConfig, GradnormConfig, LossWeighting, Observed, Present, Reference, UncertaintyConfig,
    UncertaintySoftmaxConfig, Wants, WeightOptimizerKind, WeightedTask, Weighting, WeightingConfig, numbers, vector,
};
use crate::rng::Seed;

/// A named check.
pub type Check = (&'static str, fn(Device) -> Result<()>);

pub const CHECKS: [Check; 9] = [
    ("uncertainty: stationary weights and the gradient of log sigma^2", uncertainty),
    ("uncertainty: an absent task's sigma does not change", uncertainty_absent),
    ("uncertainty_softmax: weights", uncertainty_softmax),
    ("dwa: weights after two epochs", dwa),
    ("gradnorm: rates, targets, loss and its gradient", gradnorm_closed_form),
    ("gradnorm: weights after SGD and Adam steps", gradnorm_steps),
    ("gradnorm: a slower task's weight rises; equal norms at alpha 0", gradnorm_direction),
    ("gradnorm: an absent task is ignored", gradnorm_absent),
    ("every strategy: a priority of 3 is applied", priorities),
];

const LOSSES: [f64; 3] = [0.9, 2.0, 0.5];
const INITIAL: [f64; 3] = [1.0, 2.0, 2.0];
const NORMS: [f64; 3] = [4.0, 1.0, 0.25];

fn all(n: usize, device: Device) -> Present {
    Present::new(&vec![true; n], device)
}

/// Expected values are given with six decimals.
const ROUNDED: f64 = 1e-6;

fn near(name: &str, found: &Tensor, expected: &[f64], tolerance: f64) -> Result<()> {
    let found = numbers(found);
    let close = found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= tolerance);
    ensure!(close && found.len() == expected.len(), "{name}: {found:?} is not {expected:?}");
    Ok(())
}

fn tasks(n: usize) -> Vec<WeightedTask> {
    (0..n).map(|i| WeightedTask { name: format!("t{i}"), priority: 1.0, n_labels: 4 }).collect()
}

fn uncertainty(device: Device) -> Result<()> {
    let mut strategy = Uncertainty::new(&UncertaintyConfig::default(), 3, device);
    let (losses, present) = (vector(&LOSSES, device), all(3, device));
    near("ds at s = 0", &strategy.gradient(&losses), &[-0.4, -1.5, 0.0], 1e-12)?;
    let best: Vec<f64> = LOSSES.iter().map(|loss| (2.0 * loss).ln()).collect();
    strategy.set(&vector(&best, device))?;
    near("weights at s = ln 2L", &strategy.weights(&present, None), &[0.555556, 0.25, 1.0], ROUNDED)?;
    near("ds at s = ln 2L", &strategy.gradient(&losses), &[0.0; 3], 1e-12)?;
    let mut strategy = Uncertainty::new(&UncertaintyConfig::default(), 3, device);
    for step in 0..3000 {
        strategy.observe(step, &Observed { losses: &losses, present: &present, norms: None })?;
    }
    // Adam with a learning rate of 0.01 settles within about a hundredth of a step.
    near("weights at rest", &strategy.weights(&present, None), &[0.555556, 0.25, 1.0], 1e-3)
}

fn uncertainty_absent(device: Device) -> Result<()> {
    let mut strategy = Uncertainty::new(&UncertaintyConfig::default(), 3, device);
    let (losses, present) = (vector(&[0.9, 0.0, 0.5], device), Present::new(&[true, false, true], device));
    for step in 0..100 {
        strategy.observe(step, &Observed { losses: &losses, present: &present, norms: None })?;
    }
    let weights = strategy.weights(&present, None);
    near("weight of the absent task", &weights.narrow(0, 1, 1), &[1.0], 0.0)
}

fn uncertainty_softmax(device: Device) -> Result<()> {
    let config = WeightingConfig::UncertaintySoftmax(UncertaintySoftmaxConfig::default());
    let weighting = Weighting::new(&config, &tasks(3), Seed(0), device);
    let weights = weighting.weights(Some(&vector(&LOSSES, device)));
    near("weights / T", &(weights / 3.0), &[0.251561, 0.136534, 0.611904], ROUNDED)
}

fn dwa(device: Device) -> Result<()> {
    let mut strategy = Dwa::new(&DwaConfig::default(), 3, device);
    let present = all(3, device);
    near("weights at the start", &strategy.weights(&present, None), &[1.0; 3], 1e-12)?;
    for (step, losses) in [[1.0, 2.5, 0.4], LOSSES].into_iter().enumerate() {
        strategy.observe(step, &Observed { losses: &vector(&losses, device), present: &present, norms: None })?;
        strategy.epoch_ended()?;
    }
    near("weights", &strategy.weights(&present, None), &[0.954661, 0.908102, 1.137237], ROUNDED)
}

/// GradNorm after a step with the initial losses.
fn gradnorm(config: GradnormConfig, tasks: &[WeightedTask], device: Device) -> Result<Gradnorm> {
    let mut strategy = Gradnorm::new(&config, tasks, device);
    strategy.observe(0, &Observed { losses: &vector(&INITIAL, device), present: &all(3, device), norms: None })?;
    Ok(strategy)
}

/// The weights after `n` steps with constant losses and norms.
fn held(strategy: &mut Gradnorm, n: usize, losses: [f64; 3], norms: [f64; 3], device: Device) -> Result<Tensor> {
    let (losses, norms, present) = (vector(&losses, device), vector(&norms, device), all(3, device));
    for step in 1..=n {
        strategy.observe(step, &Observed { losses: &losses, present: &present, norms: Some(&norms) })?;
    }
    Ok(strategy.weights(&present, None).copy())
}

fn gradnorm_closed_form(device: Device) -> Result<()> {
    let strategy = gradnorm(GradnormConfig::default(), &tasks(3), device)?;
    let closed = strategy.closed_form(&vector(&LOSSES, device), &all(3, device), &vector(&NORMS, device));
    near("rates", &closed.rates, &[1.255814, 1.395349, 0.348837], ROUNDED)?;
    near("targets", &closed.targets, &[2.462782, 2.884445, 0.360556], ROUNDED)?;
    near("loss", &closed.loss.view([1]), &[3.532218], ROUNDED)?;
    near("gradient", &closed.gradient, &[4.0, -1.0, -0.25], 1e-12)
}

fn gradnorm_steps(device: Device) -> Result<()> {
    let sgd = GradnormConfig { optimizer: WeightOptimizerKind::Sgd, ..GradnormConfig::default() };
    let weights = held(&mut gradnorm(sgd, &tasks(3), device)?, 1, LOSSES, NORMS, device)?;
    near("one SGD step", &weights, &[0.921109, 1.049041, 1.029851], ROUNDED)?;
    let steps: [(usize, [f64; 3]); 3] =
        [(1, [0.966942, 1.016529, 1.016529]), (5, [0.83742, 1.08129, 1.08129]), (20, [0.429768, 1.412783, 1.157449])];
    for (n, expected) in steps {
        let mut strategy = gradnorm(GradnormConfig::default(), &tasks(3), device)?;
        near(&format!("{n} Adam steps"), &held(&mut strategy, n, LOSSES, NORMS, device)?, &expected, ROUNDED)?;
    }
    Ok(())
}

fn gradnorm_direction(device: Device) -> Result<()> {
    let mut strategy = gradnorm(GradnormConfig::default(), &tasks(3), device)?;
    // The second task has made no progress, the others have.
    let weights = numbers(&held(&mut strategy, 5, [0.2, 2.0, 0.4], [1.0; 3], device)?);
    ensure!(weights[1] > 1.01 && weights[0] < 1.0 && weights[2] < 1.0, "weights {weights:?}: the slower one must rise");
    let config = GradnormConfig { alpha: 0.0, learning_rate: 1e-3, ..GradnormConfig::default() };
    let mut strategy = gradnorm(config, &tasks(3), device)?;
    let weights = held(&mut strategy, 4000, LOSSES, NORMS, device)?;
    // Steps of constant length oscillate around the fixed point, w proportional to 1 / n.
    let fixed = [0.142857, 0.571429, 2.285714];
    near("weights round the fixed point", &weights, &fixed, 2e-2)?;
    strategy.weights = vector(&fixed, device);
    let closed = strategy.closed_form(&vector(&LOSSES, device), &all(3, device), &vector(&NORMS, device));
    let magnitudes: Vec<f64> = fixed.iter().zip(NORMS).map(|(weight, norm)| weight * norm).collect();
    // Norms of up to 4 multiply weights given with six decimals.
    near("targets at the fixed point", &closed.targets, &magnitudes, 4.0 * ROUNDED)
}

fn gradnorm_absent(device: Device) -> Result<()> {
    let mut three = gradnorm(GradnormConfig::default(), &tasks(3), device)?;
    let mut two = Gradnorm::new(&GradnormConfig::default(), &tasks(2), device);
    let initial = vector(&[1.0, 2.0], device);
    let (some, both) = (Present::new(&[true, false, true], device), all(2, device));
    two.observe(0, &Observed { losses: &initial, present: &both, norms: None })?;
    for step in 1..=10 {
        let (losses, norms) = (vector(&[0.9, 0.0, 0.5], device), vector(&[4.0, 0.0, 0.25], device));
        three.observe(step, &Observed { losses: &losses, present: &some, norms: Some(&norms) })?;
        let (losses, norms) = (vector(&[0.9, 0.5], device), vector(&[4.0, 0.25], device));
        two.observe(step, &Observed { losses: &losses, present: &both, norms: Some(&norms) })?;
    }
    let two = numbers(&two.weights(&both, None));
    near("weights", &three.weights(&some, None), &[two[0], 1.0, two[1]], 1e-12)
}

fn priorities(device: Device) -> Result<()> {
    let mut favoured = tasks(3);
    favoured[1].priority = 3.0;
    let configs = [
        WeightingConfig::default(),
        WeightingConfig::Fixed(FixedConfig { weights: (0..3).map(|i| (format!("t{i}"), 2.0)).collect() }),
        WeightingConfig::Uncertainty(UncertaintyConfig::default()),
        WeightingConfig::UncertaintySoftmax(UncertaintySoftmaxConfig::default()),
        WeightingConfig::Dwa(DwaConfig::default()),
        WeightingConfig::Random(super::RandomConfig {}),
        // At alpha 0 GradNorm settles where w_i n_i is equal for all tasks, whatever p_i is.
        WeightingConfig::Gradnorm(GradnormConfig { alpha: 0.0, learning_rate: 1e-3, ..GradnormConfig::default() }),
    ];
    let losses = vector(&LOSSES, device);
    for config in configs {
        let after = |tasks: &[WeightedTask]| -> Result<Tensor> {
            let mut weighting = Weighting::new(&config, tasks, Seed(5), device);
            let norms = vector(&NORMS, device);
            for step in 0..4000 {
                let wanted = matches!(weighting.wants(step), Wants::Norms(Reference::Representation));
                let norms = wanted.then_some(&norms);
                weighting.prepare(step, &[true; 3])?;
                weighting.learn(&losses, norms)?;
            }
            weighting.prepare(7, &[true; 3])?;
            Ok(weighting.weights(Some(&losses)))
        };
        let (plain, favoured) = (after(&tasks(3))?, after(&favoured)?);
        // Weights are float32.
        let tolerance = if matches!(config, WeightingConfig::Gradnorm(_)) { 3e-2 } else { ROUNDED };
        let ratio = favoured / plain;
        let ratio = &ratio / ratio.narrow(0, 0, 1);
        near(&format!("{config:?}"), &ratio.to_kind(Kind::Double), &[1.0, 3.0, 1.0], tolerance)?;
    }
    Ok(())
}
