//! Reads an experiment into a tree of values with their locations: YAML, `extends`, `--set`, environment variables.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Result;
use saphyr_parser::{Event, Parser};
use serde_json::{Map, Value};

use super::keys::{default_kind, join, tag_key};
use crate::problem::{InvalidInput, Place, Problem, invalid};
use crate::run::atomic::folder_of;

/// A tree of values, with the location of each by its dotted path.
pub struct SourceTree {
    pub value: Value,
    pub places: BTreeMap<String, Place>,
    pub problems: Vec<Problem>,
}

impl SourceTree {
    /// The location of `path` or, if it has none, of its nearest ancestor with one.
    pub fn place(&self, path: &str) -> Option<Place> {
        let mut path = path;
        loop {
            if let Some(place) = self.places.get(path) {
                return Some(place.clone());
            }
            path = match path.rsplit_once('.') {
                Some((parent, _)) => parent,
                None if path.is_empty() => return None,
                None => "",
            };
        }
    }
}

/// `defaults` gives the kind of each mapping that does not name one.
pub fn load((path, text): (&Path, &str), overrides: &[String], defaults: &Value) -> Result<SourceTree> {
    let mut tree = layer((path, text), &mut Vec::new(), defaults)?;
    for text in overrides {
        let mut over = override_layer(text)?;
        anchor(&mut over.value, path);
        overlay(&mut tree, over, defaults);
    }
    let mut value = std::mem::take(&mut tree.value);
    substitute(&mut value, "", &mut |path, message| {
        let problem = Problem { severity: crate::problem::Severity::Error, place: tree.place(path), message };
        tree.problems.push(problem);
    });
    tree.value = value;
    Ok(tree)
}

/// The text of an experiment file.
pub fn text_of(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => invalid(format!("experiment file {} does not exist", path.display())),
        _ => invalid(format!("experiment file {} cannot be read: {error}", path.display())),
    })?;
    // Some editors write a byte order mark.
    Ok(text.trim_start_matches('\u{feff}').to_owned())
}

/// The values of a file, merged over those of the files that it extends.
fn layer((path, text): (&Path, &str), chain: &mut Vec<PathBuf>, defaults: &Value) -> Result<SourceTree> {
    let fail = |line: usize, message: String| InvalidInput(vec![Problem::error(Place::new(path, line), message)]);
    let (places, twice) = places(path, text);
    let yaml: serde_yaml::Value = serde_yaml::from_str(text).map_err(|error| match (error.to_string(), &twice) {
        (message, Some((key, first, second))) if message.contains("duplicate entry") => {
            fail(*second, format!("{key} is already defined in line {first}"))
        }
        (message, _) => fail(error.location().map_or(0, |location| location.line()), plain(&message)),
    })?;
    let line_of = |key: &str| places.get(key).map_or(0, |place| place.line);
    let mut value = to_json(yaml, "").map_err(|(key, message)| {
        let line = line_of(&key);
        fail(line, if key.is_empty() { message } else { format!("{key}: {message}") })
    })?;
    let Value::Object(object) = &mut value else {
        return Err(fail(1, "an experiment must be a mapping of keys to values".to_owned()).into());
    };
    // Keys `x-...` are ignored: a place to define YAML anchors.
    object.retain(|key, _| !key.starts_with("x-"));
    let extends = object.shift_remove("extends");
    anchor(&mut value, path);
    let mut own = SourceTree { value, places, problems: Vec::new() };
    let Some(extends) = extends else { return Ok(own) };
    let line = own.place("extends").map_or(0, |place| place.line);
    let Value::String(base) = extends else {
        return Err(fail(line, "extends: expected the path of an experiment file".to_owned()).into());
    };
    let base = path.parent().unwrap_or(Path::new("")).join(base);
    if !base.exists() {
        return Err(fail(line, format!("extends: {} does not exist", base.display())).into());
    }
    // Different spellings of a path must compare equal.
    let one = |path: &Path| path.canonicalize().unwrap_or(path.to_owned());
    chain.push(one(path));
    if chain.contains(&one(&base)) {
        return Err(fail(line, format!("extends: {} extends itself", base.display())).into());
    }
    let mut whole = layer((&base, &text_of(&base)?), chain, defaults)?;
    own.places.remove("extends");
    overlay(&mut whole, own, defaults);
    Ok(whole)
}

