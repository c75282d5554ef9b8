//! The training loop: steps, evaluations, checkpoints, and when to stop.

mod clip;
mod compute;
mod config;
pub mod gradients;
pub mod graphs;
mod state;
mod step;
pub mod step_timer;
mod taps;
mod unknown;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use serde_json::{Map, Value, json};
use tch::Tensor;

pub use config::{EarlyStopping, TrainingConfig};
use graphs::Graphs;
pub use state::State;
use step_timer::StepTimer;
pub use unknown::UnknownWords;

use crate::data::{DeviceSplit, Sampler};
use crate::evaluate::{CheckpointScore, Report, TaskReport, evaluate};
use crate::libtorch::caught;
use crate::model::Model;
use crate::optim::{LossScale, Optimizer};
use crate::problem::Place;
use crate::rng::Seed;
use crate::run::{Records, RunDirectory, checkpoint};
use crate::task::Task;
use crate::weighting::Weighting;
pub use step::Pending;

/// Everything that training works on.
pub struct Trainer<'a> {
    pub config: &'a TrainingConfig,
    pub tasks: &'a [Task],
    pub model: &'a Model,
    /// With the moving average of the weights, which is evaluated and kept in their place.
    pub optimizer: Optimizer,
    /// For float16.
    pub loss_scale: Option<LossScale>,
    pub weighting: Weighting,
    pub sampler: Sampler,
    pub train: &'a DeviceSplit,
    pub unknown: Option<UnknownWords>,
    pub seed: Seed,
    pub timer: StepTimer,
    pub graphs: Graphs,
    /// 1 on the device once a loss or a gradient was not finite: from then on no update happens.
    pub halted: Tensor,
}

/// What is evaluated during training, and where results are saved.
#[derive(Clone, Copy)]
pub struct Course<'a> {
    pub dev: &'a DeviceSplit,
    pub run: &'a RunDirectory,
}

/// Which step to take.
pub struct Step<'a> {
    /// From 0.
    pub number: usize,
    pub n_steps: usize,
    /// Row numbers of its batches.
    pub batches: &'a [Vec<usize>],
    /// Whether to compare the tasks' gradients too.
    pub diagnose: bool,
}

/// Receives the progress of training.
pub trait Observer {
    /// An epoch (from 1) starts, or resumes after `done` of its `n_steps` steps.
    fn epoch_started(&mut self, epoch: usize, n_steps: usize, done: usize);
    /// A step was taken; `losses` are means by task since the last record, if there is a new one.
    fn step_taken(&mut self, n_tokens: i64, losses: Option<&[Option<f64>]>);
    fn epoch_ended(&mut self, epoch: usize, losses: &[Option<f64>], report: &Report, improved: bool);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Finished,
    /// Stopped on request; the checkpoint holds this many steps.
    Interrupted(usize),
}

