//! `polytask train`: train, evaluate the best checkpoint, print a table.

mod resume;

use std::ffi::OsStr;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, Result};
use indexmap::IndexMap;
use serde_json::json;
use tch::Device;

use super::cli::TrainArgs;
use super::progress::TrainingProgress;
use super::run_report::RunReport;
use super::{End, build_trainer, data_checks, init_from, prepare, saved_model, say, stop_flag, table};
use crate::config::Experiment;
use crate::data::{Corpus, EncodedSplit, Split, Tokenizer};
use crate::evaluate::evaluate;
use crate::libtorch;
use crate::model::Model;
use crate::problem::{counted, fail_on_errors, invalid};
use crate::run::{NewRun, RunDirectory, atomic, checkpoint, names};
use crate::task::{Task, TaskId};
use crate::train::{Course, Outcome, State};

pub fn run(args: &TrainArgs) -> Result<End> {
    if args.experiment.is_dir() {
        return run(&resume::of_folder(args)?);
    }
    let experiment = Experiment::load(&args.experiment, &args.overrides)?;
    let (device, threads) = prepare::machine(&args.machine)?;
    build_trainer::check_precision(&experiment.training, device)?;
    let _compiling = libtorch::compile_ahead(device);
    if args.resume {
        let run = resume::open(args, &experiment)?;
        let _lock = run.lock()?;
        [run.path.clone(), run.file("checkpoints")].iter().for_each(|folder| atomic::sweep(folder));
        let (corpus, problems) = prepare::corpus(&experiment)?;
        fail_on_errors(problems)?;
        return go((args, &experiment), &run, device, &corpus, stop_flag(STOPPING).as_ref());
    }
    if let Some(out) = &args.out {
        NewRun::fail_if_occupied(out)?;
    }
    let (corpus, tokenizer) = read(args, &experiment)?;
    // A signal before this point leaves nothing behind; one after it leaves a run that can be resumed.
    let stop = stop_flag(STOPPING);
    let new = match &args.out {
        Some(out) => NewRun::create(out)?,
        None => NewRun::create_free(Path::new(RUNS), &experiment.name)?,
    };
    write(&experiment, &new.directory, args, (&corpus, &tokenizer), (device, threads))?;
    new.started()?;
    go((args, &experiment), &new.directory, device, &corpus, &stop)
}

const STOPPING: &str = "stopping after this step";

/// Maximum number of data warnings shown before training.
const WARNINGS_SHOWN: usize = 3;

/// The default folder for runs.
pub const RUNS: &str = "runs";

/// Reads the data and builds the tokenizer.
fn read(args: &TrainArgs, experiment: &Experiment) -> Result<(Corpus, Tokenizer)> {
    // Errors in `init_from` are reported before the data is read.
    init_from::earlier(experiment)?;
    let (corpus, problems) = prepare::corpus(experiment)?;
    let of_files = fail_on_errors(problems)?;
    let mut warnings = data_checks::leaks(&corpus);
    warnings.extend(of_files);
    warnings.extend(data_checks::long_sentences(&corpus));
    warnings.iter().take(WARNINGS_SHOWN).for_each(|warning| log::warn!("{warning}"));
    if warnings.len() > WARNINGS_SHOWN {
        let mut check = vec![program(), "check".to_owned(), quoted(&args.experiment), "--all".to_owned()];
        check.extend(args.overrides.iter().map(|value| format!("--set {}", quoted(value))));
        let n_more = counted(warnings.len() - WARNINGS_SHOWN, "more warning");
        log::warn!("{n_more} about the data; `{}` lists all", check.join(" "));
    }
    let (tokenizer, coverage) = prepare::tokenizer(experiment, &corpus)?;
    for coverage in &coverage {
        let level = if coverage.types.1 == 0 { log::Level::Warn } else { log::Level::Info };
        log::log!(level, "{}", prepare::coverage_line(coverage));
    }
    Ok((corpus, tokenizer))
}

