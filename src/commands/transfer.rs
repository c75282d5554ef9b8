//! First weights from an earlier run: `init_from`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use tch::{Device, Tensor};

use super::prepare;
use crate::data::Tokenizer;
use crate::model::Model;
use crate::problem::invalid;
use crate::task::Task;

/// Copies what fits of the best checkpoint of the run `from`: rows of the embedding by token, characters, the trunk, and
/// heads whose task has the same name and labels. Says what it took.
///
/// # Errors
/// A folder that is no run, or a run whose trunk or embedding has another shape.
pub fn initialize(model: &Model, tasks: &[Task], tokenizer: &Tokenizer, from: &Path) -> Result<()> {
    let earlier = prepare::trained(from, "best", Device::Cpu)?;
    let weights: BTreeMap<&str, &Tensor> = earlier.model.parameters.iter().collect();
    let rows = Rows::new(&earlier.tokenizer, tokenizer);
    let same_head = |task: &&Task| earlier.tasks.contains(task);
    let (mut taken, mut values): (Vec<&str>, _) = (Vec::new(), BTreeMap::new());
    for (name, tensor) in model.parameters.iter() {
        let head = tasks
            .iter()
            .find(|task| name.strip_prefix("heads.").is_some_and(|rest| rest.starts_with(&format!("{}.", task.name))));
        if head.is_some_and(|task| !same_head(&task)) {
            continue;
        }
        let Some(&value) = weights.get(name) else {
            // A part of a head that the earlier run did not have learns from its start.
            if head.is_some() {
                continue;
            }
            return Err(invalid(format!("init_from: {} has no `{name}`", from.display())));
        };
        let by_row = name == "embedding.weight" || name.starts_with("embedding.vectors_");
        let value = if by_row { rows.move_to(value, tensor) } else { Some(value.copy()) };
        let Some(value) = value.filter(|value| value.size() == tensor.size()) else {
            if head.is_some() {
                continue;
            }
            let (theirs, ours) = (weights[name].size(), tensor.size());
            return Err(invalid(format!("init_from: `{name}` is {theirs:?} in {}, here {ours:?}", from.display())));
        };
        taken.extend(head.map(|task| task.name.as_str()).filter(|name| !taken.contains(name)).into_iter().take(1));
        values.insert(name.to_owned(), value);
    }
    model.parameters.load_some(values)?;
    let heads = if taken.is_empty() { "no head".to_owned() } else { format!("heads {}", taken.join(", ")) };
    log::info!(
        "from {}: {} of {} tokens, the trunk, {heads}",
        from.display(),
        super::table::count(rows.0.len()),
        super::table::count(tokenizer.n_trained)
    );
    Ok(())
}

/// Where tokens stood in the earlier table, and where they stand now.
struct Rows(Vec<(i64, i64)>);

impl Rows {
    fn new(earlier: &Tokenizer, now: &Tokenizer) -> Self {
        let known = earlier.vocabulary().into_iter().take(earlier.n_trained).zip(0i64..);
        let known: BTreeMap<String, i64> = known.collect();
        let now = now.vocabulary().into_iter().take(now.n_trained).zip(0i64..);
        Rows(now.filter_map(|(token, id)| Some((*known.get(&token)?, id))).collect())
    }

    /// `into` with the rows of `from` for the tokens that both know; `None` where rows have other sizes.
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
