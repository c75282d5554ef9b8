//! `polytask bench`: the time of a training step and its parts, compared with a lower bound for the device, and the
//! cost of each weighting strategy.
//!
//! Strategies take turns on the same batches, one step at a time on the CPU and 25 on CUDA, so that other load on the
//! machine affects all of them alike. Ratios are computed per round; the median over the rounds is shown.

mod bound;
mod kernels;
mod workload;

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use indexmap::IndexMap;
use serde::Serialize;
use serde_json::json;
use tch::Device;

use super::cli::BenchArgs;
use super::rehearsal::Rehearsal;
use super::{End, prepare, saved_model, say, table};
use crate::config::Experiment;
use crate::data::Split;
use crate::evaluate::predict;
use crate::libtorch::{busy_time, configure, peak_device_memory, workers};
use crate::model::Precision;
use crate::problem::invalid;
use crate::run::atomic::Partial;
use crate::train::step_timer::{Part, StepTimer};
use crate::train::{Pending, Step, Trainer};
use crate::weighting::WeightingConfig;

/// Warm-up steps on the CPU.
const WARM_UP: usize = 5;

#[derive(Serialize)]
struct Measured {
    strategy: String,
    /// Median over the rounds.
    ms_per_step: f64,
    tokens_per_sec: f64,
    sentences_per_sec: f64,
    /// Time relative to the first strategy: median, minimum and maximum over the rounds.
    ratio: [f64; 3],
}

#[derive(Serialize)]
struct Findings<'a> {
    experiment: &'a str,
    device: String,
    threads: usize,
    workers: usize,
    steps: usize,
    rounds: u16,
    peak_memory_bytes: Option<usize>,
    /// Time in which at least one kernel or copy runs on the GPU, in a step with the first strategy under the profiler,
    /// relative to the time of a step without it.
    gpu_busy_fraction: Option<f64>,
    strategies: Vec<Measured>,
    /// Parts of a step with the first strategy.
    parts_ms: IndexMap<&'static str, f64>,
    /// Measured only on the CPU in float32.
    lstm: Option<kernels::LstmTimes>,
    bound: bound::Bound,
    time_over_bound: f64,
}

/// All strategies, GradNorm in several variants, and the experiment's own strategy if it is none of these.
fn candidates(experiment: &Experiment) -> Result<Vec<(String, WeightingConfig)>> {
    if experiment.tasks.len() == 1 {
        return Ok(vec![("one task".to_owned(), WeightingConfig::default())]);
    }
    let mut all = Vec::new();
    for name in ["equal", "uncertainty", "uncertainty_softmax", "dwa", "random"] {
        all.push((name.to_owned(), serde_json::from_value(json!({name: {}}))?));
    }
    all.push(("gradnorm, representation".to_owned(), serde_json::from_value(json!({"gradnorm": {}}))?));
    for every in [1, 2, 4, 8] {
        let config = json!({"gradnorm": {"reference": "last_layer", "update_every": every}});
        all.push((format!("gradnorm, last_layer, update_every {every}"), serde_json::from_value(config)?));
    }
    let own = serde_json::to_value(&experiment.weighting)?;
    for (_, known) in &all {
        if serde_json::to_value(known)? == own {
            return Ok(all);
        }
    }
    all.push(("as in the file".to_owned(), experiment.weighting.clone()));
    Ok(all)
}

