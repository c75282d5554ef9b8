//! Builds the model and the trainer of an experiment.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::prepare;
use crate::config::Experiment;
use crate::data::{DeviceSplit, Sampler, Tokenizer};
use crate::libtorch;
use crate::model::{HeadConfig, Model, Precision, is_part};
use crate::optim::{LossScale, Optimizer};
use crate::problem::invalid;
use crate::rng::Seed;
use crate::task::{Task, TaskId};
use crate::train::graphs::Graphs;
use crate::train::step_timer::StepTimer;
use crate::train::{Trainer, TrainingConfig, UnknownWords};
use crate::weighting::{WeightedTask, Weighting, WeightingConfig};

/// # Errors
/// A precision that the device cannot train in.
pub fn check_precision(config: &TrainingConfig, device: Device) -> Result<()> {
    if config.precision == Precision::Float16 && device == Device::Cpu {
        return Err(invalid("training.precision: float16 needs CUDA; use bfloat16 on the CPU"));
    }
    if config.precision == Precision::Bfloat16 && device == Device::Cpu && !libtorch::has_bfloat16() {
        log::warn!("this processor has no instructions for bfloat16, so a bfloat16 trunk is slower than a float32 one");
    }
    Ok(())
}

/// Fails if dev has rows but no labels for one of `metrics`, which select the best checkpoint.
pub fn fail_without_choice(metrics: &[String], dev: &DeviceSplit, tasks: &[Task]) -> Result<()> {
    metrics.iter().try_for_each(|metric| fail_without_labels_for(metric, dev, tasks))
}

fn fail_without_labels_for(metric: &str, dev: &DeviceSplit, tasks: &[Task]) -> Result<()> {
    let n_labelled = |row: usize| (0..tasks.len()).filter(|&i| dev.set.gold(TaskId(i), row).is_some()).count();
    let of_task = metric.split('.').next().and_then(|name| tasks.iter().position(|task| task.name == name));
    let tells = |row: usize| match of_task {
        // The loss is undefined for labels that the model does not know.
        Some(i) if metric.ends_with(".loss") => dev.set.labels(TaskId(i), row).is_some(),
        Some(i) => dev.set.gold(TaskId(i), row).is_some(),
        None if metric == "sentence_accuracy" => n_labelled(row) > 1,
        None => n_labelled(row) > 0,
    };
    match dev.set.is_empty() || (0..dev.set.len()).any(tells) {
        true => Ok(()),
        false => Err(invalid(format!(
            "early_stopping.metric: {metric}: dev has no labels for this metric to choose a checkpoint by"
        ))),
    }
}

/// The model of an experiment, ready for training.
///
/// # Errors
/// A part in `freeze_epochs` that the model does not have.
pub fn model(experiment: &Experiment, tasks: &[Task], tokenizer: &Tokenizer, device: Device) -> Result<Model> {
    let mut model = prepare::model(experiment, tasks, tokenizer, device)?;
    check_parts(&experiment.training, &model)?;
    model.set_precision(experiment.training.precision);
    libtorch::use_onednn(experiment.training.onednn);
    Ok(model)
}

fn check_parts(config: &TrainingConfig, model: &Model) -> Result<()> {
    for part in config.freeze_epochs.keys() {
        if !model.parameters.with_constants().any(|(name, _)| is_part(name, part)) {
            let mut known: Vec<&str> = model.parameters.iter().filter_map(|(name, _)| name.split('.').next()).collect();
            known.dedup();
            let known = known.join(", ");
            let message = format!(
                "training.freeze_epochs.{part}: the model has no such part; its parts are {known} and what they contain"
            );
            return Err(invalid(message));
        }
    }
    Ok(())
}

/// The inputs of a trainer.
pub struct Parts<'a> {
    pub experiment: &'a Experiment,
    /// May differ from the experiment's own; so may `weighting`.
    pub config: &'a TrainingConfig,
    pub weighting: &'a WeightingConfig,
    pub tasks: &'a [Task],
    pub tokenizer: &'a Tokenizer,
    pub model: &'a Model,
    pub train: &'a DeviceSplit,
}

impl<'a> Parts<'a> {
    /// A trainer with optimizer, strategy and weight average in their initial state.
    pub fn trainer(&self) -> Trainer<'a> {
        let &Parts { experiment, config, tasks, tokenizer, model, train, .. } = self;
        let (seed, device) = (Seed(experiment.seed), model.parameters.device());
        let rate = experiment.tokenizer.unknown_rate();
        let mut optimizer = Optimizer::new(&config.optimizer, model.parameters.iter());
        if config.ema_decay > 0.0 {
            optimizer = optimizer.with_average(config.ema_decay);
        }
        if device != Device::Cpu {
            // Several batches per step read different table rows, so tables are updated like other parameters.
            let tables = if config.accumulate_steps == 1 { model.embedding.trained_tables() } else { Vec::new() };
            optimizer.work_on_device(tables, &model.halves());
        }
        Trainer {
            config,
            tasks,
            model,
            optimizer,
            loss_scale: (config.precision == Precision::Float16).then(|| LossScale::new(device)),
            weighting: Weighting::new(self.weighting, &self.weighted(), seed, device),
            sampler: Sampler::new(&train.set, &config.sampling, config.batch_size, seed),
            unknown: UnknownWords::new(&train.set, tokenizer.size(), tokenizer.unknown, rate, device),
            train,
            seed,
            timer: StepTimer::default(),
            graphs: Graphs::new(config.cuda_graphs, device),
            halted: Tensor::zeros([], (Kind::Float, device)),
        }
    }

    fn weighted(&self) -> Vec<WeightedTask> {
        let weighted = |(head, task): (&HeadConfig, &Task)| WeightedTask {
            name: task.name.clone(),
            priority: head.priority(),
            n_labels: task.labels.len(),
        };
        self.experiment.tasks.values().zip(self.tasks).map(weighted).collect()
    }
}
