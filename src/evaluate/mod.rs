//! `evaluate(model, data) -> Report`: losses and scores of every task over one split.

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::data::DeviceSplit;
use crate::libtorch::{side_by_side, workers};
use crate::metrics::{LabelScore, Metric, Score};
use crate::model::{Decoded, Mode, Model};
use crate::task::{Task, TaskId};

/// One task's results on a split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskReport {
    pub name: String,
    /// Rows with a label for the task; without any, there are no scores.
    pub n_sentences: usize,
    /// Mean loss in nats per labelled decision (sentence or word), over the rows whose labels the model knows.
    pub loss: Option<f64>,
    /// The first selects checkpoints.
    pub scores: Vec<Score>,
    /// Per class, tag or span type, for those that occur.
    pub labels: Vec<LabelScore>,
}

/// Ranks checkpoints: by score, then by lower loss.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Serialize, Deserialize)]
pub struct CheckpointScore {
    pub score: f64,
    minus_loss: f64,
}

impl CheckpointScore {
    /// From a score alone; higher is better.
    pub fn of(score: f64) -> CheckpointScore {
        CheckpointScore { score, minus_loss: 0.0 }
    }
}

/// `x`, or the lowest float if it is not finite, so that scores can be compared and written.
fn comparable(x: f64) -> f64 {
    if x.is_finite() { x } else { f64::MIN }
}

impl TaskReport {
    /// The score that selects checkpoints.
    pub fn main_score(&self) -> Option<&Score> {
        self.scores.first()
    }

    /// Its [`CheckpointScore`] by that score.
    pub fn merit(&self) -> Option<CheckpointScore> {
        Some(CheckpointScore { score: self.main_score()?.value, minus_loss: comparable(-self.loss.unwrap_or(0.0)) })
    }
}

/// Results on one split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// By [`TaskId`].
    pub tasks: Vec<TaskReport>,
    /// Fraction of the rows with labels for at least two tasks in which all labels are predicted correctly.
    pub sentence_accuracy: Option<f64>,
    /// Number of those rows.
    pub n_joint: usize,
}

impl Report {
    /// Mean of the tasks' main scores.
    pub fn mean(&self) -> f64 {
        let scores: Vec<f64> = self.tasks.iter().filter_map(|task| Some(task.main_score()?.value)).collect();
        scores.iter().sum::<f64>() / scores.len().max(1) as f64
    }

    /// The [`CheckpointScore`] by `metrics`, each `mean`, `sentence_accuracy`, TASK, TASK.SCORE or TASK.loss; of several
    /// metrics, the mean. Metrics over several tasks break ties by the sum of the tasks' losses. `None` if the split lacks
    /// the labels.
    pub fn merit(&self, metrics: &[String]) -> Option<CheckpointScore> {
        let merits = metrics.iter().map(|metric| self.merit_by(metric)).collect::<Option<Vec<_>>>()?;
        let sum = |of: fn(&CheckpointScore) -> f64| merits.iter().map(of).sum::<f64>();
        let score = comparable(sum(|merit| merit.score) / merits.len() as f64);
        Some(CheckpointScore { score, minus_loss: comparable(sum(|merit| merit.minus_loss)) })
    }

    fn merit_by(&self, metric: &str) -> Option<CheckpointScore> {
        let of_all = |score: f64| CheckpointScore {
            score,
            minus_loss: comparable(-self.tasks.iter().filter_map(|task| task.loss).sum::<f64>()),
        };
        match metric {
            "mean" => return self.tasks.iter().any(|task| task.n_sentences > 0).then(|| of_all(self.mean())),
            "sentence_accuracy" => return self.sentence_accuracy.map(of_all),
            _ => {}
        }
        let (name, score) = metric.split_once('.').map_or((metric, None), |(name, score)| (name, Some(score)));
        let task = self.tasks.iter().find(|task| task.name == name)?;
        let merit = task.merit()?;
        let score = match score {
            None => merit.score,
            Some("loss") => comparable(-task.loss?),
            Some(wanted) => task.scores.iter().find(|score| score.name == wanted)?.value,
        };
        Some(CheckpointScore { score, ..merit })
    }
}

/// Largest batch outside training, in sentences and in tokens with padding.
const BATCH: usize = 128;
const TOKENS: i64 = 128 * 128;

/// Row numbers in batches of similar length, so that there is little padding; results do not depend on it.
fn batches(data: &DeviceSplit) -> Vec<Vec<usize>> {
    let mut rows: Vec<usize> = (0..data.set.len()).collect();
    rows.sort_by_key(|&row| data.set.n_tokens(row));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for row in rows {
        match batches.last_mut() {
            Some(batch) if batch.len() < BATCH && (batch.len() as i64 + 1) * data.set.n_tokens(row) <= TOKENS => {
                batch.push(row);
            }
            _ => batches.push(vec![row]),
        }
    }
    batches
}