/// Writes the files that training starts from.
fn write(
    experiment: &Experiment,
    run: &RunDirectory,
    args: &TrainArgs,
    (corpus, tokenizer): (&Corpus, &Tokenizer),
    machine: (Device, usize),
) -> Result<()> {
    let tasks = prepare::tasks(experiment, corpus);
    let written = std::fs::read_to_string(&args.experiment).context("the experiment file cannot be read any more")?;
    run.write(names::AS_WRITTEN, &written)?;
    run.write(names::TOKENIZER, &tokenizer.to_json()?)?;
    saved_model::write_vectors(run, tokenizer)?;
    run.write_tasks(&tasks)?;
    let environment = json!({
        "polytask": env!("CARGO_PKG_VERSION"),
        "libtorch": "2.11.0",
        "device": prepare::device_name(machine.0),
        "threads": machine.1,
        "workers": libtorch::workers(),
        "command": std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>(),
    });
    run.write(names::ENVIRONMENT, &serde_json::to_string_pretty(&environment)?)?;
    run.write(names::RESOLVED, &experiment.to_yaml()?)
}

/// Trains from the run's current state to the end.
fn go(
    (args, experiment): (&TrainArgs, &Experiment),
    run: &RunDirectory,
    device: Device,
    corpus: &Corpus,
    stop: &AtomicBool,
) -> Result<End> {
    let (written, tasks, mut tokenizer) = saved_model::of_run(run)?;
    let model = build_trainer::model(experiment, &tasks, &tokenizer, device)?;
    let train = prepare::training(experiment, corpus, &tokenizer, &tasks, device)?;
    let dev = prepare::encoded(corpus, Split::Dev, &tokenizer, &tasks, device)?;
    prepare::warn_of_unseen(&dev, Split::Dev, &tasks);
    build_trainer::fail_without_choice(&experiment.training.early_stopping.metric.0, &dev, &tasks)?;
    log::info!(
        "{}: {} sentences, {} tokens, {} token types, {} parameters, on {}; results go to {}",
        experiment.name,
        table::count(train.set.len()),
        table::count(train.set.token_ids.len()),
        table::count(tokenizer.size()),
        table::count(model.parameters.count()),
        prepare::device_name(device),
        run.path.display(),
    );
    let resumes = args.resume && run.checkpoint("last").exists();
    if !resumes && let Some(earlier) = init_from::earlier(experiment)? {
        init_from::initialize(&model, (experiment, &tasks), &tokenizer, &earlier)?.log();
        init_from::keep_vectors(&model, &mut tokenizer);
        saved_model::write_vectors(run, &tokenizer)?;
    }
    let mut trainer = build_trainer::Parts {
        experiment,
        config: &experiment.training,
        weighting: &experiment.weighting,
        tasks: &tasks,
        tokenizer: &tokenizer,
        model: &model,
        train: &train,
    }
    .trainer();
    let mut state = match resumes {
        true => trainer.resume(run).with_context(|| format!("{} is damaged", run.checkpoint("last").display()))?,
        false => State::new(tasks.len()),
    };
    let data = EncodedSplit::fingerprint(&[&train.set, &dev.set]);
    if state.data.get_or_insert(data.clone()) != &data {
        let message = "its data has changed; restore the data or start a new run";
        return Err(invalid(format!("{} cannot be resumed: {message}", run.path.display())));
    }
    if written.to_yaml()? != experiment.to_yaml()? {
        resume::write_changes(run, (&written, experiment), &trainer, state.step)?;
    }
    if state.step > 0 {
        log::info!("resuming after step {} of {}", state.step, trainer.n_steps());
    }
    let started = Instant::now();
    let mut progress = TrainingProgress::new(&tasks, trainer.n_steps(), state.step);
    let before = if args.resume { seconds_before(run) } else { 0.0 };
    let outcome = trainer.train(state, Course { dev: &dev, run }, &mut progress, stop)?;
    let seconds = before + started.elapsed().as_secs_f64();
    run.write(names::TIMING, &json!({"training_secs": seconds}).to_string())?;
    match outcome {
        Outcome::Interrupted(step) => {
            let command = resume_command(args, run);
            log::info!("stopped after step {step}, everything is saved; resume with:\n  {command}");
            Ok(End::Interrupted)
        }
        Outcome::Finished => {
            if progress.stopped_early() {
                let patience = experiment.training.early_stopping.patience_epochs.unwrap_or_default();
                log::info!("stopped early: no better score in {}", counted(patience, "epoch"));
            }
            report(run, &tasks, &model, (corpus, &tokenizer, device), seconds)?;
            Ok(End::Done)
        }
    }
}

