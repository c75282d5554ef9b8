//! The `study:` of an experiment: the runs that show whether multi-task training helps.

use std::path::Path;

use anyhow::Result;
use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Experiment;
use crate::data::{DataConfig, SamplingConfig};
use crate::model::HeadConfig;
use crate::problem::{InvalidInput, Place, Problem};
use crate::task::TaskKind;
use crate::train::EarlyStopping;
use crate::weighting::WeightingConfig;

/// All combinations of strategies and variants, seeds, learning rates and fractions are run, each with the budget of the
/// experiment.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StudyConfig {
    /// Weighting strategies by a name of your choice; without `strategy:`, the name is the strategy.
    pub strategies: IndexMap<String, WeightingConfig>,
    /// Variants of the experiment by a name of your choice, each with the keys that it changes, such as `{model.trunk.hidden:
    /// 512}`. Each is trained with every strategy and compared with the experiment as it is. Default: none.
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    pub variants: IndexMap<String, IndexMap<String, Value>>,
    /// Seeds for initial weights, data order and dropout and, for `data_fractions` below 1, for the choice of rows
    /// (`train_fraction_seed`). Default [13, 14, 15].
    #[serde(default = "default_seeds")]
    pub seeds: Vec<u64>,
    /// Learning rates to try; for each strategy and each single-task model, the one with the best mean of
    /// `early_stopping.metric` over the seeds is chosen, which needs dev. Default: the experiment's.
    #[serde(default)]
    pub learning_rates: Vec<f64>,
    /// Fractions of the training rows to train on, for a learning curve. Default `[1]`.
    #[serde(default = "default_fractions")]
    pub data_fractions: Vec<f64>,
    /// Also train a single-task model (a twin) for each task, on the sets that have its labels and for as many epochs:
    /// the baseline for multi-task training. Default true.
    #[serde(default = "yes")]
    pub single_task_twins: bool,
}

fn default_seeds() -> Vec<u64> {
    vec![13, 14, 15]
}

fn default_fractions() -> Vec<f64> {
    vec![1.0]
}

fn yes() -> bool {
    true
}

/// What a variant must not change, since the study sets it, and what to use instead.
const FIXED: [(&str, &str); 6] = [
    ("name", ""),
    ("seed", ": use `study.seeds`"),
    ("study", ""),
    ("weighting", ": use `study.strategies`"),
    ("data.train_fraction", ": use `study.data_fractions`"),
    ("data.train_fraction_seed", ""),
];

/// One run of a study.
pub struct PlannedRun {
    pub name: String,
    /// The strategy's name, or `only-TASK` for a twin.
    pub label: String,
    /// The name of the study's variant; empty for the experiment as it is.
    pub variant: String,
    pub experiment: Experiment,
}

impl Experiment {
    /// The variants of the study of an experiment that was read from `path` with `overrides`. The changes of a variant
    /// apply like further overrides.
    ///
    /// # Errors
    /// [`InvalidInput`] with the problems of the first invalid variant, prefixed by its name.
    pub fn variants(&self, path: &Path, overrides: &[String]) -> Result<IndexMap<String, Experiment>> {
        let mut variants = IndexMap::new();
        for (name, changes) in self.study.iter().flat_map(|study| &study.variants) {
            let changes = changes.iter().map(|(key, value)| format!("{key}={value}"));
            let all: Vec<String> = overrides.iter().cloned().chain(changes).collect();
            let variant = Experiment::load(path, &all).map_err(|error| match error.downcast::<InvalidInput>() {
                Ok(InvalidInput(problems)) => {
                    let named = |problem: Problem| Problem {
                        message: format!("study.variants.{name}: {}", problem.message),
                        place: Some(Place::new(path, 0)),
                        ..problem
                    };
                    InvalidInput(problems.into_iter().map(named).collect()).into()
                }
                Err(error) => error,
            })?;
            let (own, other) = (self.to_value()?, variant.to_value()?);
            for (key, instead) in FIXED {
                let pointer = format!("/{}", key.replace('.', "/"));
                if own.pointer(&pointer) != other.pointer(&pointer) {
                    let message = format!("study.variants.{name}: must not change `{key}`{instead}");
                    return Err(InvalidInput(vec![Problem::error(Place::new(path, 0), message)]).into());
                }
            }
            variants.insert(name.clone(), variant);
        }
        Ok(variants)
    }

