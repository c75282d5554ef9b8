//! JSON: one object per line, an array of rows within one file, and Rasa's training data.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde_json::Value;
use serde_json::value::RawValue;

use super::unique::Unique;
use super::{Cut, Format, Layout, Offsets, Parsed, WrittenSpan, in_parts, lines, tags_of_spans, words_of};
use crate::data::rows::{Field, RowsBuilder, Wanted};
use crate::problem::{Place, Problem};
use crate::run::atomic::folder_of;
use crate::task::{TaskKind, from_bio};

pub fn read_lines(path: &Path, text: &str, layout: &Layout, wanted: &[Wanted]) -> Parsed {
    in_parts((path, text), Cut::Line, wanted, |part, first_line, builder| {
        for (number, line) in lines(part, first_line) {
            if line.trim().is_empty() {
                continue;
            }
            match row_of(line) {
                Ok(row) => add_row(number, &row, layout, builder),
                Err(message) => builder.error(number, message),
            }
        }
    })
}

/// Parses a row.
pub fn row_of(text: &str) -> Result<Value, String> {
    let row = serde_json::from_str(text).map(|Unique(row)| row);
    row.map_err(|error| match error.is_data() {
        true => without_line(&error),
        false => format!("not JSON: {}", without_line(&error)),
    })
}

/// `serde_json` counts lines from the start of the row, which is usually one line: only the column is informative.
fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rsplit_once(" at line ") {
        Some((message, _)) => format!("{message} (column {})", error.column()),
        None => text,
    }
}

/// Splits `file.json#a/b` into the file and the path to the array of rows in it. File and folder names may contain `#`.
pub fn split_pointer(path: &Path, format: Format) -> (PathBuf, Vec<String>) {
    let text = path.to_string_lossy();
    let default = if format == Format::Rasa { "rasa_nlu_data/common_examples" } else { "" };
    let cuts = text.match_indices('#').map(|(at, _)| (&text[..at], &text[at + 1..]));
    let ways: Vec<(&str, &str)> = std::iter::once((&*text, default)).chain(cuts).collect();
    let is_there = |(file, _): &&(&str, &str)| Path::new(file).is_file();
    // If no file exists, choose the one that an error message should name.
    let could_be = |(file, _): &&(&str, &str)| {
        let file = Path::new(file);
        file.file_name().is_some_and(|name| !name.to_string_lossy().contains('#')) && folder_of(file).is_dir()
    };
    let (file, pointer) = ways.iter().find(is_there).or_else(|| ways.iter().find(could_be)).unwrap_or(&ways[0]);
    let steps = pointer.split('/').filter(|step| !step.is_empty()).map(str::to_owned);
    (PathBuf::from(file), steps.collect())
}

pub fn read_array(path: &Path, text: &str, pointer: &[String], layout: &Layout, wanted: &[Wanted]) -> Parsed {
    let mut builder = RowsBuilder::new(path, wanted);
    match rows_at(text, pointer) {
        Err((line, message)) => return (Vec::new(), vec![Problem::error(Place::new(path, line), message)]),
        Ok(rows) => {
            let start = |row: &RawValue| row.get().as_ptr() as usize - text.as_ptr() as usize;
            // All rows are on one line, as programs write them: locate them by row number.
            let in_a_line = rows.len() > 1 && !text[start(rows[0])..start(rows[rows.len() - 1])].contains('\n');
            let (mut seen, mut line) = (0, 1);
            for (i, row) in rows.into_iter().enumerate() {
                line += text.as_bytes()[seen..start(row)].iter().filter(|&&byte| byte == b'\n').count();
                seen = start(row);
                let line = if in_a_line { Place::row(i + 1) } else { line };
                match row_of(row.get()) {
                    Ok(row) => add_row(line, &row, layout, &mut builder),
                    Err(message) => builder.error(line, message),
                }
            }
        }
    }
    (vec![builder.rows], builder.problems)
}

/// The rows of the array at `pointer`, each as text, so that its line can be determined.
fn rows_at<'a>(text: &'a str, pointer: &[String]) -> Result<Vec<&'a RawValue>, (usize, String)> {
    let not_json = |error: serde_json::Error| (error.line(), format!("not JSON: {error}"));
    let mut value: &RawValue = serde_json::from_str(text).map_err(not_json)?;
    for step in pointer {
        let object: indexmap::IndexMap<Cow<str>, &RawValue> =
            serde_json::from_str(value.get()).map_err(|_| (0, format!("no object with a key `{step}`")))?;
        let keys = || object.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
        value = object.get(step.as_str()).ok_or_else(|| (0, format!("no key `{step}`; the keys are {}", keys())))?;
    }
    serde_json::from_str(value.get()).map_err(|_| {
        let message = "not an array of rows; name the array after the file, as in `data.json#train`";
        (0, message.to_owned())
    })
}

