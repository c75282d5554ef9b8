//! Experiment files: defaults, `extends`, overrides, and errors by file and line.

use anyhow::Result;
use polytask::config::Experiment;
use polytask::model::HeadConfig;

const GOOD: &str = "\
name: demo
data:
  root: /data
  sets:
    snips:
      format: parallel
      train: train
      dev: dev
tasks:
  intent: {type: classification, set: snips, column: label}
  slots: {type: tagging, set: snips, column: seq.out, decoder: crf}
training:
  optimizer: {kind: adamw, learning_rate: 1e-3}
";

fn load(text: &str, overrides: &[&str]) -> Result<Experiment> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("e.yaml");
    std::fs::write(&path, text).unwrap();
    let overrides: Vec<String> = overrides.iter().map(|o| o.to_string()).collect();
    Experiment::load(&path, &overrides)
}

fn check_error(text: &str, expected: &[&str]) {
    let error = load(text, &[]).unwrap_err().to_string();
    for part in expected {
        assert!(error.contains(part), "`{part}` is not in:\n{error}");
    }
}

#[test]
fn defaults_are_filled_in_and_the_resolved_file_reads_back_the_same() {
    let experiment = load(GOOD, &["seed=5", "model.trunk.hidden=64"]).unwrap();
    assert_eq!((experiment.seed, experiment.model.trunk.hidden, experiment.tasks.len()), (5, 64, 2));
    let yaml = experiment.to_yaml().unwrap();
    for part in ["strategy: equal", "type: tagging", "constraints: true"] {
        assert!(yaml.contains(part), "{yaml}");
    }
    assert_eq!(load(&yaml, &[]).unwrap().to_yaml().unwrap(), yaml);
    for (scheme, expected) in [("bioes", "decoder: crf"), ("plain", "decoder: softmax")] {
        let text = GOOD.replace("decoder: crf", &format!("scheme: {scheme}"));
        let yaml = load(&text, &[]).unwrap().to_yaml().unwrap();
        assert!(yaml.contains(expected), "{scheme}: {yaml}");
    }
}

#[test]
fn a_kind_may_stand_alone_or_be_the_default() {
    let short = load(GOOD, &["weighting=gradnorm", "tokenizer.lowercase=true", "model.embedding.characters=none"]);
    let long = load(
        GOOD,
        &[
            "weighting={strategy: gradnorm}",
            "tokenizer={model: word, lowercase: true}",
            "model.embedding.characters.kind=none",
        ],
    );
    assert_eq!(short.unwrap().to_yaml().unwrap(), long.unwrap().to_yaml().unwrap());
    check_error(&(GOOD.to_owned() + "weighting: {alpha: 1}\n"), &["e.yaml:14: weighting: missing key `strategy`"]);
}

#[test]
fn every_error_is_told_at_once_with_its_line_and_the_nearest_key() {
    let text = GOOD.replace("seq.out, decoder: crf", "seq.out, decoder: crv, shceme: bio")
        + "  bach_size: 3\n  max_epochs: many\n  learning_rate: 1\n  epochs: 3\nweighting: {strategy: equall}\n";
    check_error(
        &text,
        &[
            "e.yaml:11: tasks.slots: unknown key `shceme`; did you mean `scheme`?",
            "e.yaml:11: tasks.slots.decoder: unknown value `crv`; did you mean `crf`?",
            "e.yaml:14: training: unknown key `bach_size`; did you mean `batch_size`?",
            "e.yaml:15: training.max_epochs: expected a whole number, found the text \"many\"",
            "e.yaml:16: training: unknown key `learning_rate`; it is a key of training.optimizer",
            "e.yaml:17: training: unknown key `epochs`; did you mean `max_epochs` or `freeze_epochs`?",
            "e.yaml:18: weighting.strategy: unknown value `equall`; did you mean `equal`?",
        ],
    );
}

