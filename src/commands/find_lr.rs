//! `polytask find-lr`: learning rate range test (Smith 2017, "Cyclical Learning Rates", arXiv 1506.01186, section 3.3).
//!
//! The loss is an exponential moving average with decay 0.9 and bias correction. The suggestion is the rate at which it
//! falls fastest against the logarithm of the rate, before its minimum.

use std::io::Write;

use anyhow::{Result, bail};
use serde_json::json;

use super::cli::FindLrArgs;
use super::rehearsal::Rehearsal;
use super::{End, output, prepare, say, table};
use crate::compare::html::{self, Chart};
use crate::config::Experiment;
use crate::optim::{RangeConfig, ScheduleConfig};
use crate::problem::invalid;
use crate::train::{Pending, State, Step, TrainingConfig};

/// The test ends when the loss exceeds this multiple of its minimum.
const DIVERGED: f64 = 4.0;

/// A loss whose minimum is above this fraction of its first value may have fallen by chance.
const FELL: f64 = 0.9;

/// A step's learning rate and the sum of the tasks' smoothed losses.
type Point = (f64, f64);

pub fn run(args: &FindLrArgs) -> Result<End> {
    if !(args.from > 0.0 && args.to > args.from && args.to.is_finite()) {
        return Err(invalid("--from must be more than 0 and less than --to"));
    }
    let fewest = (LEAST_PER_DECADE * (args.to / args.from).log10()).ceil();
    if f64::from(args.steps) < fewest {
        return Err(invalid(format!(
            "--steps {}: a loss that is smoothed over steps lags behind rates that rise so fast; give at least {fewest}, or a \
             narrower range with --from and --to",
            args.steps
        )));
    }
    let experiment = Experiment::load(&args.experiment, &args.overrides)?;
    let page = args.html.as_deref().map(|path| output(path, &[&args.experiment])).transpose()?;
    let name = experiment.name.clone();
    let points = measure(args, experiment)?;
    let suggestion = suggestion(&points);
    if let Some(mut page) = page {
        let chart = Chart {
            title: "smoothed loss by log10 of the learning rate".to_owned(),
            lines: vec![(name.clone(), points.iter().map(|(rate, loss)| (rate.log10(), *loss)).collect())],
            logarithmic: false,
        };
        page.write_all(html::page(&format!("{name}: learning rates"), &[], ("Learning rate", &[chart])).as_bytes())?;
        page.keep()?;
    }
    if args.json {
        let points: Vec<_> = points.iter().map(|(rate, loss)| json!({"learning_rate": rate, "loss": loss})).collect();
        say(json!({"suggestion": suggestion, "points": points}))?;
        return Ok(End::Done);
    }
    say(curve(&points))?;
    match suggestion {
        Some(rate) => say(format!(
            "the loss falls fastest at {rate:.1e}: set training.optimizer.learning_rate to about this value"
        ))?,
        None => say("the loss fell by less than a tenth: try a wider range (--from, --to) or more --steps")?,
    }
    if let Some(path) = &args.html {
        log::info!("the curve is in {}", path.display());
    }
    Ok(End::Done)
}

/// Trains with a rate that rises at every step, until the loss diverges or the steps are done.
fn measure(args: &FindLrArgs, experiment: Experiment) -> Result<Vec<Point>> {
    let (device, _) = prepare::machine(&args.machine)?;
    let rehearsal = Rehearsal::new(experiment, device)?;
    let (experiment, tasks) = (&rehearsal.experiment, &rehearsal.tasks);
    let mut config = TrainingConfig {
        schedule: ScheduleConfig::Range(RangeConfig { final_factor: args.to / args.from }),
        ..experiment.training.clone()
    };
    config.optimizer.set_learning_rate(args.from);
    let n_steps = usize::from(args.steps);
    let mut batches = Vec::new();
    for epoch in 0.. {
        batches.extend(rehearsal.sampler().plan(epoch));
        if batches.len() >= n_steps * config.accumulate_steps {
            break;
        }
    }
    let mut trainer = rehearsal.trainer(&config, &experiment.weighting);
    let mut pending = Pending::new(device);
    let (mut points, mut averages, mut best) = (Vec::new(), vec![(0.0, 0); tasks.len()], f64::MAX);
    for (number, batches) in batches.chunks(config.accumulate_steps).take(n_steps).enumerate() {
        let mut state = State::new(tasks.len());
        trainer.take(&Step { number, n_steps, batches, diagnose: false }, &mut pending)?;
        if let Err(diverged) = pending.drain(&mut state, tasks) {
            // At a later step it ends the curve.
            if points.is_empty() {
                let rate = args.from * config.schedule.factor(number, n_steps);
                bail!(
                    "{} is not finite as early as step {}, at a learning rate of {rate:.1e}: try a lower --from",
                    diverged.what,
                    number + 1
                );
            }
            break;
        }
        // Averaged per task, so that alternating tasks do not look like a rising and falling loss.
        for ((average, n), loss) in averages.iter_mut().zip(state.interval.means()) {
            let Some(loss) = loss else { continue };
            *average = 0.9 * *average + 0.1 * loss;
            *n += 1;
        }
        // Sums are comparable only once every task has a loss.
        if averages.iter().any(|(_, n)| *n == 0) {
            continue;
        }
        let smoothed: f64 = averages.iter().map(|(average, n)| average / (1.0 - 0.9f64.powi(*n)).max(0.1)).sum();
        points.push((args.from * config.schedule.factor(number, n_steps), smoothed));
        best = best.min(smoothed);
        if smoothed > DIVERGED * best {
            break;
        }
    }
    if let (true, Some(absent)) = (points.is_empty(), averages.iter().position(|(_, n)| *n == 0)) {
        let name = &tasks[absent].name;
        return Err(invalid(format!("no step has labels of task `{name}`: increase --steps")));
    }
    Ok(points)
}

