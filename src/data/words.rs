//! Splits text into words by the same rules as the pre-tokenizer of the saved `tokenizer.json`.

use std::sync::LazyLock;

use regex::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How raw text is split into words. Words that the data gives are not split, but may consist of several tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Splitter {
    /// At white space.
    #[default]
    Whitespace,
    /// At white space and between letters or digits and punctuation (`\w+|[^\w\s]+`).
    Punctuation,
    /// Every character except white space is a word, for Chinese and other text without spaces.
    Character,
}

static WORD_OR_PUNCTUATION: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\w+|[^\w\s]+").expect("invariant: a literal pattern"));

impl Splitter {
    /// The words of `text` as byte ranges, in order.
    pub fn split(self, text: &str) -> Vec<(usize, usize)> {
        match self {
            Splitter::Whitespace => {
                let start_of = |word: &str| word.as_ptr() as usize - text.as_ptr() as usize;
                text.split_whitespace().map(|word| (start_of(word), start_of(word) + word.len())).collect()
            }
            Splitter::Punctuation => WORD_OR_PUNCTUATION.find_iter(text).map(|m| (m.start(), m.end())).collect(),
            Splitter::Character => text
                .char_indices()
                .filter(|(_, c)| !c.is_whitespace())
                .map(|(start, c)| (start, start + c.len_utf8()))
                .collect(),
        }
    }

    /// The `pre_tokenizer` of a tokenizer.json that splits the same way.
    pub fn pre_tokenizer(self) -> serde_json::Value {
        use serde_json::json;
        match self {
            Splitter::Whitespace => json!({"type": "WhitespaceSplit"}),
            Splitter::Punctuation => json!({"type": "Whitespace"}),
            Splitter::Character => json!({"type": "Sequence", "pretokenizers": [
                {"type": "WhitespaceSplit"},
                {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": false},
            ]}),
        }
    }
}

/// Byte ranges as character ranges of `text`; the ranges must be in order and must not overlap.
pub fn character_ranges(text: &str, ranges: &[(usize, usize)]) -> Vec<(usize, usize)> {
    let (mut byte, mut character) = (0, 0);
    let mut advance = |to: usize| {
        character += text[byte..to].chars().count();
        byte = to;
        character
    };
    ranges.iter().map(|&(start, end)| (advance(start), advance(end))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(splitter: Splitter, text: &str, expected: &[&str]) {
        let words: Vec<_> = splitter.split(text).into_iter().map(|(a, b)| &text[a..b]).collect();
        assert_eq!(words, expected);
    }

    #[test]
    fn text_splits_as_asked() {
        check(Splitter::Whitespace, "  don't  stop! ", &["don't", "stop!"]);
        check(Splitter::Punctuation, "don't stop!?", &["don", "'", "t", "stop", "!?"]);
        check(Splitter::Character, "北京 ok", &["北", "京", "o", "k"]);
        check(Splitter::Whitespace, "", &[]);
    }

    #[test]
    fn offsets_count_characters() {
        assert_eq!(character_ranges("é à b", &[(0, 2), (3, 5), (6, 7)]), [(0, 1), (2, 3), (4, 5)]);
    }
}
