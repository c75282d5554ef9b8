//! The published data sets, if present in POLYTASK_DATA or else ../shared/data; CI requires them.

use std::path::{Path, PathBuf};

use polytask::config::Experiment;
use polytask::data::{Split, load};
use polytask::problem::Severity;

pub fn data() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = std::env::var_os("POLYTASK_DATA").map_or(root.join("../shared/data"), PathBuf::from);
    let found = folder.join("snips/train/seq.in").exists();
    assert!(found || std::env::var_os("CI").is_none(), "in CI the data must be there: {}", folder.display());
    if !found {
        println!("no data in {}: set POLYTASK_DATA to test on the real sets", folder.display());
    }
    found.then_some(folder)
}

/// Checks the numbers of rows in train, dev and test of each set, and the number of warnings.
fn check(name: &str, expected: &[[usize; 3]], n_warnings: usize) {
    let Some(folder) = data() else { return };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("experiments").join(name);
    let root = format!("data.root={}", folder.display());
    let experiment = Experiment::load(&path, &[root]).unwrap();
    let splitter = experiment.tokenizer.splitter();
    let (corpus, problems) =
        load(&experiment.data, &experiment.task_columns(), &Split::ALL, splitter, &|_: &Path| {}).unwrap();
    let sizes: Vec<[usize; 3]> =
        corpus.sets.iter().map(|set| Split::ALL.map(|split| set.splits[split as usize].len())).collect();
    assert_eq!(sizes, expected);
    assert!(problems.iter().all(|problem| problem.severity == Severity::Warning), "{problems:?}");
    assert_eq!(problems.len(), n_warnings, "{problems:?}");
}

#[test]
fn snips_is_read_whole() {
    check("snips.yaml", &[[13_084, 700, 700]], 0);
}

#[test]
fn hwu64_is_read_whole_and_its_odd_spans_are_named() {
    check("hwu64.yaml", &[[8_964, 996, 1_076]], 4);
}

#[test]
fn trec_and_wnut17_are_read_whole() {
    check("questions_and_entities.yaml", &[[3_394, 1_009, 1_287], [4_907, 545, 500]], 0);
}

#[test]
fn ewt_and_clinc150_are_read_whole() {
    check("pos_and_intents.yaml", &[[12_544, 2_001, 2_077], [15_100, 3_100, 5_500]], 0);
}
