//! `polytask check`: everything that can be known to be wrong, or odd, before training.

use std::collections::{BTreeMap, HashMap};

use anyhow::Result;
use indexmap::IndexMap;

use super::cli::CheckArgs;
use super::table::{count, percent, table};
use super::{End, prepare, say, transfer};
use crate::config::Experiment;
use crate::data::{ABSENT, Corpus, LoadedSet, Rows, Split};
use crate::problem::{InvalidInput, Place, Problem, Severity, counted};
use crate::task::{Tag, TaskId, TaskKind, spans_of};

/// Of each kind of finding, so many are shown without --all.
const SHOWN: usize = 5;

pub fn run(args: &CheckArgs) -> Result<End> {
    let experiment = Experiment::load(&args.experiment, &args.overrides)?;
    let (corpus, mut problems) = prepare::corpus(&experiment)?;
    problems.extend(odd_labels(&experiment, &corpus));
    problems.extend(duplicates(&corpus));
    problems.extend(contradictions(&experiment, &corpus));
    problems.extend(words_apart(&corpus));
    say(sizes(&corpus))?;
    let wrong = |error: anyhow::Error| match error.downcast::<InvalidInput>() {
        Ok(InvalidInput(problems)) => problems,
        Err(error) => vec![Problem::general(Severity::Error, format!("{error:#}"))],
    };
    if corpus.rows(Split::Train).iter().any(|rows| !rows.is_empty()) {
        match unknown_words(&experiment, &corpus) {
            Ok(table) => say(table)?,
            Err(error) => problems.extend(wrong(error)),
        }
    }
    problems.extend(transfer::earlier(&experiment).err().map(wrong).unwrap_or_default());
    problems.sort_by_key(|problem| problem.severity);
    for (i, (name, head)) in experiment.tasks.iter().enumerate() {
        say(label_counts(TaskId(i), name, head.kind(), &corpus))?;
    }
    for severity in [Severity::Error, Severity::Warning] {
        let name = if severity == Severity::Error { "error" } else { "warning" };
        let mut kinds: IndexMap<String, Vec<&Problem>> = IndexMap::new();
        for problem in problems.iter().filter(|problem| problem.severity == severity) {
            kinds.entry(kind(&problem.message)).or_default().push(problem);
        }
        for of_kind in kinds.values() {
            let shown = if args.all { of_kind.len() } else { SHOWN.min(of_kind.len()) };
            for problem in &of_kind[..shown] {
                say(format!("{name}: {problem}"))?;
            }
            if shown < of_kind.len() {
                say(format!("{name}: ... and {} more of this kind; --all lists them", of_kind.len() - shown))?;
            }
        }
    }
    let n_errors = problems.iter().filter(|problem| problem.severity == Severity::Error).count();
    say(format!("{}, {}", counted(n_errors, "error"), counted(problems.len() - n_errors, "warning")))?;
    Ok(if n_errors == 0 { End::Done } else { End::Invalid })
}

/// What messages of one kind share: all but names, numbers and places.
fn kind(message: &str) -> String {
    let message = message.split('(').next().unwrap_or(message);
    let outside_quotes = message.split('`').step_by(2);
    outside_quotes.flat_map(str::chars).filter(|c| !c.is_ascii_digit()).collect()
}

/// Sentences, words and lengths of every split, and how many rows carry labels for which task.
fn sizes(corpus: &Corpus) -> comfy_table::Table {
    let mut out = table(&["set", "split", "sentences", "words", "length median", "longest", "rows with labels"], 2);
    for set in &corpus.sets {
        for split in Split::ALL {
            let rows = &set.splits[split as usize];
            if rows.is_empty() {
                continue;
            }
            let mut lengths: Vec<usize> = (0..rows.len()).map(|row| rows.words_of(row).len()).collect();
            lengths.sort();
            let labelled: Vec<String> = (0..set.tasks.len())
                .map(|column| format!("{} {}", set.wanted[column].column, count(n_labelled(set, rows, column))))
                .collect();
            out.add_row(vec![
                set.name.clone(),
                split.name().to_owned(),
                count(rows.len()),
                count(rows.word_ids.len()),
                lengths[lengths.len() / 2].to_string(),
                lengths[lengths.len() - 1].to_string(),
                labelled.join(", "),
            ]);
        }
    }
    out
}

