//! The data of an experiment: which files hold which split of which set.

use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use super::formats::{self, Format, Offsets};
use crate::task::TaskKind;

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
    /// Training sentences of more words are left out: a batch is as long as its longest, and takes memory for it. Default: no
    /// limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_words: Option<usize>,
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
    /// Names of the columns: for `lines`; for `csv` and `tsv` without a header; for `conll`, whose columns else go by number from
    /// 0, in quotes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<String>,
    /// What stands between columns. Default: tab or spaces (`conll`), a space (`lines`), a comma (`csv`), a tab
    /// (`tsv`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub separator: Option<String>,
    /// Whether `"` encloses values of `csv` and `tsv`; else it is a character as any other. Default true.
    #[serde(default = "yes")]
    pub quotes: bool,
    /// What `start` and `end` of spans in JSON count: `characters` or `words`; the end is not of the span. Default `characters`.
    #[serde(default, skip_serializing_if = "Offsets::are_characters")]
    pub offsets: Offsets,
    /// Character encoding by its WHATWG name, such as `latin1` or `gbk`. Default `utf-8`.
    #[serde(default = "default_encoding")]
    pub encoding: String,
    /// Where the set comes from: said when it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

impl SetConfig {
    /// Its encoding, whose name may also be spelled as Python does (`latin-1`, `utf_8`).
    pub fn known_encoding(&self) -> Option<&'static encoding_rs::Encoding> {
        let known = |name: &str| encoding_rs::Encoding::for_label(name.as_bytes());
        known(&self.encoding).or_else(|| known(&self.encoding.replace(['-', '_'], "")))
    }

    /// Where a split stands, if it is one of those `wanted`, or dev is and has to be cut off it.
    pub fn paths(&self, split: Split, wanted: &[Split]) -> Option<&Paths> {
        let cut = split == Split::Train && self.dev_fraction.is_some() && wanted.contains(&Split::Dev);
        let paths = match split {
            Split::Train => Some(&self.train),
            Split::Dev => self.dev.as_ref(),
            Split::Test => self.test.as_ref(),
        };
        paths.filter(|_| cut || wanted.contains(&split))
    }

    /// The files below `root` of the splits that are `wanted`.
    pub fn files<'a>(&'a self, root: &'a Path, wanted: &'a [Split]) -> impl Iterator<Item = PathBuf> + 'a {
        let paths = Split::ALL.into_iter().filter_map(|split| self.paths(split, wanted)).flat_map(|paths| &paths.0);
        paths.map(|path| formats::file_of(&root.join(path), self.format))
    }

    /// The key that names the column of cuts, and the column.
    pub fn named_strata(&self) -> Option<(&str, &String)> {
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
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