pub fn run(args: &BenchArgs) -> Result<End> {
    let yaml = args.experiment.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
    if args.experiment.is_dir() || (args.experiment.is_file() && !yaml) {
        if !(args.overrides.is_empty() && args.only.is_empty() && args.write.is_none() && args.trace.is_none()) {
            return Err(invalid("--set, --only, --write and --trace apply to experiments, not to trained models"));
        }
        return labelling(args);
    }
    let experiment = Experiment::load(&args.experiment, &args.overrides)?;
    let open = |path: &PathBuf| Partial::new(path).with_context(|| format!("{} could not be written", path.display()));
    let mut trace = args.trace.as_ref().map(open).transpose()?;
    let (device, threads) = prepare::machine(&args.machine)?;
    let mut candidates = candidates(&experiment)?;
    if let Some(unknown) = args.only.iter().find(|name| candidates.iter().all(|(known, _)| known != *name)) {
        let known: Vec<&str> = candidates.iter().map(|(name, _)| name.as_str()).collect();
        return Err(invalid(format!("--only {unknown}: no such strategy; the strategies are {}", known.join("; "))));
    }
    candidates.retain(|(name, _)| args.only.is_empty() || args.only.contains(name));
    let rehearsal = Rehearsal::new(experiment, device)?;
    let (experiment, train) = (&rehearsal.experiment, &rehearsal.train);
    let config = &experiment.training;
    let plan = rehearsal.sampler().plan(0);
    let n_steps = usize::from(args.steps).min(plan.len() / config.accumulate_steps).max(1);
    let steps: Vec<&[Vec<usize>]> = plan.chunks(config.accumulate_steps).take(n_steps).collect();
    let mut trainers: Vec<Trainer> =
        candidates.iter().map(|(_, weighting)| rehearsal.trainer(config, weighting)).collect();
    if let Some(folder) = &args.write {
        // Without TF32, so that other programs can compare their losses to more digits.
        configure(threads, workers(), false)?;
        workload::write(folder, &rehearsal, &mut trainers[0], &steps)?;
        return Ok(End::Done);
    }
    let n_sentences: usize = steps.iter().flat_map(|batches| batches.iter()).map(Vec::len).sum();
    let n_tokens: i64 =
        steps.iter().flat_map(|batches| batches.iter().flatten()).map(|&row| train.set.n_tokens(row)).sum();
    log::info!(
        "{}: {n_steps} steps of {} rows and {:.0} tokens, {} rounds, on {}, {threads} threads, {} workers",
        experiment.name,
        n_sentences / n_steps,
        n_tokens as f64 / n_steps as f64,
        args.rounds,
        prepare::device_name(device),
        workers()
    );
    let seconds = measure(&mut trainers, &steps, usize::from(args.rounds), device)?;
    let size = Size { n_steps, n_tokens, n_sentences };
    let names = candidates.iter().map(|(name, _)| name.clone());
    let measured: Vec<Measured> =
        names.zip(&seconds).map(|(name, own)| summarize(name, own, &seconds[0], &size)).collect();
    let parts_ms = parts(&mut trainers[0], &steps, device)?;
    // Read before the bound is measured, which allocates larger arrays.
    let peak_memory_bytes = peak_memory(device);
    let lstm = (device == Device::Cpu && config.precision == Precision::Float32)
        .then(|| kernels::measure(&rehearsal.model, config));
    let bound = bound(&rehearsal, &steps);
    // Last, since the profiler slows the device down.
    let busy = profiled(&mut trainers[0], &steps, device, trace.as_mut())?;
    trace.map(Partial::keep).transpose()?;
    let findings = Findings {
        experiment: &experiment.name,
        device: prepare::device_name(device),
        threads,
        workers: workers(),
        steps: n_steps,
        rounds: args.rounds,
        peak_memory_bytes,
        gpu_busy_fraction: busy.map(|ms| (ms / measured[0].ms_per_step).min(1.0)),
        time_over_bound: measured[0].ms_per_step / bound.ms_per_step,
        strategies: measured,
        parts_ms,
        lstm,
        bound,
    };
    match args.json {
        true => say(serde_json::to_string_pretty(&findings)?)?,
        false => print(&findings)?,
    }
    Ok(End::Done)
}

/// Milliseconds of each part of a step, mean over `steps`.
fn parts(trainer: &mut Trainer, steps: &[&[Vec<usize>]], device: Device) -> Result<IndexMap<&'static str, f64>> {
    trainer.timer = StepTimer::of(device);
    time(trainer, steps, 0, device)?;
    trainer.settle()?;
    trainer.timer.end(Part::Update);
    let seconds = std::mem::take(&mut trainer.timer).seconds();
    let each = Part::ALL.iter().map(|(part, name)| (*name, 1000.0 * seconds[*part as usize] / steps.len() as f64));
    Ok(each.filter(|(_, ms)| *ms > 0.0).collect())
}

