//! `report.json`: the results of a finished run.

use anyhow::{Context, Result};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::evaluate::Report;
use crate::metrics::Score;
use crate::run::{RunDirectory, names};

#[derive(Serialize, Deserialize)]
pub struct RunReport {
    /// The scored checkpoint, and its epoch and step.
    pub checkpoint: String,
    pub epoch: u64,
    pub step: u64,
    pub parameters: u64,
    pub training_secs: f64,
    /// By split name: `dev` and `test`, each if it has rows.
    pub splits: IndexMap<String, Report>,
    /// Fingerprints of each split's rows, one per task ([`crate::data::Corpus::fingerprint`]).
    pub rows: IndexMap<String, Vec<String>>,
}

impl RunReport {
    pub fn write(&self, run: &RunDirectory) -> Result<()> {
        run.write(names::REPORT, &serde_json::to_string_pretty(self)?)
    }

    pub fn read(run: &RunDirectory) -> Result<Self> {
        serde_json::from_str(&run.read(names::REPORT)?)
            .with_context(|| format!("{} is damaged", run.file(names::REPORT).display()))
    }

    /// The main score of task `number` on `split`, if that has labels for it.
    pub fn score(&self, split: &str, number: usize) -> Option<&Score> {
        self.splits.get(split)?.tasks.get(number)?.main_score()
    }

    /// The main score of task `number` on test, or else on dev.
    pub fn best_known(&self, number: usize) -> Option<&Score> {
        self.score("test", number).or_else(|| self.score("dev", number))
    }
}