/// serde_yaml's message without the position, which is reported before the message.
fn plain(message: &str) -> String {
    let message = message.split(" at line ").next().unwrap_or(message);
    if message.contains("more than one document") {
        return "is not an experiment: it contains several YAML documents".to_owned();
    }
    if message.contains("cannot start any token") {
        return format!("{message} (a tab? YAML is indented with spaces)");
    }
    let number = message.split_once("invalid type: integer `").filter(|(_, after)| after.contains("128"));
    match number {
        Some((key, after)) => format!("{key}{} is too large a number", after.split('`').next().unwrap_or(after)),
        None => message.to_owned(),
    }
}

/// Converts YAML to JSON: keys become strings, and numbers must be finite. An error has the path of the invalid value.
fn to_json(yaml: serde_yaml::Value, path: &str) -> Result<Value, (String, String)> {
    Ok(match yaml {
        serde_yaml::Value::Null => Value::Null,
        serde_yaml::Value::Bool(value) => Value::Bool(value),
        serde_yaml::Value::String(text) => Value::String(text),
        serde_yaml::Value::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(number), _) => number.into(),
            (_, Some(number)) => number.into(),
            _ => {
                let float = serde_json::Number::from_f64(number.as_f64().unwrap_or(f64::NAN));
                Value::Number(float.ok_or_else(|| (path.to_owned(), format!("{number} is not a finite number")))?)
            }
        },
        serde_yaml::Value::Sequence(items) => {
            let items = items.into_iter().enumerate();
            Value::Array(items.map(|(i, item)| to_json(item, &join(path, &i.to_string()))).collect::<Result<_, _>>()?)
        }
        serde_yaml::Value::Mapping(entries) => {
            let own: BTreeSet<String> = entries.keys().map(key_of).collect();
            let mut object = Map::new();
            for (key, value) in entries {
                let key = key_of(&key);
                let value = to_json(value, &join(path, &key))?;
                if key != "<<" {
                    object.insert(key, value);
                    continue;
                }
                // Merged keys go here, except those that the mapping has itself; of several mappings, the first wins.
                let merged = if let Value::Array(several) = value { several } else { vec![value] };
                for one in merged {
                    let Value::Object(one) = one else {
                        return Err((join(path, &key), "can merge only mappings, as in <<: *name".to_owned()));
                    };
                    for (key, value) in one.into_iter().filter(|(key, _)| !own.contains(key)) {
                        object.entry(key).or_insert(value);
                    }
                }
            }
            Value::Object(object)
        }
        serde_yaml::Value::Tagged(tagged) => {
            return Err((path.to_owned(), format!("YAML tags such as {} are not supported", tagged.tag)));
        }
    })
}

fn key_of(key: &serde_yaml::Value) -> String {
    match key {
        serde_yaml::Value::String(key) => key.clone(),
        other => serde_yaml::to_string(other).unwrap_or_default().trim().to_owned(),
    }
}

/// A duplicate key, with its two lines.
type Twice = (String, usize, usize);

