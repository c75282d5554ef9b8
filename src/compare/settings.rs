//! The settings of a run: which runs differ only in the seed and form one row, and which single-task runs were trained
//! with the settings of a multi-task run.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// Keys, including all below them, in which runs of one row may differ. Among learning rates, dev selects one.
const LEFT_OUT: [&str; 11] = [
    "name",
    "seed",
    "study",
    "data.root",
    "data.train_fraction",
    "data.train_fraction_seed",
    "training.optimizer.learning_rate",
    "training.cuda_graphs",
    "training.log_every_steps",
    "training.log_gradients_every",
    "training.checkpoint_every_steps",
];

/// Keys that determine how a single task is trained, besides its head.
const OF_ANY_TASK: [&str; 4] = ["model.", "tokenizer.", "training.", "init_from"];

/// Those of these keys that concern other tasks.
const OF_SEVERAL: [&str; 3] = ["training.early_stopping.", "training.sampling.", "training.freeze_epochs.heads."];

/// The values of an experiment by dotted path.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Settings(BTreeMap<String, String>);

impl Settings {
    /// The settings of an experiment with defaults filled in, without those in which runs of one row may differ;
    /// `alone` if it has only one task.
    pub fn new(experiment: &Value, alone: bool) -> Settings {
        let Settings(mut all) = Settings::of_all(experiment);
        let within = |path: &str, part: &str| {
            path.strip_prefix(part).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        all.retain(|path, _| !LEFT_OUT.iter().any(|part| within(path, part)));
        // A single task has nothing to be weighted against.
        all.retain(|path, _| !alone || !(path.starts_with("weighting.") || path.ends_with(".priority")));
        Settings(all)
    }

    /// All settings of an experiment.
    pub fn of_all(experiment: &Value) -> Settings {
        fn walk(value: &Value, path: &str, out: &mut BTreeMap<String, String>) {
            match value {
                Value::Object(object) => {
                    let before = if path.is_empty() { String::new() } else { format!("{path}.") };
                    object.iter().for_each(|(key, value)| walk(value, &format!("{before}{key}"), out));
                }
                value => drop(out.insert(path.to_owned(), value.to_string().replace('"', ""))),
            }
        }
        let mut out = BTreeMap::new();
        walk(experiment, "", &mut out);
        Settings(out)
    }

    /// The changes since `old`, one line each.
    pub fn changes_from(&self, old: &Settings) -> Vec<String> {
        let paths: BTreeSet<&String> = self.0.keys().chain(old.0.keys()).collect();
        let changed = paths.into_iter().filter(|path| self.0.get(*path) != old.0.get(*path));
        let shown = |value: Option<&String>| value.map_or("not given".to_owned(), |value| format!("`{value}`"));
        changed.map(|path| format!("{path}: was {}, is {}", shown(old.0.get(path)), shown(self.0.get(path)))).collect()
    }

    /// `path=value` of each setting whose value here is not the single most common one in `all`. If a mapping is of
    /// another kind (`is_tag` recognizes the key), its other settings are listed only if they differ within the kind.
    pub fn unlike_most(&self, all: &BTreeSet<&Settings>, is_tag: fn(&str) -> bool) -> Vec<String> {
        let paths: BTreeSet<&str> = all.iter().flat_map(|other| other.0.keys()).map(String::as_str).collect();
        let differs = |path: &&str| {
            let mut counts: BTreeMap<Option<&String>, usize> = BTreeMap::new();
            all.iter().for_each(|other| *counts.entry(other.0.get(*path)).or_default() += 1);
            let own = counts.remove(&self.0.get(*path)).unwrap_or(0);
            counts.values().any(|&n| n >= own)
        };
        let told: Vec<&str> = paths.into_iter().filter(differs).collect();
        let kinds: Vec<(&str, &str)> =
            told.iter().filter_map(|path| path.rsplit_once('.')).filter(|(_, key)| is_tag(key)).collect();
        let of_kind = |path: &str| {
            let inside = |parent: &str| path.strip_prefix(parent).and_then(|rest| rest.strip_prefix('.'));
            let is_same = |parent: &str, key: &str| {
                let tag = format!("{parent}.{key}");
                let mut alike = all.iter().filter(|other| other.0.get(&tag) == self.0.get(&tag));
                alike.all(|other| other.0.get(path) == self.0.get(path))
            };
            kinds.iter().any(|(parent, key)| inside(parent).is_some_and(|rest| rest != *key) && is_same(parent, key))
        };
        let shown = |path: &str| format!("{path}={}", self.0.get(path).map_or("default", String::as_str));
        told.into_iter().filter(|path| !of_kind(path)).map(shown).collect()
    }

    /// Whether the single-task settings `alone` train `task` as these settings do: with the same model, tokenizer,
    /// training and head.
    pub fn agree_on(&self, task: &str, alone: &Settings) -> bool {
        let (head, frozen) = (format!("tasks.{task}."), format!("training.freeze_epochs.heads.{task}"));
        let within = |path: &str, parts: &[&str]| parts.iter().any(|part| path.starts_with(part));
        let of_others = |path: &str| {
            let several = within(path, &OF_SEVERAL) && !path.starts_with(&frozen);
            // In turn, a twin has fewer batches per step: those of its own sets.
            let in_turn = self.0.get("training.sampling.strategy").is_some_and(|strategy| strategy == "round_robin");
            (in_turn && path == "training.accumulate_steps")
                || several
                || path.ends_with(".inputs")
                || path.ends_with(".priority")
        };
        let matters = |path: &&String| (within(path, &OF_ANY_TASK) || path.starts_with(&head)) && !of_others(path);
        let mut paths = self.0.keys().chain(alone.0.keys()).filter(matters);
        paths.all(|path| self.0.get(path) == alone.0.get(path))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_task_alone_agrees_where_all_that_it_has_is_alike() {
        let of = |value: Value| Settings::new(&value, true);
        let head = |decoder: &str| json!({"a": {"decoder": decoder}});
        let both = json!({
            "seed": 1, "model": {"dim": 8}, "weighting": {"strategy": "x"},
            "tasks": {"a": {"decoder": "crf", "inputs": ["trunk", "b"], "priority": 2.0}, "b": {}},
            "training": {"sampling": {"strategy": "y"}, "freeze_epochs": {"heads": {"b": 1}}},
        });
        let both = Settings::new(&both, false);
        for (alone, agree) in [
            (json!({"seed": 2, "model": {"dim": 8}, "tasks": head("crf")}), true),
            (json!({"model": {"dim": 8}, "tasks": head("softmax")}), false),
            (json!({"model": {"dim": 9}, "tasks": head("crf")}), false),
            (json!({"model": {"dim": 8}, "tasks": head("crf"), "init_from": "run"}), false),
            (json!({"model": {"dim": 8}, "tasks": head("crf"), "training": {"freeze_epochs": {"trunk": 2}}}), false),
        ] {
            assert_eq!(both.agree_on("a", &of(alone.clone())), agree, "{alone}");
        }
    }

    #[test]
    fn what_differs_is_told_with_what_is_not_given() {
        let all = [json!({"a": {"b": 1}, "seed": 1}), json!({"a": {"b": 2, "c": "x"}})];
        let [one, other] = all.map(|value| Settings::new(&value, false));
        let told =
            |own: &Settings, all: &[&Settings]| own.unlike_most(&all.iter().copied().collect(), |key| key == "kind");
        assert_eq!(told(&one, &[&one, &other]), ["a.b=1", "a.c=default"]);
        assert_eq!(told(&other, &[&one, &other]), ["a.b=2", "a.c=x"]);
        assert!(told(&one, &[&one]).is_empty());
        // Only what each changes is listed; a kind stands for all its options.
        let all = [json!({"a": {"kind": "x", "n": 1}, "b": 1}), json!({"a": {"kind": "x", "n": 1}, "b": 2})];
        let [base, changed] = all.map(|value| Settings::new(&value, false));
        let other = Settings::new(&json!({"a": {"kind": "y", "m": 2}, "b": 1}), false);
        let more = Settings::new(&json!({"a": {"kind": "y", "m": 3}, "b": 1}), false);
        assert_eq!(told(&more, &[&base, &changed, &other, &more]), ["a.kind=y", "a.m=3"]);
        let all = [&base, &changed, &other];
        assert_eq!(all.map(|own| told(own, &all)), [vec![], vec!["b=2".to_owned()], vec!["a.kind=y".to_owned()]]);
    }
}
