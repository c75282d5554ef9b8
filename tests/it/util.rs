//! Small experiments in temporary folders.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use tch::Tensor;

/// The random stream for dropout in tests of a single step.
pub const DRAWS: polytask::libtorch::Draws = polytask::libtorch::Draws::new(5);

pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    /// A polytask command with this folder as its working directory.
    pub fn polytask(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_polytask"));
        command.current_dir(self.path()).args(arguments).env_remove("RUST_LOG").env_remove("POLYTASK_DATA");
        command
    }

    /// Trains `small.yaml` in the run directory `out`, with `overrides`.
    pub fn train(&self, out: &str, overrides: &[&str]) -> assert_cmd::assert::Assert {
        let mut command = self.polytask(&["train", "small.yaml", "--out", out]);
        overrides.iter().for_each(|value| {
            command.args(["--set", value]);
        });
        command.assert()
    }

    pub fn weights(&self, run: &str, checkpoint: &str) -> BTreeMap<String, Tensor> {
        let path = self.path().join(format!("{run}/checkpoints/{checkpoint}.safetensors"));
        polytask::run::checkpoint::load(&path).unwrap().model
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path().join(name)).unwrap()
    }
}

/// `n` rows whose words determine topic and slots; every seventh has no topic, every fifth no slots.
pub fn rows(n: usize) -> String {
    let mut out = String::new();
    for i in 0..n {
        let (verb, topic) = [("play", "music"), ("cook", "food"), ("visit", "travel")][i % 3];
        let (thing, more) = [("rock", 0), ("soup", 1), ("oslo", 2), ("jazz", 0)][i / 3 % 4];
        let mut tokens = vec![verb, "the", thing];
        let mut slots = vec!["O", "O", "B-thing"];
        for _ in 0..more {
            tokens.push("bowl");
            slots.push("I-thing");
        }
        tokens.extend(["now", "please"].iter().take(i % 3));
        slots.resize(tokens.len(), "O");
        let mut row = serde_json::json!({"tokens": tokens, "topic": topic, "slots": slots});
        if i % 7 == 6 {
            row["topic"] = serde_json::Value::Null;
        }
        if i % 5 == 4 {
            row.as_object_mut().unwrap().remove("slots");
        }
        out += &format!("{row}\n");
    }
    out
}

pub const SMALL: &str = "\
name: small
seed: 3
data:
  root: .
  sets:
    toy: {format: jsonl, tokens: tokens, train: train.jsonl, dev: dev.jsonl, test: dev.jsonl}
tasks:
  topic: {type: classification, set: toy, column: topic}
  slots: {type: tagging, set: toy, column: slots, decoder: crf}
model:
  embedding: {dim: 12, dropout: 0.3, locked_dropout: false, characters: {kind: none}}
  trunk: {hidden: 10, dropout: 0.3, locked_dropout: false}
training:
  batch_size: 8
  max_epochs: 6
  log_every_steps: 3
  ema_decay: 0
  optimizer: {kind: adamw, learning_rate: 1.0e-2, decay_all: true}
";

/// Word vectors; the last two words do not occur in training.
pub const VECTORS: &str =
    "the 1 0.5 -0.2\nplay 0.3 1 0.1\nrock -0.5 0.2 1\nvisit 0.9 -0.1 0.4\nunheard 0.2 0.2 -0.7\nof -1 0.5 0.5\n";

/// A folder with [`SMALL`] as `small.yaml` and its data.
pub fn small() -> Folder {
    let folder = Folder::new();
    folder.file("small.yaml", SMALL);
    folder.file("train.jsonl", rows(90));
    folder.file("dev.jsonl", rows(30));
    folder.file("vectors.txt", VECTORS);
    folder
}
