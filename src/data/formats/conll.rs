//! CoNLL with any columns, and CoNLL-U: one word per line, sentences separated by empty lines.

use std::borrow::Cow;
use std::path::Path;

use super::{Cut, Format, Layout, Parsed, in_parts, lines};
use crate::data::rows::{Field, RowsBuilder, Wanted};
use crate::data::set::SetConfig;
use crate::problem::{Place, Problem, counted};
use crate::task::TaskKind;

const CONLLU: [&str; 10] = ["id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc"];

/// Columns of CoNLL-U in which `_` stands for an empty list: feats, deps, misc.
const UNDERSCORE_IS_A_VALUE: [usize; 3] = [5, 8, 9];

/// Where a wanted column is found: in each word's line, or in a comment of the sentence.
enum Source<'a> {
    Column(usize),
    Comment(&'a str),
}

/// A line that holds a word, from which the number of columns is inferred: the sentence's `last` line, or `other` if
/// that may be a comment.
pub fn line_of_a_word<'a>(last: &'a str, other: &'a str) -> &'a str {
    if last.starts_with("# ") { other } else { last }
}

/// The layout of the lines of words.
pub struct ConllLayout {
    conllu: bool,
    separator: Option<String>,
    /// Names of the columns; empty if they have none.
    names: Vec<String>,
    /// The index of the column with the word.
    word: Option<usize>,
}

/// A classified line.
pub enum ConllLine<'a> {
    /// The columns of a word.
    Word(Vec<&'a str>),
    /// A comment `# name = value` or `# name: value`.
    Named(&'a str, &'a str),
    /// Another comment, the start of a document, a range (`3-4`) or an empty node (`5.1`).
    Other,
}

impl ConllLayout {
    /// The layout that a set configures.
    pub fn of(set: &SetConfig) -> ConllLayout {
        ConllLayout::new(set.format == Format::Conllu, &set.columns, set.separator.clone(), set.tokens.as_deref())
    }

    /// `word` is the name or the number of a column.
    pub fn new(conllu: bool, columns: &[String], separator: Option<String>, word: Option<&str>) -> ConllLayout {
        let names = if conllu { CONLLU.map(str::to_owned).to_vec() } else { columns.to_vec() };
        let mut layout = ConllLayout { conllu, separator, names, word: None };
        layout.word = layout.position(word.unwrap_or(if conllu { "form" } else { "0" }));
        layout
    }

    /// The index of a column, given by its name or number.
    fn position(&self, name: &str) -> Option<usize> {
        self.names.iter().position(|known| known == name).or_else(|| name.parse().ok())
    }

    fn n_columns(&self) -> Option<usize> {
        (!self.conllu && !self.names.is_empty()).then_some(self.names.len())
    }

