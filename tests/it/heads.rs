//! Every head and option: it trains, every parameter gets a gradient, it saves and loads, and padding changes nothing.

use std::path::Path;

use polytask::commands::shared::build_trainer::Parts;
use polytask::commands::shared::prepare;
use polytask::config::Experiment;
use polytask::data::{DeviceSplit, Split, Tokenizer, load};
use polytask::evaluate::evaluate;
use polytask::libtorch::{GradScale, clip_gradients};
use polytask::model::{Mode, Model};
use polytask::optim::Optimizer;
use polytask::run::checkpoint;
use polytask::task::Task;
use tch::{Device, Kind, Tensor};

use crate::util::{DRAWS, Folder, small};

pub struct Setting {
    _folder: Folder,
    pub experiment: Experiment,
    pub tasks: Vec<Task>,
    pub tokenizer: Tokenizer,
    pub train: DeviceSplit,
}

pub fn setting(overrides: &[&str]) -> Setting {
    let folder = small();
    let mut overrides: Vec<String> = overrides.iter().map(|o| o.to_string()).collect();
    overrides.push(format!("data.root={}", folder.path().display()));
    let experiment = Experiment::load(&folder.path().join("small.yaml"), &overrides).unwrap();
    let splitter = experiment.tokenizer.splitter();
    let (corpus, _) =
        load(&experiment.data, &experiment.task_columns(), &Split::ALL, splitter, &|_: &Path| {}).unwrap();
    let (tokenizer, _) = prepare::tokenizer(&experiment, &corpus).unwrap();
    let tasks = prepare::tasks(&experiment, &corpus);
    let train = prepare::encoded(&corpus, Split::Train, &tokenizer, &tasks, Device::Cpu).unwrap();
    Setting { _folder: folder, experiment, tasks, tokenizer, train }
}

pub fn build(s: &Setting) -> Model {
    prepare::model(&s.experiment, &s.tasks, &s.tokenizer, Device::Cpu).unwrap()
}

/// The parts that a trainer is built from.
pub fn parts<'a>(s: &'a Setting, model: &'a Model) -> Parts<'a> {
    Parts {
        experiment: &s.experiment,
        config: &s.experiment.training,
        weighting: &s.experiment.weighting,
        tasks: &s.tasks,
        tokenizer: &s.tokenizer,
        model,
        train: &s.train,
    }
}

fn logits(model: &Model, s: &Setting, rows: &[usize]) -> Vec<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let batch = s.train.batch(rows);
    let encoded = model.encode(&batch, &batch.token_ids, None, Mode::Eval);
    encoded.taps.iter().map(|taps| model.head_logits(taps, Mode::Eval)).collect()
}

