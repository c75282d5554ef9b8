//! The run directory: the files that a run writes, and reading them back.
//!
//! Besides those of [`names`], they are TensorBoard event files and `checkpoints/{last,best,best-TASK}.safetensors`.

pub mod atomic;
pub mod checkpoint;
mod records;
mod tensorboard;

use std::cmp::Reverse;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

pub use records::Records;

use crate::problem::invalid;
use crate::task::Task;

/// The names of a run's files.
pub mod names {
    /// The experiment file as the user wrote it.
    pub const AS_WRITTEN: &str = "experiment.yaml";
    /// The experiment with every default; once it exists, the run has started.
    pub const RESOLVED: &str = "resolved.yaml";
    pub const ENVIRONMENT: &str = "environment.json";
    pub const TOKENIZER: &str = "tokenizer.json";
    pub const LABELS: &str = "labels.json";
    pub const VECTORS: &str = "vectors.safetensors";
    pub const METRICS: &str = "metrics.jsonl";
    pub const TIMING: &str = "timing.json";
    pub const REPORT: &str = "report.json";
}

/// A run directory.
#[derive(Clone, Debug)]
pub struct RunDirectory {
    pub path: PathBuf,
}

/// The directory of a new run. Unless training has recorded or saved something, it is removed on drop, or emptied if it
/// existed before, so that it does not block the next attempt.
pub struct NewRun {
    pub directory: RunDirectory,
    /// Whether the directory was created; otherwise it existed.
    made: bool,
    /// Held from before anything is written, so that only this run's own files are removed.
    _lock: Option<Flock<File>>,
}

/// Exists from before anything else is written until `resolved.yaml` is, which marks the run as started.
const STARTING: &str = ".partial-run";

/// Whether a folder is empty, or contains only the files of a run that was killed before it started.
fn is_free(path: &Path) -> std::io::Result<bool> {
    let killed = path.join(STARTING).exists() && !path.join(names::RESOLVED).exists();
    Ok(killed || std::fs::read_dir(path)?.next().is_none())
}

impl NewRun {
    /// # Errors
    /// A path that exists and is not free (see `is_free`).
    pub fn fail_if_occupied(path: &Path) -> Result<()> {
        let occupied = is_free(path).map_or(path.exists(), |free| !free);
        let holds = match occupied {
            false => return Ok(()),
            true if !path.is_dir() => "is not a folder: ",
            true if path.join(names::RESOLVED).exists() => "is not empty: add --resume to resume the run in it, or ",
            true => "is not empty and contains no run: ",
        };
        Err(invalid(format!("{} {holds}choose another folder with --out", path.display())))
    }

    pub fn create(path: &Path) -> Result<Self> {
        // Created first: `..` in a path cannot be resolved if its parent folders are missing.
        let made = make(path)?;
        let lock = RunDirectory { path: path.to_owned() }.lock()?;
        Self::fail_if_occupied(path)?;
        Self::begin(path, made, lock)
    }

    /// Creates `folder/name`, or the first of `folder/name-2`, `folder/name-3`, ... that does not exist, even if other
    /// processes create some meanwhile.
    pub fn create_free(folder: &Path, name: &str) -> Result<Self> {
        let mut n = 1;
        loop {
            let path = folder.join(numbered(name, n));
            if !path.exists() && make(&path)? {
                let lock = RunDirectory { path: path.clone() }.lock()?;
                return Self::begin(&path, true, lock);
            }
            n += 1;
        }
    }

    fn begin(path: &Path, made: bool, lock: Option<Flock<File>>) -> Result<Self> {
        let directory = RunDirectory { path: path.to_owned() };
        File::create(path.join(STARTING)).map_err(|error| cannot_make(path, &error))?;
        std::fs::create_dir_all(path.join("checkpoints")).map_err(|error| cannot_make(path, &error))?;
        Ok(NewRun { directory, made, _lock: lock })
    }

