//! The device's work in a step: forward, backward, update.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::clip::{Clip, Clipped};
use super::gradients::{Backward, Gradients, Weighted, as_vector, at_last_layer};
use super::step_timer::Part;
use super::{Step, Trainer};
use crate::data::Batch;
use crate::libtorch::{Beside, Draws, divide_list, seed_generator, side_by_side};
use crate::model::{Mode, Shared, Site, TableRows, is_part};
use crate::optim::{LossScale, StepRates, Touched};
use crate::rng::Purpose;
use crate::weighting::{Reference, Wants, Weighting};

/// The inputs of a step besides its batches.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub wants: Wants,
    /// Whether the strategy's work may be recorded.
    pub recordable: bool,
    /// Number of labels in the step, by task.
    pub n_decisions: &'a [i64],
    /// The table rows that the step reads; without them gradients are those of whole tables.
    pub rows: Option<&'a TableRows>,
    pub rates: StepRates<'a>,
    /// Whether to compare the tasks' gradients.
    pub diagnose: bool,
}

/// The results of a step, on the device.
pub(super) struct Computed {
    /// The losses of the tasks present, in order, then the gradient norm.
    pub values: Tensor,
    /// The weights of the losses, `[T]`, which the next step may overwrite.
    pub weights: Tensor,
    /// The products g_i . g_j of the gradients of the tasks' losses at the last layer's weights: [T, T] float64.
    pub gram: Option<Tensor>,
}

impl Computed {
    /// Copies the values out of the graph's memory, which the next replay overwrites.
    pub fn copy(&self) -> Computed {
        Computed { values: self.values.detach_copy(), weights: self.weights.shallow_clone(), gram: None }
    }
}