fn ensure_trains_saves_and_loads(overrides: &[&str]) {
    let s = setting(overrides);
    let model = build(&s);
    let rows: Vec<usize> = (0..s.train.set.len()).collect();
    let mut optimizer = Optimizer::new(&s.experiment.training.optimizer, model.parameters.iter());
    let never = Tensor::from(0.0f32);
    let mut losses = Vec::new();
    for step in 0..60 {
        let batch = s.train.batch(&rows);
        let encoded = model.encode(&batch, &batch.token_ids, None, Mode::Train(DRAWS));
        let total =
            model.losses(&encoded, &batch, Mode::Train(DRAWS)).into_iter().flatten().reduce(|a, b| a + b).unwrap();
        let gradients = Tensor::run_backward(&[&total], &model.parameters.tensors(), false, false);
        if step == 0 {
            for ((name, _), gradient) in model.parameters.iter().zip(&gradients) {
                assert!(
                    gradient.defined() && gradient.abs().sum(Kind::Float).double_value(&[]) > 0.0,
                    "{overrides:?}: {name} gets no gradient"
                );
            }
        }
        let (_, divisor) = clip_gradients(&gradients.iter().collect::<Vec<_>>(), None, 5.0, None).unwrap();
        let grad_scale = GradScale { divisor: divisor.as_ref(), ..GradScale::from(&never) };
        optimizer.step(&gradients, None, 1e-2, grad_scale).unwrap();
        losses.push(total.double_value(&[]));
    }
    assert!(losses[59] < 0.35 * losses[0], "{overrides:?}: loss {} to {}", losses[0], losses[59]);
    let report = evaluate(&model, &s.train, &s.tasks).unwrap();
    assert!(report.mean() > 0.9, "{overrides:?}: {report:?}");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let weights: Vec<_> =
        model.parameters.iter().map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone())).collect();
    checkpoint::save(&path, &weights, &optimizer.state(), &serde_json::Value::Null).unwrap();
    let (saved, other) = (checkpoint::load(&path).unwrap(), build(&s));
    other.parameters.load(saved.model).unwrap();
    Optimizer::new(&s.experiment.training.optimizer, other.parameters.iter()).load(saved.optimizer).unwrap();
    assert_eq!(logits(&model, &s, &rows), logits(&other, &s, &rows), "{overrides:?}");

    // Logits of a sentence alone and in a padded batch are the same up to rounding.
    let together = logits(&model, &s, &rows[..20]);
    for &row in &rows[..20] {
        for (task, (alone, together)) in logits(&model, &s, &[row]).iter().zip(&together).enumerate() {
            let mut here = together.get(row as i64).unsqueeze(0);
            if here.dim() == 3 {
                here = here.narrow(1, 0, s.train.set.n_words(row));
            }
            let off = (alone - here).abs().max().double_value(&[]);
            // float32 sums in another order: 1e-7 relative on logits of about 10.
            assert!(off < 2e-5, "{overrides:?}: padding moves the logits of task {task} by {off}");
        }
    }
}

#[test]
fn poolings_and_hidden_layers() {
    for pooling in ["last", "mean", "max", "attention"] {
        ensure_trains_saves_and_loads(&[&format!("tasks.topic.pooling={pooling}")]);
    }
    ensure_trains_saves_and_loads(&["tasks.topic.hidden=16", "tasks.topic.dropout=0.2"]);
}

#[test]
fn decoders() {
    ensure_trains_saves_and_loads(&["tasks.slots.decoder=softmax", "tasks.slots.dropout=0.1"]);
    ensure_trains_saves_and_loads(&["tasks.slots.constraints=false", "tasks.slots.scoring=strict"]);
    ensure_trains_saves_and_loads(&["tasks.slots.scheme=plain"]);
}

#[test]
fn trunks() {
    ensure_trains_saves_and_loads(&["model.trunk.layers=2", "model.trunk.dropout=0.1", "model.embedding.dropout=0.1"]);
    ensure_trains_saves_and_loads(&["model.trunk.bidirectional=false", "tasks.topic.pooling=last"]);
}

#[test]
fn layers_that_heads_read() {
    let two = "model.trunk.layers=2";
    for connection in ["residual", "highway"] {
        ensure_trains_saves_and_loads(&[two, &format!("model.trunk.connection={connection}")]);
    }
    ensure_trains_saves_and_loads(&[two, "tasks.topic.layer=1", "model.trunk.locked_dropout=true"]);
    ensure_trains_saves_and_loads(&[two, "tasks.slots.mix_layers=true", "tasks.topic.layer=1"]);
    ensure_trains_saves_and_loads(&[
        "tasks.slots.private_lstm=7",
        "tasks.topic.private_lstm=5",
        "tasks.topic.pooling=last",
    ]);
}

#[test]
fn heads_that_see_other_heads() {
    ensure_trains_saves_and_loads(&["tasks.slots.inputs=[trunk, topic]"]);
    ensure_trains_saves_and_loads(&["tasks.topic.inputs=[trunk, slots]", "tasks.slots.decoder=softmax"]);
    ensure_trains_saves_and_loads(&[
        "tasks.slots.inputs=[topic, trunk]",
        "model.trunk.layers=2",
        "tasks.topic.layer=1",
        "tasks.topic.private_lstm=6",
        "tasks.topic.hidden=8",
    ]);
}

