//! Checks that an experiment's steps give the same weights each time, also across a stop and a resume.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};
use tch::{Device, Tensor};
use tempfile::TempDir;

use crate::commands::rehearsal::Rehearsal;
use crate::config::Experiment;
use crate::evaluate::Report;
use crate::run::RunDirectory;
use crate::run::checkpoint::{self, Checkpoint};
use crate::train::{Course, Observer, Outcome, State, TrainingConfig};

/// Takes `n_steps` steps, repeats them, and repeats them with a stop in the middle. Returns the checks and outcomes.
///
/// On the CPU the weights must be bit-identical. GPU kernels may sum in another order each time; with a stop, the
/// difference may be up to 10 times that between two runs without one, or 1e-5.
pub fn check(experiment: Experiment, device: Device, n_steps: usize) -> Result<Vec<(String, Result<()>)>> {
    let mut training = Training::new(Rehearsal::new(experiment, device)?, n_steps)?;
    let (half, rest) = (n_steps / 2, n_steps - n_steps / 2);
    let once = training.take("once", n_steps)?;
    let twice = difference(&once, &training.take("twice", n_steps)?);
    training.take("apart", half)?;
    let apart = difference(&once, &training.take("apart", rest)?);
    let on_cpu = device == Device::Cpu;
    let within = |difference: f64, most: f64| {
        ensure!(difference <= most, "a value differs by {difference:.1e} of the largest value of its tensor");
        Ok(())
    };
    let exactly = |difference: f64| if on_cpu || difference == 0.0 { ", bit for bit" } else { ", except for rounding" };
    Ok(vec![
        (
            format!("{n_steps} steps of the experiment give the same weights each time{}", exactly(twice)),
            within(twice, if on_cpu { 0.0 } else { 1e-2 }),
        ),
        (
            format!(
                "{half} + {rest} steps with a stop in between give the same weights as {n_steps} steps{}",
                exactly(apart)
            ),
            within(apart, if on_cpu { 0.0 } else { (10.0 * twice).max(1e-5) }),
        ),
    ])
}

/// A training that can be repeated from its start.
struct Training {
    rehearsal: Rehearsal,
    config: TrainingConfig,
    /// The initial weights.
    first: BTreeMap<String, Tensor>,
    folder: TempDir,
}

impl Training {
    fn new(rehearsal: Rehearsal, n_steps: usize) -> Result<Training> {
        let mut config = rehearsal.experiment.training.clone();
        // One more than is taken, so that every stop is before the end.
        (config.max_steps, config.max_epochs) = (Some(n_steps + 1), n_steps + 1);
        config.early_stopping.patience_epochs = None;
        let first = rehearsal.model.parameters.iter().map(|(name, tensor)| (name.to_owned(), tensor.detach().copy()));
        Ok(Training { first: first.collect(), rehearsal, config, folder: tempfile::tempdir()? })
    }

    /// Takes `n_steps` steps of run `name` with a new trainer, resuming from its checkpoint if there is one.
    fn take(&mut self, name: &str, n_steps: usize) -> Result<Checkpoint> {
        let run = RunDirectory { path: self.folder.path().join(name) };
        let last = run.checkpoint("last");
        let goes_on = last.exists();
        std::fs::create_dir_all(run.file("checkpoints"))?;
        let first = self.first.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
        self.rehearsal.model.parameters.load(first.collect())?;
        let mut trainer = self.rehearsal.trainer(&self.config, &self.rehearsal.experiment.weighting);
        let state = if goes_on { trainer.resume(&run)? } else { State::new(self.rehearsal.tasks.len()) };
        // Train serves as dev, since dev scores have no effect here.
        let course = Course { dev: &self.rehearsal.train, run: &run };
        let (stop, goal) = (AtomicBool::new(n_steps == 1), state.step + n_steps);
        let outcome = trainer.train(state, course, &mut StopAfter { n_left: n_steps, stop: &stop }, &stop)?;
        ensure!(outcome == Outcome::Interrupted(goal), "the training did not stop after step {goal}: {outcome:?}");
        checkpoint::load(&last)
    }
}

/// Stops training after `n_left` more steps.
struct StopAfter<'a> {
    n_left: usize,
    stop: &'a AtomicBool,
}

impl Observer for StopAfter<'_> {
    fn epoch_started(&mut self, _: usize, _: usize, _: usize) {}

    fn step_taken(&mut self, _: i64, _: Option<&[Option<f64>]>) {
        self.n_left = self.n_left.saturating_sub(1);
        // The trainer reads it in the next step.
        self.stop.store(self.n_left <= 1, Ordering::Relaxed);
    }

    fn epoch_ended(&mut self, _: usize, _: &[Option<f64>], _: &Report, _: bool) {}
}

/// The largest difference in weights and optimizer state, relative to the largest absolute value of the tensor;
/// infinite if a tensor is missing or a value is NaN.
fn difference(a: &Checkpoint, b: &Checkpoint) -> f64 {
    let of = |a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>| -> f64 {
        let one = |(name, a): (&String, &Tensor)| match b.get(name) {
            Some(b) if a.equal(b) => 0.0,
            Some(b) => {
                let relative = (a - b).abs().max().double_value(&[]) / a.abs().max().double_value(&[]);
                if relative.is_nan() { f64::INFINITY } else { relative }
            }
            None => f64::INFINITY,
        };
        if a.len() == b.len() { a.iter().map(one).fold(0.0, f64::max) } else { f64::INFINITY }
    };
    of(&a.model, &b.model).max(of(&a.optimizer, &b.optimizer))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn the_largest_difference_counts_and_what_is_missing_is_infinite() {
        let of = |weight: f32, moment: Option<f32>| {
            let named = |value: f32| BTreeMap::from([("a".to_owned(), Tensor::from_slice(&[4.0, value]))]);
            Checkpoint { model: named(weight), optimizer: moment.map(named).unwrap_or_default(), state: Value::Null }
        };
        let first = of(1.0, Some(2.0));
        assert_eq!(difference(&first, &of(1.0, Some(2.0))), 0.0);
        assert_eq!(difference(&first, &of(1.5, Some(2.0))), 0.125);
        assert_eq!(difference(&first, &of(1.0, Some(3.0))), 0.25);
        assert_eq!(difference(&first, &of(1.0, None)), f64::INFINITY);
        assert_eq!(difference(&of(1.0, None), &first), f64::INFINITY);
        assert_eq!(difference(&first, &of(f32::NAN, Some(2.0))), f64::INFINITY);
    }
}