impl Trainer<'_> {
    /// Forward, backward, update: all of a step's work on the device.
    pub(super) fn compute(
        &mut self,
        step: &Step,
        batches: &[impl AsRef<[Batch]>],
        inputs: &Inputs,
    ) -> Result<Computed> {
        let device = self.model.parameters.device();
        // A shape is recorded after a computed step, which refreshed the 16-bit copies; if the optimizer keeps them up
        // to date, a recorded step need not.
        if !self.graphs.recording() || !self.optimizer.keeps_halves() {
            self.model.refresh()?;
        }
        let known: Option<Vec<Option<Tensor>>> = match inputs.wants {
            // An extra pass without gradients: the step's losses are known only after its last batch.
            Wants::Losses if batches.len() > 1 => {
                let mut all = (0..batches.len()).flat_map(|i| {
                    let parts = batches[i].as_ref();
                    let losses = |part: usize| tch::no_grad(|| self.forward(step, i, &parts[part], inputs));
                    side_by_side(parts.len(), &losses)
                });
                all.try_fold(None, |sum, pass| Ok::<_, anyhow::Error>(add_losses(sum, pass?.losses)))?
            }
            _ => None,
        };
        let reference = reference(inputs.wants);
        let halves = self.optimizer.keeps_halves() && batches.len() == 1;
        let frozen = self.frozen_numbers(step.number);
        let backward = Backward { model: self.model, tasks: self.tasks, reference, halves, frozen: &frozen };
        // If table rows wait on the device, a step has one batch of one part.
        let mut read: Option<TableRows> = None;
        let mut gradients = Gradients::default();
        let mut losses = None;
        // The tasks' gradients at the last layer, if they are compared: [T, n].
        let mut by_task: Option<Tensor> = None;
        let mut weights = (inputs.wants != Wants::Losses).then(|| self.weighting.weights(None));
        for (i, parts) in batches.iter().map(AsRef::as_ref).enumerate() {
            let forward = |part: usize| self.forward(step, i, &parts[part], inputs);
            let mut passes = side_by_side(parts.len(), &forward).into_iter().collect::<Result<Vec<_>>>()?;
            let here = passes.iter().fold(None, |sum, pass| add_losses(sum, copies(&pass.losses))).unwrap_or_default();
            self.timer.end(Part::Forward);
            let weights = weights.get_or_insert_with(|| {
                self.weighting.weights(Some(&as_vector(known.as_ref().unwrap_or(&here), device)))
            });
            let scale = self.loss_scale.as_ref().map(LossScale::value);
            if inputs.diagnose {
                let of_part = |part: usize| at_last_layer(self.model, &passes[part].losses, scale);
                for own in side_by_side(parts.len(), &of_part) {
                    let own = own?.to_kind(Kind::Double);
                    by_task = Some(by_task.map_or_else(|| own.shallow_clone(), |sum| sum + &own));
                }
            }
            self.timer.end(Part::Weighting);
            let pass = |part: usize| {
                let Pass { shared, losses, rows } = &passes[part];
                backward.pass(shared, rows.as_ref().or(inputs.rows), Weighted { losses, weights, scale })
            };
            for own in side_by_side(parts.len(), &pass) {
                gradients.merge(own?)?;
            }
            read = passes.iter_mut().find_map(|pass| pass.rows.take());
            losses = add_losses(losses, here);
            self.timer.end(Part::Backward);
        }
        let losses = losses.unwrap_or_default();
        let rows = read.as_ref().or(inputs.rows).map(|rows| &rows.touched);
        let values = self.update((&mut gradients, rows), &losses, inputs)?;
        self.timer.end(Part::Update);
        let weights = weights.unwrap_or_else(|| self.weighting.weights(None));
        Ok(Computed { values, weights, gram: by_task.map(|own| own.matmul(&own.tr())) })
    }

    /// Clips, updates and averages the weights, unless something is not finite; the strategy learns. Returns the losses of
    /// the tasks present, in order, then the gradient norm before clipping.
    fn update(
        &mut self,
        (gradients, rows): (&mut Gradients, Option<&Touched>),
        losses: &[Option<Tensor>],
        inputs: &Inputs,
    ) -> Result<Tensor> {
        let device = self.model.parameters.device();
        let seen = self.weighting.learns().then(|| Seen::new(gradients, losses, inputs.wants, device)).transpose()?;
        // Only clipping knows whether a loss scale was too large.
        let early = self.loss_scale.is_none();
        if let Some(seen) = seen.as_ref().filter(|_| early) {
            seen.teach(&mut self.weighting, None)?;
        }
        self.timer.end(Part::Weighting);
        let squares = self.optimizer.squares(rows, &mut gradients.sum)?;
        let defined: Vec<&Tensor> = gradients.sum.iter().filter(|gradient| gradient.defined()).collect();
        let clip = Clip {
            gradients: &defined,
            squares: squares.as_ref(),
            losses: &losses.iter().flatten().collect::<Vec<_>>(),
            limit: self.config.clip_norm,
            halted: &self.halted,
        };
        let mut clipped = clip.apply(self.loss_scale.as_mut())?;
        if let Some(seen) = seen.as_ref().filter(|_| !early) {
            seen.teach(&mut self.weighting, Some(&clipped))?;
        }
        // On the CPU deferred updates of table rows do not apply the divisor, so it is applied here.
        if let Some(divisor) = clipped.divisor.take_if(|_| device == Device::Cpu)
            && divisor.double_value(&[]) > 1.0
        {
            divide_list(&defined, &divisor)?;
        }
        self.optimizer.step(&gradients.sum, rows, inputs.rates, clipped.grad_scale())?;
        seen.map(|seen| seen.beside.join()).transpose()?;
        Ok(clipped.values)
    }

    /// The parts that are frozen at a step.
    fn frozen(&self, step: usize) -> Vec<&String> {
        let epoch = step / self.steps_per_epoch();
        self.config.freeze_epochs.iter().filter(|(_, epochs)| epoch < **epochs).map(|(part, _)| part).collect()
    }

    /// How many parts are frozen at a step. As parts only thaw, the number determines which.
    pub(super) fn n_frozen(&self, step: usize) -> usize {
        self.frozen(step).len()
    }

    /// Numbers of the parameters that are frozen at a step.
    fn frozen_numbers(&self, step: usize) -> Vec<usize> {
        let frozen = self.frozen(step);
        let names = self.model.parameters.iter().enumerate().filter(|_| !frozen.is_empty());
        names.filter(|(_, (name, _))| frozen.iter().any(|part| is_part(name, part))).map(|(number, _)| number).collect()
    }

    /// The seed of dropout in batch `i` of a step.
    pub(super) fn dropout_seed(&self, step: &Step, i: usize) -> u64 {
        self.seed.derive(Purpose::Dropout, (step.number * self.config.accumulate_steps + i) as u64)
    }

    /// The forward pass of one part of batch `i`. Its losses are its share of the means over the step's labels.
    fn forward(&self, step: &Step, i: usize, batch: &Batch, inputs: &Inputs) -> Result<Pass> {
        let seed = self.dropout_seed(step, i);
        if !self.graphs.recording() {
            seed_generator(seed, batch.token_ids.device());
        }
        let mode = Mode::Train(Draws::new(seed).from_row(batch.first_row));
        let token_ids = match (&self.unknown, mode.draws(Site::UnknownWords)) {
            (Some(unknown), Some(draws)) => unknown.replace(&batch.token_ids, draws),
            _ => batch.token_ids.shallow_clone(),
        };
        let token_ids = self.model.embedding.drop_words(&token_ids, mode);
        let rows = match self.optimizer.waits_on_device() {
            true => {
                let places = self.model.embedding.places(&token_ids, batch);
                self.optimizer.read(&places)?;
                Some(self.model.embedding.rows_at(places, batch))
            }
            false => None,
        };
        let shared = self.model.encode(batch, &token_ids, rows.as_ref().or(inputs.rows), mode);
        let mut losses = self.model.losses(&shared, batch, mode);
        for ((loss, targets), &all) in losses.iter_mut().zip(&batch.targets).zip(inputs.n_decisions) {
            let n = targets.as_ref().map_or(0, |targets| targets.n_decisions);
            if n < all {
                *loss = loss.take().map(|loss| loss * (n as f64 / all as f64));
            }
        }
        Ok(Pass { shared, losses, rows })
    }
}

