//! Whether multi-task training helped: runs grouped by strategy, compared with the same tasks trained alone.

pub mod html;
mod run;
mod settings;
mod sheets;
pub mod stats;

use indexmap::IndexMap;
use serde::Serialize;

pub use run::{Run, RunTask};
pub use settings::Settings;
pub use sheets::{Sheet, percent};

use stats::{Estimate, Needed, delta_m, deviation, estimate, mean, share_that_reaches};

/// The effect of multi-task training on a task, by the confidence interval of the paired differences over seeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Helped,
    Hurt,
    WithinNoise,
    /// No interval: there is only one seed.
    OneSeed,
    /// No interval: the difference is the same with every seed.
    NoSpread,
}

impl Verdict {
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Helped => "helped",
            Verdict::Hurt => "hurt",
            Verdict::WithinNoise => "within noise",
            Verdict::OneSeed => "unknown: one seed",
            Verdict::NoSpread => "unknown: the same with every seed",
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct TaskResult {
    pub name: String,
    pub metric: String,
    /// The split that was scored.
    pub split: String,
    /// One per seed, in the order of the group's seeds.
    pub scores: Vec<f64>,
    pub mean: f64,
    pub deviation: Option<f64>,
    /// Difference from the twin of the same seed, if any; for a study's variant, from the run without its changes.
    pub difference: Option<Estimate>,
    pub verdict: Option<Verdict>,
}

/// Sentence accuracy over the seeds of a group.
#[derive(Clone, Debug, Serialize)]
pub struct SentenceAccuracy {
    pub mean: f64,
    pub deviation: Option<f64>,
}

/// One strategy, or one task trained alone, at one share of the data.
#[derive(Clone, Debug, Serialize)]
pub struct Group {
    pub label: String,
    pub study: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub variant: String,
    pub fraction: f64,
    /// The one selected on dev, and all candidates.
    pub learning_rate: f64,
    pub learning_rates: Vec<f64>,
    pub seeds: Vec<u64>,
    pub tasks: Vec<TaskResult>,
    pub delta_m: Option<Estimate>,
    /// Tasks whose twin has a score of 0, which makes delta-m undefined.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub zero_twins: Vec<String>,
    pub sentence_accuracy: Option<SentenceAccuracy>,
    /// Mean over the runs.
    pub training_secs: f64,
    pub n_parameters: u64,
}

impl Group {
    /// The strategy, with what distinguishes it from others of its name.
    pub fn name(&self) -> String {
        if self.variant.is_empty() { self.label.clone() } else { format!("{} ({})", self.label, self.variant) }
    }

    /// Whether it is a study's variant, with changes to the experiment.
    pub fn is_study_variant(&self) -> bool {
        self.study.is_some() && !self.variant.is_empty()
    }

    /// Identifies single-task groups that belong together: their study, or else their variant.
    pub fn family(&self) -> &str {
        self.study.as_deref().unwrap_or(&self.variant)
    }
}

/// How much of the data a single-task model needs to match a strategy at `fraction`.
#[derive(Clone, Debug, Serialize)]
pub struct Saving {
    pub label: String,
    pub task: String,
    pub fraction: f64,
    pub alone_needs: Needed,
}

#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Strategies, by ascending share of the data.
    pub groups: Vec<Group>,
    /// Tasks trained alone, in the same order.
    pub twins: Vec<Group>,
    pub savings: Vec<Saving>,
}

