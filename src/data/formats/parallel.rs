//! A folder with one file per column and one line per sentence, as SNIPS is published: `seq.in`, `seq.out`, `label`.

use std::path::Path;

use super::{Layout, Parsed, lines, text_fields, text_of};
use crate::data::rows::{RowsBuilder, Wanted};
use crate::problem::{Place, Problem, counted};

pub fn read(folder: &Path, layout: &Layout, wanted: &[Wanted]) -> Parsed {
    let main = layout.text.as_ref().or(layout.tokens.as_ref()).map_or("seq.in", String::as_str);
    let names = std::iter::once(main).chain(wanted.iter().map(|wanted| wanted.column.as_str()));
    let mut texts = Vec::new();
    let mut problems = Vec::new();
    for name in names {
        match text_of(&folder.join(name), layout) {
            Ok(text) => texts.push(text),
            Err(found) => problems.extend(found),
        }
    }
    if !problems.is_empty() {
        return (Vec::new(), problems);
    }
    let columns: Vec<Vec<(usize, &str)>> = texts.iter().map(|text| lines(text, 1).collect()).collect();
    for (column, wanted) in columns[1..].iter().zip(wanted) {
        if column.len() != columns[0].len() {
            let place = Place::new(&folder.join(&wanted.column), column.len().min(columns[0].len()) + 1);
            let message = format!("{}, but `{main}` has {}", counted(column.len(), "line"), columns[0].len());
            problems.push(Problem::error(place, message));
        }
    }
    if !problems.is_empty() {
        return (Vec::new(), problems);
    }
    let path = folder.join(main);
    let mut builder = RowsBuilder::new(&path, wanted);
    for (row, &(line, text)) in columns[0].iter().enumerate() {
        let mut values = columns[1..].iter().map(|column| column[row].1);
        let fields = text_fields(wanted, |_| values.next());
        let words: Vec<&str> = match layout.text {
            Some(_) => super::words_of(layout.splitter, text).0,
            None => text.split_ascii_whitespace().collect(),
        };
        builder.push(line, &words, &fields);
    }
    (vec![builder.rows], builder.problems)
}
