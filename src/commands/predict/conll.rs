//! CoNLL files to be labelled: a word a line in, the same lines with what the model says out.

use super::saved_model::Trained;
use crate::config::Experiment;
use crate::data::{ConllLayout, ConllLine, Format, labels, line_of_a_word};
use crate::model::{Decoded, HeadConfig};
use crate::task::{Task, TaskKind};

/// What would end a comment within a label.
const LINE_ENDS: [char; 2] = ['\n', '\r'];

/// A line of a sentence.
pub struct Written {
    text: String,
    /// The number of its word, if it has one.
    word: Option<usize>,
}

/// How the experiment's first set of such a format writes its lines, or else with the word first, or as CoNLL-U has it.
pub fn layout_of(experiment: &Experiment, conllu: bool) -> ConllLayout {
    let fits = |format| format == Format::Conllu || (format == Format::Conll && !conllu);
    let mut sets = experiment.data.sets.values().filter(|set| fits(set.format));
    sets.next().map_or_else(|| ConllLayout::new(conllu, &[], None, None), ConllLayout::of)
}

/// The lines of a sentence and its words. Comments that say classes of `tasks` go: the model says them anew.
pub fn lines<'a>(block: &'a str, layout: &ConllLayout, tasks: &[Task]) -> (Vec<Written>, Vec<&'a str>) {
    let (mut lines, mut words) = (Vec::new(), Vec::new());
    let said = |name: &str| tasks.iter().any(|task| task.name == name && task.kind == TaskKind::Classification);
    // A block of comments alone has no word.
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

/// A sentence's lines with a comment `# TASK = CLASS` for each class, and the tags of each tagging task where the format has
/// them. Ends with a line end.
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
