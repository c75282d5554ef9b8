//! The run directory: what a run leaves behind, and reading it back.
//!
//! `experiment.yaml` as written, `resolved.yaml` with every default, `environment.json`, `tokenizer.json`, `labels.json`,
//! `vectors.safetensors` (pretrained vectors, where there are some),
//! `metrics.jsonl`, TensorBoard event files, `checkpoints/{last,best,best-TASK}.safetensors`, `report.json`.

pub mod atomic;
pub mod checkpoint;
mod records;
mod tensorboard;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub use records::Records;

use crate::problem::invalid;
use crate::task::Task;

/// A run directory.
#[derive(Clone, Debug)]
pub struct RunDirectory {
    pub path: PathBuf,
}

impl RunDirectory {
    /// Makes a new directory. It must not exist yet, or be empty.
    pub fn create(path: &Path) -> Result<Self> {
        let occupied = std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some());
        if occupied {
            let path = path.display();
            return Err(invalid(format!(
                "{path} is not empty; to go on with the run in it add --resume, else name another folder with --out"
            )));
        }
        std::fs::create_dir_all(path.join("checkpoints"))
            .map_err(|error| invalid(format!("{} cannot be made: {error}", path.display())))?;
        Ok(RunDirectory { path: path.to_owned() })
    }

    /// Opens the directory of an earlier run.
    pub fn open(path: &Path) -> Result<Self> {
        for file in ["resolved.yaml", "labels.json", "tokenizer.json"] {
            if !path.join(file).is_file() {
                return Err(invalid(format!("{} is no run directory: it has no {file}", path.display())));
            }
        }
        Ok(RunDirectory { path: path.to_owned() })
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub fn checkpoint(&self, name: &str) -> PathBuf {
        self.path.join("checkpoints").join(format!("{name}.safetensors"))
    }

    pub fn write(&self, name: &str, content: &str) -> Result<()> {
        atomic::write(&self.file(name), content.as_bytes())
    }

    pub fn read(&self, name: &str) -> Result<String> {
        let path = self.file(name);
        std::fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))
    }

    pub fn write_tasks(&self, tasks: &[Task]) -> Result<()> {
        self.write("labels.json", &serde_json::to_string_pretty(tasks)?)
    }

    pub fn read_tasks(&self) -> Result<Vec<Task>> {
        serde_json::from_str(&self.read("labels.json")?)
            .with_context(|| format!("{} is damaged", self.file("labels.json").display()))
    }
}
