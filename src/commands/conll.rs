//! CoNLL files to be labelled: a word a line in, the same lines with what the model says out.

use crate::data::labels;
use crate::model::Decoded;
use crate::task::{Task, TaskKind};

/// The lines of a sentence, each with its word unless it is a comment: the first column, or in CoNLL-U the second.
pub fn lines(block: &str) -> Vec<(&str, Option<&str>)> {
    fn word(line: &str) -> Option<&str> {
        if line.starts_with("# ") || (line.starts_with('#') && line.contains(" = ")) {
            return None;
        }
        let columns: Vec<&str> = match line.contains('\t') {
            true => line.split('\t').map(str::trim).collect(),
            false => line.split_whitespace().collect(),
        };
        match columns.len() == 10 && columns[0].starts_with(|c: char| c.is_ascii_digit()) {
            // Words of several tokens and empty nodes are no words of the sentence.
            true if columns[0].contains(['-', '.']) => None,
            true => Some(columns[1]),
            false => columns.first().copied(),
        }
    }
    block.lines().map(|line| (line, word(line))).collect()
}

/// A sentence's `lines`, each with the number of its word if it has one: with a comment `# TASK = CLASS` for each class, and a
/// further column for the tags of each tagging task. Ends with a line end.
pub fn written(lines: &[(String, Option<usize>)], decoded: Option<&[Decoded]>, tasks: &[Task]) -> String {
    let (mut out, mut columns) = (String::new(), Vec::new());
    for (task, decoded) in tasks.iter().zip(decoded.into_iter().flatten()) {
        let (labels, _) = labels::written(task, &decoded.labels);
        match task.kind {
            TaskKind::Classification => out += &format!("# {} = {}\n", task.name, labels[0]),
            TaskKind::Tagging(_) => columns.push(labels),
        }
    }
    for (line, word) in lines {
        out += line;
        let separator = if line.contains('\t') || !line.contains(' ') { "\t" } else { " " };
        if let Some(word) = *word {
            columns.iter().for_each(|labels| out.extend([separator, labels[word].as_str()]));
        }
        out.push('\n');
    }
    out
}
