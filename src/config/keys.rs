//! Dotted paths of keys, such as `tasks.topic.type`, and the mappings that name their kind by a key.

use serde_json::Value;

/// Mappings that come in several kinds, and the key that names the kind. `*` matches any name.
const TAGGED: [(&str, &str); 8] = [
    ("tasks.*", "type"),
    ("tokenizer", "model"),
    ("model.embedding.characters", "kind"),
    ("weighting", "strategy"),
    ("study.strategies.*", "strategy"),
    ("training.optimizer", "kind"),
    ("training.schedule", "kind"),
    ("training.sampling", "strategy"),
];

/// The key that names the kind of the mapping at `path`, if that has one.
pub fn tag_key(path: &str) -> Option<&'static str> {
    let fits = |pattern: &str| match pattern.strip_suffix(".*") {
        Some(parent) => path.rsplit_once('.').is_some_and(|(before, _)| before == parent),
        None => path == pattern,
    };
    TAGGED.iter().find(|(pattern, _)| fits(pattern)).map(|(_, key)| *key)
}

/// Whether some mapping names its kind by `key`.
pub fn is_tag(key: &str) -> bool {
    TAGGED.iter().any(|(_, tag)| *tag == key)
}

/// The kind of the mapping at `path` if it names none: that in `defaults`, which has serde's externally tagged form.
pub fn default_kind<'a>(path: &'a str, defaults: &'a Value) -> Option<&'a str> {
    // The name of a study's strategy is its default kind.
    if let Some(name) = path.strip_prefix("study.strategies.") {
        return Some(name);
    }
    let default = defaults.pointer(&format!("/{}", path.replace('.', "/")))?;
    default.as_object()?.keys().next().map(String::as_str)
}

/// The dotted path of `key` within `parent`.
pub fn join(parent: &str, key: &str) -> String {
    if parent.is_empty() { key.to_owned() } else { format!("{parent}.{key}") }
}