fn n_labelled(set: &LoadedSet, rows: &Rows, column: usize) -> usize {
    (0..rows.len()).filter(|&row| set.labels_of(rows, column, row).is_some()).count()
}

/// Share of words that become unknown tokens in dev and test.
fn unknown_words(experiment: &Experiment, corpus: &Corpus) -> Result<comfy_table::Table> {
    let mut out = table(&["set", "split", "unknown words %", "most frequent"], 2);
    let (tokenizer, coverage) = prepare::tokenizer(experiment, corpus)?;
    for coverage in &coverage {
        say(prepare::coverage_line(coverage))?;
    }
    for set in &corpus.sets {
        for split in Split::ALL {
            let rows = &set.splits[split as usize];
            if rows.is_empty() {
                continue;
            }
            let pieces = tokenizer.encode_words(&rows.words)?;
            let mut unknown: BTreeMap<u32, usize> = BTreeMap::new();
            for &word in &rows.word_ids {
                if pieces.of(word).contains(&tokenizer.unknown) {
                    *unknown.entry(word).or_default() += 1;
                }
            }
            let n: usize = unknown.values().sum();
            let mut frequent: Vec<_> = unknown.into_iter().collect();
            frequent.sort_by_key(|&(word, n)| (std::cmp::Reverse(n), word));
            let examples: Vec<&str> = frequent.iter().take(5).map(|&(word, _)| rows.words.get(word)).collect();
            let share = percent(n as f64 / rows.word_ids.len() as f64);
            out.add_row(vec![set.name.clone(), split.name().to_owned(), share, examples.join(" ")]);
        }
    }
    Ok(out)
}

/// The labels of a column with the row of each: classes, tags, or of spans their types.
fn occurrences(kind: TaskKind, rows: &Rows, column: usize) -> Vec<(&str, usize)> {
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

/// How often each label, or type of span, stands in each split.
fn label_counts(task: TaskId, name: &str, kind: TaskKind, corpus: &Corpus) -> comfy_table::Table {
    let mut counts: BTreeMap<&str, [usize; 3]> = BTreeMap::new();
    for (set, column) in corpus.columns_of(task) {
        for split in Split::ALL {
            for (label, _) in occurrences(kind, &set.splits[split as usize], column) {
                counts.entry(label).or_default()[split as usize] += 1;
            }
        }
    }
    let n = counts.len();
    let header = match kind.has_spans() {
        true => format!("{name}: {} of span", counted(n, "type")),
        false => format!("{name}: {}", counted(n, "label")),
    };
    let mut out = table(&[&header, "train", "dev", "test"], 1);
    let mut rows: Vec<_> = counts.into_iter().collect();
    rows.sort_by(|a, b| b.1[0].cmp(&a.1[0]).then(a.0.cmp(b.0)));
    let cut = rows.len().saturating_sub(20);
    for (label, counts) in rows.iter().take(20) {
        out.add_row(std::iter::once((*label).to_owned()).chain(counts.map(count)));
    }
    if cut > 0 {
        out.add_row(vec![format!("... and {cut} more")]);
    }
    out
}

/// Labels that dev or test have and train has not, and tasks of which train or dev have too few.
fn odd_labels(experiment: &Experiment, corpus: &Corpus) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (i, (name, head)) in experiment.tasks.iter().enumerate() {
        let used = |split: Split| {
            let mut used: BTreeMap<&str, Place> = BTreeMap::new();
            for (set, column) in corpus.columns_of(TaskId(i)) {
                let rows = &set.splits[split as usize];
                for (label, row) in occurrences(head.kind(), rows, column) {
                    used.entry(label).or_insert_with(|| rows.place(row));
                }
            }
            used
        };
        let [train, dev, test] = Split::ALL.map(used);
        if corpus.columns_of(TaskId(i)).all(|(set, _)| set.splits[Split::Train as usize].is_empty()) {
            continue; // Said as an error.
        }
        let odd = |message: String| Problem::general(Severity::Warning, message);
        if train.is_empty() && head.kind().has_spans() {
            problems.push(odd(format!("`{name}`: train has no span: there is nothing to find")));
        }
        let mut folded: BTreeMap<String, (&str, &Place)> = BTreeMap::new();
        for (label, place) in &train {
            let fold = label.to_lowercase().split_whitespace().collect();
            if let Some((other, before)) = folded.insert(fold, (label, place)) {
                let message = format!("`{name}`: labels `{other}` and `{label}` differ in case or white space alone");
                problems.push(Problem::warning(before.max(place).clone(), message));
            }
        }
        if train.len() == 1 && !head.kind().has_spans() {
            problems.push(odd(format!("`{name}`: train has one label alone: there is nothing to tell apart")));
        }
        if dev.is_empty() && !train.is_empty() {
            problems.push(odd(format!(
                "`{name}`: dev has no label of it, so that it does not help to choose a checkpoint"
            )));
        }
        for (split, used) in [(Split::Dev, dev), (Split::Test, test)] {
            for (label, place) in used.into_iter().filter(|(label, _)| !train.contains_key(label)) {
                let message = format!("`{name}`: label `{label}` is in {} but never in train", split.name());
                problems.push(Problem::warning(place, message));
            }
        }
    }
    problems
}

