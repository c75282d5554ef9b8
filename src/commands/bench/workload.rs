//! Writes a benchmark's steps for other programs: batches, initial weights, and the losses of training from them here.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use serde_json::json;
use tch::Tensor;

use super::super::rehearsal::Rehearsal;
use super::super::say;
use crate::run::checkpoint;
use crate::train::{Pending, State, Step, Trainer};

/// Writes `weights.safetensors`, and `steps.safetensors` with the experiment, the tasks and the losses in its metadata.
/// Tensors of step I are `model/I.token_ids` [B, T], `model/I.lengths` `[B]`, `model/I.bytes` [B, T, L] if the model
/// reads characters, and for each task present `model/I.TASK.rows` `[b]` and `model/I.TASK.labels`.
///
/// # Errors
/// Steps of several batches, a loss that is not finite, or a folder that cannot be written.
pub fn write(folder: &Path, rehearsal: &Rehearsal, trainer: &mut Trainer, steps: &[&[Vec<usize>]]) -> Result<()> {
    anyhow::ensure!(steps.iter().all(|batches| batches.len() == 1), "--write needs training.accumulate_steps: 1");
    std::fs::create_dir_all(folder).with_context(|| format!("{} cannot be created", folder.display()))?;
    let weights: Vec<(String, Tensor)> =
        rehearsal.model.parameters.iter().map(|(name, tensor)| (name.to_owned(), tensor.detach().copy())).collect();
    let mut tensors = Vec::new();
    let mut losses = Vec::new();
    for (number, batches) in steps.iter().enumerate() {
        let batch = rehearsal.train.batch(&batches[0]);
        let mut add =
            |name: String, tensor: &Tensor| tensors.push((format!("{number}.{name}"), tensor.shallow_clone()));
        add("token_ids".to_owned(), &batch.token_ids);
        add("lengths".to_owned(), &batch.lengths.device);
        if let Some(bytes) = &batch.bytes {
            add("bytes".to_owned(), bytes);
        }
        for (task, targets) in rehearsal.tasks.iter().zip(&batch.targets) {
            if let Some(targets) = targets {
                add(format!("{}.rows", task.name), &targets.index);
                add(format!("{}.labels", task.name), &targets.labels);
            }
        }
        let mut pending = Pending::new(rehearsal.device);
        trainer.take(&Step { number, n_steps: steps.len(), batches, diagnose: false }, &mut pending)?;
        let mut state = State::new(rehearsal.tasks.len());
        let drained = pending.drain(&mut state, &rehearsal.tasks);
        drained.map_err(|bad| anyhow!("step {number}: {} is not finite", bad.what))?;
        losses.push(state.interval.means());
    }
    let about = json!({"experiment": rehearsal.experiment, "tasks": rehearsal.tasks, "losses": losses});
    checkpoint::save(&folder.join("weights.safetensors"), &weights, &[], &json!({}))?;
    checkpoint::save(&folder.join("steps.safetensors"), &tensors, &[], &about)?;
    say(format!("{} steps written to {}", steps.len(), folder.display()))?;
    Ok(())
}