#[test]
fn embeddings() {
    ensure_trains_saves_and_loads(&["model.embedding.characters={kind: cnn, dim: 5, filters: 9, width: 5}"]);
    ensure_trains_saves_and_loads(&[
        "model.embedding.characters={kind: lstm, dim: 5, hidden: 4}",
        "model.embedding.dim=0",
    ]);
    ensure_trains_saves_and_loads(&[
        "model.embedding.characters={kind: cnn, max_bytes: 3}",
        "tokenizer={model: bpe, size: 100}",
    ]);
    let vectors = "model.embedding.vectors=[{file: vectors.txt}]";
    ensure_trains_saves_and_loads(&[vectors, "model.embedding.locked_dropout=true"]);
    ensure_trains_saves_and_loads(&[
        "model.embedding.vectors=[{file: vectors.txt, trainable: false}, {file: vectors.txt}]",
        "model.embedding.dim=0",
        "model.embedding.row_dropout=0.02",
        "model.embedding.dropout=0",
    ]);
    ensure_trains_saves_and_loads(&["model.embedding.word_dropout=0.1", "tasks.topic.label_smoothing=0.02"]);
    let weighted =
        ["tasks.slots.decoder=softmax", "tasks.slots.label_smoothing=0.02", "tasks.slots.class_weights=balanced"];
    ensure_trains_saves_and_loads(&weighted);
}

#[test]
fn weights_that_decay_and_weights_that_do_not() {
    let s = setting(&["training.optimizer={kind: adamw, weight_decay: 0.5, decay_all: false}"]);
    let model = build(&s);
    let before: Vec<Tensor> = model.parameters.tensors().iter().map(|tensor| tensor.copy()).collect();
    let mut optimizer = Optimizer::new(&s.experiment.training.optimizer, model.parameters.iter());
    // With gradients of 0, only weight decay changes a weight.
    let gradients: Vec<Tensor> = before.iter().map(Tensor::zeros_like).collect();
    optimizer.step(&gradients, None, 0.1, &Tensor::from(0.0f32)).unwrap();
    for ((name, tensor), before) in model.parameters.iter().zip(&before) {
        let spared = name.starts_with("embedding.") || tensor.dim() < 2;
        let factor = if spared { 1.0 } else { 1.0 - 0.1 * 0.5 };
        assert!((tensor - before * factor).abs().max().double_value(&[]) < 1e-6, "{name}");
    }
}

#[test]
fn frozen_parts_stay_for_their_epochs_and_the_average_is_what_is_kept() {
    let folder = small();
    let weights = |out: &str, name: &str, more: &[&str]| {
        folder.train(out, &[&["training.max_epochs=2"], more].concat()).success();
        folder.weights(out, name)
    };
    let start = build(&setting(&[]));
    let frozen = weights("frozen", "last", &["training.freeze_epochs={trunk: 2, heads.topic: 1}"]);
    for (name, tensor) in start.parameters.iter() {
        assert_eq!(*tensor == frozen[name], name.starts_with("trunk."), "{name}");
    }
    // With a decay of 0.8 the average follows the weights, but not closely.
    let last = weights("average", "last", &["training.ema_decay=0.8"]);
    let best = folder.weights("average", "best");
    let plain = weights("plain", "last", &[]);
    assert_eq!(last, plain, "averaging does not change how weights are trained");
    assert!(best.iter().any(|(name, tensor)| *tensor != last[name]));
}

