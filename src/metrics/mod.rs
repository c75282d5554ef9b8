//! Scores over label ids, accumulated sentence by sentence. Pure counting: no tensors in here.

mod class;
mod span;

pub use class::ClassMetric;
pub use span::{SpanMetric, SpanRule};

use serde::{Deserialize, Serialize};

/// One number of a metric, a fraction between 0 and 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    pub name: String,
    pub value: f64,
    pub higher_is_better: bool,
}

impl Score {
    fn fraction(name: &str, value: f64) -> Self {
        Score { name: name.to_owned(), value, higher_is_better: true }
    }
}

/// Counts over the sentences of a split.
pub trait Metric {
    /// Takes the gold and the predicted labels of one sentence: one of each for a class, one a word for tags.
    fn update(&mut self, gold: &[i32], predicted: &[usize]);

    /// The scores so far; the first is the one that chooses checkpoints.
    fn scores(&self) -> Vec<Score>;
}

/// a / b, and 0 where there is nothing to count.
fn ratio(a: usize, b: usize) -> f64 {
    if b == 0 { 0.0 } else { a as f64 / b as f64 }
}

/// Harmonic mean of precision and recall from counts.
fn f1(correct: usize, predicted: usize, gold: usize) -> f64 {
    ratio(2 * correct, predicted + gold)
}
