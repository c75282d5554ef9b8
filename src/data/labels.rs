//! From labels in the data to label ids: class names, plain tags, and spans as BIO tags.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use super::rows::{ABSENT, Column, Rows};
use crate::problem::{Problem, Severity};
use crate::task::{Scheme, Span, Tag, Task, TaskKind, from_bio, spans_of};

/// Marks a decision without a label in encoded targets.
pub const NO_LABEL: i32 = -1;

/// The label set of a task from its columns: classes and plain tags sorted; for spans `O`, then `B-` and `I-` of each
/// type, sorted by type.
pub fn collect(kind: TaskKind, columns: &[&Column]) -> Vec<String> {
    let written = || columns.iter().flat_map(|column| column.used());
    match kind {
        TaskKind::Classification | TaskKind::Tagging(Scheme::Plain) => {
            written().map(str::to_owned).collect::<BTreeSet<_>>().into_iter().collect()
        }
        TaskKind::Tagging(scheme) => {
            let types: BTreeSet<&str> = written()
                .filter_map(|tag| scheme.parse(tag))
                .map(|tag| tag.kind)
                .filter(|kind| !kind.is_empty())
                .collect();
            tags_of_types(types)
        }
    }
}

/// The label set of a task from the names that the user gives: classes, plain tags, or span types.
pub fn named(kind: TaskKind, names: &[String]) -> Vec<String> {
    match kind.has_spans() {
        true => tags_of_types(names),
        false => names.to_vec(),
    }
}

fn tags_of_types(types: impl IntoIterator<Item = impl Display>) -> Vec<String> {
    let tags = types.into_iter().flat_map(|kind| [format!("B-{kind}"), format!("I-{kind}")]);
    std::iter::once("O".to_owned()).chain(tags).collect()
}

/// Labels as the user names them: classes, plain tags, or span types.
pub fn names(kind: TaskKind, labels: &[String]) -> Vec<&str> {
    match kind.has_spans() {
        true => labels.iter().filter_map(|label| label.strip_prefix("B-")).collect(),
        false => labels.iter().map(String::as_str).collect(),
    }
}

/// Label ids by name.
pub struct Labels<'a> {
    kind: TaskKind,
    ids: BTreeMap<&'a str, i32>,
}

impl<'a> Labels<'a> {
    /// The labels of the task, then `more`, which the task does not have.
    pub fn new(task: &'a Task, more: &'a [String]) -> Self {
        let all = task.labels.iter().chain(more).enumerate();
        Labels { kind: task.kind, ids: all.map(|(id, label)| (label.as_str(), id as i32)).collect() }
    }

    /// The label ids of a whole column: one per row for classes, one per word for tags, [`NO_LABEL`] if absent.
    pub fn encode(&self, rows: &Rows, column: usize) -> Vec<i32> {
        let strings = &rows.columns[column].strings;
        let values = &rows.columns[column].values;
        match self.kind {
            TaskKind::Tagging(scheme) if scheme != Scheme::Plain => self.encode_spans(scheme, rows, column),
            _ => {
                let ids: Vec<i32> = strings.iter().map(|label| self.id(label)).collect();
                values.iter().map(|&value| if value == ABSENT { NO_LABEL } else { ids[value as usize] }).collect()
            }
        }
    }

    fn encode_spans(&self, scheme: Scheme, rows: &Rows, column: usize) -> Vec<i32> {
        let parsed = parse_all(scheme, &rows.columns[column]);
        // (first, inside) label of each type.
        let types: BTreeMap<&str, (i32, i32)> = self
            .ids
            .keys()
            .filter_map(|label| label.strip_prefix("B-"))
            .map(|kind| (kind, (self.id(&format!("B-{kind}")), self.id(&format!("I-{kind}")))))
            .collect();
        let mut ids = Vec::with_capacity(rows.word_ids.len());
        for row in 0..rows.len() {
            let n = rows.words_of(row).len();
            let Some(values) = rows.tags_of(column, row) else {
                ids.extend(std::iter::repeat_n(NO_LABEL, n));
                continue;
            };
            let start = ids.len();
            ids.extend(std::iter::repeat_n(self.id("O"), n));
            let tags = values.iter().map(|&value| parsed[value as usize].unwrap_or(Tag::OUTSIDE));
            for span in spans_of(tags) {
                let (first, inside) = types.get(span.kind).copied().unwrap_or((NO_LABEL, NO_LABEL));
                ids[start + span.start] = first;
                ids[start + span.start + 1..start + span.end].fill(inside);
            }
        }
        ids
    }

    fn id(&self, label: &str) -> i32 {
        self.ids.get(label).copied().unwrap_or(NO_LABEL)
    }
}

fn parse_all(scheme: Scheme, column: &Column) -> Vec<Option<Tag<'_>>> {
    column.strings.iter().map(|tag| scheme.parse(tag)).collect()
}

