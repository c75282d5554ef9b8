//! Readers of data files, one module per family of formats. Each turns text into rows and reports problems by line.

mod columns;
mod conll;
mod json;
mod parallel;
mod unique;

pub use conll::{ConllLayout, ConllLine, line_of_a_word};
pub use json::{row_of as json_row, value as json_value};

use std::borrow::Cow;
use std::path::Path;

use encoding_rs::Encoding;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::gzip;
use super::rows::{Field, Rows, RowsBuilder, Wanted};
use super::words::{Splitter, character_ranges};
use crate::problem::{Place, Problem};
use crate::task::TaskKind;

/// How a data set is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// A folder of files with one line per sentence: words in one file, labels or tags in the others (`seq.in`,
    /// `seq.out`, `label`).
    Parallel,
    /// One word per line with its columns, an empty line after each sentence; `# name = value` or `# name: value` lines
    /// before the words carry sentence labels.
    Conll,
    /// CoNLL-U: ten columns, referred to by name (`form`, `upos`, `xpos`, `feats`, ...).
    Conllu,
    /// One JSON object per line.
    Jsonl,
    /// One JSON file; `file.json#key` names the array of rows in it; rows are objects or arrays.
    Json,
    /// Comma-separated values with a header, or with `columns`.
    Csv,
    /// Tab-separated values with a header, or with `columns`.
    Tsv,
    /// `columns` separated by `separator`; the last column takes the rest of the line; no header and no quoting.
    Lines,
    /// Rasa's training data as JSON: `text`, `intent`, `entities`.
    Rasa,
}

/// Unit of the offsets of spans in JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Offsets {
    /// Characters of the text or, with `tokens`, of the tokens joined by spaces.
    #[default]
    Characters,
    /// Words, counted from 0.
    Words,
}

impl Offsets {
    pub fn are_characters(&self) -> bool {
        *self == Offsets::Characters
    }
}

/// How to read the files of one set.
#[derive(Clone, Debug)]
pub struct Layout {
    pub format: Format,
    /// The column with raw text (`text`) or with words (`tokens`); if neither is given, the format's default.
    pub text: Option<String>,
    pub tokens: Option<String>,
    pub columns: Vec<String>,
    pub separator: Option<String>,
    pub quotes: bool,
    pub offsets: Offsets,
    pub splitter: Splitter,
    pub encoding: &'static Encoding,
}

/// The result of reading one file: its rows in order, in parts, and its problems.
pub type Parsed = (Vec<Rows>, Vec<Problem>);

/// Reads one file (for `parallel`: one folder). An error that stops reading is among the problems too.
pub fn read(path: &Path, layout: &Layout, wanted: &[Wanted]) -> Parsed {
    match layout.format {
        Format::Parallel => parallel::read(path, layout, wanted),
        Format::Conll | Format::Conllu => with_text(path, layout, |text| conll::read(path, text, layout, wanted)),
        Format::Jsonl => with_text(path, layout, |text| json::read_lines(path, text, layout, wanted)),
        Format::Json | Format::Rasa => {
            let (file, pointer) = json::split_pointer(path, layout.format);
            with_text(&file, layout, |text| json::read_array(&file, text, &pointer, layout, wanted))
        }
        Format::Csv | Format::Tsv => with_text(path, layout, |text| columns::read_csv(path, text, layout, wanted)),
        Format::Lines => with_text(path, layout, |text| columns::read_lines(path, text, layout, wanted)),
    }
}

/// The file of a path, without the pointer into it that JSON paths may have.
pub fn file_of(path: &Path, format: Format) -> std::path::PathBuf {
    match format {
        Format::Json | Format::Rasa => json::split_pointer(path, format).0,
        _ => path.to_owned(),
    }
}

fn with_text(path: &Path, layout: &Layout, parse: impl FnOnce(&str) -> Parsed) -> Parsed {
    match text_of(path, layout) {
        Ok(text) => parse(&text),
        Err(problems) => (Vec::new(), problems),
    }
}

/// The decoded text of a file, or why it cannot be read; for UTF-8, one problem per invalid line.
fn text_of(path: &Path, layout: &Layout) -> Result<String, Vec<Problem>> {
    let bytes = gzip::read(path).map_err(|error| {
        let message = match error.kind() {
            std::io::ErrorKind::NotFound => "no such file".to_owned(),
            _ => format!("cannot be read: {error}"),
        };
        vec![Problem::error(Place::new(path, 0), message)]
    })?;
    if layout.encoding != encoding_rs::UTF_8 {
        let (text, _, malformed) = layout.encoding.decode(&bytes);
        if malformed {
            let message = format!("contains bytes that are not {}", layout.encoding.name());
            return Err(vec![Problem::error(Place::new(path, 0), message)]);
        }
        return Ok(text.into_owned());
    }
    if let Some((encoding, _)) =
        encoding_rs::Encoding::for_bom(&bytes).filter(|(found, _)| *found != encoding_rs::UTF_8)
    {
        let name = encoding.name().to_lowercase();
        return Err(vec![Problem::error(
            Place::new(path, 0),
            format!("is in another encoding: give `encoding: {name}`"),
        )]);
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(match text.strip_prefix('\u{feff}') {
            Some(rest) => rest.to_owned(),
            None => text,
        }),
        Err(error) => {
            let broken = error.as_bytes().split(|&byte| byte == b'\n').enumerate();
            let broken = broken.filter(|(_, line)| std::str::from_utf8(line).is_err());
            let message = "invalid UTF-8; if the file is in another encoding, name it with `encoding:`";
            Err(broken.map(|(i, _)| Problem::error(Place::new(path, i + 1), message)).collect())
        }
    }
}

