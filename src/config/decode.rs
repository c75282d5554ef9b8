//! From the tree of values to types, reporting every error and not only the first: an invalid part is reported and
//! removed, and the rest is read again.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use serde_path_to_error::Segment;

use super::keys::{default_kind, is_tag, join, tag_key};
use super::schema;
use super::source::SourceTree;
use crate::problem::{Place, Problem, Severity};

/// Turns `{strategy: gradnorm, alpha: 1}` into `{gradnorm: {alpha: 1}}`, for which serde gives the path of every error,
/// and `gradnorm` into `{gradnorm: {}}`. A mapping that names no kind gets that in `defaults`, else goes to `missing`.
fn to_external(value: Value, path: &str, defaults: &Value, missing: &mut Vec<(String, &'static str)>) -> Value {
    let object = match value {
        Value::Object(object) => object,
        Value::String(kind) if tag_key(path).is_some() => {
            return Value::Object(Map::from_iter([(kind, Value::Object(Map::new()))]));
        }
        value => return value,
    };
    let mut out = Map::new();
    for (key, value) in object {
        let path = join(path, &key);
        out.insert(key, to_external(value, &path, defaults, missing));
    }
    let Some(tag) = tag_key(path) else { return Value::Object(out) };
    match out.shift_remove(tag) {
        Some(Value::String(kind)) => Value::Object(Map::from_iter([(kind, Value::Object(out))])),
        Some(other) => Value::Object(Map::from_iter([(other.to_string(), Value::Object(out))])),
        None => match default_kind(path, defaults) {
            Some(kind) => Value::Object(Map::from_iter([(kind.to_owned(), Value::Object(out))])),
            None => {
                missing.push((path.to_owned(), tag));
                Value::Null
            }
        },
    }
}

/// The inverse of `to_external`, for writing a file.
pub fn to_written(value: Value) -> Value {
    fn walk(value: Value, path: &str) -> Value {
        let Value::Object(object) = value else { return value };
        if let (Some(tag), Some((kind, inner))) = (tag_key(path), object.iter().next()) {
            let mut out = Map::from_iter([(tag.to_owned(), Value::String(kind.clone()))]);
            if let Value::Object(inner) = inner {
                out.extend(inner.clone());
            }
            return Value::Object(out);
        }
        object
            .into_iter()
            .map(|(key, value)| (key.clone(), walk(value, &join(path, &key))))
            .collect::<Map<_, _>>()
            .into()
    }
    walk(value, "")
}

/// Reads the tree as `T`; mappings that name no kind get that in `defaults`. Errors go to `problems`; `None` if too
/// little is valid to make a `T`.
pub fn decode<T: DeserializeOwned + Serialize>(
    tree: &SourceTree,
    defaults: &Value,
    problems: &mut Vec<Problem>,
) -> Option<T> {
    let mut missing = Vec::new();
    let mut value = to_external(tree.value.clone(), "", defaults, &mut missing);
    let mut removed: Vec<String> = Vec::new();
    for (path, tag) in missing {
        remove(&mut value, &path.split('.').map(str::to_owned).collect::<Vec<_>>());
        let kinds = kinds_of::<T>(&path);
        report(tree, problems, &path, format!("{path}: missing key `{tag}`: expected one of {kinds}"));
        removed.push(path);
    }
    let list = |path: &str| format!("{path}: expected a mapping of keys to values, found a list");
    for path in lists_for_mappings(&value, defaults, "") {
        report(tree, problems, &path, list(&path));
        remove(&mut value, &path.split('.').map(str::to_owned).collect::<Vec<_>>());
    }
    loop {
        let error = match serde_path_to_error::deserialize::<_, T>(value.clone()) {
            Ok(decoded) => {
                let understood = serde_json::to_value(&decoded).ok()?;
                for path in lists_for_mappings(&value, &understood, "") {
                    report(tree, problems, &path, list(&path));
                }
                return Some(decoded);
            }
            Err(error) => error,
        };
        let mut found = diagnose(&error);
        if found.missing.is_some() {
            found.message += &meant(tree, &found.owner);
        }
        // A key that was reported and removed is now missing; do not report it again.
        let told = |key: &String| removed.iter().any(|gone| gone == key || gone.starts_with(&format!("{key}.")));
        if !found.missing.as_ref().is_some_and(told) {
            report(tree, problems, &found.path, found.message);
        }
        removed.push(found.owner);
        if !remove(&mut value, &found.remove) {
            return None;
        }
    }
}

/// An error in the tree, from serde's message.
struct Diagnosis {
    /// Where it is reported.
    path: String,
    message: String,
    /// The missing key, if that is the error.
    missing: Option<String>,
    /// The mapping or value at which serde stopped.
    owner: String,
    /// The path to remove so that the rest can be read, including kinds.
    remove: Vec<String>,
}

fn diagnose(error: &serde_path_to_error::Error<serde_json::Error>) -> Diagnosis {
    // The path with kinds, as in the externally tagged tree, and without, as in the file.
    let (mut raw, mut shown): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    for segment in error.path() {
        match segment {
            Segment::Map { key } => {
                raw.push(key.clone());
                shown.push(key.clone());
            }
            Segment::Seq { index } => {
                raw.push(index.to_string());
                shown.push(index.to_string());
            }
            Segment::Enum { variant } => raw.push(variant.clone()),
            Segment::Unknown => {}
        }
    }
    let message = error.inner().to_string();
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let after = |path: &str| if path.is_empty() { String::new() } else { format!("{path}: ") };
    if message.starts_with("unknown field") {
        let key = quoted[0];
        if shown.last().is_some_and(|last| last == key) {
            shown.pop();
            raw.pop();
        }
        let owner = shown.join(".");
        let hint = match tag_key(&owner) {
            // `key` names the kind of other mappings.
            Some(tag) if is_tag(key) => format!("; did you mean `{tag}`?"),
            tag => {
                let known: Vec<&str> = tag.into_iter().chain(quoted[1..].iter().copied()).collect();
                // Prefer mappings inside `owner`, if any.
                let (within, elsewhere): (Vec<String>, Vec<String>) =
                    schema::owners_of(key).into_iter().partition(|found| found.starts_with(&format!("{owner}.")));
                let owners = if within.is_empty() { elsewhere } else { within };
                match near(key, &known) {
                    None if !owners.is_empty() => format!("; it is a key of {}", owners.join(", ")),
                    _ => suggestion(key, &known),
                }
            }
        };
        let message = format!("{}unknown key `{key}`{hint}", after(&owner));
        raw.push(key.to_owned());
        return Diagnosis { path: join(&owner, key), message, missing: None, owner, remove: raw };
    }
    let owner = shown.join(".");
    if message.starts_with("unknown variant") {
        let kind = quoted[0];
        let mut path = owner.clone();
        if let Some(tag) = tag_key(&path) {
            // The mapping's only key is the unknown kind: remove the whole mapping.
            path = format!("{path}.{tag}");
            raw.truncate(shown.len());
        } else if raw.last().is_some_and(|last| last == kind) && raw.len() > shown.len() {
            raw.pop();
        }
        let message = format!("{path}: unknown value `{kind}`{}", suggestion(kind, &quoted[1..]));
        return Diagnosis { path, message, missing: None, owner, remove: raw };
    }
    if message.starts_with("missing field") {
        let message = format!("{}missing key `{}`", after(&owner), quoted[0]);
        raw.truncate(raw.len() - usize::from(raw.len() > shown.len()));
        let missing = Some(join(&owner, quoted[0]));
        return Diagnosis { path: owner.clone(), message, missing, owner, remove: raw };
    }
    let what = match shown.iter().find(|key| key.contains('.')) {
        // `to_external` does not recognise kinds in a mapping whose name contains a dot.
        Some(key) if message.contains("map with a single key") => format!("`{key}`: names must not contain dots"),
        _ => plain(&message, tag_key(&owner).is_some()),
    };
    Diagnosis { path: owner.clone(), message: format!("{owner}: {what}"), missing: None, owner, remove: raw }
}

/// Paths of lists given for mappings, which serde accepts as the mapping's values in order.
fn lists_for_mappings(found: &Value, understood: &Value, path: &str) -> Vec<String> {
    match (found, understood) {
        (Value::Array(_), Value::Object(_)) => vec![path.to_owned()],
        (Value::Object(found), Value::Object(understood)) => {
            let inner = |(key, value): (&String, &Value)| {
                let path = join(path, key);
                understood.get(key).map_or(Vec::new(), |understood| lists_for_mappings(value, understood, &path))
            };
            found.iter().flat_map(inner).collect()
        }
        (Value::Array(found), Value::Array(understood)) => {
            let items = found.iter().zip(understood).enumerate();
            items.flat_map(|(i, (a, b))| lists_for_mappings(a, b, &format!("{path}.{i}"))).collect()
        }
        _ => Vec::new(),
    }
}

/// For a mapping that only `--set` gives: a hint to a sibling with a similar name.
fn meant(tree: &SourceTree, path: &str) -> String {
    let Some((parent, name)) = path.rsplit_once('.') else { return String::new() };
    let parent_of = format!("/{}", parent.replace('.', "/"));
    let siblings = tree.value.pointer(&parent_of).and_then(Value::as_object).into_iter().flatten();
    let others: Vec<&str> = siblings.map(|(key, _)| key.as_str()).filter(|&key| key != name).collect();
    match near(name, &others) {
        Some(near) if tree.place(path).is_some_and(|place| place.line == 0) => format!("; did you mean {near}?"),
        _ => String::new(),
    }
}

/// The kinds that a tagged mapping may have, from serde's error for an impossible one.
fn kinds_of<T: DeserializeOwned>(path: &str) -> String {
    let mut probe = serde_json::json!({"?": {}});
    for key in path.split('.').rev() {
        probe = Value::Object(Map::from_iter([(key.to_owned(), probe)]));
    }
    let message = serde_path_to_error::deserialize::<_, T>(probe).err().map(|error| error.inner().to_string());
    let message = message.unwrap_or_default();
    message.split('`').skip(3).step_by(2).collect::<Vec<_>>().join(", ")
}

fn report(tree: &SourceTree, problems: &mut Vec<Problem>, path: &str, message: String) {
    let place: Option<Place> = tree.place(path);
    problems.push(Problem { severity: Severity::Error, place, message });
}

/// Removes the value at `path` or, if it is in a list, the whole list; false if there is none.
fn remove(value: &mut Value, path: &[String]) -> bool {
    let Some((last, parents)) = path.split_last() else { return false };
    let pointer = |keys: &[String]| keys.iter().map(|key| format!("/{key}")).collect::<String>();
    match value.pointer_mut(&pointer(parents)) {
        Some(Value::Object(object)) => object.shift_remove(last).is_some(),
        Some(Value::Array(_)) => remove(value, parents),
        _ => false,
    }
}

/// A hint to the most similar known name, or to all of them.
pub fn suggestion(name: &str, known: &[&str]) -> String {
    match near(name, known) {
        Some(near) => format!("; did you mean {near}?"),
        None if known.is_empty() => "; none is defined".to_owned(),
        None => format!("; expected one of {}", known.join(", ")),
    }
}

/// The known name with a similar spelling, or those that contain `name` as a word, as `max_epochs` contains `epochs`.
fn near(name: &str, known: &[&str]) -> Option<String> {
    let distance = |known: &str| strsim::damerau_levenshtein(&name.to_lowercase(), &known.to_lowercase());
    let nearest = known.iter().min_by_key(|known| distance(known));
    if let Some(nearest) = nearest.filter(|near| distance(near) <= 1 + near.len() / 4) {
        return Some(format!("`{nearest}`"));
    }
    let of_words = known.iter().filter(|known| known.split('_').any(|word| word == name));
    let of_words: Vec<String> = of_words.map(|known| format!("`{known}`")).collect();
    (!of_words.is_empty()).then(|| of_words.join(" or "))
}

/// Rewrites serde's message in terms that users know.
fn plain(message: &str, has_kinds: bool) -> String {
    if let Some((_, n)) = message.split_once("expected a tuple of size ") {
        return format!("expected a list of {n}");
    }
    if message.starts_with("invalid length") {
        return "expected a mapping of keys to values, found a list".to_owned();
    }
    let Some((found, expected)) = message.split_once(", expected ") else { return message.to_owned() };
    let found = found.trim_start_matches("invalid type: ").trim_start_matches("invalid value: ");
    let found = found
        .replace("string ", "the text ")
        .replace("integer ", "the number ")
        .replace("floating point ", "the number ")
        .replace("boolean ", "")
        .replace("map", "a mapping")
        .replace("sequence", "a list")
        .replace('`', "");
    let expected = match expected.split(' ').next().unwrap_or_default() {
        "u64" | "usize" | "u32" | "i64" => "a whole number",
        "f64" => "a number",
        "a" if expected.starts_with("a boolean") => "true or false",
        "a" if expected.starts_with("a string") => "a text",
        "a" if expected.starts_with("a map") => "a mapping",
        "a" if expected.starts_with("a sequence") => "a list",
        "struct" => "a mapping of keys to values",
        "string" | "map" if has_kinds => "a name or a mapping",
        "string" | "map" => "a name",
        _ => expected,
    };
    format!("expected {expected}, found {found}")
}
