//! Labelling CoNLL files: one word per line in, the same lines with the model's labels out.

use super::saved_model::Trained;
use crate::config::Experiment;
use crate::data::{ConllLayout, ConllLine, Format, labels, line_of_a_word};
use crate::model::{Decoded, HeadConfig};
use crate::task::{Task, TaskKind};

/// Characters of a label that would end a comment line.
const LINE_ENDS: [char; 2] = ['\n', '\r'];

/// A line of a sentence.
pub struct Written {
    text: String,
    /// The index of its word, if it has one.
    word: Option<usize>,
}

/// The layout of the experiment's first set of a matching format, or else the default: the word first, or CoNLL-U.
pub fn layout_of(experiment: &Experiment, conllu: bool) -> ConllLayout {
    let fits = |format| format == Format::Conllu || (format == Format::Conll && !conllu);
    let mut sets = experiment.data.sets.values().filter(|set| fits(set.format));
    sets.next().map_or_else(|| ConllLayout::new(conllu, &[], None, None), ConllLayout::of)
}

/// The lines of a sentence and its words. Comments with classes of `tasks` are dropped: the model predicts them anew.
pub fn lines<'a>(block: &'a str, layout: &ConllLayout, tasks: &[Task]) -> (Vec<Written>, Vec<&'a str>) {
    let (mut lines, mut words) = (Vec::new(), Vec::new());
    let said = |name: &str| tasks.iter().any(|task| task.name == name && task.kind == TaskKind::Classification);
    // A block that has only comments contains no word.
    let last = line_of_a_word(block.lines().last().unwrap_or_default(), "");
    for line in block.lines() {
        let mut word = None;
        match layout.line(line, !words.is_empty(), last) {
            ConllLine::Named(name, _) if said(name) => continue,
            ConllLine::Word(fields) => {
                if let Some(found) = layout.word(&fields) {
                    word = Some(words.len());
                    words.push(found);
                }
            }
            ConllLine::Named(..) | ConllLine::Other => {}
        }
        lines.push(Written { text: line.to_owned(), word });
    }
    (lines, words)
}

/// A sentence's lines with a comment `# TASK = CLASS` per classification task, and the tags of each tagging task in the
/// column that the layout has for them. Ends with a newline.
pub fn written(lines: &[Written], layout: &ConllLayout, decoded: Option<&[Decoded]>, trained: &Trained) -> String {
    let (mut out, mut tags) = (String::new(), Vec::new());
    for (task, decoded) in trained.tasks.iter().zip(decoded.into_iter().flatten()) {
        let (labels, _) = labels::written(task, &decoded.labels);
        let column = trained.experiment.tasks.get(&task.name).map_or("", HeadConfig::column);
        match task.kind {
            TaskKind::Classification => out += &format!("# {} = {}\n", task.name, labels[0].replace(LINE_ENDS, " ")),
            TaskKind::Tagging(_) => tags.push(((task.name.as_str(), column), labels)),
        }
    }
    for Written { text, word } in lines {
        let separator = layout.separator(text);
        let mut fields: Vec<String> = text.split(separator).map(str::to_owned).collect();
        if word.is_some() || (fields.len() > 1 && !text.starts_with('#')) {
            tags.iter()
                .for_each(|(task, labels)| layout.add(&mut fields, *task, word.map(|word| labels[word].as_str())));
        }
        out += &fields.join(separator);
        out.push('\n');
    }
    out
}
