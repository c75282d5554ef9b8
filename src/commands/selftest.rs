//! `polytask selftest`: checks loss weighting, and the reproducibility of an experiment's steps, on the user's device.

mod reproduce;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::cli::SelftestArgs;
use super::{End, prepare, say};
use crate::config::Experiment;
use crate::data::{Batch, DeviceSplit, EncodedSplit, Spelling, TargetValues};
use crate::libtorch::{Draws, draws_alike};
use crate::model::{HeadConfig, Mode, Model, ModelConfig, Shared, Vocabulary};
use crate::rng::{Purpose, Seed};
use crate::task::{Scheme, Task, TaskKind};
use crate::train::gradients::{Backward, Weighted, as_vector, weighted_sum};
use crate::weighting::{Reference, golden};

const AGAINST_THE_CPU: golden::Check =
    ("losses and gradients equal those of the same steps on the CPU, except for rounding", as_on_the_cpu);

const GRADIENT_CHECKS: [golden::Check; 3] = [
    ("the network's gradient equals that of sum w L, bit for bit, with norms taken at the representation", no_leak),
    (
        "the network's gradient equals that of sum w L, except for rounding, with norms taken at the last layer",
        no_leak_apart,
    ),
    ("norms of the tasks' gradients equal those that autograd computes for each task separately", norms_are_right),
];

pub fn run(args: &SelftestArgs) -> Result<End> {
    let experiment = args.experiment.as_deref().map(|path| Experiment::load(path, &args.overrides)).transpose()?;
    let (device, _) = prepare::machine(&args.machine)?;
    say(format!("on {}", prepare::device_name(device)))?;
    let (mut n, mut failed) = (0, 0);
    let mut tell = |name: &str, outcome: Result<()>| {
        n += 1;
        match outcome {
            Ok(()) => say(format!("passed  {name}")),
            Err(error) => {
                failed += 1;
                say(format!("FAILED  {name}\n        {error:#}"))
            }
        }
    };
    let elsewhere = (device != Device::Cpu).then_some(&AGAINST_THE_CPU);
    for (name, check) in golden::CHECKS.iter().chain(elsewhere).chain(&GRADIENT_CHECKS) {
        tell(name, check(device))?;
    }
    if let Some(experiment) = experiment {
        for (name, outcome) in reproduce::check(experiment, device, usize::from(args.steps))? {
            tell(&name, outcome)?;
        }
    }
    if failed > 0 {
        bail!("{failed} of {n} checks failed on {}", prepare::device_name(device));
    }
    say(format!("all {n} checks passed"))?;
    Ok(End::Done)
}

/// A small model with three heads, and a batch whose rows have labels for different subsets of the tasks.
struct Setting {
    model: Model,
    tasks: Vec<Task>,
    batch: Batch,
}

/// The size of a setting.
#[derive(Clone, Copy, Debug)]
enum Size {
    Small,
    /// Wider than a kernel's thread block, with more words than the block has threads, 12 tags and character features.
    Large,
}

impl Size {
    fn set(self) -> EncodedSplit {
        // -1 where a row has no label.
        let (lengths, token_ids, classes, slots, pos) = match self {
            Size::Small => (
                vec![5, 3, 1, 4],
                vec![2, 3, 4, 5, 6, 7, 8, 2, 3, 9, 4, 4, 6],
                vec![0, 2, -1, -1],
                vec![-1, -1, -1, -1, -1, 1, 2, 0, 0, 0, 1, 2, 2],
                vec![1, 0, 2, 2, 0, -1, -1, -1, 1, -1, -1, -1, -1],
            ),
            Size::Large => {
                let lengths: Vec<i64> = (0..40).map(|row| 7 + row % 9).collect();
                let words = || (0..40).flat_map(|row| (0..7 + row % 9).map(move |word| (row, word)));
                // Tag 2 (I-x) might continue a span that never began.
                let tag = |row: i32, word: i32| match (3 * row + 5 * word) % 12 {
                    2 => 0,
                    tag => tag,
                };
                (
                    lengths,
                    words().map(|(row, word)| 2 + (row * word + row / 3) % 58).collect(),
                    (0..40).map(|row| if row % 5 == 0 { -1 } else { row % 3 }).collect(),
                    words().map(|(row, word)| if row % 3 == 0 { -1 } else { tag(row, word) }).collect(),
                    words().map(|(row, word)| if row % 4 == 1 { -1 } else { tag(word, row) }).collect(),
                )
            }
        };
        let spelling = |n_forms: usize| Spelling {
            bytes: (0..n_forms)
                .flat_map(|form| {
                    (0..6).map(move |i| if i > form % 6 { 0 } else { 1 + (31 * form + 3 * i) as i16 % 256 })
                })
                .collect(),
            max_bytes: 6,
            token_forms: token_ids.iter().map(|id| id - 2).collect(),
        };
        let spelling = matches!(self, Size::Large).then(|| spelling(58));
        let offsets: Vec<i64> = (0..=lengths.len()).map(|row| lengths[..row].iter().sum()).collect();
        EncodedSplit {
            token_ids,
            token_offsets: offsets.clone(),
            word_offsets: offsets,
            first_tokens: None,
            spelling,
            targets: vec![TargetValues::Classes(classes), TargetValues::Tags(slots), TargetValues::Tags(pos)],
            unseen: Default::default(),
            set_starts: vec![0, lengths.len()],
            places: vec![],
        }
    }
}

