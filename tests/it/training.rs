//! Losses, gradients and scores in training, checked against independent computations.

use polytask::data::DeviceSplit;
use polytask::libtorch::Draws;
use polytask::model::{Mode, Model};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::heads::{build, setting};
use crate::util::{DRAWS, Folder, small};

/// No dropout, so that a step depends only on the weights.
const PLAIN: [&str; 5] = [
    "model.embedding.dropout=0",
    "model.trunk.dropout=0",
    "tokenizer={model: word, unknown_rate: 0}",
    "training.schedule={kind: constant}",
    "training.batch_size=90",
];

/// Trains and returns the records.
fn records(folder: &Folder, out: &str, overrides: &[&str]) -> Vec<Value> {
    folder.train(out, overrides).success();
    parsed(&folder.read(&format!("{out}/metrics.jsonl")))
}

fn parsed(lines: &str) -> Vec<Value> {
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn losses(model: &Model, set: &DeviceSplit, rows: &[usize]) -> Vec<Option<Tensor>> {
    let batch = set.batch(rows);
    let shared = model.encode(&batch, &batch.token_ids, None, Mode::Eval);
    model.losses(&shared, &batch, Mode::Eval)
}

/// The dev records, and the best one: by highest `score`, then lowest loss of `tasks`; the first of equals.
fn best<'a>(records: &'a [Value], score: impl Fn(&Value) -> f64, tasks: &[&str]) -> (Vec<&'a Value>, &'a Value) {
    let dev: Vec<&Value> = records.iter().filter(|record| record["kind"] == "dev").collect();
    let loss = |record: &Value| tasks.iter().map(|task| record[task]["loss"].as_f64().unwrap()).sum::<f64>();
    let merit = |record: &Value| (score(record), -loss(record));
    let best = dev.iter().copied().reduce(|a, b| if merit(b) > merit(a) { b } else { a }).unwrap();
    (dev, best)
}

#[test]
fn the_best_checkpoints_are_those_of_the_highest_scores_on_dev() {
    let folder = small();
    // With these settings epochs differ, and later ones are not always better.
    let more = ["training.ema_decay=0.5", "training.optimizer.learning_rate=0.2", "training.schedule=constant"];
    let records = records(&folder, "run", &more);
    let mean = |record: &Value| record["mean"].as_f64().unwrap();
    let (dev, chosen) = best(&records, mean, &["topic", "slots"]);
    assert!(dev.len() == 6 && chosen != dev[0] && chosen != dev[5], "neither the first nor the last: {dev:?}");
    let report: Value = serde_json::from_str(&folder.read("run/report.json")).unwrap();
    assert_eq!((&report["step"], &report["epoch"]), (&chosen["step"], &chosen["epoch"]));
    for (task, score) in [("topic", "accuracy"), ("slots", "f1")] {
        let value = |record: &Value| record[task][score].as_f64().unwrap();
        let (_, chosen) = best(&records, value, &[task]);
        let command = ["evaluate", "run", "--split", "dev", "--checkpoint", &format!("best-{task}"), "--json"];
        let output = folder.polytask(&command).assert().success().get_output().clone();
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        let tasks = found["report"]["tasks"].as_array().unwrap();
        let found = tasks.iter().find(|found| found["name"] == task).unwrap();
        assert_eq!(found["scores"][0]["value"].as_f64().unwrap(), value(chosen), "{task}");
        // Equal up to rounding, so the checkpoint has the averaged weights that were scored then.
        let off = found["loss"].as_f64().unwrap() - chosen[task]["loss"].as_f64().unwrap();
        assert!(off.abs() < 1e-6, "{task}: {off}");
    }
}

#[test]
fn any_score_on_dev_can_choose_the_checkpoint() {
    let folder = small();
    let more = ["training.ema_decay=0.5", "training.optimizer.learning_rate=0.05", "training.schedule=constant"];
    let number = |value: &Value| value.as_f64().unwrap();
    for (metric, parts, tasks) in [
        ("slots.loss", &[("/slots/loss", -1.0)] as &[(&str, f64)], &["slots"] as &[&str]),
        ("topic.macro_f1", &[("/topic/macro_f1", 1.0)], &["topic"]),
        ("sentence_accuracy", &[("/sentence_accuracy", 1.0)], &["topic", "slots"]),
        ("[topic, slots.loss]", &[("/topic/accuracy", 0.5), ("/slots/loss", -0.5)], &["topic", "slots"]),
    ] {
        let score = |record: &Value| parts.iter().map(|(at, share)| share * number(record.pointer(at).unwrap())).sum();
        let metric_is = format!("training.early_stopping.metric={metric}");
        let records = records(&folder, metric, &[&more[..], &[metric_is.as_str()]].concat());
        let report: Value = serde_json::from_str(&folder.read(&format!("{metric}/report.json"))).unwrap();
        assert_eq!(report["step"], best(&records, score, tasks).1["step"], "{metric}");
    }
}

