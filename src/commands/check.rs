//! `polytask check`: all errors and suspicious values that can be found before training.

use std::collections::BTreeMap;

use anyhow::Result;
use indexmap::IndexMap;
use tch::Device;

use super::cli::CheckArgs;
use super::table::{count, percent, table};
use super::{End, build_trainer, data_checks, init_from, prepare, saved_model, say};
use crate::config::Experiment;
use crate::data::{Corpus, LoadedSet, Rows, Split, Tokenizer};
use crate::libtorch;
use crate::model::HeadConfig;
use crate::problem::{InvalidInput, Problem, Severity, counted, shown};
use crate::task::TaskId;

/// Number of problems of each kind shown without --all.
const SHOWN: usize = 5;

pub fn run(args: &CheckArgs) -> Result<End> {
    let experiment = Experiment::load(&args.experiment, &args.overrides)?;
    let (corpus, mut problems) = prepare::corpus(&experiment)?;
    problems.extend(data_checks::find(&experiment, &corpus));
    say(sizes(&corpus))?;
    let wrong = |error: anyhow::Error| match error.downcast::<InvalidInput>() {
        Ok(InvalidInput(problems)) => problems,
        Err(error) => vec![Problem::general(Severity::Error, format!("{error:#}"))],
    };
    experiment.variants(&args.experiment, &args.overrides).map_or_else(|error| problems.extend(wrong(error)), drop);
    let earlier = init_from::earlier(&experiment).unwrap_or_else(|error| {
        problems.extend(wrong(error));
        None
    });
    if corpus.rows(Split::Train).iter().any(|rows| !rows.is_empty()) {
        match prepare::tokenizer(&experiment, &corpus) {
            Ok((tokenizer, coverage)) => {
                for coverage in &coverage {
                    say(prepare::coverage_line(coverage))?;
                    if coverage.types.1 == 0 {
                        let message =
                            format!("{} has a vector for no word of the training text", coverage.file.display());
                        problems.push(Problem::general(Severity::Warning, message));
                    }
                }
                say(unknown_words(&tokenizer, &corpus)?)?;
                match begin(&experiment, &corpus, &tokenizer, earlier.as_ref()) {
                    Ok(notes) => {
                        problems.extend(notes.into_iter().map(|note| Problem::general(Severity::Warning, note)));
                    }
                    Err(error) => problems.extend(wrong(error)),
                }
            }
            Err(error) => problems.extend(wrong(error)),
        }
    }
    problems.sort_by_key(|problem| problem.severity);
    for (i, (name, head)) in experiment.tasks.iter().enumerate() {
        say(label_counts(TaskId(i), (name, head), &corpus, args.all))?;
    }
    for severity in [Severity::Error, Severity::Warning] {
        let name = if severity == Severity::Error { "error" } else { "warning" };
        let mut kinds: IndexMap<String, Vec<&Problem>> = IndexMap::new();
        for problem in problems.iter().filter(|problem| problem.severity == severity) {
            kinds.entry(kind_of(&problem.message)).or_default().push(problem);
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

/// The kind of a message: its text without names, numbers and places.
fn kind_of(message: &str) -> String {
    let message = message.split('(').next().unwrap_or(message);
    let outside_quotes = message.split('`').step_by(2);
    outside_quotes.flat_map(str::chars).filter(|c| !c.is_ascii_digit()).collect()
}

/// Sentences, words and lengths of every split, and the number of labelled rows per task.
fn sizes(corpus: &Corpus) -> comfy_table::Table {
    let mut out = table(&["set", "split", "sentences", "words", "median length", "longest", "rows with labels"], 2);
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

/// Does what training does before its first step, and returns warnings.
fn begin(
    experiment: &Experiment,
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    earlier: Option<&saved_model::Trained>,
) -> Result<Vec<String>> {
    build_trainer::check_precision(&experiment.training, libtorch::device("auto")?)?;
    let (tasks, device) = (prepare::tasks(experiment, corpus), Device::Cpu);
    let dev = prepare::encoded(corpus, Split::Dev, tokenizer, &tasks, device)?;
    build_trainer::fail_without_choice(&experiment.training.early_stopping.metric.0, &dev, &tasks)?;
    let model = build_trainer::model(experiment, &tasks, tokenizer, device)?;
    match earlier {
        Some(earlier) => Ok(init_from::initialize(&model, (experiment, &tasks), tokenizer, earlier)?.left),
        None => Ok(Vec::new()),
    }
}

/// Share of words with an unknown token in each split.
fn unknown_words(tokenizer: &Tokenizer, corpus: &Corpus) -> Result<comfy_table::Table> {
    let mut out = table(&["set", "split", "unknown words (%)", "most frequent"], 2);
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
            out.add_row(vec![set.name.clone(), split.name().to_owned(), share, shown(&examples.join(" "))]);
        }
    }
    Ok(out)
}

/// Counts of each label, or span type, in each split.
fn label_counts(task: TaskId, (name, head): (&str, &HeadConfig), corpus: &Corpus, all: bool) -> comfy_table::Table {
    let kind = head.kind();
    let named = head.labels().into_iter().flatten().map(|label| (label.as_str(), [0; 3]));
    let mut counts: BTreeMap<&str, [usize; 3]> = named.collect();
    for (set, column) in corpus.columns_of(task) {
        for split in Split::ALL {
            for (label, _) in data_checks::occurrences(kind, &set.splits[split as usize], column) {
                counts.entry(label).or_default()[split as usize] += 1;
            }
        }
    }
    let n = counts.len();
    let header = match kind.has_spans() {
        true => format!("{name}: {}", counted(n, "span type")),
        false => format!("{name}: {}", counted(n, "label")),
    };
    let mut out = table(&[&header, "train", "dev", "test"], 1);
    let mut rows: Vec<_> = counts.into_iter().collect();
    rows.sort_by(|a, b| b.1[0].cmp(&a.1[0]).then(a.0.cmp(b.0)));
    let n_shown = if all { rows.len() } else { rows.len().min(20) };
    for (label, counts) in &rows[..n_shown] {
        out.add_row(std::iter::once(shown(label)).chain(counts.map(count)));
    }
    if n_shown < rows.len() {
        out.add_row(vec![format!("... and {} more; --all lists them", rows.len() - n_shown)]);
    }
    out
}