/// The line of every key and list item, by dotted path, and the first duplicate key. Syntax errors only end the walk,
/// since the caller parses the text too.
fn places(file: &Path, text: &str) -> (BTreeMap<String, Place>, Option<Twice>) {
    /// An open mapping (the key whose value comes next, the lines of all keys) or list (the index of the next item).
    enum Open {
        Mapping(Option<String>, BTreeMap<String, usize>),
        List(usize),
    }
    let mut found = BTreeMap::from([(String::new(), Place::new(file, 1))]);
    let mut twice: Option<Twice> = None;
    let mut open: Vec<(String, Open)> = Vec::new();
    for (event, span) in Parser::new_from_str(text).map_while(Result::ok) {
        let line = span.start.line();
        if let (Some((parent, Open::Mapping(key @ None, lines))), Event::Scalar(name, ..)) = (open.last_mut(), &event) {
            let path = join(parent, name);
            *key = Some(name.to_string());
            if let Some(first) = lines.insert(name.to_string(), line) {
                twice.get_or_insert((path.clone(), first, line));
            }
            found.insert(path, Place::new(file, line));
            continue;
        }
        let starts =
            matches!(event, Event::Scalar(..) | Event::Alias(_) | Event::SequenceStart(..) | Event::MappingStart(..));
        let path = match open.last_mut() {
            _ if !starts => String::new(),
            Some((parent, Open::Mapping(key, _))) => join(parent, &key.take().unwrap_or_default()),
            Some((parent, Open::List(next))) => {
                let path = join(parent, &next.to_string());
                *next += 1;
                found.insert(path.clone(), Place::new(file, line));
                path
            }
            None => String::new(),
        };
        match event {
            Event::MappingStart(..) => open.push((path, Open::Mapping(None, BTreeMap::new()))),
            Event::SequenceStart(..) => open.push((path, Open::List(0))),
            Event::MappingEnd | Event::SequenceEnd => drop(open.pop()),
            _ => {}
        }
    }
    (found, twice)
}

/// Parses `path.to.key=value`, where the value is YAML.
fn override_layer(text: &str) -> Result<SourceTree> {
    let wrong = || invalid(format!("--set {text}: expected path.to.key=value"));
    let (path, value) = text.split_once('=').ok_or_else(wrong)?;
    if path.is_empty() || path.split('.').any(str::is_empty) {
        return Err(wrong());
    }
    if value.trim().is_empty() {
        return Err(invalid(format!("--set {text}: no value; null removes the key")));
    }
    let value: serde_yaml::Value =
        serde_yaml::from_str(value).map_err(|error| invalid(format!("--set {text}: {}", plain(&error.to_string()))))?;
    let mut value = to_json(value, "").map_err(|(_, message)| invalid(format!("--set {text}: {message}")))?;
    let place = Place::new(Path::new(&format!("--set {text}")), 0);
    let mut places = BTreeMap::new();
    let mut walked = String::new();
    for key in path.split('.') {
        walked = join(&walked, key);
        places.insert(walked.clone(), place.clone());
    }
    place_inner(&value, &walked, &place, &mut places);
    for key in path.rsplit('.') {
        value = Value::Object(Map::from_iter([(key.to_owned(), value)]));
    }
    Ok(SourceTree { value, places, problems: Vec::new() })
}

/// Gives everything inside a value the location of the value.
fn place_inner(value: &Value, path: &str, place: &Place, places: &mut BTreeMap<String, Place>) {
    let inner: Vec<(String, &Value)> = match value {
        Value::Object(object) => object.iter().map(|(key, value)| (join(path, key), value)).collect(),
        Value::Array(items) => items.iter().enumerate().map(|(i, item)| (join(path, &i.to_string()), item)).collect(),
        _ => Vec::new(),
    };
    for (path, value) in inner {
        place_inner(value, &path, place, places);
        places.insert(path, place.clone());
    }
}

/// Merges `over` into `base`: mappings are merged, numeric keys address list items, everything else is replaced. If
/// `over` changes the kind of a mapping (`strategy:`, `type:`, ...), the options of the old kind are dropped.
fn overlay(base: &mut SourceTree, over: SourceTree, defaults: &Value) {
    Merge { places: &mut base.places, defaults }.merge(&mut base.value, over.value, "");
    for (path, place) in over.places {
        // A mapping that both have keeps its location in `base`, where missing keys are then reported.
        base.places.entry(path).or_insert(place);
    }
    base.problems.extend(over.problems);
}

/// `key` as an index into `items`, if it is one.
fn place_in(items: &[Value], key: &str) -> Option<usize> {
    key.parse().ok().filter(|&i| i < items.len())
}

struct Merge<'a> {
    places: &'a mut BTreeMap<String, Place>,
    defaults: &'a Value,
}

