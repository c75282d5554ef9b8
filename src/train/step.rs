//! One step: batches to losses, losses to gradients, gradients to an update; and the host's view of it, later.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::gradients::{Gradients, as_vector, at_last_layer};
use super::laps::Part;
use super::{State, Trainer};
use crate::data::Batch;
use crate::libtorch::{Draws, clip_gradients, side_by_side, workers};
use crate::model::{Mode, Rows, Shared, Site};
use crate::rng::Purpose;
use crate::task::Task;
use crate::weighting::{Observed, Reference, Wants};

/// Rows below which cutting a batch in parts costs more than it gains.
const ROWS_A_WORKER: usize = 4;

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
        self.laps.start();
        let batches: Vec<Vec<Batch>> = step.batches.iter().map(|rows| self.parts(rows)).collect();
        let parts = || batches.iter().flatten();
        let decisions =
            |task: usize| -> i64 { parts().filter_map(|part| Some(part.targets[task].as_ref()?.n_decisions)).sum() };
        let n_decisions: Vec<i64> = (0..self.tasks.len()).map(decisions).collect();
        let present: Vec<bool> = n_decisions.iter().map(|&n| n > 0).collect();
        let tokens: Vec<i32> =
            step.batches.iter().flatten().flat_map(|&row| self.train.set.tokens(row)).copied().collect();
        let rows = self.model.rows(&tokens);
        self.model.refresh();
        self.laps.end(Part::Batch);
        let wants = self.weighting.wants(step.number);
        let known: Option<Vec<Option<Tensor>>> = match wants {
            // A further pass without gradients: the step's losses are known only after its last batch.
            Wants::Losses if batches.len() > 1 => {
                let all = (0..batches.len()).flat_map(|i| {
                    let no_gradients =
                        |part: usize| tch::no_grad(|| self.forward(step, i, &batches[i][part], &rows, &n_decisions).1);
                    side_by_side(batches[i].len(), &no_gradients)
                });
                all.fold(None, add_losses)
            }
            _ => None,
        };
        let mut gradients = Gradients::new(self.model, self.tasks, reference(wants), Some(&rows));
        let (mut losses, mut weights) = (None, None);
        for (i, parts) in batches.iter().enumerate() {
            let forward = |part: usize| self.forward(step, i, &parts[part], &rows, &n_decisions);
            let passes = side_by_side(parts.len(), &forward);
            let here = passes.iter().fold(None, |sum, (_, part)| add_losses(sum, copies(part))).unwrap_or_default();
            self.laps.end(Part::Forward);
            let weights = weights.get_or_insert_with(|| {
                let losses = known.as_ref().unwrap_or(&here);
                self.weighting.weights(step.number, &present, Some(&as_vector(losses, device)))
            });
            if i == 0 && step.diagnose && present.iter().filter(|&&present| present).count() > 1 {
                pending.gram = self.gram(&passes)?;
            }
            self.laps.end(Part::Weighting);
            let backward = |part: usize| {
                let mut own = Gradients::new(self.model, self.tasks, reference(wants), Some(&rows));
                let (shared, losses) = &passes[part];
                own.add(shared, &self.scaled(losses), weights).map(|()| own.into_sums())
            };
            for sums in side_by_side(parts.len(), &backward) {
                gradients.merge(sums?)?;
            }
            losses = add_losses(losses, here);
            self.laps.end(Part::Backward);
        }
        let losses = losses.unwrap_or_default();
        self.freeze(step.number, &mut gradients.sum);
        let clipped: Vec<&Tensor> = gradients.sum.iter().filter(|gradient| gradient.defined()).collect();
        let mut norms = gradients.norms(device);
        let overflow = match &mut self.loss_scale {
            Some(scale) => {
                norms = norms.map(|norms| norms / scale.value());
                Some(scale.unscale(&clipped)?)
            }
            None => None,
        };
        // All that this step has labels for may be frozen.
        let mut norm = match clipped.is_empty() {
            true => Tensor::zeros([], (Kind::Float, device)),
            false => clip_gradients(&clipped, self.config.clip_norm)?,
        };
        if let Some(overflow) = &overflow {
            // The step is left out, and nobody hears of its gradients.
            let zero_if = |x: Tensor| x.masked_fill(&overflow.gt(0.5), 0.0);
            (norm, norms) = (zero_if(norm), norms.map(zero_if));
        }
        let mut values: Vec<Tensor> = losses.iter().flatten().map(Tensor::shallow_clone).collect();
        values.push(norm);
        let values = Tensor::stack(&values, 0);
        let sound = values.isfinite().all().to_kind(Kind::Float);
        pending.halted = pending.halted.maximum(&(1.0 - sound));
        let skip =
            overflow.map_or_else(|| pending.halted.shallow_clone(), |overflow| pending.halted.maximum(&overflow));
        let rate = self.learning_rate(step.number, step.n_steps);
        self.optimizer.step(&gradients.sum, Some(&rows.touched), rate, &skip)?;
        if let Some(average) = &mut self.average {
            average.update(step.number)?;
        }
        self.laps.end(Part::Update);
        let observed = Observed { losses: &as_vector(&losses, device), present: &present, norms: norms.as_ref() };
        self.weighting.learn(&observed)?;
        pending.weights = weights.map(|weights| (weights, present.clone()));
        pending.steps.push(Waiting { number: step.number, values, present });
        self.laps.end(Part::Weighting);
        Ok(parts().map(Batch::n_tokens).sum())
    }

    /// Losses by task as the backward pass takes them.
    fn scaled(&self, losses: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        let scaled = |loss: &Option<Tensor>| {
            let loss = loss.as_ref()?;
            Some(self.loss_scale.as_ref().map_or_else(|| loss.shallow_clone(), |scale| loss * scale.value()))
        };
        losses.iter().map(scaled).collect()
    }

    /// A batch on the device, cut in as many parts as there are workers, unless it is small.
    fn parts(&self, rows: &[usize]) -> Vec<Batch> {
        let n = workers().min(rows.len() / ROWS_A_WORKER).max(1);
        (0..n).map(|i| self.train.part(rows, rows.len() * i / n..rows.len() * (i + 1) / n)).collect()
    }

    /// The products g_i . g_j of the gradients of the present tasks' losses at the last layer's weights: [k, k] float64; where all
    /// parts of the batch have labels for the same tasks.
    fn gram(&self, passes: &[(Shared, Vec<Option<Tensor>>)]) -> Result<Option<(Vec<bool>, Tensor)>> {
        let here = |losses: &[Option<Tensor>]| -> Vec<bool> { losses.iter().map(Option::is_some).collect() };
        let present = here(&passes[0].1);
        if passes.iter().any(|(_, losses)| here(losses) != present) {
            return Ok(None);
        }
        let of_part = |part: usize| at_last_layer(self.model, &passes[part].1);
        let parts = side_by_side(passes.len(), &of_part).into_iter().collect::<Result<Vec<Tensor>>>()?;
        let Some(sum) = parts.into_iter().reduce(|a, b| a + b) else { return Ok(None) };
        let sum = sum.to_kind(Kind::Double);
        Ok(Some((present, sum.matmul(&sum.tr()))))
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

    /// The losses of a part of batch `i` of a step: its share of the means over the step's labels.
    fn forward(
        &self,
        step: &Step,
        i: usize,
        batch: &Batch,
        rows: &Rows,
        n_decisions: &[i64],
    ) -> (Shared, Vec<Option<Tensor>>) {
        let index = step.number * self.config.accumulate_steps + i;
        let seed = self.seed.derive(Purpose::Dropout, index as u64);
        if batch.token_ids.device() != Device::Cpu {
            tch::manual_seed(seed as i64);
        }
        let mode = Mode::Train(Draws { seed, first_row: batch.first_row as u64 });
        let token_ids = match (&self.unknown, mode.draws(Site::UnknownWords)) {
            (Some(unknown), Some(draws)) => unknown.replace(&batch.token_ids, draws),
            _ => batch.token_ids.shallow_clone(),
        };
        let shared = self.model.encode(batch, &token_ids, Some(rows), mode);
        let mut losses = self.model.losses(&shared, batch, mode);
        for ((loss, targets), &all) in losses.iter_mut().zip(&batch.targets).zip(n_decisions) {
            let n = targets.as_ref().map_or(0, |targets| targets.n_decisions);
            if n < all {
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

fn copies(losses: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
    losses.iter().map(|loss| loss.as_ref().map(Tensor::shallow_clone)).collect()
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
