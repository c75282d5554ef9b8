//! A trained model on disk: a run directory with its checkpoints, or an exported file.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use tch::{Device, Tensor};

use super::{exported_file, prepare};
use crate::config::Experiment;
use crate::data::Tokenizer;
use crate::model::Model;
use crate::problem::invalid;
use crate::run::{RunDirectory, atomic, checkpoint, names};
use crate::task::Task;

/// A trained run with one of its checkpoints, or an exported model.
pub struct Trained {
    pub experiment: Experiment,
    pub tasks: Vec<Task>,
    pub tokenizer: Tokenizer,
    pub model: Model,
    /// Metadata of the checkpoint or of the exported model.
    pub about: serde_json::Value,
}

/// Saves the tokenizer's pretrained vectors, if any, in the run directory. Runs beside it that have the same, as most of
/// a study do, share the file.
pub fn write_vectors(run: &RunDirectory, tokenizer: &Tokenizer) -> Result<()> {
    if tokenizer.vectors().is_empty() {
        return Ok(());
    }
    let tables = tokenizer.vectors().iter().enumerate();
    let tables: Vec<_> = tables.map(|(i, table)| (i.to_string(), table.shallow_clone())).collect();
    let file = run.file(names::VECTORS);
    checkpoint::save(&file, &tables, &[], &tokenizer.n_trained().into())?;
    let beside = std::fs::read_dir(atomic::folder_of(&run.path)).into_iter().flatten().flatten();
    if let Err(error) = atomic::link_to_same(&file, beside.map(|entry| entry.path().join(names::VECTORS))) {
        log::debug!("{} is not shared with other runs: {error}", file.display());
    }
    Ok(())
}

/// The tokenizer of a trained model, from its experiment and `tokenizer.json`.
fn tokenizer_of(experiment: &Experiment, json: &str) -> Result<Tokenizer> {
    let max_bytes = experiment.model.embedding.characters.max_bytes();
    Tokenizer::from_json(json.as_bytes(), experiment.tokenizer.splitter(), max_bytes)
}

/// Rebuilds the model from an exported file. If its weights are not float32, logits are computed by the file's own
/// module, on the CPU only.
fn of_file(path: &Path, device: Device) -> Result<Trained> {
    let exported = exported_file::open(path)?;
    let [_, yaml, labels, tokenizer, ..] = exported.files.as_slice() else {
        return Err(invalid(format!("{} is incomplete: it lacks files", path.display())));
    };
    let experiment = Experiment::of_text((path, yaml), &[])?;
    let tasks: Vec<Task> = serde_json::from_str(labels).with_context(|| format!("{} is damaged", path.display()))?;
    let mut tokenizer =
        tokenizer_of(&experiment, tokenizer).with_context(|| format!("{} is damaged", path.display()))?;
    let weights = exported.module.parameters()?;
    let named = |name: String| weights.iter().find(|(known, _)| *known == name).map(|(_, tensor)| tensor);
    let (mut n_trained, mut vectors) = (tokenizer.n_trained(), Vec::new());
    for i in 0..experiment.model.embedding.vectors.len() {
        let first = named(format!("embedding.vectors_{i}"))
            .with_context(|| format!("{} lacks its word vectors", path.display()))?;
        n_trained = first.size()[0] as usize;
        let parts: Vec<&Tensor> = std::iter::once(first).chain(named(format!("embedding.further_{i}"))).collect();
        vectors.push(Tensor::cat(&parts, 0).to_kind(tch::Kind::Float));
    }
    tokenizer.set_vectors(n_trained, vectors);
    let mut model = prepare::model(&experiment, &tasks, &tokenizer, device)?;
    let weights = weights.into_iter().map(|(name, tensor)| (name, tensor.to_kind(tch::Kind::Float)));
    let fits = || format!("{} does not match its experiment", path.display());
    if exported.about["dtype"] == "float32" {
        model.parameters.load(weights.collect()).with_context(fits)?;
    } else {
        if device != Device::Cpu {
            let dtype = &exported.about["dtype"];
            return Err(invalid(format!(
                "{} holds {dtype} weights, which run only on the CPU: use --device cpu",
                path.display()
            )));
        }
        model.parameters.load_some(weights.collect()).with_context(fits)?;
        let names = tasks.iter().map(|task| format!("{}.logits", task.name)).collect();
        model.run_by(exported.module, names);
    }
    Ok(Trained { experiment, tasks, tokenizer, model, about: exported.about })
}

/// The experiment, the task table and the tokenizer of a run directory.
pub fn of_run(run: &RunDirectory) -> Result<(Experiment, Vec<Task>, Tokenizer)> {
    let experiment = Experiment::load(&run.file(names::RESOLVED), &[])?;
    let json = run.read(names::TOKENIZER)?;
    let mut tokenizer =
        tokenizer_of(&experiment, &json).with_context(|| format!("{}", run.file(names::TOKENIZER).display()))?;
    if !experiment.model.embedding.vectors.is_empty() {
        let saved = checkpoint::load(&run.file(names::VECTORS))?;
        let n_trained = serde_json::from_value(saved.state)?;
        let tables = saved.model.into_iter().map(|(name, table)| Ok((name.parse()?, table)));
        let tables: BTreeMap<usize, Tensor> = tables.collect::<Result<_>>()?;
        tokenizer.set_vectors(n_trained, tables.into_values().collect());
    }
    Ok((experiment, run.read_tasks()?, tokenizer))
}

impl Trained {
    /// Applies `overrides` to the experiment's `data:`.
    pub fn change_data(&mut self, overrides: &[String]) -> Result<()> {
        if let Some(other) = overrides.iter().find(|text| !text.starts_with("data.")) {
            return Err(invalid(format!("--set {other}: only keys below `data.` can be set for a trained model")));
        }
        if !overrides.is_empty() {
            let yaml = self.experiment.to_yaml()?;
            self.experiment = Experiment::of_text((Path::new(names::RESOLVED), &yaml), overrides)?;
        }
        Ok(())
    }
}

/// Opens checkpoint `name` of a run directory, or an exported file, which has only the checkpoint that it was made
/// from: `name` must then be `best`, the default.
pub fn open(path: &Path, name: &str, device: Device) -> Result<Trained> {
    if path.is_file() {
        if name != "best" {
            let message = "is an exported model, which has only one checkpoint: omit --checkpoint";
            return Err(invalid(format!("{} {message}", path.display())));
        }
        return of_file(path, device);
    }
    let run = RunDirectory::open(path)?;
    let (experiment, tasks, tokenizer) = of_run(&run)?;
    let file = run.checkpoint(name);
    if !file.is_file() {
        let entries = std::fs::read_dir(run.file("checkpoints")).into_iter().flatten().flatten();
        let mut known: Vec<String> =
            entries.filter_map(|entry| Some(entry.path().file_stem()?.to_string_lossy().into_owned())).collect();
        known.sort();
        let known = if known.is_empty() { "none yet".to_owned() } else { known.join(", ") };
        return Err(invalid(format!("{} has no checkpoint `{name}`; it has {known}", path.display())));
    }
    let saved = checkpoint::load(&file)?;
    let model = prepare::model(&experiment, &tasks, &tokenizer, device)?;
    model.parameters.load(saved.model).with_context(|| format!("{} does not match its run", file.display()))?;
    Ok(Trained { experiment, tasks, tokenizer, model, about: saved.state })
}