/// Tags that their scheme does not have (errors) and sequences that violate it (warnings), by file and line.
pub fn check_tags(scheme: Scheme, name: &str, rows: &Rows, column: usize) -> Vec<Problem> {
    let mut problems = Vec::new();
    if scheme == Scheme::Plain {
        return problems;
    }
    let strings = &rows.columns[column].strings;
    let parsed = parse_all(scheme, &rows.columns[column]);
    // If the scheme is wrong, report that once, not every word.
    let schemes = [Scheme::Bio, Scheme::Bioes, Scheme::Bmes, Scheme::Bilou];
    let fits = |scheme: &&Scheme| strings.iter().all(|tag| scheme.parse(tag).is_some());
    let of_none = |tag: &str| schemes.iter().all(|scheme| scheme.parse(tag).is_none());
    let named = || strings.iter().filter(|tag| *tag != "O");
    let has_no_spans = || named().all(of_none) && named().any(|tag| !tag.contains('-'));
    let hint = match schemes.iter().find(fits) {
        _ if !parsed.contains(&None) => String::new(),
        Some(&other) => format!("; all tags of this column would fit `scheme: {}`", name_of(other)),
        None if has_no_spans() => "; tags without spans, such as parts of speech, need `scheme: plain`".to_owned(),
        None => String::new(),
    };
    let mut add = |severity, (row, word), message: String| {
        problems.push(Problem { severity, place: Some(rows.place_of_word(row, word)), message });
    };
    for row in 0..rows.len() {
        let Some(values) = rows.tags_of(column, row) else { continue };
        let mut previous = None;
        for (i, &value) in values.iter().enumerate() {
            let written = strings.get(value);
            let Some(tag) = parsed[value as usize] else {
                let scheme = name_of(scheme);
                let message = format!("`{name}`, word {}: `{written}` is not a {scheme} tag{hint}", i + 1);
                add(Severity::Error, (row, i), message);
                if !hint.is_empty() {
                    // The hint explains all other errors too.
                    return problems;
                }
                previous = None;
                continue;
            };
            if let Some(reason) = scheme.broken(previous, tag) {
                let word = rows.words.get(rows.words_of(row)[i]);
                add(Severity::Warning, (row, i), format!("`{name}`, word {} `{word}`: `{written}`: {reason}", i + 1));
            }
            previous = Some(tag);
        }
        if previous.is_some_and(|tag| scheme.left_open(tag)) {
            add(Severity::Warning, (row, values.len() - 1), format!("`{name}`: the last span is not closed"));
        }
    }
    problems
}

fn name_of(scheme: Scheme) -> String {
    format!("{scheme:?}").to_lowercase()
}

/// The labels of a sentence in the scheme of the data, from their ids, and the spans in them.
pub fn written(task: &Task, ids: &[usize]) -> (Vec<String>, Vec<Span<String>>) {
    let labels: Vec<&str> = ids.iter().map(|&id| task.labels[id].as_str()).collect();
    match task.kind {
        TaskKind::Tagging(scheme) if scheme != Scheme::Plain => {
            let parsed = labels.iter().map(|tag| Scheme::Bio.parse(tag).unwrap_or(Tag::OUTSIDE));
            let spans = spans_of(parsed);
            let owned = |span: &Span<&str>| Span { start: span.start, end: span.end, kind: span.kind.to_owned() };
            (from_bio(scheme, &labels), spans.iter().map(owned).collect())
        }
        _ => (labels.into_iter().map(str::to_owned).collect(), Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::data::rows::{Field, RowsBuilder, Wanted};
    use std::path::Path;

    #[test]
    fn tags_become_bio_ids_and_come_back_as_written() {
        let wanted = [Wanted { column: "ner".into(), kind: TaskKind::Tagging(Scheme::Bioes) }];
        let mut builder = RowsBuilder::new(Path::new("f"), &wanted);
        builder.push(1, &["a", "b", "c"], &[Field::Tags(["B-x", "E-x", "S-y"].map(Cow::from).to_vec())]);
        builder.push(2, &["d"], &[Field::Absent]);
        builder.push(3, &["e", "f"], &[Field::Tags(["B-x", "O"].map(Cow::from).to_vec())]);
        let mut rows = Rows::new(1);
        rows.append_file(Path::new("f"), vec![builder.rows]);
        let kind = TaskKind::Tagging(Scheme::Bioes);
        let task = Task { name: "ner".into(), kind, labels: collect(kind, &[&rows.columns[0]]) };
        assert_eq!(task.labels, ["O", "B-x", "I-x", "B-y", "I-y"]);
        assert_eq!(Labels::new(&task, &[]).encode(&rows, 0), [1, 2, 3, NO_LABEL, 1, 0]);
        let (tags, spans) = written(&task, &[1, 2, 3]);
        assert_eq!(tags, ["B-x", "E-x", "S-y"]);
        assert_eq!(spans[0], Span { start: 0, end: 2, kind: "x".to_owned() });
        // An I- without a preceding B- starts a span.
        assert_eq!(written(&task, &[2, 0]).0, ["S-x", "O"]);
        assert_eq!(written(&task, &[0, 2]).1[0].start, 1);
        let problems = check_tags(Scheme::Bioes, "ner", &rows, 0);
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].to_string(), "f:3: `ner`, word 2 `f`: `O`: the span before it is not closed");
    }
}
