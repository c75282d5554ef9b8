//! Agreement with PyTorch on embedding, characters, BiLSTM, CRF, classification and 20 AdamW steps; see
//! fixtures/make_parity.py.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::util::DRAWS;
use polytask::data::{DeviceSplit, EncodedSplit, Spelling, TargetValues};
use polytask::libtorch::{GradScale, clip_gradients};
use polytask::model::{EmbeddingConfig, HeadConfig, Mode, Model, ModelConfig, TrunkConfig, Vocabulary};
use polytask::optim::{Optimizer, OptimizerConfig};
use polytask::rng::Seed;
use polytask::task::{Scheme, Task, TaskKind};
use serde_json::json;
use tch::{Device, Kind, Tensor};

/// For float32 sums in another order, over 20 steps.
const TOLERANCE: f64 = 1e-5;
/// AdamW divides gradients by their size, so that rounding of those near 0 counts more.
const TOLERANCE_OF_WEIGHTS: f64 = 1e-4;

fn close(name: &str, ours: &Tensor, theirs: &Tensor, tolerance: f64) {
    let off = (ours - theirs).abs().max().double_value(&[]);
    assert!(off < tolerance, "{name} is off by {off}");
}

#[test]
fn model_gradients_and_twenty_steps_agree_with_pytorch() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity.safetensors");
    let fixture: BTreeMap<String, Tensor> = Tensor::read_safetensors(path).unwrap().into_iter().collect();
    let numbers = |name: &str| -> Vec<i64> { Vec::try_from(fixture[name].flatten(0, -1)).unwrap() };
    let of = |prefix: &str| -> BTreeMap<String, Tensor> {
        let named = fixture.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?, tensor)));
        named.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone())).collect()
    };

    let lengths = numbers("input.lengths");
    let mut offsets = vec![0];
    for n in &lengths {
        offsets.push(offsets[offsets.len() - 1] + n);
    }
    let flat = |name: &str| -> Vec<i32> {
        let all = numbers(name);
        let row = |(b, &n): (usize, &i64)| all[b * 5..b * 5 + n as usize].to_vec();
        lengths.iter().enumerate().flat_map(row).map(|id| id as i32).collect()
    };
    let classes = numbers("input.classes").into_iter().map(|id| id as i32).collect();
    let set = EncodedSplit {
        token_ids: flat("input.ids"),
        token_offsets: offsets.clone(),
        word_offsets: offsets,
        first_tokens: None,
        spelling: Some(Spelling {
            bytes: numbers("input.spelling").into_iter().map(|byte| byte as i16).collect(),
            max_bytes: 7,
            token_forms: flat("input.ids"),
        }),
        targets: vec![TargetValues::Classes(classes), TargetValues::Tags(flat("input.tags"))],
        unseen: Default::default(),
        set_starts: vec![0, 4],
        places: vec![],
    };
    let data = DeviceSplit::new(set, 0, Device::Cpu);
    let batch = data.batch(&[0, 1, 2, 3]);

    let labels = |n: usize| (0..n).map(|i| format!("l{i}")).collect::<Vec<_>>();
    let tasks = [
        Task { name: "topic".into(), kind: TaskKind::Classification, labels: labels(4) },
        Task { name: "slots".into(), kind: TaskKind::Tagging(Scheme::Plain), labels: labels(5) },
    ];
    let topic = json!({"classification": {"set": "s", "column": "c", "pooling": "max"}});
    let slots = json!({"tagging": {"set": "s", "column": "t", "scheme": "plain", "decoder": "crf"}});
    let [topic, slots] = [topic, slots].map(|head| serde_json::from_value::<HeadConfig>(head).unwrap());
    let config = ModelConfig {
        embedding: EmbeddingConfig {
            dim: 6,
            dropout: 0.0,
            characters: serde_json::from_value(json!({"cnn": {"dim": 3, "filters": 4, "width": 3}})).unwrap(),
            ..Default::default()
        },
        trunk: TrunkConfig { hidden: 5, layers: 2, dropout: 0.0, ..Default::default() },
    };
    let vocabulary = Vocabulary { n_trained: 11, padding: 0, pads: true, unknown: 1, vectors: &[] };
    let model = Model::new(&config, &[&topic, &slots], &tasks, &vocabulary, (Seed(1), Device::Cpu)).unwrap();
    model.parameters.load(of("before.")).unwrap();

    let encoded = model.encode(&batch, &batch.token_ids, None, Mode::Train(DRAWS));
    let mask = batch.lengths.mask().unsqueeze(-1).to_kind(Kind::Float);
    close("states", &(&encoded.taps[0][0].1.tokens * mask), &fixture["states"], TOLERANCE);

    // As in torch.optim.AdamW, biases and embeddings decay too.
    let adamw: OptimizerConfig = serde_json::from_value(json!({"adamw": {"decay_all": true}})).unwrap();
    let mut optimizer = Optimizer::new(&adamw, model.parameters.iter());
    for step in 0..20 {
        let encoded = model.encode(&batch, &batch.token_ids, None, Mode::Train(DRAWS));
        let losses: Vec<Tensor> = model.losses(&encoded, &batch, Mode::Train(DRAWS)).into_iter().flatten().collect();
        let gradients = Tensor::run_backward(&[&losses[0] + &losses[1]], &model.parameters.tensors(), false, false);
        let (norm, divisor) = clip_gradients(&gradients.iter().collect::<Vec<_>>(), None, 1.0, None).unwrap();
        let divisor = divisor.unwrap();
        if step == 0 {
            // They are scaled in place.
            let places: BTreeSet<_> = gradients.iter().map(Tensor::data_ptr).collect();
            assert_eq!(places.len(), gradients.len(), "gradients share memory");
            let theirs = of("gradient.");
            for ((name, _), gradient) in model.parameters.iter().zip(&gradients) {
                close(name, &(gradient / &divisor), &theirs[name], TOLERANCE);
            }
        }
        let never = Tensor::from(0.0f32);
        let grad_scale = GradScale { divisor: Some(&divisor), ..GradScale::from(&never) };
        optimizer.step(&gradients, None, 1e-2, grad_scale).unwrap();
        let ours = Tensor::stack(&[losses[0].detach(), losses[1].detach(), norm], 0);
        let name = format!("losses and gradient norm of step {step}");
        close(&name, &ours, &fixture["losses"].get(step), TOLERANCE);
    }
    let theirs = of("after.");
    for (name, tensor) in model.parameters.iter() {
        close(name, tensor, &theirs[name], TOLERANCE_OF_WEIGHTS);
    }
}