    /// Classifies a line. `within`: whether a word of the sentence precedes it; `last`: the sentence's last line, or
    /// another line of a word.
    pub fn line<'a>(&self, line: &'a str, within: bool, last: &str) -> ConllLine<'a> {
        if line.starts_with("-DOCSTART-") {
            return ConllLine::Other;
        }
        let comment = line.strip_prefix('#').filter(|_| !within);
        let comment = comment.filter(|rest| !rest.contains('\t'));
        let named = comment.filter(|rest| rest.starts_with(' ') || rest.contains(" = "));
        let pair = named.and_then(|rest| rest.split_once(['=', ':']));
        // A `:` must directly follow the name and precede a space, as in `# intent: greet`.
        let spelled = |(name, value): &(&str, &str)| {
            let colon = named.is_some_and(|rest| rest[name.len()..].starts_with(':'));
            let apart = name.ends_with(' ') || !(value.is_empty() || value.starts_with(' '));
            let is_name = !name.trim().is_empty() && !name.trim().contains(' ');
            is_name && (!colon || !apart)
        };
        if let Some((name, value)) = pair.filter(spelled) {
            let (name, value) = (name.trim(), value.trim());
            return if value.is_empty() { ConllLine::Other } else { ConllLine::Named(name, value) };
        }
        let first = comment.and_then(|rest| rest.split_whitespace().next());
        let boundary = first.is_some_and(|word| ["newdoc", "newpar"].contains(&word));
        if boundary || self.conllu && line.starts_with('#') {
            return ConllLine::Other;
        }
        let fields = self.fields(line);
        let other = self.conllu && fields[0].contains(['-', '.']);
        let unlike = || {
            let n_columns = self.n_columns().unwrap_or_else(|| self.fields(last).len());
            n_columns != fields.len() || (last.contains('\t') && !line.contains('\t'))
        };
        let prose = line.starts_with("# ") && !within && unlike();
        if other || prose { ConllLine::Other } else { ConllLine::Word(fields) }
    }

    fn fields<'a>(&self, line: &'a str) -> Vec<&'a str> {
        match &self.separator {
            Some(separator) => line.split(separator.as_str()).collect(),
            None if self.conllu || line.contains('\t') => line.split('\t').collect(),
            None => line.split_ascii_whitespace().collect(),
        }
    }

    /// The word among the columns of a line; the first column if the line has too few.
    pub fn word<'a>(&self, fields: &[&'a str]) -> Option<&'a str> {
        fields.get(self.word.unwrap_or(0)).or(fields.first()).copied()
    }

    /// Adds a task's tag to the columns of a line (`None` if it holds no word). CoNLL-U: in the column that training
    /// read, if that is one of the ten, else in `misc` as `TASK=TAG`. Other formats: in a new column.
    pub fn add(&self, fields: &mut Vec<String>, (task, column): (&str, &str), tag: Option<&str>) {
        match tag {
            _ if !self.conllu => fields.push(tag.unwrap_or("_").to_owned()),
            None => {}
            Some(tag) => {
                fields.resize(fields.len().max(CONLLU.len()), "_".to_owned());
                match CONLLU.iter().position(|known| *known == column) {
                    Some(own) => fields[own] = tag.to_owned(),
                    None => {
                        let misc = &mut fields[CONLLU.len() - 1];
                        let before = if misc == "_" { String::new() } else { format!("{misc}|") };
                        *misc = format!("{before}{task}={tag}");
                    }
                }
            }
        }
    }

    /// The separator between the columns of `line`.
    pub fn separator<'a>(&'a self, line: &str) -> &'a str {
        let unknown = if line.contains('\t') || !line.trim().contains(' ') { "\t" } else { " " };
        self.separator.as_deref().unwrap_or(if self.conllu { "\t" } else { unknown })
    }
}

struct Plan<'a> {
    layout: ConllLayout,
    word: usize,
    sources: Vec<Source<'a>>,
}

pub fn read(path: &Path, text: &str, layout: &Layout, wanted: &[Wanted]) -> Parsed {
    let conllu = layout.format == Format::Conllu;
    let own = ConllLayout::new(conllu, &layout.columns, layout.separator.clone(), layout.tokens.as_deref());
    let mut problems = Vec::new();
    let mut position = |name: &str| {
        let found = own.position(name);
        if found.is_none() {
            let message = match own.names.as_slice() {
                [] => {
                    format!("no column `{name}`: name the columns with `columns:`, or use its number from 0 in quotes")
                }
                names => {
                    format!("no column `{name}`: use its number from 0 in quotes, or one of: {}", names.join(", "))
                }
            };
            problems.push(Problem::error(Place::new(path, 0), message));
        }
        found.unwrap_or(0)
    };
    let word = position(layout.tokens.as_deref().unwrap_or(if conllu { "form" } else { "0" }));
    let sources = wanted
        .iter()
        .map(|wanted| match wanted.kind {
            TaskKind::Tagging(_) => Source::Column(position(&wanted.column)),
            TaskKind::Classification => Source::Comment(&wanted.column),
        })
        .collect();
    if !problems.is_empty() {
        return (Vec::new(), problems);
    }
    let plan = Plan { layout: own, word, sources };
    let is_plain = |line: &&str| !line.trim().is_empty() && !line.starts_with('#') && !line.starts_with("-DOCSTART-");
    let of_a_word = text.lines().find(is_plain).unwrap_or_default();
    in_parts((path, text), Cut::EmptyLine, wanted, |part, first_line, builder| {
        let mut block = Vec::new();
        for (number, line) in lines(part, first_line).chain([(0, "")]) {
            if !line.trim().is_empty() {
                block.push((number, line));
                continue;
            }
            let last = block.last().map_or("", |(_, last)| last);
            let last = line_of_a_word(last, of_a_word);
            let mut sentence = Sentence::default();
            block.iter().for_each(|&line| sentence.add(line, last, &plan, builder));
            sentence.finish(&plan, builder);
            block.clear();
        }
    })
}

