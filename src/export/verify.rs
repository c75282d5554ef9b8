//! Verifies an exported module against the original model, and scores it.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Kind, Tensor};

use super::{Dtype, output_names};
use crate::data::{Batch, DeviceSplit};
use crate::evaluate::metrics;
use crate::libtorch::ScriptModule;
use crate::metrics::Score;
use crate::model::{Mode, Model};
use crate::task::{Task, TaskId, TaskKind};

/// Batches of several sizes and lengths with the original model's outputs.
pub struct Cases(Vec<Case>);

struct Case {
    /// As returned by [`Batch::inputs`](crate::data::Batch::inputs).
    inputs: Vec<Tensor>,
    n_words: Tensor,
    /// In the order of [`output_names`].
    outputs: Vec<Tensor>,
}

/// How an exported model differs from the original one.
#[derive(Clone, Debug, PartialEq)]
pub struct Mismatch(pub String);

impl Cases {
    /// Runs `model` over batches of `data`: the shortest row, the longest row, rows of equal length, and rows of many
    /// lengths.
    pub fn new(model: &Model, data: &DeviceSplit, tasks: &[Task]) -> Self {
        let mut rows: Vec<usize> = (0..data.set.len()).collect();
        rows.sort_by_key(|&row| data.set.n_tokens(row));
        let spread: Vec<usize> = rows.iter().copied().step_by((rows.len() / 24).max(1)).collect();
        let middle = rows[rows.len() / 2];
        let alike = rows.iter().copied().filter(|&row| data.set.n_tokens(row) == data.set.n_tokens(middle));
        let batches = [vec![rows[0]], vec![rows[rows.len() - 1]], alike.take(16).collect(), spread];
        Cases(batches.iter().map(|rows| Case::new(model, &data.batch(rows), tasks)).collect())
    }

    /// Writes the cases to a file that [`Self::read`] reads in another process.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut tensors = Vec::new();
        for (i, case) in self.0.iter().enumerate() {
            for (part, list) in [("input", &case.inputs), ("output", &case.outputs)] {
                tensors.extend(list.iter().enumerate().map(|(j, x)| (format!("{i}.{part}.{j}"), x.contiguous())));
            }
            tensors.push((format!("{i}.n_words"), case.n_words.contiguous()));
        }
        Ok(Tensor::write_safetensors(&tensors, path)?)
    }

    pub fn read(path: &Path) -> Result<Self> {
        let tensors: std::collections::BTreeMap<String, Tensor> = Tensor::read_safetensors(path)?.into_iter().collect();
        let list = |i: usize, part: &str| -> Vec<Tensor> {
            (0..).map_while(|j| Some(tensors.get(&format!("{i}.{part}.{j}"))?.shallow_clone())).collect()
        };
        let case = |i: usize| {
            let n_words = tensors.get(&format!("{i}.n_words"))?.shallow_clone();
            Some(Case { inputs: list(i, "input"), n_words, outputs: list(i, "output") })
        };
        Ok(Cases((0..).map_while(case).collect()))
    }

    /// The largest difference of any logit, relative to its task's largest absolute logit in the batch (at least 1).
    ///
    /// # Errors
    /// [`Mismatch`] if shapes differ, logits differ by more than the tolerance of `dtype`, or labels differ in float32.
    pub fn check(&self, module: &ScriptModule, tasks: &[Task], dtype: Dtype) -> Result<f64> {
        let (mut worst, names): (f64, _) = (0.0, output_names(tasks));
        let whole = |case: &Case| !case.inputs.is_empty() && case.outputs.len() == names.len();
        ensure!(!self.0.is_empty() && self.0.iter().all(whole), "the file with the cases to verify is damaged");
        for case in &self.0 {
            let found = module.forward(&case.inputs.iter().collect::<Vec<_>>())?;
            for (i, (name, expected)) in names.iter().zip(&case.outputs).enumerate() {
                // Outputs of a tuple have no names and are matched by position.
                let named = found.iter().find(|(found, _)| found == name);
                let placed = found.get(i).filter(|(name, _)| name.is_empty());
                let found = named.or(placed).with_context(|| format!("no `{name}`"))?;
                let found = found.1.to_kind(expected.kind());
                let shape = expected.size();
                if found.size() != shape {
                    bail!(Mismatch(format!(
                        "`{name}` has shape {:?}, but {shape:?} in the original model",
                        found.size()
                    )));
                }
                let here = case.real(expected);
                let off = (&found - expected).to_kind(Kind::Double).abs() * &here;
                if name.ends_with(".labels") {
                    if dtype == Dtype::Float32 && off.max().double_value(&[]) > 0.0 {
                        bail!(Mismatch(format!(
                            "`{name}` differ from the original model's in a batch of shape {:?}",
                            shape
                        )));
                    }
                    continue;
                }
                let size = (expected.to_kind(Kind::Double).abs() * &here).max().double_value(&[]).max(1.0);
                let off = off.max().double_value(&[]) / size;
                if off.is_nan() || off > dtype.tolerance() {
                    bail!(Mismatch(format!(
                        "`{name}` differ from the original model's by {off:.1e} in a batch of shape {shape:?}"
                    )));
                }
                worst = worst.max(off);
            }
        }
        Ok(worst)
    }
}