/// Groups runs by study, label, variant and share of the data; of several learning rates the best on dev is kept.
pub fn compare(runs: &[Run]) -> Comparison {
    let key = |run: &Run| (run.fraction.to_bits(), run.study.clone(), run.label.clone(), run.variant.clone());
    let mut groups: IndexMap<_, Vec<&Run>> = IndexMap::new();
    runs.iter().for_each(|run| groups.entry(key(run)).or_default().push(run));
    let mut groups: Vec<Vec<&Run>> = groups.into_values().collect();
    groups.sort_by(|a, b| a[0].fraction.total_cmp(&b[0].fraction));
    let chosen: Vec<Chosen> = groups.into_iter().map(choose).collect();
    let (alone, multi): (Vec<&Chosen>, Vec<&Chosen>) = chosen.iter().partition(|group| group.runs[0].is_twin());
    let twin = |run: &Run, task: &str| -> Option<RunTask> {
        let alone = || alone.iter().flat_map(|twins| &twins.runs).filter(|twin| twin.task(task).is_some());
        let held_to = alone().filter(|twin| run.is_held_to(twin, alone().copied()));
        held_to.copied().find(|twin| twin.seed == run.seed && twin.fraction == run.fraction)?.task(task).cloned()
    };
    let unchanged = |run: &Run, task: &str| -> Option<RunTask> {
        let is_base = |base: &&&Run| {
            (&base.study, &base.label, base.variant.as_str()) == (&run.study, &run.label, "")
                && (base.seed, base.fraction) == (run.seed, run.fraction)
        };
        multi.iter().flat_map(|group| &group.runs).find(is_base)?.task(task).cloned()
    };
    let held = |group: &&Chosen| match group.runs[0].is_study_variant() {
        true => Group { delta_m: None, zero_twins: Vec::new(), ..summarize(group, &unchanged) },
        false => summarize(group, &twin),
    };
    let groups: Vec<Group> = multi.iter().map(held).collect();
    let twins: Vec<Group> = alone.iter().map(|group| summarize(group, &|_, _| None)).collect();
    let savings = savings(&multi, &groups, &alone);
    Comparison { groups, twins, savings }
}

/// The runs of a group at the selected learning rate, by seed, and the rates tried, in ascending order.
struct Chosen<'a> {
    runs: Vec<&'a Run>,
    rates: Vec<f64>,
}

/// The runs at the learning rate with the best mean of the dev scores that selected their checkpoints, over the seeds
/// that all rates share (or all seeds, if they share none). Ties, and runs without dev, go to the lowest rate.
fn choose(runs: Vec<&Run>) -> Chosen<'_> {
    let mut rates: Vec<f64> = runs.iter().map(|run| run.learning_rate).collect();
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    let at = |rate: f64, seed: u64| runs.iter().find(|run| run.learning_rate == rate && run.seed == seed);
    let of_all = |run: &&&Run| rates.iter().all(|&rate| at(rate, run.seed).is_some());
    let some = runs.iter().any(|run| of_all(&run));
    let dev = |rate: f64| {
        let own = runs.iter().filter(|run| run.learning_rate == rate && (!some || of_all(run)));
        let scores: Vec<f64> = own.filter_map(|run| Some(run.dev?.score)).collect();
        if scores.is_empty() { f64::NEG_INFINITY } else { mean(&scores) }
    };
    let best = rates.iter().copied().rev().max_by(|a, b| dev(*a).total_cmp(&dev(*b)));
    let mut runs: Vec<&Run> = runs.into_iter().filter(|run| Some(run.learning_rate) == best).collect();
    runs.sort_by_key(|run| run.seed);
    Chosen { runs, rates }
}

