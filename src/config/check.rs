//! Checks that types cannot express: ranges, names that must exist, options that need each other.

mod training;

use std::collections::BTreeSet;

use anyhow::Result;

use super::decode::suggestion;
use super::source::SourceTree;
use super::{Experiment, StudyConfig, schema};
use crate::data::{Format, SamplingConfig, SetConfig, TokenizerConfig};
use crate::model::heads::Decoder;
use crate::model::{CharactersConfig, ClassWeights, HeadConfig};
use crate::problem::{Problem, Severity};
use crate::weighting::{FixedConfig, InitialLoss, WeightingConfig};

/// Keys that appear next to task names in predictions and records.
const WRITTEN: [&str; 7] = ["text", "words", "place", "kind", "step", "epoch", "sentence_accuracy"];

/// Attributes that every TorchScript module has.
const SCRIPT: [&str; 2] = ["training", "forward"];

/// Python's keywords.
const PYTHON: [&str; 32] = [
    "and", "as", "assert", "async", "await", "break", "class", "continue", "def", "del", "elif", "else", "except",
    "finally", "for", "from", "global", "if", "import", "in", "is", "lambda", "nonlocal", "not", "or", "pass", "raise",
    "return", "try", "while", "with", "yield",
];

struct Checker<'a> {
    tree: &'a SourceTree,
    problems: Vec<Problem>,
}

impl Checker<'_> {
    fn error(&mut self, path: &str, message: impl AsRef<str>) {
        let place = self.tree.place(path);
        let message = format!("{path}: {}", message.as_ref());
        self.problems.push(Problem { severity: Severity::Error, place, message });
    }

    fn require(&mut self, path: &str, holds: bool, message: &str) {
        if !holds {
            self.error(path, message);
        }
    }
}

/// All problems of an experiment that could be read into its types.
pub fn check(experiment: &Experiment, tree: &SourceTree) -> Result<Vec<Problem>> {
    let mut c = Checker { tree, problems: Vec::new() };
    for (path, range) in schema::out_of_range(&experiment.to_value()?) {
        c.error(&path, format!("must be {range}"));
    }
    let name_ok = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let name = &experiment.name;
    c.require(
        "name",
        name.chars().all(name_ok) && name.starts_with(|c: char| c.is_ascii_alphanumeric()),
        "use letters, digits, `-`, `_` and `.`, beginning with a letter or digit",
    );
    // As in the file: a mapping whose invalid entries were removed is not empty there.
    let empty = |at: &str| tree.value.pointer(at).and_then(|map| map.as_object()).is_none_or(|map| map.is_empty());
    c.require("data.sets", !empty("/data/sets"), "give at least one set");
    for (name, set) in &experiment.data.sets {
        let path = format!("data.sets.{name}");
        let valid = name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
        c.require(&path, valid && !name.is_empty(), "use letters, digits, `-` and `_` in the names of sets");
        check_set(&mut c, &path, set);
    }
    c.require("tasks", !empty("/tasks"), "give at least one task");
    for (name, head) in &experiment.tasks {
        check_task(&mut c, name, head, experiment);
    }
    check_embedding(&mut c, experiment);
    check_weighting(&mut c, "weighting", &experiment.weighting, experiment);
    if let Some(study) = &experiment.study {
        check_study(&mut c, study, experiment);
    }
    training::check_training(&mut c, experiment);
    Ok(c.problems)
}

