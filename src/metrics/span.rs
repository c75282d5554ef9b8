//! Precision, recall and F1 of spans over BIO tags, micro-averaged: a span counts when type and both ends agree.
//!
//! Two rules for sequences that break BIO: conlleval's (also seqeval's default) reads an I- tag without a span before it
//! as the start of one; strict (seqeval `mode="strict", scheme=IOB2`) counts only spans that start with B-.

use std::collections::BTreeSet;

use super::{Metric, Score, f1, ratio};
use crate::task::{Scheme, Span, Tag, spans_of};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanRule {
    Conlleval,
    Strict,
}

#[derive(Default)]
struct Counts {
    correct: usize,
    predicted: usize,
    gold: usize,
}

impl Counts {
    fn add<'a>(&mut self, gold: Vec<Span<&'a str>>, predicted: Vec<Span<&'a str>>) {
        self.gold += gold.len();
        self.predicted += predicted.len();
        let gold: BTreeSet<_> = gold.into_iter().collect();
        self.correct += predicted.iter().filter(|span| gold.contains(span)).count();
    }

    fn f1(&self) -> f64 {
        f1(self.correct, self.predicted, self.gold)
    }
}

pub struct SpanMetric {
    labels: Vec<String>,
    rule: SpanRule,
    lenient: Counts,
    strict: Counts,
    words: Counts,
}

impl SpanMetric {
    /// `labels` are BIO tags by label id; `rule` is the one whose F1 comes first.
    pub fn new(labels: &[String], rule: SpanRule) -> Self {
        SpanMetric {
            labels: labels.to_vec(),
            rule,
            lenient: Counts::default(),
            strict: Counts::default(),
            words: Counts::default(),
        }
    }
}

/// Spans that start with B- and go on with I- of their type; nothing else is a span.
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
        let (counts, other, name) = match self.rule {
            SpanRule::Conlleval => (&self.lenient, &self.strict, "strict_f1"),
            SpanRule::Strict => (&self.strict, &self.lenient, "conlleval_f1"),
        };
        vec![
            Score::fraction("f1", counts.f1()),
            Score::fraction("precision", ratio(counts.correct, counts.predicted)),
            Score::fraction("recall", ratio(counts.correct, counts.gold)),
            Score::fraction(name, other.f1()),
            Score::fraction("token_accuracy", ratio(self.words.correct, self.words.gold)),
        ]
    }
}
