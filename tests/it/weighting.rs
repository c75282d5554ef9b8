//! Strategies reproduce effects shown in their papers, and agree with PyTorch.

use std::collections::BTreeMap;
use std::path::Path;

use polytask::model::Mode;
use polytask::optim::{Optimizer, OptimizerConfig};
use polytask::rng::Seed;
use polytask::train::gradients::{Backward, Weighted, as_vector, weighted_sum};
use polytask::train::{Pending, State, Step};
use polytask::weighting::{Reference, WeightedTask, Weighting};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use tch::{Device, Kind, Tensor};

use crate::heads::{build, parts, setting};
use crate::util::DRAWS;

/// Normal draws from the test's own generator: libtorch's is shared by all tests of the process.
fn normal(generator: &mut ChaCha8Rng, size: &[i64], deviation: f64) -> Tensor {
    let n: i64 = size.iter().product();
    let draws: Vec<f32> = (0..n).map(|_| StandardNormal.sample(generator)).collect();
    Tensor::from_slice(&draws).view(size) * deviation
}

fn generator(seed: u64) -> ChaCha8Rng {
    rand::SeedableRng::seed_from_u64(seed)
}

/// A strategy over `n` tasks.
fn weighting(config: &str, n: usize) -> Weighting {
    let task = |i: usize| WeightedTask { name: format!("t{i}"), priority: 1.0, n_labels: 2 };
    let tasks: Vec<WeightedTask> = (0..n).map(task).collect();
    Weighting::new(&serde_json::from_str(config).unwrap(), &tasks, Seed(1), Device::Cpu)
}

#[test]
fn the_gradient_of_gradnorms_loss_is_that_of_create_graph_in_pytorch() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gradnorm.safetensors");
    let fixture: BTreeMap<String, Tensor> = Tensor::read_safetensors(path).unwrap().into_iter().collect();
    let shared = fixture["shared"].copy().set_requires_grad(true); // [8, 6]
    let losses: Vec<Tensor> = (0..3)
        .map(|task| {
            let hidden = fixture["input"].matmul(&shared.tr()).tanh();
            let output = hidden.matmul(&fixture[&format!("head.{task}")]);
            (output - &fixture[&format!("target.{task}")]).square().mean(Kind::Float)
        })
        .collect();
    let norm = |loss: &Tensor| Tensor::run_backward(&[loss], &[&shared], true, false)[0].norm();
    let norms = Tensor::stack(&losses.iter().map(norm).collect::<Vec<_>>(), 0).to_kind(Kind::Double);
    // A small SGD step from known weights reveals the gradient and stays above the floor.
    let present = [true; 3];
    let initial = fixture["initial"].to_kind(Kind::Double);
    let config = r#"{"gradnorm": {"optimizer": "sgd", "learning_rate": 1e-4, "alpha": 1.5}}"#;
    let mut strategy = weighting(config, 3);
    strategy.prepare(0, &present).unwrap();
    strategy.learn(&initial, None).unwrap();
    let mut state = strategy.save();
    let start: Vec<f64> = Vec::try_from(fixture["weights"].to_kind(Kind::Double)).unwrap();
    state["weights"] = serde_json::json!(start);
    strategy.load(&state).unwrap();
    let losses = as_vector(&losses.into_iter().map(Some).collect::<Vec<_>>(), Device::Cpu);
    strategy.prepare(1, &present).unwrap();
    strategy.learn(&losses, Some(&norms)).unwrap();
    let found = strategy.weights(None);
    let moved = fixture["weights"].to_kind(Kind::Double) - fixture["gradient"].to_kind(Kind::Double) * 1e-4;
    let expected = &moved * 3.0 / moved.sum(Kind::Double);
    let off = (found.to_kind(Kind::Double) - expected).abs().max().double_value(&[]);
    // Norms and losses are float32 on both sides.
    assert!(off < 1e-7, "weights are off by {off}");
}

