//! Our files in Python: the tokenizer gives the same ids, TensorBoard reads its files, safetensors the checkpoints.
//! `scripts/test` makes the environment that POLYTASK_TEST_PYTHON names.

use std::process::Command;

use crate::util::{Folder, small};

pub fn python(folder: &Folder, program: &str) -> String {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/.python/bin/python");
    let python = std::env::var("POLYTASK_TEST_PYTHON").unwrap_or(default.to_owned());
    let output = Command::new(&python).current_dir(folder.path()).args(["-c", program]).output();
    let output = output.unwrap_or_else(|error| panic!("{python}: {error}; run the tests with scripts/test"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn tensorboard_and_safetensors_read_what_a_run_wrote() {
    let folder = small();
    folder.polytask(&["train", "small.yaml", "--out", "run"]).assert().success();
    let program = "
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
import json, safetensors.numpy as st
events = EventAccumulator('run'); events.Reload()
last = [json.loads(line) for line in open('run/metrics.jsonl') if '\"kind\":\"dev\"' in line][-1]
scalar = events.Scalars('dev/slots/f1')[-1]
assert scalar.step == last['step'] and abs(scalar.value - last['slots']['f1']) < 1e-6, (scalar, last)
assert {'train/loss/topic', 'train/weight/slots', 'train/gradient_norm', 'train/learning_rate'} <= set(events.Tags()['scalars'])
weights = st.load_file('run/checkpoints/best.safetensors')
print(sorted(weights)[0], weights['model/trunk.weight_ih_l0_reverse'].shape)
";
    assert_eq!(python(&folder, program).trim(), "model/embedding.weight (40, 12)");
}

#[test]
fn the_saved_tokenizer_gives_the_same_ids_in_python() {
    for tokenizer in [
        "{model: word, lowercase: true, fold_digits: true, split: punctuation}",
        "{model: word, split: character}",
        "{model: bpe, size: 120}",
        "{model: wordpiece, size: 120, lowercase: true}",
        "{model: unigram, size: 120}",
    ] {
        let folder = small();
        let set = format!("tokenizer={tokenizer}");
        folder
            .polytask(&["train", "small.yaml", "--out", "run", "--set", &set, "--set", "training.max_epochs=1"])
            .assert()
            .success();
        let sentences = ["Play the rock, don't stop 42!", "cook bowl 北京 soup", "x"];
        let config = polytask::config::Experiment::load(&folder.path().join("run/resolved.yaml"), &[]).unwrap();
        let json = folder.read("run/tokenizer.json");
        let splitter = config.tokenizer.splitter();
        let ours = polytask::data::Tokenizer::from_json(json.as_bytes(), splitter).unwrap();
        let task: [polytask::task::Task; 0] = [];
        let mut expected = Vec::new();
        for sentence in sentences {
            let words: Vec<&str> = splitter.split(sentence).into_iter().map(|(a, b)| &sentence[a..b]).collect();
            let set = polytask::data::EncodedSet::of_words(&[words], &ours, &task).unwrap();
            expected.push(set.token_ids);
        }
        let program = format!(
            "from tokenizers import Tokenizer\nt = Tokenizer.from_file('run/tokenizer.json')\nprint([t.encode(s).ids for s in {sentences:?}])"
        );
        assert_eq!(python(&folder, &program).trim(), format!("{expected:?}"), "{tokenizer}");
    }
}
