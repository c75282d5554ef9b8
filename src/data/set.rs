//! The data of an experiment: which files hold which split of which set, and reading them all.

use std::path::{Path, PathBuf};

use anyhow::Result;
use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use super::cache;
use super::cuts::{cut, leave_out_unlabelled};
use super::formats::{self, Format, Layout};
use super::labels;
use super::rows::{ABSENT, Column, Rows, Wanted, WantedKind};
use super::words::Splitter;
use crate::problem::{InvalidInput, Place, Problem, Severity};
use crate::rng::{Purpose, Seed};
use crate::task::{Scheme, TaskId, TaskKind};

/// The `data:` of an experiment.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// The folder that paths of sets are relative to; itself relative to the working directory. Default: `data`.
    #[serde(default = "default_root")]
    pub root: PathBuf,
    /// The sets by name.
    pub sets: IndexMap<String, SetConfig>,
    /// Share of every set's training rows that is used, drawn after the dev cut and in the same strata. A smaller share
    /// is part of a larger one, but for rounding in strata of a few rows. Default 1, more than 0, at most 1.
    #[serde(default = "one")]
    pub train_fraction: f64,
    /// Seed of that choice, apart from the experiment's. Default 0.
    #[serde(default)]
    pub train_fraction_seed: u64,
}

fn one() -> f64 {
    1.0
}

fn default_root() -> PathBuf {
    PathBuf::from("data")
}

/// One data set.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SetConfig {
    /// How the files are written.
    pub format: Format,
    /// File or files of the training split.
    pub train: Paths,
    /// File or files of the dev split, which chooses the best checkpoint. Required unless `dev_fraction` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dev: Option<Paths>,
    /// File or files of the test split. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<Paths>,
    /// Share of the training rows cut off as dev, stratified by class (or by the rarest tag). Between 0 and 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dev_fraction: Option<f64>,
    /// Seed of that cut, apart from the experiment's, so that runs of many seeds share their dev rows. Default 0.
    #[serde(default)]
    pub dev_seed: u64,
    /// The column of classes whose shares `dev_fraction` and `train_fraction` keep. Default: that of the first
    /// classification task of the set, or, without one, `stratify_tags`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stratify: Option<String>,
    /// Instead, a column of tags or spans: a row counts under its rarest type. Default: that of the set's first tagging
    /// task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stratify_tags: Option<String>,
    /// The column or field with raw text. Default `text`, for formats that hold text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The column or field with words, instead of text. Default: `seq.in` (`parallel`), the first (`conll`), `form`
    /// (`conllu`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<String>,
    /// Names of the columns, for `conll` and `lines`. Without them, columns of `conll` go by number from 0, in quotes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<String>,
    /// What stands between columns. Default: tab or spaces (`conll`), a space (`lines`), a comma (`csv`), a tab
    /// (`tsv`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub separator: Option<String>,
    /// Whether `"` encloses values of `csv` and `tsv`; else it is a character as any other. Default true.
    #[serde(default = "yes")]
    pub quotes: bool,
    /// Character encoding by its WHATWG name, such as `latin1` or `gbk`. Default `utf-8`.
    #[serde(default = "default_encoding")]
    pub encoding: String,
    /// Where the set comes from: said when it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

impl SetConfig {
    /// Where a split stands, if it is one of those `wanted`, or dev is and has to be cut off it.
    fn paths(&self, split: Split, wanted: &[Split]) -> Option<&Paths> {
        let cut = split == Split::Train && self.dev_fraction.is_some() && wanted.contains(&Split::Dev);
        let paths = match split {
            Split::Train => Some(&self.train),
            Split::Dev => self.dev.as_ref(),
            Split::Test => self.test.as_ref(),
        };
        paths.filter(|_| cut || wanted.contains(&split))
    }

    /// The key that names the column of cuts, and the column.
    fn named_strata(&self) -> Option<(&str, &String)> {
        let classes = self.stratify.as_ref().map(|column| ("stratify", column));
        classes.or_else(|| self.stratify_tags.as_ref().map(|column| ("stratify_tags", column)))
    }
}

fn yes() -> bool {
    true
}

fn default_encoding() -> String {
    "utf-8".to_owned()
}

/// One path or a list of paths.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(transparent)]
#[schemars(with = "OneOrMany")]
pub struct Paths(pub Vec<String>);

