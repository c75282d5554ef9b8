//! One step: batches to losses, losses to gradients, gradients to an update; and the host's view of it, later.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::{State, Trainer};
use crate::libtorch::{add_lists, clip_gradients};
use crate::model::Mode;
use crate::rng::Purpose;
use crate::task::Task;

/// Which step to take.
pub struct Step<'a> {
    /// From 0.
    pub number: usize,
    pub n_steps: usize,
    /// Row numbers of its batches.
    pub batches: &'a [Vec<usize>],
}

/// What steps left on the device, waiting to be read.
pub struct Pending {
    steps: Vec<Waiting>,
    /// 1 since a total or a gradient was not finite: from then on no update happens.
    halted: Tensor,
    device: Device,
}

struct Waiting {
    number: usize,
    /// The losses of the tasks present, in order, then the gradient norm.
    values: Tensor,
    present: Vec<bool>,
}

/// A step whose loss or gradient is not finite.
#[derive(Debug)]
pub struct NotFinite {
    pub step: usize,
    pub what: String,
}

impl Pending {
    pub fn new(device: Device) -> Self {
        Pending { steps: Vec::new(), halted: Tensor::zeros([], (Kind::Float, device)), device }
    }

    /// On the CPU reading costs nothing; on CUDA it waits for the device, so that it is left to the log interval.
    pub fn should_drain(&self) -> bool {
        self.device == Device::Cpu
    }

    /// Adds what is waiting to the sums of `state`.
    pub fn drain(&mut self, state: &mut State, tasks: &[Task]) -> Result<(), NotFinite> {
        for waiting in self.steps.drain(..) {
            let values: Vec<f64> =
                Vec::try_from(waiting.values.to_kind(Kind::Double)).expect("invariant: a flat list of numbers");
            let (norm, mut losses) = (values[values.len() - 1], values[..values.len() - 1].iter().copied());
            let losses: Vec<Option<f64>> =
                waiting.present.iter().map(|&present| present.then(|| losses.next()).flatten()).collect();
            let bad = losses.iter().zip(tasks).find(|(loss, _)| loss.is_some_and(|loss| !loss.is_finite()));
            if let Some((loss, task)) = bad {
                let what = format!("the loss of task `{}` ({})", task.name, loss.unwrap_or_default());
                return Err(NotFinite { step: waiting.number, what });
            }
            if !norm.is_finite() {
                return Err(NotFinite { step: waiting.number, what: format!("the gradient norm ({norm})") });
            }
            state.interval.add(&losses, norm);
            state.epoch.add(&losses, norm);
        }
        Ok(())
    }
}

impl Trainer<'_> {
    /// Takes one step and returns its number of real tokens. Nothing here waits for the device.
    pub(super) fn take(&mut self, step: &Step, pending: &mut Pending) -> Result<i64> {
        let batches: Vec<_> = step.batches.iter().map(|rows| self.train.batch(rows)).collect();
        let n_tasks = self.tasks.len();
        let decisions = |task: usize| {
            let each = batches.iter().filter_map(move |batch| Some(batch.targets[task].as_ref()?.n_decisions));
            each.sum::<i64>() as f64
        };
        let n_decisions: Vec<f64> = (0..n_tasks).map(decisions).collect();
        let parameters = self.model.parameters.tensors();
        let mut losses: Vec<Option<Tensor>> = (0..n_tasks).map(|_| None).collect();
        let mut gradients: Vec<Tensor> = Vec::new();
        for (i, batch) in batches.iter().enumerate() {
            let index = step.number * self.config.accumulate_steps + i;
            self.seed.seed_torch(Purpose::Dropout, index as u64);
            let token_ids = match &self.unknown {
                Some(unknown) => unknown.replace(&batch.token_ids),
                None => batch.token_ids.shallow_clone(),
            };
            let encoded = self.model.encode(batch, &token_ids, Mode::Train);
            let mut part = self.model.losses(&encoded, batch, Mode::Train);
            if batches.len() > 1 {
                // Means over each batch become shares of the mean over the step.
                for (task, loss) in part.iter_mut().enumerate() {
                    let n = batch.targets[task].as_ref().map_or(0, |targets| targets.n_decisions) as f64;
                    *loss = loss.take().map(|loss| loss * (n / n_decisions[task]));
                }
            }
            let total = self.weighting.total(&part);
            accumulate(&mut gradients, Tensor::f_run_backward(&[total], &parameters, false, false)?)?;
            for (sum, loss) in losses.iter_mut().zip(part) {
                *sum = match (sum.take(), loss) {
                    (Some(sum), Some(loss)) => Some(sum + loss.detach()),
                    (sum, loss) => sum.or(loss.map(|loss| loss.detach())),
                };
            }
        }
        let present: Vec<&Tensor> = gradients.iter().filter(|gradient| gradient.defined()).collect();
        let norm = clip_gradients(&present, self.config.clip_norm)?;
        let mut values: Vec<Tensor> = losses.iter().flatten().map(Tensor::shallow_clone).collect();
        values.push(norm);
        let values = tch::no_grad(|| Tensor::stack(&values, 0));
        let sound = values.isfinite().all().to_kind(Kind::Float);
        pending.halted = pending.halted.maximum(&(1.0 - sound));
        let rate = self.learning_rate(step.number, step.n_steps);
        self.optimizer.step(&gradients, rate, &pending.halted)?;
        self.weighting.after_backward(&losses)?;
        let present = losses.iter().map(Option::is_some).collect();
        pending.steps.push(Waiting { number: step.number, values, present });
        Ok(batches.iter().map(|batch| batch.n_tokens()).sum())
    }
}

/// Adds the gradients of another batch; those of heads that the batch did not need are undefined.
fn accumulate(sum: &mut Vec<Tensor>, more: Vec<Tensor>) -> Result<()> {
    if sum.is_empty() {
        *sum = more;
        return Ok(());
    }
    let (mut into, mut from) = (Vec::new(), Vec::new());
    for (i, more) in more.into_iter().enumerate() {
        match (sum[i].defined(), more.defined()) {
            (true, true) => {
                into.push(sum[i].shallow_clone());
                from.push(more);
            }
            (false, true) => sum[i] = more,
            _ => {}
        }
    }
    add_lists(&into.iter().collect::<Vec<_>>(), &from.iter().collect::<Vec<_>>())
}
