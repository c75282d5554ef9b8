//! A cache of large data files, stored next to them, that loads faster than their text.
//!
//! The cache of FILE is `.polytask/FILE-KEY.rows` in its folder, where KEY is a hash of how the file is read. It
//! contains hashes of the file's content and of its own, so that a changed file or a damaged cache is detected and the
//! file is read again. Small files are not cached.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::formats::{self, Layout, Parsed};
use super::rows::{Column, Rows, Strings, Wanted};
use crate::problem::{Place, Problem, Severity};
use crate::run::atomic;

/// Smaller files (in bytes) are not cached.
const SMALLEST: u64 = 16 << 20;

/// To be increased when older caches would be misread.
const FORMAT: &str = "6";

/// Like [`formats::read`], but from the cache if it is valid.
pub fn read(path: &Path, layout: &Layout, wanted: &[Wanted]) -> Parsed {
    let file = formats::file_of(path, layout.format);
    let large = std::fs::metadata(&file).is_ok_and(|data| data.is_file() && data.len() >= SMALLEST);
    if !large {
        return formats::read(path, layout, wanted);
    }
    read_at(&place(path, &file, layout, wanted), path, &file, layout, wanted)
}

fn read_at(cache: &Path, path: &Path, file: &Path, layout: &Layout, wanted: &[Wanted]) -> Parsed {
    let Ok(source) = std::fs::read(file).map(|content| blake3::hash(&content).to_string()) else {
        return formats::read(path, layout, wanted);
    };
    match load(cache, file, &source) {
        Ok(parsed) => return parsed,
        Err(error) => log::debug!("{}: cache not used ({error:#})", file.display()),
    }
    let (parts, problems) = formats::read(path, layout, wanted);
    let mut rows = Rows::new(wanted.len());
    rows.append_file(file, parts);
    // If the folder is not writable, every run reads the text.
    if let Err(error) = save(cache, &rows, &problems, &source).and_then(|()| forget_oldest(cache)) {
        log::debug!("{error:#}");
    }
    (vec![rows], problems)
}

fn place(path: &Path, file: &Path, layout: &Layout, wanted: &[Wanted]) -> PathBuf {
    let how = format!("{FORMAT} {} {path:?} {layout:?} {wanted:?}", env!("CARGO_PKG_VERSION"));
    let key = &blake3::hash(how.as_bytes()).to_hex()[..12];
    let folder = file.parent().unwrap_or(Path::new(".")).join(".polytask");
    folder.join(format!("{}-{key}.rows", file.file_name().unwrap_or_default().to_string_lossy()))
}

/// Maximum number of caches per file, one for each way of reading it.
const KEPT: usize = 16;

