//! Precision, recall and F1 of spans over BIO tags, micro-averaged: a span is correct if its type and both ends match.
//!
//! Two rules for sequences that break BIO: conlleval's (also seqeval's default) reads an I- tag without a span before it
//! as the start of one; strict (seqeval `mode="strict", scheme=IOB2`) counts only spans that start with B-.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Confusions, Counts, LabelScore, Metric, Score, ratio};
use crate::task::{Scheme, Span, Tag, spans_of};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SpanRule {
    #[default]
    Conlleval,
    Strict,
}

/// Span counts by type.
#[derive(Default)]
struct ByType {
    counts: BTreeMap<String, Counts>,
    /// Between types, for spans with the right words.
    confusions: Confusions,
}

impl ByType {
    fn add(&mut self, gold: Vec<Span<&str>>, predicted: Vec<Span<&str>>) {
        for span in &gold {
            self.of(span.kind).gold += 1;
        }
        let gold: BTreeMap<_, _> = gold.into_iter().map(|span| ((span.start, span.end), span.kind)).collect();
        for span in predicted {
            let here = gold.get(&(span.start, span.end));
            let counts = self.of(span.kind);
            counts.predicted += 1;
            counts.correct += usize::from(here == Some(&span.kind));
            if let Some(other) = here.filter(|kind| **kind != span.kind) {
                self.confusions.add(other, span.kind);
            }
        }
    }

    fn of(&mut self, kind: &str) -> &mut Counts {
        self.counts.entry(kind.to_owned()).or_default()
    }

    fn sum(&self) -> Counts {
        self.counts.values().fold(Counts::default(), |sum, counts| Counts {
            correct: sum.correct + counts.correct,
            predicted: sum.predicted + counts.predicted,
            gold: sum.gold + counts.gold,
        })
    }
}

pub struct SpanMetric {
    labels: Vec<String>,
    rule: SpanRule,
    lenient: ByType,
    strict: ByType,
    words: Counts,
}

impl SpanMetric {
    fn main(&self) -> &ByType {
        match self.rule {
            SpanRule::Conlleval => &self.lenient,
            SpanRule::Strict => &self.strict,
        }
    }

    /// `labels` are BIO tags by label id; the F1 under `rule` is the main score.
    pub fn new(labels: Vec<String>, rule: SpanRule) -> Self {
        SpanMetric { labels, rule, lenient: ByType::default(), strict: ByType::default(), words: Counts::default() }
    }
}

/// Spans that start with B- and continue with I- of the same type; nothing else is a span.
fn strict_spans<'a>(tags: &[Tag<'a>]) -> Vec<Span<&'a str>> {
    let mut spans: Vec<Span<&str>> = Vec::new();
    let mut open = false;
    for (i, tag) in tags.iter().enumerate() {
        match (tag.prefix, spans.last_mut()) {
            (b'B', _) => {
                spans.push(Span { start: i, end: i + 1, kind: tag.kind });
                open = true;
            }
            (b'I', Some(last)) if open && last.kind == tag.kind => last.end = i + 1,
            _ => open = false,
        }
    }
    spans
}

impl Metric for SpanMetric {
    fn update(&mut self, gold: &[i32], predicted: &[usize]) {
        let parse = |label: usize| Scheme::Bio.parse(&self.labels[label]).unwrap_or(Tag::OUTSIDE);
        let gold_tags: Vec<Tag> = gold.iter().map(|&label| parse(label as usize)).collect();
        let predicted_tags: Vec<Tag> = predicted.iter().map(|&label| parse(label)).collect();
        self.lenient.add(spans_of(gold_tags.iter().copied()), spans_of(predicted_tags.iter().copied()));
        self.strict.add(strict_spans(&gold_tags), strict_spans(&predicted_tags));
        self.words.gold += gold.len();
        self.words.correct +=
            gold.iter().zip(predicted).filter(|(gold, predicted)| **gold as usize == **predicted).count();
    }

    fn scores(&self) -> Vec<Score> {
        let (other, name) = match self.rule {
            SpanRule::Conlleval => (&self.strict, "strict_f1"),
            SpanRule::Strict => (&self.lenient, "conlleval_f1"),
        };
        let counts = self.main().sum();
        vec![
            Score::fraction("f1", counts.f1()),
            Score::fraction("precision", counts.precision()),
            Score::fraction("recall", counts.recall()),
            Score::fraction(name, other.sum().f1()),
            Score::fraction("token_accuracy", ratio(self.words.correct, self.words.gold)),
        ]
    }

    fn by_label(&self) -> Vec<LabelScore> {
        let ByType { counts, confusions } = self.main();
        counts.iter().filter_map(|(kind, counts)| counts.of(kind, confusions)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_scored_apart() {
        let labels = ["O", "B-x", "I-x", "B-y", "I-y"].map(str::to_owned);
        let mut metric = SpanMetric::new(labels.to_vec(), SpanRule::Conlleval);
        metric.update(&[1, 2, 0, 3], &[1, 2, 3, 3]);
        metric.update(&[1, 0], &[2, 1]);
        metric.update(&[3, 4, 0], &[1, 2, 0]);
        let found: Vec<_> = metric.by_label().into_iter().map(|of| (of.label, of.precision, of.recall, of.n)).collect();
        assert_eq!(found, [("x".to_owned(), 0.5, 1.0, 2), ("y".to_owned(), 0.5, 0.5, 2)]);
        assert_eq!(metric.by_label()[1].taken_for, Some(("x".to_owned(), 1)));
    }
}
