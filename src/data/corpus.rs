//! Reads, splits and checks all sets of an experiment.

use std::fs::File;
use std::io::BufRead;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::cache;
use super::cuts::{cut, leave_out_long, leave_out_unlabelled};
use super::formats::{self, Format, Layout};
use super::gzip;
use super::labels;
use super::rows::{ABSENT, Column, Rows, Wanted};
use super::set::{DataConfig, OneOrMany, SetConfig, Split, TaskColumn};
use super::words::Splitter;
use crate::problem::{InvalidInput, Place, Problem, Severity};
use crate::rng::{Purpose, Seed};
use crate::task::{Scheme, TaskId, TaskKind};

/// One set as read from its files.
pub struct LoadedSet {
    pub name: String,
    pub wanted: Vec<Wanted>,
    /// The task of each wanted column.
    pub tasks: Vec<TaskId>,
    /// Train, dev and test; a split that the set lacks is empty.
    pub splits: [Rows; 3],
}

impl LoadedSet {
    /// The labels of a row in a column: one for a class, one per word for tags; `None` if it has none.
    pub fn labels_of<'a>(&self, rows: &'a Rows, column: usize, row: usize) -> Option<&'a [u32]> {
        rows.labels_of(self.wanted[column].kind, column, row)
    }
}

/// All sets as read from their files.
pub struct Corpus {
    pub sets: Vec<LoadedSet>,
}

impl Corpus {
    pub fn rows(&self, split: Split) -> Vec<&Rows> {
        self.sets.iter().map(|set| &set.splits[split as usize]).collect()
    }

    /// The sets that have labels of a task, each with the index of the task's column.
    pub fn columns_of(&self, task: TaskId) -> impl Iterator<Item = (&LoadedSet, usize)> {
        self.sets.iter().filter_map(move |set| {
            let column = set.tasks.iter().position(|&known| known == task)?;
            Some((set, column))
        })
    }

    /// Whether a row of a split has a label for a task.
    pub fn has_labels(&self, task: TaskId, split: Split) -> bool {
        let labelled = |column: &Column| column.values.iter().any(|&value| value != ABSENT);
        self.columns_of(task).any(|(set, column)| labelled(&set.splits[split as usize].columns[column]))
    }

    /// A hash of the sentences and labels of the rows of a split that have labels for a task.
    pub fn fingerprint(&self, task: TaskId, split: Split) -> String {
        let mut hasher = blake3::Hasher::new();
        for (set, column) in self.columns_of(task) {
            let rows = &set.splits[split as usize];
            for row in 0..rows.len() {
                let Some(labels) = set.labels_of(rows, column, row) else { continue };
                hasher.update(rows.text_of(row).as_bytes());
                for &label in labels {
                    hasher.update(b"\t").update(rows.columns[column].strings.get(label).as_bytes());
                }
                hasher.update(b"\n");
            }
        }
        hasher.finalize().to_hex()[..16].to_owned()
    }
}

