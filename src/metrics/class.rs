//! Accuracy and macro-F1 of single labels.
//!
//! accuracy = correct / decisions; macro-F1 = mean over the labels that occur in gold or prediction of
//! 2 TP / (2 TP + FP + FN), as scikit-learn's `f1_score(average="macro")`.

use super::{Confusions, Counts, LabelScore, Metric, Score, ratio};

pub struct ClassMetric {
    labels: Vec<String>,
    /// By label id.
    counts: Vec<Counts>,
    confusions: Confusions,
}

impl ClassMetric {
    pub fn new(labels: Vec<String>) -> Self {
        ClassMetric { counts: vec![Counts::default(); labels.len()], labels, confusions: Confusions::default() }
    }
}

impl Metric for ClassMetric {
    fn update(&mut self, gold: &[i32], predicted: &[usize]) {
        for (&gold, &predicted) in gold.iter().zip(predicted) {
            self.counts[gold as usize].gold += 1;
            self.counts[predicted].predicted += 1;
            if gold as usize == predicted {
                self.counts[predicted].correct += 1;
            } else {
                self.confusions.add(&self.labels[gold as usize], &self.labels[predicted]);
            }
        }
    }

    fn scores(&self) -> Vec<Score> {
        let sum = |of: fn(&Counts) -> usize| self.counts.iter().map(of).sum();
        let accuracy = ratio(sum(|counts| counts.correct), sum(|counts| counts.gold));
        let each = self.by_label();
        let macro_f1 = each.iter().map(|label| label.f1).sum::<f64>() / each.len().max(1) as f64;
        vec![Score::fraction("accuracy", accuracy), Score::fraction("macro_f1", macro_f1)]
    }

    fn by_label(&self) -> Vec<LabelScore> {
        self.labels.iter().zip(&self.counts).filter_map(|(label, counts)| counts.of(label, &self.confusions)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accuracy_and_macro_f1() {
        let labels = ["a", "b", "c", "d"].map(str::to_owned);
        let mut metric = ClassMetric::new(labels.to_vec());
        metric.update(&[0, 0, 1, 2], &[0, 1, 1, 0]);
        let scores = metric.scores();
        // F1: label 0 is 1/2, label 1 is 2/3, label 2 is 0; label 3 never occurs.
        assert_eq!(scores[0].value, 0.5);
        assert!((scores[1].value - (0.5 + 2.0 / 3.0) / 3.0).abs() < 1e-12);
        let each = metric.by_label();
        assert_eq!(each.iter().map(|label| label.label.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!((each[1].precision, each[1].recall, each[1].n), (0.5, 1.0, 1));
        assert_eq!([0, 1].map(|i: usize| each[i].taken_for.clone()), [Some(("b".to_owned(), 1)), None]);
        assert_eq!(ClassMetric::new(labels.to_vec()).scores()[0].value, 0.0);
    }
}
