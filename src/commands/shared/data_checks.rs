//! Checks of the loaded data: warnings about suspicious values, and errors for labels that an experiment does not list.

use std::collections::{BTreeMap, HashMap};

use crate::config::Experiment;
use crate::data::words::Splitter;
use crate::data::{ABSENT, Corpus, Format, Rows, Split};
use crate::model::Connection;
use crate::problem::{Place, Problem, Severity};
use crate::task::{Tag, TaskId, TaskKind, spans_of};

/// Share of distinct words ending in punctuation above which a warning is given.
const STUCK: f64 = 0.05;

/// A label with at most `RARE` occurrences may be a misspelling of one that occurs at least `OFTEN` times as often.
const RARE: usize = 2;
const OFTEN: usize = 10;

/// Sentences with more words than this are reported.
const LONG: usize = 1000;

/// Share of dev or test that is also in train above which a warning is given before training. In published data sets it
/// is up to 5 %.
const LEAKED: f64 = 0.1;

/// All warnings of `polytask check` about the data.
pub fn find(experiment: &Experiment, corpus: &Corpus) -> Vec<Problem> {
    let mut problems = odd_labels(experiment, corpus);
    problems.extend(duplicates(corpus));
    problems.extend(contradictions(experiment, corpus));
    problems.extend(words_with_spaces(corpus));
    problems.extend(stuck_punctuation(experiment, corpus));
    problems.extend(long_sentences(corpus));
    let trunk = &experiment.model.trunk;
    if trunk.layers == 1 && trunk.connection != Connection::None {
        let message =
            "model.trunk.connection has no effect: it applies from the second layer on, and there is only one";
        problems.push(Problem::general(Severity::Warning, message));
    }
    problems
}

/// The labels in a column, each with its row: classes, tags, or span types.
pub fn occurrences(kind: TaskKind, rows: &Rows, column: usize) -> Vec<(&str, usize)> {
    let labels = &rows.columns[column];
    let spelled = |value: u32| (value != ABSENT).then(|| labels.strings.get(value));
    let of_row = |row: usize| -> Vec<&str> {
        match kind {
            TaskKind::Classification => spelled(labels.values[row]).into_iter().collect(),
            TaskKind::Tagging(scheme) => {
                let tags = rows.tags_of(column, row).unwrap_or_default().iter().filter_map(|&tag| spelled(tag));
                match kind.has_spans() {
                    false => tags.collect(),
                    true => spans_of(tags.map(|tag| scheme.parse(tag).unwrap_or(Tag::OUTSIDE)))
                        .into_iter()
                        .map(|span| span.kind)
                        .collect(),
                }
            }
        }
    };
    (0..rows.len()).flat_map(|row| of_row(row).into_iter().map(move |label| (label, row))).collect()
}

/// The labels of a task in a split, each with its first occurrence and its count.
fn used(corpus: &Corpus, (task, kind): (TaskId, TaskKind), split: Split) -> BTreeMap<&str, (Place, usize)> {
    let mut used: BTreeMap<&str, (Place, usize)> = BTreeMap::new();
    for (set, column) in corpus.columns_of(task) {
        let rows = &set.splits[split as usize];
        for (label, row) in occurrences(kind, rows, column) {
            used.entry(label).or_insert_with(|| (rows.place(row), 0)).1 += 1;
        }
    }
    used
}

/// Errors for training labels that are missing from their task's `labels`.
pub fn unnamed_labels(experiment: &Experiment, corpus: &Corpus) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (i, (name, head)) in experiment.tasks.iter().enumerate() {
        let Some(named) = head.labels() else { continue };
        for (label, (place, _)) in used(corpus, (TaskId(i), head.kind()), Split::Train) {
            if !named.iter().any(|known| known == label) {
                let message = format!("`{name}`: label `{label}` is not in `tasks.{name}.labels`");
                problems.push(Problem::error(place, message));
            }
        }
    }
    problems
}

/// Whether two labels differ by one letter inserted, deleted, substituted or swapped; digits do not count as letters.
fn misspelled(label: &str, other: &str) -> bool {
    let letters = |text: &str| text.chars().filter(|c| !c.is_numeric()).collect::<String>();
    // One character has up to 4 bytes.
    let alike = label.chars().count() >= 4 && label.len().abs_diff(other.len()) <= 4;
    alike && strsim::osa_distance(label, other) == 1 && letters(label) != letters(other)
}

