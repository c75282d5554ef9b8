//! Speed-ups do not change results: workers, rows of tables, 16-bit trunks, recorded steps.

use std::collections::BTreeMap;

use polytask::libtorch::Draws;
use polytask::model::{Mode, Model, Precision};
use polytask::optim::{Optimizer, OptimizerConfig, StepRates, Touched};
use polytask::train::graphs::Graphs;
use polytask::train::{Pending, State, Step};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::heads::{Setting, build, parts, setting};
use crate::util::{DRAWS, Folder, small};

/// The largest difference, relative to the largest value of `a`.
fn off(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[]) / a.abs().max().double_value(&[]).max(1e-30)
}

/// Weights after a run of 6 steps.
fn trained(folder: &Folder, out: &str, more: &[&str]) -> BTreeMap<String, Tensor> {
    let mut arguments = vec!["train", "small.yaml", "--out", out, "--set", "training.max_steps=6"];
    arguments.extend(more);
    folder.polytask(&arguments).assert().success();
    folder.weights(out, "last")
}

#[test]
fn workers_share_a_batch_and_change_nothing_but_rounding() {
    let folder = small();
    let options = [
        vec!["model.embedding={dim: 8, row_dropout: 0.1, word_dropout: 0.2, characters: {kind: cnn}}"],
        vec!["weighting={strategy: gradnorm, reference: last_layer, update_every: 1}", "training.accumulate_steps=2"],
        vec![
            "weighting={strategy: uncertainty_softmax}",
            "training.ema_decay=0.9",
            "tasks.slots.inputs=[trunk, topic]",
        ],
        vec!["training.optimizer={kind: sgd, learning_rate: 0.5, momentum: 0}", "training.clip_norm=0"],
    ];
    for (i, options) in options.iter().enumerate() {
        let run = |workers: &str| {
            let mut more = vec!["--threads", "3", "--workers", workers];
            options.iter().for_each(|option| more.extend(["--set", option]));
            trained(&folder, &format!("run-{i}-{workers}"), &more)
        };
        let (alone, shared) = (run("1"), run("3"));
        for (name, weights) in &alone {
            // float32 sums in another order, over 6 AdamW steps with a learning rate of 0.01.
            let off = off(weights, &shared[name]);
            assert!(off < 1e-3, "{options:?}: {name} is off by {off}");
        }
    }
}

/// What the gradients of tables are taken with respect to.
#[derive(Clone, Copy, PartialEq)]
enum Of {
    Tables,
    Rows,
    Places,
}

fn gradients(model: &Model, s: &Setting, of: Of, mode: Mode) -> Vec<Tensor> {
    let all: Vec<usize> = (0..20).collect();
    let batch = s.train.batch(&all);
    let tokens: Vec<i32> = all.iter().flat_map(|&row| s.train.set.tokens(row)).copied().collect();
    let rows = match of {
        Of::Tables => None,
        Of::Rows => Some(model.embedding.rows(model.embedding.touched(&tokens))),
        Of::Places => Some(model.embedding.rows_at(model.embedding.places(&batch.token_ids, &batch), &batch)),
    };
    let shared = model.encode(&batch, &batch.token_ids, rows.as_ref(), mode);
    let total = model.losses(&shared, &batch, mode).into_iter().flatten().reduce(|a, b| a + b).unwrap();
    let mut gradients = Tensor::run_backward(&[total], &model.inputs(rows.as_ref()), false, false);
    for (at, &table) in rows.iter().flat_map(|rows| rows.touched.tables.iter().enumerate()) {
        let whole = model.parameters.tensors()[table].zeros_like();
        let Touched { ids, padding, .. } = &rows.as_ref().unwrap().touched;
        let width = rows.as_ref().unwrap().leaves[at].size().pop().unwrap();
        gradients[table] = tch::no_grad(|| whole.index_add(0, ids, &gradients[table].reshape([-1, width])));
        if of == Of::Places {
            let _ = gradients[table].get(*padding).zero_();
        }
    }
    gradients
}

#[test]
fn rows_of_a_table_have_the_gradient_of_the_table() {
    let s = setting(&["model.embedding.vectors=[{file: vectors.txt}]"]);
    let model = build(&s);
    let mode = Mode::Train(DRAWS);
    let whole = gradients(&model, &s, Of::Tables, mode);
    for of in [Of::Rows, Of::Places] {
        let rows = gradients(&model, &s, of, mode);
        for ((name, _), (whole, rows)) in model.parameters.iter().zip(whole.iter().zip(&rows)) {
            assert!(off(whole, rows) < 1e-6, "{name}");
        }
    }
}

