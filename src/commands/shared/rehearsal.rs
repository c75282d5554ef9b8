//! An experiment ready for training steps outside a run, for measurements.

use std::time::Instant;

use anyhow::Result;
use tch::Device;

use super::{build_trainer, init_from, prepare};
use crate::config::Experiment;
use crate::data::{DeviceSplit, Sampler, Tokenizer};
use crate::libtorch::compile_ahead;
use crate::model::Model;
use crate::problem::fail_on_errors;
use crate::rng::Seed;
use crate::task::Task;
use crate::train::{Trainer, TrainingConfig};
use crate::weighting::WeightingConfig;

pub struct Rehearsal {
    pub experiment: Experiment,
    pub tasks: Vec<Task>,
    pub model: Model,
    pub train: DeviceSplit,
    pub device: Device,
    tokenizer: Tokenizer,
}

impl Rehearsal {
    pub fn new(experiment: Experiment, device: Device) -> Result<Self> {
        let started = Instant::now();
        build_trainer::check_precision(&experiment.training, device)?;
        let _compiling = compile_ahead(device);
        let (corpus, problems) = prepare::corpus(&experiment)?;
        fail_on_errors(problems)?;
        let (tokenizer, _) = prepare::tokenizer(&experiment, &corpus)?;
        let tasks = prepare::tasks(&experiment, &corpus);
        let model = build_trainer::model(&experiment, &tasks, &tokenizer, device)?;
        if let Some(earlier) = init_from::earlier(&experiment)? {
            init_from::initialize(&model, (&experiment, &tasks), &tokenizer, &earlier)?.log();
        }
        let train = prepare::training(&experiment, &corpus, &tokenizer, &tasks, device)?;
        let (n, seconds) = (super::table::count(train.set.len()), started.elapsed().as_secs_f64());
        log::info!("{n} training sentences read and encoded in {seconds:.1} s");
        Ok(Rehearsal { experiment, tasks, model, train, device, tokenizer })
    }

    pub fn sampler(&self) -> Sampler {
        let training = &self.experiment.training;
        Sampler::new(&self.train.set, &training.sampling, training.batch_size, Seed(self.experiment.seed))
    }

    /// A trainer with optimizer and strategy in their initial state.
    pub fn trainer<'a>(&'a self, config: &'a TrainingConfig, weighting: &'a WeightingConfig) -> Trainer<'a> {
        build_trainer::Parts {
            experiment: &self.experiment,
            config,
            weighting,
            tasks: &self.tasks,
            tokenizer: &self.tokenizer,
            model: &self.model,
            train: &self.train,
        }
        .trainer()
    }
}
