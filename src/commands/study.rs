//! `polytask study`: the runs of an experiment's `study:`, each in its own process, several in parallel.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indexmap::IndexMap;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cli::StudyArgs;
use super::compare::{self, PLAN, Planned};
use super::run_report::RunReport;
use super::{End, prepare, table};
use crate::compare::Settings;
use crate::config::{Experiment, PlannedRun};
use crate::data::{Corpus, Split};
use crate::evaluate::TaskReport;
use crate::libtorch;
use crate::problem::{counted, fail_on_errors, invalid};
use crate::run::{NewRun, RunDirectory, atomic, names};
use crate::task::TaskId;

/// A planned run with its paths.
struct Job {
    name: String,
    experiment: PathBuf,
    run: PathBuf,
    log: PathBuf,
}

enum Outcome {
    Done,
    Failed(String),
    Interrupted,
}

pub fn run(args: &StudyArgs) -> Result<End> {
    let experiment = Experiment::load(&args.experiment, &args.overrides)?;
    let Some(study) = &experiment.study else {
        return Err(invalid(format!("{} has no `study:` block", args.experiment.display())));
    };
    for device in &args.devices {
        libtorch::device(device).map_err(|error| invalid(format!("{error:#}")))?;
    }
    let variants = experiment.variants(&args.experiment, &args.overrides)?;
    let mut runs = experiment.planned_runs(study, &variants);
    let corpus = checked_data(&experiment, &variants)?;
    let without_dev = corpus.rows(Split::Dev).iter().all(|rows| rows.is_empty());
    for (i, name) in experiment.tasks.keys().enumerate() {
        if without_dev || corpus.has_labels(TaskId(i), Split::Dev) {
            continue;
        }
        let (n, alone) = (runs.len(), format!("only-{name}"));
        runs.retain(|run| run.label != alone);
        if runs.len() < n {
            log::warn!(
                "no single-task model is trained for `{name}`: dev has no label of it to choose a checkpoint by"
            );
        }
    }
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from(format!("runs/{}-study", experiment.name)));
    if !out.join(PLAN).is_file() {
        NewRun::fail_if_occupied(&out)?;
    }
    std::fs::create_dir_all(&out).map_err(|error| invalid(format!("{} cannot be created: {error}", out.display())))?;
    let _lock = RunDirectory { path: out.clone() }.lock()?;
    let jobs = write_plan(&out, &runs)?;
    let (done, open): (Vec<Job>, Vec<Job>) = jobs.into_iter().partition(|job| job.run.join(names::REPORT).is_file());
    let n_side_by_side = usize::from(args.jobs).max(args.devices.len()).min(open.len().max(1));
    log::info!(
        "{}: {} runs, {} of them done, {n_side_by_side} in parallel; results go to {}",
        experiment.name,
        done.len() + open.len(),
        done.len(),
        out.display()
    );
    let n_other = std::fs::read_dir(out.join("runs"))?
        .flatten()
        .filter(|entry| entry.path().join(names::REPORT).is_file())
        .filter(|entry| !done.iter().any(|job| job.run == entry.path()))
        .count();
    if n_other > 0 {
        log::info!("finished runs in this folder that do not belong to this study, and are left out: {n_other}");
    }
    let n_open = open.len();
    let outcomes = work(open, args, n_side_by_side)?;
    let failed: Vec<&(Job, Outcome)> =
        outcomes.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Failed(_))).collect();
    let interrupted = outcomes.iter().any(|(_, outcome)| matches!(outcome, Outcome::Interrupted));
    if interrupted || outcomes.len() < n_open {
        log::info!("stopped, everything is saved; the same command continues the study");
        return Ok(End::Interrupted);
    }
    if done.len() + outcomes.len() > failed.len() {
        compare::show(std::slice::from_ref(&out), Some(&out.join("report.html")), false)?;
    }
    if !failed.is_empty() {
        let lines: Vec<String> = failed
            .iter()
            .map(|(job, outcome)| match outcome {
                Outcome::Failed(why) => format!("{} ({}): {why}", job.name, job.log.display()),
                _ => String::new(),
            })
            .collect();
        bail!(
            "{} failed; the same command resumes failed runs, or starts them again if you remove their folders\n  {}",
            counted(failed.len(), "run"),
            lines.join("\n  ")
        );
    }
    Ok(End::Done)
}

/// The data of the experiment. Errors in it, and in that of variants which read other data, are reported before the first run.
fn checked_data(experiment: &Experiment, variants: &IndexMap<String, Experiment>) -> Result<Corpus> {
    let (corpus, problems) = prepare::corpus(experiment)?;
    fail_on_errors(problems)?;
    let base = experiment.to_value()?;
    for variant in variants.values() {
        let value = variant.to_value()?;
        if ["data", "tasks", "tokenizer"].iter().any(|key| base[key] != value[key]) {
            fail_on_errors(prepare::corpus(variant)?.1)?;
        }
    }
    Ok(corpus)
}

