//! `init_from`: initial weights from an earlier run.

use std::collections::BTreeMap;

use anyhow::Result;
use tch::{Device, Tensor};

use super::saved_model::{self, Trained};
use crate::config::Experiment;
use crate::data::Tokenizer;
use crate::model::Model;
use crate::problem::invalid;
use crate::run::names;
use crate::task::{Task, TaskKind};

/// The earlier run that the experiment's `init_from` names, if any.
///
/// # Errors
/// A folder that is not a run directory, or a run whose trunk has another shape.
pub fn earlier(experiment: &Experiment) -> Result<Option<Trained>> {
    let Some(from) = &experiment.init_from else { return Ok(None) };
    let wrong = |message: String| invalid(format!("init_from: {}: {message}", from.display()));
    if !from.is_dir() {
        return Err(wrong("not a run directory".to_owned()));
    }
    let earlier = saved_model::open(from, "best", Device::Cpu)?;
    if !from.join(names::REPORT).exists() {
        log::warn!("init_from: {} is not finished; its best checkpoint so far is used", from.display());
    }
    let (theirs, ours) = (&earlier.experiment.model, &experiment.model);
    let trunk = |trunk: &crate::model::TrunkConfig| {
        let (hidden, layers, both) = (trunk.hidden, trunk.layers, trunk.bidirectional);
        format!("hidden: {hidden}, layers: {layers}, bidirectional: {both}, connection: {:?}", trunk.connection)
    };
    if trunk(&theirs.trunk) != trunk(&ours.trunk) {
        return Err(wrong(format!(
            "its trunk is {}; this experiment's is {}",
            trunk(&theirs.trunk),
            trunk(&ours.trunk)
        )));
    }
    Ok(Some(earlier))
}

/// Copies the model's pretrained vectors into the tokenizer, to be saved with it: frozen vectors are in no checkpoint.
pub fn keep_vectors(model: &Model, tokenizer: &mut Tokenizer) {
    for (i, table) in tokenizer.vectors().iter().enumerate() {
        let name = format!("embedding.vectors_{i}");
        if let Some((_, values)) = model.parameters.with_constants().find(|(known, _)| *known == name) {
            let trained = table.narrow(0, 0, tokenizer.n_trained() as i64);
            tch::no_grad(|| trained.shallow_clone().copy_(&values.to_device(Device::Cpu)));
        }
    }
}

/// What was copied from an earlier run.
pub struct Taken {
    summary: String,
    /// For each head that was not copied, the reason.
    pub left: Vec<String>,
}

impl Taken {
    pub fn log(&self) {
        self.left.iter().for_each(|why| log::warn!("{why}"));
        log::info!("{}", self.summary);
    }
}