/// Reads `splits` of every set that a task uses, and the training rows if dev is split off from them. `progress` is
/// called with each file before it is read.
///
/// # Errors
/// [`InvalidInput`] with every set that lacks files. Problems inside files are returned with the corpus.
pub fn load(
    config: &DataConfig,
    columns: &[TaskColumn],
    splits: &[Split],
    splitter: Splitter,
    progress: &dyn Fn(&Path),
) -> Result<(Corpus, Vec<Problem>)> {
    let used: Vec<_> =
        config.sets.iter().filter(|(name, _)| columns.iter().any(|column| column.sets.contains(name))).collect();
    fail_on_missing(config, &used, splits)?;
    let mut problems = Vec::new();
    let mut sets = Vec::new();
    for (name, set) in used {
        let carried = columns.iter().enumerate().filter(|(_, column)| column.sets.contains(name));
        let wanted = |column: &TaskColumn| Wanted { column: column.column.clone(), kind: column.kind };
        let (tasks, mut wanted): (Vec<_>, Vec<_>) = carried.map(|(i, column)| (TaskId(i), wanted(column))).unzip();
        let n_wanted = wanted.len();
        let strata = strata(set, &mut wanted);
        let layout = layout(set, splitter);
        let mut rows = Split::ALL.map(|split| {
            let paths = set.paths(split, splits).into_iter().flat_map(|paths| &paths.0);
            let (rows, found) = read_files(paths.map(|path| config.root.join(path)), &layout, &wanted, progress);
            problems.extend(found);
            rows
        });
        for (i, wanted) in wanted[..n_wanted].iter().enumerate() {
            if let TaskKind::Tagging(scheme) = columns[tasks[i].0].kind {
                for rows in &rows {
                    problems.extend(labels::check_tags(scheme, &wanted.column, rows, i));
                }
            }
        }
        if let Some((field, column)) = set.named_strata()
            && !rows[0].is_empty()
            && rows[0].columns[strata].values.iter().all(|&value| value == ABSENT)
        {
            let message = format!("data.sets.{name}.{field}: no training row has a `{column}`");
            problems.push(Problem::general(Severity::Error, message));
        }
        if let Some(fraction) = set.dev_fraction.filter(|_| !set.has_no_dev()) {
            rows[1] =
                cut(&mut rows[0], (&wanted, strata), fraction, true, Seed(set.dev_seed).generator(Purpose::Split, 0));
        }
        if config.train_fraction < 1.0 {
            let generator = Seed(config.train_fraction_seed).generator(Purpose::Split, 1);
            cut(&mut rows[0], (&wanted, strata), 1.0 - config.train_fraction, false, generator);
        }
        wanted.truncate(n_wanted);
        for rows in &mut rows {
            rows.columns.truncate(n_wanted);
        }
        problems.extend(leave_out_unlabelled(&mut rows[0], &wanted));
        problems.extend(config.max_words.and_then(|max| leave_out_long(&mut rows[0], &wanted, max)));
        sets.push(LoadedSet { name: name.clone(), wanted, tasks, splits: rows });
    }
    // An error in a file already explains why rows or labels are missing.
    let wrong = |file: &Path| problems.iter().any(|found| found.is_error_in(file));
    let mut absent = check_presence(config, columns, &sets, splits);
    absent.retain(|absent| absent.place.as_ref().is_none_or(|place| !wrong(&place.file)));
    problems.extend(absent);
    Ok((Corpus { sets }, problems))
}

/// The index in `wanted` of the column to stratify by. If no task uses it, it is appended for now.
fn strata(set: &SetConfig, wanted: &mut Vec<Wanted>) -> usize {
    let is_class = |wanted: &Wanted| wanted.kind == TaskKind::Classification;
    let Some((field, column)) = set.named_strata() else {
        // The first column of classes, else the first of tags: every set that is read has a task.
        return wanted.iter().position(is_class).unwrap_or(0);
    };
    let kind = if field == "stratify" { TaskKind::Classification } else { TaskKind::Tagging(Scheme::Bio) };
    let named = Wanted { column: column.clone(), kind };
    let same = |own: &Wanted| own.column == named.column && is_class(own) == is_class(&named);
    wanted.iter().position(same).unwrap_or_else(|| {
        wanted.push(named);
        wanted.len() - 1
    })
}

fn fail_on_missing(config: &DataConfig, sets: &[(&String, &SetConfig)], splits: &[Split]) -> Result<()> {
    let mut problems = Vec::new();
    for (name, set) in sets {
        let missing: Vec<PathBuf> = set.files(&config.root, splits).filter(|path| !path.exists()).collect();
        let Some(first) = missing.first() else { continue };
        let mut message = format!("data of set `{name}` is missing: {} does not exist", first.display());
        if missing.len() > 1 {
            message += &format!(" (and {} more)", missing.len() - 1);
        }
        if let Some(source) = &set.source {
            message += &format!("\n  Where to get it: {source}");
        }
        message += &format!(
            "\n  Put it into {}, or set data.root (for polytask's own experiments: POLYTASK_DATA) to the folder that has it",
            config.root.display()
        );
        problems.push(Problem::general(Severity::Error, message));
    }
    if problems.is_empty() { Ok(()) } else { Err(InvalidInput(problems).into()) }
}

fn read_files(
    paths: impl Iterator<Item = PathBuf>,
    layout: &Layout,
    wanted: &[Wanted],
    progress: &dyn Fn(&Path),
) -> (Rows, Vec<Problem>) {
    let (mut rows, mut problems) = (Rows::new(wanted.len()), Vec::new());
    for path in paths {
        progress(&path);
        let (parts, found) = cache::read(&path, layout, wanted);
        // The rows of a parallel folder are located in its file of words.
        let main = layout.tokens.as_deref().or(layout.text.as_deref()).unwrap_or("seq.in");
        let file = match layout.format {
            Format::Parallel => path.join(main),
            format => formats::file_of(&path, format),
        };
        rows.append_file(&file, parts);
        problems.extend(found);
    }
    (rows, problems)
}

