//! Steps as CUDA graphs, one per batch shape: gathering the batch, forward, backward, clipping, update and average.
//!
//! A shape is recorded when it occurs the second time. Operators are called one by one before that, and for steps that
//! cannot be recorded: those of several batches, that compare the tasks' gradients, in which GradNorm sets its initial losses,
//! or with `lazy_rows`.

use std::collections::HashMap;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::compute::{Computed, Inputs};
use super::step_timer::Part;
use super::{Step, Trainer};
use crate::data::BatchPlan;
use crate::libtorch::{CudaGraph, GraphPool, Number, seed_generator, upload, upload_into, with_seed_at};
use crate::optim::StepRates;
use crate::weighting::{Reference, Wants};

/// The most shapes that are recorded, as a graph takes memory on host and device.
const MOST: usize = 512;

pub struct Graphs {
    how: How,
    /// By shape; `None` if it has occurred once.
    steps: HashMap<Vec<i64>, Option<Recorded>>,
    pool: GraphPool,
    recording: bool,
}

/// How steps of one shape are taken.
enum How {
    Off,
    Replayed,
    /// Computed again from the recorded inputs, on any device: for tests.
    Computed,
}

struct Recorded {
    graph: Option<CudaGraph>,
    /// The step's numbers on the device: a batch, the seed of dropout, then [`packed`].
    numbers: Tensor,
    computed: Option<Computed>,
}

impl Graphs {
    /// Off if `on` is false or there is no CUDA.
    pub fn new(on: bool, device: Device) -> Self {
        Graphs {
            how: if on && device != Device::Cpu { How::Replayed } else { How::Off },
            steps: HashMap::new(),
            pool: GraphPool::default(),
            recording: false,
        }
    }

    /// As with CUDA, except that steps are computed again, not replayed.
    pub fn rehearsed(device: Device) -> Self {
        Graphs { how: How::Computed, ..Graphs::new(false, device) }
    }

    pub fn on(&self) -> bool {
        !matches!(self.how, How::Off)
    }

    /// Whether device work is now recorded instead of done.
    pub fn recording(&self) -> bool {
        self.recording
    }

    /// The number of shapes that are recorded.
    pub fn n_recorded(&self) -> usize {
        self.steps.values().flatten().count()
    }
}

impl Trainer<'_> {
    /// Replays a step from a graph; `None` if it has to be computed instead.
    pub(super) fn recorded(
        &mut self,
        step: &Step,
        plans: &[Vec<BatchPlan>],
        inputs: &Inputs,
    ) -> Result<Option<Computed>> {
        let [parts] = plans else { return Ok(None) };
        let [plan] = parts.as_slice() else { return Ok(None) };
        if !self.graphs.on() || inputs.diagnose || inputs.rows.is_some() || !inputs.recordable {
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
        seed_generator(self.dropout_seed(step, 0), recorded.numbers.device());
        upload_into(&self.numbers(step, plan, inputs), &recorded.numbers)?;
        let again = match &recorded.graph {
            Some(graph) => graph.replay().map(|()| recorded.computed.as_ref().map(Computed::copy)),
            None => self.compute_kept(step, plan, &recorded.numbers, inputs).map(Some),
        };
        self.graphs.steps.insert(key, Some(recorded));
        self.timer.end(Part::Graph);
        again
    }

    /// The key of a step's graph: what all steps that it serves have in common.
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
        let numbers = upload(&self.numbers(step, plan, inputs), self.model.parameters.device());
        if let How::Computed = self.graphs.how {
            return Ok(Recorded { graph: None, numbers, computed: None });
        }
        // The timer waits for the device, which cannot be recorded.
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

    /// The numbers that the device needs for a step.
    fn numbers(&self, step: &Step, plan: &BatchPlan, inputs: &Inputs) -> Vec<i64> {
        let mut numbers = self.train.numbers(plan);
        numbers.extend([self.dropout_seed(step, 0) as i64, packed(inputs.rates)]);
        numbers
    }

    /// Computes a step from the memory that graphs read.
    fn compute_kept(&mut self, step: &Step, plan: &BatchPlan, numbers: &Tensor, inputs: &Inputs) -> Result<Computed> {
        let both = numbers.narrow(0, numbers.size()[0] - 1, 1).view_dtype(Kind::Float);
        let (rate, share) = (both.get(0), both.get(1));
        let rates = StepRates { learning_rate: Number::Device(&rate), share: Number::Device(&share) };
        let kept = Inputs { rates, ..*inputs };
        let batch = self.train.gather(plan, numbers);
        let seed = numbers.narrow(0, numbers.size()[0] - 2, 1);
        with_seed_at(self.dropout_seed(step, 0), &seed, || self.compute(step, &[[batch]], &kept))
    }
}

/// Two float32, one after the other in memory.
fn packed(rates: StepRates) -> i64 {
    let bytes = |number: Number| (number.on_host().unwrap_or_default() as f32).to_ne_bytes();
    let (rate, share) = (bytes(rates.learning_rate), bytes(rates.share));
    i64::from_ne_bytes([rate[0], rate[1], rate[2], rate[3], share[0], share[1], share[2], share[3]])
}