#[test]
fn what_is_missing_or_does_not_fit_is_named() {
    check_error(&GOOD.replace(", column: label", ""), &["e.yaml:10: tasks.intent: missing key `column`"]);
    check_error(
        &GOOD.replace("type: classification, ", ""),
        &["tasks.intent: missing key `type`: expected one of classification"],
    );
    check_error(
        &GOOD.replace("set: snips, column: label", "set: snaps, column: label"),
        &["e.yaml:10: tasks.intent.set: no set `snaps`; did you mean `snips`?"],
    );
    check_error(&GOOD.replace("      dev: dev\n", ""), &["e.yaml:5: data.sets.snips: give `dev:` or `dev_fraction:`"]);
    check_error(
        &GOOD.replace("learning_rate: 1e-3", "learning_rate: -1"),
        &["e.yaml:13: training.optimizer.learning_rate: must be more than 0"],
    );
    let apart = GOOD
        .replace("tasks:\n", "    other: {format: parallel, train: train, dev: dev}\ntasks:\n")
        .replace("slots: {type: tagging, set: snips", "slots: {type: tagging, set: other");
    for strategy in ["gradnorm", "uncertainty_softmax"] {
        check_error(
            &format!("{apart}  sampling: {{strategy: round_robin}}\nweighting: {{strategy: {strategy}}}\n"),
            &[&format!("e.yaml:16: weighting: {strategy} balances the tasks within a step")],
        );
    }
    check_error(
        &GOOD.replace("label}", "label, inputs: [trunk, trunk]}"),
        &["tasks.intent.inputs: list each only once"],
    );
    let seen = |intent: &str, slots: &str| {
        GOOD.replace("label}", &format!("label, inputs: [{intent}]}}"))
            .replace("decoder: crf}", &format!("decoder: crf, inputs: [{slots}]}}"))
    };
    check_error(
        &seen("trunk, slots", "trunk, intent"),
        &[
            "e.yaml:10: tasks.intent.inputs: a head must not read itself, directly or through other heads",
            "e.yaml:11: tasks.slots.inputs: a head must not read itself",
        ],
    );
    check_error(
        &seen("intents", "trunk, intnet"),
        &["tasks.intent.inputs: must include `trunk`", "no task `intnet`; did you mean `intent`?"],
    );
    check_error(
        &(GOOD
            .replace("label}", "label, layer: 2}")
            .replace(", decoder: crf}", ", label_smoothing: 0.1, class_weights: balanced, missed_cost: -1}")
            + "  freeze_epochs: {trnk: 1, trunk.l1: 1, heads.intnt: 1}\ntokenizer: {model: bpe}\n"
            + "model: {embedding: {dim: 0, characters: {kind: cnn, width: 2}, vectors: [{file: v}]}}\n"),
        &[
            "e.yaml:10: tasks.intent.layer: the trunk's last layer is 1",
            "e.yaml:11: tasks.slots.label_smoothing: needs `decoder: softmax`",
            "e.yaml:11: tasks.slots.class_weights: needs `decoder: softmax`",
            "e.yaml:11: tasks.slots.missed_cost: must be at least 0",
            "training.freeze_epochs.trnk: no part `trnk`; did you mean `trunk`?",
            "training.freeze_epochs.trunk.l1: the trunk's last layer is l0",
            "training.freeze_epochs.heads.intnt: no task `intnt`; did you mean `intent`?",
            "model.embedding.vectors: pretrained vectors need",
            "model.embedding.characters.width: must be odd",
        ],
    );
    check_error(
        &(GOOD.to_owned() + "  sampling: {kind: temperature, temprature: 2}\n"),
        &[
            "training.sampling: unknown key `kind`; did you mean `strategy`?",
            "unknown key `temprature`; expected one of strategy",
        ],
    );
    // One error does not cause another.
    let told = load(&GOOD.replace("dev: dev", "dev_fraction: 10%"), &[]).unwrap_err().to_string();
    assert!(told.contains("expected a number") && !told.contains("give `dev:`"), "{told}");
    for (metric, expected) in [
        ("intnt", "no task `intnt`; did you mean `intent`?"),
        ("slots.macro_f1", "`slots` has no score `macro_f1`; expected one of f1, precision"),
        ("mean.loss", "`mean` is a single score"),
    ] {
        let path = "training.early_stopping.metric";
        let text = format!("{GOOD}  early_stopping: {{metric: {metric}}}\n");
        check_error(&text, &[&format!("e.yaml:14: {path}: {expected}")]);
    }
    check_error("name: [", &["e.yaml:2: did not find expected node content"]);
}

