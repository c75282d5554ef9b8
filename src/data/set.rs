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
    /// The folder to which the paths of the sets are relative; itself relative to the working directory. Default:
    /// `data`.
    #[serde(default = "default_root")]
    pub root: PathBuf,
    /// The data sets by name.
    pub sets: IndexMap<String, SetConfig>,
    /// Fraction of each set's training rows to use, drawn after dev is split off and with the same stratification. A
    /// smaller fraction is a subset of a larger one, except for rounding in small strata. Default 1.
    #[serde(default = "one")]
    #[schemars(range(max = 1), extend("exclusiveMinimum" = 0))]
    pub train_fraction: f64,
    /// Seed for drawing these rows, independent of `seed`. Default 0.
    #[serde(default)]
    pub train_fraction_seed: u64,
    /// Leave out training sentences with more words than this. A batch is padded to its longest sentence, so one long
    /// sentence takes memory for all. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
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
    /// The format of the files.
    pub format: Format,
    /// File or files of the training split.
    pub train: OneOrMany,
    /// File or files of the dev split, on which the best checkpoint is chosen. Required unless `dev_fraction` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dev: Option<OneOrMany>,
    /// File or files of the test split. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<OneOrMany>,
    /// Fraction of the training rows to split off as dev, stratified by class (or by the rarest tag). With 0
    /// there is no dev; where no set has one, the last weights are kept as the best.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub dev_fraction: Option<f64>,
    /// Seed for splitting off dev, independent of `seed`, so that runs with different seeds share their dev rows.
    /// Default 0.
    #[serde(default)]
    pub dev_seed: u64,
    /// The column of classes by which `dev_fraction` and `train_fraction` are stratified. Default: the column of the
    /// set's first classification task, or, without one, `stratify_tags`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stratify: Option<String>,
    /// A column of tags or spans to stratify by instead; a row belongs to the stratum of its rarest tag or span type.
    /// Default: the column of the set's first tagging task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stratify_tags: Option<String>,
    /// The column or field with raw text. Default `text`, for formats that hold raw text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The column or field with words, instead of raw text. Default: `seq.in` (`parallel`), the first column (`conll`),
    /// `form` (`conllu`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<String>,
    /// Column names: required for `lines`, and for `csv` and `tsv` without a header line; optional for `conll`, whose
    /// columns are otherwise referred to by quoted numbers from "0".
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<String>,
    /// The separator between columns. Default: tab or spaces (`conll`), a space (`lines`), a comma (`csv`), a tab
    /// (`tsv`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub separator: Option<String>,
    /// Whether `"` encloses values in `csv` and `tsv`; if false, it is an ordinary character. Default true.
    #[serde(default = "yes")]
    pub quotes: bool,
    /// Unit of the `start` and `end` of spans in JSON: `characters` or `words`; `end` is exclusive. Default
    /// `characters`.
    #[serde(default, skip_serializing_if = "Offsets::are_characters")]
    pub offsets: Offsets,
    /// Character encoding of the files, by its WHATWG name, such as `latin1` or `gbk`. Default `utf-8`.
    #[serde(default = "default_encoding")]
    pub encoding: String,
    /// Where to get the data set; printed when its files are missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

impl SetConfig {
    /// Whether the experiment asks to train without dev on this set (`dev_fraction: 0`).
    pub fn has_no_dev(&self) -> bool {
        self.dev_fraction == Some(0.0)
    }

    /// The encoding, whose name may also be spelled as in Python (`latin-1`, `utf_8`); `None` if it is unknown.
    pub fn known_encoding(&self) -> Option<&'static encoding_rs::Encoding> {
        let known = |name: &str| encoding_rs::Encoding::for_label(name.as_bytes());
        known(&self.encoding).or_else(|| known(&self.encoding.replace(['-', '_'], "")))
    }

    /// The files of a split, if it is `wanted`, or if it is train and a `wanted` dev is split off from it.
    pub fn paths(&self, split: Split, wanted: &[Split]) -> Option<&OneOrMany> {
        let cut = split == Split::Train && self.dev_fraction.is_some() && wanted.contains(&Split::Dev);
        let paths = match split {
            Split::Train => Some(&self.train),
            Split::Dev => self.dev.as_ref(),
            Split::Test => self.test.as_ref(),
        };
        paths.filter(|_| cut || wanted.contains(&split))
    }

    /// The files of the `wanted` splits, below `root`.
    pub fn files<'a>(&'a self, root: &'a Path, wanted: &'a [Split]) -> impl Iterator<Item = PathBuf> + 'a {
        let paths = Split::ALL.into_iter().filter_map(|split| self.paths(split, wanted)).flat_map(|paths| &paths.0);
        paths.map(|path| formats::file_of(&root.join(path), self.format))
    }

    /// The key that names the column to stratify by, and the column.
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

/// One text or a list of texts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(transparent)]
#[schemars(with = "Written")]
pub struct OneOrMany(pub Vec<String>);

/// The schema of [`OneOrMany`].
#[derive(JsonSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its schema is read")]
enum Written {
    One(String),
    Many(Vec<String>),
}

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = OneOrMany;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E>(self, text: &str) -> Result<OneOrMany, E> {
                Ok(OneOrMany(vec![text.to_owned()]))
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut items: A) -> Result<OneOrMany, A::Error> {
                let mut all = Vec::new();
                while let Some(text) = items.next_element()? {
                    all.push(text);
                }
                Ok(OneOrMany(all))
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
