//! `polytask train`: train, evaluate the best checkpoint, print a table.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::json;
use tch::Device;

use super::End;
use super::cli::TrainArgs;
use super::progress::TrainingProgress;
use super::{prepare, table, trainer, transfer};
use crate::config::Experiment;
use crate::data::{Corpus, Split, Tokenizer};
use crate::evaluate::evaluate;
use crate::libtorch;
use crate::model::Model;
use crate::problem::{fail_on_errors, invalid};
use crate::run::{RunDirectory, checkpoint};
use crate::task::Task;
use crate::train::{Outcome, State};

pub fn run(args: &TrainArgs) -> Result<End> {
    let experiment = Experiment::load(&args.experiment, &args.overrides)?;
    let (device, threads) = prepare::machine(&args.machine)?;
    trainer::check_precision(&experiment.training, device)?;
    if args.resume {
        let run = RunDirectory::open(&resumed_path(args, &experiment)?)?;
        fail_on_change(&run, &experiment)?;
        let (corpus, problems) = prepare::corpus(&experiment)?;
        fail_on_errors(problems)?;
        return go(args, &run, device, &corpus);
    }
    let path = args.out.clone().unwrap_or_else(|| free_path(&experiment.name));
    let run = RunDirectory::create(&path)?;
    match start(args, &experiment, &run, (device, threads)) {
        Ok(corpus) => go(args, &run, device, &corpus),
        Err(error) => {
            // Nothing was trained: the directory would only be in the way of the next try.
            std::fs::remove_dir_all(&run.path).ok();
            Err(error)
        }
    }
}

/// `runs/NAME`, or the first of `runs/NAME-2`, `runs/NAME-3`, ... that is free.
fn free_path(name: &str) -> PathBuf {
    let numbered = |n: usize| PathBuf::from(if n == 1 { format!("runs/{name}") } else { format!("runs/{name}-{n}") });
    (1..).map(numbered).find(|path| !path.exists()).unwrap_or_else(|| numbered(1))
}

fn resumed_path(args: &TrainArgs, experiment: &Experiment) -> Result<PathBuf> {
    if let Some(out) = &args.out {
        return Ok(out.clone());
    }
    let name = &experiment.name;
    let newest = |n: usize| if n == 1 { format!("runs/{name}") } else { format!("runs/{name}-{n}") };
    let last = (1..).take_while(|&n| Path::new(&newest(n)).exists()).last();
    last.map(|n| newest(n).into()).ok_or_else(|| invalid(format!("there is no runs/{name} to resume")))
}

/// A run goes on with the experiment that it began with, or not at all.
fn fail_on_change(run: &RunDirectory, experiment: &Experiment) -> Result<()> {
    let (old, new) = (run.read("resolved.yaml")?, experiment.to_yaml()?);
    let changed = new.lines().zip(old.lines()).find(|(new, old)| new != old);
    match changed {
        None if new.lines().count() == old.lines().count() => Ok(()),
        changed => {
            let detail = changed.map_or(String::new(), |(new, old)| format!(": `{}` was `{}`", new.trim(), old.trim()));
            Err(invalid(format!(
                "the experiment is not the one that {} began with{detail}; resume with {} instead",
                run.path.display(),
                run.file("resolved.yaml").display()
            )))
        }
    }
}

/// Reads the data, learns the tokenizer, and writes what the run is made of.
fn start(args: &TrainArgs, experiment: &Experiment, run: &RunDirectory, machine: (Device, usize)) -> Result<Corpus> {
    // Said before the data is read.
    transfer::earlier(experiment)?;
    let (corpus, problems) = prepare::corpus(experiment)?;
    let warnings = fail_on_errors(problems)?;
    if let Some(first) = warnings.first() {
        log::warn!("{first}");
        if warnings.len() > 1 {
            let file = args.experiment.display();
            log::warn!("{} more warnings about the data; `polytask check {file}` lists them", warnings.len() - 1);
        }
    }
    let (tokenizer, coverage) = prepare::tokenizer(experiment, &corpus)?;
    for coverage in &coverage {
        log::info!("{}", prepare::coverage_line(coverage));
    }
    let tasks = prepare::tasks(experiment, &corpus);
    let written = std::fs::read_to_string(&args.experiment).context("the experiment file is gone")?;
    run.write("experiment.yaml", &written)?;
    run.write("tokenizer.json", &tokenizer.to_json()?)?;
    prepare::write_vectors(run, &tokenizer)?;
    run.write_tasks(&tasks)?;
    let environment = json!({
        "polytask": env!("CARGO_PKG_VERSION"),
        "libtorch": "2.11.0",
        "device": prepare::device_name(machine.0),
        "threads": machine.1,
        "workers": libtorch::workers(),
        "command": std::env::args().collect::<Vec<_>>(),
    });
    run.write("environment.json", &serde_json::to_string_pretty(&environment)?)?;
    run.write("resolved.yaml", &experiment.to_yaml()?)?;
    Ok(corpus)
}

