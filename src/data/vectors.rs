//! Pretrained word vectors: reads them and assigns them to the tokens of a vocabulary.
//!
//! A token gets the vector of its exact form or, if the file lacks that, of its lower-cased form. Words of the file
//! that do not occur in training become additional tokens, so that a trained model knows them at prediction time.
//!
//! V tokens, E dimensions.

use std::path::{Path, PathBuf};

use anyhow::Result;
use rayon::prelude::*;
use rustc_hash::FxHashMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::gzip;
use super::rows::Rows;
use super::tokenizer::Tokenizer;
use crate::problem::{InvalidInput, Place, Problem, invalid};
use crate::rng::{Purpose, Seed};

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VectorsConfig {
    /// File of vectors, relative to the data root: GloVe's text format (`word v1 v2 ...`), word2vec's text format (with
    /// a first line `count dim`), or `.npy` with shape [count, dim].
    pub file: PathBuf,
    /// For `.npy`: a file with the words, one per line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub words: Option<PathBuf>,
    /// Whether the vectors of words that occur in training are fine-tuned. Default true.
    #[serde(default = "yes")]
    pub trainable: bool,
    /// How many words from the start of the file keep their vectors although they do not occur in training. Default
    /// 400,000, all of GloVe 6B.
    #[serde(default = "default_max_words")]
    pub max_words: usize,
}

fn yes() -> bool {
    true
}

fn default_max_words() -> usize {
    400_000
}

/// The content of a file of vectors.
#[derive(Debug)]
struct Table {
    words: Vec<String>,
    dim: usize,
    /// [words, dim]
    values: Vec<f32>,
}

/// How much of the training text a file of vectors covers.
#[derive(Clone, Debug, PartialEq)]
pub struct Coverage {
    pub file: PathBuf,
    pub dim: usize,
    /// Words in the file.
    pub n_words: usize,
    /// Number of distinct training words, and how many of them the file covers.
    pub types: (usize, usize),
    /// Number of running training words, and how many of them the file covers.
    pub tokens: (u64, u64),
    /// The tokenizer is case-sensitive, but the file has no capital letters (in its first 10,000 words): a capitalised
    /// word is unknown unless it occurs so in training.
    pub case_lost: bool,
}

/// Reads the files, adds their words to `tokenizer` and sets the vectors of all its tokens.
///
/// # Errors
/// [`InvalidInput`] with the file, and the line if known, of what cannot be read.
pub fn attach(
    tokenizer: &mut Tokenizer,
    configs: &[VectorsConfig],
    root: &Path,
    train: &[&Rows],
    seed: Seed,
) -> Result<Vec<Coverage>> {
    let mut tables = Vec::new();
    for config in configs {
        let table = read(&root.join(&config.file), config.words.as_ref().map(|words| root.join(words)).as_deref())?;
        let tokens = tokenizer.whole_tokens(&table.words);
        tables.push((config, table, tokens));
    }
    let further = tables
        .iter()
        .flat_map(|(config, _, tokens)| tokens.iter().take(config.max_words).flatten().map(String::as_str));
    tokenizer.extend(further)?;
    let vocabulary = tokenizer.vocabulary();
    let counts = counts(tokenizer, train)?;
    let (mut coverages, mut vectors) = (Vec::new(), Vec::new());
    for (number, (config, table, tokens)) in tables.iter().enumerate() {
        let mut place: FxHashMap<&str, usize> = FxHashMap::default();
        for (row, token) in tokens.iter().enumerate() {
            if let Some(token) = token {
                place.entry(token).or_insert(row);
            }
        }
        let found: Vec<Option<usize>> = vocabulary
            .iter()
            .map(|token| place.get(token.as_str()).or_else(|| place.get(token.to_lowercase().as_str())).copied())
            .collect();
        vectors.push(table.of(
            &found,
            tokenizer,
            config.trainable,
            seed.generator(Purpose::Initialization, number as u64 + 1),
        ));
        let known = |id: &usize| found[*id].is_some();
        let met = counts.iter().enumerate().filter(|(_, count)| **count > 0).map(|(id, _)| id);
        coverages.push(Coverage {
            file: config.file.clone(),
            dim: table.dim,
            n_words: table.words.len(),
            case_lost: tokenizer.whole_tokens(&["Aa".to_owned()]) == [Some("Aa".to_owned())]
                && !table.words.iter().take(10_000).any(|word| word.chars().any(char::is_uppercase)),
            types: (met.clone().count(), met.clone().filter(known).count()),
            tokens: (counts.iter().sum(), met.filter(known).map(|id| counts[id]).sum()),
        });
    }
    tokenizer.set_vectors(tokenizer.n_trained(), vectors);
    Ok(coverages)
}