#[derive(Default)]
struct Sentence<'a> {
    first_line: usize,
    words: Vec<&'a str>,
    tags: Vec<Vec<&'a str>>,
    comments: Vec<(&'a str, &'a str)>,
    /// Whether other lines occur between those of the words.
    gaps: bool,
    broken: bool,
}

impl<'a> Sentence<'a> {
    fn add(&mut self, (number, line): (usize, &'a str), last: &str, plan: &Plan, builder: &mut RowsBuilder) {
        let fields = match plan.layout.line(line, !self.words.is_empty(), last) {
            ConllLine::Word(fields) => fields,
            ConllLine::Other => return,
            ConllLine::Named(name, value) => {
                let wanted = |source: &Source| matches!(source, Source::Comment(wanted) if *wanted == name);
                let other = self.comments.iter().find(|(known, other)| *known == name && *other != value);
                if let Some((_, other)) = other.filter(|_| plan.sources.iter().any(wanted)) {
                    builder.error(
                        number,
                        format!("a second `{name}`, `{value}`, for a sentence that already has `{other}`"),
                    );
                    self.broken = true;
                }
                self.comments.push((name, value));
                return;
            }
        };
        if self.words.is_empty() {
            self.first_line = number;
            self.tags = vec![Vec::new(); plan.sources.len()];
        }
        let columns = plan.sources.iter().filter_map(|source| match source {
            Source::Column(index) => Some(*index),
            Source::Comment(_) => None,
        });
        let needed = columns.chain([plan.word]).max().unwrap_or(0) + 1;
        if fields.len() < needed {
            builder.error(number, format!("{}, but {needed} are needed", counted(fields.len(), "column")));
            self.broken = true;
            return;
        }
        if let Some(n) = plan.layout.n_columns().filter(|&n| n < fields.len()) {
            builder.error(number, format!("{}, but `columns:` names {n}", counted(fields.len(), "column")));
            self.broken = true;
            return;
        }
        self.gaps |= number != self.first_line + self.words.len();
        self.words.push(fields[plan.word]);
        for (source, tags) in plan.sources.iter().zip(&mut self.tags) {
            if let Source::Column(index) = source {
                tags.push(fields[*index].trim());
            }
        }
    }

    fn finish(self, plan: &Plan, builder: &mut RowsBuilder) {
        if self.broken || self.words.is_empty() {
            return;
        }
        let mut fields = Vec::with_capacity(plan.sources.len());
        for (i, (source, tags)) in plan.sources.iter().zip(self.tags).enumerate() {
            // `_` as features is a value, the empty list; as a part of speech it is a missing value.
            let unset = plan.layout.conllu
                && !matches!(source, Source::Column(column) if UNDERSCORE_IS_A_VALUE.contains(column));
            let missing = |tag: &&str| tag.is_empty() || (unset && *tag == "_");
            let n_missing = tags.iter().filter(|tag| missing(tag)).count();
            fields.push(match source {
                Source::Comment(name) => match self.comments.iter().find(|(known, _)| known == name) {
                    Some((_, value)) => Field::Class((*value).into()),
                    None => Field::Absent,
                },
                Source::Column(_) if n_missing == tags.len() => Field::Absent,
                Source::Column(_) if n_missing > 0 => {
                    let (first, n) = (tags.iter().position(missing).unwrap_or(0), tags.len());
                    let (column, word) = (&builder.wanted[i].column, self.words[first]);
                    let message =
                        format!("`{column}`: {n_missing} of {n} words have no tag, first `{word}`; tag all or none");
                    let line = self.first_line + if self.gaps { 0 } else { first };
                    return builder.error(line, message);
                }
                Source::Column(_) => Field::Tags(tags.into_iter().map(Cow::Borrowed).collect()),
            });
        }
        match self.gaps {
            false => builder.push_by_word(self.first_line, &self.words, &fields),
            true => builder.push(self.first_line, &self.words, &fields),
        }
    }
}