#[test]
fn a_run_starts_from_what_fits_of_an_earlier_one() {
    let folder = small();
    folder.polytask(&["train", "small.yaml", "--out", "first"]).assert().success();
    let train = |out: &str, more: &[&str]| folder.train(out, &[&["init_from=first"], more].concat());
    let frozen = "training.freeze_epochs={embedding: 9, trunk: 9, heads.slots: 9}";
    let fewer = r#"{"tokens": ["play", "brandnew", "rock"], "topic": "music", "slots": ["O", "O", "B-thing"]}"#;
    folder.file("train.jsonl", format!("{}{fewer}\n", crate::util::rows(30)));
    let output = train("second", &[frozen]).success().get_output().clone();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("the trunk and heads topic, slots of small"), "{said}");
    let (first, second) = (folder.weights("first", "best"), folder.weights("second", "last"));
    for (name, tensor) in &second {
        let same = first[name].size() == tensor.size() && first[name] == *tensor;
        // The vocabularies differ, and so does the order of rows.
        assert!(same || name.starts_with("heads.topic.") || name == "embedding.weight", "{name}");
    }
    let row = |run: &str, weights: &std::collections::BTreeMap<String, Tensor>, word: &str| {
        let json: serde_json::Value = serde_json::from_str(&folder.read(&format!("{run}/tokenizer.json"))).unwrap();
        weights["embedding.weight"].get(json["model"]["vocab"][word].as_i64().unwrap())
    };
    assert_eq!(row("first", &first, "rock"), row("second", &second, "rock"));
    // Words of the earlier run that the new data lacks are kept.
    let only_then: serde_json::Value = serde_json::from_str(&folder.read("first/tokenizer.json")).unwrap();
    for (word, _) in only_then["model"]["vocab"].as_object().unwrap() {
        assert_eq!(row("first", &first, word), row("second", &second, word), "{word}");
    }
    std::fs::remove_file(folder.path().join("first/report.json")).unwrap();
    let output = train("third", &["tasks.topic.hidden=4", "training.max_epochs=1"]).success().get_output().clone();
    assert!(String::from_utf8_lossy(&output.stderr).contains("first is not finished; its best checkpoint so far"));
    // The model's labels are the same whatever scheme the data has.
    let output = train("schemes", &["tasks.slots.scheme=iob1", "training.max_epochs=1"]).success().get_output().clone();
    assert!(String::from_utf8_lossy(&output.stderr).contains("heads topic, slots of small"));
    // Parts of the same shape but another meaning are not transferred.
    let two = ["model.trunk.layers=2", "tasks.topic.layer=1", "training.max_epochs=1"];
    train("two", &[&two[..], &["init_from=null"]].concat()).success();
    let order = "tasks.topic.labels=[travel, music, food]";
    for (from, more, expected) in [
        (
            "first",
            &[order] as &[&str],
            "`topic` is initialised from scratch: its labels are in another order in the earlier run",
        ),
        (
            "two",
            &["model.trunk.layers=2"],
            "`topic` is initialised from scratch: it reads other inputs in the earlier run",
        ),
    ] {
        let from = format!("init_from={from}");
        let output = train(&format!("of-{from}"), &[&[from.as_str(), "training.max_epochs=1"], more].concat());
        let said = String::from_utf8_lossy(&output.success().get_output().stderr).into_owned();
        assert!(said.contains(expected) && said.contains("heads slots of"), "{said}");
    }
    let error = train("fourth", &["model.trunk.hidden=9"]).code(2).get_output().clone();
    let said = String::from_utf8_lossy(&error.stderr).into_owned();
    assert!(
        said.contains("its trunk is hidden: 10, layers: 1") && said.contains("this experiment's is hidden: 9"),
        "{said}"
    );
    assert!(!folder.path().join("fourth").exists(), "nothing was trained, and nothing is left");
    // A table that was not trainable is now trained.
    let still = "model.embedding.vectors=[{file: vectors.txt, trainable: false}]";
    folder.polytask(&["train", "small.yaml", "--out", "still", "--set", still]).assert().success();
    let more = ["model.embedding.vectors=[{file: vectors.txt}]", "init_from=still", "training.max_epochs=1"];
    train("tuned", &more).success();
    // And the reverse: a table that is not trainable is in no checkpoint, but still in the run.
    let more = [still, "init_from=tuned", "training.max_epochs=1"];
    train("rests", &more).success();
    let report: serde_json::Value = serde_json::from_str(&folder.read("rests/report.json")).unwrap();
    let output = folder.polytask(&["evaluate", "rests", "--json"]).assert().success().get_output().clone();
    let again: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["splits"]["test"], again["report"]);
    // All parts may be frozen in the first epoch.
    train("all", &["training.freeze_epochs={embedding: 1, trunk: 1, heads.topic: 1, heads.slots: 1}"]).success();
    let error = train("fifth", &["training.freeze_epochs={heads.slots.out: 1}"]).code(2).get_output().clone();
    assert!(
        String::from_utf8_lossy(&error.stderr).contains("freeze_epochs.heads.slots.out: the model has no such part")
    );
}

