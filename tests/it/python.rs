//! polytask's files in Python: the tokenizer gives the same ids, TensorBoard reads its event files, safetensors the
//! checkpoints.
//! `scripts/test` creates the Python environment in .python/; POLYTASK_TEST_PYTHON names another interpreter.

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
        let ours = polytask::data::Tokenizer::from_json(json.as_bytes(), splitter, None).unwrap();
        let task: [polytask::task::Task; 0] = [];
        let mut expected = Vec::new();
        for sentence in sentences {
            let words: Vec<&str> = splitter.split(sentence).into_iter().map(|(a, b)| &sentence[a..b]).collect();
            let set = polytask::data::EncodedSplit::of_words(&[words], &ours, &task).unwrap();
            expected.push(set.token_ids);
        }
        let program = format!(
            "from tokenizers import Tokenizer\nt = Tokenizer.from_file('run/tokenizer.json')\nprint([t.encode(s).ids for s in {sentences:?}])"
        );
        assert_eq!(python(&folder, &program).trim(), format!("{expected:?}"), "{tokenizer}");
    }
}

#[test]
fn the_schema_takes_what_experiments_may_hold() {
    let folder = Folder::new();
    let schema = folder.polytask(&["options", "--schema"]).assert().success().get_output().stdout.clone();
    folder.file("schema.json", schema);
    let root = env!("CARGO_MANIFEST_DIR");
    let program = format!(
        "
import glob, json, jsonschema, yaml
schema = json.load(open('schema.json'))
jsonschema.Draft7Validator.check_schema(schema)
valid = jsonschema.Draft7Validator(schema).is_valid
files = glob.glob('{root}/experiments/*.yaml') + glob.glob('{root}/benches/*.yaml')
assert len(files) > 15
for file in files:
    jsonschema.validate(yaml.safe_load(open(file)), schema)
for good in ['weighting: gradnorm', 'weighting: {{strategy: gradnorm, alpha: 1}}', 'training: {{optimizer: {{weight_decay: 0}}}}',
             'tasks: {{a: {{set: [b, c]}}}}', 'study: {{strategies: {{equal: {{}}, mine: gradnorm}}}}']:
    assert valid(yaml.safe_load(good)), good
for bad in ['weighting: gradnrom', 'weighting: {{strategy: gradnorm, alfa: 1}}', 'training: {{batch_size: many}}', 'model: {{trunk: {{layer: 2}}}}',
            'tasks: {{a: {{type: tagging, pooling: max}}}}', 'model: {{embedding: {{vectors: [{{fil: x}}]}}}}']:
    assert not valid(yaml.safe_load(bad)), bad
"
    );
    python(&folder, &program);
}
