//! The JSON Schema of experiment files, from the types and their doc comments.

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::Experiment;
use super::keys::{join, tag_key};

/// The JSON Schema (draft 7, which editors support) of experiment files, with all subschemas inlined.
///
/// No key is required, since a file may extend another.
pub fn schema() -> Value {
    let settings = SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true);
    let mut schema = settings.into_generator().into_root_schema_for::<Experiment>().to_value();
    to_written(&mut schema, "");
    schema["properties"]["extends"] = json!({
        "description": "Path of an experiment file, relative to this one, whose values this file overrides.",
        "type": "string",
    });
    schema["patternProperties"] = json!({"^x-": {"description": "Ignored; a place for YAML anchors."}});
    schema
}

/// Dotted paths of the mappings that have `key`; those of sets and tasks are `data.sets.*` and `tasks.*`.
pub fn owners_of(key: &str) -> Vec<String> {
    fn walk(schema: &Value, path: &str, key: &str, found: &mut Vec<String>) {
        for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
            if name == key && !found.iter().any(|known| known == path) && !path.is_empty() {
                found.push(path.to_owned());
            }
            walk(inner, &join(path, name), key, found);
        }
        if schema["additionalProperties"].is_object() {
            walk(&schema["additionalProperties"], &join(path, "*"), key, found);
        }
        for choice in ["anyOf", "oneOf"].iter().filter_map(|choices| schema[choices].as_array()).flatten() {
            walk(choice, path, key, found);
        }
    }
    let mut found = Vec::new();
    walk(&schema(), "", key, &mut found);
    found
}

/// Converts the schema of the types to that of files, where the kind of a mapping is named by a key, or given alone.
fn to_written(schema: &mut Value, path: &str) {
    let Value::Object(object) = schema else { return };
    object.remove("required");
    if let Some(tag) = tag_key(path)
        && let Some(Value::Array(variants)) = object.remove("oneOf")
    {
        let mut kinds: Vec<Value> = variants.into_iter().filter_map(|variant| kind(variant, tag)).collect();
        for kind in &mut kinds {
            to_written(kind, path);
        }
        let names: Vec<Value> = kinds.iter().map(|kind| kind["properties"][tag]["const"].clone()).collect();
        kinds.insert(0, json!({"enum": names}));
        object.insert("anyOf".to_owned(), kinds.into());
        return;
    }
    if let Some(Value::Object(properties)) = object.get_mut("properties") {
        properties.iter_mut().for_each(|(key, inner)| to_written(inner, &join(path, key)));
    }
    if let Some(inner) = object.get_mut("additionalProperties") {
        to_written(inner, &join(path, "*"));
    }
    if let Some(inner) = object.get_mut("items") {
        to_written(inner, path);
    }
    if let Some(Value::Array(choices)) = object.get_mut("anyOf") {
        choices.iter_mut().for_each(|choice| to_written(choice, path));
    }
    // A variant with a value, such as `mean_of_first: 5`: the key takes over its description.
    for choice in object.get_mut("oneOf").and_then(Value::as_array_mut).into_iter().flatten() {
        let description = choice["description"].clone();
        for (_, inner) in choice.get_mut("properties").and_then(Value::as_object_mut).into_iter().flatten() {
            inner["description"] = description.clone();
        }
    }
}

/// The range of a number as text, such as `at least 1`, for `polytask options` and error messages.
pub fn range(schema: &Value) -> Option<String> {
    let bound = |key: &str| schema[key].as_f64();
    let unsigned = schema["format"].as_str().is_some_and(|format| format.starts_with("uint"));
    let least = bound("minimum").filter(|least| *least > 0.0 || !unsigned);
    let (above, most, below) = (bound("exclusiveMinimum"), bound("maximum"), bound("exclusiveMaximum"));
    let low = least.map(|least| format!("from {least}")).or(above.map(|above| format!("more than {above}")));
    let high = most.map(|most| format!("to {most}")).or(below.map(|below| format!("to below {below}")));
    match (low, high) {
        (Some(low), Some(high)) if above.is_none() => Some(format!("{low} {high}")),
        (Some(low), Some(high)) => Some(format!("{low} and {}", high.replacen("to", "at most", 1))),
        (Some(low), None) => Some(low.replacen("from", "at least", 1)),
        (None, Some(high)) => Some(high.replacen("to", "at most", 1)),
        (None, None) => None,
    }
}

