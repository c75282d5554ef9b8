//! The task table: what every layer knows of a task.

mod scheme;

use serde::{Deserialize, Serialize};

pub use scheme::{Scheme, Span, Tag, from_bio, spans_of};

/// A task's position in the experiment's `tasks`. The order in the file is the order everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TaskId(pub usize);

/// What a task's labels are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// One label a sentence.
    Classification,
    /// One label a word, written in the data in this scheme.
    Tagging(Scheme),
}

impl TaskKind {
    /// Whether the labels of words form spans, which are inside always BIO.
    pub fn has_spans(self) -> bool {
        matches!(self, TaskKind::Tagging(scheme) if scheme != Scheme::Plain)
    }
}

/// One task with its labels as the model knows them: class names, plain tags, or BIO tags.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    pub name: String,
    pub kind: TaskKind,
    pub labels: Vec<String>,
}
