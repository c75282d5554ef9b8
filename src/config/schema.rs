//! What an experiment file may hold, as JSON Schema, from the types and their doc comments.

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::Experiment;
use super::keys::{join, tag_key};

/// The JSON Schema (draft 7, which editors read) of experiment files. It has no subschemas by reference.
///
/// Nothing is required, since a file may extend another.
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

/// The mappings that have a key of this name, by dotted path; those of sets and tasks are `data.sets.*` and `tasks.*`.
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

/// From how types are read to how files are written: a kind is named by a key, or stands alone.
fn to_written(schema: &mut Value, path: &str) {
    let Value::Object(object) = schema else { return };
    object.remove("required");
    for (bound, value) in bounds(object) {
        object.insert(bound.to_owned(), value.into());
    }
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
    // A word with a value: the description is the word's.
    for choice in object.get_mut("oneOf").and_then(Value::as_array_mut).into_iter().flatten() {
        let description = choice["description"].clone();
        for (_, inner) in choice.get_mut("properties").and_then(Value::as_object_mut).into_iter().flatten() {
            inner["description"] = description.clone();
        }
    }
}

/// The bounds of a number, which its description states.
fn bounds(schema: &Map<String, Value>) -> Vec<(&'static str, u64)> {
    let kinds = schema.get("type").map(Value::to_string).unwrap_or_default();
    let text = schema.get("description").and_then(Value::as_str).unwrap_or_default();
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if !(kinds.contains("number") || kinds.contains("integer")) {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut bound = |words: &str, name| {
        let after = text.to_lowercase().split_once(words).map(|(_, after)| after.to_owned()).unwrap_or_default();
        let number = after.split(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok());
        found.extend(number.map(|number: u64| (name, number)));
    };
    bound("at least ", "minimum");
    bound(", at most ", "maximum");
    bound("more than ", "exclusiveMinimum");
    bound("below ", "exclusiveMaximum");
    if text.contains("from 0 to below 1") || text.ends_with(", not negative.") {
        found.push(("minimum", 0));
    }
    if text.contains("Between 0 and 1.") {
        found.extend([("exclusiveMinimum", 0), ("exclusiveMaximum", 1)]);
    }
    if text.ends_with(", 0 to 1.") {
        found.extend([("minimum", 0), ("maximum", 1)]);
    }
    found
}

/// `{properties: {NAME: INNER}}` as INNER with the key `tag`.
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
    fn bounds_are_those_of_the_descriptions() {
        let schema = schema();
        let of = |pointer: &str| {
            let found = schema.pointer(pointer).unwrap();
            ["minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"].map(|bound| found[bound].as_u64())
        };
        let training = "/properties/training/properties";
        assert_eq!(of(&format!("{training}/batch_size")), [Some(1), None, None, None]);
        assert_eq!(of(&format!("{training}/ema_decay")), [None, None, None, Some(1)]);
        assert_eq!(of("/properties/model/properties/trunk/properties/dropout"), [Some(0), None, None, Some(1)]);
        assert_eq!(of("/properties/data/properties/train_fraction"), [None, Some(0), Some(1), None]);
        let set = "/properties/data/properties/sets/additionalProperties/properties";
        assert_eq!(of(&format!("{set}/dev_fraction")), [Some(0), None, None, Some(1)]);
        assert_eq!(of("/properties/seed")[1..], [None; 3]);
        let text = "The trunk layer that the head reads, counted from 1; 0 is the last. Default 0.";
        let layer = json!({"type": "integer", "description": text});
        assert_eq!(bounds(layer.as_object().unwrap()), []);
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