fn check_set(c: &mut Checker, path: &str, set: &SetConfig) {
    match set.dev_fraction {
        None => {
            let written = c.tree.value.pointer(&format!("/{}/dev_fraction", path.replace('.', "/")));
            c.require(
                path,
                set.dev.is_some() || written.is_some(),
                "give `dev:` or `dev_fraction:` (0.1, say; 0 trains without dev)",
            );
        }
        Some(_) => {
            c.require(&format!("{path}.dev_fraction"), set.dev.is_none(), "give `dev:` or `dev_fraction:`, not both");
        }
    }
    let both = set.stratify.is_some() && set.stratify_tags.is_some();
    c.require(&format!("{path}.stratify_tags"), !both, "give `stratify:` or `stratify_tags:`, not both");
    let both = set.text.is_some() && set.tokens.is_some();
    c.require(&format!("{path}.text"), !both, "give `text:` or `tokens:`, not both");
    if set.known_encoding().is_none() {
        let message = format!("unknown encoding `{}`; some are utf-8, latin1, windows-1252 and utf-16le", set.encoding);
        c.error(&format!("{path}.encoding"), message);
    }
    let has_columns = !set.columns.is_empty();
    match set.format {
        Format::Lines => c.require(path, set.columns.len() > 1, "format `lines` needs `columns:` (two or more)"),
        Format::Conll | Format::Csv | Format::Tsv => {}
        _ => c.require(&format!("{path}.columns"), !has_columns, "applies only to conll, lines, csv and tsv"),
    }
    let one = |separator: &String| match set.format {
        Format::Csv | Format::Tsv => separator.len() == 1,
        _ => !separator.is_empty(),
    };
    c.require(
        &format!("{path}.separator"),
        set.separator.as_ref().is_none_or(one),
        "must be one ASCII character for csv and tsv, and not empty",
    );
    let quoted = matches!(set.format, Format::Csv | Format::Tsv);
    c.require(&format!("{path}.quotes"), set.quotes || quoted, "applies only to csv and tsv");
    let json = matches!(set.format, Format::Jsonl | Format::Json | Format::Rasa);
    c.require(&format!("{path}.offsets"), set.offsets.are_characters() || json, "applies only to JSON");
    let separated = matches!(set.format, Format::Conll | Format::Lines | Format::Csv | Format::Tsv);
    c.require(&format!("{path}.separator"), set.separator.is_none() || separated, "does not apply to this format");
    let needs_words = matches!(set.format, Format::Conll | Format::Conllu);
    c.require(
        &format!("{path}.text"),
        !(needs_words && set.text.is_some()),
        "this format contains words: use `tokens:`",
    );
    for (split, paths) in [("train", Some(&set.train)), ("dev", set.dev.as_ref()), ("test", set.test.as_ref())] {
        c.require(&format!("{path}.{split}"), paths.is_none_or(|paths| !paths.0.is_empty()), "give at least one file");
    }
}

fn check_task(c: &mut Checker, name: &str, head: &HeadConfig, experiment: &Experiment) {
    let path = format!("tasks.{name}");
    let valid = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    c.require(&path, valid, "a task's name must match [a-z][a-z0-9_]*");
    c.require(&path, name != "mean", "`mean` is reserved for the mean of the tasks");
    c.require(&path, name != "trunk", "`trunk` is reserved for the shared trunk");
    c.require(&path, !WRITTEN.contains(&name), "has another meaning in output files, so no task can have this name");
    let words = PYTHON.iter().chain(&SCRIPT);
    c.require(
        &path,
        !words.into_iter().any(|word| *word == name),
        "is a reserved word in TorchScript, to which models are exported",
    );
    // As in the file: a set that was removed for its own errors is still known.
    let written = c.tree.value.pointer("/data/sets").and_then(|sets| sets.as_object());
    let known: Vec<String> = written.map_or(Vec::new(), |sets| sets.keys().cloned().collect());
    let known: Vec<&str> = known.iter().map(String::as_str).collect();
    c.require(&format!("{path}.set"), !head.sets().is_empty(), "give at least one set");
    let distinct = |labels: &Vec<String>| labels.iter().collect::<BTreeSet<_>>().len() == labels.len();
    let named = head.labels().is_none_or(|labels| !labels.is_empty() && distinct(labels));
    c.require(&format!("{path}.labels"), named, "give at least one, and each only once");
    for set in head.sets() {
        if !known.contains(&set.as_str()) {
            c.error(&format!("{path}.set"), format!("no set `{set}`{}", suggestion(set, &known)));
        } else if let Some(config) = experiment.data.sets.get(set) {
            let tags = matches!(head, HeadConfig::Tagging(_));
            let raw = tags && config.format == Format::Parallel && config.text.is_some();
            c.require(&format!("{path}.set"), !raw, "tags need words: give the set `tokens:` instead of `text:`");
        }
    }
    check_reads(c, &path, name, head, experiment);
    if let HeadConfig::Tagging(config) = head {
        let can = config.can_constrain() || !config.constrained();
        c.require(&format!("{path}.constraints"), can, "needs `decoder: crf` and a scheme with spans");
        let can = config.decoder() == Decoder::Softmax || config.label_smoothing == 0.0;
        c.require(&format!("{path}.label_smoothing"), can, "needs `decoder: softmax`");
        let can = config.decoder() == Decoder::Softmax || config.class_weights == ClassWeights::Equal;
        c.require(&format!("{path}.class_weights"), can, "needs `decoder: softmax`");
        let can = head.kind().has_spans() || config.missed_cost == 0.0;
        c.require(&format!("{path}.missed_cost"), can, "needs a scheme with spans");
    }
}