    /// The runs of the study, seed by seed, so that the first results already allow a comparison. `variants` come from
    /// [`Self::variants`].
    pub fn planned_runs(&self, study: &StudyConfig, variants: &IndexMap<String, Experiment>) -> Vec<PlannedRun> {
        let weighted = |of: &Experiment, variant: &str| -> Vec<(String, String, Experiment)> {
            let strategies = study.strategies.iter();
            let each = strategies.map(|(name, weighting)| {
                (name.clone(), variant.to_owned(), Experiment { weighting: weighting.clone(), ..of.clone() })
            });
            each.collect()
        };
        let mut models = weighted(self, "");
        if study.single_task_twins && self.tasks.len() > 1 {
            models.extend(self.tasks.keys().map(|task| (format!("only-{task}"), String::new(), self.twin(task))));
        }
        for (name, variant) in variants {
            let mut variant = variant.clone();
            if !variant.tasks.keys().eq(self.tasks.keys()) {
                self.keep_strata(&mut variant.data);
            }
            models.extend(weighted(&variant, name));
        }
        let own_rate = self.training.optimizer.learning_rate();
        let rates = if study.learning_rates.is_empty() { vec![own_rate] } else { study.learning_rates.clone() };
        let mut runs = Vec::new();
        for &seed in &study.seeds {
            for &fraction in &study.data_fractions {
                for &rate in &rates {
                    // Default values are not named, so that existing runs keep their names when others are added.
                    let fraction_name = if fraction == 1.0 { String::new() } else { format!("f{fraction}-") };
                    let rate_name = if rate == own_rate { String::new() } else { format!("lr{rate}-") };
                    let suffix = format!("{fraction_name}{rate_name}s{seed}");
                    for (label, variant, mut experiment) in models.clone() {
                        let dot = if variant.is_empty() { "" } else { "." };
                        let name = format!("{label}{dot}{variant}-{suffix}");
                        experiment.name = format!("{}-{name}", self.name);
                        experiment.seed = seed;
                        experiment.study = None;
                        experiment.data.train_fraction *= fraction;
                        if fraction < 1.0 {
                            experiment.data.train_fraction_seed = seed;
                        }
                        if !study.learning_rates.is_empty() {
                            experiment.training.optimizer.set_learning_rate(rate);
                        }
                        runs.push(PlannedRun { name, label, variant, experiment });
                    }
                }
            }
        }
        runs
    }

    /// The single-task experiment for `task`, on the sets that have its labels.
    fn twin(&self, task: &str) -> Experiment {
        let mut alone = Experiment { weighting: WeightingConfig::default(), ..self.clone() };
        alone.tasks.retain(|name, _| name == task);
        let others: Vec<String> =
            self.tasks.keys().filter(|name| *name != task).map(|name| format!("heads.{name}")).collect();
        let is_of = |part: &str, other: &String| part == other || part.starts_with(&format!("{other}."));
        alone.training.freeze_epochs.retain(|part, _| !others.iter().any(|other| is_of(part, other)));
        alone.tasks.values_mut().for_each(HeadConfig::stand_alone);
        let sets = self.tasks[task].sets();
        alone.data.sets.retain(|name, _| sets.contains(name));
        if matches!(self.training.sampling, SamplingConfig::RoundRobin(_)) {
            // A step keeps its number of batches from these sets.
            let batches = self.training.accumulate_steps * alone.data.sets.len() / self.data.sets.len();
            alone.training.accumulate_steps = batches.max(1);
        }
        self.keep_strata(&mut alone.data);
        alone.training.early_stopping.metric = EarlyStopping::default().metric;
        alone
    }

    /// Stratifies `data` of a run with other tasks like that of the whole experiment, for the same training and dev rows.
    fn keep_strata(&self, data: &mut DataConfig) {
        for (name, set) in &mut data.sets {
            if set.stratify.is_some() || set.stratify_tags.is_some() {
                continue;
            }
            let heads = self.tasks.values().filter(|head| head.sets().contains(name));
            match heads.min_by_key(|head| head.kind() != TaskKind::Classification) {
                Some(HeadConfig::Classification(first)) => set.stratify = Some(first.column.clone()),
                Some(HeadConfig::Tagging(first)) => set.stratify_tags = Some(first.column.clone()),
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn runs(more: &str) -> Vec<PlannedRun> {
        let yaml = format!(
            "name: t
data:
  sets:
    a: {{format: jsonl, train: a, dev: a}}
    b: {{format: jsonl, train: b, dev: b}}
tasks:
  x: {{type: classification, set: a, column: x}}
  y: {{type: tagging, set: b, column: y}}
{more}"
        );
        let experiment = Experiment::of_text((Path::new("t.yaml"), &yaml), &[]).unwrap();
        experiment.planned_runs(experiment.study.as_ref().unwrap(), &IndexMap::new())
    }

    #[test]
    fn a_study_that_grows_keeps_the_names_of_its_runs() {
        let names = |more: &str| -> Vec<String> {
            let study = format!("study: {{strategies: {{equal: {{}}}}, seeds: [1], single_task_twins: false, {more}}}");
            runs(&study).into_iter().map(|run| run.name).collect()
        };
        assert_eq!(names(""), ["equal-s1"]);
        assert_eq!(names("data_fractions: [0.5, 1]"), ["equal-f0.5-s1", "equal-s1"]);
        // 2e-3 is the rate of the experiment.
        assert_eq!(names("learning_rates: [2e-3, 0.01]"), ["equal-s1", "equal-lr0.01-s1"]);
    }

    #[test]
    fn a_step_of_a_task_alone_has_the_batches_that_it_has_beside_others() {
        let study = "study: {strategies: {equal: {}}, seeds: [1]}";
        let batches = |training: &str| -> Vec<usize> {
            let runs = runs(&format!("training: {{{training}}}\n{study}"));
            runs.into_iter().map(|run| run.experiment.training.accumulate_steps).collect()
        };
        assert_eq!(batches("accumulate_steps: 2, sampling: round_robin"), [2, 1, 1]);
        assert_eq!(batches("accumulate_steps: 4, sampling: round_robin"), [4, 2, 2]);
        assert_eq!(batches("sampling: round_robin"), [1, 1, 1]);
        assert_eq!(batches("accumulate_steps: 2"), [2, 2, 2]);
    }
}
