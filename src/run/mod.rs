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

/// The directory of a run that begins. If nothing is trained in it, however that ends, it goes away as it came: it would only
/// be in the way of the next try.
pub struct NewRun {
    pub directory: RunDirectory,
    /// Or else it was there, and empty.
    made: bool,
}

impl NewRun {
    /// # Errors
    /// A path that holds something already.
    pub fn fail_if_occupied(path: &Path) -> Result<()> {
        let occupied = match std::fs::read_dir(path) {
            Ok(mut entries) => entries.next().is_some(),
            Err(_) => path.exists(),
        };
        if occupied {
            let path = path.display();
            return Err(invalid(format!(
                "{path} is not empty; to go on with the run in it add --resume, else name another folder with --out"
            )));
        }
        Ok(())
    }

    pub fn create(path: &Path) -> Result<Self> {
        let cannot = |error| invalid(format!("{} cannot be made: {error}", path.display()));
        // First what is above it, without which `..` in a path leads nowhere.
        std::fs::create_dir_all(atomic::folder_of(path)).map_err(cannot)?;
        Self::fail_if_occupied(path)?;
        let made = !path.exists();
        std::fs::create_dir_all(path.join("checkpoints")).map_err(cannot)?;
        Ok(NewRun { directory: RunDirectory { path: path.to_owned() }, made })
    }
}

impl Drop for NewRun {
    fn drop(&mut self) {
        let run = &self.directory;
        let recorded = std::fs::metadata(run.file("metrics.jsonl")).is_ok_and(|file| file.len() > 0);
        if recorded || run.checkpoint("last").exists() {
            return;
        }
        if self.made {
            std::fs::remove_dir_all(&run.path).ok();
            return;
        }
        for entry in std::fs::read_dir(&run.path).into_iter().flatten().flatten() {
            let _ = std::fs::remove_file(entry.path()).or_else(|_| std::fs::remove_dir_all(entry.path()));
        }
    }
}

impl RunDirectory {
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
