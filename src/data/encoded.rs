//! One split of all sets, encoded: flat arrays of token ids and label ids, built once.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::Result;

use super::corpus::Corpus;
use super::labels::{self, Labels, NO_LABEL};
use super::rows::Strings;
use super::set::Split;
use super::tokenizer::{Pieces, Tokenizer};
use crate::problem::Place;
use crate::task::{Task, TaskId};

/// The labels of one task over all rows of a split.
pub enum TargetValues {
    /// One per row.
    Classes(Vec<i32>),
    /// One per word.
    Tags(Vec<i32>),
}

/// How words are spelled, for models that read characters.
pub struct Spelling {
    /// Bytes of each distinct word, each plus 1, truncated or padded with 0: [n_forms, max_bytes].
    pub bytes: Vec<i16>,
    pub max_bytes: usize,
    /// For each token, the index of the distinct word that it belongs to.
    pub token_forms: Vec<i32>,
}

impl Spelling {
    fn new(max_bytes: usize) -> Self {
        Spelling { bytes: Vec::new(), max_bytes, token_forms: Vec::new() }
    }

    fn n_forms(&self) -> usize {
        self.bytes.len() / self.max_bytes
    }

    fn add_forms(&mut self, words: &Strings) {
        for word in words.iter() {
            let bytes = word.bytes().map(|byte| i16::from(byte) + 1);
            self.bytes.extend(bytes.chain(std::iter::repeat(0)).take(self.max_bytes));
        }
    }

    /// Number of bytes of a token's word, at most `max_bytes`.
    pub fn n_bytes(&self, token: usize) -> usize {
        let form = self.token_forms[token] as usize;
        let bytes = &self.bytes[form * self.max_bytes..(form + 1) * self.max_bytes];
        bytes.iter().position(|&byte| byte == 0).unwrap_or(self.max_bytes)
    }
}

/// Labels in the data that a task does not have, so that the model cannot predict them.
#[derive(Default)]
pub struct Unseen {
    /// Their ids follow the task's own.
    pub labels: Vec<String>,
    /// The labels of each row with such a label. In the targets these rows are unlabelled, since they have no loss.
    pub rows: BTreeMap<usize, Vec<i32>>,
}

/// One split of all sets, one set after the other. Row `r` has the tokens `token_offsets[r]..token_offsets[r + 1]` and the
/// words `word_offsets[r]..word_offsets[r + 1]`.
pub struct EncodedSplit {
    pub token_ids: Vec<i32>,
    pub token_offsets: Vec<i64>,
    pub word_offsets: Vec<i64>,
    /// The position in its row of each word's first token; `None` where every word is one token.
    pub first_tokens: Option<Vec<i32>>,
    /// `None` unless the tokenizer has `max_bytes`.
    pub spelling: Option<Spelling>,
    /// By [`TaskId`].
    pub targets: Vec<TargetValues>,
    /// Only for tasks with unseen labels.
    pub unseen: BTreeMap<TaskId, Unseen>,
    /// First row of each set, then the total number of rows.
    pub set_starts: Vec<usize>,
    /// The location of each row, for error messages; empty for text that is not from a file.
    pub places: Vec<Place>,
}

impl EncodedSplit {
    /// A hash of the tokens and labels of `sets`.
    pub fn fingerprint(sets: &[&EncodedSplit]) -> String {
        let mut hasher = blake3::Hasher::new();
        for set in sets {
            let mut add = |values: &mut dyn Iterator<Item = i64>| {
                let bytes: Vec<u8> = values.flat_map(i64::to_le_bytes).collect();
                hasher.update(&(bytes.len() as u64).to_le_bytes()).update(&bytes);
            };
            add(&mut set.token_ids.iter().map(|&id| id.into()));
            add(&mut set.token_offsets.iter().copied());
            add(&mut set.word_offsets.iter().copied());
            if let Some(spelling) = &set.spelling {
                add(&mut spelling.bytes.iter().map(|&byte| byte.into()));
                add(&mut spelling.token_forms.iter().map(|&form| form.into()));
            }
            for target in &set.targets {
                let (TargetValues::Classes(values) | TargetValues::Tags(values)) = target;
                add(&mut values.iter().map(|&id| id.into()));
            }
            for (row, labels) in set.unseen.values().flat_map(|unseen| &unseen.rows) {
                add(&mut std::iter::once(*row as i64).chain(labels.iter().map(|&id| id.into())));
            }
        }
        hasher.finalize().to_string()
    }

