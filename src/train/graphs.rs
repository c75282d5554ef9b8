//! Steps as CUDA graphs: one for each shape of a batch, over forward, backward, clipping, update and average.
//!
//! A shape is recorded when it comes the second time. Before that, and where a step cannot be recorded, operators are called
//! one by one: steps of several batches, steps whose weights follow from their losses, steps that compare the tasks' gradients,
//! and `lazy_rows`.

use std::collections::HashMap;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::Trainer;
use super::compute::{Computed, Inputs};
use super::laps::Part;
use super::step::Step;
use crate::data::{Batch, Lengths};
use crate::libtorch::{CudaGraph, GraphPool, Number};
use crate::weighting::{Reference, Wants};

/// Shapes that are recorded at most: a graph takes memory on host and device.
const MOST: usize = 512;

pub struct Graphs {
    how: How,
    /// By shape; `None` where it was seen once.
    steps: HashMap<Vec<i64>, Option<Recorded>>,
    pool: GraphPool,
    recording: bool,
    /// What changes from step to step, on the device: the learning rate, what new weights count in their average, and the
    /// weights of the losses `[T]`.
    learning_rate: Tensor,
    share: Tensor,
    weights: Tensor,
}

/// How a step comes again.
enum How {
    Off,
    Replayed,
    /// Computed again from what was kept, on any device: for tests.
    Computed,
}

struct Recorded {
    graph: Option<CudaGraph>,
    batch: Batch,
    computed: Option<Computed>,
}

impl Graphs {
    /// For `n_tasks` tasks; off where `on` is false or there is no CUDA.
    pub fn new(on: bool, n_tasks: usize, device: Device) -> Self {
        let number = || Tensor::zeros([], (Kind::Float, device));
        Graphs {
            how: if on && device != Device::Cpu { How::Replayed } else { How::Off },
            steps: HashMap::new(),
            pool: GraphPool::default(),
            recording: false,
            learning_rate: number(),
            share: number(),
            weights: Tensor::ones([n_tasks as i64], (Kind::Double, device)),
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
        batches: &[Vec<Batch>],
        inputs: &Inputs,
    ) -> Result<Option<Computed>> {
        let (Some(weights), [parts]) = (inputs.weights, batches) else { return Ok(None) };
        let [batch] = parts.as_slice() else { return Ok(None) };
        if !self.graphs.on() || inputs.diagnose || inputs.rows.is_some() {
            return Ok(None);
        }
        let key = self.shape(step, batch, inputs);
        let mut recorded = match self.graphs.steps.remove(&key) {
            Some(Some(recorded)) => recorded,
            Some(None) if self.graphs.n_recorded() == MOST => return Ok(None),
            Some(None) => match self.record(step, batch, inputs) {
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
        self.graphs.weights.f_copy_(weights)?;
        for (slot, number) in
            [(&mut self.graphs.learning_rate, inputs.learning_rate), (&mut self.graphs.share, inputs.share)]
        {
            if let Number::Host(value) = number {
                let _ = slot.f_fill_(value)?;
            }
        }
        tch::manual_seed(self.dropout_seed(step, 0) as i64);
        recorded.batch.take_from(batch)?;
        let again = match &recorded.graph {
            Some(graph) => graph.replay().map(|()| recorded.computed.as_ref().map(Computed::copy)),
            None => self.compute_kept(step, &mut recorded.batch, inputs).map(Some),
        };
        self.graphs.steps.insert(key, Some(recorded));
        self.laps.end(Part::Graph);
        again
    }

    /// What two steps have in common that one graph can serve.
    fn shape(&self, step: &Step, batch: &Batch, inputs: &Inputs) -> Vec<i64> {
        let norms = match inputs.wants {
            Wants::Norms(Reference::Representation) => 1,
            Wants::Norms(Reference::LastLayer) => 2,
            Wants::Nothing | Wants::Losses => 0,
        };
        let mut shape = vec![norms, self.n_frozen(step.number) as i64];
        for lengths in [&batch.lengths, &batch.word_lengths] {
            shape.extend([lengths.host.len() as i64, lengths.max, i64::from(lengths.even())]);
        }
        shape.push(batch.bytes.as_ref().map_or(0, |bytes| bytes.size()[2]));
        for targets in &batch.targets {
            shape.extend(targets.as_ref().map_or([0; 4], |targets| {
                // Heads treat padded rows otherwise, and look at their own rows alone.
                let even = |lengths: &Lengths| i64::from(lengths.even_at(&targets.rows));
                [targets.rows.len() as i64, targets.n_decisions, even(&batch.lengths), even(&batch.word_lengths)]
            }));
        }
        shape
    }

    fn record(&mut self, step: &Step, batch: &Batch, inputs: &Inputs) -> Result<Recorded> {
        let mut kept = batch.copy();
        if let How::Computed = self.graphs.how {
            return Ok(Recorded { graph: None, batch: kept, computed: None });
        }
        // A lap would wait for the device.
        let laps = std::mem::take(&mut self.laps);
        let mut pool = std::mem::take(&mut self.graphs.pool);
        self.graphs.recording = true;
        let recorded = CudaGraph::record(&mut pool, || self.compute_kept(step, &mut kept, inputs));
        self.graphs.recording = false;
        (self.graphs.pool, self.laps) = (pool, laps);
        let (graph, computed) = recorded?;
        Ok(Recorded { graph: Some(graph), batch: kept, computed: Some(computed) })
    }

    /// A step from what graphs read.
    fn compute_kept(&mut self, step: &Step, batch: &mut Batch, inputs: &Inputs) -> Result<Computed> {
        let weights = self.graphs.weights.shallow_clone();
        let (rate, share) = (self.graphs.learning_rate.shallow_clone(), self.graphs.share.shallow_clone());
        let kept = Inputs {
            weights: Some(&weights),
            learning_rate: Number::Device(&rate),
            share: Number::Device(&share),
            ..*inputs
        };
        self.compute(step, std::slice::from_ref(&std::slice::from_ref(batch)), &kept)
    }
}