/// Writes `plan.json`, which marks the folder as a study, and one experiment file per run.
fn write_plan(out: &Path, runs: &[PlannedRun]) -> Result<Vec<Job>> {
    let mut jobs = Vec::new();
    let mut files = Vec::new();
    for run in runs {
        let file = out.join("experiments").join(format!("{}.yaml", run.name));
        let yaml = run.experiment.to_yaml()?;
        let started = out.join("runs").join(&run.name).exists();
        if started && std::fs::read_to_string(&file).is_ok_and(|old| old != yaml) {
            let old = Settings::of_all(&Experiment::load(&file, &[])?.to_value()?);
            let changes = Settings::of_all(&run.experiment.to_value()?).changes_from(&old);
            if !changes.is_empty() {
                let (out, name, changes) = (out.display(), &run.name, changes.join("\n  "));
                return Err(invalid(format!(
                    "{out} has a run {name} of a different experiment; choose another folder with --out\n  {changes}"
                )));
            }
        }
        files.push((file.clone(), yaml));
        jobs.push(Job {
            name: run.name.clone(),
            experiment: file,
            run: out.join("runs").join(&run.name),
            log: out.join("logs").join(format!("{}.log", run.name)),
        });
    }
    let plan: Vec<Planned> = runs
        .iter()
        .map(|run| Planned { name: run.name.clone(), label: run.label.clone(), variant: run.variant.clone() })
        .collect();
    atomic::write(&out.join(PLAN), serde_json::to_string_pretty(&plan)?.as_bytes())?;
    for folder in ["experiments", "runs", "logs"] {
        std::fs::create_dir_all(out.join(folder))
            .map_err(|error| invalid(format!("{} cannot be created: {error}", out.join(folder).display())))?;
    }
    files.iter().try_for_each(|(file, yaml)| atomic::write(file, yaml.as_bytes()))?;
    Ok(jobs)
}

/// Runs `jobs`, `n` at a time, each worker on one of the devices, and returns how each ended.
fn work(jobs: Vec<Job>, args: &StudyArgs, n: usize) -> Result<Vec<(Job, Outcome)>> {
    let program = std::env::current_exe().context("the program's own path is unknown")?;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = args.threads.map_or((cores / n).max(1), usize::from);
    let stop = super::stop_flag("stopping the runs after their current steps");
    let n_jobs = jobs.len();
    let (queue, results) = (Mutex::new(VecDeque::from(jobs)), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for worker in 0..n {
            let device = args.devices.get(worker % args.devices.len().max(1)).map_or("auto", String::as_str);
            let (queue, results, stop, program) = (&queue, &results, &stop, &program);
            scope.spawn(move || {
                while let Some(job) = next(queue, stop) {
                    let started = Instant::now();
                    let outcome = train(program, &job, device, threads, stop)
                        .unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
                    let mut results = results.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    let place = format!("[{}/{n_jobs}] {}", results.len() + 1, job.name);
                    match &outcome {
                        Outcome::Done => {
                            log::info!("{place}: {} in {:.0} s", scores(&job), started.elapsed().as_secs_f64())
                        }
                        Outcome::Failed(why) => log::error!("{place} failed: {why}"),
                        Outcome::Interrupted => {}
                    }
                    results.push((job, outcome));
                }
            });
        }
    });
    Ok(results.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()))
}

fn next(queue: &Mutex<VecDeque<Job>>, stop: &AtomicBool) -> Option<Job> {
    if stop.load(Ordering::Relaxed) {
        return None;
    }
    queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).pop_front()
}

fn train(program: &Path, job: &Job, device: &str, threads: usize, stop: &AtomicBool) -> Result<Outcome> {
    let mut command = Command::new(program);
    command.arg("train").arg(&job.experiment).arg("--out").arg(&job.run);
    command.args(["--device", device, "--threads", &threads.to_string()]);
    if job.run.join("checkpoints/last.safetensors").is_file() {
        command.arg("--resume");
    } else if job.run.exists() {
        // It was killed before its first checkpoint, unless another process is training in it: then the lock fails.
        let _lock = RunDirectory { path: job.run.clone() }.lock()?;
        std::fs::remove_dir_all(&job.run).with_context(|| format!("{} cannot be removed", job.run.display()))?;
    }
    let log = File::create(&job.log).with_context(|| format!("{} cannot be written", job.log.display()))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // Outside the terminal's process group, so that a Ctrl-C reaches a run once, through this process.
    command.process_group(0);
    let mut child = command.spawn().with_context(|| format!("{} cannot be started", program.display()))?;
    let mut told = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if stop.load(Ordering::Relaxed) && !told {
            told = true;
            interrupt(&child);
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    match status.code() {
        Some(0) => Ok(Outcome::Done),
        Some(130) => Ok(Outcome::Interrupted),
        _ if told => Ok(Outcome::Interrupted),
        _ => Ok(Outcome::Failed(last_line(&job.log).unwrap_or_else(|| status.to_string()))),
    }
}

fn interrupt(child: &Child) {
    // The process may have ended in the meantime.
    let _ = i32::try_from(child.id()).map(|id| kill(Pid::from_raw(id), Signal::SIGTERM));
}

fn last_line(log: &Path) -> Option<String> {
    let text = std::fs::read_to_string(log).ok()?;
    let lines = || text.lines().rev();
    let last = lines().find(|line| line.starts_with("error: ")).or(lines().find(|line| !line.trim().is_empty()))?;
    Some(last.trim_start_matches("error: ").to_owned())
}

/// The main scores of a finished run, on test or else on dev, in one line.
fn scores(job: &Job) -> String {
    let Ok(finished) = RunReport::read(&RunDirectory { path: job.run.clone() }) else { return String::new() };
    let tasks = finished.splits.values().next().map_or(&[][..], |report| &report.tasks);
    let score = |(i, task): (usize, &TaskReport)| {
        Some(format!("{} {}", task.name, table::percent(finished.best_known(i)?.value)))
    };
    if tasks.is_empty() {
        return String::new();
    }
    let split = if finished.splits.contains_key("test") { "test" } else { "dev" };
    format!("{split} {}", tasks.iter().enumerate().filter_map(score).collect::<Vec<_>>().join(", "))
}
