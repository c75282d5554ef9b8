//! Learns a tokenizer from the words of the training rows, deterministically.

use std::collections::BTreeSet;

use anyhow::{Result, anyhow};
use rayon::prelude::*;
use rustc_hash::FxHashMap;
use serde_json::json;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::models::unigram::{Unigram, UnigramTrainer};
use tokenizers::models::wordpiece::WordPieceTrainer;
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::{AddedToken, Tokenizer as Engine};

use super::{PADDING, PieceConfig, UNKNOWN, WordConfig, engine_from};
use crate::data::rows::Rows;
use crate::data::words::Splitter;

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
    // Only the word model has its ids already; the others get them in training.
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

/// Frequency of each distinct word in the rows, in order of first appearance.
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

/// Frequency of each part of a word that the pre-tokenizer outputs, most frequent first. A word may be split at
/// punctuation.
fn count_parts(engine: &Engine, train: &[&Rows]) -> Result<Vec<(String, u64)>> {
    let counted = count_words(train);
    let words: Vec<&str> = counted.keys().copied().collect();
    let parts: Vec<Vec<String>> = words.par_iter().map(|word| parts_of(engine, word)).collect::<Result<_>>()?;
    let mut counts: FxHashMap<String, u64> = FxHashMap::default();
    for (parts, count) in parts.into_iter().zip(counted.values()) {
        for part in parts {
            *counts.entry(part).or_insert(0) += count;
        }
    }
    let mut parts: Vec<(String, u64)> = counts.into_iter().collect();
    parts.sort_by(|(a, n), (b, m)| m.cmp(n).then(a.cmp(b)));
    Ok(parts)
}

pub fn learn_words(config: &WordConfig, train: &[&Rows]) -> Result<Engine> {
    let probe = json!({"type": "WordLevel", "vocab": {PADDING: 0, UNKNOWN: 1}, "unk_token": UNKNOWN});
    let probe = engine_from(&tokenizer_json(probe, config.lowercase, config.fold_digits, config.split))?;
    let parts = count_parts(&probe, train)?;
    let kept = parts.iter().filter(|(_, count)| *count >= config.min_count).map(|(part, _)| part.as_str());
    let limit = config.max_size.unwrap_or(usize::MAX);
    let mut vocab = serde_json::Map::new();
    for word in [PADDING, UNKNOWN].into_iter().chain(kept.take(limit)) {
        let next = vocab.len();
        vocab.entry(word).or_insert_with(|| json!(next));
    }
    let model = json!({"type": "WordLevel", "vocab": vocab, "unk_token": UNKNOWN});
    engine_from(&tokenizer_json(model, config.lowercase, config.fold_digits, config.split))
}