/// The numbers of an experiment, in the form of its file, that are out of range: dotted path and permitted range.
pub fn out_of_range(experiment: &Value) -> Vec<(String, String)> {
    fn walk(schema: &Value, value: &Value, path: &str, found: &mut Vec<(String, String)>) {
        if let (Some(number), Some(range)) = (value.as_f64(), range(schema)) {
            let bound =
                |key: &str, holds: fn(f64, f64) -> bool| schema[key].as_f64().is_none_or(|bound| holds(number, bound));
            let within = bound("minimum", |x, bound| x >= bound)
                && bound("maximum", |x, bound| x <= bound)
                && bound("exclusiveMinimum", |x, bound| x > bound)
                && bound("exclusiveMaximum", |x, bound| x < bound);
            if !within {
                found.push((path.to_owned(), range));
            }
        }
        for (key, inner) in value.as_object().into_iter().flatten() {
            let of_key = schema["properties"].get(key).unwrap_or(&schema["additionalProperties"]);
            walk(of_key, inner, &join(path, key), found);
        }
        for (i, item) in value.as_array().into_iter().flatten().enumerate() {
            walk(&schema["items"], item, &join(path, &i.to_string()), found);
        }
        // Of the possible kinds of a mapping, check only the one it has.
        let is_own = |kind: &&Value| {
            let mut keys = kind["properties"].as_object().into_iter().flatten();
            keys.all(|(key, inner)| inner["const"].is_null() || inner["const"] == value[key])
        };
        schema["anyOf"].as_array().into_iter().flatten().filter(is_own).for_each(|kind| walk(kind, value, path, found));
    }
    let mut found = Vec::new();
    walk(&schema(), experiment, "", &mut found);
    found
}

/// Turns `{properties: {NAME: INNER}}` into INNER with a key `tag`, whose value is NAME.
fn kind(mut variant: Value, tag: &str) -> Option<Value> {
    let Value::Object(named) = variant["properties"].take() else { return None };
    let (name, mut inner) = named.into_iter().next()?;
    let description = variant["description"].take();
    let mut properties = Map::from_iter([(tag.to_owned(), json!({"const": name, "description": description}))]);
    if let Value::Object(own) = inner["properties"].take() {
        properties.extend(own);
    }
    inner["properties"] = properties.into();
    Some(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every key below `schema`, by path.
    fn keys(schema: &Value, path: &str, found: &mut Vec<(String, Value)>) {
        for (key, inner) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}.{key}");
            keys(inner, &path, found);
            found.push((path, inner.clone()));
        }
        let inner = ["items", "additionalProperties"].iter().filter_map(|key| schema.get(key));
        let choices = ["anyOf", "oneOf"].iter().filter_map(|key| schema[key].as_array()).flatten();
        inner.chain(choices).for_each(|inner| keys(inner, path, found));
    }

    #[test]
    fn numbers_out_of_their_range_are_found_in_every_kind_of_place() {
        let experiment = json!({
            "seed": 0,
            "data": {"train_fraction": 0, "sets": {"a": {"dev_fraction": 1.0}, "b": {"dev_fraction": 0}}},
            "tasks": {"x": {"type": "tagging", "dropout": -0.1}},
            "model": {"embedding": {"characters": {"kind": "lstm", "hidden": 0, "dim": 1}}},
            "training": {"max_steps": 0, "optimizer": {"kind": "sgd", "momentum": 1, "learning_rate": 0.1}},
        });
        let found = out_of_range(&experiment);
        let found: Vec<(&str, &str)> = found.iter().map(|(path, range)| (path.as_str(), range.as_str())).collect();
        let expected = [
            ("data.train_fraction", "more than 0 and at most 1"),
            ("data.sets.a.dev_fraction", "from 0 to below 1"),
            ("tasks.x.dropout", "from 0 to below 1"),
            ("model.embedding.characters.hidden", "from 1 to 100000"),
            ("training.max_steps", "at least 1"),
            ("training.optimizer.momentum", "from 0 to below 1"),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn every_key_is_described_and_its_default_is_what_its_description_says() {
        let mut found = Vec::new();
        keys(&schema(), "", &mut found);
        let (mut checked, mut wrong) = (0, Vec::new());
        for (path, key) in &found {
            let Some(text) = key["description"].as_str() else {
                if !key["const"].is_string() {
                    wrong.push(format!("{path} has no description"));
                }
                continue;
            };
            let default = match &key["default"] {
                Value::String(word) => word.clone(),
                Value::Bool(yes) => yes.to_string(),
                Value::Number(number) => number.to_string(),
                _ => continue,
            };
            let said = text.split_once("Default").map_or("", |(_, rest)| rest.trim_start_matches(':'));
            let said = said.split_whitespace().next().unwrap_or("").trim_matches(['`', '.', ',', ';']).replace(',', "");
            if said != default && said.parse::<f64>() != default.parse() {
                wrong.push(format!("{path}: the default is {default}, not {said}"));
            }
            checked += 1;
        }
        assert!(found.len() > 100 && checked > 50, "{checked} of {} keys", found.len());
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}