/// Milliseconds of a step in which the GPU works; `None` on the CPU and, with a warning, if it cannot be measured.
fn profiled(
    trainer: &mut Trainer,
    steps: &[&[Vec<usize>]],
    device: Device,
    trace: Option<&mut Partial>,
) -> Result<Option<f64>> {
    let traced = trace.is_some();
    if device == Device::Cpu && !traced {
        return Ok(None);
    }
    let trace = trace.map(|file| file as &mut dyn Write);
    match busy_time(device, trace, || time(trainer, steps, 0, device).map(drop)) {
        Ok(busy) => Ok((device != Device::Cpu).then(|| 1000.0 * busy.as_secs_f64() / steps.len() as f64)),
        Err(error) if traced => Err(error.context("the steps could not be traced")),
        Err(error) => {
            log::warn!("how long the GPU works is unknown: {error:#}");
            Ok(None)
        }
    }
}

fn bound(rehearsal: &Rehearsal, steps: &[&[Vec<usize>]]) -> bound::Bound {
    let shape = |rows: &Vec<usize>| {
        let longest = rows.iter().map(|&row| rehearsal.train.set.n_tokens(row)).max();
        (rows.len() as i64, longest.unwrap_or(0))
    };
    let shapes: Vec<(i64, i64)> = steps.iter().flat_map(|batches| batches.iter()).map(shape).collect();
    let inputs = rehearsal.model.embedding.width();
    let trunk = &rehearsal.experiment.model.trunk;
    let kind = rehearsal.experiment.training.precision.kind();
    bound::Bound::new(&bound::Work { shapes: &shapes, n_steps: steps.len(), inputs, trunk, kind }, rehearsal.device)
}

/// The amount of work in one round of a strategy.
struct Size {
    n_steps: usize,
    n_tokens: i64,
    n_sentences: usize,
}

/// Seconds of each round, by trainer, after a warm-up.
fn measure(trainers: &mut [Trainer], steps: &[&[Vec<usize>]], rounds: usize, device: Device) -> Result<Vec<Vec<f64>>> {
    // On CUDA each turn ends with a synchronisation, so turns are longer.
    let turn = if device == Device::Cpu { 1 } else { 25 };
    // A CUDA graph is recorded when its batch shape occurs the second time: after two passes only replays are timed.
    let (n_times, n_steps) = if device == Device::Cpu { (1, WARM_UP.min(steps.len())) } else { (2, steps.len()) };
    for trainer in trainers.iter_mut() {
        for _ in 0..n_times {
            time(trainer, &steps[..n_steps], 0, device)?;
        }
        trainer.settle()?;
    }
    let mut seconds = vec![vec![0.0; rounds]; trainers.len()];
    for round in 0..rounds {
        for (i, steps) in steps.chunks(turn).enumerate() {
            for (trainer, seconds) in trainers.iter_mut().zip(&mut seconds) {
                seconds[round] += time(trainer, steps, i * turn, device)?;
            }
        }
        for (trainer, seconds) in trainers.iter_mut().zip(&mut seconds) {
            // Deferred updates of embedding rows are part of the round's time.
            let started = Instant::now();
            trainer.settle()?;
            seconds[round] += started.elapsed().as_secs_f64();
        }
    }
    Ok(seconds)
}

/// `own` and `first` are seconds by round, of this and of the first strategy.
fn summarize(strategy: String, own: &[f64], first: &[f64], size: &Size) -> Measured {
    let mut ratios: Vec<f64> = own.iter().zip(first).map(|(own, first)| own / first).collect();
    ratios.sort_by(f64::total_cmp);
    let typical = median(own);
    Measured {
        strategy,
        ms_per_step: 1000.0 * typical / size.n_steps as f64,
        tokens_per_sec: size.n_tokens as f64 / typical,
        sentences_per_sec: size.n_sentences as f64 / typical,
        ratio: [median(&ratios), ratios[0], ratios[ratios.len() - 1]],
    }
}

