//! For the tasks present: G_i = p_i w_i n_i with n_i = ||grad_W L_i||; Gbar = sum G / sum p; r_i = (L_i / L_i(0)) / mean;
//! target_i = p_i Gbar r_i^alpha, held constant; L_grad = sum |G_i - target_i|;
//! dL_grad / dw_i = sign(G_i - target_i) p_i n_i, since G is linear in w: no second-order graph is needed.
//! Then w takes an optimizer step, is clamped to a floor and rescaled to its previous sum.
//!
//! GradNorm: Chen, Badrinarayanan, Lee, Rabinovich 2018 (arXiv 1711.02257), eq. 1, 2 and algorithm 1.
//! Differs from the paper in: priorities p; tasks absent from a step are left out of every mean and of the scaling;
//! W may be the trunk's output instead of its last weights (`representation`); `update_every`.

use anyhow::{Context, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::optimizer::WeightOptimizer;
use super::{
    LossWeighting, Observed, Present, Reference, Wants, WeightOptimizerKind, WeightedTask, load_into, numbers, to_json,
    vector,
};
use crate::libtorch::{Kernel, sources};

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GradnormConfig {
    /// How strongly the tasks are pulled to a common training rate: 0 makes their gradient norms equal, large values
    /// favour tasks that train more slowly. Default 1.5, as in the paper.
    #[schemars(range(min = 0))]
    pub alpha: f64,
    /// Learning rate of the weights. Default 0.025, as in the paper.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub learning_rate: f64,
    /// Optimizer of the weights: `adam` or `sgd`. Default `adam`.
    pub optimizer: WeightOptimizerKind,
    /// Where gradient norms are taken: `representation` (what a head reads from the trunk, after its mix of layers;
    /// almost free) or `last_layer` (the weights of the highest LSTM layer that all tasks read, as in the paper).
    /// Default `representation`.
    pub reference: Reference,
    /// Steps between updates of the weights; the paper uses 1. Default: 1 with `representation`, 4 with `last_layer`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub update_every: Option<usize>,
    /// How GradNorm's reference loss L_i(0) is set: `first_batch`, `{mean_of_first: K}` steps (weights stay fixed until
    /// then), or `log_classes`, the log of the number of labels: the loss of a uniform guess, except for a CRF with
    /// constraints, which permits fewer sequences. Default `first_batch`.
    pub initial_loss: InitialLoss,
    /// The smallest weight, applied before the weights are rescaled to their sum. Default 1e-3.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub floor: f64,
}

impl Default for GradnormConfig {
    fn default() -> Self {
        GradnormConfig {
            alpha: 1.5,
            learning_rate: 0.025,
            optimizer: WeightOptimizerKind::Adam,
            reference: Reference::Representation,
            update_every: None,
            initial_loss: InitialLoss::FirstBatch,
            floor: 1e-3,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum InitialLoss {
    /// The loss of the first step.
    FirstBatch,
    /// The mean loss of this many first steps.
    MeanOfFirst(u32),
    /// The loss of a uniform guess.
    LogClasses,
}

/// Smaller initial losses are clamped to it, so that ratios stay finite.
const SMALLEST_LOSS: f64 = 1e-12;

pub struct Gradnorm {
    config: GradnormConfig,
    priorities: Tensor,
    pub(super) weights: Tensor,
    optimizer: WeightOptimizer,
    initial: Tensor,
    /// Steps in each task's initial loss so far; `log_classes` needs none.
    n_initial: Vec<u32>,
    /// Of the step that was prepared last: the tasks, as a mask, whose initial loss it is part of.
    open: Option<Tensor>,
    /// Of that step: whether the weights may change in it.
    ready: bool,
    /// Constant inputs of the kernel: alpha, floor, smallest loss.
    given: Tensor,
    /// Norms, rates and targets of the last update, for display, [3, T], if there was one.
    seen: Tensor,
    updated: bool,
    /// How often a weight hit the floor, and whether the user was warned.
    floored: Tensor,
    warned: bool,
}

/// One update in the paper's terms, `[T]` each.
pub(super) struct Closed {
    pub rates: Tensor,
    pub targets: Tensor,
    /// dL_grad / dw
    pub gradient: Tensor,
    /// L_grad, a scalar.
    pub loss: Tensor,
}

impl Gradnorm {
    pub fn new(config: &GradnormConfig, tasks: &[WeightedTask], device: Device) -> Self {
        let n = tasks.len();
        let initial = match config.initial_loss {
            InitialLoss::LogClasses => tasks.iter().map(|task| (task.n_labels as f64).ln()).collect(),
            _ => vec![0.0; n],
        };
        Gradnorm {
            config: config.clone(),
            priorities: vector(&tasks.iter().map(|task| task.priority).collect::<Vec<_>>(), device),
            weights: Tensor::ones([n as i64], (Kind::Double, device)),
            optimizer: WeightOptimizer::new(config.optimizer, config.learning_rate, n, device),
            initial: vector(&initial, device),
            n_initial: vec![0; n],
            open: None,
            ready: false,
            given: vector(&[config.alpha, config.floor, SMALLEST_LOSS], device),
            seen: Tensor::full([3, n as i64], f64::NAN, (Kind::Double, device)),
            updated: false,
            floored: Tensor::zeros([], (Kind::Double, device)),
            warned: false,
        }
    }

    /// Number of steps that L_i(0) averages over.
    fn n_wanted(&self) -> u32 {
        match self.config.initial_loss {
            InitialLoss::FirstBatch => 1,
            InitialLoss::MeanOfFirst(n) => n,
            InitialLoss::LogClasses => 0,
        }
    }

    /// Whether a step with these tasks changes the weights, if it has norms and all initial losses.
    fn balances(present: &Present) -> bool {
        // A single task has nothing to be balanced against.
        present.count() > 1
    }

    pub(super) fn closed_form(&self, losses: &Tensor, present: &Present, norms: &Tensor) -> Closed {
        let here = &present.mask;
        let priorities = &self.priorities * here;
        let slopes = norms * &priorities; // dG_i / dw_i
        let magnitudes = &self.weights * &slopes;
        let mean = magnitudes.sum(Kind::Double) / priorities.sum(Kind::Double);
        // Rounding can make a loss of 0 negative.
        let ratios = losses.clamp_min(0.0) / self.initial.clamp_min(SMALLEST_LOSS) * here;
        let rates = &ratios / (ratios.sum(Kind::Double) / present.count() as f64).clamp_min(f64::MIN_POSITIVE);
        let targets = priorities * mean * rates.pow_tensor_scalar(self.config.alpha);
        let off = magnitudes - &targets;
        Closed { gradient: off.sign() * slopes, loss: off.abs().sum(Kind::Double), rates, targets }
    }
}

static KERNEL: Kernel = Kernel::new(sources::WEIGHTING, "gradnorm");

impl Gradnorm {
    fn learn_by_kernel(&self, step: &Observed, norms: &Tensor) -> Result<()> {
        let Observed { losses, present, .. } = step;
        let known = [norms, &self.initial, &self.given, &self.priorities, &present.mask];
        let tensors = [&[*losses][..], &known, &[&self.weights, &self.floored, &self.seen]].concat();
        self.optimizer.launch(&KERNEL, &tensors)
    }

    fn learn_by_operators(&mut self, step: &Observed, norms: &Tensor) -> Result<()> {
        // Norms that are not finite, as in a step skipped by float16 loss scaling, change nothing.
        let here = &step.present.mask;
        let known = here.gt(0.0);
        let moves = known.logical_and(&(norms * here).sum(Kind::Double).isfinite());
        let closed = self.closed_form(step.losses, step.present, norms);
        let moved = self.optimizer.step(&self.weights, &closed.gradient, step.present)?;
        let floored = moved.lt(self.config.floor).logical_and(&moves).sum(Kind::Double);
        let _ = self.floored.f_add_(&floored)?;
        let moved = moved.clamp_min(self.config.floor);
        // The weights of present tasks keep their sum, so that all weights always sum to T.
        let scale = (&self.weights * here).sum(Kind::Double) / (&moved * here).sum(Kind::Double);
        self.weights.f_copy_(&(&moved * scale).where_self(&moves, &self.weights))?;
        let seen = Tensor::stack(&[norms, &closed.rates, &closed.targets], 0);
        Ok(self.seen.f_copy_(&seen.where_self(&known, &seen.full_like(f64::NAN)))?)
    }
}

impl LossWeighting for Gradnorm {
    fn wants(&self, step: usize) -> Wants {
        let default = match self.config.reference {
            Reference::LastLayer => 4,
            Reference::Representation => 1,
        };
        match step.is_multiple_of(self.config.update_every.unwrap_or(default)) {
            true => Wants::Norms(self.config.reference),
            false => Wants::Nothing,
        }
    }

    fn prepare(&mut self, step: usize, present: &Present) -> Result<bool> {
        let wanted = self.n_wanted();
        let open: Vec<bool> =
            present.flags.iter().zip(&self.n_initial).map(|(&present, &n)| present && n < wanted).collect();
        self.n_initial.iter_mut().zip(&open).for_each(|(n, &open)| *n += u32::from(open));
        self.open = open.contains(&true).then(|| Present::new(&open, self.weights.device()).mask);
        self.ready = present.flags.iter().zip(&self.n_initial).all(|(&present, &n)| !present || n >= wanted);
        self.updated |= self.ready && Self::balances(present) && self.wants(step) != Wants::Nothing;
        Ok(self.ready && self.open.is_none())
    }

    fn weights(&self, _: &Present, _: Option<&Tensor>) -> Tensor {
        self.weights.shallow_clone()
    }

    fn learn(&mut self, step: &Observed) -> Result<()> {
        if let Some(open) = &self.open {
            let _ = self.initial.f_add_(&(step.losses / f64::from(self.n_wanted()) * open))?;
        }
        match step.norms {
            Some(norms) if self.ready && Self::balances(step.present) => match KERNEL.serves(norms.device()) {
                true => self.learn_by_kernel(step, norms),
                false => self.learn_by_operators(step, norms),
            },
            _ => Ok(()),
        }
    }

    fn details(&self) -> Vec<(&'static str, Tensor)> {
        let names = ["reference_norm", "training_rate", "target"].into_iter().filter(|_| self.updated);
        names.zip(self.seen.copy().unbind(0)).collect()
    }

    fn warning(&mut self) -> Option<String> {
        let n = self.floored.double_value(&[]);
        if self.warned || n == 0.0 {
            return None;
        }
        self.warned = true;
        let floor = self.config.floor;
        Some(format!(
            "GradNorm pushed a weight down to its floor of {floor}; a smaller learning rate or alpha may help"
        ))
    }

    fn save(&self) -> Value {
        json!({
            "weights": to_json(&self.weights),
            "initial": to_json(&self.initial),
            "n_initial": self.n_initial,
            "optimizer": self.optimizer.save(),
            "seen": self.updated.then(|| self.seen.unbind(0).iter().map(to_json).collect::<Vec<_>>()),
            "floored": numbers(&self.floored.view([1]))[0],
            "warned": self.warned,
        })
    }

    fn load(&mut self, state: &Value) -> Result<()> {
        load_into(&mut self.weights, state, "weights")?;
        load_into(&mut self.initial, state, "initial")?;
        self.n_initial = serde_json::from_value(state["n_initial"].clone()).context("`n_initial` is damaged")?;
        self.optimizer.load(&state["optimizer"])?;
        self.updated = !state["seen"].is_null();
        if self.updated {
            for (i, mut row) in self.seen.unbind(0).into_iter().enumerate() {
                load_into(&mut row, &json!({"seen": state["seen"].get(i)}), "seen")?;
            }
        }
        let _ = self.floored.f_fill_(state["floored"].as_f64().unwrap_or(0.0))?;
        self.warned = state["warned"] == true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_computes_what_operators_do() {
        for optimizer in [WeightOptimizerKind::Adam, WeightOptimizerKind::Sgd] {
            // Chosen so that weights reach the floor.
            let config = GradnormConfig { optimizer, learning_rate: 0.3, floor: 0.7, ..GradnormConfig::default() };
            let tasks: Vec<WeightedTask> = (0..3)
                .map(|i| WeightedTask { name: format!("t{i}"), priority: 1.0 + f64::from(i), n_labels: 4 })
                .collect();
            let both = [0, 1].map(|_| Gradnorm::new(&config, &tasks, Device::Cpu));
            let [mut ours, mut theirs] = both;
            tch::manual_seed(5);
            for step in 0..12 {
                let present = Present::new(&[true, step % 3 != 1, step % 4 != 2], Device::Cpu);
                let random = || Tensor::rand([3], (Kind::Double, Device::Cpu)) + 0.1;
                let (mut losses, mut norms) = (random() * &present.mask, random());
                if step == 5 {
                    losses = losses.index_put(&[Some(Tensor::from(0i64))], &Tensor::from(-1e-15f64), false);
                }
                if step == 7 {
                    norms = &norms * f64::NAN;
                }
                let before = numbers(&ours.weights);
                let seen = Observed { losses: &losses, present: &present, norms: Some(&norms) };
                ours.observe(step, &Observed { norms: None, ..seen }).unwrap();
                if present.count() > 1 {
                    ours.learn_by_kernel(&seen, &norms).unwrap();
                }
                theirs.observe(step, &seen).unwrap();
                let details = |strategy: &Gradnorm| strategy.details().into_iter().map(|(_, x)| x).collect::<Vec<_>>();
                for (a, b) in details(&ours).iter().zip(&details(&theirs)).chain([(&ours.weights, &theirs.weights)]) {
                    let near = step == 7 || a.allclose(b, 1e-12, 1e-12, true);
                    assert!(near, "step {step}: {:?} {:?}", numbers(a), numbers(b));
                }
                assert!(step != 7 || (numbers(&ours.weights) == before && numbers(&theirs.weights) == before));
            }
            assert_eq!(ours.floored.double_value(&[]), theirs.floored.double_value(&[]));
            assert!(theirs.floored.double_value(&[]) > 0.0);
        }
    }
}
