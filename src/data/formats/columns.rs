//! Rows with one value per column: CSV, TSV and plain lines.

use std::path::Path;

use super::{Cut, Format, Layout, Parsed, in_parts, lines, text_fields, words_of};
use crate::data::rows::{Field, RowsBuilder, Wanted};
use crate::problem::{Place, Problem, counted};

/// The index of each needed column: the text or the tokens first, then the wanted ones.
fn positions(names: &[&str], layout: &Layout, wanted: &[Wanted]) -> Result<Vec<usize>, String> {
    let main = layout.text.as_deref().or(layout.tokens.as_deref()).unwrap_or("text");
    let needed = std::iter::once(main).chain(wanted.iter().map(|wanted| wanted.column.as_str()));
    needed
        .map(|name| {
            let found = names.iter().position(|known| *known == name);
            if names.iter().filter(|known| **known == name).count() > 1 {
                return Err(format!("several columns are named `{name}`"));
            }
            found.ok_or_else(|| match names {
                [] => "the file is empty, but its first line must name the columns".to_owned(),
                [one] if one.contains([';', ',', '\t', '|']) => {
                    format!(
                        "no column `{name}`; the only column is `{one}`: set `separator:` to what separates the columns"
                    )
                }
                _ => format!(
                    "no column `{name}`; the columns are {} (use `columns:` if the first line does not name them)",
                    names.join(", ")
                ),
            })
        })
        .collect()
}

fn add_row(line: usize, values: &[&str], positions: &[usize], layout: &Layout, builder: &mut RowsBuilder) {
    let mut wanted = positions[1..].iter().map(|&position| values[position]);
    let fields: Vec<Field> = text_fields(builder.wanted, |_| wanted.next());
    let words = match layout.tokens {
        Some(_) => values[positions[0]].split_whitespace().collect(),
        None => words_of(layout.splitter, values[positions[0]]).0,
    };
    builder.push(line, &words, &fields);
}

pub fn read_csv(path: &Path, text: &str, layout: &Layout, wanted: &[Wanted]) -> Parsed {
    let default = if layout.format == Format::Tsv { b'\t' } else { b',' };
    let delimiter = layout.separator.as_ref().and_then(|separator| separator.bytes().next()).unwrap_or(default);
    let has_header = layout.columns.is_empty();
    let open = Some(text).filter(|_| layout.quotes).and_then(|text| open_quote(text, delimiter));
    let unclosed = open.map(|(_, quote)| {
        let place = Place::new(path, 1 + text[..quote].matches('\n').count());
        let message = "a `\"` is never closed; the rest is not read (`quotes: false` makes it an ordinary character)";
        Problem::error(place, message)
    });
    let text = open.map_or(text, |(record, _)| &text[..record]);
    if let (Some(unclosed), true) = (&unclosed, text.is_empty()) {
        return (Vec::new(), vec![unclosed.clone()]);
    }
    let mut reader = csv::ReaderBuilder::new();
    let reader = reader.delimiter(delimiter).quoting(layout.quotes).flexible(true).has_headers(has_header);
    let mut reader = reader.from_reader(text.as_bytes());
    let mut builder = RowsBuilder::new(path, wanted);
    let header: Vec<String> = match reader.headers() {
        Ok(header) if has_header => header.iter().map(|name| name.trim().to_owned()).collect(),
        Ok(_) => layout.columns.clone(),
        Err(error) => return (Vec::new(), vec![Problem::error(Place::new(path, 1), error.to_string())]),
    };
    let names: Vec<&str> = header.iter().map(String::as_str).collect();
    let positions = match positions(&names, layout, wanted) {
        Ok(positions) => positions,
        Err(message) => return (Vec::new(), vec![Problem::error(Place::new(path, 1), message)]),
    };
    let (mut seen, mut line) = (0, 1);
    // Line of the first row that spans several lines, and the number of such rows.
    let mut long_rows: Option<(usize, usize)> = None;
    for record in reader.records() {
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                builder.error(0, error.to_string());
                continue;
            }
        };
        // The reader itself undercounts lines that end in `\r\n`.
        let start = record.position().map_or(seen, |position| position.byte() as usize);
        let start = start + text[start..].bytes().take_while(|byte| b"\r\n".contains(byte)).count();
        line += text.as_bytes()[seen..start].iter().filter(|&&byte| byte == b'\n').count();
        seen = start;
        let values: Vec<&str> = record.iter().collect();
        if !has_header && start == 0 && values.iter().map(|value| value.trim()).eq(names.iter().copied()) {
            builder.error(line, "this line already names the columns: remove `columns:`");
            continue;
        }
        let n_lines = 1 + values.iter().map(|value| value.matches('\n').count()).sum::<usize>();
        if n_lines > 1 && layout.format == Format::Tsv {
            let message =
                format!("a value in `\"` has {n_lines} lines; `quotes: false` makes `\"` an ordinary character");
            builder.error(line, message);
        } else if values.len() == names.len() {
            if n_lines > 1 {
                long_rows.get_or_insert((line, 0)).1 += 1;
            }
            add_row(line, &values, &positions, layout, &mut builder);
        } else {
            // A misplaced quote may have merged several values or lines into one.
            let held = values.iter().any(|value| value.contains([char::from(delimiter), '\n']));
            let hint = if held { "; a value in `\"` contains several" } else { "" };
            let what = if has_header { "the header has" } else { "`columns:` names" };
            let found = counted(values.len(), "value");
            builder.error(line, format!("{found}, but {what} {}{hint}", names.len()));
        }
    }
    builder.problems.extend(unclosed);
    if let Some((first, n)) = long_rows {
        let found = counted(n, "row");
        builder.warning(first, format!("{found} with line breaks between `\"`; this is the first"));
    }
    (vec![builder.rows], builder.problems)
}

