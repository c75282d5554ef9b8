//! From words to token ids with Hugging Face's `tokenizers`: learned from the training text, or any `tokenizer.json`.
//!
//! With every model, each word is encoded on its own: in Python, `encode(words, is_pretokenized=True)` with the saved
//! `tokenizer.json` gives the same ids.

mod learn;

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;
use tokenizers::Tokenizer as Engine;

use learn::{PieceKind, learn_pieces, learn_words};

use super::rows::{Rows, Strings};
use super::words::Splitter;

pub const PADDING: &str = "[PAD]";
pub const UNKNOWN: &str = "[UNK]";

/// The `tokenizer:` of an experiment; `model:` names the variant.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TokenizerConfig {
    /// Every word is a token.
    Word(WordConfig),
    /// Byte-pair encoding, learned within words (Sennrich 2016).
    Bpe(PieceConfig),
    /// WordPiece, learned within words; continuations start with `##`.
    Wordpiece(PieceConfig),
    /// The unigram language model (Kudo 2018), learned within words.
    Unigram(PieceConfig),
    /// An existing `tokenizer.json`.
    File(FileConfig),
}

impl Default for TokenizerConfig {
    fn default() -> Self {
        TokenizerConfig::Word(WordConfig::default())
    }
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct WordConfig {
    /// How raw text is split into words: `whitespace`, `punctuation`, `character`. Words that the data gives are not
    /// split further, but may consist of several tokens. Default `whitespace`.
    pub split: Splitter,
    /// Convert words to lower case. Default false.
    pub lowercase: bool,
    /// Replace every digit by 0. Default false.
    pub fold_digits: bool,
    /// Words that occur less often in training are unknown. Default 1.
    #[schemars(range(min = 1))]
    pub min_count: u64,
    /// Largest number of words to take from the training text, the most frequent first; words from `vectors` and
    /// `init_from` are added to these. Default: no limit.
    #[schemars(range(min = 1))]
    pub max_size: Option<usize>,
    /// Probability that a word seen once in training is read as unknown, so that the unknown word's embedding is
    /// trained (Lample 2016 use 0.5). Default 0.5.
    #[schemars(range(min = 0, max = 1))]
    pub unknown_rate: f64,
}

impl Default for WordConfig {
    fn default() -> Self {
        WordConfig {
            split: Splitter::default(),
            lowercase: false,
            fold_digits: false,
            min_count: 1,
            max_size: None,
            unknown_rate: 0.5,
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PieceConfig {
    /// How raw text is split into words: `whitespace`, `punctuation`, `character`. Words that the data gives are not
    /// split further, but may consist of several tokens. Default `whitespace`.
    pub split: Splitter,
    /// Convert words to lower case. Default false.
    pub lowercase: bool,
    /// Replace every digit by 0. Default false.
    pub fold_digits: bool,
    /// Vocabulary size, special tokens included. Default 8000.
    #[schemars(range(min = 100, max = 10_000_000))]
    pub size: usize,
}

impl Default for PieceConfig {
    fn default() -> Self {
        PieceConfig { split: Splitter::default(), lowercase: false, fold_digits: false, size: 8000 }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileConfig {
    /// Path of the `tokenizer.json`, relative to the data root.
    pub path: PathBuf,
    /// How raw text is split into words before tokenization. Default `whitespace`.
    #[serde(default)]
    pub split: Splitter,
}

impl TokenizerConfig {
    pub fn splitter(&self) -> Splitter {
        match self {
            TokenizerConfig::Word(config) => config.split,
            TokenizerConfig::Bpe(config) | TokenizerConfig::Wordpiece(config) | TokenizerConfig::Unigram(config) => {
                config.split
            }
            TokenizerConfig::File(config) => config.split,
        }
    }

    /// Probability that a word seen once in training is read as unknown.
    pub fn unknown_rate(&self) -> f64 {
        match self {
            TokenizerConfig::Word(config) => config.unknown_rate,
            _ => 0.0,
        }
    }
}

/// A tokenizer ready to encode.
pub struct Tokenizer {
    engine: Engine,
    pub splitter: Splitter,
    pub padding: u32,
    /// Whether `padding` is a dedicated padding token.
    pub pads: bool,
    pub unknown: u32,
    max_bytes: Option<usize>,
    n_trained: usize,
    vectors: Vec<Tensor>,
}

/// The token ids of a list of distinct words: word `w` has `ids[offsets[w]..offsets[w + 1]]`.
pub struct Pieces {
    pub ids: Vec<u32>,
    pub offsets: Vec<usize>,
}

impl Pieces {
    pub fn of(&self, word: u32) -> &[u32] {
        &self.ids[self.offsets[word as usize]..self.offsets[word as usize + 1]]
    }
}

impl Tokenizer {
    /// Learns a tokenizer from the training rows of all sets, or loads the one that the configuration names. If
    /// `max_bytes` is given, splits that it encodes keep up to that many bytes of each word.
    pub fn build(
        config: &TokenizerConfig,
        root: &Path,
        train: &[&Rows],
        max_bytes: Option<usize>,
    ) -> Result<Tokenizer> {
        let (engine, splitter) = match config {
            TokenizerConfig::Word(word) => (learn_words(word, train)?, word.split),
            TokenizerConfig::Bpe(piece) => (learn_pieces(piece, PieceKind::Bpe, train)?, piece.split),
            TokenizerConfig::Wordpiece(piece) => (learn_pieces(piece, PieceKind::Wordpiece, train)?, piece.split),
            TokenizerConfig::Unigram(piece) => (learn_pieces(piece, PieceKind::Unigram, train)?, piece.split),
            TokenizerConfig::File(file) => {
                let path = root.join(&file.path);
                let bytes = std::fs::read(&path)
                    .map_err(|error| crate::problem::invalid(format!("{}: {error}", path.display())))?;
                return Self::from_json(&bytes, file.split, max_bytes)
                    .map_err(|error| crate::problem::invalid(format!("{}: {error:#}", path.display())));
            }
        };
        Self::new(engine, splitter, max_bytes)
    }

    /// A tokenizer from the text of a `tokenizer.json`.
    pub fn from_json(bytes: &[u8], splitter: Splitter, max_bytes: Option<usize>) -> Result<Tokenizer> {
        Self::new(engine_from(bytes)?, splitter, max_bytes)
    }

    fn new(engine: Engine, splitter: Splitter, max_bytes: Option<usize>) -> Result<Tokenizer> {
        let find = |names: &[&str]| names.iter().find_map(|name| engine.token_to_id(name));
        let unknown = find(&[UNKNOWN, "<unk>", "<UNK>", "UNK", "<|endoftext|>"]);
        let unknown = unknown.ok_or_else(|| anyhow!("the tokenizer has no token for unknown words ({UNKNOWN})"))?;
        // Padding is masked wherever it matters, so any id will do if the tokenizer has no padding token.
        let padding = find(&[PADDING, "<pad>", "<PAD>"]);
        let (padding, pads) = (padding.unwrap_or(0), padding.is_some());
        let mut tokenizer =
            Tokenizer { engine, splitter, padding, pads, unknown, max_bytes, n_trained: 0, vectors: Vec::new() };
        tokenizer.n_trained = tokenizer.size();
        Ok(tokenizer)
    }

    /// Maximum number of bytes of each word that splits keep; `None` if they keep none.
    pub fn max_bytes(&self) -> Option<usize> {
        self.max_bytes
    }

    /// Number of tokens that may occur in training; they come first. The others have only pretrained vectors.
    pub fn n_trained(&self) -> usize {
        self.n_trained
    }

    /// Pretrained vectors of all tokens, one [V, E] per file.
    pub fn vectors(&self) -> &[Tensor] {
        &self.vectors
    }

    /// Sets the vectors of all tokens, of which the first `n_trained` may occur in training.
    pub fn set_vectors(&mut self, n_trained: usize, vectors: Vec<Tensor>) {
        (self.n_trained, self.vectors) = (n_trained, vectors);
    }

    /// Adds words of an earlier run, as tokens that may occur in training.
    pub fn learn<'a>(&mut self, words: impl Iterator<Item = &'a str>) -> Result<()> {
        self.extend(words)?;
        self.n_trained = self.size();
        Ok(())
    }

    /// The number of token ids; some ids of a `tokenizer.json` may have no token.
    pub fn size(&self) -> usize {
        self.engine.get_vocab(true).into_values().max().map_or(0, |last| last as usize + 1)
    }

    /// All tokens, in the order of their ids.
    pub fn vocabulary(&self) -> Vec<String> {
        (0..self.size() as u32).map(|id| self.engine.id_to_token(id).unwrap_or_default()).collect()
    }

    /// The tokens that whole words would be, in the vocabulary or not; `None` if the pre-tokenizer splits a word.
    pub fn whole_tokens(&self, words: &[String]) -> Vec<Option<String>> {
        let engine = &self.engine;
        let whole = |word: &String| {
            let mut parts = learn::parts_of(engine, word).ok()?;
            if parts.len() == 1 { parts.pop() } else { None }
        };
        words.par_iter().map(whole).collect()
    }

    /// Appends words to the vocabulary of a word tokenizer; words that it already has keep their ids.
    pub fn extend<'a>(&mut self, words: impl Iterator<Item = &'a str>) -> Result<()> {
        let mut json: serde_json::Value = serde_json::from_str(&self.to_json()?)?;
        let vocab =
            json["model"]["vocab"].as_object_mut().ok_or_else(|| anyhow!("the tokenizer has no list of words"))?;
        for word in words {
            let next = vocab.len();
            vocab.entry(word).or_insert_with(|| next.into());
        }
        self.engine = engine_from(json.to_string().as_bytes())?;
        Ok(())
    }

    pub fn to_json(&self) -> Result<String> {
        self.engine.to_string(true).map_err(|error| anyhow!("{error}"))
    }

    /// Encodes distinct words in parallel. A word for which the tokenizer returns no token becomes the unknown token.
    pub fn encode_words(&self, words: &Strings) -> Result<Pieces> {
        let words: Vec<&str> = words.iter().collect();
        let (engine, unknown) = (&self.engine, self.unknown);
        let encoded: Vec<Vec<u32>> =
            words.par_iter().map(|word| encode_word(engine, unknown, word)).collect::<Result<_>>()?;
        let mut pieces = Pieces { ids: Vec::new(), offsets: vec![0] };
        for ids in encoded {
            pieces.ids.extend(ids);
            pieces.offsets.push(pieces.ids.len());
        }
        Ok(pieces)
    }
}

fn encode_word(engine: &Engine, unknown: u32, word: &str) -> Result<Vec<u32>> {
    let encoding = engine.encode_fast(vec![word], false).map_err(|error| anyhow!("{error}"))?;
    let ids = encoding.get_ids();
    Ok(if ids.is_empty() { vec![unknown] } else { ids.to_vec() })
}

fn engine_from(json: &[u8]) -> Result<Engine> {
    Engine::from_bytes(json).map_err(|error| anyhow!("not a tokenizer.json: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::rows::RowsBuilder;

    impl Tokenizer {
        /// A word tokenizer: padding is 0, the unknown word is 1, and `words` follow.
        pub fn of_words(words: &[&str]) -> Tokenizer {
            let all = [PADDING, UNKNOWN].iter().chain(words);
            let vocabulary: serde_json::Map<_, _> =
                all.zip(0..).map(|(word, id)| (word.to_string(), id.into())).collect();
            let model = serde_json::json!({"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN});
            let json = serde_json::json!({"version": "1.0", "added_tokens": [], "model": model});
            Self::from_json(json.to_string().as_bytes(), Splitter::Whitespace, None).unwrap()
        }
    }

    fn rows(sentences: &[&str]) -> Rows {
        let mut builder = RowsBuilder::new(Path::new("test"), &[]);
        for (i, sentence) in sentences.iter().enumerate() {
            builder.push(i + 1, &sentence.split(' ').collect::<Vec<_>>(), &[]);
        }
        builder.rows
    }

    fn ids(tokenizer: &Tokenizer, word: &str) -> Vec<u32> {
        encode_word(&tokenizer.engine, tokenizer.unknown, word).unwrap()
    }

    #[test]
    fn words_are_counted_ordered_and_cut() {
        let rows = rows(&["Play the song 12", "play THE end", "the 34"]);
        let config = WordConfig { lowercase: true, fold_digits: true, min_count: 2, ..Default::default() };
        let build = |config| Tokenizer::build(&TokenizerConfig::Word(config), Path::new(""), &[&rows], None).unwrap();
        let tokenizer = build(config.clone());
        let largest = build(WordConfig { max_size: Some(2), ..config });
        assert_eq!(largest.vocabulary(), ["[PAD]", "[UNK]", "the", "00"]);
        // [PAD] [UNK] the(3) 00(2) play(2)
        assert_eq!(tokenizer.size(), 5);
        let gaps = tokenizer.to_json().unwrap().replace(": 4", ": 9").replace(":4", ":9");
        let gaps = Tokenizer::from_json(gaps.as_bytes(), Splitter::Whitespace, None).unwrap();
        assert_eq!((gaps.size(), gaps.vocabulary()[5].as_str()), (10, ""), "every id has a place");
        assert_eq!(
            (ids(&tokenizer, "THE"), ids(&tokenizer, "99"), ids(&tokenizer, "Play")),
            (vec![2], vec![3], vec![4])
        );
        assert_eq!((ids(&tokenizer, "song"), tokenizer.unknown, tokenizer.padding), (vec![1], 1, 0));
        let again = Tokenizer::from_json(tokenizer.to_json().unwrap().as_bytes(), Splitter::Whitespace, None).unwrap();
        assert_eq!(ids(&again, "play"), vec![4]);
    }

    #[test]
    fn pieces_are_learned_within_words_and_the_same_again() {
        let rows = rows(&["lower lowest low newer newest new wider widest wide", "quick brown fox jumps over zebra"]);
        let piece = PieceConfig { size: 100, ..Default::default() };
        for config in [
            TokenizerConfig::Bpe(piece.clone()),
            TokenizerConfig::Wordpiece(piece.clone()),
            TokenizerConfig::Unigram(piece),
        ] {
            let build = || Tokenizer::build(&config, Path::new(""), &[&rows], None).unwrap();
            let tokenizer = build();
            for _ in 0..20 {
                assert_eq!(tokenizer.to_json().unwrap(), build().to_json().unwrap(), "{config:?}");
            }
            assert!(!ids(&tokenizer, "lowest").contains(&tokenizer.unknown), "{config:?}");
            assert!(ids(&tokenizer, "語").contains(&tokenizer.unknown), "{config:?}");
        }
    }
}