#[test]
fn training_ends_after_epochs_without_a_better_score() {
    let folder = small();
    let still = ["training.early_stopping={patience_epochs: 2}", "training.optimizer.learning_rate=1e-30"];
    let records_of = |out: &str, more: &[&str]| records(&folder, out, more);
    // A lower loss at the same score replaces the checkpoint, but does not count as a better score.
    let patient = ["training.early_stopping={patience_epochs: 2}", "training.max_epochs=60"];
    let plateau =
        records_of("plateau", &[&patient[..], &["training.schedule=constant", "training.ema_decay=0.5"]].concat());
    let means: Vec<f64> =
        plateau.iter().filter(|of| of["kind"] == "dev").map(|of| of["mean"].as_f64().unwrap()).collect();
    let gains = (1..means.len()).filter(|&i| means[..i].iter().all(|before| means[i] > *before)).max().unwrap();
    assert!(means.len() < 60 && means.len() == gains + 3, "{means:?}");
    let records = records_of("run", &still);
    assert_eq!(best(&records, |_| 0.0, &[]).0.len(), 3, "the first is best, and two are no better");
}

#[test]
fn gradients_are_clipped_before_the_update() {
    let folder = small();
    let sgd = "training.optimizer={kind: sgd, learning_rate: 1, momentum: 0}";
    let overrides = [&PLAIN[..], &[sgd, "training.clip_norm=1e-3", "training.max_steps=1"]].concat();
    folder.train("run", &overrides).success();
    let (before, after) = (build(&setting(&overrides)), folder.weights("run", "last"));
    let moved = |(name, tensor): (&str, &Tensor)| (tensor - &after[name]).square().sum(Kind::Double).double_value(&[]);
    let moved = before.parameters.iter().map(moved).sum::<f64>().sqrt();
    assert!((moved / 1e-3 - 1.0).abs() < 1e-2, "a step of {moved}");
}

#[test]
fn recorded_cosines_and_losses_are_those_of_two_backward_passes() {
    let folder = small();
    let every = ["training.max_steps=1", "training.log_every_steps=1", "training.log_gradients_every=1"];
    let overrides = [&PLAIN[..], &every].concat();
    let s = setting(&overrides);
    let model = build(&s);
    let rows: Vec<usize> = (0..s.train.set.len()).collect();
    let last: Vec<&Tensor> =
        model.parameters.iter().filter(|(name, _)| name.starts_with("trunk.")).map(|(_, tensor)| tensor).collect();
    let losses: Vec<Tensor> = losses(&model, &s.train, &rows).into_iter().flatten().collect();
    let gradient = |loss: &Tensor| {
        let parts = Tensor::run_backward(&[loss], &last, true, false);
        Tensor::cat(&parts.iter().map(|part| part.flatten(0, -1)).collect::<Vec<_>>(), 0).to_kind(Kind::Double)
    };
    let (topic, slots) = (gradient(&losses[0]), gradient(&losses[1]));
    let cosine = topic.dot(&slots).double_value(&[]) / (topic.norm() * slots.norm()).double_value(&[]);
    let close = |found: &Value, expected: f64| {
        let found = found.as_f64().unwrap();
        assert!((found - expected).abs() < 1e-4 * expected.abs().max(1e-2), "{found} against {expected}");
    };
    // With one batch per step, and with several.
    for (out, cut) in [("whole", &[] as &[&str]), ("cut", &["training.batch_size=30", "training.accumulate_steps=3"])] {
        let records = records(&folder, out, &[&overrides, cut].concat());
        let record = records.iter().find(|record| record["kind"] == "train").unwrap();
        close(&record["gradient_cosine"]["topic-slots"], cosine);
        close(&record["task_gradient_norm"]["slots"], slots.norm().double_value(&[]));
        close(&record["loss"]["topic"], losses[0].double_value(&[]));
        close(&record["loss"]["slots"], losses[1].double_value(&[]));
    }
}

