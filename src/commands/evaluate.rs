//! `polytask evaluate`: scores of a checkpoint on a split.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::cli::EvaluateArgs;
use super::predict::probability;
use super::saved_model::{self, Trained};
use super::{End, output, prepare, say, table};
use crate::config::Experiment;
use crate::data::{Corpus, DeviceSplit, Split, labels};
use crate::evaluate::{evaluate, predict};
use crate::problem::invalid;
use crate::task::{Scheme, Task, TaskId, TaskKind};

pub fn run(args: &EvaluateArgs) -> Result<End> {
    let (device, _) = prepare::machine(&args.machine)?;
    let mut trained = saved_model::open(&args.run, &args.checkpoint, device)?;
    let split = args.split;
    let input = args.input.as_deref().map(|file| in_place_of(&trained.experiment, split, file)).transpose()?;
    trained.change_data(&input.into_iter().flatten().chain(args.overrides.iter().cloned()).collect::<Vec<_>>())?;
    let data = &trained.experiment.data;
    let mut read: Vec<PathBuf> = data.sets.values().flat_map(|set| set.files(&data.root, &Split::ALL)).collect();
    read.push(args.run.clone());
    let read: Vec<&Path> = read.iter().map(PathBuf::as_path).collect();
    let predictions = args.predictions.as_deref().map(|path| output(path, &read)).transpose()?;
    let corpus = prepare::corpus_of(&trained.experiment, split)?;
    let data = prepare::encoded(&corpus, split, &trained.tokenizer, &trained.tasks, device)?;
    if data.set.is_empty() {
        let given = trained.experiment.data.sets.values().any(|set| set.paths(split, &Split::ALL).is_some());
        let what = if given { "usable row in" } else { "split" };
        return Err(invalid(format!("the experiment has no {what} {}", split.name())));
    }
    prepare::warn_of_unseen(&data, split, &trained.tasks);
    let report = evaluate(&trained.model, &data, &trained.tasks)?;
    if predictions.is_none() && report.tasks.iter().all(|task| task.n_sentences == 0) {
        let message = "has no label of any task, so nothing can be scored (--predictions FILE writes the predictions)";
        return Err(invalid(format!("{} {message}", split.name())));
    }
    for task in report.tasks.iter().filter(|task| task.n_sentences == 0) {
        log::warn!("`{}`: no row of {} has a label, so there is no score", task.name, split.name());
    }
    if let (Some(mut file), Some(path)) = (predictions, &args.predictions) {
        let written = write_predictions(&mut BufWriter::new(&mut file), &trained, (&corpus, split), &data);
        written.with_context(|| path.display().to_string())?;
        file.keep()?;
    }
    if args.json {
        let content = json!({
            // An exported model records the checkpoint that it was made from.
            "checkpoint": trained.about["checkpoint"].as_str().unwrap_or(&args.checkpoint),
            "epoch": trained.about["epoch"],
            "split": split.name(),
            "report": report,
        });
        say(serde_json::to_string_pretty(&content)?)?;
    } else {
        say(table::reports(&[(split.name(), &report)]))?;
        if args.by_label {
            say(table::by_label(&report))?;
        }
    }
    Ok(End::Done)
}

/// The overrides that replace a split by a file.
fn in_place_of(experiment: &Experiment, split: Split, file: &Path) -> Result<Vec<String>> {
    let sets: Vec<&str> = experiment.data.sets.keys().map(String::as_str).collect();
    let [set] = sets.as_slice() else {
        let (known, split) = (sets.join(", "), split.name());
        return Err(invalid(format!(
            "the run has several sets, {known}: choose one, as in --set data.sets.{}.{split}=FILE",
            sets[0]
        )));
    };
    if split == Split::Train {
        return Err(invalid(
            "--input can replace dev or test, but not train, from which rows are split off and sampled",
        ));
    }
    // The path of a JSON file may end in `#` and a JSON pointer.
    if !file.exists() && !file.to_string_lossy().contains('#') {
        return Err(invalid(format!("{}: no such file", file.display())));
    }
    let path = std::path::absolute(file)?;
    let given = format!("data.sets.{set}.{}={}", split.name(), serde_json::to_string(&path.to_string_lossy())?);
    let cut = (split == Split::Dev).then(|| format!("data.sets.{set}.dev_fraction=null"));
    Ok([given].into_iter().chain(cut).collect())
}

/// Writes one JSON object per sentence, in the data's order: its place, its words and, by task, the gold labels if it
/// has any and the predicted labels with their scores.
fn write_predictions(
    out: &mut impl Write,
    trained: &Trained,
    (corpus, split): (&Corpus, Split),
    data: &DeviceSplit,
) -> Result<()> {
    // Includes labels of the data that the model does not know.
    let named = |(i, task): (usize, &Task)| Task {
        labels: [&task.labels, data.set.unseen_labels(TaskId(i))].concat(),
        ..task.clone()
    };
    let tasks: Vec<Task> = trained.tasks.iter().enumerate().map(named).collect();
    let rows = corpus.rows(split).into_iter().flat_map(|rows| (0..rows.len()).map(move |row| (rows, row)));
    for ((number, (rows, row)), decoded) in rows.enumerate().zip(predict(&trained.model, data)?) {
        let words: Vec<&str> = rows.words_of(row).iter().map(|&word| rows.words.get(word)).collect();
        let mut object = Map::from_iter([
            ("place".to_owned(), json!(rows.place(row).to_string())),
            ("words".to_owned(), json!(words)),
        ]);
        for (i, (task, decoded)) in tasks.iter().zip(decoded).enumerate() {
            // BIO tags are written unchanged, even where they violate the scheme.
            let written = |ids: &[usize]| -> Value {
                let names: Vec<&String> = ids.iter().map(|&id| &task.labels[id]).collect();
                match task.kind {
                    TaskKind::Classification => json!(names[0]),
                    TaskKind::Tagging(Scheme::Bio | Scheme::Plain) => json!(names),
                    TaskKind::Tagging(_) => json!(labels::written(task, ids).0),
                }
            };
            let (mut entry, predicted) = (Map::new(), written(&decoded.labels));
            if let Some(gold) = data.set.gold(TaskId(i), number) {
                let gold: Vec<usize> = gold.iter().map(|&id| id as usize).collect();
                // As in sentence accuracy, by label ids: different tags of the same spans may be written alike.
                entry.insert("right".to_owned(), json!(gold == decoded.labels));
                entry.insert("gold".to_owned(), written(&gold));
            }
            entry.insert("predicted".to_owned(), predicted);
            let scores: Vec<f64> = decoded.scores.iter().copied().map(probability).collect();
            entry.insert("scores".to_owned(), json!(scores));
            object.insert(task.name.clone(), entry.into());
        }
        writeln!(out, "{}", Value::Object(object))?;
    }
    Ok(out.flush()?)
}