#[test]
fn what_yaml_allows_and_we_do_not_is_named_by_line() {
    let with = |line: &str| format!("{GOOD}{line}\n");
    let list = "expected a mapping of keys to values, found a list";
    for (text, expected) in [
        (
            with("x-mine: &mine {hidden: oops}\nmodel: {trunk: {<<: *mine, layers: 1}}"),
            "trunk.hidden: expected a".into(),
        ),
        (
            GOOD.replace("1e-3", "1e-3, betas: [0.9]"),
            "e.yaml:13: training.optimizer.betas: expected a list of 2".into(),
        ),
        (with("model: {trunk: {<<: 3}}"), "e.yaml:14: model.trunk.<<: can merge only mappings, as in <<: *name".into()),
        (with("model: {trunk: [64, 2]}"), format!("e.yaml:14: model.trunk: {list}")),
        (
            with("study: {seeds: [1], strategies: {dwa: [3]}}"),
            "e.yaml:14: study.strategies.dwa: expected a name or".into(),
        ),
        (
            GOOD.replace("decoder: crf", "decoder: [crf]"),
            "e.yaml:11: tasks.slots.decoder: expected a name, found".into(),
        ),
        (
            with("study: {seeds: [1], strategies: {a: {strategy: dwa, temperature: {}}}}"),
            "temperature: expected a number".into(),
        ),
        (with("model: {trunk: [lstm, 2]}"), format!("e.yaml:14: model.trunk: {list}")),
        (with("model: {trunk: []}"), format!("e.yaml:14: model.trunk: {list}")),
        (with("weighting: [a]"), "e.yaml:14: weighting: expected a name or a mapping, found a list".into()),
        (with("name: b"), "e.yaml:14: name is already defined in line 1".into()),
        (
            with("model: {trunk: {layers: 1, layers: 2}}"),
            "e.yaml:14: model.trunk.layers is already defined in line 14".into(),
        ),
        (with("'data.root': a\nseed: 1\nseed: 2"), "e.yaml:16: seed is already defined in line 15".into()),
        (with("seed: 99999999999999999999999"), "e.yaml:14: seed: 99999999999999999999999 is too large".into()),
        (with("  clip_norm: .nan"), "e.yaml:14: training.clip_norm: .nan is not a finite number".into()),
        (with("  clip_norm: !a 3"), "e.yaml:14: training.clip_norm: YAML tags such as !a".into()),
        (
            GOOD.replace("  intent:", "  in.tent:"),
            "e.yaml:10: tasks.in.tent: `in.tent`: names must not contain dots".into(),
        ),
    ] {
        check_error(&text, &[&expected]);
    }
}

#[test]
fn merged_keys_keep_their_order_and_give_way_to_a_mapping_s_own() {
    let tasks = "  intent: {type: classification, set: snips, column: label}\n";
    let text = GOOD.replace(
        "tasks:\n",
        "x-a: &a {type: classification, set: snips}\nx-b: &b {<<: *a, hidden: 3}\n\
        x-t: &t {first: {<<: *b, column: x}}\ntasks:\n  <<: *t\n",
    );
    let text = text.replace(tasks, "  intent: {<<: [*b, {hidden: 9, pooling: mean}], column: label}\n");
    let experiment = load(&text, &[]).unwrap();
    assert_eq!(experiment.tasks.keys().collect::<Vec<_>>(), ["first", "intent", "slots"]);
    let HeadConfig::Classification(intent) = &experiment.tasks["intent"] else { panic!() };
    assert_eq!((intent.hidden, format!("{:?}", intent.pooling).as_str()), (3, "Mean"));
}