#[test]
fn a_task_without_a_path_to_the_trunk_is_an_error() {
    let s = setting(&[]);
    let model = build(&s);
    let batch = s.train.batch(&[0, 1, 2]);
    let forward = || model.encode(&batch, &batch.token_ids, None, Mode::Train(DRAWS));
    let losses = model.losses(&forward(), &batch, Mode::Train(DRAWS));
    let weights = Tensor::ones([2], (Kind::Float, Device::Cpu));
    // The losses were not computed from the states that are passed.
    let reference = Some(Reference::Representation);
    let backward = Backward { model: &model, tasks: &s.tasks, reference, halves: false, frozen: &[] };
    let passed = backward.pass(&forward(), None, Weighted { losses: &losses, weights: &weights, scale: None });
    let error = passed.err().unwrap().to_string();
    assert!(error.contains("task `topic` has no path to the shared trunk"), "{error}");
}

/// Whatever heads read, a backward pass that also measures norms gives the gradient of the weighted sum and each task's
/// norm.
#[test]
fn norms_and_gradients_hold_for_every_way_from_the_trunk_to_a_head() {
    for options in [
        &["model.trunk.layers=2", "tasks.topic.layer=1"] as &[&str],
        &["model.trunk.layers=3", "tasks.slots.mix_layers=true", "model.trunk.connection=residual"],
        &["model.trunk.layers=3", "tasks.slots.mix_layers=true", "tasks.topic.layer=2", "tasks.topic.private_lstm=4"],
        &["model.trunk.layers=2", "tasks.slots.inputs=[trunk, topic]", "tasks.topic.layer=1"],
        &["tasks.topic.inputs=[trunk, slots]", "tasks.slots.decoder=softmax"],
        &[
            "model.embedding.vectors=[{file: vectors.txt, trainable: false}]",
            "model.embedding.dim=0",
            "model.trunk.layers=2",
            "tasks.topic.layer=1",
        ],
    ] {
        let s = setting(options);
        let model = build(&s);
        let batch = s.train.batch(&(0..20).collect::<Vec<_>>());
        let forward = || {
            let shared = model.encode(&batch, &batch.token_ids, None, Mode::Eval);
            let losses = model.losses(&shared, &batch, Mode::Eval);
            (shared, losses)
        };
        let weights = Tensor::from_slice(&[0.3f32, 1.7]);
        let parameters = model.parameters.tensors();
        let total = weighted_sum(&forward().1, &weights).unwrap();
        let plain = Tensor::run_backward(&[total], &parameters, false, false);
        for reference in [Reference::Representation, Reference::LastLayer] {
            let (shared, losses) = forward();
            let backward =
                Backward { model: &model, tasks: &s.tasks, reference: Some(reference), halves: false, frozen: &[] };
            let gradients =
                backward.pass(&shared, None, Weighted { losses: &losses, weights: &weights, scale: None }).unwrap();
            for (((name, _), plain), found) in model.parameters.iter().zip(&plain).zip(&gradients.sum) {
                let off = (plain - found).abs().max().double_value(&[]) / plain.abs().max().double_value(&[]);
                // float32 sums in another order.
                assert!(off < 1e-4, "{options:?}, {reference:?}: the gradient of {name} is off by {off}");
            }
            let norms = gradients.norms(Device::Cpu).unwrap();
            for task in 0..2 {
                let (shared, losses) = forward();
                let inputs: Vec<&Tensor> = match reference {
                    Reference::Representation => shared.taps[task].iter().map(|(_, tap)| &tap.tokens).collect(),
                    Reference::LastLayer => parameters[model.last_layer.clone()].to_vec(),
                };
                let own = Tensor::run_backward(&[losses[task].as_ref().unwrap()], &inputs, false, false);
                let squares = own.iter().map(|g| g.square().sum(Kind::Double).double_value(&[]));
                let (alone, found) = (squares.sum::<f64>().sqrt(), norms.double_value(&[task as i64]));
                assert!((alone - found).abs() < 1e-4 * alone, "{options:?}, {reference:?}: {found} is not {alone}");
            }
        }
    }
}

