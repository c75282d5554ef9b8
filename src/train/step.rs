//! One step: batches to losses, losses to gradients, gradients to an update; the host reads the results later.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::compute::Inputs;
use super::step_timer::Part;
use super::{State, Step, Trainer};
use crate::data::{Batch, BatchPlan};
use crate::libtorch::workers;
use crate::optim::StepRates;
use crate::task::{Task, TaskId};

/// The fewest rows per part: splitting a batch further costs more than it gains.
const ROWS_A_WORKER: usize = 4;

/// Results of steps that are still on the device.
pub struct Pending {
    steps: Vec<Waiting>,
    device: Device,
    /// Weights of the last step, `[T]`.
    pub weights: Option<Tensor>,
    /// From the last step that compared the tasks' gradients: which were present, and the inner products [T, T].
    pub gram: Option<(Vec<bool>, Tensor)>,
}

struct Waiting {
    number: usize,
    /// The losses of the tasks present, in order, then the gradient norm, which is -1 if float16 skipped the step.
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
        Pending { steps: Vec::new(), device, weights: None, gram: None }
    }

    /// On the CPU reading costs nothing; on CUDA it waits for the device, so it is left to the log interval.
    pub fn should_drain(&self) -> bool {
        self.device == Device::Cpu
    }

    /// Adds the waiting results to the sums of `state`.
    pub fn drain(&mut self, state: &mut State, tasks: &[Task]) -> Result<(), NotFinite> {
        let values: Vec<&Tensor> = self.steps.iter().map(|waiting| &waiting.values).collect();
        if values.is_empty() {
            return Ok(());
        }
        // One copy from the device for all waiting steps.
        let all = Vec::<f64>::try_from(Tensor::cat(&values, 0).to_kind(Kind::Double));
        let mut all = all.expect("invariant: a flat list of numbers").into_iter();
        for waiting in self.steps.drain(..) {
            let values: Vec<f64> = all.by_ref().take(waiting.values.numel()).collect();
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
            let norm = (norm >= 0.0).then_some(norm);
            state.interval.add(&losses, norm);
            state.epoch.add(&losses, norm);
        }
        Ok(())
    }
}

impl Trainer<'_> {
    /// Takes one step and returns its number of tokens without padding. Only recording a graph waits for the device.
    pub fn take(&mut self, step: &Step, pending: &mut Pending) -> Result<i64> {
        self.timer.start();
        self.optimizer.begin()?;
        self.timer.end(Part::Update);
        let plans: Vec<Vec<BatchPlan>> = step.batches.iter().map(|rows| self.parts(rows)).collect();
        let parts = || plans.iter().flatten();
        let decisions = |task: usize| -> i64 { parts().map(|part| part.n_decisions(TaskId(task))).sum() };
        let n_decisions: Vec<i64> = (0..self.tasks.len()).map(decisions).collect();
        let present: Vec<bool> = n_decisions.iter().map(|&n| n > 0).collect();
        let touched = self.reads_rows().then(|| {
            let all = step.batches.iter().flatten();
            let tokens: Vec<i32> = all.flat_map(|&row| self.train.set.tokens(row)).copied().collect();
            self.model.embedding.touched(&tokens)
        });
        self.timer.end(Part::Batch);
        let rows = match touched {
            Some(touched) => {
                self.optimizer.catch_up(Some(&touched))?;
                Some(self.model.embedding.rows(touched))
            }
            None => None,
        };
        self.timer.end(Part::Update);
        let recordable = self.weighting.prepare(step.number, &present)?;
        self.timer.end(Part::Weighting);
        let inputs = Inputs {
            wants: self.weighting.wants(step.number),
            recordable,
            n_decisions: &n_decisions,
            rows: rows.as_ref(),
            rates: StepRates {
                learning_rate: self.learning_rate(step.number, step.n_steps).into(),
                share: self.optimizer.share(step.number).into(),
            },
            diagnose: step.diagnose && present.iter().filter(|&&present| present).count() > 1,
        };
        let computed = match self.recorded(step, &plans, &inputs)? {
            Some(computed) => computed,
            None => {
                let gather = |parts: &Vec<BatchPlan>| parts.iter().map(|part| self.train.gathered(part)).collect();
                let batches: Vec<Vec<Batch>> = plans.iter().map(gather).collect();
                self.timer.end(Part::Batch);
                self.compute(step, &batches, &inputs)?
            }
        };
        if let Some(gram) = computed.gram {
            pending.gram = Some((present.clone(), gram));
        }
        pending.weights = Some(computed.weights);
        pending.steps.push(Waiting { number: step.number, values: computed.values, present });
        Ok(parts().map(BatchPlan::n_tokens).sum())
    }

    /// Whether the host determines which table rows a step reads. On CUDA the device does, because a recorded step has
    /// no lists of changing length; except with `lazy_rows`.
    fn reads_rows(&self) -> bool {
        let on_cpu = self.model.parameters.device() == Device::Cpu && !self.graphs.on();
        on_cpu || self.optimizer.lazy_rows()
    }

    /// Splits a batch into one part per worker, or fewer if it is small.
    fn parts(&self, rows: &[usize]) -> Vec<BatchPlan> {
        let n = workers().min(rows.len() / ROWS_A_WORKER).max(1);
        (0..n).map(|i| self.train.plan(rows, rows.len() * i / n..rows.len() * (i + 1) / n)).collect()
    }
}
