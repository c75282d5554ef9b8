//! Tag schemes: how spans are written as one tag per word.
//!
//! In every scheme, spans are read by the rules of CoNLL's `conlleval` (prefixes and types determine where a chunk
//! starts and ends, also in invalid sequences), represented internally as BIO, and written in the scheme of the data.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How tags are written in the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scheme {
    /// Every span starts with `B-` (also called IOB2).
    #[serde(alias = "iob2")]
    Bio,
    /// `B-` only where a span immediately follows another of the same type (CoNLL-2003's original files).
    Iob1,
    /// `B- I- E-`, and `S-` for spans of one word (also called IOBES).
    #[serde(alias = "iobes")]
    Bioes,
    /// `B- M- E-`, and `S-` for spans of one word.
    Bmes,
    /// `B- I- L-`, and `U-` for spans of one word.
    Bilou,
    /// Tags that are not spans, such as parts of speech.
    Plain,
}

/// A parsed tag: the letter before the hyphen and the type after it. `O` has no type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag<'a> {
    pub prefix: u8,
    pub kind: &'a str,
}

impl<'a> Tag<'a> {
    pub const OUTSIDE: Tag<'static> = Tag { prefix: b'O', kind: "" };

    fn new(prefix: u8, kind: &'a str) -> Self {
        Tag { prefix, kind }
    }

    fn is_outside(self) -> bool {
        self.prefix == b'O'
    }
}

/// Words `start..end` of a sentence, with a type.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span<T> {
    pub start: usize,
    pub end: usize,
    pub kind: T,
}

impl Scheme {
    fn letters(self) -> &'static str {
        match self {
            Scheme::Bio | Scheme::Iob1 => "BIO",
            Scheme::Bioes => "BIOES",
            Scheme::Bmes => "BMOES",
            Scheme::Bilou => "BILOU",
            Scheme::Plain => "",
        }
    }

    /// The letters inside a span, at its end and for a span of one word; `None` if the scheme does not mark ends.
    fn closed(self) -> Option<(u8, u8, u8)> {
        match self {
            Scheme::Bioes => Some((b'I', b'E', b'S')),
            Scheme::Bmes => Some((b'M', b'E', b'S')),
            Scheme::Bilou => Some((b'I', b'L', b'U')),
            Scheme::Bio | Scheme::Iob1 | Scheme::Plain => None,
        }
    }

    /// Parses a tag; `None` if this scheme does not have it. `Plain` has only `O`.
    pub fn parse(self, tag: &str) -> Option<Tag<'_>> {
        if tag == "O" {
            return Some(Tag::OUTSIDE);
        }
        let (prefix, kind) = tag.split_once('-')?;
        let [letter] = prefix.as_bytes() else { return None };
        let known = *letter != b'O' && self.letters().as_bytes().contains(letter);
        (known && !kind.is_empty()).then(|| Tag::new(*letter, kind))
    }

    /// Why `tag` cannot follow `previous` (`None`: at the start of a sentence), or `None` if it can.
    pub fn broken(self, previous: Option<Tag>, tag: Tag) -> Option<&'static str> {
        let before = previous.unwrap_or(Tag::OUTSIDE);
        let continues = |letter: u8| {
            (before.prefix == b'B' || before.prefix == letter) && before.kind == tag.kind && !before.is_outside()
        };
        let open = |letter: u8| before.prefix == b'B' || before.prefix == letter;
        if let Some((inside, last, _)) = self.closed() {
            return match tag.prefix == inside || tag.prefix == last {
                true => (!continues(inside)).then_some("does not continue a span of its type"),
                false => open(inside).then_some("the span before it is not closed"),
            };
        }
        match (self, tag.prefix) {
            (Scheme::Bio, b'I') => {
                (!continues(b'I')).then_some("does not continue a span of its type (`scheme: iob1` would allow this)")
            }
            (Scheme::Iob1, b'B') => {
                (!continues(b'I')).then_some("IOB1 has B- only right after a span of the same type")
            }
            _ => None,
        }
    }

    /// Whether `tag` leaves a span open, so that a sentence may not end in it.
    pub fn left_open(self, tag: Tag) -> bool {
        self.closed().is_some_and(|(inside, ..)| tag.prefix == b'B' || tag.prefix == inside)
    }
}

/// The spans that `conlleval` counts in a sequence of tags of any scheme.
///
/// Source: the rules of `endOfChunk` and `startOfChunk` in the CoNLL-2000 evaluation script; L- and U- count as E-, S-.
pub fn spans_of<'a>(tags: impl IntoIterator<Item = Tag<'a>>) -> Vec<Span<&'a str>> {
    let mut spans = Vec::new();
    let mut open: Option<(usize, &str)> = None;
    let mut previous = Tag::OUTSIDE;
    let mut n = 0;
    for (i, tag) in tags.into_iter().enumerate() {
        n = i + 1;
        let ended = matches!(previous.prefix, b'E' | b'S' | b'L' | b'U')
            || matches!(tag.prefix, b'B' | b'S' | b'U' | b'O')
            || previous.kind != tag.kind;
        if let (true, Some((start, kind))) = (ended, open) {
            spans.push(Span { start, end: i, kind });
            open = None;
        }
        if !tag.is_outside() && open.is_none() {
            open = Some((i, tag.kind));
        }
        previous = tag;
    }
    if let Some((start, kind)) = open {
        spans.push(Span { start, end: n, kind });
    }
    spans
}

