//! An experiment ready to take training steps that no run keeps: for measuring.

use std::time::Instant;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::{kernels, prepare, transfer};
use crate::config::Experiment;
use crate::data::{DeviceSet, Sampler, Split, Tokenizer};
use crate::model::Model;
use crate::optim::Optimizer;
use crate::problem::fail_on_errors;
use crate::rng::Seed;
use crate::run::RunDirectory;
use crate::task::Task;
use crate::train::graphs::Graphs;
use crate::train::laps::Laps;
use crate::train::{Trainer, TrainingConfig, UnknownWords};
use crate::weighting::WeightingConfig;

pub struct Rehearsal {
    pub experiment: Experiment,
    pub tasks: Vec<Task>,
    pub model: Model,
    pub train: DeviceSet,
    pub device: Device,
    tokenizer: Tokenizer,
    nowhere: RunDirectory,
}

impl Rehearsal {
    pub fn new(experiment: Experiment, device: Device) -> Result<Self> {
        let started = Instant::now();
        prepare::check_precision(&experiment.training, device)?;
        let (corpus, problems) = prepare::corpus(&experiment)?;
        fail_on_errors(problems)?;
        let (tokenizer, _) = prepare::tokenizer(&experiment, &corpus)?;
        let tasks = prepare::tasks(&experiment, &corpus);
        let mut model = prepare::model(&experiment, &tasks, &tokenizer, device)?;
        model.set_precision(experiment.training.precision);
        prepare::check_parts(&experiment.training, &model)?;
        kernels::choose(&mut model, &experiment.training);
        if let Some(earlier) = transfer::earlier(&experiment)? {
            transfer::initialize(&model, &tasks, &tokenizer, &earlier)?;
        }
        let train = prepare::encoded(&corpus, Split::Train, &tokenizer, &tasks, device)?;
        let (n, seconds) = (super::table::count(train.set.len()), started.elapsed().as_secs_f64());
        log::info!("{n} training sentences read and encoded in {seconds:.1} s");
        let nowhere = RunDirectory { path: std::path::PathBuf::new() };
        Ok(Rehearsal { experiment, tasks, model, train, device, tokenizer, nowhere })
    }

    pub fn sampler(&self) -> Sampler {
        let training = &self.experiment.training;
        Sampler::new(&self.train.set, &training.sampling, training.batch_size, Seed(self.experiment.seed))
    }

    /// A trainer with optimizer and strategy as at the start.
    pub fn trainer<'a>(&'a self, config: &'a TrainingConfig, weighting: &WeightingConfig) -> Trainer<'a> {
        let weighted = Experiment { weighting: weighting.clone(), ..self.experiment.clone() };
        let (tokenizer, rate) = (&self.tokenizer, self.experiment.tokenizer.unknown_rate());
        Trainer {
            config,
            tasks: &self.tasks,
            model: &self.model,
            optimizer: Optimizer::new(&config.optimizer, self.model.parameters.iter()),
            average: prepare::average(config, &self.model),
            loss_scale: prepare::loss_scale(config, self.device),
            weighting: prepare::weighting(&weighted, &self.tasks, self.device),
            sampler: self.sampler(),
            unknown: UnknownWords::new(&self.train.set, tokenizer.size(), tokenizer.unknown, rate, self.device),
            train: &self.train,
            dev: &self.train,
            seed: Seed(self.experiment.seed),
            laps: Laps::default(),
            graphs: Graphs::new(config.cuda_graphs, self.tasks.len(), self.device),
            halted: Tensor::zeros([], (Kind::Float, self.device)),
            run: &self.nowhere,
        }
    }
}
