//! From task losses to the step's gradient and, on request, the norm of each task's own gradient.
//!
//! T tasks. Weights are held constant: the network is trained on sum_i w_i L_i alone, not on a strategy's own loss.

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use super::taps::squared_norms;
use crate::libtorch::{add_lists, backward, copy_lists};
use crate::model::{Model, Shared, TableRows};
use crate::task::Task;
use crate::weighting::Reference;

/// What a backward pass needs besides a batch and its losses.
#[derive(Clone, Copy)]
pub struct Backward<'a> {
    pub model: &'a Model,
    pub tasks: &'a [Task],
    /// Where the norm of each task's own gradient is taken, if anywhere.
    pub reference: Option<Reference>,
    /// Whether gradients of 16-bit copies stay in 16 bits if one pass computes them; otherwise they become float32.
    pub halves: bool,
    /// Numbers of the parameters that get no gradient; a single pass for all tasks skips them.
    pub frozen: &'a [usize],
}

/// The gradient of a part of a batch, of a batch or of a step.
#[derive(Default)]
pub struct Gradients {
    /// The gradient of sum_i w_i L_i by parameter; undefined if no loss depends on it, only rows with [`TableRows`].
    pub sum: Vec<Tensor>,
    /// With `Reference::Representation`: squared norms of the tasks' unweighted gradients.
    squares: Option<Squares>,
    /// With `Reference::LastLayer`: by task, its unweighted gradients at that layer's weights.
    own: Vec<Vec<Tensor>>,
}

enum Squares {
    /// `[T]` float64.
    Known(Tensor),
    /// Still to be computed, from the gradients of weighted losses at what heads read from the trunk: the task of each, and
    /// the tasks' weights.
    Of(Vec<Tensor>, Vec<usize>, Tensor),
}

impl Squares {
    fn value(&self) -> Result<Tensor> {
        match self {
            Squares::Known(squares) => Ok(squares.shallow_clone()),
            Squares::Of(gradients, tasks, weights) => squared_norms(gradients, tasks, weights),
        }
    }
}

/// The losses of one batch, and their factors.
#[derive(Clone, Copy)]
pub struct Weighted<'a> {
    /// By task.
    pub losses: &'a [Option<Tensor>],
    /// `[T]` float32.
    pub weights: &'a Tensor,
    /// A further factor of all losses, so that small gradients do not underflow in float16.
    pub scale: Option<&'a Tensor>,
}

/// The losses of the tasks present, each with its entry of `weights` `[T]`.
fn with_weights<'a>(losses: &'a [Option<Tensor>], weights: &'a Tensor) -> impl Iterator<Item = (&'a Tensor, Tensor)> {
    losses.iter().enumerate().filter_map(move |(i, loss)| Some((loss.as_ref()?, weights.get(i as i64))))
}

/// sum_i w_i L_i over the tasks present; `weights` `[T]` float32.
pub fn weighted_sum(losses: &[Option<Tensor>], weights: &Tensor) -> Option<Tensor> {
    with_weights(losses, weights).map(|(loss, weight)| loss * weight).reduce(|a, b| a + b)
}

/// Losses as `[T]` float64 without gradient, 0 for absent tasks.
pub fn as_vector(losses: &[Option<Tensor>], device: Device) -> Tensor {
    let zero = Tensor::zeros([], (Kind::Float, device));
    let all: Vec<Tensor> =
        losses.iter().map(|loss| loss.as_ref().map_or(zero.shallow_clone(), Tensor::detach)).collect();
    Tensor::stack(&all, 0).to_kind(Kind::Double)
}

