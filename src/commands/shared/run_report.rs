//! `report.json`: what a finished run came to.

use anyhow::{Context, Result};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::evaluate::Report;
use crate::metrics::Score;
use crate::run::RunDirectory;

pub const FILE: &str = "report.json";

#[derive(Serialize, Deserialize)]
pub struct RunReport {
    /// Which checkpoint is scored, and the epoch and step that it is of.
    pub checkpoint: String,
    pub epoch: u64,
    pub step: u64,
    pub parameters: u64,
    pub training_secs: f64,
    /// By name: `dev` and, where there is one, `test`.
    pub splits: IndexMap<String, Report>,
    /// What the splits' rows are known by, for each task ([`crate::data::Corpus::fingerprint`]).
    pub rows: IndexMap<String, Vec<String>>,
}

impl RunReport {
    pub fn write(&self, run: &RunDirectory) -> Result<()> {
        run.write(FILE, &serde_json::to_string_pretty(self)?)
    }

    pub fn read(run: &RunDirectory) -> Result<Self> {
        serde_json::from_str(&run.read(FILE)?).with_context(|| format!("{} is damaged", run.file(FILE).display()))
    }

    /// The main score of task `number` on a split that has labels for it.
    pub fn score(&self, split: &str, number: usize) -> Option<&Score> {
        self.splits.get(split)?.tasks.get(number)?.main_score()
    }

    /// The same on test, or else on dev.
    pub fn best_known(&self, number: usize) -> Option<&Score> {
        self.score("test", number).or_else(|| self.score("dev", number))
    }
}