impl Trainer<'_> {
    /// A step takes consecutive batches of the plan.
    fn steps_per_epoch(&self) -> usize {
        self.sampler.n_batches().div_ceil(self.config.accumulate_steps)
    }

    /// Steps of a run that is not stopped early.
    pub fn n_steps(&self) -> usize {
        let all = self.config.max_epochs * self.steps_per_epoch();
        self.config.max_steps.map_or(all, |limit| limit.min(all))
    }

    /// Whether no step is left, or early stopping applies.
    fn is_over(&self, state: &State) -> bool {
        let patience = self.config.early_stopping.patience_epochs;
        state.step >= self.n_steps() || patience.is_some_and(|patience| state.epochs_without_gain >= patience)
    }

    /// Restores weights, optimizer, strategy and position from the run's last checkpoint.
    pub fn resume(&mut self, run: &RunDirectory) -> Result<State> {
        let path = run.checkpoint("last");
        let saved = checkpoint::load(&path)?;
        let state: State = serde_json::from_value(saved.state).with_context(|| format!("{}", path.display()))?;
        let mut moments = saved.optimizer;
        self.model.parameters.load(saved.model)?;
        if let Some(scale) = &mut self.loss_scale {
            scale.load(&mut moments)?;
        }
        self.optimizer.load(moments)?;
        self.weighting.load(&state.weighting)?;
        Ok(state)
    }

    /// Trains from `state` to the end, or until `stop` is set, which is checked after each step.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, with step, task and rows named; files that cannot be written.
    pub fn train(
        &mut self,
        mut state: State,
        course: Course,
        observer: &mut dyn Observer,
        stop: &AtomicBool,
    ) -> Result<Outcome> {
        let per_epoch = self.steps_per_epoch();
        let n_steps = self.n_steps();
        let mut records = Records::open(course.run, state.step)?;
        let mut pending = Pending::new(self.model.parameters.device());
        let mut interval = (Instant::now(), 0);
        while !self.is_over(&state) {
            let epoch = state.step / per_epoch;
            let plan = self.sampler.plan(epoch);
            observer.epoch_started(epoch + 1, per_epoch, state.step % per_epoch);
            loop {
                let index = state.step % per_epoch;
                let first = index * self.config.accumulate_steps;
                let batches = &plan[first..(first + self.config.accumulate_steps).min(plan.len())];
                let (log, epoch_ends) = (self.logs_after(state.step), self.ends_epoch(state.step));
                let diagnose = log && self.compares_after(state.step);
                let step = Step { number: state.step, n_steps, batches, diagnose };
                let taken = caught(|| self.take(&step, &mut pending));
                let n_tokens = taken.map_err(|error| self.out_of_memory(error, batches))?;
                interval.1 += n_tokens;
                state.step += 1;
                let save = self.config.checkpoint_every_steps.is_some_and(|every| state.step.is_multiple_of(every));
                let stopping = stop.load(Ordering::Relaxed);
                let mut fresh = None;
                if pending.should_drain() || log || epoch_ends || save || stopping {
                    let drained = pending.drain(&mut state, self.tasks);
                    drained.map_err(|bad| self.not_finite(bad, &plan, epoch * per_epoch))?;
                }
                if log {
                    fresh = Some(state.interval.means());
                    let speed = interval.1 as f64 / interval.0.elapsed().as_secs_f64();
                    self.record_training(&mut records, &mut state, (epoch, speed), &mut pending)?;
                    interval = (Instant::now(), 0);
                }
                observer.step_taken(n_tokens, fresh.as_deref());
                if epoch_ends {
                    let losses = state.epoch.means();
                    // The last epoch may be cut short, and continue when the run is trained further.
                    if state.step.is_multiple_of(per_epoch) {
                        state.epoch.reset();
                        self.weighting.epoch_ended()?;
                    }
                    let report = self.evaluate(&mut state, course, &mut records, epoch)?;
                    observer.epoch_ended(epoch + 1, &losses, &report, state.best_step == Some(state.step));
                    interval = (Instant::now(), 0);
                } else if save || stopping {
                    self.save(&state, course.run)?;
                }
                if stopping && !self.is_over(&state) {
                    return Ok(Outcome::Interrupted(state.step));
                }
                if epoch_ends {
                    break;
                }
            }
        }
        Ok(Outcome::Finished)
    }

    /// Whether an epoch or the whole run ends with `step` (from 0).
    fn ends_epoch(&self, step: usize) -> bool {
        (step + 1).is_multiple_of(self.steps_per_epoch()) || step + 1 == self.n_steps()
    }

    /// Whether a record is due after `step` (from 0).
    fn logs_after(&self, step: usize) -> bool {
        match self.steps_per_epoch() < self.config.log_every_steps {
            true => self.ends_epoch(step),
            false => (step + 1).is_multiple_of(self.config.log_every_steps),
        }
    }

    /// Whether the record after `step` (from 0) compares the tasks' gradients.
    fn compares_after(&self, step: usize) -> bool {
        let every = self.config.log_gradients_every;
        let records_before = step / self.config.log_every_steps.min(self.steps_per_epoch());
        every > 0 && records_before.is_multiple_of(every)
    }

    fn record_training(
        &mut self,
        records: &mut Records,
        state: &mut State,
        (epoch, speed): (usize, f64),
        pending: &mut Pending,
    ) -> Result<()> {
        let tasks = self.tasks;
        let named = |values: &[f64]| -> Value {
            let known = tasks.iter().zip(values).filter(|(_, value)| value.is_finite());
            known.map(|(task, value)| (task.name.clone(), json!(value))).collect::<Map<_, _>>().into()
        };
        let losses: Vec<f64> = state.interval.means().into_iter().map(|loss| loss.unwrap_or(f64::NAN)).collect();
        let mut values = Map::from_iter([
            ("epoch".to_owned(), json!(epoch + 1)),
            ("loss".to_owned(), named(&losses)),
            ("gradient_norm".to_owned(), json!(state.interval.mean_norm())),
            ("learning_rate".to_owned(), json!(self.learning_rate(state.step - 1, self.n_steps()))),
            ("tokens_per_sec".to_owned(), json!(speed.round())),
        ]);
        if let Some(scale) = &self.loss_scale {
            values.insert("loss_scale".to_owned(), json!(scale.value().double_value(&[])));
            values.insert("steps_left_out".to_owned(), json!(state.interval.left_out));
        }
        if let Some(weights) = &pending.weights {
            let report = self.weighting.report(weights);
            values.insert("weight".to_owned(), named(&report.weights));
            values.extend(report.details.iter().map(|(name, details)| ((*name).to_owned(), named(details))));
            if let Some(warning) = report.warning {
                log::warn!("step {}: {warning}", state.step);
            }
        }
        if let Some((present, gram)) = pending.gram.take() {
            let (norms, cosines) = compared(tasks, &present, &gram);
            values.insert("task_gradient_norm".to_owned(), norms.into());
            values.insert("gradient_cosine".to_owned(), cosines.into());
        }
        state.interval.reset();
        records.add("train", state.step, values)
    }

    /// Scores the model on dev, saves the last checkpoint and new best ones, and updates early stopping.
    fn evaluate(
        &mut self,
        state: &mut State,
        Course { dev, run }: Course,
        records: &mut Records,
        epoch: usize,
    ) -> Result<Report> {
        self.settle()?;
        // The best checkpoints hold the average, if there is one; the last one holds the weights and their average.
        self.optimizer.swap_average()?;
        let report = evaluate(self.model, dev, self.tasks)?;
        let mut values =
            Map::from_iter([("epoch".to_owned(), json!(epoch + 1)), ("mean".to_owned(), json!(report.mean()))]);
        for task in report.tasks.iter().filter(|task| task.n_sentences > 0) {
            let scores = task.scores.iter().map(|score| (score.name.clone(), json!(score.value)));
            values.insert(
                task.name.clone(),
                Map::from_iter(scores.chain([("loss".to_owned(), json!(task.loss))])).into(),
            );
        }
        if let Some(accuracy) = report.sentence_accuracy {
            values.insert("sentence_accuracy".to_owned(), json!(accuracy));
        }
        if !dev.set.is_empty() {
            records.add("dev", state.step, values)?;
        }

        let weights = self.model.parameters.named();
        let keep = |name: &str| -> Result<()> {
            let about = json!({"step": state.step, "epoch": epoch + 1, "dev": report});
            checkpoint::save(&run.checkpoint(name), &weights, &[], &about)
        };
        let metrics = &self.config.early_stopping.metric.0;
        let merit =
            if dev.set.is_empty() { Some(CheckpointScore::of(state.step as f64)) } else { report.merit(metrics) };
        let merit =
            merit.with_context(|| format!("dev has no score `{}` to choose a checkpoint by", metrics.join(", ")))?;
        let improved = state.best.is_none_or(|best| merit > best);
        if improved {
            keep("best")?;
        }
        let better = |(old, task): (&Option<CheckpointScore>, &TaskReport)| {
            task.merit().filter(|_| task.n_sentences > 0).filter(|merit| old.is_none_or(|old| *merit > old))
        };
        let by_task: Vec<Option<CheckpointScore>> = state.best_by_task.iter().zip(&report.tasks).map(better).collect();
        for (task, _) in self.tasks.iter().zip(&by_task).filter(|(_, better)| better.is_some()) {
            keep(&format!("best-{}", task.name))?;
        }
        self.optimizer.swap_average()?;
        state.judge(merit, improved, by_task);
        self.save(state, run)?;
        Ok(report)
    }

    /// Brings all weights and their averages up to date: between steps, updates of table rows may be deferred.
    pub fn settle(&mut self) -> Result<()> {
        self.optimizer.catch_up(None)
    }

    fn save(&mut self, state: &State, run: &RunDirectory) -> Result<()> {
        self.settle()?;
        let model = self.model.parameters.named();
        let state = State { weighting: self.weighting.save(), ..state.clone() };
        let mut about = serde_json::to_value(&state)?;
        // The same key as in the best checkpoints.
        about["epoch"] = json!(state.step.div_ceil(self.steps_per_epoch()));
        let mut moments = self.optimizer.state();
        moments.extend(self.loss_scale.iter().flat_map(LossScale::state));
        checkpoint::save(&run.checkpoint("last"), &model, &moments, &about)
    }

    /// The learning rate at `step` (from 0) of a run of `n_steps`.
    pub fn learning_rate(&self, step: usize, n_steps: usize) -> f64 {
        self.config.optimizer.learning_rate() * self.config.schedule.factor(step, n_steps)
    }

    /// Adds the step's longest sentence to an error if memory ran out.
    fn out_of_memory(&self, error: anyhow::Error, batches: &[Vec<usize>]) -> anyhow::Error {
        let text = format!("{error:#}");
        let longest = batches.iter().flatten().copied().max_by_key(|&row| self.train.set.n_tokens(row));
        match longest {
            Some(row) if text.contains("out of memory") || text.contains("allocate memory") => {
                let (n, place) = (self.train.set.n_tokens(row), self.place(row));
                error.context(format!(
                    "out of memory in a step whose longest sentence, {place}, has {n} tokens; reduce \
                     `training.batch_size`, or leave out long sentences with `data.max_words`"
                ))
            }
            _ => error,
        }
    }

    /// The file, without its folder, and line of a training row.
    fn place(&self, row: usize) -> String {
        self.train.set.places.get(row).map_or("?".to_owned(), |place| {
            Place::new(Path::new(place.file.file_name().unwrap_or_default()), place.line).to_string()
        })
    }

    fn not_finite(&self, bad: step::NotFinite, plan: &[Vec<usize>], epoch_start: usize) -> anyhow::Error {
        let first = (bad.step - epoch_start) * self.config.accumulate_steps;
        let rows = plan[first..(first + self.config.accumulate_steps).min(plan.len())].concat();
        let places: Vec<String> = rows.iter().map(|&row| self.place(row)).take(8).collect();
        let batch = format!(
            "its batch has {} rows: {}{}",
            rows.len(),
            places.join(", "),
            if rows.len() > 8 { ", ..." } else { "" }
        );
        let hint = "the weights are those from before this step; try a lower learning rate or clip_norm";
        anyhow!("step {}: {} is not finite; {batch}; {hint}", bad.step + 1, bad.what)
    }
}

/// The gradient norms of the tasks present, and the cosine of each pair, from all inner products [T, T].
fn compared(tasks: &[Task], present: &[bool], gram: &Tensor) -> (Map<String, Value>, Map<String, Value>) {
    let present: Vec<usize> = (0..tasks.len()).filter(|&task| present[task]).collect();
    let product = |i: usize, j: usize| gram.double_value(&[i as i64, j as i64]);
    let norm = |task: usize| product(task, task).sqrt();
    let mut cosines = Map::new();
    for (n, &i) in present.iter().enumerate() {
        for &j in &present[n + 1..] {
            let cosine = product(i, j) / (norm(i) * norm(j)).max(f64::MIN_POSITIVE);
            cosines.insert(format!("{}-{}", tasks[i].name, tasks[j].name), json!(cosine));
        }
    }
    (present.iter().map(|&task| (tasks[task].name.clone(), json!(norm(task)))).collect(), cosines)
}