/// `twin` finds the result that a run's task is compared with.
fn summarize(chosen: &Chosen, twin: &dyn Fn(&Run, &str) -> Option<RunTask>) -> Group {
    let (group, first) = (&chosen.runs, chosen.runs[0]);
    let result = |task: &RunTask| {
        let values: Vec<f64> = group.iter().filter_map(|run| Some(run.task(&task.name)?.value)).collect();
        let paired = group.iter().filter_map(|run| Some(run.task(&task.name)?.value - twin(run, &task.name)?.value));
        let paired: Vec<f64> = paired.collect();
        let difference = (!paired.is_empty()).then(|| estimate(&paired));
        TaskResult {
            name: task.name.clone(),
            metric: task.metric.clone(),
            split: task.split.clone(),
            mean: mean(&values),
            deviation: deviation(&values),
            scores: values,
            verdict: difference.as_ref().map(verdict),
            difference,
        }
    };
    // For every seed or for none: a twin may be missing, or have a score of 0, by which delta-m cannot divide.
    let changes: Option<Vec<f64>> = group
        .iter()
        .map(|run| {
            let pair = |task: &RunTask| {
                let single = twin(run, &task.name)?.value;
                (single != 0.0).then_some((task.value, single))
            };
            run.tasks.iter().map(pair).collect::<Option<Vec<_>>>().map(|pairs| delta_m(&pairs))
        })
        .collect();
    let is_zero = |name: &str| group.iter().any(|run| twin(run, name).is_some_and(|single| single.value == 0.0));
    let names = first.tasks.iter().map(|task| task.name.clone());
    let whole: Vec<f64> = group.iter().filter_map(|run| run.sentence_accuracy).collect();
    Group {
        label: first.label.clone(),
        study: first.study.clone(),
        variant: first.variant.clone(),
        fraction: first.fraction,
        learning_rate: first.learning_rate,
        learning_rates: chosen.rates.clone(),
        seeds: group.iter().map(|run| run.seed).collect(),
        tasks: first.tasks.iter().map(result).collect(),
        delta_m: changes.map(|changes| estimate(&changes)),
        zero_twins: names.filter(|name| is_zero(name)).collect(),
        sentence_accuracy: (whole.len() == group.len())
            .then(|| SentenceAccuracy { mean: mean(&whole), deviation: deviation(&whole) }),
        training_secs: mean(&group.iter().map(|run| run.training_secs).collect::<Vec<_>>()),
        n_parameters: first.n_parameters,
    }
}

fn verdict(difference: &Estimate) -> Verdict {
    match (difference.low, difference.high) {
        (Some(low), _) if low > 0.0 => Verdict::Helped,
        (_, Some(high)) if high < 0.0 => Verdict::Hurt,
        (Some(_), Some(_)) => Verdict::WithinNoise,
        _ if difference.n < 2 => Verdict::OneSeed,
        _ => Verdict::NoSpread,
    }
}

