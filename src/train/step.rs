//! One step: batches to losses, losses to gradients, gradients to an update; and the host's view of it, later.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::gradients::{Gradients, as_vector, gram};
use super::{State, Trainer};
use crate::data::Batch;
use crate::libtorch::clip_gradients;
use crate::model::{Mode, Shared};
use crate::rng::Purpose;
use crate::task::Task;
use crate::weighting::{Observed, Reference, Wants};

/// Which step to take.
pub struct Step<'a> {
    /// From 0.
    pub number: usize,
    pub n_steps: usize,
    /// Row numbers of its batches.
    pub batches: &'a [Vec<usize>],
    /// Compare the tasks' gradients too.
    pub diagnose: bool,
}

/// What steps left on the device, waiting to be read.
pub struct Pending {
    steps: Vec<Waiting>,
    /// 1 since a total or a gradient was not finite: from then on no update happens.
    halted: Tensor,
    device: Device,
    /// Weights of the last step, `[T]`, and which tasks it had.
    pub weights: Option<(Tensor, Vec<bool>)>,
    /// Of the last step that compared the tasks' gradients: who was there, and their products [k, k].
    pub gram: Option<(Vec<bool>, Tensor)>,
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
        let halted = Tensor::zeros([], (Kind::Float, device));
        Pending { steps: Vec::new(), halted, device, weights: None, gram: None }
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
    pub fn take(&mut self, step: &Step, pending: &mut Pending) -> Result<i64> {
        let device = self.model.parameters.device();
        let batches: Vec<_> = step.batches.iter().map(|rows| self.train.batch(rows)).collect();
        let decisions = |task: usize| -> i64 {
            batches.iter().filter_map(|batch| Some(batch.targets[task].as_ref()?.n_decisions)).sum()
        };
        let n_decisions: Vec<i64> = (0..self.tasks.len()).map(decisions).collect();
        let present: Vec<bool> = n_decisions.iter().map(|&n| n > 0).collect();
        let wants = self.weighting.wants(step.number);
        let known = match wants {
            // A further pass without gradients: the step's losses are known only after its last batch.
            Wants::Losses if batches.len() > 1 => Some(tch::no_grad(|| {
                let parts = (0..batches.len()).map(|i| self.forward(step, i, &batches[i], &n_decisions).1);
                parts.fold(None, add_losses)
            })),
            _ => None,
        };
        let mut gradients = Gradients::new(self.model, self.tasks, reference(wants));
        let (mut losses, mut weights) = (None, None);
        for (i, batch) in batches.iter().enumerate() {
            let (shared, part) = self.forward(step, i, batch, &n_decisions);
            let weights = weights.get_or_insert_with(|| {
                let losses = known.as_ref().and_then(Option::as_ref).unwrap_or(&part);
                self.weighting.weights(step.number, &present, Some(&as_vector(losses, device)))
            });
            if i == 0 && step.diagnose && present.iter().filter(|&&present| present).count() > 1 {
                let here = part.iter().map(Option::is_some).collect();
                pending.gram = Some((here, gram(self.model, &part)?));
            }
            gradients.add(&shared, &part, weights)?;
            losses = add_losses(losses, part);
        }
        let losses = losses.unwrap_or_default();
        self.freeze(step.number, &mut gradients.sum);
        let clipped: Vec<&Tensor> = gradients.sum.iter().filter(|gradient| gradient.defined()).collect();
        let norms = gradients.norms(device);
        // All that this step has labels for may be frozen.
        let norm = match clipped.is_empty() {
            true => Tensor::zeros([], (Kind::Float, device)),
            false => clip_gradients(&clipped, self.config.clip_norm)?,
        };
        let mut values: Vec<Tensor> = losses.iter().flatten().map(Tensor::shallow_clone).collect();
        values.push(norm);
        let values = Tensor::stack(&values, 0);
        let sound = values.isfinite().all().to_kind(Kind::Float);
        pending.halted = pending.halted.maximum(&(1.0 - sound));
        let rate = self.learning_rate(step.number, step.n_steps);
        self.optimizer.step(&gradients.sum, rate, &pending.halted)?;
        if let Some(average) = &mut self.average {
            average.update(step.number)?;
        }
        let observed = Observed { losses: &as_vector(&losses, device), present: &present, norms: norms.as_ref() };
        self.weighting.learn(&observed)?;
        pending.weights = weights.map(|weights| (weights, present.clone()));
        pending.steps.push(Waiting { number: step.number, values, present });
        Ok(batches.iter().map(|batch| batch.n_tokens()).sum())
    }