/// Seconds that the run has trained before; 0 if it was killed without recording them.
fn seconds_before(run: &RunDirectory) -> f64 {
    let timing: Option<serde_json::Value> =
        run.read(names::TIMING).ok().and_then(|text| serde_json::from_str(&text).ok());
    timing.and_then(|timing| timing["training_secs"].as_f64()).unwrap_or(0.0)
}

/// This program, as it was called.
fn program() -> String {
    std::env::args_os().next().map_or("polytask".to_owned(), quoted)
}

/// An argument, quoted for the shell if necessary.
fn quoted(argument: impl AsRef<OsStr>) -> String {
    let text = argument.as_ref().to_string_lossy();
    match text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./=:,".contains(c)) {
        true => text.into_owned(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

fn resume_command(args: &TrainArgs, run: &RunDirectory) -> String {
    let mut words = vec![program(), "train".to_owned(), quoted(&args.experiment)];
    words.extend(args.overrides.iter().map(|value| format!("--set {}", quoted(value))));
    words.push(format!("--out {}", quoted(&run.path)));
    if args.machine.device != "auto" {
        words.push(format!("--device {}", args.machine.device));
    }
    if let Some(threads) = args.machine.threads {
        words.push(format!("--threads {threads}"));
    }
    if let Some(workers) = args.machine.workers {
        words.push(format!("--workers {workers}"));
    }
    words.push("--resume".to_owned());
    words.join(" ")
}

/// Evaluates the best checkpoint, writes `report.json` and prints the table.
fn report(
    run: &RunDirectory,
    tasks: &[Task],
    model: &Model,
    (corpus, tokenizer, device): (&Corpus, &Tokenizer, Device),
    seconds: f64,
) -> Result<()> {
    let best = checkpoint::load(&run.checkpoint("best"))?;
    model.parameters.load(best.model)?;
    let (mut splits, mut rows) = (IndexMap::new(), IndexMap::new());
    for split in [Split::Dev, Split::Test] {
        let data = prepare::encoded(corpus, split, tokenizer, tasks, device)?;
        if split == Split::Test {
            prepare::warn_of_unseen(&data, split, tasks);
        }
        if !data.set.is_empty() {
            splits.insert(split.name().to_owned(), evaluate(model, &data, tasks)?);
            let known_by = (0..tasks.len()).map(|i| corpus.fingerprint(TaskId(i), split)).collect();
            rows.insert(split.name().to_owned(), known_by);
        }
    }
    let of_best = |key: &str| best.state[key].as_u64().with_context(|| format!("the best checkpoint has no {key}"));
    let finished = RunReport {
        checkpoint: "best".to_owned(),
        epoch: of_best("epoch")?,
        step: of_best("step")?,
        parameters: model.parameters.count() as u64,
        training_secs: seconds,
        splits,
        rows,
    };
    finished.write(run)?;
    match finished.splits.contains_key(Split::Dev.name()) {
        true => log::info!("trained for {seconds:.0} s; best checkpoint: epoch {}", finished.epoch),
        false => log::info!("trained for {seconds:.0} s; without dev the last weights are kept as the best"),
    }
    if !finished.splits.is_empty() {
        say(table::reports(&finished.splits.iter().map(|(name, report)| (name.as_str(), report)).collect::<Vec<_>>()))?;
    }
    let (program, path) = (program(), quoted(&run.path));
    log::info!(
        "use the model with:\n  {program} predict {path} --input sentences.txt\n  {program} export {path} --format torchscript \
         --out model.pt"
    );
    Ok(())
}