    /// Encodes `split` of every set.
    pub fn build(corpus: &Corpus, split: Split, tokenizer: &Tokenizer, tasks: &[Task]) -> Result<EncodedSplit> {
        let mut set = EncodedSplit::empty(tasks, tokenizer);
        let mut pieces_differ = false;
        let unseen: Vec<Vec<String>> =
            (0..tasks.len()).map(|id| unseen(corpus, split, TaskId(id), &tasks[id])).collect();
        for loaded in &corpus.sets {
            let rows = &loaded.splits[split as usize];
            let pieces = tokenizer.encode_words(&rows.words)?;
            let first_form = set.add_forms(&rows.words);
            for row in 0..rows.len() {
                set.add_row(rows.words_of(row), &pieces, first_form);
                set.places.push(rows.place(row));
            }
            pieces_differ |= pieces.ids.len() + 1 != pieces.offsets.len();
            for (id, task) in tasks.iter().enumerate() {
                let column = loaded.tasks.iter().position(|&known| known == TaskId(id));
                let values = column.map(|column| Labels::new(task, &unseen[id]).encode(rows, column));
                match &mut set.targets[id] {
                    TargetValues::Classes(all) => all.extend(values.unwrap_or(vec![NO_LABEL; rows.len()])),
                    TargetValues::Tags(all) => all.extend(values.unwrap_or(vec![NO_LABEL; rows.word_ids.len()])),
                }
            }
            set.set_starts.push(set.len());
        }
        for (id, labels) in unseen.into_iter().enumerate().filter(|(_, labels)| !labels.is_empty()) {
            let rows = set.take_rows_above(TaskId(id), tasks[id].labels.len() as i32);
            set.unseen.insert(TaskId(id), Unseen { labels, rows });
        }
        set.first_tokens = set.first_tokens.filter(|_| pieces_differ);
        Ok(set)
    }

    /// Removes the labels of rows with an id of `n_known` or more from the targets; returns them by row.
    fn take_rows_above(&mut self, task: TaskId, n_known: i32) -> BTreeMap<usize, Vec<i32>> {
        let mut taken = BTreeMap::new();
        for row in 0..self.len() {
            if self.labels(task, row).is_some_and(|labels| labels.iter().any(|&id| id >= n_known)) {
                let range = self.range(task, row);
                let (TargetValues::Classes(values) | TargetValues::Tags(values)) = &mut self.targets[task.0];
                taken.insert(row, values[range.clone()].to_vec());
                values[range].fill(NO_LABEL);
            }
        }
        taken
    }

    /// Encodes sentences that carry no labels.
    pub fn of_words(sentences: &[Vec<&str>], tokenizer: &Tokenizer, tasks: &[Task]) -> Result<EncodedSplit> {
        let mut words = Strings::default();
        let ids: Vec<Vec<u32>> =
            sentences.iter().map(|words_of| words_of.iter().map(|word| words.add(word)).collect()).collect();
        let pieces = tokenizer.encode_words(&words)?;
        let mut set = EncodedSplit::empty(tasks, tokenizer);
        set.add_forms(&words);
        for sentence in &ids {
            set.add_row(sentence, &pieces, 0);
        }
        let n_words = ids.iter().map(Vec::len).sum();
        for target in &mut set.targets {
            match target {
                TargetValues::Classes(all) => all.resize(sentences.len(), NO_LABEL),
                TargetValues::Tags(all) => all.resize(n_words, NO_LABEL),
            }
        }
        set.first_tokens = set.first_tokens.filter(|_| pieces.ids.len() + 1 != pieces.offsets.len());
        set.set_starts.push(set.len());
        Ok(set)
    }

    /// Adds the spellings of `words`; returns the index of the first.
    fn add_forms(&mut self, words: &Strings) -> usize {
        let Some(spelling) = &mut self.spelling else { return 0 };
        let first = spelling.n_forms();
        spelling.add_forms(words);
        first
    }

    /// Adds a row; `words` are indices into `pieces`, whose first word has the spelling `first_form`.
    fn add_row(&mut self, words: &[u32], pieces: &Pieces, first_form: usize) {
        let start = self.token_ids.len();
        for &word in words {
            self.first_tokens.iter_mut().for_each(|first| first.push((self.token_ids.len() - start) as i32));
            let pieces = pieces.of(word);
            self.token_ids.extend(pieces.iter().map(|&id| id as i32));
            if let Some(spelling) = &mut self.spelling {
                spelling.token_forms.extend(pieces.iter().map(|_| (first_form + word as usize) as i32));
            }
        }
        self.word_offsets.push(self.word_offsets[self.len()] + words.len() as i64);
        self.token_offsets.push(self.token_ids.len() as i64);
    }