/// Frequency of each token in training; unknown words count as the unknown token.
fn counts(tokenizer: &Tokenizer, train: &[&Rows]) -> Result<Vec<u64>> {
    let mut counts = vec![0; tokenizer.size()];
    for rows in train {
        let pieces = tokenizer.encode_words(&rows.words)?;
        for &word in &rows.word_ids {
            pieces.of(word).iter().for_each(|&id| counts[id as usize] += 1);
        }
    }
    Ok(counts)
}

impl Table {
    /// The vectors of all tokens, [V, E], from the rows `found`. A token without a vector gets zeros or, if it is
    /// trained, normally distributed numbers with the table's root mean square as standard deviation.
    fn of(
        &self,
        found: &[Option<usize>],
        tokenizer: &Tokenizer,
        trainable: bool,
        mut generator: impl rand::Rng,
    ) -> Tensor {
        let n = self.values.len().max(1) as f64;
        let spread = (self.values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n).sqrt();
        let dim = self.dim as i64;
        let mut values = Vec::with_capacity(found.len() * self.dim);
        for (id, row) in found.iter().enumerate() {
            match row {
                Some(row) => values.extend_from_slice(&self.values[row * self.dim..(row + 1) * self.dim]),
                None if trainable
                    && id < tokenizer.n_trained()
                    && (!tokenizer.pads || id != tokenizer.padding as usize) =>
                {
                    let normal = rand_distr::Normal::new(0.0, spread as f32).expect("invariant: a spread of squares");
                    values.extend((0..self.dim).map(|_| rand_distr::Distribution::sample(&normal, &mut generator)));
                }
                None => values.resize(values.len() + self.dim, 0.0),
            }
        }
        Tensor::from_slice(&values).view([-1, dim])
    }
}

fn read(path: &Path, words: Option<&Path>) -> Result<Table> {
    let is_npy = path.extension().is_some_and(|extension| extension == "npy");
    match (is_npy, words) {
        (true, Some(words)) => read_npy(path, words),
        (true, None) => {
            Err(invalid(format!("{}: a .npy file needs `words:`, a file with one word per line", path.display())))
        }
        (false, _) => read_text(path, &load(path)?),
    }
}

fn load(path: &Path) -> Result<Vec<u8>> {
    gzip::read(path).map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::NotFound => "; scripts/get_vectors downloads GloVe",
            _ => "",
        };
        invalid(format!("model.embedding.vectors: {}: {error}{hint}", path.display()))
    })
}

fn read_npy(path: &Path, words: &Path) -> Result<Table> {
    let wrong = |message: String| invalid(format!("{}: {message}", path.display()));
    let content = load(path)?;
    let file = npyz::NpyFile::new(&content[..]).map_err(|error| wrong(format!("not a .npy file ({error})")))?;
    let &[count, dim] = file.shape() else {
        return Err(wrong(format!("expected [count, dim], found {:?}", file.shape())));
    };
    if dim == 0 || file.order() == npyz::Order::Fortran {
        return Err(wrong("expected row-major order (NumPy's C order) and at least one value per row".to_owned()));
    }
    let list = load(words)?;
    let list = std::str::from_utf8(&list).map_err(|_| invalid(format!("{}: invalid UTF-8", words.display())))?;
    let list: Vec<String> = list.trim_start_matches('\u{feff}').lines().map(|line| line.trim().to_owned()).collect();
    if list.len() as u64 != count {
        return Err(wrong(format!("{count} vectors, but {} words in {}", list.len(), words.display())));
    }
    let kind = file.dtype().descr();
    let values = floats(file).ok_or_else(|| wrong(format!("its values are {kind}, not floating-point")))?;
    let values: Vec<f32> = values.map_err(|error| wrong(format!("damaged: {error}; download it again")))?;
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        let row = at / dim as usize;
        return Err(wrong(format!("vector {} (`{}`) has a value that is not finite", row + 1, list[row])));
    }
    Ok(Table { words: list, dim: dim as usize, values })
}

/// The values of a file of 16-, 32- or 64-bit floats; `None` for other types.
fn floats(file: npyz::NpyFile<&[u8]>) -> Option<std::io::Result<Vec<f32>>> {
    let file = match file.try_data::<f32>() {
        Ok(values) => return Some(values.collect()),
        Err(file) => file,
    };
    let file = match file.try_data::<f64>() {
        Ok(values) => return Some(values.map(|value| value.map(|value| value as f32)).collect()),
        Err(file) => file,
    };
    let values = file.try_data::<half::f16>().ok()?;
    Some(values.map(|value| value.map(half::f16::to_f32)).collect())
}