/// What [`Paths`] are written as.
#[derive(JsonSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its schema is read")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl<'de> Deserialize<'de> for Paths {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Paths;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a text or a list of texts")
            }

            fn visit_str<E>(self, text: &str) -> Result<Paths, E> {
                Ok(Paths(vec![text.to_owned()]))
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut items: A) -> Result<Paths, A::Error> {
                let mut paths = Vec::new();
                while let Some(path) = items.next_element()? {
                    paths.push(path);
                }
                Ok(Paths(paths))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A part of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Split {
    Train,
    Dev,
    Test,
}

impl Split {
    pub const ALL: [Split; 3] = [Split::Train, Split::Dev, Split::Test];

    pub fn name(self) -> &'static str {
        ["train", "dev", "test"][self as usize]
    }
}

/// Where a task finds its labels.
#[derive(Clone, Debug)]
pub struct TaskColumn {
    pub name: String,
    pub kind: TaskKind,
    pub sets: Vec<String>,
    pub column: String,
}

/// One set as read.
pub struct LoadedSet {
    pub name: String,
    pub wanted: Vec<Wanted>,
    /// The task of each wanted column.
    pub tasks: Vec<TaskId>,
    /// Train, dev and test; a split that the set lacks is empty.
    pub splits: [Rows; 3],
}

/// All sets as read.
pub struct Corpus {
    pub sets: Vec<LoadedSet>,
}

impl Corpus {
    pub fn rows(&self, split: Split) -> Vec<&Rows> {
        self.sets.iter().map(|set| &set.splits[split as usize]).collect()
    }

    /// Each set's column of a task.
    pub fn columns_of(&self, task: TaskId) -> impl Iterator<Item = (&LoadedSet, usize)> {
        self.sets.iter().filter_map(move |set| {
            let column = set.tasks.iter().position(|&known| known == task)?;
            Some((set, column))
        })
    }

    /// A fingerprint of the rows of a split that carry labels for a task: equal where sentences and labels are.
    pub fn fingerprint(&self, task: TaskId, split: Split) -> String {
        let mut hasher = blake3::Hasher::new();
        for (set, column) in self.columns_of(task) {
            let rows = &set.splits[split as usize];
            let Column { strings, values, .. } = &rows.columns[column];
            for row in 0..rows.len() {
                let labels = match set.wanted[column].kind {
                    WantedKind::Class => Some(&values[row..=row]).filter(|value| value[0] != ABSENT),
                    WantedKind::Tags(_) => rows.tags_of(column, row),
                };
                let Some(labels) = labels else { continue };
                hasher.update(rows.text_of(row).as_bytes());
                for &label in labels {
                    hasher.update(b"\t").update(strings.get(label).as_bytes());
                }
                hasher.update(b"\n");
            }
        }
        hasher.finalize().to_hex()[..16].to_owned()
    }
}

/// Reads `splits` of every set that a task uses, and the training rows where dev is cut off them. `progress` hears of each
/// file before it is read.
///
/// # Errors
/// [`InvalidInput`] with every file that is missing. What is wrong inside files is returned beside the corpus.
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
        let (tasks, mut wanted): (Vec<_>, Vec<_>) = carried.map(|(i, column)| (TaskId(i), wanted(column))).unzip();
        let n_wanted = wanted.len();
        let strata = strata(set, &mut wanted);
        let mut rows = Split::ALL.map(|split| {
            let paths = set.paths(split, splits).map_or(&[][..], |paths| &paths.0);
            read_split(config, set, paths, &wanted, splitter, progress, &mut problems)
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
        if let Some(fraction) = set.dev_fraction {
            rows[1] = cut(&mut rows[0], (&wanted, strata), fraction, Seed(set.dev_seed).generator(Purpose::Split, 0));
        }
        if config.train_fraction < 1.0 {
            let generator = Seed(config.train_fraction_seed).generator(Purpose::Split, 1);
            cut(&mut rows[0], (&wanted, strata), 1.0 - config.train_fraction, generator);
        }
        wanted.truncate(n_wanted);
        for rows in &mut rows {
            rows.columns.truncate(n_wanted);
        }
        problems.extend(leave_out_unlabelled(&mut rows[0], &wanted));
        sets.push(LoadedSet { name: name.clone(), wanted, tasks, splits: rows });
    }
    problems.extend(check_presence(config, columns, &sets, splits));
    Ok((Corpus { sets }, problems))
}

