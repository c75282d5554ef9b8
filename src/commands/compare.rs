//! `polytask compare`: runs, or the runs of studies, side by side, and against single-task runs.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::cli::CompareArgs;
use super::run_report::RunReport;
use super::{End, output, say, table};
use crate::compare::html::{self, Chart};
use crate::compare::{Comparison, Group, Run, RunTask, Settings, compare};
use crate::config::{Experiment, is_tag};
use crate::problem::invalid;
use crate::run::{RunDirectory, names};

/// The list of a study's runs, one [`Planned`] each.
pub const PLAN: &str = "plan.json";

#[derive(Serialize, Deserialize)]
pub struct Planned {
    pub name: String,
    pub label: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

/// A run with its directory, which holds its curves.
struct Found {
    run: Run,
    /// For each task, the fingerprint of the rows that it is scored on, if the run recorded it.
    scored_on: Vec<Option<String>>,
    path: PathBuf,
    /// The study's folder, or the experiment's name.
    source: String,
}

pub fn run(args: &CompareArgs) -> Result<End> {
    show(&args.runs, args.html.as_deref(), args.json)?;
    Ok(End::Done)
}

/// Prints the comparison as tables or JSON, and writes an HTML page if `html` is given.
pub fn show(paths: &[PathBuf], html: Option<&Path>, json: bool) -> Result<()> {
    let page = html.map(|path| output(path, &[])).transpose()?;
    let found = find(paths)?;
    let runs: Vec<Run> = found.iter().map(|found| found.run.clone()).collect();
    let comparison = compare(&runs);
    notes(&comparison).iter().for_each(|note| log::warn!("{note}"));
    if json {
        say(serde_json::to_string_pretty(&comparison)?)?;
    }
    for sheet in comparison.sheets().into_iter().filter(|_| !json) {
        let header: Vec<&str> = sheet.header.iter().map(String::as_str).collect();
        let mut table = table::table(&header, sheet.n_names);
        for row in sheet.rows {
            table.add_row(row);
        }
        say(format!("{}\n{table}\n", sheet.title))?;
    }
    if let (Some(mut page), Some(path)) = (page, html) {
        let names: Vec<String> = paths.iter().map(|path| name_of(path)).collect();
        let charts = charts(&found, &comparison)?;
        let curves = ("Curves over training steps, mean over seeds", &charts[..]);
        let text = html::page(&names.join(", "), &comparison.sheets(), curves);
        page.write_all(text.as_bytes())?;
        page.keep()?;
        log::info!("curves: {}", path.display());
    }
    Ok(())
}

/// What a reader has to know besides the tables.
fn notes(comparison: &Comparison) -> Vec<String> {
    let mut notes = Vec::new();
    for group in comparison.groups.iter().chain(&comparison.twins) {
        let (name, rate) = (group.name(), group.learning_rate);
        if let [low, _, .., high] = group.learning_rates[..]
            && (rate == low || rate == high)
        {
            notes.push(format!(
                "{name}: the best learning rate is at the end of those tried, {rate:e}: try further ones"
            ));
        }
    }
    for group in &comparison.groups {
        let name = group.name();
        if !group.zero_twins.is_empty() {
            let zero = group.zero_twins.join(", ");
            notes.push(format!("{name}: there is no delta-m, since single-task models score 0: {zero}"));
        }
        let without = group.tasks.iter().filter(|task| task.difference.is_none()).map(|task| &task.name);
        for task in without {
            let has_twin = comparison.twins.iter().any(|twin| twin.tasks.iter().any(|own| own.name == *task));
            if group.is_study_variant() {
                notes.push(format!("no run without the changes of {name} has `{task}` with its seeds"));
            } else if has_twin {
                notes.push(format!(
                    "no single-task run for `{task}` has the settings, seed and data fraction of {name}, so there is no verdict"
                ));
            }
        }
    }
    notes
}

fn name_of(path: &Path) -> String {
    // Resolves `.` and `..`, which have no name.
    let path = path.canonicalize().unwrap_or(path.to_owned());
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The finished runs in run directories and studies.
fn find(paths: &[PathBuf]) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    // A study is named after its folder, or by its path if two folders have the same name.
    let known_as = |path: &PathBuf| match paths.iter().filter(|other| name_of(other) == name_of(path)).count() {
        1 => name_of(path),
        _ => path.display().to_string(),
    };
    for path in paths {
        let plan = path.join(PLAN);
        if !plan.is_file() {
            let directory = RunDirectory::open(path)?;
            if !directory.file(names::REPORT).is_file() {
                return Err(invalid(format!("{} is not finished: it has no report.json", path.display())));
            }
            found.push(read(&directory, None)?);
            continue;
        }
        let text = std::fs::read_to_string(&plan).with_context(|| format!("{} cannot be read", plan.display()))?;
        let plan: Vec<Planned> =
            serde_json::from_str(&text).with_context(|| format!("{} is damaged", plan.display()))?;
        let mut n_open = 0;
        for entry in &plan {
            let run = path.join("runs").join(&entry.name);
            if run.join(names::REPORT).is_file() {
                let mut of_study = read(&RunDirectory::open(&run)?, Some(&entry.label))?;
                of_study.run.variant = entry.variant.clone();
                of_study.source = known_as(path);
                of_study.run.study = Some(known_as(path));
                found.push(of_study);
            } else {
                n_open += 1;
            }
        }
        if n_open > 0 {
            log::warn!("{}: unfinished runs are left out: {n_open} of {}", path.display(), plan.len());
        }
    }
    let mut seen = BTreeSet::new();
    found.retain(|found| seen.insert(found.path.canonicalize().unwrap_or(found.path.clone())));
    tell_settings(&mut found);
    tell_apart(&mut found);
    warn_of_other_data(&found);
    match found.is_empty() {
        true => Err(invalid("there are no finished runs to compare")),
        false => Ok(found),
    }
}

/// Warns if a task is scored on different rows, since such scores are not comparable.
fn warn_of_other_data(found: &[Found]) {
    let mut first: BTreeMap<&str, (&str, &Path)> = BTreeMap::new();
    let mut told = BTreeSet::new();
    for found in found {
        for (RunTask { name, .. }, rows) in found.run.tasks.iter().zip(&found.scored_on) {
            let Some(rows) = rows else { continue };
            let (before, run) = *first.entry(name).or_insert((rows, &found.path));
            if before != rows && told.insert(name) {
                let (run, other) = (run.display(), found.path.display());
                log::warn!(
                    "`{name}` is scored on different rows in {run} and {other}, so its scores are not comparable"
                );
            }
        }
    }
}

/// Sets the variant of runs outside studies: the settings that differ between runs with the same label, or if these are
/// more than three, the path of the first run with the same settings.
fn tell_settings(found: &mut [Found]) {
    let bare: Vec<usize> = (0..found.len()).filter(|&i| found[i].run.study.is_none()).collect();
    for &i in &bare {
        // The experiment's name distinguishes multi-task runs, but not single-task runs.
        let is_like = |other: &&Found| {
            let Found { run, source, .. } = &found[i];
            other.run.label == run.label && (run.is_twin() || other.source == *source)
        };
        let alike: Vec<&Found> = bare.iter().map(|&other| &found[other]).filter(is_like).collect();
        let own = &found[i].run;
        let told = own.settings.unlike_most(&alike.iter().map(|other| &other.run.settings).collect(), is_tag);
        let first = alike.iter().find(|other| other.run.settings == own.settings);
        found[i].run.variant = match first {
            Some(first) if told.len() > 3 => first.path.display().to_string(),
            _ => told.join(", "),
        };
    }
}

/// Keeps multi-task runs from being grouped as one strategy if they come from several experiments or studies, or have
/// the same seed: their labels are prefixed with the source, or with the run's name. Single-task runs keep their
/// labels, since their study distinguishes them.
fn tell_apart(found: &mut [Found]) {
    let several = found.windows(2).any(|pair| pair[0].source != pair[1].source);
    let key = |run: &Run| {
        (run.label.clone(), run.variant.clone(), run.seed, run.fraction.to_bits(), run.learning_rate.to_bits())
    };
    let keys: Vec<_> = found.iter().map(|found| (found.source.clone(), key(&found.run))).collect();
    for (found, own) in found.iter_mut().zip(&keys).filter(|(found, _)| !found.run.is_twin()) {
        let twice = keys.iter().filter(|key| *key == own).count() > 1;
        let before = if twice { name_of(&found.path) } else { found.source.clone() };
        if several || twice {
            found.run.label = format!("{before}: {}", found.run.label);
        }
    }
}

fn read(directory: &RunDirectory, label: Option<&str>) -> Result<Found> {
    let experiment = Experiment::load(&directory.file(names::RESOLVED), &[])?;
    let finished = RunReport::read(directory)?;
    let split_of = |i: usize| if finished.score("test", i).is_some() { "test" } else { "dev" };
    let scored_on = |i: usize| finished.rows.get(split_of(i))?.get(i).cloned();
    let task = |(i, name): (usize, &String)| {
        // A task without a test score is compared on dev, as is its single-task run; one without either is left out.
        let score = finished.best_known(i)?;
        let task = RunTask {
            name: name.clone(),
            metric: score.name.clone(),
            split: split_of(i).to_owned(),
            value: score.value,
        };
        Some((task, scored_on(i)))
    };
    let (tasks, scored_on): (Vec<RunTask>, Vec<_>) = experiment.tasks.keys().enumerate().filter_map(task).unzip();
    ensure!(!tasks.is_empty(), "{} contains no score", directory.file(names::REPORT).display());
    let strategy = serde_json::to_value(&experiment.weighting)?;
    let strategy = strategy.as_object().and_then(|object| object.keys().next().cloned()).unwrap_or_default();
    let own = match experiment.tasks.keys().collect::<Vec<_>>()[..] {
        [only] => format!("only-{only}"),
        _ => strategy,
    };
    let run = Run {
        label: label.map_or(own, str::to_owned),
        study: None,
        settings: Settings::new(&experiment.to_value()?, experiment.tasks.len() == 1),
        variant: String::new(),
        seed: experiment.seed,
        learning_rate: experiment.training.optimizer.learning_rate(),
        fraction: experiment.data.train_fraction,
        dev: finished.splits.get("dev").and_then(|dev| dev.merit(&experiment.training.early_stopping.metric.0)),
        tasks,
        sentence_accuracy: finished
            .splits
            .get("test")
            .or(finished.splits.get("dev"))
            .and_then(|of| of.sentence_accuracy),
        training_secs: finished.training_secs,
        n_parameters: finished.parameters,
    };
    Ok(Found { run, scored_on, path: directory.path.clone(), source: experiment.name })
}

/// Sums and counts by step.
type Sums = BTreeMap<u64, (f64, u32)>;

/// The curves of losses, scores and weights, mean over seeds, of the chosen runs with the largest data fraction.
fn charts(found: &[Found], comparison: &Comparison) -> Result<Vec<Chart>> {
    let groups = || comparison.groups.iter().chain(&comparison.twins);
    let largest = groups().map(|group| group.fraction).fold(0.0, f64::max);
    let several = comparison.twins.iter().any(|twin| twin.family() != comparison.twins[0].family());
    let named = |twin: &Group| {
        let alone = format!("{} alone", twin.label.trim_start_matches("only-"));
        match twin.family() {
            family if several && !family.is_empty() => format!("{family}: {alone}"),
            _ => alone,
        }
    };
    let strategies = comparison.groups.iter().map(|group| (group, group.name()));
    let all = strategies.chain(comparison.twins.iter().map(|twin| (twin, named(twin))));
    // Title, label and sums of each curve.
    let mut curves: Vec<(String, String, Sums)> = Vec::new();
    for (group, label) in all.filter(|(group, _)| group.fraction == largest) {
        let chosen = found.iter().filter(|found| {
            let run = &found.run;
            (&run.label, &run.study, &run.variant) == (&group.label, &group.study, &group.variant)
                && run.fraction == largest
                && run.learning_rate == group.learning_rate
        });
        for found in chosen {
            let text = RunDirectory { path: found.path.clone() }.read(names::METRICS)?;
            for record in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
                let step = record["step"].as_u64().unwrap_or(0);
                for (title, value) in points(&record, &found.run.tasks) {
                    let at = match curves.iter().position(|(t, l, _)| *t == title && *l == label) {
                        Some(at) => at,
                        None => {
                            curves.push((title, label.clone(), BTreeMap::new()));
                            curves.len() - 1
                        }
                    };
                    let sum = curves[at].2.entry(step).or_default();
                    *sum = (sum.0 + value, sum.1 + 1);
                }
            }
        }
    }
    let mut charts: Vec<Chart> = Vec::new();
    for (title, label, mut sums) in curves {
        // Only steps that all seeds reached.
        let n_runs = sums.values().map(|(_, n)| *n).max().unwrap_or(0);
        sums.retain(|_, (_, n)| *n == n_runs);
        let points = sums.into_iter().map(|(step, (sum, n))| (step as f64, sum / f64::from(n))).collect();
        match charts.iter_mut().find(|chart| chart.title == title) {
            Some(chart) => chart.lines.push((label, points)),
            None => charts.push(Chart { logarithmic: title.ends_with("(nats)"), title, lines: vec![(label, points)] }),
        }
    }
    charts.sort_by(|a, b| a.title.cmp(&b.title));
    Ok(charts)
}

/// The values in one record, each with the title of its chart.
fn points(record: &Value, tasks: &[RunTask]) -> Vec<(String, f64)> {
    let mut points = Vec::new();
    let mut add = |title: String, value: &Value| points.extend(value.as_f64().map(|value| (title, value)));
    for task in tasks {
        let name = &task.name;
        if record["kind"] == "dev" {
            add(format!("{name}: {} on dev", task.metric), &record[name][&task.metric]);
            add(format!("{name}: loss on dev (nats)"), &record[name]["loss"]);
        } else {
            add(format!("{name}: training loss (nats)"), &record["loss"][name]);
            if tasks.len() > 1 {
                add(format!("{name}: weight"), &record["weight"][name]);
                add(format!("{name}: gradient norm at the last layer"), &record["task_gradient_norm"][name]);
            }
        }
    }
    if let Value::Object(cosines) = &record["gradient_cosine"] {
        for (pair, value) in cosines {
            add(format!("{pair}: cosine of gradients"), value);
        }
    }
    points
}