#[test]
fn every_strategy_trains_what_every_option_builds() {
    let two = "model.trunk.layers=2";
    let options: [&[&str]; 9] = [
        &["tasks.slots.decoder=softmax", "tasks.slots.label_smoothing=0.1", "tasks.topic.class_weights=balanced"],
        &["tasks.slots.inputs=[trunk, topic]", "tasks.topic.pooling=attention", "tasks.slots.missed_cost=0.5"],
        &[two, "model.trunk.connection=highway", "tasks.topic.layer=1", "tasks.slots.private_lstm=5"],
        &[
            two,
            "model.trunk.connection=residual",
            "tasks.slots.mix_layers=true",
            "training.freeze_epochs={trunk.l0: 1}",
        ],
        &["model.embedding.characters={kind: cnn, dim: 4, filters: 6}", "model.embedding.locked_dropout=true"],
        &["model.embedding.characters={kind: lstm, dim: 4, hidden: 4}", "model.embedding.word_dropout=0.1"],
        &["model.embedding.vectors=[{file: vectors.txt}]", "model.embedding.row_dropout=0.1", "training.ema_decay=0.9"],
        &["training.accumulate_steps=3", "training.optimizer.lazy_rows=true", "tokenizer={model: bpe, size: 100}"],
        &[
            "training.precision=bfloat16",
            "tasks.topic.hidden=8",
            "training.optimizer={kind: adam, learning_rate: 0.01}",
        ],
    ];
    for strategy in [
        "equal",
        "fixed, weights: {topic: 1, slots: 2}",
        "uncertainty",
        "uncertainty_softmax",
        "gradnorm",
        "gradnorm, reference: last_layer",
        "dwa",
        "random",
    ] {
        for options in options {
            let s = setting(&[options, &[&format!("weighting={{strategy: {strategy}}}")]].concat());
            let mut model = build(&s);
            model.set_precision(s.experiment.training.precision);
            let mut trainer = parts(&s, &model).trainer();
            let n_batches = s.experiment.training.accumulate_steps;
            let rows: Vec<usize> = (0..24).collect();
            let batches: Vec<Vec<usize>> = rows.chunks(rows.len().div_ceil(n_batches)).map(<[usize]>::to_vec).collect();
            let mut losses = Vec::new();
            for number in 0..25 {
                let (mut pending, mut state) = (Pending::new(Device::Cpu), State::new(2));
                let step = Step { number, n_steps: 50, batches: &batches, diagnose: number == 3 };
                trainer.take(&step, &mut pending).unwrap();
                pending.drain(&mut state, &s.tasks).unwrap();
                losses.push(state.epoch.means().into_iter().flatten().sum::<f64>());
            }
            assert!(losses[24] < 0.7 * losses[0], "{strategy}, {options:?}: {} to {}", losses[0], losses[24]);
        }
    }
}