/// The value of a column in a row: by key in an object, by number in an array; `data.text` is `text` within `data`.
pub fn value<'a>(row: &'a Value, column: &str) -> Option<&'a Value> {
    let found = match row {
        Value::Object(object) => object.get(column),
        Value::Array(array) => column.parse::<usize>().ok().and_then(|index| array.get(index)),
        _ => None,
    };
    let within = || column.split_once('.').and_then(|(outer, inner)| value(value(row, outer)?, inner));
    found.or_else(within).filter(|value| !value.is_null())
}

fn add_row(line: usize, row: &Value, layout: &Layout, builder: &mut RowsBuilder) {
    let (words, mut ranges, mut length) = match words(row, layout) {
        Ok(words) => words,
        Err(message) => return builder.error(line, message),
    };
    if layout.offsets == Offsets::Words {
        (ranges, length) = ((0..words.len()).map(|i| (i, i + 1)).collect(), words.len());
    }
    let mut fields = Vec::new();
    for wanted in builder.wanted {
        let found = match (labels(row, wanted, layout), wanted.kind) {
            (None, _) => Ok(Field::Absent),
            (Some(found), TaskKind::Classification) => class(found),
            (Some(found), TaskKind::Tagging(scheme)) => match spans(found).filter(|_| wanted.kind.has_spans()) {
                None => tags(found, wanted.kind),
                Some(Err(message)) => Err(format!(": {message}")),
                Some(Ok(spans)) => {
                    let other = spans.iter().filter_map(|span| other_text(span, row, layout));
                    other.for_each(|message| builder.warning(line, message));
                    // Its errors are already reported.
                    let Some(bio) = tags_of_spans((&ranges, length), spans, (line, builder)) else { return };
                    let tags = from_bio(scheme, &bio.iter().map(String::as_str).collect::<Vec<_>>());
                    Ok(Field::Tags(tags.into_iter().map(Cow::Owned).collect()))
                }
            },
        };
        match found {
            Ok(field) => fields.push(field),
            Err(message) => return builder.error(line, format!("`{}`{message}", wanted.column)),
        }
    }
    builder.push(line, &words, &fields);
}

/// The labels of a row in a column, if it has any: an empty list of classes and a list of nulls are none. Rasa omits `entities`
/// where there are none, which means that every word is outside.
fn labels<'a>(row: &'a Value, wanted: &Wanted, layout: &Layout) -> Option<&'a Value> {
    static NONE: Value = Value::Array(Vec::new());
    let rasa = layout.format == Format::Rasa && wanted.column == "entities" && wanted.kind.has_spans();
    let none = (rasa && row.get("entities").is_none()).then_some(&NONE);
    value(row, &wanted.column).or(none).filter(|found| match (found, wanted.kind) {
        (Value::Array(all), TaskKind::Classification) => !all.is_empty(),
        (Value::Array(all), TaskKind::Tagging(_)) => all.is_empty() || !all.iter().all(Value::is_null),
        _ => true,
    })
}

/// # Errors
/// The end of a message that begins with the column.
fn class(found: &Value) -> Result<Field<'_>, String> {
    match scalar(found) {
        Some(label) if label.is_empty() => Ok(Field::Absent),
        Some(label) => Ok(Field::Class(label)),
        None => Err(format!(" is not a label: {found}")),
    }
}

/// Tags as a list of texts or numbers, or as one text.
///
/// # Errors
/// The end of a message that begins with the column.
fn tags(found: &Value, kind: TaskKind) -> Result<Field<'_>, String> {
    match found {
        Value::String(tags) => Ok(Field::Tags(tags.split_whitespace().map(Cow::Borrowed).collect())),
        Value::Array(items) if items.iter().all(Value::is_string) => {
            Ok(Field::Tags(items.iter().filter_map(Value::as_str).map(Cow::Borrowed).collect()))
        }
        Value::Array(items) if items.iter().all(Value::is_number) => {
            Ok(Field::Tags(items.iter().map(|number| Cow::Owned(number.to_string())).collect()))
        }
        Value::Array(items) if items.contains(&Value::Null) => Err(": a word has no tag; tag all or none".to_owned()),
        _ if kind.has_spans() => Err(" is neither tags nor spans ({start, end, label})".to_owned()),
        _ => Err(" is not a list of tags, one per word".to_owned()),
    }
}

