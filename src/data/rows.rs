//! A data set as read from its files: flat arrays over interned strings, so that a million sentences stay compact.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use indexmap::IndexSet;
use rustc_hash::FxBuildHasher;

use crate::problem::{Place, Problem, counted};
use crate::task::TaskKind;

/// Distinct strings, numbered in the order of their first appearance.
#[derive(Clone, Debug, Default)]
pub struct Strings(IndexSet<Box<str>, FxBuildHasher>);

impl Strings {
    pub fn add(&mut self, text: &str) -> u32 {
        match self.0.get_index_of(text) {
            Some(index) => index as u32,
            None => self.0.insert_full(text.into()).0 as u32,
        }
    }

    pub fn get(&self, id: u32) -> &str {
        &self.0[id as usize]
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|text| &**text)
    }

    /// Adds the strings of `other`; `result[id]` is the id here of its string `id`.
    fn absorb(&mut self, other: &Strings) -> Vec<u32> {
        other.iter().map(|text| self.add(text)).collect()
    }
}

/// The value of a missing label.
pub const ABSENT: u32 = u32::MAX;

/// A column that a reader has to find, usually the labels of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub column: String,
    pub kind: TaskKind,
}

/// The labels of one column: one value per row for classes, one per word for tags; [`ABSENT`] if a row has none.
#[derive(Clone, Debug, Default)]
pub struct Column {
    pub strings: Strings,
    pub values: Vec<u32>,
}

impl Column {
    /// The strings that occur as values; the others belong to rows that were split off.
    pub fn used(&self) -> impl Iterator<Item = &str> {
        let mut used = vec![false; self.strings.len()];
        for &value in self.values.iter().filter(|&&value| value != ABSENT) {
            used[value as usize] = true;
        }
        self.strings.iter().zip(used).filter_map(|(text, used)| used.then_some(text))
    }
}

/// What a reader found in one row for one wanted column.
#[derive(Clone, Debug)]
pub enum Field<'a> {
    Absent,
    Class(Cow<'a, str>),
    Tags(Vec<Cow<'a, str>>),
}

/// Sentences with their labels, in file order.
#[derive(Clone, Debug)]
pub struct Rows {
    pub words: Strings,
    pub word_ids: Vec<u32>,
    /// Row `r` holds the words `offsets[r]..offsets[r + 1]`.
    pub offsets: Vec<usize>,
    pub columns: Vec<Column>,
    files: Vec<PathBuf>,
    /// First row of each file.
    file_starts: Vec<usize>,
    /// The first line of each row, with the flag [`BY_WORD`] where it applies.
    lines: Vec<u32>,
}

/// Flag on the line of a row whose words are on consecutive lines, one word per line.
const BY_WORD: u32 = 1 << 31;

impl Rows {
    pub fn new(n_columns: usize) -> Self {
        Rows {
            words: Strings::default(),
            word_ids: Vec::new(),
            offsets: vec![0],
            columns: vec![Column::default(); n_columns],
            files: Vec::new(),
            file_starts: Vec::new(),
            lines: Vec::new(),
        }
    }

    /// The rows of one file, from their arrays.
    pub fn of_file(
        file: &Path,
        (words, word_ids): (Strings, Vec<u32>),
        offsets: Vec<usize>,
        lines: Vec<u32>,
        columns: Vec<Column>,
    ) -> Self {
        Rows { words, word_ids, offsets, columns, files: vec![file.to_owned()], file_starts: vec![0], lines }
    }

    /// The line of each row in its file, in the form that [`Rows::of_file`] takes.
    pub fn lines(&self) -> &[u32] {
        &self.lines
    }

    pub fn len(&self) -> usize {
        self.lines.len()
    }

    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    pub fn words_of(&self, row: usize) -> &[u32] {
        &self.word_ids[self.offsets[row]..self.offsets[row + 1]]
    }

    /// The tags of `row` in a column of tags; `None` if it has none.
    pub fn tags_of(&self, column: usize, row: usize) -> Option<&[u32]> {
        let values = &self.columns[column].values[self.offsets[row]..self.offsets[row + 1]];
        (values.first() != Some(&ABSENT)).then_some(values)
    }

    /// The labels of `row` in a column of `kind`: one for a class, one per word for tags; `None` if it has none.
    pub fn labels_of(&self, kind: TaskKind, column: usize, row: usize) -> Option<&[u32]> {
        match kind {
            TaskKind::Classification => {
                Some(&self.columns[column].values[row..=row]).filter(|label| label[0] != ABSENT)
            }
            TaskKind::Tagging(_) => self.tags_of(column, row),
        }
    }

    pub fn text_of(&self, row: usize) -> String {
        self.words_of(row).iter().map(|&word| self.words.get(word)).collect::<Vec<_>>().join(" ")
    }

    /// The location of a row.
    pub fn place(&self, row: usize) -> Place {
        let file = self.file_starts.partition_point(|&start| start <= row) - 1;
        Place::new(&self.files[file], (self.lines[row] & !BY_WORD) as usize)
    }

    /// The location of word `index` of a row, or of the row if its words have no lines of their own.
    pub fn place_of_word(&self, row: usize, index: usize) -> Place {
        let mut place = self.place(row);
        if self.lines[row] & BY_WORD != 0 {
            place.line += index;
        }
        place
    }

    /// Appends the rows of one file.
    pub fn append_file(&mut self, file: &Path, parts: Vec<Rows>) {
        self.files.push(file.to_owned());
        self.file_starts.push(self.len());
        for part in parts {
            self.append(part);
        }
    }

    fn append(&mut self, part: Rows) {
        let base = self.word_ids.len();
        let words = self.words.absorb(&part.words);
        self.word_ids.extend(part.word_ids.iter().map(|&id| words[id as usize]));
        self.offsets.extend(part.offsets[1..].iter().map(|&offset| base + offset));
        self.lines.extend(part.lines);
        for (column, other) in self.columns.iter_mut().zip(part.columns) {
            let strings = column.strings.absorb(&other.strings);
            let renumber = |&id: &u32| if id == ABSENT { ABSENT } else { strings[id as usize] };
            column.values.extend(other.values.iter().map(renumber));
        }
    }

    /// Splits off the rows for which `taken` is true; the others stay, in order.
    pub fn split_off(&mut self, taken: &[bool], kinds: &[TaskKind]) -> Rows {
        let (cut, rest) = (self.select(taken, true, kinds), self.select(taken, false, kinds));
        *self = rest;
        cut
    }

    fn select(&self, taken: &[bool], wish: bool, kinds: &[TaskKind]) -> Rows {
        let mut out = Rows { words: self.words.clone(), files: self.files.clone(), ..Rows::new(self.columns.len()) };
        for (column, other) in out.columns.iter_mut().zip(&self.columns) {
            column.strings = other.strings.clone();
        }
        for (row, &taken) in taken.iter().enumerate() {
            while self.file_starts.get(out.file_starts.len()).is_some_and(|&start| start <= row) {
                out.file_starts.push(out.len());
            }
            if taken != wish {
                continue;
            }
            out.word_ids.extend(self.words_of(row));
            out.offsets.push(out.word_ids.len());
            out.lines.push(self.lines[row]);
            for ((column, other), kind) in out.columns.iter_mut().zip(&self.columns).zip(kinds) {
                match kind {
                    TaskKind::Classification => column.values.push(other.values[row]),
                    TaskKind::Tagging(_) => {
                        column.values.extend(&other.values[self.offsets[row]..self.offsets[row + 1]]);
                    }
                }
            }
        }
        out
    }
}

/// Collects and checks the rows from a format's reader, and collects problems.
pub struct RowsBuilder<'a> {
    pub file: &'a Path,
    pub wanted: &'a [Wanted],
    pub rows: Rows,
    pub problems: Vec<Problem>,
}