#[test]
fn optimizers_and_tokenizers() {
    ensure_trains_saves_and_loads(&["training.optimizer={kind: adam, weight_decay: 0}"]);
    for model in ["bpe", "wordpiece", "unigram"] {
        ensure_trains_saves_and_loads(&[&format!("tokenizer={{model: {model}, size: 100}}")]);
    }
}

#[test]
fn momentum_descends() {
    let s = setting(&["training.optimizer={kind: sgd}"]);
    let model = build(&s);
    let rows: Vec<usize> = (0..s.train.set.len()).collect();
    let mut optimizer = Optimizer::new(&s.experiment.training.optimizer, model.parameters.iter());
    let mut losses = Vec::new();
    for _ in 0..40 {
        let batch = s.train.batch(&rows);
        let encoded = model.encode(&batch, &batch.token_ids, None, Mode::Eval);
        let total = model.losses(&encoded, &batch, Mode::Eval).into_iter().flatten().reduce(|a, b| a + b).unwrap();
        let gradients = Tensor::run_backward(&[&total], &model.parameters.tensors(), false, false);
        optimizer.step(&gradients, None, 0.1, &Tensor::from(0.0f32)).unwrap();
        losses.push(total.double_value(&[]));
    }
    assert!(losses[39] < 0.6 * losses[0], "{losses:?}");
}

#[test]
fn nothing_moves_once_a_loss_was_not_finite() {
    let s = setting(&[]);
    let model = build(&s);
    let copy = |model: &Model| model.parameters.tensors().iter().map(|tensor| tensor.copy()).collect::<Vec<_>>();
    let before = copy(&model);
    let mut optimizer = Optimizer::new(&s.experiment.training.optimizer, model.parameters.iter());
    let gradients: Vec<Tensor> = before.iter().map(|tensor| tensor.full_like(f64::NAN)).collect();
    optimizer.step(&gradients, None, 1e-2, &Tensor::from(1.0f32)).unwrap();
    assert_eq!(copy(&model), before);
}

#[test]
fn accumulated_batches_are_one_large_batch() {
    // No dropout, so that the two runs differ only by rounding; rows without labels make the batches' label counts
    // uneven.
    let off = [
        "model.embedding.dropout=0",
        "model.trunk.dropout=0",
        "tokenizer={model: word, unknown_rate: 0}",
        "training.max_epochs=1",
        // An SGD step is proportional to the gradient, whose scale Adam would hide.
        "training.optimizer={kind: sgd, learning_rate: 1}",
        "training.clip_norm=0",
    ];
    let folder = small();
    let run = |out: &str, more: [&str; 2]| {
        folder.train(out, &[&off[..], &more].concat()).success();
        folder.weights(out, "last")
    };
    let large = run("large", ["training.batch_size=90", "training.log_every_steps=1"]);
    let parts = run("parts", ["training.accumulate_steps=30", "training.batch_size=3"]);
    for (name, tensor) in &large {
        let off = (tensor - &parts[name]).abs().max().double_value(&[]);
        assert!(off < 1e-5, "{name} is off by {off}");
    }
}
