//! Accuracy and macro-F1 of single labels.
//!
//! accuracy = correct / decisions; macro-F1 = mean over the labels that occur in gold or prediction of
//! 2 TP / (2 TP + FP + FN), as scikit-learn's `f1_score(average="macro")`.

use super::{Metric, Score, f1, ratio};

pub struct ClassMetric {
    correct: Vec<usize>,
    gold: Vec<usize>,
    predicted: Vec<usize>,
}

impl ClassMetric {
    pub fn new(n_labels: usize) -> Self {
        ClassMetric { correct: vec![0; n_labels], gold: vec![0; n_labels], predicted: vec![0; n_labels] }
    }
}

impl Metric for ClassMetric {
    fn update(&mut self, gold: &[i32], predicted: &[usize]) {
        for (&gold, &predicted) in gold.iter().zip(predicted) {
            self.gold[gold as usize] += 1;
            self.predicted[predicted] += 1;
            self.correct[predicted] += usize::from(gold as usize == predicted);
        }
    }

    fn scores(&self) -> Vec<Score> {
        let accuracy = ratio(self.correct.iter().sum(), self.gold.iter().sum());
        let used = (0..self.gold.len()).filter(|&label| self.gold[label] + self.predicted[label] > 0);
        let each: Vec<f64> =
            used.map(|label| f1(self.correct[label], self.predicted[label], self.gold[label])).collect();
        let macro_f1 = each.iter().sum::<f64>() / each.len().max(1) as f64;
        vec![Score::fraction("accuracy", accuracy), Score::fraction("macro_f1", macro_f1)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accuracy_and_macro_f1() {
        let mut metric = ClassMetric::new(4);
        metric.update(&[0, 0, 1, 2], &[0, 1, 1, 0]);
        let scores = metric.scores();
        // F1: label 0 is 1/2, label 1 is 2/3, label 2 is 0; label 3 never occurs.
        assert_eq!(scores[0].value, 0.5);
        assert!((scores[1].value - (0.5 + 2.0 / 3.0) / 3.0).abs() < 1e-12);
        assert_eq!(ClassMetric::new(2).scores()[0].value, 0.0);
    }
}