fn print(findings: &Findings) -> Result<()> {
    let against = format!("time / {}", findings.strategies[0].strategy);
    let mut out = table::table(&["strategy", "ms per step", "tokens/s", "sentences/s", &against, "min", "max"], 1);
    for m in &findings.strategies {
        let mut row = vec![m.strategy.clone(), format!("{:.2}", m.ms_per_step)];
        row.extend([m.tokens_per_sec, m.sentences_per_sec].map(|n| table::count(n as usize)));
        row.extend(m.ratio.map(|ratio| format!("{ratio:.3}")));
        out.add_row(row);
    }
    say(out)?;
    let mut out = table::table(&[&format!("part of a step, {}", findings.strategies[0].strategy), "ms"], 1);
    for (name, ms) in &findings.parts_ms {
        out.add_row([name.to_string(), format!("{ms:.2}")]);
    }
    say(out)?;
    if let Some(lstm) = &findings.lstm {
        say(format!(
            "LSTM layers of one worker, forward and backward: {:.2} ms by oneDNN, {:.2} ms step by step (training.onednn)",
            lstm.onednn_ms, lstm.step_by_step_ms
        ))?;
    }
    if let Some(busy) = findings.gpu_busy_fraction {
        say(format!("the GPU works for {:.0} % of a step", 100.0 * busy))?;
    }
    let bound = &findings.bound;
    say(format!(
        "lower bound: {:.2} ms per step ({:.0} GFLOP/s for matrix products, measured here); measured time is {:.2} times that",
        bound.ms_per_step,
        bound.flops_per_sec / 1e9,
        findings.time_over_bound,
    ))?;
    if let Some(bytes) = findings.peak_memory_bytes {
        say(format!("peak memory: {} MiB", table::count(bytes >> 20)))?;
    }
    Ok(())
}

/// Sentences of dev that a trained model labels per second; tokenization is not timed.
fn labelling(args: &BenchArgs) -> Result<End> {
    let (device, threads) = prepare::machine(&args.machine)?;
    let trained = saved_model::open(&args.experiment, "best", device)?;
    let corpus = prepare::corpus_of(&trained.experiment, Split::Dev)?;
    let data = prepare::encoded(&corpus, Split::Dev, &trained.tokenizer, &trained.tasks, device)?;
    let mut seconds = Vec::new();
    for round in 0..=args.rounds {
        let started = Instant::now();
        predict(&trained.model, &data)?;
        // Round 0 warms up.
        if round > 0 {
            seconds.push(started.elapsed().as_secs_f64());
        }
    }
    let typical = median(&seconds);
    let per_sec = |n: usize| n as f64 / typical;
    let (sentences, tokens) = (per_sec(data.set.len()), per_sec(data.set.token_ids.len()));
    if args.json {
        let content = json!({
            "experiment": trained.experiment.name, "device": prepare::device_name(device), "threads": threads,
            "rounds": args.rounds, "peak_memory_bytes": peak_memory(device), "sentences_per_sec": sentences,
            "tokens_per_sec": tokens,
        });
        say(serde_json::to_string_pretty(&content)?)?;
    } else {
        let (sentences, tokens) = (table::count(sentences as usize), table::count(tokens as usize));
        say(format!(
            "{sentences} sentences/s, {tokens} tokens/s on {}, {threads} threads",
            prepare::device_name(device)
        ))?;
    }
    Ok(End::Done)
}

/// Seconds that `steps` take; they are numbered from `first`, which matters for strategies with `update_every`.
fn time(trainer: &mut Trainer, steps: &[&[Vec<usize>]], first: usize, device: Device) -> Result<f64> {
    let mut pending = Pending::new(device);
    wait(device);
    let started = Instant::now();
    for (i, batches) in steps.iter().enumerate() {
        trainer
            .take(&Step { number: first + i, n_steps: first + steps.len(), batches, diagnose: false }, &mut pending)?;
    }
    wait(device);
    Ok(started.elapsed().as_secs_f64())
}

fn wait(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0
}

/// Peak memory in bytes: of the GPU, or on the CPU that of the process, as Linux reports it.
fn peak_memory(device: Device) -> Option<usize> {
    if device != Device::Cpu {
        return peak_device_memory().ok();
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<usize>().ok().map(|kib| kib << 10)
}