fn read_text(path: &Path, content: &[u8]) -> Result<Table> {
    let content = content.strip_prefix("\u{feff}".as_bytes()).unwrap_or(content);
    let mut lines: Vec<(usize, &[u8])> =
        content.split(|&byte| byte == b'\n').enumerate().map(|(i, line)| (i + 1, line.trim_ascii_end())).collect();
    lines.retain(|(_, line)| !line.is_empty());
    let error = |line: usize, message: &str| InvalidInput(vec![Problem::error(Place::new(path, line), message)]);
    let Some((_, first)) = lines.first() else { return Err(error(0, "no vectors").into()) };
    let fields: Vec<&[u8]> = first.split(|&byte| byte == b' ').collect();
    let number = |field: &&[u8]| std::str::from_utf8(field).ok()?.parse::<usize>().ok();
    let dim = match fields.iter().map(number).collect::<Option<Vec<usize>>>().as_deref() {
        Some(&[count, dim]) => {
            lines.remove(0);
            if count != lines.len() {
                let message = format!(
                    "declares {count} vectors, but the file has {}: download it again, or correct this line",
                    lines.len()
                );
                return Err(error(1, &message).into());
            }
            dim
        }
        _ => fields.len() - 1,
    };
    if dim == 0 {
        return Err(error(1, "expected `word v1 v2 ...`, or `count dim` on the first line").into());
    }
    let parse = |(number, line): &(usize, &[u8])| {
        // From the right: in some files, words contain spaces.
        let mut fields = line.rsplitn(dim + 1, |&byte| byte == b' ');
        let mut values: Vec<f32> = Vec::with_capacity(dim);
        for field in fields.by_ref().take(dim) {
            let value = std::str::from_utf8(field).ok().and_then(|text| text.parse().ok());
            let value = value.filter(|value: &f32| value.is_finite());
            values.push(value.ok_or_else(|| error(*number, &format!("expected a word and {dim} numbers")))?);
        }
        values.reverse();
        let word = fields.next().ok_or_else(|| error(*number, &format!("expected a word and {dim} numbers")))?;
        Ok((String::from_utf8_lossy(word).into_owned(), values))
    };
    let rows: Vec<Result<(String, Vec<f32>), InvalidInput>> = lines.par_iter().map(parse).collect();
    let mut table = Table { words: Vec::with_capacity(rows.len()), dim, values: Vec::with_capacity(rows.len() * dim) };
    let (mut problems, mut wide) = (Vec::new(), Vec::new());
    for row in rows {
        match row {
            Ok((word, values)) => {
                table.words.push(word);
                table.values.extend(values);
            }
            Err(InvalidInput(more)) => problems.extend(more),
        }
    }
    // A word may contain spaces followed by numbers; it is an error if most words do, or one has too many numbers.
    let spare = |word: &String| word.split(' ').skip(1).filter(|field| field.parse::<f32>().is_ok()).count();
    let odd: Vec<(usize, usize)> = table.words.iter().map(spare).enumerate().filter(|&(_, n)| n > 0).collect();
    let most = 2 * odd.len() > table.words.len();
    for (row, n) in odd.into_iter().filter(|&(_, n)| problems.is_empty() && (most || n > 1 && 2 * n >= dim)) {
        let message = format!("expected a word and {dim} numbers, as in the first line, found {}", dim + n);
        wide.extend(error(lines[row].0, &message).0);
    }
    problems.extend(wide);
    if problems.is_empty() { Ok(table) } else { Err(InvalidInput(problems).into()) }
}

#[cfg(test)]
mod tests {
    use super::super::rows::RowsBuilder;
    use tch::Kind;

    use super::super::tokenizer::{TokenizerConfig, WordConfig};
    use super::*;

    fn text(content: &str) -> Result<Table> {
        read_text(Path::new("v.txt"), content.as_bytes())
    }