/// Where a text may be split for parallel reading.
#[derive(Clone, Copy)]
enum Cut {
    Line,
    EmptyLine,
}

/// Reads parts of `text` in parallel, split at `cut`; `parse` gets each part with the number of its first line.
fn in_parts(
    (path, text): (&Path, &str),
    cut: Cut,
    wanted: &[Wanted],
    parse: impl Fn(&str, usize, &mut RowsBuilder) + Sync,
) -> Parsed {
    const PART_BYTES: usize = 1 << 20;
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = end_of_part(rest, PART_BYTES, cut);
        parts.push(&rest[..end]);
        rest = &rest[end..];
    }
    let n_lines: Vec<usize> = parts.par_iter().map(|part| part.bytes().filter(|&b| b == b'\n').count()).collect();
    let first_lines: Vec<usize> = n_lines
        .iter()
        .scan(1, |line, n| {
            let first = *line;
            *line += n;
            Some(first)
        })
        .collect();
    let read: Vec<(Rows, Vec<Problem>)> = parts
        .par_iter()
        .zip(&first_lines)
        .map(|(part, &first_line)| {
            let mut builder = RowsBuilder::new(path, wanted);
            parse(part, first_line, &mut builder);
            (builder.rows, builder.problems)
        })
        .collect();
    let (rows, problems): (Vec<_>, Vec<_>) = read.into_iter().unzip();
    (rows, problems.into_iter().flatten().collect())
}

fn end_of_part(text: &str, wished: usize, cut: Cut) -> usize {
    let bytes = text.as_bytes();
    let mut end = wished.min(bytes.len());
    while end < bytes.len() {
        match bytes[end..].iter().position(|&b| b == b'\n') {
            None => return bytes.len(),
            Some(at) => end += at + 1,
        }
        let line_end = bytes[end..].iter().position(|&b| b == b'\n').map_or(bytes.len(), |at| end + at);
        match cut {
            Cut::Line => return end,
            Cut::EmptyLine if bytes[end..line_end].trim_ascii().is_empty() => return line_end.min(bytes.len()),
            Cut::EmptyLine => {}
        }
    }
    bytes.len()
}

/// The lines of a text with their numbers. Only `\n` ends a line; a `\r` before it is removed.
fn lines(text: &str, first_line: usize) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.strip_suffix('\n').unwrap_or(text).split('\n');
    lines.enumerate().map(move |(i, line)| (first_line + i, line.strip_suffix('\r').unwrap_or(line)))
}

/// The fields of a row whose values are text: tags are separated by white space; an empty value is absent.
fn text_fields<'a>(wanted: &[Wanted], mut value: impl FnMut(&str) -> Option<&'a str>) -> Vec<Field<'a>> {
    let field = |wanted: &Wanted| match (value(&wanted.column).map(str::trim), wanted.kind) {
        (None | Some(""), _) => Field::Absent,
        (Some(label), TaskKind::Classification) => Field::Class(label.into()),
        (Some(tags), TaskKind::Tagging(_)) => Field::Tags(tags.split_whitespace().map(Cow::Borrowed).collect()),
    };
    wanted.iter().map(field).collect()
}

/// A span as given in the data: `start..end` in units of [`Offsets`].
struct WrittenSpan<'a> {
    start: usize,
    end: usize,
    label: &'a str,
    /// The text of the span, if the data records it.
    text: Option<&'a str>,
}

/// BIO tags of `words` (ranges in the unit of the spans) for `spans`. A span that starts or ends inside a word is
/// extended to the whole word, with a warning; a span without words and spans that share a word are errors.
fn tags_of_spans(
    (words, length): (&[(usize, usize)], usize),
    mut spans: Vec<WrittenSpan>,
    (line, builder): (usize, &mut RowsBuilder),
) -> Option<Vec<String>> {
    let mut tags = vec!["O".to_owned(); words.len()];
    spans.sort_by_key(|span| (span.start, span.end));
    let (mut sound, mut seen) = (true, 0);
    for span in spans {
        let first = words.partition_point(|&(_, end)| end <= span.start);
        let last = words.partition_point(|&(start, _)| start < span.end);
        let name = format!("span {}..{} `{}`", span.start, span.end, span.label);
        let wrong = match () {
            () if span.label.is_empty() => Some("has no label".to_owned()),
            () if span.end > length => Some(format!("ends beyond the text, which ends at {length}")),
            () if span.start >= span.end || first >= last => Some("covers no word".to_owned()),
            () => None,
        };
        if let Some(wrong) = wrong {
            builder.error(line, format!("{name} {wrong}"));
            sound = false;
            continue;
        }
        if words[first].0 != span.start || words[last - 1].1 != span.end {
            let how = "it is extended to whole words; `tokenizer.split` sets how text is split";
            builder.warning(line, format!("{name} does not end at word boundaries; {how}"));
        }
        if tags[first..last].iter().any(|tag| tag != "O") {
            let why = match span.start < seen {
                true => "overlaps another span, but a word can have only one tag",
                false => "shares a word with another span; `tokenizer.split` sets how text is split",
            };
            builder.error(line, format!("{name} {why}"));
            sound = false;
            continue;
        }
        seen = span.end;
        for (i, tag) in tags[first..last].iter_mut().enumerate() {
            *tag = format!("{}-{}", if i == 0 { "B" } else { "I" }, span.label);
        }
    }
    sound.then_some(tags)
}

/// Words of a text with their character ranges.
fn words_of(splitter: Splitter, text: &str) -> (Vec<&str>, Vec<(usize, usize)>) {
    let ranges = splitter.split(text);
    (ranges.iter().map(|&(start, end)| &text[start..end]).collect(), character_ranges(text, &ranges))
}