impl Case {
    fn new(model: &Model, batch: &Batch, tasks: &[Task]) -> Case {
        let _no_grad = tch::no_grad_guard();
        let shared = model.encode(batch, &batch.token_ids, None, Mode::Eval);
        let mut outputs = Vec::new();
        for (i, task) in tasks.iter().enumerate() {
            let head = model.head(TaskId(i));
            let logits = model.head_logits(&shared.taps[i], Mode::Eval);
            let width = batch.word_lengths.max as usize;
            let row = |labels: &Vec<usize>| -> Vec<i64> {
                let mut row: Vec<i64> = labels.iter().map(|&label| label as i64).collect();
                if task.kind != TaskKind::Classification {
                    row.resize(width, -1);
                }
                row
            };
            let decoded = head.decode(&logits, &batch.word_lengths.host);
            let labels: Vec<i64> = decoded.iter().flat_map(|decoded| row(&decoded.labels)).collect();
            let labels = Tensor::from_slice(&labels);
            outputs.push(logits.to_device(Device::Cpu));
            outputs.push(match task.kind {
                TaskKind::Classification => labels,
                TaskKind::Tagging(_) => labels.view([-1, width as i64]),
            });
        }
        let on_cpu = |x: &Tensor| x.to_device(Device::Cpu);
        Case {
            inputs: batch.inputs().iter().map(on_cpu).collect(),
            n_words: on_cpu(&batch.word_lengths.device),
            outputs,
        }
    }

    /// Mask of an output: 1 for sentences and words, 0 beyond a sentence's end; its shape broadcasts.
    fn real(&self, output: &Tensor) -> Tensor {
        if output.dim() == 1 || (output.dim() == 2 && output.kind() != Kind::Int64) {
            return Tensor::ones([1], (Kind::Double, Device::Cpu));
        }
        let positions = Tensor::arange(output.size()[1], (Kind::Int64, Device::Cpu)).unsqueeze(0);
        let here = positions.lt_tensor(&self.n_words.unsqueeze(1)).to_kind(Kind::Double); // [B, W]
        if output.dim() == 3 { here.unsqueeze(-1) } else { here }
    }
}

/// Scores of every task on `data`, from the labels that the module itself returns.
pub fn scores(module: &ScriptModule, model: &Model, data: &DeviceSplit, tasks: &[Task]) -> Result<Vec<Vec<Score>>> {
    let mut metrics = metrics(model, data, tasks.len());
    let mut rows: Vec<usize> = (0..data.set.len()).collect();
    rows.sort_by_key(|&row| data.set.n_tokens(row));
    for rows in rows.chunks(128) {
        let batch = data.batch(rows);
        let found = module.forward(&batch.inputs().iter().collect::<Vec<_>>())?;
        for (i, metric) in metrics.iter_mut().enumerate() {
            let labels = &found.iter().find(|(name, _)| *name == format!("{}.labels", tasks[i].name));
            let labels = &labels.with_context(|| format!("no labels of task `{}`", tasks[i].name))?.1;
            for (b, &row) in rows.iter().enumerate() {
                let Some(gold) = data.set.gold(TaskId(i), row) else { continue };
                let predicted: Vec<i64> =
                    Vec::try_from(labels.get(b as i64).view([-1]).narrow(0, 0, gold.len() as i64))?;
                metric.update(gold, &predicted.into_iter().map(|label| label as usize).collect::<Vec<_>>());
            }
        }
    }
    Ok(metrics.iter().map(|metric| metric.scores()).collect())
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Mismatch {}