    #[test]
    fn both_text_formats_are_read_and_broken_lines_named() {
        let glove = text("the 1 2\nnew york 3 4.5\n").unwrap();
        let word2vec = text("2 2\nthe 1 2\nnew york 3 4.5").unwrap();
        for table in [glove, word2vec] {
            assert_eq!((table.words, table.dim), (vec!["the".to_owned(), "new york".to_owned()], 2));
            assert_eq!(table.values, [1.0, 2.0, 3.0, 4.5]);
        }
        let error = text("3 2\nthe 1 2\nof 3 4.5").unwrap_err().to_string();
        assert!(
            error.ends_with("v.txt:1: declares 3 vectors, but the file has 2: download it again, or correct this line"),
            "{error}"
        );
        let error = text("the 1 2\na 1 x\nb 1 2\nc nan 1\nd 2\n").unwrap_err().to_string();
        assert_eq!(error.lines().count(), 3, "{error}");
        assert!(error.contains("v.txt:2: expected a word and 2 numbers") && error.contains("v.txt:5"), "{error}");
        let error = text("the 1\na 1 2\nb 1 2\n").unwrap_err().to_string();
        assert!(error.contains("v.txt:2: expected a word and 1 numbers, as in the first line, found 2"), "{error}");
        let error = text("the 1 2 3 4\na 1 2 3 4b 1 2 3 4\nof 1 2 3 4\nin 2049 1 2 3 4\n").unwrap_err().to_string();
        assert!(error.ends_with("v.txt:2: expected a word and 4 numbers, as in the first line, found 7"), "{error}");
        assert_eq!(text("the 1 2\nblade runner 2049 1 2\nof 1 2\n").unwrap().words[1], "blade runner 2049");
        assert_eq!(text("\u{feff}the 1 2\n").unwrap().words, ["the"]);
    }

    #[test]
    fn npy_files_take_their_words_from_a_list() {
        let folder = tempfile::tempdir().unwrap();
        let (npy, words) = (folder.path().join("v.npy"), folder.path().join("words.txt"));
        Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0]).view([2, 2]).write_npy(&npy).unwrap();
        std::fs::write(&words, "a\nb\n").unwrap();
        assert_eq!(read(&npy, Some(&words)).unwrap().values, [1.0, 2.0, 3.0, 4.0]);
        for kind in [Kind::Double, Kind::Half] {
            Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0]).to_kind(kind).view([2, 2]).write_npy(&npy).unwrap();
            assert_eq!(read(&npy, Some(&words)).unwrap().values, [1.0, 2.0, 3.0, 4.0]);
        }
        std::fs::write(&words, "a\n").unwrap();
        assert!(read(&npy, Some(&words)).unwrap_err().to_string().contains("2 vectors, but 1 words"));
        Tensor::from_slice(&[1.0f32, 2.0, f32::NAN, 4.0]).view([2, 2]).write_npy(&npy).unwrap();
        std::fs::write(&words, "a\nb\n").unwrap();
        let content = std::fs::read(&npy).unwrap();
        std::fs::write(&npy, &content[..content.len() - 4]).unwrap();
        let error = read(&npy, Some(&words)).unwrap_err().to_string();
        assert!(error.contains("damaged"), "{error}");
        std::fs::write(&npy, content).unwrap();
        let error = read(&npy, Some(&words)).unwrap_err().to_string();
        assert!(error.contains("vector 2 (`b`) has a value that is not finite"), "{error}");
        assert!(read(&npy, None).unwrap_err().to_string().contains("needs `words:`"));
    }

    #[test]
    fn tokens_get_their_vectors_and_new_words_become_tokens() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("v.txt"), "play 1 1\nsong 2 2\njazz 3 3\nblues 4 4\n").unwrap();
        let mut builder = RowsBuilder::new(Path::new("f"), &[]);
        builder.push(1, &["Play", "the", "song", "Play"], &[]);
        let config = TokenizerConfig::Word(WordConfig::default());
        let mut tokenizer = Tokenizer::build(&config, Path::new(""), &[&builder.rows], None).unwrap();
        let vectors = VectorsConfig { file: "v.txt".into(), words: None, trainable: true, max_words: 3 };
        let coverage = attach(&mut tokenizer, &[vectors], folder.path(), &[&builder.rows], Seed(1)).unwrap();
        assert_eq!((coverage[0].types, coverage[0].tokens, coverage[0].n_words), ((3, 2), (4, 3), 4));
        assert!(coverage[0].case_lost);
        // [PAD] [UNK] Play song the, then those of the first three words of the file that do not occur in training.
        assert_eq!(tokenizer.vocabulary()[..2], ["[PAD]", "[UNK]"]);
        assert_eq!(
            (tokenizer.n_trained(), tokenizer.vocabulary()[5..].to_vec()),
            (5, vec!["play".into(), "jazz".into()])
        );
        let vector = |word: &str| {
            let id = tokenizer.vocabulary().iter().position(|token| token == word).unwrap();
            Vec::<f32>::try_from(tokenizer.vectors()[0].get(id as i64)).unwrap()
        };
        assert_eq!((vector("Play"), vector("jazz"), vector("[PAD]")), (vec![1.0; 2], vec![3.0; 2], vec![0.0; 2]));
        assert!(vector("the").iter().all(|&v| v != 0.0), "a trained word without a vector starts at chance");
    }
}