/// The column whose shares cuts keep, as its place in `wanted`. One that no task needs is added: it is read for the cuts and
/// then let go.
fn strata(set: &SetConfig, wanted: &mut Vec<Wanted>) -> usize {
    let is_class = |wanted: &Wanted| wanted.kind == WantedKind::Class;
    let Some((field, column)) = set.named_strata() else {
        // The first classes, else the first tags: a set that is read has a task.
        return wanted.iter().position(is_class).unwrap_or(0);
    };
    let kind = if field == "stratify" { WantedKind::Class } else { WantedKind::Tags(Scheme::Plain) };
    let named = Wanted { column: column.clone(), kind };
    let same = |own: &Wanted| own.column == named.column && is_class(own) == is_class(&named);
    wanted.iter().position(same).unwrap_or_else(|| {
        wanted.push(named);
        wanted.len() - 1
    })
}

fn wanted(column: &TaskColumn) -> Wanted {
    let kind = match column.kind {
        TaskKind::Classification => WantedKind::Class,
        TaskKind::Tagging(scheme) => WantedKind::Tags(scheme),
    };
    Wanted { column: column.column.clone(), kind }
}

fn fail_on_missing(config: &DataConfig, sets: &[(&String, &SetConfig)], splits: &[Split]) -> Result<()> {
    let mut problems = Vec::new();
    for (name, set) in sets {
        let missing: Vec<PathBuf> = Split::ALL
            .into_iter()
            .filter_map(|split| set.paths(split, splits))
            .flat_map(|paths| &paths.0)
            .map(|path| formats::file_of(&config.root.join(path), set.format))
            .filter(|path| !path.exists())
            .collect();
        let Some(first) = missing.first() else { continue };
        let mut message = format!("data of set `{name}` is missing: {} does not exist", first.display());
        if missing.len() > 1 {
            message += &format!(" (nor {} more)", missing.len() - 1);
        }
        if let Some(source) = &set.source {
            message += &format!("\n  It comes from: {source}");
        }
        message += &format!(
            "\n  Put it below {}, or point data.root (in experiments of polytask: POLYTASK_DATA) at the folder that holds it",
            config.root.display()
        );
        problems.push(Problem::general(Severity::Error, message));
    }
    if problems.is_empty() { Ok(()) } else { Err(InvalidInput(problems).into()) }
}

fn read_split(
    config: &DataConfig,
    set: &SetConfig,
    paths: &[String],
    wanted: &[Wanted],
    splitter: Splitter,
    progress: &dyn Fn(&Path),
    problems: &mut Vec<Problem>,
) -> Rows {
    let layout = layout(set, splitter);
    let mut rows = Rows::new(wanted.len());
    for path in paths {
        let path = config.root.join(path);
        progress(&path);
        let (parts, found) = cache::read(&path, &layout, wanted);
        // A parallel folder's rows stand in its file of words.
        let main = layout.tokens.as_deref().or(layout.text.as_deref()).unwrap_or("seq.in");
        let file = match set.format {
            Format::Parallel => path.join(main),
            format => formats::file_of(&path, format),
        };
        rows.append_file(&file, parts);
        problems.extend(found);
    }
    rows
}

fn layout(set: &SetConfig, splitter: Splitter) -> Layout {
    Layout {
        format: set.format,
        text: set.text.clone(),
        tokens: set.tokens.clone(),
        columns: set.columns.clone(),
        separator: set.separator.clone(),
        quotes: set.quotes,
        splitter,
        encoding: encoding_rs::Encoding::for_label(set.encoding.as_bytes()).unwrap_or(encoding_rs::UTF_8),
    }
}

/// Errors where a split has no row, or a task no label to learn from.
fn check_presence(config: &DataConfig, columns: &[TaskColumn], sets: &[LoadedSet], splits: &[Split]) -> Vec<Problem> {
    let mut problems = Vec::new();
    let root = &config.root;
    for set in sets {
        for split in [Split::Train, Split::Dev] {
            if splits.contains(&split) && set.splits[split as usize].is_empty() {
                let config = &config.sets[&set.name];
                let paths = if split == Split::Train { Some(&config.train) } else { config.dev.as_ref() };
                let message = format!("set `{}` has no usable row in {}", set.name, split.name());
                problems.push(match paths {
                    Some(paths) => Problem::error(Place::new(&root.join(&paths.0[0]), 0), message),
                    None => Problem::general(Severity::Error, message),
                });
            }
        }
        for (i, task) in set.tasks.iter().enumerate() {
            let train = &set.splits[0];
            if !train.is_empty() && train.columns[i].values.iter().all(|&value| value == ABSENT) {
                let place = Place::new(&root.join(&config.sets[&set.name].train.0[0]), 0);
                let message = format!("no row has a `{}` for task `{}`", set.wanted[i].column, columns[task.0].name);
                problems.push(Problem::error(place, message));
            }
        }
    }
    problems
}