impl<'a> RowsBuilder<'a> {
    pub fn new(file: &'a Path, wanted: &'a [Wanted]) -> Self {
        RowsBuilder { file, wanted, rows: Rows::new(wanted.len()), problems: Vec::new() }
    }

    pub fn error(&mut self, line: usize, message: impl Into<String>) {
        self.problems.push(Problem::error(Place::new(self.file, line), message));
    }

    pub fn warning(&mut self, line: usize, message: impl Into<String>) {
        self.problems.push(Problem::warning(Place::new(self.file, line), message));
    }

    /// Adds a row that starts in `line`; `fields` in the order of the wanted columns.
    pub fn push(&mut self, line: usize, words: &[&str], fields: &[Field]) {
        self.add((line, 0), words, fields);
    }

    /// Like [`Self::push`], for a row with one line per word, starting in `line`.
    pub fn push_by_word(&mut self, line: usize, words: &[&str], fields: &[Field]) {
        self.add((line, BY_WORD), words, fields);
    }

    fn add(&mut self, (line, by_word): (usize, u32), words: &[&str], fields: &[Field]) {
        if words.is_empty() {
            return self.warning(line, "empty sentence, skipped");
        }
        if let Some(empty) = words.iter().position(|word| word.trim().is_empty()) {
            let line = line + if by_word == BY_WORD { empty } else { 0 };
            return self.error(line, format!("word {} is empty", empty + 1));
        }
        for (field, wanted) in fields.iter().zip(self.wanted) {
            if let Field::Tags(tags) = field
                && tags.len() != words.len()
            {
                let message = format!(
                    "{} but {} in `{}`",
                    counted(words.len(), "word"),
                    counted(tags.len(), "tag"),
                    wanted.column
                );
                return self.error(line, message);
            }
        }
        let rows = &mut self.rows;
        rows.lines.push(line as u32 | by_word);
        rows.word_ids.extend(words.iter().map(|word| rows.words.add(word)));
        rows.offsets.push(rows.word_ids.len());
        for ((field, wanted), column) in fields.iter().zip(self.wanted).zip(&mut rows.columns) {
            match (field, wanted.kind) {
                (Field::Class(label), _) => column.values.push(column.strings.add(label)),
                (Field::Tags(tags), _) => column.values.extend(tags.iter().map(|tag| column.strings.add(tag))),
                (Field::Absent, TaskKind::Classification) => column.values.push(ABSENT),
                (Field::Absent, TaskKind::Tagging(_)) => {
                    column.values.extend(std::iter::repeat_n(ABSENT, words.len()));
                }
            }
        }
    }
}
