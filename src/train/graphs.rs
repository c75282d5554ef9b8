//! Steps as CUDA graphs: one for each shape of a batch, over gathering it, forward, backward, clipping, update and average.
//!
//! A shape is recorded when it comes the second time. Before that, and where a step cannot be recorded, operators are called
//! one by one: steps of several batches, steps whose weights follow from the losses of some of the tasks, steps that compare the
//! tasks' gradients, and `lazy_rows`.

use std::collections::HashMap;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::compute::{Computed, Inputs};
use super::step_timer::Part;
use super::{Step, Trainer};
use crate::data::BatchPlan;
use crate::libtorch::{CudaGraph, GraphPool, Number, upload, upload_into};
use crate::weighting::{Reference, Wants};

/// Shapes that are recorded at most: a graph takes memory on host and device.
const MOST: usize = 512;

pub struct Graphs {
    how: How,
    /// By shape; `None` where it was seen once.
    steps: HashMap<Vec<i64>, Option<Recorded>>,
    pool: GraphPool,
    recording: bool,
    /// The weights of the losses on the device, `[T]`.
    weights: Tensor,
    /// What they were copied from. Strategies give new weights in another tensor.
    given: Option<Tensor>,
}

/// How steps of one shape are taken.
enum How {
    Off,
    Replayed,
    /// Computed again from what was kept, on any device: for tests.
    Computed,
}

struct Recorded {
    graph: Option<CudaGraph>,
    /// What the device is told of a step: a batch, then [`rates`].
    numbers: Tensor,
    computed: Option<Computed>,
}

impl Graphs {
    /// For `n_tasks` tasks; off where `on` is false or there is no CUDA.
    pub fn new(on: bool, n_tasks: usize, device: Device) -> Self {
        Graphs {
            how: if on && device != Device::Cpu { How::Replayed } else { How::Off },
            steps: HashMap::new(),
            pool: GraphPool::default(),
            recording: false,
            weights: Tensor::ones([n_tasks as i64], (Kind::Float, device)),
            given: None,
        }
    }

    /// Everything as with CUDA, but that steps are computed again, not replayed.
    pub fn rehearsed(n_tasks: usize, device: Device) -> Self {
        Graphs { how: How::Computed, ..Graphs::new(false, n_tasks, device) }
    }

    pub fn on(&self) -> bool {
        !matches!(self.how, How::Off)
    }

    /// Whether what is asked of the device now is recorded, not done.
    pub fn recording(&self) -> bool {
        self.recording
    }

    /// The number of shapes that are recorded.
    pub fn n_recorded(&self) -> usize {
        self.steps.values().flatten().count()
    }
}