    /// Takes the gradients of the parts that are frozen at this step away.
    fn freeze(&self, step: usize, gradients: &mut [Tensor]) {
        let epoch = step / self.steps_per_epoch();
        let frozen: Vec<&String> =
            self.config.freeze_epochs.iter().filter(|(_, epochs)| epoch < **epochs).map(|(part, _)| part).collect();
        if frozen.is_empty() {
            return;
        }
        for ((name, _), gradient) in self.model.parameters.iter().zip(gradients) {
            if frozen.iter().any(|part| is_part(name, part)) {
                *gradient = Tensor::new();
            }
        }
    }

    /// The losses of batch `i` of a step: means over the batch, or, where a step has several, its share of their mean.
    fn forward(&self, step: &Step, i: usize, batch: &Batch, n_decisions: &[i64]) -> (Shared, Vec<Option<Tensor>>) {
        let index = step.number * self.config.accumulate_steps + i;
        self.seed.seed_torch(Purpose::Dropout, index as u64);
        let token_ids = match &self.unknown {
            Some(unknown) => unknown.replace(&batch.token_ids),
            None => batch.token_ids.shallow_clone(),
        };
        let shared = self.model.encode(batch, &token_ids, Mode::Train);
        let mut losses = self.model.losses(&shared, batch, Mode::Train);
        if step.batches.len() > 1 {
            for ((loss, targets), &all) in losses.iter_mut().zip(&batch.targets).zip(n_decisions) {
                let n = targets.as_ref().map_or(0, |targets| targets.n_decisions);
                *loss = loss.take().map(|loss| loss * (n as f64 / all as f64));
            }
        }
        (shared, losses)
    }
}

/// Whether parameter `name` belongs to `part`: `trunk.weight_ih_l0` to `trunk` and to its layer `trunk.l0`, but `trunks.x`
/// does not.
pub fn is_part(name: &str, part: &str) -> bool {
    if let Some(layer) = part.strip_prefix("trunk.l").filter(|number| number.parse::<usize>().is_ok()) {
        let of = |name: &str| name.strip_suffix("_reverse").unwrap_or(name).ends_with(&format!("_l{layer}"));
        return name.strip_prefix("trunk.").and_then(|rest| rest.split('.').next()).is_some_and(of);
    }
    name.strip_prefix(part).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn reference(wants: Wants) -> Option<Reference> {
    match wants {
        Wants::Norms(reference) => Some(reference),
        _ => None,
    }
}

/// Sums of losses by task, without gradients.
fn add_losses(sum: Option<Vec<Option<Tensor>>>, more: Vec<Option<Tensor>>) -> Option<Vec<Option<Tensor>>> {
    let more = more.into_iter().map(|loss| loss.map(|loss| loss.detach()));
    let Some(sum) = sum else { return Some(more.collect()) };
    let add = |(sum, more): (Option<Tensor>, Option<Tensor>)| match (sum, more) {
        (Some(sum), Some(more)) => Some(sum + more),
        (sum, more) => sum.or(more),
    };
    Some(sum.into_iter().zip(more).map(add).collect())
}

#[cfg(test)]
mod tests {
    use super::is_part;

    #[test]
    fn parts_are_known_by_name_and_layers_by_number() {
        let check = |name: &str, part: &str, expected: bool| assert_eq!(is_part(name, part), expected, "{name} {part}");
        check("trunk.weight_ih_l1_reverse", "trunk.l1", true);
        check("trunk.gate_l1.weight", "trunk.l1", true);
        check("trunk.weight_ih_l11", "trunk.l1", false);
        check("heads.topic.output.bias", "heads.topic", true);
        check("heads.topics.output.bias", "heads.topic", false);
        check("embedding.vectors_0", "embedding.vectors_0", true);
    }
}
