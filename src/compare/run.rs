//! Finished runs, and which of them are compared with each other.

use super::Settings;
use crate::evaluate::CheckpointScore;

/// One finished run.
#[derive(Clone, Debug)]
pub struct Run {
    /// The strategy, or `only-TASK`.
    pub label: String,
    /// The study that it belongs to, if any; its twins are those of the same study.
    pub study: Option<String>,
    pub settings: Settings,
    /// The study's variant; outside a study, what distinguishes the run from others with its label. May be empty.
    pub variant: String,
    pub seed: u64,
    pub learning_rate: f64,
    /// Share of the training rows.
    pub fraction: f64,
    /// The score that selected its checkpoint; it also selects the learning rate. `None` without dev.
    pub dev: Option<CheckpointScore>,
    pub tasks: Vec<RunTask>,
    /// Fraction of the sentences with all labels right, on test or else on dev.
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
    /// Whether it is a single-task run, the twin of multi-task runs with the same task.
    pub fn is_twin(&self) -> bool {
        self.label.starts_with("only-")
    }

    /// Whether this run is compared with `twin`, one of `all` single-task runs. A run of a study is compared with twins
    /// of the same study; a run outside studies with twins outside studies that have the same settings. If there are no
    /// such twins, but all twins belong to one study, it is compared with those that have the same settings.
    pub(super) fn is_held_to<'a>(&self, twin: &Run, mut all: impl Iterator<Item = &'a Run> + Clone) -> bool {
        if self.is_study_variant() {
            return false;
        }
        match all.clone().any(|other| other.study == self.study) {
            true => twin.study == self.study && (self.study.is_some() || self.agrees_with(twin)),
            false => all.all(|other| other.study == twin.study) && self.agrees_with(twin),
        }
    }

    /// Whether `twin` was trained with the settings that its task has here.
    fn agrees_with(&self, twin: &Run) -> bool {
        twin.tasks.iter().all(|task| self.settings.agree_on(&task.name, &twin.settings))
    }

    /// Whether it is compared with the same study's runs without the variant's changes, instead of with twins.
    pub(super) fn is_study_variant(&self) -> bool {
        self.study.is_some() && !self.variant.is_empty()
    }

    pub(super) fn task(&self, name: &str) -> Option<&RunTask> {
        self.tasks.iter().find(|task| task.name == name)
    }
}
