//! The state of a run: everything of a checkpoint that is not a tensor.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::evaluate::CheckpointScore;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: usize,
    /// The best score on dev so far, and its step.
    pub best: Option<CheckpointScore>,
    pub best_step: Option<usize>,
    pub best_by_task: Vec<Option<CheckpointScore>>,
    pub epochs_without_gain: usize,
    /// Losses since the last record, and since the start of the epoch.
    pub interval: Sums,
    #[serde(rename = "epoch_sums")]
    pub epoch: Sums,
    pub weighting: Value,
    /// A fingerprint of the data that the run began with.
    pub data: Option<String>,
}

impl State {
    pub fn new(n_tasks: usize) -> Self {
        let sums = Sums { losses: vec![(0.0, 0); n_tasks], norms: (0.0, 0), left_out: 0 };
        State { best_by_task: vec![None; n_tasks], interval: sums.clone(), epoch: sums, ..State::default() }
    }

    /// Records the scores on dev, and the tasks that reached a new best. A lower loss alone is no gain, except while
    /// the score is 0, as for spans in the first epochs.
    pub fn judge(&mut self, merit: CheckpointScore, improved: bool, by_task: Vec<Option<CheckpointScore>>) {
        let gained = self.best.is_none_or(|best| merit.score > best.score || (merit.score == 0.0 && improved));
        self.epochs_without_gain = if gained { 0 } else { self.epochs_without_gain + 1 };
        if improved {
            self.best = Some(merit);
            self.best_step = Some(self.step);
        }
        for (best, new) in self.best_by_task.iter_mut().zip(by_task) {
            *best = new.or(*best);
        }
    }
}

/// Sums of step losses by task, and of gradient norms.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Sums {
    losses: Vec<(f64, u64)>,
    norms: (f64, u64),
    /// Steps that float16 skipped.
    pub left_out: u64,
}

impl Sums {
    /// Adds a step: `losses` by task, `None` if absent, and the norm, `None` if float16 skipped the step.
    pub fn add(&mut self, losses: &[Option<f64>], norm: Option<f64>) {
        for ((sum, n), loss) in self.losses.iter_mut().zip(losses) {
            *sum += loss.unwrap_or(0.0);
            *n += u64::from(loss.is_some());
        }
        match norm {
            Some(norm) => self.norms = (self.norms.0 + norm, self.norms.1 + 1),
            None => self.left_out += 1,
        }
    }

    pub fn means(&self) -> Vec<Option<f64>> {
        self.losses.iter().map(|&(sum, n)| (n > 0).then(|| sum / n as f64)).collect()
    }

    pub fn mean_norm(&self) -> f64 {
        self.norms.0 / self.norms.1.max(1) as f64
    }

    pub fn reset(&mut self) {
        self.losses.fill((0.0, 0));
        self.norms = (0.0, 0);
        self.left_out = 0;
    }
}
