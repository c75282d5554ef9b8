//! The experiments that come with the project.

use std::path::{Path, PathBuf};

use polytask::config::Experiment;

fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("experiments");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    files
}

#[test]
fn every_experiment_is_sound_and_says_what_to_expect() {
    assert_eq!(files().len(), 16);
    for path in files() {
        let text = std::fs::read_to_string(&path).unwrap();
        let header: String = text.lines().take_while(|line| line.starts_with('#')).collect::<Vec<_>>().join("\n");
        let experiment = Experiment::load(&path, &[]).unwrap_or_else(|error| panic!("{error}"));
        experiment.variants(&path, &[]).unwrap_or_else(|error| panic!("{error}"));
        let name = path.file_stem().unwrap().to_string_lossy();
        let (verb, of) = match name.strip_suffix("_study") {
            Some(of) => ("study", of),
            None => ("train", &*name),
        };
        assert_eq!((experiment.name.as_str(), experiment.study.is_some()), (of, verb == "study"));
        for part in ["Paper", "Expect", &format!("Run: scripts/polytask {verb} experiments/{name}.yaml")] {
            assert!(header.contains(part), "{}: its header lacks `{part}`", path.display());
        }
    }
}

#[test]
fn the_quickstart_corpus_is_small_and_what_its_generator_writes() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let status = std::process::Command::new("python3")
        .arg(root.join("scripts/make_quickstart_corpus"))
        .arg(folder.path())
        .status()
        .unwrap();
    assert!(status.success());
    let mut total = 0;
    let mut train = std::collections::HashSet::new();
    for split in ["train", "dev", "test"] {
        let name = format!("{split}.jsonl");
        let committed = std::fs::read_to_string(root.join("experiments/quickstart").join(&name)).unwrap();
        assert_eq!(committed, std::fs::read_to_string(folder.path().join(&name)).unwrap());
        total += committed.len();
        for line in committed.lines() {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            let text = row["tokens"].to_string();
            assert!(split == "train" || !train.contains(&text), "{split} repeats {text}");
            train.insert(text);
        }
    }
    assert!(total < 2_000_000);
}
