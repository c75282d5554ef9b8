//! An exported model's file: its contents, and reading it back.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use crate::libtorch::ScriptModule;
use crate::problem::invalid;

/// Version of the file format, increased when older programs cannot read the file.
pub const FORMAT: u64 = 1;

/// The files inside an exported model, in this order.
///
/// `labels.txt` (one `task <tab> label` per line) and `vocabulary.txt` (one token per line, empty unless the tokenizer
/// model is `word`) are for programs without a JSON reader.
pub const FILES: [&str; 7] =
    ["polytask.json", "resolved.yaml", "labels.json", "tokenizer.json", "card.md", "labels.txt", "vocabulary.txt"];

/// How a TorchScript file begins, which is a zip file.
pub const ZIP: [u8; 2] = *b"PK";

/// An exported model, read back.
pub struct Exported {
    pub module: ScriptModule,
    /// The content of `polytask.json`.
    pub about: Value,
    /// The texts of [`FILES`].
    pub files: Vec<String>,
}

/// Reads an exported model.
///
/// # Errors
/// A file that is damaged, not a polytask model, or of another format version.
pub fn open(path: &Path) -> Result<Exported> {
    let name = path.display();
    let mut start = [0; 2];
    let mut file = File::open(path).map_err(|error| invalid(format!("{name}: {error}")))?;
    if file.read_exact(&mut start).is_err() || start != ZIP {
        let message = "is neither a run directory nor a model of `export --format torchscript`";
        return Err(invalid(format!("{name} {message}")));
    }
    let (module, files) = ScriptModule::load(path, &FILES).map_err(|error| {
        // The rest of libtorch's message only guesses at the cause.
        let why = error.to_string();
        invalid(format!("{name} is damaged ({})", why.split(". ").next().unwrap_or(&why)))
    })?;
    let about: Value = serde_json::from_str(&files[0])
        .map_err(|_| invalid(format!("{name} is a TorchScript file, but not a model exported by polytask")))?;
    if about["format"] != FORMAT {
        let (found, version) = (&about["format"], &about["polytask"]);
        return Err(invalid(format!(
            "{name} has format {found} (polytask {version}); this program reads format {FORMAT}"
        )));
    }
    Ok(Exported { module, about, files })
}
