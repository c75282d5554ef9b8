//! Rules of the architecture, checked on the source code.

use std::path::{Path, PathBuf};

/// Layers from top to bottom: a module may use only those after it.
const LAYERS: [&str; 17] = [
    "commands",
    "config",
    "train",
    "export",
    "compare",
    "evaluate",
    "model",
    "weighting",
    "optim",
    "data",
    "metrics",
    "run",
    "onnx",
    "libtorch",
    "task",
    "rng",
    "problem",
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Each file's path below src/ and its code without comments and tests.
fn code() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
        (path.strip_prefix(&root).unwrap().to_string_lossy().into_owned(), code)
    };
    let mut all: Vec<_> = files.into_iter().map(read).collect();
    all.sort();
    assert!(all.len() > 30);
    all
}

fn layer(file: &str) -> Option<usize> {
    let name = file.split(['/', '.']).next().unwrap();
    LAYERS.iter().position(|layer| *layer == name)
}

#[test]
fn imports_point_down() {
    for (file, code) in code() {
        let own = match (layer(&file), file.as_str()) {
            (Some(own), _) => own,
            (None, "lib.rs" | "main.rs") => continue,
            (None, _) => panic!("{file} has no place among the layers"),
        };
        for (i, upper) in LAYERS.iter().enumerate().take(own) {
            assert!(
                !code.contains(&format!("crate::{upper}")),
                "{file} ({}) uses {upper} above it ({i} < {own})",
                LAYERS[own]
            );
        }
    }
}

#[test]
fn layers_keep_to_their_business() {
    for (file, code) in code() {
        let names = |word: &str| code.contains(word);
        let top = file.starts_with("commands/") || file.starts_with("config/");
        assert!(top || !names("Experiment"), "{file} names the whole experiment");
        assert!(!file.starts_with("metrics/") || !(names("tch::") || names("use tch")), "{file} mentions tch");
        for other in ["model", "data", "train"] {
            assert!(!file.starts_with("weighting/") || !names(&format!("crate::{other}")), "{file} mentions {other}");
        }
        let matches = ["WeightingConfig::", "HeadConfig::"].iter().any(|word| names(word));
        let may = top || file.starts_with("weighting/") || file.starts_with("model/heads/mod");
        assert!(may || !matches, "{file} tells strategies or heads apart");
    }
}

#[test]
fn what_is_expected_has_a_reason() {
    for (file, code) in code() {
        for (i, line) in code.lines().enumerate() {
            assert!(!line.contains(".expect(") || line.contains("invariant: "), "{file}: {line} (about line {i})");
        }
    }
}

#[test]
fn files_can_be_held_in_the_head() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let n = text.lines().count();
        assert!(n <= 420, "{} has {n} lines", file.display());
        let long = text.lines().find(|line| line.chars().count() > 130);
        assert!(long.is_none(), "{}: no editor shows all of `{}`", file.display(), long.unwrap_or_default());
    }
}
