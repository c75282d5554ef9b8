//! Problems with an input and where they are: the common form of all messages about experiment files and data.

use std::fmt;
use std::path::{Path, PathBuf};

/// A file and a line in it, from 1 (0: the whole file), or a [`row`](Self::row) if its rows are not on separate lines.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub file: PathBuf,
    pub line: usize,
}

impl Place {
    const ROW: usize = 1 << 30;

    pub fn new(file: &Path, line: usize) -> Self {
        Place { file: file.to_owned(), line }
    }

    /// Represents row `n` (from 1) in place of a line.
    pub fn row(n: usize) -> usize {
        n | Self::ROW
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&shown(&self.file.display().to_string()))?;
        match self.line {
            0 => Ok(()),
            n if n & Self::ROW != 0 => write!(f, ", row {}", n ^ Self::ROW),
            n => write!(f, ":{n}"),
        }
    }
}

/// Whether a problem prevents training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    Error,
    Warning,
}

/// One problem with an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub severity: Severity,
    pub place: Option<Place>,
    pub message: String,
}

impl Problem {
    pub fn error(place: Place, message: impl Into<String>) -> Self {
        Problem { severity: Severity::Error, place: Some(place), message: message.into() }
    }

    pub fn warning(place: Place, message: impl Into<String>) -> Self {
        Problem { severity: Severity::Warning, place: Some(place), message: message.into() }
    }

    pub fn general(severity: Severity, message: impl Into<String>) -> Self {
        Problem { severity, place: None, message: message.into() }
    }

    /// Whether it is an error in `path`, a file or a folder.
    pub fn is_error_in(&self, path: &Path) -> bool {
        self.severity == Severity::Error && self.place.as_ref().is_some_and(|place| place.file.starts_with(path))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        f.write_str(&shown(&self.message))
    }
}

/// An input that cannot be used: the command line, an experiment file or data. The process exits with 2.
#[derive(Debug)]
pub struct InvalidInput(pub Vec<Problem>);

/// Maximum number of problems to show.
const SHOWN: usize = 20;

impl InvalidInput {
    /// The problems to show one by one.
    pub fn shown(&self) -> &[Problem] {
        &self.0[..SHOWN.min(self.0.len())]
    }

    /// The number of further problems as text, if any.
    pub fn rest(&self) -> Option<String> {
        (self.0.len() > SHOWN).then(|| format!("... and {} more", self.0.len() - SHOWN))
    }
}

impl fmt::Display for InvalidInput {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (i, problem) in self.shown().iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{problem}")?;
        }
        self.rest().map_or(Ok(()), |rest| write!(f, "\n{rest}"))
    }
}

impl std::error::Error for InvalidInput {}

/// `text` with control characters escaped, except line breaks, so that it cannot control the terminal.
pub fn shown(text: &str) -> String {
    let one = |c: char| if c.is_control() && c != '\n' { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(one).collect()
}

/// `1 value`, `2 values`.
pub fn counted(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// An [`InvalidInput`] of one message without a location.
pub fn invalid(message: impl Into<String>) -> anyhow::Error {
    InvalidInput(vec![Problem::general(Severity::Error, message)]).into()
}

/// Fails with all errors among `problems`; if there are none, returns the warnings.
pub fn fail_on_errors(problems: Vec<Problem>) -> anyhow::Result<Vec<Problem>> {
    let (errors, warnings): (Vec<_>, Vec<_>) = problems.into_iter().partition(|p| p.severity == Severity::Error);
    if errors.is_empty() { Ok(warnings) } else { Err(InvalidInput(errors).into()) }
}
