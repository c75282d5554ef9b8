//! From words to token ids, by Hugging Face's `tokenizers`: learned from the training text, or any `tokenizer.json`.
//!
//! Every word is encoded on its own, whatever the model: in Python, `encode(words, is_pretokenized=True)` with the saved
//! `tokenizer.json` gives the same ids.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, ensure};
use rayon::prelude::*;
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::models::unigram::UnigramTrainer;
use tokenizers::models::wordpiece::WordPieceTrainer;
use tokenizers::{AddedToken, Tokenizer as Engine};

use super::rows::{Rows, Strings};
use super::words::Splitter;

pub const PADDING: &str = "[PAD]";
pub const UNKNOWN: &str = "[UNK]";

/// The `tokenizer:` of an experiment; `model:` names the variant.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenizerConfig {
    /// A word is a token.
    Word(WordConfig),
    /// Byte-pair encoding, learned within words (Sennrich 2016).
    Bpe(PieceConfig),
    /// WordPiece, learned within words; continuations start with `##`.
    Wordpiece(PieceConfig),
    /// The unigram language model (Kudo 2018), learned within words.
    Unigram(PieceConfig),
    /// A `tokenizer.json` made elsewhere.
    File(FileConfig),
}

impl Default for TokenizerConfig {
    fn default() -> Self {
        TokenizerConfig::Word(WordConfig::default())
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WordConfig {
    /// How raw text becomes words: `whitespace` (default), `punctuation`, `character`.
    pub split: Splitter,
    /// Upper and lower case are one. Default false.
    pub lowercase: bool,
    /// Every digit becomes 0. Default false.
    pub fold_digits: bool,
    /// Words seen less often in training are unknown. Default 1, at least 1.
    pub min_count: u64,
    /// At most so many words, the most frequent. Default: no limit.
    pub max_size: Option<usize>,
    /// Probability that a word seen once in training is read as unknown, so that the unknown word gets trained (Lample
    /// 2016 use 0.5). Default 0.5, 0 to 1.
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

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PieceConfig {
    /// How raw text becomes words: `whitespace` (default), `punctuation`, `character`.
    pub split: Splitter,
    /// Upper and lower case are one. Default false.
    pub lowercase: bool,
    /// Every digit becomes 0. Default false.
    pub fold_digits: bool,
    /// Number of pieces, special tokens included. Default 8000, at least 100.
    pub size: usize,
}

impl Default for PieceConfig {
    fn default() -> Self {
        PieceConfig { split: Splitter::default(), lowercase: false, fold_digits: false, size: 8000 }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileConfig {
    /// Path of the `tokenizer.json`, relative to the data root.
    pub path: PathBuf,
    /// How raw text becomes words before the tokenizer sees it: `whitespace` (default), `punctuation`, `character`.
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

    /// Rate at which words seen once in training are read as unknown.
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
    pub unknown: u32,
}

/// The token ids of each of a list of distinct words: word `w` has `ids[offsets[w]..offsets[w + 1]]`.
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
    /// Learns a tokenizer from the training rows of all sets, or loads the one that the configuration names.
    pub fn build(config: &TokenizerConfig, root: &Path, train: &[&Rows]) -> Result<Tokenizer> {
        let (engine, splitter) = match config {
            TokenizerConfig::Word(word) => (learn_words(word, train)?, word.split),
            TokenizerConfig::Bpe(piece) => {
                let trainer = BpeTrainer::builder()
                    .vocab_size(piece.size)
                    .show_progress(false)
                    .special_tokens(special_tokens())
                    .build();
                let model = json!({"type": "BPE", "vocab": {}, "merges": [], "unk_token": UNKNOWN});
                (learn_pieces(piece, model, TrainerWrapper::BpeTrainer(trainer), train)?, piece.split)
            }
            TokenizerConfig::Wordpiece(piece) => {
                let trainer = WordPieceTrainer::builder()
                    .vocab_size(piece.size)
                    .show_progress(false)
                    .special_tokens(special_tokens())
                    .build();
                let model = json!({"type": "WordPiece", "vocab": {}, "unk_token": UNKNOWN,
                    "continuing_subword_prefix": "##", "max_input_chars_per_word": 100});
                (learn_pieces(piece, model, TrainerWrapper::WordPieceTrainer(trainer), train)?, piece.split)
            }
            TokenizerConfig::Unigram(piece) => {
                let trainer = UnigramTrainer::builder()
                    .vocab_size(piece.size as u32)
                    .show_progress(false)
                    .special_tokens(special_tokens())
                    .unk_token(Some(UNKNOWN.to_owned()))
                    .build()
                    .map_err(|error| anyhow!("{error}"))?;
                let model = json!({"type": "Unigram", "unk_id": 0, "vocab": [[UNKNOWN, 0.0]]});
                (learn_pieces(piece, model, TrainerWrapper::UnigramTrainer(trainer), train)?, piece.split)
            }
            TokenizerConfig::File(file) => {
                let path = root.join(&file.path);
                let bytes = std::fs::read(&path)
                    .map_err(|error| crate::problem::invalid(format!("{}: {error}", path.display())))?;
                return Self::from_json(&bytes, file.split)
                    .map_err(|error| crate::problem::invalid(format!("{}: {error:#}", path.display())));
            }
        };
        Self::new(engine, splitter)
    }

    /// A tokenizer from the text of a `tokenizer.json`.
    pub fn from_json(bytes: &[u8], splitter: Splitter) -> Result<Tokenizer> {
        Self::new(engine_from(bytes)?, splitter)
    }

    fn new(engine: Engine, splitter: Splitter) -> Result<Tokenizer> {
        let find = |names: &[&str]| names.iter().find_map(|name| engine.token_to_id(name));
        let unknown = find(&[UNKNOWN, "<unk>", "<UNK>", "UNK", "<|endoftext|>"]);
        let unknown = unknown.ok_or_else(|| anyhow!("the tokenizer has no token for unknown words ({UNKNOWN})"))?;
        // Padding is masked wherever it could count, so that any id serves where a tokenizer has none of its own.
        let padding = find(&[PADDING, "<pad>", "<PAD>"]).unwrap_or(0);
        Ok(Tokenizer { engine, splitter, padding, unknown })
    }

    /// The number of token ids.
    pub fn size(&self) -> usize {
        self.engine.get_vocab_size(true)
    }

    pub fn to_json(&self) -> Result<String> {
        self.engine.to_string(true).map_err(|error| anyhow!("{error}"))
    }

    /// Encodes distinct words, in parallel. A word of which the tokenizer leaves nothing is the unknown token.
    pub fn encode_words(&self, words: &Strings) -> Result<Pieces> {
        let words: Vec<&str> = words.iter().collect();
        let encoded: Vec<Vec<u32>> = words.par_iter().map(|word| self.encode_word(word)).collect::<Result<_>>()?;
        let mut pieces = Pieces { ids: Vec::new(), offsets: vec![0] };
        for ids in encoded {
            pieces.ids.extend(ids);
            pieces.offsets.push(pieces.ids.len());
        }
        Ok(pieces)
    }

    fn encode_word(&self, word: &str) -> Result<Vec<u32>> {
        let encoding = self.engine.encode_fast(vec![word], false).map_err(|error| anyhow!("{error}"))?;
        let ids = encoding.get_ids();
        Ok(if ids.is_empty() { vec![self.unknown] } else { ids.to_vec() })
    }
}

fn engine_from(json: &[u8]) -> Result<Engine> {
    Engine::from_bytes(json).map_err(|error| anyhow!("not a tokenizer.json: {error}"))
}

fn special_tokens() -> Vec<AddedToken> {
    vec![AddedToken::from(PADDING, true), AddedToken::from(UNKNOWN, true)]
}

/// A `tokenizer.json` around `model`.
fn tokenizer_json(model: serde_json::Value, lowercase: bool, fold_digits: bool, split: Splitter) -> Vec<u8> {
    let mut normalizers = Vec::new();
    if lowercase {
        normalizers.push(json!({"type": "Lowercase"}));
    }
    if fold_digits {
        normalizers.push(json!({"type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": "0"}));
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    // Only the word model knows its ids now; the others get theirs when they are trained.
    let added = if model["type"] == "WordLevel" { vec![special(0, PADDING), special(1, UNKNOWN)] } else { vec![] };
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": split.pre_tokenizer(),
        "post_processor": null,
        "decoder": null,
        "model": model,
    })
    .to_string()
    .into_bytes()
}

/// How often each distinct word stands in the rows, in the order of first appearance.
fn count_words<'a>(train: &[&'a Rows]) -> indexmap::IndexMap<&'a str, u64, rustc_hash::FxBuildHasher> {
    let mut total = indexmap::IndexMap::default();
    for rows in train {
        let mut counts = vec![0u64; rows.words.len()];
        for &word in &rows.word_ids {
            counts[word as usize] += 1;
        }
        for (word, count) in rows.words.iter().zip(counts).filter(|(_, count)| *count > 0) {
            *total.entry(word).or_insert(0) += count;
        }
    }
    total
}

