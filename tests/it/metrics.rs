//! Span scores against seqeval's on random, often broken, tag sequences; see fixtures/make_spans.py.

use polytask::metrics::{Metric, SpanMetric, SpanRule};
use serde_json::Value;

#[test]
fn spans_are_counted_as_seqeval_and_conlleval_count_them() {
    let fixture: Value = serde_json::from_str(include_str!("../fixtures/spans.json")).unwrap();
    let labels: Vec<String> = serde_json::from_value(fixture["labels"].clone()).unwrap();
    let cases = fixture["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 40);
    for case in cases {
        let gold: Vec<Vec<i32>> = serde_json::from_value(case["gold"].clone()).unwrap();
        let predicted: Vec<Vec<usize>> = serde_json::from_value(case["predicted"].clone()).unwrap();
        let expected: Vec<f64> = serde_json::from_value(case["scores"].clone()).unwrap();
        for (rule, expected) in [(SpanRule::Conlleval, &expected[..3]), (SpanRule::Strict, &expected[3..])] {
            let mut metric = SpanMetric::new(labels.clone(), rule);
            for (gold, predicted) in gold.iter().zip(&predicted) {
                metric.update(gold, predicted);
            }
            let scores = metric.scores();
            for (score, expected) in scores[..3].iter().zip(expected) {
                assert!(
                    (score.value - expected).abs() < 1e-12,
                    "{rule:?} {}: {} is not {expected}",
                    score.name,
                    score.value
                );
            }
        }
    }
}
