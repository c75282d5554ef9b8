//! Optimizers on libtorch's fused operators or, on a GPU, custom kernels, with state that can be saved so that a run
//! resumes exactly; learning-rate schedules.

mod config;
mod deferred;
mod dense;
mod device_deferred;
mod ema;
mod on_device;
mod scale;
mod schedule;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use tch::{Kind, Tensor};

pub use config::{AdamConfig, OptimizerConfig, SgdConfig};
use deferred::{DeferredRows, PastStep, TableState};
use ema::Ema;
use on_device::OnDevice;
pub use scale::{LossScale, is_not_finite};
pub use schedule::{RangeConfig, ScheduleConfig};

use crate::libtorch::{
    Adam, AdamLists, GradScale, Number, Sgd, count_up, floats, fused_adam, fused_sgd, side_by_side, workers,
};

/// Whether a parameter is exempt from weight decay by default: biases, other vectors such as a CRF's start scores, and
/// the whole embedding, as their size says nothing about complexity.
fn is_spared(name: &str, parameter: &Tensor) -> bool {
    parameter.dim() < 2 || name.starts_with("embedding.")
}

/// One parameter and its optimizer state.
struct Slot {
    name: String,
    parameter: Tensor,
    first: Tensor,
    second: Tensor,
    /// Number of steps of this parameter; a head absent from a step does not count it.
    step: Tensor,
    decays: bool,
    /// For a table whose gradient comes as rows: the steps that other rows have not taken yet.
    deferred: Option<DeferredRows>,
}

/// The table rows that a step reads.
pub struct Touched {
    /// `[U]`, distinct; where rows wait on the device, `[N]` in the order of the step's tokens.
    pub ids: Tensor,
    /// The same on the host, if known there.
    pub host: Vec<i64>,
    /// The row that has no gradient; -1 for none.
    pub padding: i64,
    /// The tables' numbers among the parameters.
    pub tables: Vec<usize>,
}

/// What one update works on: a parameter, some of its rows, or a block of it.
struct Piece {
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: Tensor,
    decays: bool,
}

impl Piece {
    /// Block `i` of `n` disjoint blocks; small parameters are not split and belong to block 0.
    fn block(&self, i: usize, n: usize) -> Option<Piece> {
        if n == 1 || self.parameter.dim() == 0 || self.parameter.numel() < SMALL {
            return (i == 0).then(|| self.cut(|tensor| tensor.shallow_clone()));
        }
        let length = self.parameter.size()[0] as usize;
        let (start, end) = (length * i / n, length * (i + 1) / n);
        // SGD has no second moments.
        let narrow = |tensor: &Tensor| match tensor.size() == self.parameter.size() {
            true => tensor.narrow(0, start as i64, (end - start) as i64),
            false => tensor.shallow_clone(),
        };
        (end > start).then(|| self.cut(narrow))
    }

    fn cut(&self, part: impl Fn(&Tensor) -> Tensor) -> Piece {
        Piece {
            parameter: part(&self.parameter),
            gradient: part(&self.gradient),
            first: part(&self.first),
            second: part(&self.second),
            step: self.step.shallow_clone(),
            decays: self.decays,
        }
    }
}

/// Parameters with fewer elements are updated by one worker.
const SMALL: usize = 1 << 14;

impl Slot {
    /// What the update sees: the whole parameter, or only `rows`, to which `gradient` then belongs.
    fn piece(&self, gradient: &Tensor, rows: Option<&Touched>) -> Piece {
        let part = |tensor: &Tensor| match rows {
            Some(rows) if tensor.dim() == self.parameter.dim() => tensor.index_select(0, &rows.ids),
            _ => tensor.shallow_clone(),
        };
        // Copies in 16 bits, by which it is the gradient, can have further columns.
        let gradient = match (self.parameter.size2(), gradient.size2()) {
            (Ok((rows, width)), Ok((same, _))) if rows == same => gradient.narrow(1, 0, width),
            _ => gradient.shallow_clone(),
        };
        Piece {
            parameter: part(&self.parameter),
            // The fused operators read and write in the order of memory.
            gradient: gradient.contiguous(),
            first: part(&self.first),
            second: part(&self.second),
            step: self.step.shallow_clone(),
            decays: self.decays,
        }
    }

    /// Writes the updated rows back to their table.
    fn put_back(&mut self, piece: &Piece, rows: &Touched) -> Result<()> {
        let pairs = [
            (&mut self.parameter, &piece.parameter),
            (&mut self.first, &piece.first),
            (&mut self.second, &piece.second),
        ];
        for (table, rows_of_it) in pairs.into_iter().filter(|(table, _)| table.dim() > 1) {
            let _ = table.f_index_copy_(0, &rows.ids, rows_of_it)?;
        }
        Ok(())
    }
}