    /// A split without rows.
    fn empty(tasks: &[Task], tokenizer: &Tokenizer) -> EncodedSplit {
        let target = |task: &Task| match task.kind {
            crate::task::TaskKind::Classification => TargetValues::Classes(Vec::new()),
            crate::task::TaskKind::Tagging(_) => TargetValues::Tags(Vec::new()),
        };
        EncodedSplit {
            token_ids: Vec::new(),
            token_offsets: vec![0],
            word_offsets: vec![0],
            first_tokens: Some(Vec::new()),
            spelling: tokenizer.max_bytes().map(Spelling::new),
            targets: tasks.iter().map(target).collect(),
            unseen: BTreeMap::new(),
            set_starts: vec![0],
            places: Vec::new(),
        }
    }

    pub fn len(&self) -> usize {
        self.token_offsets.len() - 1
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn tokens(&self, row: usize) -> &[i32] {
        &self.token_ids[self.token_offsets[row] as usize..self.token_offsets[row + 1] as usize]
    }

    pub fn n_tokens(&self, row: usize) -> i64 {
        self.token_offsets[row + 1] - self.token_offsets[row]
    }

    pub fn n_words(&self, row: usize) -> i64 {
        self.word_offsets[row + 1] - self.word_offsets[row]
    }

    /// The range of a row's labels in a task's targets.
    fn range(&self, task: TaskId, row: usize) -> Range<usize> {
        match &self.targets[task.0] {
            TargetValues::Classes(_) => row..row + 1,
            TargetValues::Tags(_) => self.word_offsets[row] as usize..self.word_offsets[row + 1] as usize,
        }
    }

    /// The labels of a row: one for a class, one per word for tags; `None` if it has none, or any that is unseen.
    pub fn labels(&self, task: TaskId, row: usize) -> Option<&[i32]> {
        let (TargetValues::Classes(values) | TargetValues::Tags(values)) = &self.targets[task.0];
        let labels = &values[self.range(task, row)];
        (labels.first() != Some(&NO_LABEL)).then_some(labels)
    }

    /// The labels in the data that a task does not have; their ids follow its own.
    pub fn unseen_labels(&self, task: TaskId) -> &[String] {
        self.unseen.get(&task).map_or(&[], |unseen| &unseen.labels)
    }

    /// Like [`Self::labels`], including labels that the task does not have, with ids after its own.
    pub fn gold(&self, task: TaskId, row: usize) -> Option<&[i32]> {
        let unseen = self.unseen.get(&task).and_then(|unseen| unseen.rows.get(&row));
        unseen.map(Vec::as_slice).or_else(|| self.labels(task, row))
    }
}

/// The labels of a split that a task does not have.
fn unseen(corpus: &Corpus, split: Split, id: TaskId, task: &Task) -> Vec<String> {
    let columns = corpus.columns_of(id).map(|(set, column)| &set.splits[split as usize].columns[column]);
    let mut labels = labels::collect(task.kind, &columns.collect::<Vec<_>>());
    labels.retain(|label| !task.labels.contains(label));
    labels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::words::Splitter;

    #[test]
    fn words_are_spelled_in_bytes_up_to_a_limit() {
        let json = Tokenizer::of_words(&[]).to_json().unwrap();
        let tokenizer = Tokenizer::from_json(json.as_bytes(), Splitter::Whitespace, Some(4)).unwrap();
        let set = EncodedSplit::of_words(&[vec!["né", "HIGHER"], vec!["né"]], &tokenizer, &[]).unwrap();
        let spelling = set.spelling.unwrap();
        let bytes = |token: usize| {
            let form = spelling.token_forms[token] as usize * 4;
            (&spelling.bytes[form..form + 4], spelling.n_bytes(token))
        };
        assert_eq!(bytes(0), (&[i16::from(b'n') + 1, 0xc3 + 1, 0xa9 + 1, 0][..], 3));
        assert_eq!(bytes(1), (&b"HIGH".map(|byte| i16::from(byte) + 1)[..], 4));
        assert_eq!(bytes(2), bytes(0));
    }
}