/// A head must read the trunk, an existing layer of it, and only heads that do not read it in turn.
fn check_reads(c: &mut Checker, path: &str, name: &str, head: &HeadConfig, experiment: &Experiment) {
    let inputs = format!("{path}.inputs");
    c.require(&inputs, head.reads_trunk(), "must include `trunk`");
    let known: Vec<&str> = experiment.tasks.keys().map(String::as_str).collect();
    for other in head.other_inputs() {
        if !known.contains(&other) {
            c.error(&inputs, format!("no task `{other}`{}", suggestion(other, &known)));
        }
    }
    let mut others: Vec<&str> = head.inputs().iter().map(String::as_str).collect();
    others.sort_unstable();
    c.require(&inputs, others.windows(2).all(|pair| pair[0] != pair[1]), "list each only once");
    // All heads that it reads, directly or through others.
    let mut seen: Vec<&str> = head.other_inputs().collect();
    let mut next = 0;
    while let Some(&other) = seen.get(next) {
        let further = experiment.tasks.get(other).into_iter().flat_map(HeadConfig::other_inputs);
        let further: Vec<&str> = further.filter(|further| !seen.contains(further)).collect();
        seen.extend(further);
        next += 1;
    }
    c.require(&inputs, !seen.contains(&name), "a head must not read itself, directly or through other heads");
    let reads = head.reads(&[]);
    let layers = experiment.model.trunk.layers;
    c.require(&format!("{path}.layer"), reads.layer <= layers, &format!("the trunk's last layer is {layers}"));
    let one = !(reads.mix_layers && reads.layer > 0);
    c.require(&format!("{path}.layer"), one, "give `layer` or `mix_layers: true`, not both");
}

fn check_embedding(c: &mut Checker, experiment: &Experiment) {
    let embedding = &experiment.model.embedding;
    let others = !embedding.vectors.is_empty() || embedding.characters.max_bytes().is_some();
    let valid = embedding.dim != 0 || others;
    c.require("model.embedding.dim", valid, "must be at least 1, or 0 if there are vectors or characters");
    let whole = matches!(experiment.tokenizer, TokenizerConfig::Word(_)) || embedding.vectors.is_empty();
    c.require("model.embedding.vectors", whole, "pretrained vectors need `tokenizer: {model: word}`");
    for (i, vectors) in embedding.vectors.iter().enumerate() {
        let path = format!("model.embedding.vectors.{i}");
        let npy = vectors.file.extension().is_some_and(|extension| extension == "npy");
        c.require(&path, npy == vectors.words.is_some(), "`words:` must be given with a .npy file, and only then");
    }
    if let CharactersConfig::Cnn(cnn) = &embedding.characters {
        c.require("model.embedding.characters.width", cnn.width % 2 != 0, "must be odd");
    }
}