/// Trains from wherever the run stands to its end.
fn go(args: &TrainArgs, run: &RunDirectory, device: Device, corpus: &Corpus) -> Result<End> {
    let (experiment, tasks, tokenizer) = prepare::of_run(run)?;
    let (model, onednn) = trainer::model(&experiment, &tasks, &tokenizer, device)?;
    let train = prepare::encoded(corpus, Split::Train, &tokenizer, &tasks, device)?;
    let dev = prepare::encoded(corpus, Split::Dev, &tokenizer, &tasks, device)?;
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
    if !resumes && let Some(earlier) = transfer::earlier(&experiment)? {
        transfer::initialize(&model, &tasks, &tokenizer, &earlier)?;
    }
    let mut trainer = trainer::Parts {
        experiment: &experiment,
        config: &experiment.training,
        weighting: &experiment.weighting,
        tasks: &tasks,
        tokenizer: &tokenizer,
        model: &model,
        train: &train,
        dev: &dev,
        run,
    }
    .trainer();
    let mut state = if resumes { trainer.resume()? } else { State::new(tasks.len()) };
    libtorch::use_onednn(*state.onednn.get_or_insert(onednn));
    if state.step > 0 {
        log::info!("going on after step {} of {}", state.step, trainer.n_steps());
    }
    let stop = Arc::new(AtomicBool::new(false));
    install_handler(&stop)?;
    let started = Instant::now();
    let mut progress = TrainingProgress::new(&tasks, experiment.training.max_epochs);
    let before = if args.resume { seconds_before(run) } else { 0.0 };
    let outcome = trainer.train(state, &mut progress, &stop)?;
    let seconds = before + started.elapsed().as_secs_f64();
    run.write("timing.json", &json!({"training_secs": seconds}).to_string())?;
    match outcome {
        Outcome::Interrupted(step) => {
            let command = resume_command(args, run);
            log::info!("stopped after step {step}, everything is saved; go on with:\n  {command}");
            Ok(End::Interrupted)
        }
        Outcome::Finished => {
            report(run, &tasks, &model, (corpus, &tokenizer, device), seconds)?;
            Ok(End::Done)
        }
    }
}

/// What the run took before it was stopped; one that was killed did not say.
fn seconds_before(run: &RunDirectory) -> f64 {
    let timing: Option<serde_json::Value> =
        run.read("timing.json").ok().and_then(|text| serde_json::from_str(&text).ok());
    timing.and_then(|timing| timing["training_secs"].as_f64()).unwrap_or(0.0)
}

/// The first signal ends training after the step at hand; the second ends the process.
fn install_handler(stop: &Arc<AtomicBool>) -> Result<()> {
    let stop = stop.clone();
    ctrlc::set_handler(move || {
        if stop.swap(true, Ordering::Relaxed) {
            libtorch::exit_at_once(130);
        }
        eprintln!("\nstopping after this step; once more to stop at once");
    })
    .context("signals cannot be handled")
}

fn resume_command(args: &TrainArgs, run: &RunDirectory) -> String {
    let quoted = |text: &str| match text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./=:,".contains(c)) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    };
    let mut words = vec!["polytask".to_owned(), "train".to_owned(), quoted(&args.experiment.to_string_lossy())];
    words.extend(args.overrides.iter().map(|value| format!("--set {}", quoted(value))));
    words.push(format!("--out {}", quoted(&run.path.to_string_lossy())));
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
    let mut reports = Vec::new();
    for split in [Split::Dev, Split::Test] {
        let data = prepare::encoded(corpus, split, tokenizer, tasks, device)?;
        if !data.set.is_empty() {
            reports.push((split.name(), evaluate(model, &data, tasks)?));
        }
    }
    let splits: Vec<(&str, &_)> = reports.iter().map(|(name, report)| (*name, report)).collect();
    let content = json!({
        "checkpoint": "best",
        "epoch": best.state["epoch"],
        "step": best.state["step"],
        "parameters": model.parameters.count(),
        "training_secs": seconds,
        "splits": reports.iter().map(|(name, report)| (name.to_string(), json!(report))).collect::<serde_json::Map<_, _>>(),
    });
    run.write("report.json", &serde_json::to_string_pretty(&content)?)?;
    log::info!("trained for {seconds:.0} s; best checkpoint: epoch {}", best.state["epoch"]);
    println!("{}", table::reports(&splits));
    Ok(())
}