/// Read off the learning curves of single-task models, if there are several shares of the data. `groups` are those of
/// `multi`.
fn savings(multi: &[&Chosen], groups: &[Group], alone: &[&Chosen]) -> Vec<Saving> {
    let mut savings = Vec::new();
    for (run, group) in multi.iter().map(|chosen| chosen.runs[0]).zip(groups) {
        for task in &group.tasks {
            let of_task = || alone.iter().filter(|twin| twin.runs[0].task(&task.name).is_some());
            let own = of_task().filter(|twin| run.is_held_to(twin.runs[0], of_task().map(|twin| twin.runs[0])));
            let point = |twin: &&Chosen| {
                let values: Vec<f64> = twin.runs.iter().filter_map(|run| Some(run.task(&task.name)?.value)).collect();
                (twin.runs[0].fraction, mean(&values))
            };
            let curve: Vec<(f64, f64)> = own.map(point).collect();
            savings.extend(share_that_reaches(&curve, task.mean).map(|alone_needs| Saving {
                label: group.name(),
                task: task.name.clone(),
                fraction: group.fraction,
                alone_needs,
            }));
        }
    }
    savings
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::evaluate::CheckpointScore;

    fn run(label: &str, seed: u64, learning_rate: f64, scores: &[(&str, f64)]) -> Run {
        let task = |&(name, value): &(&str, f64)| RunTask {
            name: name.into(),
            metric: "f1".into(),
            split: "test".into(),
            value,
        };
        let tasks: Vec<RunTask> = scores.iter().map(task).collect();
        let all: Vec<f64> = tasks.iter().map(|task| task.value).collect();
        Run {
            dev: Some(CheckpointScore::of(mean(&all))),
            sentence_accuracy: None,
            label: label.into(),
            study: None,
            settings: Settings::default(),
            variant: String::new(),
            seed,
            learning_rate,
            fraction: 1.0,
            tasks,
            training_secs: 10.0,
            n_parameters: 5,
        }
    }

    #[test]
    fn strategies_are_paired_with_twins_of_the_same_seed() {
        let mut runs = Vec::new();
        for seed in 0..3 {
            let base = 0.5 + 0.1 * seed as f64;
            runs.push(run("equal", seed, 0.1, &[("a", base + 0.02), ("b", 0.4 + base / 100.0)]));
            runs.push(run("only-a", seed, 0.1, &[("a", base + 0.001 * seed as f64)]));
            runs.push(run("only-b", seed, 0.1, &[("b", 0.4)]));
        }
        // A worse learning rate, which dev does not choose.
        runs.push(run("equal", 0, 0.9, &[("a", 0.1), ("b", 0.1)]));
        let comparison = compare(&runs);
        let group = &comparison.groups[0];
        assert_eq!((group.seeds.len(), group.learning_rate, comparison.twins.len()), (3, 0.1, 2));
        let task = &group.tasks[0];
        assert!((task.difference.as_ref().unwrap().mean - 0.019).abs() < 1e-12);
        assert_eq!(task.verdict, Some(Verdict::Helped), "the spread of the scores is large, that of the pairs is not");
        assert!(group.delta_m.as_ref().unwrap().mean > 0.0);
        let text: Vec<String> = comparison.sheets().iter().flat_map(|sheet| sheet.rows.concat()).collect();
        assert!(text.contains(&"each task alone".to_owned()) && text.contains(&"helped".to_owned()), "{text:?}");
    }

    #[test]
    fn twins_are_those_of_the_same_study() {
        let of = |study: &str, run: Run| Run { study: Some(study.into()), ..run };
        let runs = [
            of("one", run("one: equal", 1, 0.1, &[("a", 0.5)])),
            of("one", run("only-a", 1, 0.1, &[("a", 0.4)])),
            of("two", run("two: equal", 1, 0.1, &[("a", 0.9)])),
            of("two", run("only-a", 1, 0.1, &[("a", 0.7)])),
            of("three", run("three: equal", 1, 0.1, &[("a", 0.5)])),
        ];
        let differences = |comparison: &Comparison| -> Vec<Option<f64>> {
            let of = |group: &Group| Some((group.tasks[0].difference.as_ref()?.mean * 1000.0).round() / 1000.0);
            comparison.groups.iter().map(of).collect()
        };
        let comparison = compare(&runs);
        // A study without twins is compared with the existing twins, if all are of one study.
        assert_eq!(differences(&comparison), [Some(0.1), Some(0.2), None]);
        let less = [runs[0].clone(), runs[1].clone(), runs[4].clone()];
        assert_eq!(differences(&compare(&less)), [Some(0.1), Some(0.1)]);
        let text: Vec<String> = comparison.sheets().iter().flat_map(|sheet| sheet.rows.concat()).collect();
        assert!(text.contains(&"one: each task alone".to_owned()), "{text:?}");
        assert!(text.contains(&"two: each task alone".to_owned()), "{text:?}");
    }

    #[test]
    fn a_loose_run_is_held_to_what_was_trained_as_it_was() {
        let with = |label: &str, score: f64, decoder: &str| {
            let settings = Settings::new(&json!({"tasks": {"a": {"decoder": decoder}}}), false);
            Run { settings, variant: decoder.into(), ..run(label, 1, 0.1, &[("a", score)]) }
        };
        for (decoder, held) in [("crf", true), ("softmax", false)] {
            let runs = [with("equal", 0.5, "crf"), with("only-a", 0.1, "other"), with("only-a", 0.4, decoder)];
            let comparison = compare(&runs);
            let difference = comparison.groups[0].tasks[0].difference.as_ref().map(|found| found.mean);
            assert_eq!(difference.is_some(), held, "{decoder}");
            assert!(difference.is_none_or(|difference| (difference - 0.1).abs() < 1e-12));
            assert!(comparison.savings.is_empty(), "of one share of the data there is no curve");
        }
    }

    #[test]
    fn verdicts_follow_the_interval() {
        let of = |low, high| Estimate { n: 3, mean: (low + high) / 2.0, low: Some(low), high: Some(high) };
        assert_eq!(verdict(&of(0.1, 0.2)), Verdict::Helped);
        assert_eq!(verdict(&of(-0.2, -0.1)), Verdict::Hurt);
        assert_eq!(verdict(&of(-0.1, 0.2)), Verdict::WithinNoise);
        let alike = |n: usize| Estimate { n, mean: 1.0, low: None, high: None };
        assert_eq!((verdict(&alike(1)), verdict(&alike(3))), (Verdict::OneSeed, Verdict::NoSpread));
    }
}