fn learn_words(config: &WordConfig, train: &[&Rows]) -> Result<Engine> {
    // What the pipeline makes of each word, and how often; a word may fall apart at punctuation.
    let probe = json!({"type": "WordLevel", "vocab": {PADDING: 0, UNKNOWN: 1}, "unk_token": UNKNOWN});
    let probe = engine_from(&tokenizer_json(probe, config.lowercase, config.fold_digits, config.split))?;
    let counted = count_words(train);
    let words: Vec<&str> = counted.keys().copied().collect();
    let parts: Vec<Vec<String>> = words.par_iter().map(|word| parts_of(&probe, word)).collect::<Result<_>>()?;
    let mut counts: FxHashMap<&str, u64> = FxHashMap::default();
    for (parts, count) in parts.iter().zip(counted.values()) {
        for part in parts {
            *counts.entry(part).or_insert(0) += count;
        }
    }
    let mut words: Vec<(&str, u64)> = counts.into_iter().filter(|(_, count)| *count >= config.min_count).collect();
    words.sort_by(|(a, n), (b, m)| m.cmp(n).then(a.cmp(b)));
    words.truncate(config.max_size.map_or(usize::MAX, |size| size.saturating_sub(2)));
    let mut vocab = serde_json::Map::new();
    for word in [PADDING, UNKNOWN].into_iter().chain(words.into_iter().map(|(word, _)| word)) {
        let next = vocab.len();
        vocab.entry(word).or_insert_with(|| json!(next));
    }
    let model = json!({"type": "WordLevel", "vocab": vocab, "unk_token": UNKNOWN});
    engine_from(&tokenizer_json(model, config.lowercase, config.fold_digits, config.split))
}