/// Minimum number of steps per decade of rates: the smoothed loss averages about ten steps.
const LEAST_PER_DECADE: f64 = 20.0;

/// Ratio of the rates at the ends of a stretch over which a slope is fitted: a decade. Over shorter stretches,
/// differences between batches dominate the slope.
const STRETCH: f64 = 10.0;

/// The geometric mean of the rates in the stretch over which the loss falls most steeply (least squares against the
/// logarithm of the rate), before its minimum.
fn suggestion(points: &[Point]) -> Option<f64> {
    let lowest = (0..points.len()).min_by(|&a, &b| points[a].1.total_cmp(&points[b].1))?;
    // The moving average covers too few of the first steps for a slope.
    let first = (points.len() / 20).max(5);
    if points.get(first)?.1 * FELL < points[lowest].1 {
        return None;
    }
    let stretch_from = |start: usize| {
        let end = start + points[start..=lowest].partition_point(|(rate, _)| *rate <= STRETCH * points[start].0);
        // Stretches that the minimum cuts off are skipped, except the first: if it is cut off, so are all.
        (start == first || end <= lowest).then(|| &points[start..end])
    };
    let fitted = (first..lowest).filter_map(stretch_from).filter_map(|stretch| {
        let n = stretch.len() as f64;
        let rates = || stretch.iter().map(|(rate, _)| rate.ln());
        let (x, y) = (rates().sum::<f64>() / n, stretch.iter().map(|(_, loss)| loss).sum::<f64>() / n);
        let covariance: f64 = rates().zip(stretch).map(|(rate, (_, loss))| (rate - x) * (loss - y)).sum();
        let variance: f64 = rates().map(|rate| (rate - x).powi(2)).sum();
        (variance > 0.0).then(|| (x.exp(), covariance / variance))
    });
    let (middle, slope) = fitted.min_by(|a, b| a.1.total_cmp(&b.1))?;
    (slope < 0.0).then_some(middle)
}

/// A table of about twenty points, with bars.
fn curve(points: &[Point]) -> comfy_table::Table {
    let mut out = table::table(&["learning rate", "loss", ""], 0);
    let top = points.iter().map(|(_, loss)| *loss).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    for (rate, loss) in points.iter().step_by((points.len() / 20).max(1)) {
        let bar = "█".repeat((40.0 * loss / top).round() as usize);
        out.add_row([format!("{rate:.1e}"), format!("{loss:.3}"), bar]);
    }
    if let Some(column) = out.column_mut(2) {
        column.set_cell_alignment(comfy_table::CellAlignment::Left);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steepest_fall_is_suggested_and_a_rise_suggests_nothing() {
        // Flat, a fall around 1e-3, flat, then up.
        let rate = |i: usize| 1e-5 * 10f64.powf(i as f64 / 20.0);
        let loss = |i: usize| 2.0 - 1.0 / (1.0 + (-(i as f64 - 40.0) / 3.0).exp()) + ((i as f64 - 90.0) / 5.0).exp();
        let points: Vec<Point> = (0..100).map(|i| (rate(i), loss(i))).collect();
        let found = suggestion(&points).unwrap();
        assert!((0.5e-3..2e-3).contains(&found), "{found}");
        let rising: Vec<Point> = (0..100).map(|i| (rate(i), 1.0 + i as f64)).collect();
        assert_eq!(suggestion(&rising), None);
        let flat: Vec<Point> = (0..100).map(|i| (rate(i), 2.0 + 0.05 * (i as f64 / 5.0).sin())).collect();
        assert_eq!(suggestion(&flat), None);
        assert_eq!(suggestion(&[]), None);
    }
}