/// Sentences of dev and test that stand in an earlier split of the same set too, or in train of another: there the trunk learns
/// them with other labels.
fn duplicates(corpus: &Corpus) -> Vec<Problem> {
    let mut problems = Vec::new();
    let rows_of = |set: usize, split: Split| &corpus.sets[set].splits[split as usize];
    // Where each sentence stands first, by set.
    let mut seen: HashMap<String, Vec<(usize, Split, usize)>> = HashMap::new();
    for split in Split::ALL {
        for (set, loaded) in corpus.sets.iter().enumerate() {
            let rows = rows_of(set, split);
            for row in 0..rows.len() {
                let known = seen.entry(rows.text_of(row)).or_default();
                // What training sees is the worst, of this set or another.
                let earlier = known.iter().filter(|(other, before, _)| *other == set || *before == Split::Train);
                let worst = earlier.min_by_key(|(other, before, _)| (*before, *other != set));
                if let Some(&(other, before, at)) = worst.filter(|(_, before, _)| *before != split) {
                    let (split, place) = (split.name(), rows_of(other, before).place(at));
                    let message = match other == set {
                        true => format!("this sentence of {split} stands in {} too ({place})", before.name()),
                        false => {
                            let (name, other) = (&loaded.name, &corpus.sets[other].name);
                            format!("this sentence of `{name}`'s {split} stands in train of `{other}` ({place})")
                        }
                    };
                    problems.push(Problem::warning(rows.place(row), message));
                }
                if known.iter().all(|(other, ..)| *other != set) {
                    known.push((set, split, row));
                }
            }
        }
    }
    problems
}

/// Sentences that stand in train twice, with other labels.
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
                    let message = format!("`{name}`: this sentence has other labels than the same before ({place})");
                    problems.push(Problem::warning(rows.place(row), message));
                }
            }
        }
    }
    problems
}

/// Words that programs which cut text at white space, as those of exported models do, take for several.
fn words_apart(corpus: &Corpus) -> Vec<Problem> {
    let mut problems = Vec::new();
    for rows in Split::ALL.iter().flat_map(|&split| corpus.rows(split)) {
        let apart: Vec<bool> = rows.words.iter().map(|word| word.contains(char::is_whitespace)).collect();
        for row in 0..rows.len() {
            if let Some(&word) = rows.words_of(row).iter().find(|&&word| apart[word as usize]) {
                let word = rows.words.get(word);
                let message = format!("the word `{word}` has white space in it, where raw text is cut in use");
                problems.push(Problem::warning(rows.place(row), message));
            }
        }
    }
    problems
}