fn check_weighting(c: &mut Checker, path: &str, weighting: &WeightingConfig, experiment: &Experiment) {
    let at = |key: &str| format!("{path}.{key}");
    match weighting {
        WeightingConfig::Equal(_)
        | WeightingConfig::Random(_)
        | WeightingConfig::Uncertainty(_)
        | WeightingConfig::Dwa(_) => {}
        WeightingConfig::Fixed(fixed) => check_fixed(c, &at("weights"), fixed, experiment),
        WeightingConfig::UncertaintySoftmax(_) => {
            c.require(path, !one_task_a_step(experiment), &several_tasks("uncertainty_softmax"));
        }
        WeightingConfig::Gradnorm(config) => {
            let some = config.initial_loss != InitialLoss::MeanOfFirst(0);
            c.require(&at("initial_loss"), some, "mean_of_first must be at least 1");
            c.require(path, !one_task_a_step(experiment), &several_tasks("gradnorm"));
        }
    }
}

/// The error for a strategy that needs several tasks per step.
fn several_tasks(strategy: &str) -> String {
    format!(
        "{strategy} balances the tasks within a step, but with round_robin sampling of separate sets every step has one task. \
         Set training.accumulate_steps to the number of sets, or use proportional sampling"
    )
}

/// Whether there are several tasks, but every step has the labels of only one.
fn one_task_a_step(experiment: &Experiment) -> bool {
    let in_turn = matches!(experiment.training.sampling, SamplingConfig::RoundRobin(_));
    let shared = |name: &String| experiment.tasks.values().filter(|head| head.sets().contains(name)).count() > 1;
    let several = experiment.tasks.len() > 1;
    several && in_turn && experiment.training.accumulate_steps == 1 && !experiment.data.sets.keys().any(shared)
}

fn check_study(c: &mut Checker, study: &StudyConfig, experiment: &Experiment) {
    c.require("study.strategies", !study.strategies.is_empty(), "give at least one strategy");
    for (name, weighting) in &study.strategies {
        let path = format!("study.strategies.{name}");
        let valid = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') && !name.starts_with("only");
        c.require(
            &path,
            valid,
            "use letters, digits and `_`; names that begin with `only` are reserved for single-task models",
        );
        check_weighting(c, &path, weighting, experiment);
    }
    for name in study.variants.keys() {
        let valid = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') && !name.is_empty();
        c.require(&format!("study.variants.{name}"), valid, "use letters, digits and `_`");
    }
    c.require("study.seeds", !study.seeds.is_empty(), "give at least one seed");
    let mut seeds = study.seeds.clone();
    seeds.sort_unstable();
    c.require("study.seeds", seeds.windows(2).all(|pair| pair[0] != pair[1]), "list each only once");
    for (path, values) in
        [("study.learning_rates", &study.learning_rates), ("study.data_fractions", &study.data_fractions)]
    {
        let twice = values.iter().enumerate().any(|(i, value)| values[..i].contains(value));
        c.require(path, !twice, "list each only once");
    }
    let rates = &study.learning_rates;
    c.require("study.learning_rates", rates.iter().all(|&rate| rate > 0.0), "must be more than 0");
    let has_dev = |set: &SetConfig| set.dev.is_some() || set.dev_fraction.is_some_and(|share| share > 0.0);
    let chosen = rates.len() < 2 || experiment.data.sets.values().any(has_dev);
    c.require("study.learning_rates", chosen, "without dev there is nothing to choose a learning rate by: give one");
    let fractions = &study.data_fractions;
    let valid = !fractions.is_empty() && fractions.iter().all(|&share| share > 0.0 && share <= 1.0);
    c.require("study.data_fractions", valid, "give at least one, each more than 0 and at most 1");
}

fn check_fixed(c: &mut Checker, path: &str, fixed: &FixedConfig, experiment: &Experiment) {
    let names: Vec<&str> = experiment.tasks.keys().map(String::as_str).collect();
    for (name, &weight) in &fixed.weights {
        let path = format!("{path}.{name}");
        if !names.contains(&name.as_str()) {
            c.error(&path, format!("no task `{name}`{}", suggestion(name, &names)));
        }
        c.require(&path, weight > 0.0, "must be more than 0");
    }
    for name in names.iter().filter(|name| !fixed.weights.contains_key(**name)) {
        c.error(path, format!("no weight for task `{name}`"));
    }
}