/// What to say of a span that names another text than stands there.
fn other_text(span: &WrittenSpan, row: &Value, layout: &Layout) -> Option<String> {
    let WrittenSpan { start, end, label, text: said } = span;
    let column = layout.text.as_deref().unwrap_or("text");
    let characters = layout.tokens.is_none() && layout.offsets == Offsets::Characters;
    let text = value(row, column)?.as_str().filter(|_| characters)?;
    let there: String = text.chars().skip(*start).take(end.saturating_sub(*start)).collect();
    let said = said.filter(|said| *said != there && !there.is_empty())?;
    Some(format!("span {start}..{end} `{label}` is recorded as `{said}`, but the text at its offsets is `{there}`"))
}

fn scalar(value: &Value) -> Option<Cow<'_, str>> {
    match value {
        Value::String(text) => Some(Cow::Borrowed(text.trim())),
        Value::Number(_) | Value::Bool(_) => Some(Cow::Owned(value.to_string())),
        // A list of one label, as annotation tools write it.
        Value::Array(items) => match items.as_slice() {
            [only] => scalar(only),
            _ => None,
        },
        _ => None,
    }
}

/// Words, their character ranges, and the number of characters of the text.
type Words<'a> = (Vec<&'a str>, Vec<(usize, usize)>, usize);

fn words<'a>(row: &'a Value, layout: &Layout) -> Result<Words<'a>, String> {
    if let Some(column) = &layout.tokens {
        let found = value(row, column).ok_or_else(|| missing(row, column))?;
        let words: Vec<&str> = match found {
            Value::Array(words) if words.iter().all(Value::is_string) => {
                words.iter().filter_map(Value::as_str).collect()
            }
            Value::String(words) => words.split_whitespace().collect(),
            _ => return Err(format!("`{column}` is not a list of words")),
        };
        let mut at = 0;
        let range = |word: &&str| {
            let start = at;
            at += word.chars().count() + 1;
            (start, at - 1)
        };
        let ranges: Vec<(usize, usize)> = words.iter().map(range).collect();
        let length = ranges.last().map_or(0, |&(_, end)| end);
        return Ok((words, ranges, length));
    }
    let column = layout.text.as_deref().unwrap_or("text");
    match value(row, column) {
        Some(Value::String(text)) => {
            let (words, ranges) = words_of(layout.splitter, text);
            Ok((words, ranges, text.chars().count()))
        }
        Some(_) => Err(format!("`{column}` is not a string")),
        None => Err(missing(row, column)),
    }
}

fn missing(row: &Value, column: &str) -> String {
    match row {
        Value::Object(object) if object.contains_key(column) => format!("`{column}` is null"),
        Value::Object(object) if object.is_empty() => format!("no `{column}`: the row is empty"),
        Value::Object(object) => {
            let keys: Vec<String> = object.keys().map(|key| format!("`{key}`")).collect();
            format!("no `{column}`; the keys are {}", keys.join(", "))
        }
        Value::Array(array) => {
            let hint = match array.iter().all(Value::is_object) {
                true => "; if the whole file is one array, use `format: json`",
                false => "",
            };
            format!("no column {column}: the row has {}, numbered from 0{hint}", array.len())
        }
        _ => "the row is neither an object nor an array".to_owned(),
    }
}

/// Reads spans: objects with `start`, `end` and `label` (or the names that other tools use), or `[start, end, label]`.
/// `None` if the value is not a list of spans; an empty list is a sentence without spans.
fn spans(value: &Value) -> Option<Result<Vec<WrittenSpan<'_>>, String>> {
    let Value::Array(items) = value else { return None };
    let tags = items.iter().any(Value::is_string) || (!items.is_empty() && items.iter().all(Value::is_number));
    if tags {
        return None;
    }
    fn read(item: &Value) -> Result<WrittenSpan<'_>, String> {
        let number = |value: Option<&Value>| value.and_then(Value::as_u64).map(|n| n as usize);
        let text = item.get("text").and_then(Value::as_str);
        let (start, end, label) = match item {
            Value::Object(object) => {
                let of = |keys: &[&str]| keys.iter().find_map(|key| object.get(*key));
                let label = of(&["label", "entity", "type", "labels"]);
                (number(of(&["start", "start_offset"])), number(of(&["end", "end_offset"])), label)
            }
            Value::Array(array) => (number(array.first()), number(array.get(1)), array.get(2)),
            _ => (None, None, None),
        };
        let label = label
            .map(|label| label.get(0).filter(|_| label.as_array().is_some_and(|all| all.len() == 1)).unwrap_or(label));
        match (start, end, label.and_then(Value::as_str)) {
            (Some(start), Some(end), Some(label)) => Ok(WrittenSpan { start, end, label, text }),
            _ => {
                let item = item.to_string().replace('`', "'");
                Err(format!("`{item}` is not a span: it needs `start` and `end`, whole numbers from 0, and a `label`"))
            }
        }
    }
    Some(items.iter().map(read).collect())
}