/// What changes from step to step.
#[derive(Clone, Copy, Debug)]
pub struct StepRates<'a> {
    pub learning_rate: Number<'a>,
    /// The factor of the new weights in their moving average, 1 - decay.
    pub share: Number<'a>,
}

/// A learning rate alone; an average stays as it is.
impl From<f64> for StepRates<'_> {
    fn from(learning_rate: f64) -> Self {
        StepRates { learning_rate: learning_rate.into(), share: 0.0.into() }
    }
}

/// Updates the parameters and, if there is one, the moving average of the weights.
pub struct Optimizer {
    config: OptimizerConfig,
    slots: Vec<Slot>,
    average: Option<Ema>,
    /// Set if custom kernels do the work.
    on_device: Option<OnDevice>,
}

impl Optimizer {
    pub fn new<'a>(config: &OptimizerConfig, parameters: impl Iterator<Item = (&'a str, &'a Tensor)>) -> Self {
        let slot = |(name, parameter): (&str, &Tensor)| Slot {
            name: name.to_owned(),
            parameter: parameter.detach(),
            first: parameter.detach().zeros_like(),
            second: match config {
                OptimizerConfig::Sgd(_) => Tensor::zeros([0], (Kind::Float, parameter.device())),
                _ => parameter.detach().zeros_like(),
            },
            step: Tensor::zeros([], (Kind::Float, parameter.device())),
            decays: config.decay_all() || !is_spared(name, parameter),
            deferred: None,
        };
        Optimizer { config: config.clone(), slots: parameters.map(slot).collect(), average: None, on_device: None }
    }

    /// Keeps a moving average of the weights with this decay, from their current values on.
    pub fn with_average(mut self, decay: f64) -> Self {
        self.average = Some(Ema::new(decay, self.slots.iter().map(|slot| (slot.name.as_str(), &slot.parameter))));
        self
    }

    /// The factor of the weights after step `number` (from 0) in their average; 0 without one.
    pub fn share(&self, number: usize) -> f64 {
        self.average.as_ref().map_or(0.0, |average| average.share(number))
    }

    /// Swaps the weights and their averages, if there are any.
    pub fn swap_average(&mut self) -> Result<()> {
        self.average.as_mut().map_or(Ok(()), Ema::swap)
    }

    pub fn lazy_rows(&self) -> bool {
        self.config.lazy_rows()
    }

    /// Applies the deferred steps to `rows` of their tables, or to all rows of all tables, and to their averages.
    pub fn catch_up(&mut self, rows: Option<&Touched>) -> Result<()> {
        self.settle_on_device()?;
        for (number, Slot { parameter, first, second, deferred, .. }) in self.slots.iter_mut().enumerate() {
            let Some(deferred) = deferred else { continue };
            let average = self.average.as_mut().map(|average| average.of_mut(number));
            let numbers = TableState::of(parameter, first, second, average)?;
            match rows {
                Some(rows) => deferred.catch_up(&rows.host, numbers),
                None => deferred.settle(numbers),
            }
        }
        Ok(())
    }

    /// One update of the parameters that have a gradient. With `rows`, the gradients of embedding
    /// tables are those of these rows, which must be up to date; other rows are updated by [`Self::catch_up`], or never
    /// with `lazy_rows`. Gradients are divided by the divisor of `grad_scale` (not those of deferred rows on the CPU);
    /// if it skips the step, nothing changes. Then the moving average takes in the weights.
    pub fn step<'a>(
        &mut self,
        gradients: &[Tensor],
        rows: Option<&Touched>,
        rates: impl Into<StepRates<'a>>,
        grad_scale: impl Into<GradScale<'a>>,
    ) -> Result<()> {
        let (rates, grad_scale) = (rates.into(), grad_scale.into());
        if let Some(on_device) = &self.on_device {
            return self.step_on_device(on_device, gradients, rows, rates, grad_scale);
        }
        let waits = rows.filter(|_| !self.config.lazy_rows());
        let is_table = |rows: Option<&Touched>, number: usize| rows.is_some_and(|rows| rows.tables.contains(&number));
        let mut pieces = Vec::new();
        let mut present = Vec::new();
        for (number, (slot, gradient)) in self.slots.iter().zip(gradients).enumerate() {
            if gradient.defined() && !is_table(waits, number) {
                let rows = rows.filter(|_| is_table(rows, number));
                pieces.push(slot.piece(gradient, rows));
                present.push((number, rows));
            }
        }
        if !pieces.is_empty() {
            self.update_all(&pieces, rates.learning_rate, grad_scale)?;
        }
        for ((number, rows), piece) in present.into_iter().zip(&pieces) {
            if let Some(rows) = rows {
                self.slots[number].put_back(piece, rows)?;
            }
        }
        if let Some(average) = &mut self.average {
            average.update(rates.share, waits.map_or(&[], |rows| &rows.tables))?;
        }
        waits.map_or(Ok(()), |rows| self.step_tables(gradients, rows, rates, grad_scale.skip))
    }

    /// The step of the tables' `rows`; other rows take it later.
    fn step_tables(&mut self, gradients: &[Tensor], rows: &Touched, rates: StepRates, skip: &Tensor) -> Result<()> {
        let on_host = |number: Number| number.on_host().expect("invariant: rows of tables are not recorded");
        let (rate, share) = (on_host(rates.learning_rate), on_host(rates.share));
        let skipped = skip.double_value(&[]) > 0.0;
        for &number in &rows.tables {
            let Slot { parameter, first, second, step, decays, deferred, .. } = &mut self.slots[number];
            let gradient = gradients.get(number).filter(|gradient| gradient.defined() && !skipped);
            let mut gradient = gradient.map(Tensor::contiguous);
            if gradient.is_some() {
                let _ = step.f_add_scalar_(1.0)?;
            }
            let count = step.double_value(&[]);
            let now = PastStep {
                count: count as u64,
                rates: gradient.is_some().then(|| self.config.rates(rate, count, *decays)),
                share: self.average.is_some().then_some(share as f32),
            };
            let gradient = gradient.as_mut().map(floats).transpose()?;
            let deferred = deferred.get_or_insert_with(|| DeferredRows::new(parameter.size()[0] as usize));
            let average = self.average.as_mut().map(|average| average.of_mut(number));
            deferred.step(now, &rows.host, gradient.as_deref(), TableState::of(parameter, first, second, average)?);
        }
        Ok(())
    }

    fn update_all(&self, pieces: &[Piece], learning_rate: Number, grad_scale: GradScale) -> Result<()> {
        count_up(&pieces.iter().map(|piece| &piece.step).collect::<Vec<_>>(), grad_scale)?;
        let workers = workers();
        let update = |worker: usize| -> Result<()> {
            let own: Vec<Piece> = pieces.iter().filter_map(|piece| piece.block(worker, workers)).collect();
            for decays in [true, false] {
                let some: Vec<&Piece> = own.iter().filter(|piece| piece.decays == decays).collect();
                self.update(&some, learning_rate, grad_scale, decays)?;
            }
            Ok(())
        };
        side_by_side(workers, &update).into_iter().collect()
    }

    /// Updates parameters that either all decay or all do not.
    fn update(&self, pieces: &[&Piece], learning_rate: Number, grad_scale: GradScale, decays: bool) -> Result<()> {
        if pieces.is_empty() {
            return Ok(());
        }
        let decay = |weight_decay: f64| if decays { weight_decay } else { 0.0 };
        let list = |of: fn(&Piece) -> &Tensor| pieces.iter().map(|piece| of(piece)).collect::<Vec<&Tensor>>();
        let (parameters, gradients) = (list(|piece| &piece.parameter), list(|piece| &piece.gradient));
        let first = list(|piece| &piece.first);
        match &self.config {
            OptimizerConfig::Adamw(config) | OptimizerConfig::Adam(config) => {
                let lists = AdamLists {
                    parameters: &parameters,
                    gradients: &gradients,
                    first_moments: &first,
                    second_moments: &list(|piece| &piece.second),
                    steps: &list(|piece| &piece.step),
                };
                let adam = Adam {
                    learning_rate,
                    betas: config.betas,
                    epsilon: config.epsilon,
                    weight_decay: decay(config.weight_decay),
                    decoupled: matches!(self.config, OptimizerConfig::Adamw(_)),
                };
                fused_adam(&lists, adam, grad_scale)
            }
            OptimizerConfig::Sgd(config) => {
                let sgd = Sgd { learning_rate, momentum: config.momentum, weight_decay: decay(config.weight_decay) };
                fused_sgd((&parameters, &gradients, &first), sgd, grad_scale)
            }
        }
    }

    /// Moments, step counts and averages by parameter name, for a checkpoint.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let each = |slot: &Slot| {
            [("first", &slot.first), ("second", &slot.second), ("step", &slot.step)]
                .map(|(part, tensor)| (format!("{}.{part}", slot.name), tensor.shallow_clone()))
        };
        self.slots.iter().flat_map(each).chain(self.average.iter().flat_map(Ema::state)).collect()
    }

    pub fn load(&mut self, mut state: BTreeMap<String, Tensor>) -> Result<()> {
        if let Some(average) = &mut self.average {
            average.load(&mut state)?;
        }
        for slot in &mut self.slots {
            for (part, tensor) in [("first", &mut slot.first), ("second", &mut slot.second), ("step", &mut slot.step)] {
                let name = format!("{}.{part}", slot.name);
                let value = state.remove(&name).with_context(|| format!("the checkpoint lacks `{name}`"))?;
                anyhow::ensure!(value.size() == tensor.size(), "`{name}` in the checkpoint has another shape");
                tensor.f_copy_(&value)?;
            }
        }
        Ok(())
    }
}
