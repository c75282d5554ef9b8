//! Checks of `training:`.

use super::super::Experiment;
use super::super::decode::suggestion;
use super::Checker;
use crate::data::SetConfig;
use crate::optim::OptimizerConfig;

pub(super) fn check_training(c: &mut Checker, experiment: &Experiment) {
    let training = &experiment.training;
    let tasks: Vec<&str> = experiment.tasks.keys().map(String::as_str).collect();
    for part in training.freeze_epochs.keys() {
        let path = format!("training.freeze_epochs.{part}");
        let mut names = part.split('.');
        match (names.next().unwrap_or_default(), names.next()) {
            ("heads", Some(task)) if !tasks.contains(&task) => {
                c.error(&path, format!("no task `{task}`{}", suggestion(task, &tasks)));
            }
            ("trunk", Some(layer)) => {
                let number = layer.strip_prefix('l').and_then(|number| number.parse::<usize>().ok());
                let last = experiment.model.trunk.layers.saturating_sub(1);
                c.require(
                    &path,
                    number.is_none_or(|number| number <= last),
                    &format!("the trunk's last layer is l{last}"),
                );
            }
            ("embedding" | "trunk" | "heads", _) => {}
            (part, _) => {
                let known = ["embedding", "trunk", "heads"];
                let near = suggestion(part, &known);
                c.error(&path, format!("no part `{part}`{near}; names of parts begin with embedding, trunk or heads"));
            }
        }
    }
    let frozen = |part: &str| training.freeze_epochs.get(part).is_some_and(|&epochs| epochs >= training.max_epochs);
    let all = ["embedding", "trunk", "heads"].into_iter().all(frozen);
    c.require(
        "training.freeze_epochs",
        !all,
        "nothing would be trained: embedding, trunk and heads are frozen in every epoch",
    );
    if let OptimizerConfig::Adamw(adam) | OptimizerConfig::Adam(adam) = &training.optimizer {
        let (first, second) = adam.betas;
        let valid = (0.0..1.0).contains(&first) && (0.0..1.0).contains(&second);
        c.require("training.optimizer.betas", valid, "must be from 0 to below 1");
    }
    let metrics = &training.early_stopping.metric.0;
    c.require(METRIC, !metrics.is_empty(), "give at least one");
    metrics.iter().for_each(|metric| check_metric(c, metric, experiment));
    let no_dev = experiment.data.sets.values().all(SetConfig::has_no_dev);
    let waits = training.early_stopping.patience_epochs.is_some();
    c.require("training.early_stopping.patience_epochs", !(no_dev && waits), "needs dev, which no data set has");
}

const METRIC: &str = "training.early_stopping.metric";

/// The metric that selects the best checkpoint must exist.
fn check_metric(c: &mut Checker, metric: &str, experiment: &Experiment) {
    let path = METRIC;
    let (task, score) = metric.split_once('.').map_or((metric, None), |(task, score)| (task, Some(score)));
    match (experiment.tasks.get(task), score) {
        (Some(head), Some(score)) => {
            let scores = head.scores();
            let scores: Vec<&str> = scores.iter().map(String::as_str).collect();
            if !scores.contains(&score) {
                c.error(path, format!("`{task}` has no score `{score}`{}", suggestion(score, &scores)));
            }
        }
        (Some(_), None) => {}
        (None, None) if task == "mean" => {}
        (None, None) if task == "sentence_accuracy" => {
            c.require(path, experiment.tasks.len() > 1, "sentence_accuracy needs at least two tasks");
        }
        (None, Some(_)) if task == "mean" || task == "sentence_accuracy" => {
            c.error(path, format!("`{task}` is a single score; only tasks have several, as in TASK.loss"));
        }
        _ => {
            let mut names: Vec<&str> = experiment.tasks.keys().map(String::as_str).collect();
            names.extend(["mean", "sentence_accuracy"]);
            c.error(path, format!("no task `{task}`{}", suggestion(task, &names)));
        }
    }
}