/// The normalised parts into which the pre-tokenizer splits one word.
pub fn parts_of(engine: &Engine, word: &str) -> Result<Vec<String>> {
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

/// The subword model to learn.
#[derive(Clone, Copy, PartialEq)]
pub enum PieceKind {
    Bpe,
    Wordpiece,
    Unigram,
}

/// Learns subwords, deterministically. The library's trainers iterate over hash maps in random order; where that
/// affects the result, the order is fixed here.
pub fn learn_pieces(config: &PieceConfig, kind: PieceKind, train: &[&Rows]) -> Result<Engine> {
    let failed = |error| anyhow!("the tokenizer could not be trained: {error}");
    let model = match kind {
        PieceKind::Bpe => json!({"type": "BPE", "vocab": {}, "merges": [], "unk_token": UNKNOWN}),
        PieceKind::Wordpiece => json!({"type": "WordPiece", "vocab": {}, "unk_token": UNKNOWN,
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}),
        PieceKind::Unigram => json!({"type": "Unigram", "unk_id": 0, "vocab": [[UNKNOWN, 0.0]]}),
    };
    let mut engine = engine_from(&tokenizer_json(model, config.lowercase, config.fold_digits, config.split))?;
    let special = vec![AddedToken::from(PADDING, true), AddedToken::from(UNKNOWN, true)];
    let parts = count_parts(&engine, train)?;
    match kind {
        PieceKind::Bpe => {
            let trainer =
                BpeTrainer::builder().vocab_size(config.size).show_progress(false).special_tokens(special).build();
            train_engine(&mut engine, TrainerWrapper::BpeTrainer(trainer), train)?;
        }
        PieceKind::Wordpiece => {
            // One-letter continuations would get ids in random order: add them first, as special tokens.
            let letters: BTreeSet<char> = parts.iter().flat_map(|(part, _)| part.chars().skip(1)).collect();
            let continued = letters.into_iter().map(|letter| AddedToken::from(format!("##{letter}"), true));
            let trainer = WordPieceTrainer::builder()
                .vocab_size(config.size)
                .show_progress(false)
                .special_tokens(special.into_iter().chain(continued).collect())
                .build();
            train_engine(&mut engine, TrainerWrapper::WordPieceTrainer(trainer), train)?;
            let json = engine.to_string(false).map_err(failed)?;
            let mut json: serde_json::Value = serde_json::from_str(&json)?;
            if let Some(added) = json["added_tokens"].as_array_mut() {
                added.retain(|token| token["content"] == PADDING || token["content"] == UNKNOWN);
            }
            engine = engine_from(json.to_string().as_bytes())?;
        }
        PieceKind::Unigram => {
            let trainer = UnigramTrainer::builder()
                .vocab_size(config.size as u32)
                .show_progress(false)
                .special_tokens(special)
                .unk_token(Some(UNKNOWN.to_owned()))
                .build()
                .map_err(|error| anyhow!("{error}"))?;
            let counts = parts.into_iter().map(|(part, count)| (part, count.min(u32::MAX.into()) as u32)).collect();
            let mut model = Unigram::default();
            // One thread, so that probabilities are summed in a fixed order.
            tokenizers::parallelism::set_parallelism(false);
            let trained = trainer.do_train(counts, &mut model);
            tokenizers::parallelism::set_parallelism(true);
            let special = trained.map_err(failed)?;
            engine.with_model(ModelWrapper::Unigram(model));
            engine.add_special_tokens(&special);
            let json = engine.to_string(false).map_err(failed)?;
            let mut json: serde_json::Value = serde_json::from_str(&json)?;
            let vocab: Vec<(String, f64)> = serde_json::from_value(json["model"]["vocab"].take())?;
            json["model"]["vocab"] = json!(in_one_order(vocab));
            engine = engine_from(json.to_string().as_bytes())?;
        }
    }
    Ok(engine)
}

fn train_engine(engine: &mut Engine, mut trainer: TrainerWrapper, train: &[&Rows]) -> Result<()> {
    let rows = train.iter().flat_map(|rows| (0..rows.len()).map(move |row| rows.text_of(row)));
    let trained = engine.train(&mut trainer, rows).map(|_| ());
    trained.map_err(|error| anyhow!("the tokenizer could not be trained: {error}"))
}

/// Removes the effects of random order from a unigram vocabulary: sums that differ in the last digits, the order of
/// equal scores, and the order of letters that training pruned and restored near the lowest score, each 0.0001 above
/// the one before. Special tokens come first and keep their places.
fn in_one_order(mut vocab: Vec<(String, f64)>) -> Vec<(String, f64)> {
    for (_, score) in &mut vocab {
        *score = (*score * 1e8).round() / 1e8;
    }
    let n_special = vocab.iter().take_while(|(piece, _)| piece == PADDING || piece == UNKNOWN).count();
    let pieces = &mut vocab[n_special..];
    let by_score = |a: &(String, f64), b: &(String, f64)| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0));
    pieces.sort_by(by_score);
    let letter = |piece: &str| piece.chars().count() == 1;
    let lowest = pieces.iter().filter(|(piece, _)| !letter(piece)).map(|(_, score)| *score).fold(0.0, f64::min);
    let bound = lowest + 1e-4 * (1 + pieces.iter().filter(|(piece, _)| letter(piece)).count()) as f64;
    let low: Vec<usize> = (0..pieces.len()).filter(|&i| letter(&pieces[i].0) && pieces[i].1 <= bound).collect();
    let mut letters: Vec<String> = low.iter().map(|&i| pieces[i].0.clone()).collect();
    letters.sort();
    for (i, letter) in low.into_iter().zip(letters) {
        pieces[i].0 = letter;
    }
    pieces.sort_by(by_score);
    vocab
}