/// Warnings about labels in dev or test that are not in train, probable misspellings, listed labels that no training
/// row has, and tasks with too few labels in train or dev.
fn odd_labels(experiment: &Experiment, corpus: &Corpus) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (i, (name, head)) in experiment.tasks.iter().enumerate() {
        let [train, dev, test] = Split::ALL.map(|split| used(corpus, (TaskId(i), head.kind()), split));
        if corpus.columns_of(TaskId(i)).all(|(set, _)| set.splits[Split::Train as usize].is_empty()) {
            continue; // Reported as an error elsewhere.
        }
        let odd = |message: String| Problem::general(Severity::Warning, message);
        if train.is_empty() && head.kind().has_spans() {
            problems.push(odd(format!("`{name}`: train has no spans, so there is nothing to learn")));
        }
        let mut folded: BTreeMap<String, (&str, &Place)> = BTreeMap::new();
        for (label, (place, _)) in &train {
            let fold = label.to_lowercase().split_whitespace().collect();
            if let Some((other, before)) = folded.insert(fold, (label, place)) {
                let message = format!("`{name}`: labels `{other}` and `{label}` differ only in case or white space");
                problems.push(Problem::warning(before.max(place).clone(), message));
            }
        }
        if train.len() == 1 && !head.kind().has_spans() {
            problems.push(odd(format!("`{name}`: train has only one label, so there is nothing to distinguish")));
        }
        for (label, (place, n)) in train.iter().filter(|(_, (_, n))| *n <= RARE) {
            let likes = train.iter().filter(|(other, (_, many))| *many >= OFTEN * n && misspelled(label, other));
            if let Some((other, (_, many))) = likes.max_by_key(|(_, (_, many))| *many) {
                let message = format!(
                    "`{name}`: label `{label}` is rare and one letter away from `{other}`, which occurs {many} times"
                );
                problems.push(Problem::warning(place.clone(), message));
            }
        }
        for label in head.labels().into_iter().flatten().filter(|label| !train.contains_key(label.as_str())) {
            problems.push(odd(format!("`{name}`: label `{label}` of `tasks.{name}.labels` occurs in no training row")));
        }
        if dev.is_empty() && !train.is_empty() {
            problems.push(odd(format!(
                "`{name}`: dev has no label of this task, so the task does not help to choose a checkpoint"
            )));
        }
        for (split, used) in [(Split::Dev, dev), (Split::Test, test)] {
            for (label, (place, _)) in used.into_iter().filter(|(label, _)| !train.contains_key(label)) {
                let message = format!(
                    "`{name}`: label `{label}` is in {} but never in train, so it cannot be predicted",
                    split.name()
                );
                problems.push(Problem::warning(place, message));
            }
        }
    }
    problems
}

/// A sentence of dev or test that also occurs in an earlier split of its set, or in train of another set, whose labels
/// train the same trunk. Sets by index.
struct Repeated {
    set: usize,
    split: Split,
    row: usize,
    /// Set, split and row of the other occurrence.
    earlier: (usize, Split, usize),
}

fn repeated(corpus: &Corpus) -> Vec<Repeated> {
    let mut found = Vec::new();
    // The first occurrence of each sentence in each set.
    let mut seen: HashMap<String, Vec<(usize, Split, usize)>> = HashMap::new();
    for split in Split::ALL {
        for (set, loaded) in corpus.sets.iter().enumerate() {
            let rows = &loaded.splits[split as usize];
            for row in 0..rows.len() {
                let known = seen.entry(rows.text_of(row)).or_default();
                // An occurrence in train takes precedence, then one in the same set.
                let earlier = known.iter().filter(|(other, before, _)| *other == set || *before == Split::Train);
                let worst = earlier.min_by_key(|(other, before, _)| (*before, *other != set));
                if let Some(&earlier) = worst.filter(|(_, before, _)| *before != split) {
                    found.push(Repeated { set, split, row, earlier });
                }
                if known.iter().all(|(other, ..)| *other != set) {
                    known.push((set, split, row));
                }
            }
        }
    }
    found
}

/// A warning for each repeated sentence.
fn duplicates(corpus: &Corpus) -> Vec<Problem> {
    let rows_of = |set: usize, split: Split| &corpus.sets[set].splits[split as usize];
    let warning = |Repeated { set, split, row, earlier: (other, before, at) }| {
        let (name, place) = (split.name(), rows_of(other, before).place(at));
        let message = match other == set {
            true => format!("this sentence of {name} also occurs in {} ({place})", before.name()),
            false => {
                let (own, other) = (&corpus.sets[set].name, &corpus.sets[other].name);
                format!("this sentence of `{own}`'s {name} also occurs in train of `{other}` ({place})")
            }
        };
        Problem::warning(rows_of(set, split).place(row), message)
    };
    repeated(corpus).into_iter().map(warning).collect()
}