/// Runs `model` over all rows of `data`, without dropout.
///
/// # Errors
/// If an exported module that computes the logits fails.
pub fn evaluate(model: &Model, data: &DeviceSplit, tasks: &[Task]) -> Result<Report> {
    let mut metrics = metrics(model, data, tasks.len());
    let mut losses = vec![(0.0, 0i64); tasks.len()];
    let mut n_sentences = vec![0; tasks.len()];
    let (mut n_joint, mut n_joint_right) = (0, 0);
    let batches = batches(data);
    let scored = |i: usize| score_batch(model, data, &batches[i]);
    for (rows, tasks) in batches.iter().zip(in_turn(batches.len(), &scored)) {
        // Per row of the batch: the number of tasks with labels, and whether all labels are right.
        let mut joint = vec![(0, true); rows.len()];
        for (task, scored) in tasks?.into_iter().enumerate() {
            let Some(scored) = scored else { continue };
            losses[task].0 += scored.loss * scored.n_decisions as f64;
            losses[task].1 += scored.n_decisions;
            for (&at, decoded) in scored.rows.iter().zip(scored.decoded) {
                let Some(gold) = data.set.gold(TaskId(task), rows[at]) else { continue };
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
        loss: (losses[i].1 > 0).then(|| losses[i].0 / losses[i].1 as f64),
        scores: if n_sentences[i] > 0 { metrics[i].scores() } else { Vec::new() },
        labels: metrics[i].by_label(),
    };
    Ok(Report {
        tasks: (0..tasks.len()).map(task).collect(),
        sentence_accuracy: (n_joint > 0).then(|| n_joint_right as f64 / n_joint as f64),
        n_joint,
    })
}

/// One metric per task.
pub fn metrics(model: &Model, data: &DeviceSplit, n_tasks: usize) -> Vec<Box<dyn Metric>> {
    (0..n_tasks).map(TaskId).map(|task| model.head(task).metric(data.set.unseen_labels(task))).collect()
}

/// One task's results on a batch.
struct Scored {
    /// Mean over the decisions whose labels the model knows, and their number.
    loss: f64,
    n_decisions: i64,
    /// The rows of the batch that have a label, and the head's predictions for them.
    rows: Vec<usize>,
    decoded: Vec<Decoded>,
}

/// By [`TaskId`]; `None` for a task without labels in the batch.
fn score_batch(model: &Model, data: &DeviceSplit, rows: &[usize]) -> Result<Vec<Option<Scored>>> {
    let batch = data.batch(rows);
    let score = |(task, logits): (usize, &Tensor)| {
        let (task, head) = (TaskId(task), model.head(TaskId(task)));
        let labelled: Vec<usize> = (0..rows.len()).filter(|&at| data.set.gold(task, rows[at]).is_some()).collect();
        let (loss, n_decisions) = batch.targets[task.0].as_ref().map_or((0.0, 0), |targets| {
            let loss = head.loss(&logits.index_select(0, &targets.index), targets, Mode::Eval);
            (loss.double_value(&[]), targets.n_decisions)
        });
        let n_words: Vec<i64> = labelled.iter().map(|&at| batch.word_lengths.host[at]).collect();
        let index: Vec<i64> = labelled.iter().map(|&at| at as i64).collect();
        let logits = logits.index_select(0, &Tensor::from_slice(&index).to_device(logits.device()));
        (!labelled.is_empty()).then(|| Scored {
            loss,
            n_decisions,
            decoded: head.decode(&logits, &n_words),
            rows: labelled,
        })
    };
    Ok(model.logits(&batch)?.iter().enumerate().map(score).collect())
}

/// The predictions of all heads, by row and then by [`TaskId`].
pub fn predict(model: &Model, data: &DeviceSplit) -> Result<Vec<Vec<Decoded>>> {
    let batches = batches(data);
    let decoded = |i: usize| -> Result<Vec<Vec<Decoded>>> {
        let batch = data.batch(&batches[i]);
        let logits = model.logits(&batch)?;
        let each = logits.iter().enumerate();
        Ok(each.map(|(task, logits)| model.head(TaskId(task)).decode(logits, &batch.word_lengths.host)).collect())
    };
    let mut results = vec![Vec::new(); data.set.len()];
    for (rows, tasks) in batches.iter().zip(in_turn(batches.len(), &decoded)) {
        for decoded in tasks? {
            for (&row, decoded) in rows.iter().zip(decoded) {
                results[row].push(decoded);
            }
        }
    }
    Ok(results)
}

/// Runs `work` on each of `n` batches, on all workers and without gradients; returns the results in order.
fn in_turn<T: Send>(n: usize, work: &dyn Fn(usize) -> T) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let take = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < n);
    let worker = |_| std::iter::from_fn(take).map(|i| (i, tch::no_grad(|| work(i)))).collect::<Vec<_>>();
    let mut done: Vec<(usize, T)> = side_by_side(workers(), &worker).into_iter().flatten().collect();
    done.sort_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, made)| made).collect()
}
