//! The types of tasks that all modules share.

mod scheme;

use serde::{Deserialize, Serialize};

pub use scheme::{Scheme, Span, Tag, from_bio, spans_of};

/// A task's position in the experiment's `tasks`. The order in the file is the order everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TaskId(pub usize);

/// What a task labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// One label per sentence.
    Classification,
    /// One label per word, in this scheme in the data.
    Tagging(Scheme),
}

impl TaskKind {
    /// Whether the tags form spans, which are always BIO internally.
    pub fn has_spans(self) -> bool {
        matches!(self, TaskKind::Tagging(scheme) if scheme != Scheme::Plain)
    }
}

/// One task with the labels that the model predicts: class names, plain tags, or BIO tags.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    pub name: String,
    pub kind: TaskKind,
    pub labels: Vec<String>,
}