/// The tags of `spans` in a sentence of `n` words. Spans must be in order and must not overlap.
fn tags_of<'a>(scheme: Scheme, spans: &[Span<&'a str>], n: usize) -> Vec<Tag<'a>> {
    let mut tags = vec![Tag::OUTSIDE; n];
    let mut previous: Option<&Span<&str>> = None;
    for span in spans {
        let touches = previous.is_some_and(|p| p.end == span.start && p.kind == span.kind);
        for (i, tag) in tags.iter_mut().enumerate().take(span.end).skip(span.start) {
            let (first, last) = (i == span.start, i + 1 == span.end);
            let letter = match (scheme.closed(), first, last) {
                (Some((_, _, only)), true, true) => only,
                (Some((_, close, _)), false, true) => close,
                (Some((inside, ..)), false, false) => inside,
                (None, true, _) if scheme == Scheme::Iob1 && !touches => b'I',
                (_, true, _) => b'B',
                (None, false, _) => b'I',
            };
            *tag = Tag::new(letter, span.kind);
        }
        previous = Some(span);
    }
    tags
}

fn text(tag: Tag) -> String {
    if tag.is_outside() { "O".to_owned() } else { format!("{}-{}", tag.prefix as char, tag.kind) }
}

/// Converts BIO tags, valid or not, to `scheme`.
pub fn from_bio(scheme: Scheme, tags: &[&str]) -> Vec<String> {
    let parsed = tags.iter().map(|tag| Scheme::Bio.parse(tag).unwrap_or(Tag::OUTSIDE));
    tags_of(scheme, &spans_of(parsed), tags.len()).into_iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to_bio(scheme: Scheme, tags: &[&str]) -> Vec<String> {
        let parsed = tags.iter().map(|tag| scheme.parse(tag).unwrap_or(Tag::OUTSIDE));
        tags_of(Scheme::Bio, &spans_of(parsed), tags.len()).into_iter().map(text).collect()
    }

    fn check(scheme: Scheme, written: &str, bio: &str) {
        let (written, bio): (Vec<_>, Vec<_>) = (written.split(' ').collect(), bio.split(' ').collect());
        assert_eq!(to_bio(scheme, &written), bio, "{scheme:?} to BIO");
        assert_eq!(from_bio(scheme, &bio), written, "BIO to {scheme:?}");
    }

    #[test]
    fn schemes_convert_to_bio_and_back() {
        check(Scheme::Bio, "B-a I-a O B-a B-a", "B-a I-a O B-a B-a");
        check(Scheme::Iob1, "I-a I-a O I-b B-b I-a", "B-a I-a O B-b B-b B-a");
        check(Scheme::Bioes, "B-a E-a O S-b S-b B-a I-a E-a", "B-a I-a O B-b B-b B-a I-a I-a");
        check(Scheme::Bmes, "B-a M-a E-a S-b O", "B-a I-a I-a B-b O");
        check(Scheme::Bilou, "B-a I-a L-a U-b U-b O B-a L-a", "B-a I-a I-a B-b B-b O B-a I-a");
    }

    #[test]
    fn broken_sequences_are_read_as_conlleval_reads_them() {
        assert_eq!(to_bio(Scheme::Bio, &["I-a", "I-b", "O", "I-b"]), ["B-a", "B-b", "O", "B-b"]);
        assert_eq!(to_bio(Scheme::Bioes, &["E-a", "I-a", "B-a", "O"]), ["B-a", "B-a", "B-a", "O"]);
        assert_eq!(to_bio(Scheme::Bio, &["B-a", "weird"]), ["B-a", "O"]);
    }

    #[test]
    fn breaks_are_found() {
        let broken =
            |scheme: Scheme, a: &str, b: &str| scheme.broken(scheme.parse(a), scheme.parse(b).unwrap()).is_some();
        for (scheme, a, b, expected) in [
            (Scheme::Bio, "O", "I-a", true),
            (Scheme::Bio, "B-a", "I-b", true),
            (Scheme::Bio, "I-a", "I-a", false),
            (Scheme::Iob1, "O", "I-a", false),
            (Scheme::Iob1, "O", "B-a", true),
            (Scheme::Iob1, "I-a", "B-a", false),
            (Scheme::Bioes, "B-a", "O", true),
            (Scheme::Bioes, "B-a", "E-a", false),
            (Scheme::Bioes, "S-a", "I-a", true),
            (Scheme::Bmes, "M-a", "E-a", false),
            (Scheme::Bmes, "M-a", "B-a", true),
            (Scheme::Bilou, "B-a", "L-a", false),
            (Scheme::Bilou, "U-a", "L-a", true),
        ] {
            assert_eq!(broken(scheme, a, b), expected, "{scheme:?} {a} {b}");
        }
        assert!(Scheme::Bioes.left_open(Scheme::Bioes.parse("B-a").unwrap()));
        assert_eq!(Scheme::Bio.parse("E-a"), None);
        assert_eq!(Scheme::Bio.parse("B-"), None);
    }
}