impl Backward<'_> {
    /// The backward pass. All gradients and norms include the factor `scale`, if there is one.
    ///
    /// # Errors
    /// A task whose loss does not depend on the point where its norm is taken.
    pub fn pass(&self, shared: &Shared, rows: Option<&TableRows>, losses: Weighted) -> Result<Gradients> {
        let mut own: Vec<Vec<Tensor>> = self.tasks.iter().map(|_| Vec::new()).collect();
        let mut squares = None;
        let inputs = self.model.inputs(rows);
        let mut sum = match self.reference {
            Some(Reference::LastLayer) => self.by_task(shared, &inputs, losses, &mut own)?,
            _ => self.at_once(shared, inputs, losses, &mut squares)?,
        };
        // Passes by task also compute gradients of frozen parameters.
        for &number in self.frozen {
            sum.get_mut(number).into_iter().for_each(|gradient| *gradient = Tensor::new());
        }
        if !self.halves || self.reference == Some(Reference::LastLayer) {
            widen(&mut sum)?;
        }
        Ok(Gradients { sum, squares, own })
    }

    /// One backward pass for all tasks. Its gradients at the taps give the norms at the representation.
    fn at_once<'a>(
        &self,
        shared: &'a Shared,
        mut inputs: Vec<&'a Tensor>,
        Weighted { losses, weights, scale }: Weighted,
        squares: &mut Option<Squares>,
    ) -> Result<Vec<Tensor>> {
        let scaled = scale.map(|scale| weights * scale);
        let (outputs, own): (Vec<&Tensor>, Vec<Tensor>) =
            with_weights(losses, scaled.as_ref().unwrap_or(weights)).unzip();
        if outputs.is_empty() {
            return Ok(Vec::new());
        }
        let n = inputs.len();
        let moving: Vec<usize> = (0..n).filter(|number| !self.frozen.contains(number)).collect();
        inputs = moving.iter().map(|&number| inputs[number]).collect();
        let tapped: Vec<usize> = match self.reference {
            Some(_) => (0..losses.len()).filter(|&task| losses[task].is_some()).collect(),
            None => Vec::new(),
        };
        inputs.extend(tapped.iter().flat_map(|&task| &shared.taps[task]).map(|(_, tap)| &tap.tokens));
        if inputs.is_empty() {
            return Ok(Vec::new());
        }
        let mut moved = backward(&outputs, &own.iter().collect::<Vec<_>>(), &inputs, false)?;
        let at_taps = moved.split_off(moving.len());
        let mut gradients: Vec<Tensor> = (0..n).map(|_| Tensor::new()).collect();
        moving.into_iter().zip(moved).for_each(|(number, gradient)| gradients[number] = gradient);
        if at_taps.is_empty() {
            return Ok(gradients);
        }
        let mut tasks = Vec::new();
        for &task in &tapped {
            self.ensure_path(task, &at_taps[tasks.len()])?;
            tasks.extend(shared.taps[task].iter().map(|_| task));
        }
        let of = Squares::Of(at_taps, tasks, weights.shallow_clone());
        // A GPU computes them later, beside the update.
        *squares = Some(if weights.device() == Device::Cpu { Squares::Known(of.value()?) } else { of });
        Ok(gradients)
    }

    /// A backward pass per task down to the input of the last shared layer. The weighted sum of their gradients goes
    /// further down in one pass, so that nothing is computed twice.
    fn by_task(
        &self,
        shared: &Shared,
        parameters: &[&Tensor],
        Weighted { losses, weights, scale }: Weighted,
        by_weights: &mut [Vec<Tensor>],
    ) -> Result<Vec<Tensor>> {
        let range = self.model.last_layer.clone();
        let (below, above) = parameters.split_at(range.start);
        let mut inputs = above.to_vec();
        // Inputs that come only from frozen vectors have no gradient.
        let cuts: Vec<&Tensor> = shared.cuts.iter().filter(|cut| cut.requires_grad()).collect();
        inputs.extend(&cuts);
        let one = scale.map_or_else(|| weights.ones_like().get(0), Tensor::shallow_clone);
        let last = losses.iter().rposition(Option::is_some);
        let mut sum: Vec<Tensor> = Vec::new();
        for (task, loss) in losses.iter().enumerate() {
            let Some(loss) = loss else { continue };
            let mut own = backward(&[loss], &[&one], &inputs, Some(task) != last)?;
            widen(&mut own)?;
            self.ensure_path(task, &own[0])?;
            let weight = weights.get(task as i64);
            let weighted = own.iter().map(|g| if g.defined() { g * &weight } else { g.shallow_clone() }).collect();
            accumulate(&mut sum, weighted)?;
            by_weights[task] = own.into_iter().take(range.len()).collect();
        }
        if sum.is_empty() {
            return Ok(Vec::new());
        }
        let at_cuts = sum.split_off(above.len());
        let down: (Vec<&Tensor>, Vec<&Tensor>) =
            cuts.iter().copied().zip(&at_cuts).filter(|(_, gradient)| gradient.defined()).unzip();
        if down.0.is_empty() {
            return Ok(sum);
        }
        let mut gradients = backward(&down.0, &down.1, below, false)?;
        gradients.extend(sum);
        Ok(gradients)
    }

    fn ensure_path(&self, task: usize, gradient: &Tensor) -> Result<()> {
        let name = &self.tasks[task].name;
        ensure!(gradient.defined(), "task `{name}` has no path to the shared trunk, so its gradient there has no norm");
        Ok(())
    }
}