#[test]
fn uncertainty_finds_the_noise_of_two_regressions() {
    // Gal's notebook: y1 = 2 x + 8 + 10 e, y2 = 3 x + 3 + e, 100 points each.
    let random = &mut generator(3);
    let x = normal(random, &[100, 1], 1.0);
    let targets = [&x * 2.0 + 8.0 + normal(random, &[100, 1], 10.0), &x * 3.0 + 3.0 + normal(random, &[100, 1], 1.0)];
    let parameters: Vec<Tensor> =
        (0..4).map(|_| Tensor::zeros([1], (Kind::Float, Device::Cpu)).set_requires_grad(true)).collect();
    let mut strategy = weighting(r#"{"uncertainty": {}}"#, 2);
    let adam: OptimizerConfig = serde_json::from_str(r#"{"adam": {"weight_decay": 0}}"#).unwrap();
    let mut optimizer = Optimizer::new(&adam, ["a", "b", "c", "d"].into_iter().zip(&parameters));
    for step in 0..3000 {
        let fit = |task: usize| {
            let off = &x * &parameters[2 * task] + &parameters[2 * task + 1] - &targets[task];
            // For regression L is half the mean squared error, so that sigma^2 converges to that error.
            Some(off.square().mean(Kind::Float) * 0.5)
        };
        let losses = [fit(0), fit(1)];
        strategy.prepare(step, &[true; 2]).unwrap();
        let total = weighted_sum(&losses, &strategy.weights(None)).unwrap();
        let gradients = Tensor::run_backward(&[total], &parameters.iter().collect::<Vec<_>>(), false, false);
        optimizer.step(&gradients, None, 1e-2, &Tensor::from(0.0f32)).unwrap();
        strategy.learn(&as_vector(&losses, Device::Cpu), None).unwrap();
    }
    let sigma = &strategy.report(&strategy.weights(None)).details[0].1;
    println!("sigma {sigma:?}");
    assert!((8.0..10.5).contains(&sigma[0]) && (0.85..1.05).contains(&sigma[1]), "sigma {sigma:?}");
}

/// The toy problem of the GradNorm paper, section 4: y_i = sigma_i tanh((B + e_i) x / 20), squared loss, a shared
/// network of four layers of 100. The division by 20, not in the paper, keeps tanh from saturating. Returns the
/// fraction of its initial loss that each task has left, on fresh inputs.
fn toy(config: &str) -> [f64; 2] {
    const SIGMAS: [f64; 2] = [1.0, 100.0];
    let random = &mut generator(5);
    let common = normal(random, &[50, 20], 10f64.sqrt());
    let maps: Vec<Tensor> = SIGMAS.iter().map(|_| &common + normal(random, &[50, 20], 3.5f64.sqrt())).collect();
    let target = |task: usize, x: &Tensor| (x.matmul(&maps[task]) * 0.05).tanh() * SIGMAS[task];
    let sizes = [(50, 100), (100, 100), (100, 100), (100, 100), (100, 20), (100, 20)];
    let parameters: Vec<Tensor> = sizes
        .iter()
        .map(|&(inputs, outputs)| {
            normal(random, &[inputs, outputs], (2.0 / inputs as f64).sqrt()).set_requires_grad(true)
        })
        .collect();
    let losses = |x: &Tensor| -> Vec<Option<Tensor>> {
        let hidden = parameters[..4].iter().fold(x.shallow_clone(), |x, weight| x.matmul(weight).relu());
        let loss = |task: usize| {
            let output = hidden.matmul(&parameters[4 + task]);
            Some((output - target(task, x)).square().mean(Kind::Float))
        };
        vec![loss(0), loss(1)]
    };
    let fresh = normal(random, &[500, 50], 1.0);
    let test = || -> Vec<f64> { Vec::try_from(as_vector(&losses(&fresh), Device::Cpu)).unwrap() };
    let mut strategy = weighting(config, 2);
    let adam: OptimizerConfig = serde_json::from_str(r#"{"adam": {"weight_decay": 0}}"#).unwrap();
    let names = ["a", "b", "c", "d", "e", "f"];
    let mut optimizer = Optimizer::new(&adam, names.into_iter().zip(&parameters));
    let start = test();
    for step in 0..1500 {
        let losses = losses(&normal(random, &[100, 50], 1.0));
        let norm = |loss: &Option<Tensor>| {
            Tensor::run_backward(&[loss.as_ref().unwrap()], &[&parameters[3]], true, false)[0].norm()
        };
        let norms = Tensor::stack(&losses.iter().map(norm).collect::<Vec<_>>(), 0).to_kind(Kind::Double);
        strategy.prepare(step, &[true; 2]).unwrap();
        let total = weighted_sum(&losses, &strategy.weights(None)).unwrap();
        let gradients = Tensor::run_backward(&[total], &parameters.iter().collect::<Vec<_>>(), false, false);
        optimizer.step(&gradients, None, 1e-3, &Tensor::from(0.0f32)).unwrap();
        let vector = as_vector(&losses, Device::Cpu);
        strategy.learn(&vector, Some(&norms)).unwrap();
    }
    let end = test();
    [end[0] / start[0], end[1] / start[1]]
}

#[test]
fn gradnorm_feeds_the_task_that_equal_weights_starve() {
    let equal = toy(r#"{"equal": {}}"#);
    let gradnorm = toy(r#"{"gradnorm": {"alpha": 0.12}}"#);
    println!("loss left: equal {equal:?}, GradNorm {gradnorm:?}");
    assert!(gradnorm[0] < 0.7 * equal[0], "task 0 has {} left with equal weights, {}", equal[0], gradnorm[0]);
    assert!(gradnorm[1] < 1.5 * equal[1], "task 1 has {} left with equal weights, {}", equal[1], gradnorm[1]);
}