    /// Marks the run as started, once its files are written.
    pub fn started(&self) -> Result<()> {
        let mark = self.directory.file(STARTING);
        std::fs::remove_file(&mark).with_context(|| format!("{} cannot be removed", mark.display()))
    }
}

/// The name of the `n`th run of an experiment.
fn numbered(name: &str, n: usize) -> String {
    if n == 1 { name.to_owned() } else { format!("{name}-{n}") }
}

/// Whether a folder's name is that of a run of an experiment: `name`, `name-2`, ...
fn is_numbered(name: &str, folder: &str) -> bool {
    let number = folder.strip_prefix(name).and_then(|rest| rest.strip_prefix('-')?.parse().ok());
    folder == number.map_or(name.to_owned(), |n| numbered(name, n))
}

fn cannot_make(path: &Path, error: &std::io::Error) -> anyhow::Error {
    invalid(format!("{} cannot be created: {error}", path.display()))
}

/// Creates a folder; false if it already exists.
fn make(path: &Path) -> Result<bool> {
    let folder = atomic::folder_of(path);
    if folder.exists() && !folder.is_dir() {
        return Err(invalid(format!("{} cannot be created: {} is a file", path.display(), folder.display())));
    }
    let made = std::fs::create_dir_all(folder).and_then(|()| std::fs::create_dir(path));
    match made {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => Ok(false),
        Err(_) if path.is_symlink() && !path.exists() => {
            Err(invalid(format!("{} cannot be created: it is a link to what does not exist", path.display())))
        }
        made => made.map(|()| true).map_err(|error| cannot_make(path, &error)),
    }
}

impl Drop for NewRun {
    fn drop(&mut self) {
        let run = &self.directory;
        let recorded = std::fs::metadata(run.file(names::METRICS)).is_ok_and(|file| file.len() > 0);
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
    /// Keeps other processes from training in this directory, until the lock is dropped or the process ends.
    ///
    /// # Errors
    /// Another process is training in it.
    pub fn lock(&self) -> Result<Option<Flock<File>>> {
        let Ok(folder) = File::open(&self.path) else { return Ok(None) };
        match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(lock)),
            Err((_, Errno::EWOULDBLOCK)) => {
                Err(invalid(format!("{} is in use: another process is training in it", self.path.display())))
            }
            // Not every file system supports locks.
            Err(_) => Ok(None),
        }
    }

    /// The runs of an experiment in `folder`, the most recently started first; `resolved` is its `resolved.yaml`, whose
    /// first line is its name.
    pub fn all_of(folder: &Path, name: &str, resolved: &str) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let runs = entries.filter(|entry| is_numbered(name, &entry.file_name().to_string_lossy()));
        // A folder with such a name may contain a run of another experiment.
        let ours = |run: &PathBuf| {
            let old = std::fs::read_to_string(run.join(names::RESOLVED));
            old.is_ok_and(|old| old.lines().next() == resolved.lines().next())
        };
        // Written once, when a run starts.
        let began = |run: &PathBuf| run.join(names::AS_WRITTEN).metadata().and_then(|file| file.modified()).ok();
        let mut runs: Vec<PathBuf> = runs.map(|entry| entry.path()).filter(ours).collect();
        runs.sort_by_key(|run| Reverse(began(run)));
        runs
    }

    /// Opens the directory of an earlier run.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(invalid(format!("{} does not exist", path.display())));
        }
        for file in [names::RESOLVED, names::LABELS, names::TOKENIZER] {
            if !path.join(file).is_file() {
                return Err(invalid(format!("{} is not a run directory: it has no {file}", path.display())));
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
        self.write(names::LABELS, &serde_json::to_string_pretty(tasks)?)
    }

    pub fn read_tasks(&self) -> Result<Vec<Task>> {
        serde_json::from_str(&self.read(names::LABELS)?)
            .with_context(|| format!("{} is damaged", self.file(names::LABELS).display()))
    }
}
