//! `evaluate(model, data) -> Report`: losses and scores of every task over one split.

use anyhow::Result;
use serde::{Deserialize, Serialize};

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
///
/// # Errors
/// Those of an exported module that computes in the model's place.
pub fn evaluate(model: &Model, data: &DeviceSet, tasks: &[Task]) -> Result<Report> {
    let _no_grad = tch::no_grad_guard();
    let mut metrics: Vec<_> = (0..tasks.len()).map(|task| model.head(TaskId(task)).metric()).collect();
    let mut losses = vec![(0.0, 0i64); tasks.len()];
    let mut n_sentences = vec![0; tasks.len()];
    let (mut n_joint, mut n_joint_right) = (0, 0);
    for rows in batches(data) {
        let batch = data.batch(&rows);
        // By row of the batch: labels of so many tasks, and whether all are right.
        let mut joint = vec![(0, true); rows.len()];
        for (task, logits) in model.logits(&batch)?.iter().enumerate() {
            let Some(targets) = &batch.targets[task] else { continue };
            let head = model.head(TaskId(task));
            let logits = logits.index_select(0, &targets.index);
            losses[task].0 += head.loss(&logits, targets, Mode::Eval).double_value(&[]) * targets.n_decisions as f64;
            losses[task].1 += targets.n_decisions;
            let n_words: Vec<i64> = targets.rows.iter().map(|&at| batch.word_lengths.host[at]).collect();
            for (&at, decoded) in targets.rows.iter().zip(head.decode(&logits, &n_words)) {
                let Some(gold) = data.set.labels(TaskId(task), rows[at]) else { continue };
                metrics[task].update(gold, &decoded.labels);
                n_sentences[task] += 1;
                joint[at].0 += 1;
                joint[at].1 &= gold.iter().zip(&decoded.labels).all(|(&gold, &label)| gold as usize == label);
            }
        }
        let labelled = joint.iter().filter(|(n_labels, _)| *n_labels > 1);
        n_joint += labelled.clone().count();
        n_joint_right += labelled.filter(|(_, right)| *right).count();
    }
    let task = |i: usize| TaskReport {
        name: tasks[i].name.clone(),
        n_sentences: n_sentences[i],
        loss: losses[i].0 / losses[i].1.max(1) as f64,
        scores: metrics[i].scores(),
    };
    Ok(Report {
        tasks: (0..tasks.len()).map(task).collect(),
        sentence_accuracy: (n_joint > 0).then(|| n_joint_right as f64 / n_joint as f64),
    })
}

/// What every task's head says of each row, in row order: by row, then by [`TaskId`].
pub fn predict(model: &Model, data: &DeviceSet) -> Result<Vec<Vec<Decoded>>> {
    let _no_grad = tch::no_grad_guard();
    let mut results = vec![Vec::new(); data.set.len()];
    for rows in batches(data) {
        let batch = data.batch(&rows);
        for (task, logits) in model.logits(&batch)?.iter().enumerate() {
            let decoded = model.head(TaskId(task)).decode(logits, &batch.word_lengths.host);
            for (&row, decoded) in rows.iter().zip(decoded) {
                results[row].push(decoded);
            }
        }
    }
    Ok(results)
}