/// Copies the weights of an earlier run: embedding rows by token, the character encoder, the trunk, and heads whose
/// task has the same name and labels and whose inputs and parameter shapes are the same.
///
/// # Errors
/// A parameter of the embedding or the trunk that the earlier run lacks or has in another shape.
pub fn initialize(
    model: &Model,
    (experiment, tasks): (&Experiment, &[Task]),
    tokenizer: &Tokenizer,
    earlier: &Trained,
) -> Result<Taken> {
    let weights: BTreeMap<&str, &Tensor> = earlier.model.parameters.with_constants().collect();
    let rows = Rows::new(&earlier.tokenizer, tokenizer);
    let mut values = BTreeMap::new();
    let vectors = |name: &str| name.starts_with("embedding.vectors_");
    // Vectors may be trained in one run and frozen in the other.
    let all = model.parameters.iter().chain(model.parameters.with_constants().filter(|(name, _)| vectors(name)));
    for (name, tensor) in all.filter(|(name, _)| !name.starts_with("heads.")) {
        let value = weights.get(name).and_then(|value| match name == "embedding.weight" || vectors(name) {
            true => rows.move_to(value, tensor),
            false => (value.size() == tensor.size()).then(|| value.copy()),
        });
        let found = || weights.get(name).map_or("missing".to_owned(), |value| format!("{:?}", value.size()));
        let wrong = || {
            invalid(format!(
                "init_from: `{name}` is {} in the earlier run, {:?} in this experiment",
                found(),
                tensor.size()
            ))
        };
        values.insert(name.to_owned(), value.ok_or_else(wrong)?);
    }
    let (mut taken, mut left) = (Vec::new(), Vec::new());
    for task in tasks {
        let Some(theirs) = earlier.tasks.iter().find(|theirs| theirs.name == task.name) else { continue };
        let (own, before) = (&experiment.tasks[&task.name], &earlier.experiment.tasks[&task.name]);
        let reads_others = !own.reads_as(before, (tasks, &earlier.tasks), &experiment.model.trunk);
        let reason = difference(theirs, task)
            .or_else(|| reads_others.then(|| "it reads other inputs in the earlier run".to_owned()));
        if let Some(reason) = reason {
            left.push(format!("init_from: the head of `{}` is initialised from scratch: {reason}", task.name));
            continue;
        }
        let prefix = format!("heads.{}.", task.name);
        let own: Vec<_> = model.parameters.iter().filter(|(name, _)| name.starts_with(&prefix)).collect();
        let n_theirs = weights.keys().filter(|name| name.starts_with(&prefix)).count();
        let fits = |(name, tensor): &(&str, &Tensor)| weights.get(name).is_some_and(|v| v.size() == tensor.size());
        if own.len() == n_theirs && own.iter().all(fits) {
            values.extend(own.iter().map(|(name, _)| ((*name).to_owned(), weights[name].copy())));
            taken.push(task.name.as_str());
        } else {
            left.push(format!(
                "init_from: the head of `{}` is initialised from scratch: its parts differ in the earlier run",
                task.name
            ));
        }
    }
    model.parameters.load_some(values)?;
    let heads = if taken.is_empty() { "no head".to_owned() } else { format!("heads {}", taken.join(", ")) };
    let summary = format!(
        "initialised with {} of {} tokens, the trunk and {heads} of {}",
        super::table::count(rows.0.len()),
        super::table::count(tokenizer.n_trained()),
        earlier.experiment.name
    );
    Ok(Taken { summary, left })
}

/// The reason why a head cannot be copied, if any.
fn difference(theirs: &Task, ours: &Task) -> Option<String> {
    // Span labels are BIO internally, whatever scheme the data uses.
    let kind = |task: &Task| (task.kind == TaskKind::Classification, task.kind.has_spans());
    if kind(theirs) != kind(ours) {
        return Some("it is of another type in the earlier run".to_owned());
    }
    let only = |some: &Task, other: &Task, where_: &str| {
        let mut labels = some.labels.iter().filter(|label| !other.labels.contains(label));
        let first = labels.next()?;
        let more = labels.count();
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        Some(format!("only {where_} has label `{first}`{more}"))
    };
    let order = (theirs.labels != ours.labels).then(|| "its labels are in another order in the earlier run".to_owned());
    only(ours, theirs, "this experiment").or_else(|| only(theirs, ours, "the earlier run")).or(order)
}

/// Ids of the tokens known to both runs: in the earlier table, and in the new one.
struct Rows(Vec<(i64, i64)>);

impl Rows {
    fn new(earlier: &Tokenizer, now: &Tokenizer) -> Self {
        let known = earlier.vocabulary().into_iter().take(earlier.n_trained()).zip(0i64..);
        let known: BTreeMap<String, i64> = known.collect();
        let now = now.vocabulary().into_iter().take(now.n_trained()).zip(0i64..);
        Rows(now.filter_map(|(token, id)| Some((*known.get(&token)?, id))).collect())
    }

    /// A copy of `into` with the rows of `from` for shared tokens; `None` if the row sizes differ.
    fn move_to(&self, from: &Tensor, into: &Tensor) -> Option<Tensor> {
        if from.size()[1] != into.size()[1] {
            return None;
        }
        let (old, new): (Vec<i64>, Vec<i64>) = self.0.iter().copied().unzip();
        let device = into.device();
        let rows = from.detach().index_select(0, &Tensor::from_slice(&old)).to_device(device);
        Some(into.detach().index_copy(0, &Tensor::from_slice(&new).to_device(device), &rows))
    }
}
