//! What a comparison is made of: finished runs, and which of them are held to each other.

use super::Settings;
use crate::evaluate::CheckpointScore;

/// One finished run.
#[derive(Clone, Debug)]
pub struct Run {
    /// The strategy, or `only-TASK`.
    pub label: String,
    /// The study that it is of, if any: twins are those of the same study.
    pub study: Option<String>,
    pub settings: Settings,
    /// The study's variant, or of no study what tells it from other runs of its label; empty where nothing has to.
    pub variant: String,
    pub seed: u64,
    pub learning_rate: f64,
    /// Share of the training rows.
    pub fraction: f64,
    /// What chose its checkpoint, which chooses among learning rates too. `None` without dev.
    pub dev: Option<CheckpointScore>,
    pub tasks: Vec<RunTask>,
    /// Share of the sentences with every label right, on test or else dev.
    pub sentence_accuracy: Option<f64>,
    pub training_secs: f64,
    pub n_parameters: u64,
}

/// A task's main score in a run.
#[derive(Clone, Debug)]
pub struct RunTask {
    pub name: String,
    pub metric: String,
    /// The split that is compared: test, or dev where test has no label for it.
    pub split: String,
    pub value: f64,
}

impl Run {
    /// A run of one task is the twin of every multi-task run of the same task.
    pub fn is_twin(&self) -> bool {
        self.label.starts_with("only-")
    }

    /// Whether this run is compared with `twin`, one of `all` single-task runs. A run of a study is compared with those of the
    /// same study, one of no study with those of no study that were trained with the same settings. Where there are none of
    /// these and all twins are of one study, with them, if they were.
    pub(super) fn is_held_to<'a>(&self, twin: &Run, mut all: impl Iterator<Item = &'a Run> + Clone) -> bool {
        if self.is_study_variant() {
            return false;
        }
        match all.clone().any(|other| other.study == self.study) {
            true => twin.study == self.study && (self.study.is_some() || self.agrees_with(twin)),
            false => all.all(|other| other.study == twin.study) && self.agrees_with(twin),
        }
    }

    /// Whether `twin` was trained as its task was here.
    fn agrees_with(&self, twin: &Run) -> bool {
        twin.tasks.iter().all(|task| self.settings.agree_on(&task.name, &twin.settings))
    }

    /// Whether it is held to the same study's runs without the variant's changes, in the place of twins.
    pub(super) fn is_study_variant(&self) -> bool {
        self.study.is_some() && !self.variant.is_empty()
    }

    pub(super) fn task(&self, name: &str) -> Option<&RunTask> {
        self.tasks.iter().find(|task| task.name == name)
    }
}