/// Removes the oldest caches of the same file, beyond [`KEPT`].
fn forget_oldest(cache: &Path) -> Result<()> {
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Without the key.
    let own = name(cache);
    let file = own.rsplit_once('-').map_or(own.as_str(), |(file, _)| file);
    let mut known = Vec::new();
    for entry in std::fs::read_dir(cache.parent().context("a cache without a folder")?)? {
        let entry = entry?;
        if name(&entry.path()).rsplit_once('-').is_some_and(|(other, key)| other == file && key.ends_with(".rows")) {
            known.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    known.sort();
    known.iter().rev().skip(KEPT).try_for_each(|(_, path)| Ok(std::fs::remove_file(path)?))
}

fn bytes(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The strings concatenated, and the end of each.
fn texts(strings: &Strings) -> (Vec<u8>, Vec<u8>) {
    let (mut all, mut ends) = (Vec::new(), Vec::new());
    for text in strings.iter() {
        all.extend_from_slice(text.as_bytes());
        ends.push(all.len() as u32);
    }
    (all, bytes(&ends))
}

fn save(cache: &Path, rows: &Rows, problems: &[Problem], source: &str) -> Result<()> {
    let mut arrays: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |name: &str, strings: &Strings, values: Vec<u8>| {
        let (all, ends) = texts(strings);
        arrays.extend([(format!("{name}.texts"), all), (format!("{name}.ends"), ends), (name.to_owned(), values)]);
    };
    add("words", &rows.words, bytes(&rows.word_ids));
    for (i, column) in rows.columns.iter().enumerate() {
        add(&format!("column{i}"), &column.strings, bytes(&column.values));
    }
    let offsets: Vec<u32> = rows.offsets.iter().map(|&offset| u32::try_from(offset)).collect::<Result<_, _>>()?;
    arrays.extend([("offsets".to_owned(), bytes(&offsets)), ("lines".to_owned(), bytes(rows.lines()))]);
    arrays.sort();
    let problems: Vec<_> = problems
        .iter()
        .map(|p| (p.severity == Severity::Error, p.place.as_ref().map(|place| place.line), &p.message))
        .collect();
    let problems = serde_json::to_string(&problems)?;
    let metadata = HashMap::from([
        ("source".to_owned(), source.to_owned()),
        ("content".to_owned(), digest(&arrays, &problems)),
        ("problems".to_owned(), problems),
    ]);
    let views = arrays.iter().map(|(name, data)| Ok((name, TensorView::new(Dtype::U8, vec![data.len()], data)?)));
    let content = safetensors::serialize(views.collect::<Result<Vec<_>>>()?, Some(metadata))?;
    std::fs::create_dir_all(cache.parent().context("a cache without a folder")?)?;
    atomic::write(cache, &content)
}

fn digest(arrays: &[(String, Vec<u8>)], problems: &str) -> String {
    let mut hasher = blake3::Hasher::new();
    for (name, data) in arrays {
        hasher.update(name.as_bytes()).update(&(data.len() as u64).to_le_bytes()).update(data);
    }
    hasher.update(problems.as_bytes()).finalize().to_string()
}

/// # Errors
/// The cache is missing, damaged, or of a different content of the file.
fn load(cache: &Path, file: &Path, source: &str) -> Result<Parsed> {
    let content = std::fs::read(cache)?;
    let (_, header) = SafeTensors::read_metadata(&content)?;
    let metadata = header.metadata().as_ref().context("no metadata")?;
    let of = |name: &str| metadata.get(name).with_context(|| format!("no `{name}`"));
    ensure!(of("source")? == source, "the file has changed");
    let mut arrays: Vec<(String, Vec<u8>)> =
        SafeTensors::deserialize(&content)?.tensors().into_iter().map(|(name, v)| (name, v.data().to_vec())).collect();
    arrays.sort();
    let problems = of("problems")?;
    ensure!(*of("content")? == digest(&arrays, problems), "the cache is damaged");
    let arrays: HashMap<String, Vec<u8>> = arrays.into_iter().collect();
    let array = |name: &str| arrays.get(name).with_context(|| format!("no `{name}`"));
    let numbers = |name: &str| -> Result<Vec<u32>> {
        let data = array(name)?.chunks_exact(4);
        Ok(data.map(|four| u32::from_le_bytes(four.try_into().expect("invariant: chunks of four"))).collect())
    };
    let strings = |name: &str| -> Result<Strings> {
        let (all, mut strings, mut start) =
            (std::str::from_utf8(array(&format!("{name}.texts"))?)?, Strings::default(), 0);
        for end in numbers(&format!("{name}.ends"))? {
            strings.add(all.get(start..end as usize).context("texts do not fit")?);
            start = end as usize;
        }
        Ok(strings)
    };
    let n_columns = (0..).take_while(|i| arrays.contains_key(&format!("column{i}"))).count();
    let column = |i: usize| -> Result<Column> {
        let name = format!("column{i}");
        Ok(Column { strings: strings(&name)?, values: numbers(&name)? })
    };
    let rows = Rows::of_file(
        file,
        (strings("words")?, numbers("words")?),
        numbers("offsets")?.into_iter().map(|offset| offset as usize).collect(),
        numbers("lines")?,
        (0..n_columns).map(column).collect::<Result<_>>()?,
    );
    let problems: Vec<(bool, Option<usize>, String)> = serde_json::from_str(problems)?;
    let problem = |(error, line, message): (bool, Option<usize>, String)| Problem {
        severity: if error { Severity::Error } else { Severity::Warning },
        place: line.map(|line| Place::new(file, line)),
        message,
    };
    Ok((vec![rows], problems.into_iter().map(problem).collect()))
}

#[cfg(test)]
mod tests {
    use super::super::formats::{Format, Offsets};
    use super::super::words::Splitter;
    use super::*;
    use crate::task::TaskKind;

    #[test]
    fn caches_give_the_same_rows_and_are_not_trusted_when_stale_or_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let (file, cache) = (folder.path().join("d.jsonl"), folder.path().join(".polytask/d.rows"));
        let row = |i: usize| format!("{{\"text\": \"play song {i}\", \"label\": \"l{}\"}}\n", i % 3);
        let write =
            |n: usize| std::fs::write(&file, (0..n).map(row).collect::<String>() + "{\"text\": \"\"}\nbroken\n");
        write(50).unwrap();
        let layout = Layout {
            format: Format::Jsonl,
            text: None,
            tokens: None,
            columns: vec![],
            separator: None,
            quotes: true,
            offsets: Offsets::Characters,
            splitter: Splitter::Whitespace,
            encoding: encoding_rs::UTF_8,
        };
        let wanted = [Wanted { column: "label".into(), kind: TaskKind::Classification }];
        let text = |(parts, problems): Parsed| {
            let mut rows = Rows::new(1);
            rows.append_file(&file, parts);
            let row = |r: usize| {
                let label = rows.columns[0].values[r];
                let label = if label == super::super::rows::ABSENT { "-" } else { rows.columns[0].strings.get(label) };
                format!("{} {} {}", rows.place(r), rows.text_of(r), label)
            };
            ((0..rows.len()).map(row).collect::<Vec<_>>(), problems)
        };
        let cached = || text(read_at(&cache, &file, &file, &layout, &wanted));
        let plain = || text(formats::read(&file, &layout, &wanted));
        assert_eq!(plain().1.len(), 2);
        assert_eq!(cached(), plain(), "the first time");
        let source = blake3::hash(&std::fs::read(&file).unwrap()).to_string();
        assert_eq!(text(load(&cache, &file, &source).unwrap()), plain(), "from the cache");
        write(60).unwrap();
        assert_eq!(cached().0.len(), 60);
        assert_eq!(cached(), plain(), "a changed file");
        let good = std::fs::read(&cache).unwrap();
        let source = blake3::hash(&std::fs::read(&file).unwrap()).to_string();
        for at in (0..good.len()).step_by(good.len() / 40) {
            let mut damaged = good.clone();
            damaged[at] ^= 1;
            std::fs::write(&cache, &damaged).unwrap();
            assert!(load(&cache, &file, &source).is_err(), "a flipped bit at {at} of {}", good.len());
            std::fs::write(&cache, &damaged).unwrap();
            assert_eq!(cached(), plain());
        }
        std::fs::write(&cache, &good[..good.len() / 2]).unwrap();
        assert_eq!(cached(), plain(), "half a cache");
    }
}