/// The normalized pieces into which the pre-tokenizer cuts one word.
fn parts_of(engine: &Engine, word: &str) -> Result<Vec<String>> {
    use tokenizers::{Normalizer, OffsetReferential, OffsetType, PreTokenizer};
    let mut text = tokenizers::NormalizedString::from(word);
    let failed = |error| anyhow!("{error}");
    if let Some(normalizer) = engine.get_normalizer() {
        normalizer.normalize(&mut text).map_err(failed)?;
    }
    let mut text = tokenizers::PreTokenizedString::from(text);
    if let Some(pre_tokenizer) = engine.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut text).map_err(failed)?;
    }
    let splits = text.get_splits(OffsetReferential::Normalized, OffsetType::None);
    Ok(splits.into_iter().map(|(part, _, _)| part.to_owned()).collect())
}

fn learn_pieces(
    config: &PieceConfig,
    model: serde_json::Value,
    mut trainer: TrainerWrapper,
    train: &[&Rows],
) -> Result<Engine> {
    ensure!(config.size >= 100, crate::problem::invalid("tokenizer.size must be at least 100"));
    let mut engine = engine_from(&tokenizer_json(model, config.lowercase, config.fold_digits, config.split))?;
    let rows = train.iter().flat_map(|rows| (0..rows.len()).map(move |row| rows.text_of(row)));
    engine.train(&mut trainer, rows).map_err(|error| anyhow!("the tokenizer could not be trained: {error}"))?;
    Ok(engine)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::rows::RowsBuilder;

    fn rows(sentences: &[&str]) -> Rows {
        let mut builder = RowsBuilder::new(Path::new("test"), &[]);
        for (i, sentence) in sentences.iter().enumerate() {
            builder.push(i + 1, &sentence.split(' ').collect::<Vec<_>>(), &[]);
        }
        builder.rows
    }

    fn ids(tokenizer: &Tokenizer, word: &str) -> Vec<u32> {
        tokenizer.encode_word(word).unwrap()
    }

    #[test]
    fn words_are_counted_ordered_and_cut() {
        let rows = rows(&["Play the song 12", "play THE end", "the 34"]);
        let config = WordConfig { lowercase: true, fold_digits: true, min_count: 2, ..Default::default() };
        let tokenizer = Tokenizer::build(&TokenizerConfig::Word(config), Path::new(""), &[&rows]).unwrap();
        // [PAD] [UNK] the(3) 00(2) play(2)
        assert_eq!(tokenizer.size(), 5);
        assert_eq!(
            (ids(&tokenizer, "THE"), ids(&tokenizer, "99"), ids(&tokenizer, "Play")),
            (vec![2], vec![3], vec![4])
        );
        assert_eq!((ids(&tokenizer, "song"), tokenizer.unknown, tokenizer.padding), (vec![1], 1, 0));
        let again = Tokenizer::from_json(tokenizer.to_json().unwrap().as_bytes(), Splitter::Whitespace).unwrap();
        assert_eq!(ids(&again, "play"), vec![4]);
    }

    #[test]
    fn pieces_are_learned_within_words_and_the_same_again() {
        let rows = rows(&["lower lowest low newer newest new wider widest wide"; 20]);
        let piece = PieceConfig { size: 100, ..Default::default() };
        for config in [
            TokenizerConfig::Bpe(piece.clone()),
            TokenizerConfig::Wordpiece(piece.clone()),
            TokenizerConfig::Unigram(piece),
        ] {
            let build = || Tokenizer::build(&config, Path::new(""), &[&rows]).unwrap();
            let (tokenizer, again) = (build(), build());
            assert_eq!(tokenizer.to_json().unwrap(), again.to_json().unwrap(), "{config:?}");
            assert!(!ids(&tokenizer, "lowest").contains(&tokenizer.unknown), "{config:?}");
            assert!(ids(&tokenizer, "語").contains(&tokenizer.unknown), "{config:?}");
        }
    }
}