impl Merge<'_> {
    fn merge(&mut self, base: &mut Value, over: Value, path: &str) {
        // A kind alone is short for a mapping: expand it, so that it can take options.
        if let (Value::String(kind), Value::Object(_), Some(key)) = (&*base, &over, tag_key(path)) {
            *base = Value::Object(Map::from_iter([(key.to_owned(), Value::String(kind.clone()))]));
        }
        match (base, over) {
            (Value::Object(base), Value::Object(over)) => {
                if let Some(key) = tag_key(path)
                    && let Some(new) = over.get(key)
                {
                    let old = base.get(key).and_then(Value::as_str).or_else(|| default_kind(path, self.defaults));
                    if old != new.as_str() {
                        base.clear();
                        self.forget_inside(path);
                    }
                }
                for (key, value) in over {
                    let path = join(path, &key);
                    match base.get_mut(&key) {
                        // null removes a key of the base, so that its default applies.
                        Some(_) if value.is_null() => {
                            self.forget_inside(&path);
                            base.shift_remove(&key);
                        }
                        Some(old) => self.merge(old, value, &path),
                        None if value.is_null() => {}
                        None => drop(base.insert(key, value)),
                    }
                }
            }
            (Value::Array(items), Value::Object(over))
                if !over.is_empty() && over.keys().all(|key| place_in(items, key).is_some()) =>
            {
                for (key, value) in over {
                    if let Some(i) = place_in(items, &key) {
                        self.merge(&mut items[i], value, &join(path, &key));
                    }
                }
            }
            (base, over) => {
                self.places.remove(path);
                self.forget_inside(path);
                *base = over;
            }
        }
    }

    fn forget_inside(&mut self, path: &str) {
        let inner = format!("{path}.");
        self.places.retain(|known, _| !known.starts_with(&inner));
    }
}

/// Replaces `${EXPERIMENT_DIR}` in strings by the folder of `file`.
fn anchor(value: &mut Value, file: &Path) {
    match value {
        Value::Object(object) => object.values_mut().for_each(|value| anchor(value, file)),
        Value::Array(items) => items.iter_mut().for_each(|value| anchor(value, file)),
        Value::String(text) => *text = text.replace("${EXPERIMENT_DIR}", &folder_of(file).to_string_lossy()),
        _ => {}
    }
}

/// Replaces `${NAME}` and `${NAME:-default}` in strings. A string that is only a reference becomes a number or boolean
/// if its replacement is one.
fn substitute(value: &mut Value, path: &str, problem: &mut dyn FnMut(&str, String)) {
    match value {
        Value::Object(object) => {
            object.iter_mut().for_each(|(key, value)| substitute(value, &join(path, key), problem));
        }
        Value::Array(items) => {
            let items = items.iter_mut().enumerate();
            items.for_each(|(i, value)| substitute(value, &join(path, &i.to_string()), problem));
        }
        Value::String(text) if text.contains("${") => {
            let mut out = String::new();
            let mut rest = text.as_str();
            while let Some((before, after)) = rest.split_once("${") {
                out += before;
                let Some((reference, after)) = after.split_once('}') else {
                    return problem(path, format!("{path}: `${{` without `}}`"));
                };
                let (name, default) = match reference.split_once(":-") {
                    Some((name, default)) => (name, Some(default.to_owned())),
                    None => (reference, None),
                };
                let set = std::env::var(name).ok().filter(|value| !value.is_empty());
                match set.or(default) {
                    Some(value) => out += &value,
                    None => {
                        let message = format!(
                            "{path}: environment variable {name} is not set; ${{{name}:-default}} gives a default"
                        );
                        return problem(path, message);
                    }
                }
                rest = after;
            }
            out += rest;
            let whole = text.starts_with("${") && text.ends_with('}') && text.matches("${").count() == 1;
            let typed = serde_yaml::from_str(&out).ok().and_then(|yaml| to_json(yaml, path).ok());
            *value = match typed {
                Some(typed @ (Value::Number(_) | Value::Bool(_))) if whole => typed,
                _ => Value::String(out),
            };
        }
        _ => {}
    }
}