#[test]
fn files_extend_others_and_a_new_kind_replaces_the_old_options() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("base.yaml"), GOOD.replace("1e-3", "oops")).unwrap();
    let child = folder.path().join("child.yaml");
    std::fs::write(&child, "extends: base.yaml\ntraining: {optimizer: {kind: sgd, momentum: 0.5}}\n").unwrap();
    let experiment = Experiment::load(&child, &[]).unwrap();
    assert_eq!(experiment.training.optimizer.learning_rate(), 0.1);
    // Naming the kind that the base uses, even by default, keeps the base's options.
    for kinds in ["optimizer: {learning_rate: 0.05}", "optimizer: {kind: adamw, learning_rate: 0.05}"] {
        let base = GOOD.replace("optimizer: {kind: adamw, learning_rate: 1e-3}", kinds);
        std::fs::write(folder.path().join("base.yaml"), base).unwrap();
        std::fs::write(&child, "extends: base.yaml\ntraining: {optimizer: {kind: adamw, weight_decay: 0}}\n").unwrap();
        assert_eq!(Experiment::load(&child, &[]).unwrap().training.optimizer.learning_rate(), 0.05);
    }
    let study = "study: {seeds: [1], strategies: {gradnorm: {";
    std::fs::write(folder.path().join("base.yaml"), format!("{GOOD}{study}alpha: 0.7}}}}}}\n")).unwrap();
    std::fs::write(&child, format!("extends: base.yaml\n{study}strategy: gradnorm, floor: 0.5}}}}}}\n")).unwrap();
    let resolved = Experiment::load(&child, &[]).unwrap().to_yaml().unwrap();
    assert!(resolved.contains("alpha: 0.7") && resolved.contains("floor: 0.5"), "{resolved}");
    std::fs::write(folder.path().join("base.yaml"), format!("extends: ./child.yaml\n{GOOD}")).unwrap();
    let error = Experiment::load(&child, &[]).unwrap_err().to_string();
    assert!(error.contains("base.yaml:1: extends: ") && error.contains("child.yaml extends itself"), "{error}");
    std::fs::write(folder.path().join("base.yaml"), GOOD.replace("1e-3", "oops")).unwrap();
    std::fs::write(&child, "extends: base.yaml\nseed: x\n").unwrap();
    let error = Experiment::load(&child, &[]).unwrap_err().to_string();
    assert!(error.contains("base.yaml:13") && error.contains("child.yaml:2"), "{error}");
}

#[test]
fn overrides_are_checked_like_the_file() {
    let error = load(GOOD, &["model.trunk.hiden=3"]).unwrap_err().to_string();
    assert!(
        error.contains("--set model.trunk.hiden=3: model.trunk: unknown key `hiden`; did you mean `hidden`?"),
        "{error}"
    );
    let text = load(GOOD, &["data.sets.snipz.test=x"]).unwrap_err().to_string();
    assert!(text.starts_with("--set data.sets.snipz.test=x: data.sets.snipz: missing key"), "{text}");
    assert!(text.contains("did you mean `snips`?"), "{text}");
    let text = load(GOOD, &["model.trunk={hidden: 0}"]).unwrap_err().to_string();
    assert!(text.starts_with("--set model.trunk={hidden: 0}: model.trunk.hidden: must be"), "{text}");
    assert_eq!(load(&format!("\u{feff}{GOOD}"), &[]).unwrap().name, "demo");
    // A missing key is reported at its mapping in the file, not at the override.
    let lacking = GOOD.replace("      format: parallel\n", "");
    let text = load(&lacking, &["data.sets.snips.test=x"]).unwrap_err().to_string();
    assert!(text.contains("e.yaml:5: data.sets.snips: missing key `format`"), "{text}");
    let vectors = "model.embedding.vectors=[{file: a}, {file: b}]";
    let experiment = load(GOOD, &[vectors, "model.embedding.vectors.1.trainable=false"]).unwrap();
    let tuned: Vec<bool> = experiment.model.embedding.vectors.iter().map(|vectors| vectors.trainable).collect();
    assert_eq!(tuned, [true, false]);
    let kinds =
        ["training.optimizer=sgd", "training.optimizer.momentum=0.5", "weighting=dwa", "weighting.temperature=3"];
    let resolved = load(GOOD, &kinds).unwrap().to_yaml().unwrap();
    assert!(resolved.contains("kind: sgd") && resolved.contains("momentum: 0.5"), "{resolved}");
    assert!(resolved.contains("strategy: dwa") && resolved.contains("temperature: 3"), "{resolved}");
    assert!(load(GOOD, &["seed="]).unwrap_err().to_string().contains("--set seed=: no value"));
    for wrong in ["model.embedding.vectors.2.trainable=false", "model.embedding.vectors={}"] {
        let error = load(GOOD, &[vectors, wrong]).unwrap_err().to_string();
        assert!(error.contains("model.embedding.vectors: expected a list"), "{error}");
    }
}
