//! Times the parts of a step, for `bench`. On CUDA each measurement waits for the device, which training never does.

use std::time::Instant;

use tch::Device;

/// The parts of a step that are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Gathering the batches.
    Batch,
    /// Embedding, trunk, heads and losses.
    Forward,
    Backward,
    /// Clipping, optimizer, moving average.
    Update,
    /// The weighting strategy's own work.
    Weighting,
    /// A step replayed from a CUDA graph, from gathering the batch to the update.
    Graph,
}

impl Part {
    pub const ALL: [(Part, &str); 6] = [
        (Part::Batch, "batch"),
        (Part::Forward, "forward"),
        (Part::Backward, "backward"),
        (Part::Update, "clipping, update, average"),
        (Part::Weighting, "loss weighting"),
        (Part::Graph, "CUDA graph"),
    ];
}

/// Seconds by part; by default nothing is timed.
#[derive(Default)]
pub struct StepTimer(Option<Watch>);

struct Watch {
    device: Device,
    since: Instant,
    seconds: [f64; Part::ALL.len()],
}

impl StepTimer {
    pub fn of(device: Device) -> Self {
        StepTimer(Some(Watch { device, since: Instant::now(), seconds: [0.0; Part::ALL.len()] }))
    }

    pub fn start(&mut self) {
        if let Some(watch) = &mut self.0 {
            watch.since = Instant::now();
        }
    }

    /// Adds the time since the last [`Self::start`] or `end` to `part`.
    pub fn end(&mut self, part: Part) {
        let Some(watch) = &mut self.0 else { return };
        if let Device::Cuda(index) = watch.device {
            tch::Cuda::synchronize(index as i64);
        }
        let now = Instant::now();
        watch.seconds[part as usize] += (now - watch.since).as_secs_f64();
        watch.since = now;
    }

    /// By part, in the order of [`Part::ALL`].
    pub fn seconds(&self) -> [f64; Part::ALL.len()] {
        self.0.as_ref().map_or([0.0; Part::ALL.len()], |watch| watch.seconds)
    }
}
