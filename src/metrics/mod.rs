//! Scores over label ids, accumulated sentence by sentence. Pure counting: no tensors in here.

mod class;
mod span;

pub use class::ClassMetric;
pub use span::{SpanMetric, SpanRule};

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One number of a metric, a fraction between 0 and 1; more is better.
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

/// How well one class, tag or type of span is found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LabelScore {
    pub label: String,
    pub precision: f64,
    pub recall: f64,
    pub f1: f64,
    /// How often it stands in the data.
    pub n: usize,
    /// What it is most often taken for, and how often; spans with the same words alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_for: Option<(String, usize)>,
}

/// How often one label was taken for another.
#[derive(Default)]
struct Confusions(BTreeMap<(String, String), usize>);

impl Confusions {
    fn add(&mut self, gold: &str, predicted: &str) {
        *self.0.entry((gold.to_owned(), predicted.to_owned())).or_default() += 1;
    }

    /// What `gold` was most often taken for.
    fn of(&self, gold: &str) -> Option<(String, usize)> {
        let others = self.0.iter().filter(|((label, _), _)| label == gold);
        others.max_by_key(|(_, n)| **n).map(|((_, predicted), n)| (predicted.clone(), *n))
    }
}

/// What precision, recall and F1 are made of.
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

    /// `None` for what stands neither in the data nor in the predictions.
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
    /// Takes the gold and the predicted labels of one sentence: one of each for a class, one a word for tags.
    fn update(&mut self, gold: &[i32], predicted: &[usize]);

    /// The scores so far; the first is the one that chooses checkpoints.
    fn scores(&self) -> Vec<Score>;

    /// The same by class, tag or type of span, of those that occur.
    fn by_label(&self) -> Vec<LabelScore>;
}

/// a / b, and 0 where there is nothing to count.
fn ratio(a: usize, b: usize) -> f64 {
    if b == 0 { 0.0 } else { a as f64 / b as f64 }
}
