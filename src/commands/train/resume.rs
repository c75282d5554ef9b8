//! `polytask train --resume`: which run is resumed, and what may change in it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::RUNS;
use crate::commands::cli::TrainArgs;
use crate::compare::Settings;
use crate::config::Experiment;
use crate::problem::invalid;
use crate::run::{RunDirectory, names};
use crate::train::Trainer;

/// `args` with the experiment and the output folder taken from a run directory given in place of the experiment.
pub fn of_folder(args: &TrainArgs) -> Result<TrainArgs> {
    let folder = &args.experiment;
    if !args.resume {
        let message = "is a folder: name an experiment file, or add --resume to resume the run in it";
        return Err(invalid(format!("{} {message}", folder.display())));
    }
    let experiment = RunDirectory::open(folder)?.file(names::RESOLVED);
    Ok(TrainArgs { experiment, out: Some(args.out.clone().unwrap_or_else(|| folder.clone())), ..args.clone() })
}

/// The run directory to resume: `--out`, or else the newest of the experiment's runs that can be resumed.
///
/// # Errors
/// There is no such run, or it was started with another experiment.
pub fn open(args: &TrainArgs, experiment: &Experiment) -> Result<RunDirectory> {
    let name = &experiment.name;
    let paths = match &args.out {
        Some(out) => vec![out.clone()],
        None => RunDirectory::all_of(Path::new(RUNS), name, &experiment.to_yaml()?),
    };
    let opened = |path: &PathBuf| {
        let run = RunDirectory::open(path)?;
        fail_on_change(&run, experiment)?;
        Ok(run)
    };
    let mut runs = paths.iter().map(opened);
    let newest = runs.next().ok_or_else(|| invalid(format!("there is no {RUNS}/{name} to resume")))?;
    let unfinished = |run: &RunDirectory| !run.file(names::REPORT).exists();
    newest.or_else(|error| runs.filter_map(Result::ok).find(unfinished).ok_or(error))
}

fn fail_on_change(run: &RunDirectory, experiment: &Experiment) -> Result<()> {
    let mut old = Experiment::load(&run.file(names::RESOLVED), &[])?;
    old.take_changeable(experiment);
    let changes = Settings::of_all(&experiment.to_value()?).changes_from(&Settings::of_all(&old.to_value()?));
    if changes.is_empty() {
        return Ok(());
    }
    let (run, yaml) = (run.path.display(), run.file(names::RESOLVED));
    Err(invalid(format!(
        "{run} was started with another experiment:\n  {}\nOf a run that has begun, only when it ends, what it records and \
         where its data lies may change. To resume it, use {}; to start a new run from its weights, --set init_from={run}",
        changes.join("\n  "),
        yaml.display()
    )))
}

/// Saves the changed experiment of a run that has taken `step` steps.
pub fn write_changes(
    run: &RunDirectory,
    (before, now): (&Experiment, &Experiment),
    trainer: &Trainer,
    step: usize,
) -> Result<()> {
    let ends = |experiment: &Experiment| experiment.training.end();
    let n_steps = trainer.n_steps();
    // The last step includes an evaluation, so a new end must be ahead.
    if ends(before) != ends(now) && step >= n_steps {
        let path = run.path.display();
        return Err(invalid(format!("{path} has already taken {step} steps, and cannot end after {n_steps}")));
    }
    // A run with a report counts as finished.
    let report = run.file(names::REPORT);
    if report.exists() {
        std::fs::remove_file(&report).with_context(|| format!("{} cannot be removed", report.display()))?;
    }
    run.write(names::RESOLVED, &now.to_yaml()?)?;
    if ends(before) != ends(now) {
        let rate = trainer.learning_rate(step, n_steps);
        log::info!(
            "the run now ends after {n_steps} steps; the learning rate continues from {rate:.3e}, as if so planned from the start"
        );
    }
    Ok(())
}