#[test]
fn a_tokenizer_without_padding_trains_every_row() {
    // A word whose id is also used for padding.
    let moves = |pads: bool| {
        let mut s = setting(&["training.ema_decay=0.9", "training.optimizer.decay_all=false"]);
        let row = i64::from(s.train.set.token_ids[0]);
        (s.tokenizer.padding, s.tokenizer.pads) = (row as u32, pads);
        s.train = polytask::data::DeviceSplit::new(s.train.set, row as u32, Device::Cpu);
        let before = build(&s).parameters.tensors()[0].get(row).copy();
        (stepped(&s, false).0[0].get(row) - before).abs().max().double_value(&[])
    };
    assert!(moves(false) > 0.0);
    assert_eq!(moves(true), 0.0);
}

#[test]
fn lazy_rows_leave_the_others_alone_and_the_rest_is_adamw() {
    let step = |lazy: bool, ids: &[i64]| {
        let table = Tensor::ones([5, 2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let config = json!({"adamw": {"lazy_rows": lazy, "decay_all": true, "weight_decay": 0.1}});
        let config: OptimizerConfig = serde_json::from_value(config).unwrap();
        let named = [("embedding.weight", &table)];
        let mut optimizer = Optimizer::new(&config, named.into_iter());
        for _ in 0..3 {
            let touched = Touched { ids: Tensor::from_slice(ids), host: ids.to_vec(), padding: -1, tables: vec![0] };
            let gradient = Tensor::full([ids.len() as i64, 2], 0.5, (Kind::Float, Device::Cpu));
            optimizer.step(&[gradient], Some(&touched), 0.1, &Tensor::from(0.0f32)).unwrap();
        }
        optimizer.catch_up(None).unwrap();
        table.detach()
    };
    let (lazy, dense) = (step(true, &[1, 3]), step(false, &[1, 3]));
    for row in [1, 3] {
        assert!(off(&lazy.get(row), &dense.get(row)) < 1e-6);
    }
    assert_eq!(lazy.get(0), Tensor::from_slice(&[1.0f32, 1.0]));
    // Without lazy rows, untouched rows still decay.
    assert!((dense.double_value(&[0, 0]) - 0.99f64.powi(3)).abs() < 1e-6);
}

#[test]
fn rows_that_wait_take_the_steps_of_whole_tables() {
    let run = |config: &serde_json::Value, in_rows: bool| {
        let config: OptimizerConfig = serde_json::from_value(config.clone()).unwrap();
        let numbers: Vec<f32> = (0..60).map(|i| (1.0 + i as f32).sin()).collect();
        let table = Tensor::from_slice(&numbers).view([3, 20]).set_requires_grad(true);
        let named = [("embedding.weight", &table)];
        let mut optimizer = Optimizer::new(&config, named.into_iter()).with_average(0.9);
        for number in 0..400usize {
            let ids: &[i64] = if number.is_multiple_of(5) { &[2, 0] } else { &[2] };
            let touched = Touched { ids: Tensor::from_slice(ids), host: ids.to_vec(), padding: -1, tables: vec![0] };
            let rows = in_rows.then_some(&touched);
            optimizer.catch_up(rows).unwrap();
            let gradient = Tensor::full([ids.len() as i64, 20], (number as f64).cos(), (Kind::Float, Device::Cpu));
            let whole = table.detach().zeros_like().index_add(0, &touched.ids, &gradient);
            let gradient = if in_rows { gradient } else { whole };
            let learning_rate = (1e-2 / (1.0 + number as f64)).into();
            let rates = StepRates { learning_rate, share: optimizer.share(number).into() };
            optimizer.step(&[gradient], rows, rates, &Tensor::from(0.0f32)).unwrap();
        }
        optimizer.catch_up(None).unwrap();
        let mut all = optimizer.state();
        all.push(("weight".to_owned(), table.detach().copy()));
        all
    };
    for config in [
        json!({"adamw": {}}),
        json!({"adamw": {"decay_all": true, "weight_decay": 0.1}}),
        json!({"adam": {"decay_all": true, "weight_decay": 0.1}}),
        json!({"sgd": {"decay_all": true, "weight_decay": 0.1}}),
    ] {
        for ((name, waited), (_, at_once)) in run(&config, true).iter().zip(run(&config, false)) {
            let off = if waited.numel() > 0 { off(waited, &at_once) } else { 0.0 };
            assert!(off < 1e-5, "{config}: {name} is off by {off}");
        }
    }
}

#[test]
fn a_bfloat16_trunk_has_nearly_the_gradient_and_trains_and_resumes() {
    let s = setting(&["model.trunk.layers=2", "model.trunk.connection=highway"]);
    let mut model = build(&s);
    let mode = Mode::Train(Draws::new(9));
    let exact = gradients(&model, &s, Of::Tables, mode);
    model.set_precision(Precision::Bfloat16);
    model.refresh().unwrap();
    let found: Vec<Tensor> = gradients(&model, &s, Of::Tables, mode).iter().map(|g| g.to_kind(Kind::Float)).collect();
    let flat = |all: &[Tensor]| Tensor::cat(&all.iter().map(|x| x.flatten(0, -1)).collect::<Vec<_>>(), 0);
    let (exact, found) = (flat(&exact), flat(&found));
    let off = (&exact - found).norm().double_value(&[]) / exact.norm().double_value(&[]);
    // bfloat16 has 8 significant bits: 0.4 % per rounding, through two layers and sums over time.
    assert!(off > 0.0 && off < 0.03, "the gradient is off by {off}");
    let folder = small();
    let bfloat16 = ["--set", "training.precision=bfloat16"];
    let (half, float) = (trained(&folder, "half", &bfloat16), trained(&folder, "float", &[]));
    let name = "trunk.weight_ih_l0";
    assert!(half[name] != float[name] && half[name].kind() == Kind::Float);
    folder.file("train.jsonl", crate::util::rows(700));
    crate::cli::check_kills(&folder, 1, &bfloat16);
    let error = folder.polytask(&["train", "small.yaml", "--device", "cpu", "--set", "training.precision=float16"]);
    let said = String::from_utf8_lossy(&{ error }.assert().code(2).get_output().stderr).into_owned();
    assert!(said.contains("training.precision: float16 needs CUDA"), "{said}");
}

/// Trains some steps, recorded or not; returns the weights, the mean losses and the number of recorded shapes.
fn stepped(s: &Setting, recorded: bool) -> (Vec<Tensor>, Vec<Option<f64>>, usize) {
    let model = build(s);
    let mut trainer = parts(s, &model).trainer();
    if recorded {
        trainer.graphs = Graphs::rehearsed(Device::Cpu);
    }
    let (mut pending, mut state) = (Pending::new(Device::Cpu), State::new(s.tasks.len()));
    let mut number = 0;
    for epoch in 0..4 {
        for batch in trainer.sampler.plan(epoch) {
            let step = Step { number, n_steps: 100, batches: &[batch], diagnose: number % 10 == 9 };
            trainer.take(&step, &mut pending).unwrap();
            number += 1;
        }
    }
    pending.drain(&mut state, &s.tasks).unwrap();
    trainer.settle().unwrap();
    trainer.optimizer.swap_average().unwrap();
    (
        model.parameters.tensors().into_iter().map(Tensor::copy).collect(),
        state.epoch.means(),
        trainer.graphs.n_recorded(),
    )
}

#[test]
fn recorded_steps_are_the_steps_that_were_recorded() {
    for strategy in ["equal", "gradnorm", "uncertainty"] {
        let s = setting(&[
            &format!("weighting={{strategy: {strategy}}}"),
            "model.embedding.characters={kind: cnn}",
            "training.ema_decay=0.9",
            "training.freeze_epochs={trunk: 1}",
        ]);
        let (plain, recorded) = (stepped(&s, false), stepped(&s, true));
        assert!(recorded.2 > 3 && plain.2 == 0, "{} shapes are recorded", recorded.2);
        for (a, b) in plain.1.iter().zip(&recorded.1) {
            assert!((a.unwrap() - b.unwrap()).abs() < 1e-4, "{strategy}: losses {a:?} and {b:?}");
        }
        for (a, b) in plain.0.iter().zip(&recorded.0) {
            // Recorded steps use a float32 learning rate and sum gradients of tables in another order.
            assert!(off(a, b) < 1e-3, "{strategy}: off by {}", off(a, b));
        }
    }
}
