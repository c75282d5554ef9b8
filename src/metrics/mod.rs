//! Scores over label ids, accumulated sentence by sentence. Pure counting, without tensors.

mod class;
mod span;

pub use class::ClassMetric;
pub use span::{SpanMetric, SpanRule};

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One score of a metric, between 0 and 1; higher is better.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    pub name: String,
    pub value: f64,
}

impl Score {
    fn fraction(name: &str, value: f64) -> Self {
        Score { name: name.to_owned(), value }
    }
}

/// Scores of one class, tag or span type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LabelScore {
    pub label: String,
    pub precision: f64,
    pub recall: f64,
    pub f1: f64,
    /// Number of gold occurrences.
    pub n: usize,
    /// The label most often predicted instead, and how often; for spans, only where the words are the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_for: Option<(String, usize)>,
}

/// How often one label was predicted instead of another.
#[derive(Default)]
struct Confusions(BTreeMap<(String, String), usize>);

impl Confusions {
    fn add(&mut self, gold: &str, predicted: &str) {
        *self.0.entry((gold.to_owned(), predicted.to_owned())).or_default() += 1;
    }

    /// The label most often predicted instead of `gold`.
    fn of(&self, gold: &str) -> Option<(String, usize)> {
        let others = self.0.iter().filter(|((label, _), _)| label == gold);
        others.max_by_key(|(_, n)| **n).map(|((_, predicted), n)| (predicted.clone(), *n))
    }
}

/// The counts behind precision, recall and F1.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    correct: usize,
    predicted: usize,
    gold: usize,
}

impl Counts {
    fn precision(self) -> f64 {
        ratio(self.correct, self.predicted)
    }

    fn recall(self) -> f64 {
        ratio(self.correct, self.gold)
    }

    /// Harmonic mean of precision and recall.
    fn f1(self) -> f64 {
        ratio(2 * self.correct, self.predicted + self.gold)
    }

    /// `None` for a label that occurs neither in the gold labels nor in the predictions.
    fn of(self, label: &str, confusions: &Confusions) -> Option<LabelScore> {
        let score = LabelScore {
            label: label.to_owned(),
            precision: self.precision(),
            recall: self.recall(),
            f1: self.f1(),
            n: self.gold,
            taken_for: confusions.of(label),
        };
        (self.gold + self.predicted > 0).then_some(score)
    }
}

/// Counts over the sentences of a split.
pub trait Metric {
    /// Adds the gold and predicted labels of one sentence: one each for a class, one per word for tags.
    fn update(&mut self, gold: &[i32], predicted: &[usize]);

    /// The scores so far; the first selects checkpoints.
    fn scores(&self) -> Vec<Score>;

    /// Scores per class, tag or span type, for those that occur.
    fn by_label(&self) -> Vec<LabelScore>;
}

/// a / b, or 0 if b is 0.
fn ratio(a: usize, b: usize) -> f64 {
    if b == 0 { 0.0 } else { a as f64 / b as f64 }
}
