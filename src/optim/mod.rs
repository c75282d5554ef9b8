//! Optimizers on libtorch's fused operators, with their state in the open so that a run resumes exactly; schedules.

mod average;
mod scale;
mod schedule;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

pub use average::Average;
pub use scale::LossScale;
pub use schedule::{RangeConfig, ScheduleConfig};

use crate::libtorch::{Adam, AdamLists, Number, Sgd, count_up, fused_adam, fused_sgd, side_by_side, workers};

/// The `training.optimizer:` of an experiment; `kind:` names the variant.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerConfig {
    /// Adam with decoupled weight decay (Loshchilov & Hutter 2019).
    Adamw(AdamConfig),
    /// Adam (Kingma & Ba 2015); weight decay is an L2 term of the gradient.
    Adam(AdamConfig),
    /// Stochastic gradient descent with momentum; weight decay is an L2 term of the gradient.
    Sgd(SgdConfig),
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        OptimizerConfig::Adamw(AdamConfig::default())
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamConfig {
    /// Default 2e-3, more than 0.
    pub learning_rate: f64,
    /// Decay rates of the two moments. Default [0.9, 0.999].
    pub betas: (f64, f64),
    /// Default 1e-8.
    pub epsilon: f64,
    /// Default 0.01.
    pub weight_decay: f64,
    /// Whether biases and embeddings decay too. Default false.
    pub decay_all: bool,
    /// Update only those rows of embedding tables whose tokens stand in the step, and leave the moments of the others as they
    /// are. Cheaper for large vocabularies, and another optimizer. Default false.
    pub lazy_rows: bool,
}