impl Setting {
    fn new(device: Device, dropout: f64, size: Size) -> Result<Setting> {
        let set = size.set();
        let (n_tags, dim, n_trained, pooling, characters) = match size {
            Size::Small => (3, 12, 10, "attention", "none"),
            Size::Large => (12, 300, 60, "max", "cnn"),
        };
        let named = |names: &[&str]| -> Vec<String> {
            let more = (names.len()..n_tags).map(|tag| format!("B-{tag}"));
            names.iter().map(|name| (*name).to_owned()).chain(more).collect()
        };
        let spans = TaskKind::Tagging(Scheme::Bio);
        let classes = ["a", "b", "c"].map(str::to_owned).into();
        let tasks = vec![
            Task { name: "topic".into(), kind: TaskKind::Classification, labels: classes },
            Task { name: "slots".into(), kind: spans, labels: named(&["O", "B-x", "I-x"]) },
            Task { name: "pos".into(), kind: TaskKind::Tagging(Scheme::Plain), labels: named(&["x", "y", "z"]) },
        ];
        let heads = [
            json!({"classification": {"set": "s", "column": "a", "pooling": pooling}}),
            json!({"tagging": {"set": "s", "column": "b", "decoder": "crf"}}),
            json!({"tagging": {"set": "s", "column": "c", "scheme": "plain"}}),
        ];
        let heads = heads.into_iter().map(serde_json::from_value).collect::<Result<Vec<HeadConfig>, _>>()?;
        let config: ModelConfig = serde_json::from_value(json!({
            "embedding": {"dim": dim, "characters": {characters: {}}, "dropout": dropout},
            "trunk": {"hidden": 16, "layers": 2, "dropout": dropout},
        }))?;
        let vocabulary = Vocabulary { n_trained, padding: 0, pads: true, unknown: 1, vectors: &[] };
        let model = Model::new(&config, &heads.iter().collect::<Vec<_>>(), &tasks, &vocabulary, (Seed(7), device))?;
        let rows: Vec<usize> = (0..set.len()).collect();
        let batch = DeviceSplit::new(set, 0, device).batch(&rows);
        Ok(Setting { model, tasks, batch })
    }

    /// A forward pass with the same dropout masks each time.
    fn forward(&self) -> (Shared, Vec<Option<Tensor>>) {
        Seed(7).seed_torch(Purpose::Dropout, 0);
        let mode = Mode::Train(Draws::new(7));
        let shared = self.model.encode(&self.batch, &self.batch.token_ids, None, mode);
        let losses = self.model.losses(&shared, &self.batch, mode);
        (shared, losses)
    }

    fn device(&self) -> Device {
        self.batch.token_ids.device()
    }

    fn weights(&self) -> Tensor {
        Tensor::from_slice(&[0.3f32, 1.9, 0.8]).to_device(self.device())
    }

    /// The gradient of sum w L, one tensor per parameter.
    fn plain(&self) -> Result<Vec<Tensor>> {
        let total = weighted_sum(&self.forward().1, &self.weights()).context("no loss")?;
        Ok(Tensor::f_run_backward(&[total], &self.model.parameters.tensors(), false, false)?)
    }

    /// The same gradient, computed by the pass that also takes each task's gradient norm, and the norms.
    fn watched(&self, reference: Reference) -> Result<(Vec<Tensor>, Tensor)> {
        let (shared, losses) = self.forward();
        let backward =
            Backward { model: &self.model, tasks: &self.tasks, reference: Some(reference), halves: false, frozen: &[] };
        let gradients =
            backward.pass(&shared, None, Weighted { losses: &losses, weights: &self.weights(), scale: None })?;
        let norms = gradients.norms(self.device())?;
        Ok((gradients.sum, norms))
    }