impl Gradients {
    /// Adds the gradients of another part or batch.
    pub fn merge(&mut self, other: Gradients) -> Result<()> {
        self.own.resize_with(other.own.len(), Vec::new);
        for (own, more) in self.own.iter_mut().zip(other.own) {
            accumulate(own, more)?;
        }
        self.squares = match (self.squares.take(), other.squares) {
            (Some(squares), Some(more)) => Some(Squares::Known(squares.value()? + more.value()?)),
            (squares, more) => squares.or(more),
        };
        accumulate(&mut self.sum, other.sum)
    }

    /// 2-norms of the tasks' unweighted gradients at the reference, `[T]` float64, 0 for absent tasks.
    pub fn norms(&self, device: Device) -> Result<Tensor> {
        if let Some(squares) = &self.squares {
            return Ok(squares.value()?.sqrt());
        }
        let square = |own: &Vec<Tensor>| {
            let squares = own.iter().map(|g| g.norm().to_kind(Kind::Double).square());
            squares.reduce(|a, b| a + b).unwrap_or_else(|| Tensor::zeros([], (Kind::Double, device)))
        };
        Ok(Tensor::stack(&self.own.iter().map(square).collect::<Vec<_>>(), 0).sqrt())
    }
}

/// Converts 16-bit gradients to float32.
fn widen(gradients: &mut [Tensor]) -> Result<()> {
    let narrow: Vec<&mut Tensor> =
        gradients.iter_mut().filter(|g| g.defined() && matches!(g.kind(), Kind::Half | Kind::BFloat16)).collect();
    let floats: Vec<Tensor> =
        narrow.iter().map(|gradient| Tensor::empty(gradient.size(), (Kind::Float, gradient.device()))).collect();
    if floats.is_empty() {
        return Ok(());
    }
    copy_lists(&floats.iter().collect::<Vec<_>>(), &narrow.iter().map(|gradient| &**gradient).collect::<Vec<_>>())?;
    narrow.into_iter().zip(floats).for_each(|(gradient, float)| *gradient = float);
    Ok(())
}

/// The gradients of the tasks' losses at the last layer's weights, flattened, 0 for absent tasks: [T, n]. The graph is
/// kept. During the pass `scale` multiplies the losses, so that small gradients do not underflow in float16; the result
/// is unscaled.
pub fn at_last_layer(model: &Model, losses: &[Option<Tensor>], scale: Option<&Tensor>) -> Result<Tensor> {
    let parameters = &model.inputs(None)[model.last_layer.clone()];
    let n: usize = parameters.iter().map(|parameter| parameter.numel()).sum();
    let row = |loss: &Option<Tensor>| {
        let Some(loss) = loss else {
            return Ok(Tensor::zeros([n as i64], (Kind::Float, parameters[0].device())));
        };
        let one = scale.map_or_else(|| loss.ones_like(), Tensor::shallow_clone);
        let gradients = backward(&[loss], &[&one], parameters, true)?;
        let flat = gradients.iter().zip(parameters).map(|(gradient, parameter)| match gradient.defined() {
            true => gradient.flatten(0, -1).to_kind(Kind::Float),
            false => Tensor::zeros([parameter.numel() as i64], (Kind::Float, parameter.device())),
        });
        Ok(Tensor::cat(&flat.collect::<Vec<_>>(), 0))
    };
    let rows = Tensor::stack(&losses.iter().map(row).collect::<Result<Vec<_>>>()?, 0);
    Ok(scale.map_or(rows.shallow_clone(), |scale| rows / scale))
}

/// Adds gradients; those of heads that a batch did not use are undefined.
fn accumulate(sum: &mut Vec<Tensor>, more: Vec<Tensor>) -> Result<()> {
    if sum.is_empty() || more.is_empty() {
        sum.extend(more);
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