impl Trainer<'_> {
    /// Takes a step as a graph; `None` where it has to be computed.
    pub(super) fn recorded(
        &mut self,
        step: &Step,
        plans: &[Vec<BatchPlan>],
        inputs: &Inputs,
    ) -> Result<Option<Computed>> {
        let [parts] = plans else { return Ok(None) };
        let [plan] = parts.as_slice() else { return Ok(None) };
        // Which tasks are present is known to the host: weights that follow from the losses have no mask where all are.
        let weighted = inputs.weights.is_some() || inputs.present.iter().all(|&present| present);
        if !self.graphs.on() || inputs.diagnose || inputs.rows.is_some() || !weighted {
            return Ok(None);
        }
        let key = self.shape(step, plan, inputs);
        if self.graphs.steps.get(&key).is_some_and(Option::is_none) && self.graphs.n_recorded() == MOST {
            return Ok(None);
        }
        let recorded = match self.graphs.steps.remove(&key) {
            Some(Some(recorded)) => recorded,
            Some(None) => match self.record(step, plan, inputs) {
                Ok(recorded) => recorded,
                Err(error) => {
                    log::warn!("CUDA graphs are off, operators are called one by one: {error:#}");
                    self.graphs.how = How::Off;
                    self.graphs.steps.clear();
                    return Ok(None);
                }
            },
            None => {
                self.graphs.steps.insert(key, None);
                return Ok(None);
            }
        };
        let given = self.graphs.given.as_ref().map(Tensor::data_ptr);
        if let Some(weights) = inputs.weights.filter(|weights| given != Some(weights.data_ptr())) {
            self.graphs.weights.f_copy_(weights)?;
            self.graphs.given = Some(weights.shallow_clone());
        }
        tch::manual_seed(self.dropout_seed(step, 0) as i64);
        upload_into(&self.numbers(plan, inputs), &recorded.numbers)?;
        let again = match &recorded.graph {
            Some(graph) => {
                graph.replay().map(|()| recorded.computed.as_ref().map(|computed| computed.copy(inputs.weights)))
            }
            None => {
                let computed = self.compute_kept(step, plan, &recorded.numbers, inputs);
                computed.map(|computed| Some(computed.copy(inputs.weights)))
            }
        };
        self.graphs.steps.insert(key, Some(recorded));
        self.timer.end(Part::Graph);
        again
    }

    /// What two steps have in common that one graph can serve.
    fn shape(&self, step: &Step, plan: &BatchPlan, inputs: &Inputs) -> Vec<i64> {
        let wants = match inputs.wants {
            Wants::Nothing => 0,
            Wants::Losses => 1,
            Wants::Norms(Reference::Representation) => 2,
            Wants::Norms(Reference::LastLayer) => 3,
        };
        let mut shape = vec![wants, self.n_frozen(step.number) as i64];
        shape.extend(plan.shape());
        shape
    }

    fn record(&mut self, step: &Step, plan: &BatchPlan, inputs: &Inputs) -> Result<Recorded> {
        let numbers = upload(&self.numbers(plan, inputs), self.model.parameters.device());
        if let How::Computed = self.graphs.how {
            return Ok(Recorded { graph: None, numbers, computed: None });
        }
        // A lap would wait for the device.
        let timer = std::mem::take(&mut self.timer);
        let mut pool = std::mem::take(&mut self.graphs.pool);
        self.graphs.recording = true;
        let recorded = CudaGraph::record(&mut pool, || self.compute_kept(step, plan, &numbers, inputs));
        self.graphs.recording = false;
        if std::mem::take(&mut pool.broken) {
            self.graphs.steps.clear();
        }
        (self.graphs.pool, self.timer) = (pool, timer);
        let (graph, computed) = recorded?;
        Ok(Recorded { graph: Some(graph), numbers, computed: Some(computed) })
    }

    /// What the device is told of a step.
    fn numbers(&self, plan: &BatchPlan, inputs: &Inputs) -> Vec<i64> {
        let mut numbers = self.train.numbers(plan);
        numbers.push(rates(inputs));
        numbers
    }

    /// A step from what graphs read.
    fn compute_kept(&mut self, step: &Step, plan: &BatchPlan, numbers: &Tensor, inputs: &Inputs) -> Result<Computed> {
        let weights = self.graphs.weights.shallow_clone();
        let both = numbers.narrow(0, numbers.size()[0] - 1, 1).view_dtype(Kind::Float);
        let (rate, share) = (both.get(0), both.get(1));
        let kept = Inputs {
            weights: inputs.weights.map(|_| &weights),
            learning_rate: Number::Device(&rate),
            share: Number::Device(&share),
            ..*inputs
        };
        let batch = self.train.gather(plan, numbers);
        self.compute(step, &[[batch]], &kept)
    }
}

/// The learning rate, and what new weights count in their average, float32 one after the other in memory.
fn rates(inputs: &Inputs) -> i64 {
    let bytes = |number: Number| (number.on_host().unwrap_or_default() as f32).to_ne_bytes();
    let (rate, share) = (bytes(inputs.learning_rate), bytes(inputs.share));
    i64::from_ne_bytes([rate[0], rate[1], rate[2], rate[3], share[0], share[1], share[2], share[3]])
}