#[test]
fn rows_without_a_label_have_no_part_in_a_task_s_loss() {
    let s = setting(&PLAIN);
    let model = build(&s);
    let all: Vec<usize> = (0..40).collect();
    let together = losses(&model, &s.train, &all);
    for (task, loss) in together.iter().flatten().enumerate() {
        let labelled: Vec<usize> = all
            .iter()
            .copied()
            .filter(|&row| s.train.set.labels(polytask::task::TaskId(task), row).is_some())
            .collect();
        assert!(!labelled.is_empty() && labelled.len() < all.len());
        let alone = losses(&model, &s.train, &labelled)[task].as_ref().unwrap().double_value(&[]);
        assert!((loss.double_value(&[]) - alone).abs() < 1e-6 * alone, "task {task}");
    }
}

#[test]
fn sentence_accuracy_is_the_share_of_sentences_with_every_label_right() {
    let folder = small();
    let gold = parsed(&folder.read("dev.jsonl"));
    let accuracies = ["2", "3", "4", "5"].map(|epochs| {
        folder.train(epochs, &[&format!("training.max_epochs={epochs}")]).success();
        let command = ["predict", epochs, "--input", "dev.jsonl"];
        let output = folder.polytask(&command).assert().success().get_output().clone();
        let predicted = parsed(&String::from_utf8(output.stdout).unwrap());
        assert_eq!(predicted.len(), gold.len());
        let pairs = predicted.iter().zip(&gold);
        let right: Vec<bool> = pairs
            .filter(|(_, gold)| gold["topic"].is_string() && gold["slots"].is_array())
            .map(|(found, gold)| found["topic"]["label"] == gold["topic"] && found["slots"]["tags"] == gold["slots"])
            .collect();
        let expected = right.iter().filter(|right| **right).count() as f64 / right.len() as f64;
        let report: Value = serde_json::from_str(&folder.read(&format!("{epochs}/report.json"))).unwrap();
        assert_eq!(report["splits"]["dev"]["sentence_accuracy"].as_f64().unwrap(), expected);
        expected
    });
    assert!(accuracies.iter().any(|accuracy| *accuracy > 0.0 && *accuracy < 1.0), "{accuracies:?}");
}

#[test]
fn words_are_dropped_one_by_one_and_types_throughout_a_batch() {
    let reads = |option: &str, rows: &[usize], mode: Mode| {
        let s = setting(&[&PLAIN[..], &[option]].concat());
        let batch = s.train.batch(rows);
        let model = build(&s);
        let shared = model.encode(&batch, &model.embedding.drop_words(&batch.token_ids, mode), None, mode);
        model.head_logits(&shared.taps[0], Mode::Eval)
    };
    let alike = |logits: &Tensor| (logits - logits.narrow(0, 0, 1)).abs().max().double_value(&[]) < 1e-5;
    let train = Mode::Train(DRAWS);
    let (copies, others) = ([0; 16], [1, 3]);
    assert!(alike(&reads("seed=3", &copies, train)));
    assert!(!alike(&reads("model.embedding.word_dropout=0.5", &copies, train)));
    let typed = "model.embedding.row_dropout=0.5";
    assert!(alike(&reads(typed, &copies, train)));
    assert!((reads(typed, &copies, train) - reads(typed, &copies, Mode::Eval)).abs().max().double_value(&[]) > 1e-3);
    // With nearly every word dropped, sentences of the same length give the same logits.
    assert!(!alike(&reads("seed=3", &others, train)));
    for option in ["model.embedding.word_dropout=0.9999", "model.embedding.row_dropout=0.9999"] {
        assert!(alike(&reads(option, &others, train)), "{option}");
        assert!(!alike(&reads(option, &others, Mode::Eval)), "{option}");
    }
    // Words that have only pretrained vectors are dropped as types too.
    let by_vectors = [
        "model.embedding={dim: 0, row_dropout: 0.5, vectors: [{file: vectors.txt}], characters: {kind: none}}",
        "tokenizer={model: word, min_count: 1000}",
    ];
    let s = setting(&[&PLAIN[..], &by_vectors].concat());
    let (model, batch) = (build(&s), s.train.batch(&(0..80).collect::<Vec<_>>()));
    let states = |seed| {
        let mode = Mode::Train(Draws::new(seed));
        let shared = model.encode(&batch, &batch.token_ids, None, mode);
        model.head_logits(&shared.taps[0], Mode::Eval)
    };
    let differ = (0..20).filter(|&seed| !alike(&states(seed))).count();
    assert!(differ > 15, "types are dropped one by one, so that sentences differ: {differ} of 20");
}
