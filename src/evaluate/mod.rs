//! `evaluate(model, data) -> Report`: losses and scores of every task over one split.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::data::DeviceSet;
use crate::metrics::Score;
use crate::model::{Decoded, Mode, Model};
use crate::task::{Task, TaskId};

/// One task's results on a split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskReport {
    pub name: String,
    /// Rows with a label for the task; 0 where the split has none, and then no score counts.
    pub n_sentences: usize,
    /// Mean loss in nats a labelled decision (sentence or word).
    pub loss: f64,
    /// The first chooses checkpoints.
    pub scores: Vec<Score>,
}

impl TaskReport {
    /// The score that chooses checkpoints.
    pub fn main_score(&self) -> Option<&Score> {
        self.scores.first().filter(|_| self.n_sentences > 0)
    }
}

/// Results on one split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// By [`TaskId`].
    pub tasks: Vec<TaskReport>,
    /// Share of the rows with labels for two tasks or more in which every label of every task is right.
    pub sentence_accuracy: Option<f64>,
}

impl Report {
    /// Mean of the tasks' main scores.
    pub fn mean(&self) -> f64 {
        let scores: Vec<f64> = self.tasks.iter().filter_map(|task| Some(task.main_score()?.value)).collect();
        scores.iter().sum::<f64>() / scores.len().max(1) as f64
    }
}

/// Sentences that go through the model at once outside training.
const BATCH: usize = 128;

/// Row numbers in batches of like length: padding is rare, and results do not depend on it.
fn batches(data: &DeviceSet) -> Vec<Vec<usize>> {
    let mut rows: Vec<usize> = (0..data.set.len()).collect();
    rows.sort_by_key(|&row| data.set.n_tokens(row));
    rows.chunks(BATCH).map(<[usize]>::to_vec).collect()
}

/// Runs `model` over all rows of `data`, every dropout off.
pub fn evaluate(model: &Model, data: &DeviceSet, tasks: &[Task]) -> Report {
    let _no_grad = tch::no_grad_guard();
    let mut metrics: Vec<_> = (0..tasks.len()).map(|task| model.head(TaskId(task)).metric()).collect();
    let mut losses = vec![(0.0, 0i64); tasks.len()];
    let mut n_sentences = vec![0; tasks.len()];
    let (mut n_joint, mut n_joint_right) = (0, 0);
    for rows in batches(data) {
        let batch = data.batch(&rows);
        let encoded = model.encode(&batch, &batch.token_ids, Mode::Eval);
        for (task, loss) in model.losses(&encoded, &batch, Mode::Eval).into_iter().enumerate() {
            let (Some(loss), Some(targets)) = (loss, &batch.targets[task]) else { continue };
            losses[task].0 += loss.double_value(&[]) * targets.n_decisions as f64;
            losses[task].1 += targets.n_decisions;
        }
        let decoded: Vec<Vec<Decoded>> = (0..tasks.len())
            .map(|task| {
                let head = model.head(TaskId(task));
                head.decode(&head.logits(&encoded.taps[task], Mode::Eval), &batch.word_lengths.host)
            })
            .collect();
        for (at, &row) in rows.iter().enumerate() {
            let (mut n_labelled, mut right) = (0, true);
            for task in 0..tasks.len() {
                let Some(gold) = data.set.labels(TaskId(task), row) else { continue };
                let predicted = &decoded[task][at].labels;
                metrics[task].update(gold, predicted);
                n_sentences[task] += 1;
                n_labelled += 1;
                right &= gold.iter().zip(predicted).all(|(&gold, &predicted)| gold as usize == predicted);
            }
            if n_labelled > 1 {
                n_joint += 1;
                n_joint_right += usize::from(right);
            }
        }
    }
    let task = |i: usize| TaskReport {
        name: tasks[i].name.clone(),
        n_sentences: n_sentences[i],
        loss: losses[i].0 / losses[i].1.max(1) as f64,
        scores: metrics[i].scores(),
    };
    Report {
        tasks: (0..tasks.len()).map(task).collect(),
        sentence_accuracy: (n_joint > 0).then(|| n_joint_right as f64 / n_joint as f64),
    }
}

/// What every task's head says of each row, in row order: by row, then by [`TaskId`].
pub fn predict(model: &Model, data: &DeviceSet, n_tasks: usize) -> Vec<Vec<Decoded>> {
    let _no_grad = tch::no_grad_guard();
    let mut results = vec![Vec::new(); data.set.len()];
    for rows in batches(data) {
        let batch = data.batch(&rows);
        let encoded = model.encode(&batch, &batch.token_ids, Mode::Eval);
        for task in 0..n_tasks {
            let head = model.head(TaskId(task));
            let logits: Tensor = head.logits(&encoded.taps[task], Mode::Eval);
            for (&row, decoded) in rows.iter().zip(head.decode(&logits, &batch.word_lengths.host)) {
                results[row].push(decoded);
            }
        }
    }
    results
}