/// Dev and test splits of which more than [`LEAKED`] is also in train, of the same set or another.
pub fn leaks(corpus: &Corpus) -> Vec<Problem> {
    let repeated = repeated(corpus);
    let mut problems = Vec::new();
    for (i, set) in corpus.sets.iter().enumerate() {
        for split in [Split::Dev, Split::Test] {
            let of_train = |found: &&Repeated| (found.set, found.split, found.earlier.1) == (i, split, Split::Train);
            let (n, n_rows) = (repeated.iter().filter(of_train).count(), set.splits[split as usize].len());
            if n as f64 > LEAKED * n_rows as f64 {
                let message = format!(
                    "`{}`: {n} of the {n_rows} sentences of {} are also in train, so its scores do not show how well the model \
                     does on new text",
                    set.name,
                    split.name()
                );
                problems.push(Problem::general(Severity::Warning, message));
            }
        }
    }
    problems
}

/// Sentences that occur in train twice with different labels.
fn contradictions(experiment: &Experiment, corpus: &Corpus) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (i, name) in experiment.tasks.keys().enumerate() {
        for (set, column) in corpus.columns_of(TaskId(i)) {
            let rows = &set.splits[Split::Train as usize];
            let mut seen: HashMap<&[u32], (usize, &[u32])> = HashMap::new();
            for row in 0..rows.len() {
                let Some(labels) = set.labels_of(rows, column, row) else { continue };
                let (first, before) = *seen.entry(rows.words_of(row)).or_insert((row, labels));
                if before != labels {
                    let place = rows.place(first);
                    let message = format!("`{name}`: this sentence occurs earlier with other labels ({place})");
                    problems.push(Problem::warning(rows.place(row), message));
                }
            }
        }
    }
    problems
}

/// Raw text whose words keep trailing punctuation, so that `date` and `date.` are unrelated words.
fn stuck_punctuation(experiment: &Experiment, corpus: &Corpus) -> Vec<Problem> {
    let mut problems = Vec::new();
    for set in &corpus.sets {
        let config = &experiment.data.sets[&set.name];
        let raw =
            config.tokens.is_none() && !matches!(config.format, Format::Conll | Format::Conllu | Format::Parallel);
        if !raw || experiment.tokenizer.splitter() != Splitter::Whitespace {
            continue;
        }
        let words = &set.splits[Split::Train as usize].words;
        let stuck = |word: &&str| {
            let bare = word.trim_end_matches(['.', ',', ';', ':', '!', '?']);
            bare.len() < word.len() && bare.ends_with(char::is_alphanumeric)
        };
        let stuck: Vec<&str> = words.iter().filter(stuck).collect();
        let share = stuck.len() as f64 / words.len().max(1) as f64;
        if share > STUCK {
            let message = format!(
                "`{}`: {} % of the distinct words end in punctuation, such as `{}`; `tokenizer.split: punctuation` makes it \
                 separate words",
                set.name,
                (100.0 * share).round(),
                stuck[0]
            );
            problems.push(Problem::general(Severity::Warning, message));
        }
    }
    problems
}

/// Training sentences of more than [`LONG`] words.
pub fn long_sentences(corpus: &Corpus) -> Vec<Problem> {
    let mut problems = Vec::new();
    for rows in corpus.rows(Split::Train) {
        for row in (0..rows.len()).filter(|&row| rows.words_of(row).len() > LONG) {
            let n = rows.words_of(row).len();
            let message = format!(
                "a sentence of {n} words: its whole batch is padded to this length, which takes memory; `data.max_words` leaves \
                 out longer sentences"
            );
            problems.push(Problem::warning(rows.place(row), message));
        }
    }
    problems
}

/// Words that contain white space: programs that run exported models split raw text there, into several words.
fn words_with_spaces(corpus: &Corpus) -> Vec<Problem> {
    let mut problems = Vec::new();
    for rows in Split::ALL.iter().flat_map(|&split| corpus.rows(split)) {
        let apart: Vec<bool> = rows.words.iter().map(|word| word.contains(char::is_whitespace)).collect();
        for row in 0..rows.len() {
            if let Some(&word) = rows.words_of(row).iter().find(|&&word| apart[word as usize]) {
                let word = rows.words.get(word);
                let message = format!("the word `{word}` contains white space, but raw text is split at white space");
                problems.push(Problem::warning(rows.place(row), message));
            }
        }
    }
    problems
}
