//! `polytask options`: every key of an experiment file, from the doc comments of its types.

use anyhow::Result;
use comfy_table::{ContentArrangement, Table, presets};
use serde_json::Value;
use terminal_size::terminal_size;

use super::cli::OptionsArgs;
use super::{End, say};
use crate::config::join;
use crate::config::schema::{range, schema};
use crate::problem::invalid;

pub fn run(args: &OptionsArgs) -> Result<End> {
    let schema = schema();
    if args.schema {
        say(serde_json::to_string_pretty(&schema)?)?;
        return Ok(End::Done);
    }
    let mut rows = Vec::new();
    list(&schema, "", 0, &mut rows);
    if let Some(path) = &args.path {
        // `tasks.intent` matches `tasks.NAME`.
        let wanted: Vec<&str> = path.split('.').collect();
        rows.retain(|row| {
            let mut keys = row.path.split('.');
            wanted.iter().all(|wanted| keys.next().is_some_and(|key| key == *wanted || key == NAME))
        });
        if rows.is_empty() {
            return Err(invalid(format!("no option `{path}`; `polytask options` lists all options")));
        }
    }
    let outer = rows.iter().map(|row| row.depth).min().unwrap_or(0);
    let width = terminal_size().map_or(WIDTH, |(width, _)| width.0.min(WIDTH));
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    for row in rows {
        table.add_row([format!("{}{}", "  ".repeat(row.depth - outer), row.key), row.meaning]);
    }
    say(table.trim_fmt())?;
    Ok(End::Done)
}

/// Maximum width of the listing, in columns.
const WIDTH: u16 = 120;
/// Placeholder for the keys of a mapping with arbitrary keys.
const NAME: &str = "NAME";

/// A line of the listing.
struct Row {
    path: String,
    depth: usize,
    key: String,
    /// The doc comment as one paragraph, and the range.
    meaning: String,
}

impl Row {
    fn new(path: &str, depth: usize, key: String, of: &Value) -> Row {
        let text = of["description"].as_str().unwrap_or_default();
        let mut words: Vec<&str> = text.split_whitespace().collect();
        let range = range(of).map(|range| format!("Must be {range}."));
        words.extend(range.as_deref());
        let meaning = words.join(" ");
        Row { path: path.to_owned(), depth, key, meaning }
    }
}

/// Lists what a value may be: the keys of a mapping with their values, the items of a list, kinds, words.
fn list(schema: &Value, path: &str, depth: usize, rows: &mut Vec<Row>) {
    for (key, inner) in keys(schema) {
        let path = join(path, key);
        rows.push(Row::new(&path, depth, format!("{key}:"), inner));
        list(inner, &path, depth + 1, rows);
    }
    if let Some(items) = schema.get("items") {
        list(items, path, depth, rows);
    }
    let choices: Vec<&Value> = ["oneOf", "anyOf"].iter().filter_map(|key| schema[key].as_array()).flatten().collect();
    for (i, choice) in choices.iter().enumerate() {
        if let Some(word) = choice["const"].as_str() {
            rows.push(Row::new(path, depth, word.to_owned(), choice));
        } else if let Some((tag, kind)) = tag(choice) {
            rows.push(Row::new(path, depth, format!("{tag}: {}", kind["const"].as_str().unwrap_or_default()), kind));
            // Consecutive kinds with the same keys share one list of these keys.
            if choices.get(i + 1).is_none_or(|next| keys(next) != keys(choice)) {
                list(choice, path, depth + 1, rows);
            }
        } else {
            list(choice, path, depth, rows);
        }
    }
}

fn properties(schema: &Value) -> impl Iterator<Item = (&str, &Value)> {
    schema["properties"].as_object().into_iter().flatten().map(|(key, inner)| (key.as_str(), inner))
}

/// The key that names the kind of a mapping, with its schema.
fn tag(schema: &Value) -> Option<(&str, &Value)> {
    properties(schema).find(|(_, inner)| inner["const"].is_string())
}

/// The other keys, with [`NAME`] for arbitrary ones.
fn keys(schema: &Value) -> Vec<(&str, &Value)> {
    let named = Some((NAME, &schema["additionalProperties"])).filter(|(_, inner)| inner.is_object());
    properties(schema).filter(|(_, inner)| !inner["const"].is_string()).chain(named).collect()
}
