//! The experiment: read from a YAML file, checked, and with every default filled in.

mod check;
mod decode;
mod keys;
pub mod schema;
mod source;
mod study;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::data::{DataConfig, TaskColumn, TokenizerConfig};
use crate::model::{HeadConfig, ModelConfig};
use crate::problem::{InvalidInput, Problem};
use crate::train::TrainingConfig;
use crate::weighting::WeightingConfig;
pub use keys::{is_tag, join};
pub use study::{PlannedRun, StudyConfig};

/// One experiment.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    /// Name of the experiment and of its run directory: letters, digits, `-`, `_` and `.`, beginning with a letter or
    /// digit.
    pub name: String,
    /// Seed of all random choices, except those with a seed of their own (`dev_seed`, `train_fraction_seed`). Default
    /// 13.
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// A run directory whose best checkpoint provides the initial weights: embeddings of tokens that both models know,
    /// the trunk, and heads with the same task and labels. Relative to the working directory. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_from: Option<PathBuf>,
    /// The files with the sentences and their labels.
    pub data: DataConfig,
    /// The tasks by name, in the order in which they are listed everywhere. Names match `[a-z][a-z0-9_]*`.
    pub tasks: IndexMap<String, HeadConfig>,
    /// How words are turned into the tokens that are embedded. Default: every word is a token.
    #[serde(default)]
    pub tokenizer: TokenizerConfig,
    /// Embedding and trunk.
    #[serde(default)]
    pub model: ModelConfig,
    /// How the losses of the tasks are weighted. Default `equal`.
    #[serde(default)]
    pub weighting: WeightingConfig,
    /// Batches, optimizer, and when training stops.
    #[serde(default)]
    pub training: TrainingConfig,
    /// What `polytask study` runs; ignored by `polytask train`. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub study: Option<StudyConfig>,
}

fn default_seed() -> u64 {
    13
}

impl Experiment {
    /// Reads an experiment file, fills in defaults and checks it; `overrides` are `path.to.key=value`.
    ///
    /// # Errors
    /// [`InvalidInput`] with all problems, each with file and line.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Experiment> {
        Experiment::of_text((path, &source::text_of(path)?), overrides)
    }

    /// Like [`Self::load`], with `text` as the content of `path`.
    pub fn of_text((path, text): (&Path, &str), overrides: &[String]) -> Result<Experiment> {
        // None for `weighting`: its options are an error without `strategy:`.
        let defaults = json!({
            "tokenizer": TokenizerConfig::default(),
            "model": ModelConfig::default(),
            "training": TrainingConfig::default(),
        });
        let tree = source::load((path, text), overrides, &defaults)?;
        let mut problems: Vec<Problem> = tree.problems.clone();
        let decoded = decode::decode::<Experiment>(&tree, &defaults, &mut problems);
        let Some(mut experiment) = decoded else { return Err(InvalidInput(problems).into()) };
        problems.extend(check::check(&experiment, &tree)?);
        if !problems.is_empty() {
            return Err(InvalidInput(problems).into());
        }
        let absolute = |path: &PathBuf| std::path::absolute(path).context("the working directory cannot be accessed");
        experiment.tasks.values_mut().for_each(HeadConfig::resolve);
        experiment.data.root = absolute(&experiment.data.root)?;
        experiment.init_from = experiment.init_from.as_ref().map(absolute).transpose()?;
        Ok(experiment)
    }

    /// The experiment file with every default filled in; training from it repeats the run.
    pub fn to_yaml(&self) -> Result<String> {
        Ok(serde_yaml::to_string(&self.to_value()?)?)
    }

    /// The content of [`Self::to_yaml`] as a tree.
    pub fn to_value(&self) -> Result<Value> {
        Ok(decode::to_written(serde_json::to_value(self)?))
    }

    /// Copies from `other` the settings that may change when a run is resumed.
    pub fn take_changeable(&mut self, other: &Experiment) {
        // A fingerprint in the checkpoints ensures that the training and dev data stay the same.
        self.data = other.data.clone();
        self.study = other.study.clone();
        self.training.take_changeable(&other.training);
    }

    pub fn task_columns(&self) -> Vec<TaskColumn> {
        let column = |(name, head): (&String, &HeadConfig)| TaskColumn {
            name: name.clone(),
            kind: head.kind(),
            sets: head.sets().to_vec(),
            column: head.column().to_owned(),
        };
        self.tasks.iter().map(column).collect()
    }
}
