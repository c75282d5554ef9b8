//! A comparison as tables, for the terminal and for the HTML page.

use std::collections::BTreeSet;

use super::stats::{Estimate, Needed};
use super::{Comparison, Group, Saving, TaskResult};

/// A table for display; the first `n_names` columns are names.
pub struct Sheet {
    pub title: String,
    pub header: Vec<String>,
    pub n_names: usize,
    pub rows: Vec<Vec<String>>,
}

/// A parameter count in thousands or millions.
fn parameters(n: u64) -> String {
    match n {
        1_000_000.. => format!("{:.1} M", n as f64 / 1e6),
        _ => format!("{:.1} k", n as f64 / 1e3),
    }
}

/// A mean with its standard deviation, in percent.
fn spread(mean: f64, deviation: Option<f64>) -> String {
    percent(mean) + &deviation.map_or(String::new(), |sd| format!(" ± {}", percent(sd)))
}

pub fn percent(value: f64) -> String {
    format!("{:.2}", 100.0 * value)
}

fn interval(estimate: &Estimate) -> String {
    match (estimate.low, estimate.high) {
        (Some(low), Some(high)) => {
            format!("{:+.2} [{:+.2}, {:+.2}]", 100.0 * estimate.mean, 100.0 * low, 100.0 * high)
        }
        _ => format!("{:+.2}", 100.0 * estimate.mean),
    }
}

impl Comparison {
    /// The comparison as tables: scores in percent, and 95 % intervals of paired differences over seeds.
    pub fn sheets(&self) -> Vec<Sheet> {
        let alone = "Difference from the single-task model in points, with the 95 % interval over seeds";
        let base =
            "Difference from the experiment without the variant's changes in points, with the 95 % interval over seeds";
        let (variants, rest) = self.groups.iter().partition(|group| group.is_study_variant());
        let mut sheets =
            vec![self.results(), verdicts(alone, "multi-task", rest), verdicts(base, "the changes", variants)];
        if !self.savings.is_empty() {
            sheets.push(self.curve());
        }
        sheets.retain(|sheet| !sheet.rows.is_empty());
        sheets
    }

    fn results(&self) -> Sheet {
        let groups = || self.groups.iter().chain(&self.twins);
        let mut names: Vec<(String, String)> = Vec::new();
        for TaskResult { name, metric, split, .. } in groups().flat_map(|group| &group.tasks) {
            if !names.iter().any(|(known, _)| known == name) {
                names.push((name.clone(), format!("{name} {metric} ({split})")));
            }
        }
        // The learning rate selected on dev is shown if there were several.
        let rates = groups().any(|group| group.learning_rates.len() > 1);
        let mut header = vec!["data".to_owned(), "strategy".to_owned()];
        header.extend(rates.then(|| "learning rate".to_owned()));
        header.push("seeds".to_owned());
        header.extend(names.iter().map(|(_, title)| title.clone()));
        let joint = self.groups.iter().any(|group| group.sentence_accuracy.is_some());
        header.extend(joint.then(|| "sentence accuracy".to_owned()));
        let twins = !self.twins.is_empty();
        header.extend(twins.then(|| "delta-m (%)".to_owned()));
        header.extend(["seconds".to_owned(), "parameters".to_owned()]);
        let score = |tasks: &[&TaskResult], name: &str| -> String {
            let task = tasks.iter().find(|task| task.name == name);
            task.map_or("-".to_owned(), |task| spread(task.mean, task.deviation))
        };
        let mut rows = Vec::new();
        let mut fractions: Vec<f64> = groups().map(|group| group.fraction).collect();
        fractions.sort_by(f64::total_cmp);
        fractions.dedup();
        let families: BTreeSet<&str> = self.twins.iter().map(Group::family).collect();
        for fraction in fractions {
            for group in self.groups.iter().filter(|group| group.fraction == fraction) {
                let tasks: Vec<&TaskResult> = group.tasks.iter().collect();
                let mut row = vec![percent_of_data(fraction), group.name()];
                row.extend(rates.then(|| format!("{:e}", group.learning_rate)));
                row.push(group.seeds.len().to_string());
                row.extend(names.iter().map(|(name, _)| score(&tasks, name)));
                let whole = group.sentence_accuracy.as_ref().map(|whole| spread(whole.mean, whole.deviation));
                row.extend(joint.then(|| whole.unwrap_or("-".to_owned())));
                row.extend(twins.then(|| group.delta_m.as_ref().map_or("-".to_owned(), interval)));
                row.push(format!("{:.0}", group.training_secs));
                row.push(parameters(group.n_parameters));
                rows.push(row);
            }
            for family in &families {
                let here = |group: &&Group| group.fraction == fraction && group.family() == *family;
                let twins: Vec<&Group> = self.twins.iter().filter(here).collect();
                if twins.is_empty() {
                    continue;
                }
                let tasks: Vec<&TaskResult> = twins.iter().flat_map(|group| &group.tasks).collect();
                let n_seeds = twins.iter().map(|group| group.seeds.len()).min().unwrap_or(0);
                let told = families.len() > 1 && !family.is_empty();
                let of = if told { format!("{family}: ") } else { String::new() };
                let mut row = vec![percent_of_data(fraction), of + "each task alone"];
                let own = twins.iter().map(|group| format!("{:e}", group.learning_rate)).collect::<BTreeSet<_>>();
                row.extend(rates.then(|| own.into_iter().collect::<Vec<_>>().join(", ")));
                row.push(n_seeds.to_string());
                row.extend(names.iter().map(|(name, _)| score(&tasks, name)));
                row.extend(joint.then(String::new));
                row.push(String::new());
                row.push(format!("{:.0}", twins.iter().map(|group| group.training_secs).sum::<f64>()));
                row.push(parameters(twins.iter().map(|group| group.n_parameters).sum()));
                rows.push(row);
            }
        }
        Sheet { title: "Scores in percent, mean ± standard deviation over seeds".to_owned(), header, n_names: 2, rows }
    }

    fn curve(&self) -> Sheet {
        let needs = |saving: &Saving| match saving.alone_needs {
            Needed::Share(share) => percent_of_data(share),
            Needed::AtMost(share) => format!("{} or less", percent_of_data(share)),
            Needed::MoreThan(share) => format!("more than {}", percent_of_data(share)),
        };
        let row = |saving: &Saving| {
            vec![percent_of_data(saving.fraction), saving.label.clone(), saving.task.clone(), needs(saving)]
        };
        Sheet {
            title: "How much data the single-task model needs for the same mean score".to_owned(),
            header: ["data", "strategy", "task", "single-task model needs"].map(str::to_owned).into(),
            n_names: 3,
            rows: self.savings.iter().map(row).collect(),
        }
    }
}

fn verdicts(title: &str, what: &str, groups: Vec<&Group>) -> Sheet {
    let mut rows = Vec::new();
    for group in groups {
        for task in &group.tasks {
            let (Some(difference), Some(verdict)) = (&task.difference, task.verdict) else { continue };
            rows.push(vec![
                percent_of_data(group.fraction),
                group.name(),
                task.name.clone(),
                interval(difference),
                verdict.name().to_owned(),
            ]);
        }
    }
    let header = ["data", "strategy", "task", "difference", what].map(str::to_owned).into();
    Sheet { title: title.to_owned(), header, n_names: 3, rows }
}

fn percent_of_data(fraction: f64) -> String {
    format!("{} %", (1000.0 * fraction).round() / 10.0)
}