    /// The largest difference between the two gradients, relative to the largest absolute value.
    fn difference(&self, reference: Reference) -> Result<f64> {
        let largest = |x: Tensor| x.abs().max().double_value(&[]);
        let (plain, watched) = (self.plain()?, self.watched(reference)?.0);
        let offs: Vec<f64> = plain.iter().zip(&watched).map(|(a, b)| largest(a - b)).collect();
        // `f64::max` would ignore NaN.
        ensure!(offs.iter().all(|off| off.is_finite()), "a gradient is not finite");
        let off = offs.into_iter().fold(0.0, f64::max);
        Ok(off / plain.iter().map(|g| largest(g.shallow_clone())).fold(f64::MIN_POSITIVE, f64::max))
    }
}

fn as_on_the_cpu(device: Device) -> Result<()> {
    for size in [Size::Small, Size::Large] {
        let dropout = if draws_alike(device) { 0.3 } else { 0.0 };
        let (here, there) = (Setting::new(device, dropout, size)?, Setting::new(Device::Cpu, dropout, size)?);
        let weights = there.model.parameters.iter().map(|(name, tensor)| (name.to_owned(), tensor.detach()));
        here.model.parameters.load(weights.collect())?;
        compare(&here, &there).with_context(|| format!("{size:?} setting"))?;
    }
    Ok(())
}

/// Compares the losses and gradients of two settings.
fn compare(here: &Setting, there: &Setting) -> Result<()> {
    let losses = |setting: &Setting| as_vector(&setting.forward().1, setting.device()).to_device(Device::Cpu);
    let all = |gradients: Vec<Tensor>| {
        Tensor::cat(&gradients.iter().map(|gradient| gradient.flatten(0, -1)).collect::<Vec<_>>(), 0)
    };
    // TF32 products have a mantissa of 10 bits.
    let tolerance = 5e-3;
    for (what, ours, theirs) in [
        ("loss", losses(here), losses(there)),
        ("gradient", all(here.plain()?).to_device(Device::Cpu), all(there.plain()?)),
    ] {
        let off = (ours - &theirs).abs().max().double_value(&[]) / theirs.abs().max().double_value(&[]);
        ensure!(off <= tolerance, "a {what} differs by {off:.1e} of its size");
    }
    Ok(())
}

fn no_leak(device: Device) -> Result<()> {
    let setting = Setting::new(device, 0.3, Size::Small)?;
    // The graph is the same, so the gradients must be bit-identical.
    let off = setting.difference(Reference::Representation)?;
    ensure!(off == 0.0, "a gradient differs by {off:.1e} of its size");
    Ok(())
}

fn no_leak_apart(device: Device) -> Result<()> {
    let off = Setting::new(device, 0.3, Size::Small)?.difference(Reference::LastLayer)?;
    // float32 sums in another order; on CUDA, TF32 products with a mantissa of 10 bits.
    let tolerance = if device == Device::Cpu { 1e-5 } else { 5e-3 };
    ensure!(off < tolerance, "a gradient differs by {off:.1e} of its size");
    Ok(())
}

fn norms_are_right(device: Device) -> Result<()> {
    let setting = Setting::new(device, 0.3, Size::Small)?;
    let tolerance = if device == Device::Cpu { 1e-5 } else { 5e-3 };
    for reference in [Reference::Representation, Reference::LastLayer] {
        let norms = setting.watched(reference)?.1;
        for task in 0..setting.tasks.len() {
            let (shared, mut losses) = setting.forward();
            let parameters = setting.model.parameters.tensors();
            let inputs = match reference {
                Reference::Representation => vec![&shared.taps[task][0].1.tokens],
                Reference::LastLayer => parameters[setting.model.last_layer.clone()].to_vec(),
            };
            let loss = losses.swap_remove(task).context("every task is in the batch")?;
            let gradients = Tensor::f_run_backward(&[loss], &inputs, false, false)?;
            let alone = gradients.iter().map(|g| g.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt();
            let found = norms.double_value(&[task as i64]);
            let name = &setting.tasks[task].name;
            ensure!((alone - found).abs() < tolerance * alone, "{reference:?}, {name}: {found} instead of {alone}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_like_itself_and_other_weights_are_told() {
        as_on_the_cpu(Device::Cpu).unwrap();
        let [here, there] = [0, 1].map(|_| Setting::new(Device::Cpu, 0.3, Size::Large).unwrap());
        let weights = here.model.parameters.tensors();
        let _ = tch::no_grad(|| weights[0].shallow_clone().g_add_scalar_(0.5));
        assert!(compare(&here, &there).unwrap_err().to_string().contains(" differs by"));
    }
}