/// A step's losses and norms, computed on a stream beside clipping and update.
struct Seen {
    beside: Beside,
    losses: Tensor,
    norms: Option<Tensor>,
}

impl Seen {
    fn new(gradients: &Gradients, losses: &[Option<Tensor>], wants: Wants, device: Device) -> Result<Self> {
        let beside = Beside::new(device)?;
        let norms = || reference(wants).map(|_| gradients.norms(device)).transpose();
        let (losses, norms) = beside.run(|| Ok((as_vector(losses, device), norms()?)))?;
        Ok(Seen { beside, losses, norms })
    }

    /// `clipped` removes a loss scale from the norms.
    fn teach(&self, weighting: &mut Weighting, clipped: Option<&Clipped>) -> Result<()> {
        self.beside.run(|| {
            let norms = self.norms.as_ref().map(|norms| clipped.map_or(norms.shallow_clone(), |by| by.unscaled(norms)));
            weighting.learn(&self.losses, norms.as_ref())
        })
    }
}

/// The forward pass of a part of a batch.
struct Pass {
    shared: Shared,
    losses: Vec<Option<Tensor>>,
    /// The table rows that it reads, if rows wait on the device.
    rows: Option<TableRows>,
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

/// Adds losses by task, without gradients.
fn add_losses(sum: Option<Vec<Option<Tensor>>>, more: Vec<Option<Tensor>>) -> Option<Vec<Option<Tensor>>> {
    let more = more.into_iter().map(|loss| loss.map(|loss| loss.detach()));
    let Some(sum) = sum else { return Some(more.collect()) };
    let add = |(sum, more): (Option<Tensor>, Option<Tensor>)| match (sum, more) {
        (Some(sum), Some(more)) => Some(sum + more),
        (sum, more) => sum.or(more),
    };
    Some(sum.into_iter().zip(more).map(add).collect())
}