/// Position of an unclosed quote, preceded by that of its record. As in the csv crate, a quote opens only at the start
/// of a value, and two quotes inside it stand for one.
fn open_quote(text: &str, delimiter: u8) -> Option<(usize, usize)> {
    enum At {
        Start,
        Value,
        Quoted(usize),
        QuoteIn(usize),
    }
    let (mut record, mut state) = (0, At::Start);
    for (at, &byte) in text.as_bytes().iter().enumerate() {
        state = match (state, byte) {
            (At::Quoted(quote), b'"') => At::QuoteIn(quote),
            (At::Quoted(quote), _) | (At::QuoteIn(quote), b'"') => At::Quoted(quote),
            (At::Start, b'"') => At::Quoted(at),
            (_, b'\n' | b'\r') => {
                record = at + 1;
                At::Start
            }
            (_, byte) if byte == delimiter => At::Start,
            _ => At::Value,
        };
    }
    if let At::Quoted(quote) = state { Some((record, quote)) } else { None }
}

pub fn read_lines(path: &Path, text: &str, layout: &Layout, wanted: &[Wanted]) -> Parsed {
    let names: Vec<&str> = layout.columns.iter().map(String::as_str).collect();
    let positions = match positions(&names, layout, wanted) {
        Ok(positions) => positions,
        Err(message) => return (Vec::new(), vec![Problem::error(Place::new(path, 0), message)]),
    };
    let separator = layout.separator.as_deref().unwrap_or(" ");
    in_parts((path, text), Cut::Line, wanted, |part, first_line, builder| {
        for (number, line) in lines(part, first_line) {
            if line.trim().is_empty() {
                continue;
            }
            let values: Vec<&str> = line.splitn(names.len(), separator).collect();
            if values.len() == names.len() {
                add_row(number, &values, &positions, layout, builder);
            } else {
                let found = counted(values.len(), "value");
                builder.error(number, format!("{found}, but `columns:` names {}", names.len()));
            }
        }
    })
}