impl Default for AdamConfig {
    fn default() -> Self {
        AdamConfig {
            learning_rate: 2e-3,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay: 0.01,
            decay_all: false,
            lazy_rows: false,
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SgdConfig {
    /// Default 0.1, more than 0.
    pub learning_rate: f64,
    /// Default 0.9, from 0 to below 1.
    pub momentum: f64,
    /// Default 0.
    pub weight_decay: f64,
    /// Whether biases and embeddings decay too. Default false.
    pub decay_all: bool,
    /// Update only those rows of embedding tables whose tokens stand in the step, and leave the moments of the others as they
    /// are. Cheaper for large vocabularies, and another optimizer. Default false.
    pub lazy_rows: bool,
}

impl Default for SgdConfig {
    fn default() -> Self {
        SgdConfig { learning_rate: 0.1, momentum: 0.9, weight_decay: 0.0, decay_all: false, lazy_rows: false }
    }
}

impl OptimizerConfig {
    pub fn set_learning_rate(&mut self, rate: f64) {
        match self {
            OptimizerConfig::Adamw(config) | OptimizerConfig::Adam(config) => config.learning_rate = rate,
            OptimizerConfig::Sgd(config) => config.learning_rate = rate,
        }
    }

    fn decay_all(&self) -> bool {
        match self {
            OptimizerConfig::Adamw(config) | OptimizerConfig::Adam(config) => config.decay_all,
            OptimizerConfig::Sgd(config) => config.decay_all,
        }
    }

    fn lazy_rows(&self) -> bool {
        match self {
            OptimizerConfig::Adamw(config) | OptimizerConfig::Adam(config) => config.lazy_rows,
            OptimizerConfig::Sgd(config) => config.lazy_rows,
        }
    }

    pub fn learning_rate(&self) -> f64 {
        match self {
            OptimizerConfig::Adamw(config) | OptimizerConfig::Adam(config) => config.learning_rate,
            OptimizerConfig::Sgd(config) => config.learning_rate,
        }
    }
}

/// Biases, other vectors such as a CRF's first tags, and all of the embedding: their size says nothing of complexity.
fn is_spared(name: &str, parameter: &Tensor) -> bool {
    parameter.dim() < 2 || name.starts_with("embedding.")
}

/// One parameter with what the optimizer remembers of it.
struct Slot {
    name: String,
    parameter: Tensor,
    first: Tensor,
    second: Tensor,
    /// Steps that this parameter has had: a head absent from a step has none.
    step: Tensor,
    decays: bool,
    /// For a table whose gradient comes as rows: zeros between steps, into which the rows are written, so that nothing of the
    /// table's size is cleared, scaled or added up.
    scratch: Option<Tensor>,
}

/// Tables of which a step reads some rows alone.
pub struct Touched {
    /// `[U]`
    pub ids: Tensor,
    /// Their numbers among the parameters.
    pub tables: Vec<usize>,
}

/// What one update works on: a parameter, rows of it, or a block.
struct Piece {
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: Tensor,
    decays: bool,
}

impl Piece {
    /// Block `i` of `n`, in which no number is that of another block; small ones are not cut, and are block 0's.
    fn block(&self, i: usize, n: usize) -> Option<Piece> {
        if n == 1 || self.parameter.dim() == 0 || self.parameter.numel() < SMALL {
            return (i == 0).then(|| self.cut(|tensor| tensor.shallow_clone()));
        }
        let length = self.parameter.size()[0] as usize;
        let (start, end) = (length * i / n, length * (i + 1) / n);
        // SGD has no second moments.
        let narrow = |tensor: &Tensor| match tensor.dim() == self.parameter.dim() {
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

/// Numbers below which a parameter is one worker's.
const SMALL: usize = 1 << 14;

impl Slot {
    /// The update's view of it; `gradient` is that of `rows` alone where they are given.
    fn piece(&mut self, gradient: &Tensor, rows: Option<&Touched>, lazy: bool) -> Result<Piece> {
        let whole = |gradient: Tensor| Piece {
            parameter: self.parameter.shallow_clone(),
            gradient,
            first: self.first.shallow_clone(),
            second: self.second.shallow_clone(),
            step: self.step.shallow_clone(),
            decays: self.decays,
        };
        let Some(rows) = rows else { return Ok(whole(gradient.shallow_clone())) };
        if lazy {
            let of_rows = |tensor: &Tensor| match tensor.dim() == self.parameter.dim() {
                true => tensor.index_select(0, &rows.ids),
                false => tensor.shallow_clone(),
            };
            let gradient = gradient.shallow_clone();
            return Ok(Piece { gradient, ..whole(self.parameter.shallow_clone()).cut(of_rows) });
        }
        let mut scratch = match &self.scratch {
            Some(scratch) => scratch.shallow_clone(),
            None => self.parameter.zeros_like(),
        };
        let _ = scratch.f_index_copy_(0, &rows.ids, gradient)?;
        let piece = whole(scratch.shallow_clone());
        self.scratch = Some(scratch);
        Ok(piece)
    }

    /// After the update: rows go back to their table, or the scratch becomes zeros again.
    fn put_back(&mut self, piece: &Piece, rows: &Touched, lazy: bool) -> Result<()> {
        if !lazy {
            if let Some(scratch) = &mut self.scratch {
                let _ = scratch.f_index_fill_(0, &rows.ids, 0.0)?;
            }
            return Ok(());
        }
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

pub struct Optimizer {
    config: OptimizerConfig,
    slots: Vec<Slot>,
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
            scratch: None,
        };
        Optimizer { config: config.clone(), slots: parameters.map(slot).collect() }
    }

    pub fn lazy_rows(&self) -> bool {
        self.config.lazy_rows()
    }

    /// One update of the parameters that have a gradient, at `learning_rate`. With `rows`, the gradients of their tables are of
    /// these rows alone, and those of all others 0. Where `skip` (one float on the device) is 1, nothing changes.
    pub fn step<'a>(
        &mut self,
        gradients: &[Tensor],
        rows: Option<&Touched>,
        learning_rate: impl Into<Number<'a>>,
        skip: &Tensor,
    ) -> Result<()> {
        let learning_rate = learning_rate.into();
        let lazy = self.config.lazy_rows();
        let rows_of = |number: usize| rows.filter(|rows| rows.tables.contains(&number));
        let mut pieces = Vec::new();
        let mut present = Vec::new();
        for (number, (slot, gradient)) in self.slots.iter_mut().zip(gradients).enumerate() {
            if gradient.defined() {
                let rows = rows_of(number);
                pieces.push(slot.piece(gradient, rows, lazy)?);
                present.push((number, rows));
            }
        }
        if pieces.is_empty() {
            return Ok(());
        }
        count_up(&pieces.iter().map(|piece| &piece.step).collect::<Vec<_>>(), skip)?;
        let workers = workers();
        let update = |worker: usize| -> Result<()> {
            let own: Vec<Piece> = pieces.iter().filter_map(|piece| piece.block(worker, workers)).collect();
            for decays in [true, false] {
                let some: Vec<&Piece> = own.iter().filter(|piece| piece.decays == decays).collect();
                self.update(&some, learning_rate, skip, decays)?;
            }
            Ok(())
        };
        side_by_side(workers, &update).into_iter().collect::<Result<()>>()?;
        for ((number, rows), piece) in present.into_iter().zip(&pieces) {
            if let Some(rows) = rows {
                self.slots[number].put_back(piece, rows, lazy)?;
            }
        }
        Ok(())
    }

    /// The update of parameters that all decay, or of which none does.
    fn update(&self, pieces: &[&Piece], learning_rate: Number, skip: &Tensor, decays: bool) -> Result<()> {
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
                fused_adam(&lists, adam, skip)
            }
            OptimizerConfig::Sgd(config) => {
                let sgd = Sgd { learning_rate, momentum: config.momentum, weight_decay: decay(config.weight_decay) };
                // A zero buffer times momentum plus the gradient is what a first step puts there.
                fused_sgd((&parameters, &gradients, &first), sgd, false, skip)
            }
        }
    }

    /// Moments and step counts by parameter name, for a checkpoint.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let each = |slot: &Slot| {
            [("first", &slot.first), ("second", &slot.second), ("step", &slot.step)]
                .map(|(part, tensor)| (format!("{}.{part}", slot.name), tensor.shallow_clone()))
        };
        self.slots.iter().flat_map(each).collect()
    }

    pub fn load(&mut self, mut state: BTreeMap<String, Tensor>) -> Result<()> {
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