fn layout(set: &SetConfig, splitter: Splitter) -> Layout {
    Layout {
        format: set.format,
        text: set.text.clone(),
        tokens: set.tokens.clone(),
        columns: set.columns.clone(),
        separator: set.separator.clone(),
        quotes: set.quotes,
        offsets: set.offsets,
        splitter,
        encoding: set.known_encoding().unwrap_or(encoding_rs::UTF_8),
    }
}

/// Errors if train or dev has no rows, or a task has no training labels; warnings if nothing can be scored.
fn check_presence(config: &DataConfig, columns: &[TaskColumn], sets: &[LoadedSet], splits: &[Split]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for set in sets {
        problems.extend(splits.iter().filter_map(|&split| without_rows(config, set, split)));
        for (i, task) in set.tasks.iter().enumerate() {
            let name = &columns[task.0].name;
            problems.extend(Split::ALL.into_iter().filter_map(|split| without_labels(config, (set, i), name, split)));
        }
    }
    problems
}

/// The problem of a set without rows in a split.
fn without_rows(config: &DataConfig, set: &LoadedSet, split: Split) -> Option<Problem> {
    let own = &config.sets[&set.name];
    if !set.splits[split as usize].is_empty() || (split == Split::Dev && own.has_no_dev()) {
        return None;
    }
    let file = |paths: &OneOrMany| formats::file_of(&config.root.join(&paths.0[0]), own.format);
    let (paths, after) = match split {
        Split::Test => {
            let message = format!("set `{}` has no row in test: nothing is scored on it", set.name);
            return own.test.as_ref().map(|paths| Problem::warning(Place::new(&file(paths), 0), message));
        }
        Split::Dev if own.dev_fraction.is_some() => (None, ", which is split off train by `dev_fraction`"),
        Split::Dev => (own.dev.as_ref(), ""),
        Split::Train if config.max_words.is_some() => (Some(&own.train), " within `data.max_words`"),
        Split::Train if own.dev_fraction.is_some() || config.train_fraction < 1.0 => {
            (Some(&own.train), " after `dev_fraction` or `train_fraction` was applied")
        }
        Split::Train => (Some(&own.train), ""),
    };
    let message = format!("set `{}` has no usable row in {}{after}", set.name, split.name());
    Some(match paths {
        Some(paths) => Problem::error(Place::new(&file(paths), 0), message),
        None => Problem::general(Severity::Error, message),
    })
}

/// The problem of a set whose rows in a split have no labels in column `i`, that of `task`.
fn without_labels(config: &DataConfig, (set, i): (&LoadedSet, usize), task: &str, split: Split) -> Option<Problem> {
    let (rows, own, column) = (&set.splits[split as usize], &config.sets[&set.name], &set.wanted[i].column);
    if rows.is_empty() || rows.columns[i].values.iter().any(|&value| value != ABSENT) {
        return None;
    }
    if split != Split::Train {
        let file = rows.place(0).file;
        let keys = keys_of(&file, own.format);
        let message = format!("no row of {} has a `{column}`: `{task}` is not scored on it{keys}", split.name());
        return Some(Problem::warning(Place::new(&file, 0), message));
    }
    let place = Place::new(&config.root.join(&own.train.0[0]), 0);
    let conll = matches!(own.format, Format::Conll | Format::Conllu);
    let hint = match set.wanted[i].kind {
        _ if config.max_words.is_some() || config.train_fraction < 1.0 => {
            ": `data.max_words` or `train_fraction` may have removed them".to_owned()
        }
        TaskKind::Classification if conll => format!(": sentences carry classes in lines `# {column} = ...`"),
        _ => keys_of(&place.file, own.format),
    };
    Some(Problem::error(place, format!("no row has a `{column}` for task `{task}`{hint}")))
}

/// For a message: the keys of the first row of a JSON Lines file.
fn keys_of(file: &Path, format: Format) -> String {
    let read = || -> Option<Vec<String>> {
        let first =
            gzip::unpacked(File::open(file).ok()?).ok()?.lines().map_while(Result::ok).find(|line| !line.is_empty())?;
        let row: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&first).ok()?;
        Some(row.into_iter().map(|(key, _)| format!("`{key}`")).collect())
    };
    let keys = if format == Format::Jsonl { read() } else { None };
    keys.map_or(String::new(), |keys| format!("; the keys of its first row are {}", keys.join(", ")))
}
