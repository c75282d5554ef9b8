//! The model: embedding, shared trunk and one head per task.
//!
//! B sentences, T tokens, W words, L bytes of the longest word, E embedding size, H hidden size, D directions.

mod characters;
mod dropout;
mod embedding;
mod forms;
pub mod heads;
mod lstm;
mod mode;
mod parameters;
mod precision;
mod trunk;
mod view;

use std::sync::Mutex;

use anyhow::{Context, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

pub use characters::CharactersConfig;
pub use embedding::{Embedding, EmbeddingConfig, TableRows};
use heads::HeadSize;
pub use heads::{ClassWeights, Decoded, Head, HeadConfig};
pub use mode::{Mode, Site};
pub use parameters::{Linear, Parameters, Scope, is_part};
pub use precision::Precision;
pub use trunk::{Connection, TrunkConfig};
use view::View;
pub use view::distribution_script;

use crate::data::{Batch, Lengths, Targets};
use crate::libtorch::{Draws, ScriptModule};
use crate::rng::{Purpose, Seed};
use crate::task::{Task, TaskId, TaskKind};

/// The `model:` of an experiment.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// How tokens are represented: by a learned embedding, pretrained vectors and character features, concatenated.
    pub embedding: EmbeddingConfig,
    /// The LSTM layers that all tasks share.
    pub trunk: TrunkConfig,
}

/// The tokens that a model knows.
pub struct Vocabulary<'a> {
    /// Number of tokens known from training; their ids come first. The others have only pretrained vectors.
    pub n_trained: usize,
    /// Id at positions beyond a row's end. With `pads` it is a dedicated padding token, whose embedding stays 0.
    pub padding: u32,
    pub pads: bool,
    pub unknown: u32,
    /// Tables of pretrained vectors for all tokens, [V, E] each.
    pub vectors: &'a [Tensor],
}

/// The trunk's output as one head reads it.
pub struct Encoded {
    /// [B, T, D*H]; undefined beyond a row's end.
    pub tokens: Tensor,
    pub lengths: Lengths,
    /// Position of each word's first token, [B, W]; `None` where every word is one token.
    first_tokens: Option<Tensor>,
    word_lengths: Lengths,
    hidden: i64,
    /// Label distributions of other heads, in the shape that this head reads: [B, C] or [B, W, C].
    beside: Vec<Tensor>,
}

impl Encoded {
    /// The state at each word's first token, [B, W, D*H].
    pub fn words(&self) -> Tensor {
        match &self.first_tokens {
            Some(positions) => lstm::reorder(&self.tokens, positions),
            None => self.tokens.shallow_clone(),
        }
    }

    /// The last state of each direction, [B, D*H].
    pub fn last(&self) -> Tensor {
        lstm::last_states(&self.tokens, &self.lengths.device, self.hidden)
    }

    /// `x` concatenated with the other heads' distributions.
    pub fn with_beside(&self, x: Tensor) -> Tensor {
        match self.beside.is_empty() {
            true => x,
            false => Tensor::cat(&std::iter::once(&x).chain(&self.beside).collect::<Vec<_>>(), -1),
        }
    }

    /// Only the rows that have a label.
    fn select(&self, targets: &Targets) -> Encoded {
        let rows = |x: &Tensor| x.index_select(0, &targets.index);
        Encoded {
            tokens: rows(&self.tokens),
            lengths: self.lengths.select(&targets.rows, &targets.index),
            first_tokens: self.first_tokens.as_ref().map(rows),
            word_lengths: self.word_lengths.select(&targets.rows, &targets.index),
            hidden: self.hidden,
            beside: self.beside.iter().map(rows).collect(),
        }
    }
}

/// One direction of an LSTM layer: its name, and weight_ih, weight_hh, bias_ih, bias_hh.
pub type QuantizedCell = (String, [Tensor; 4]);

/// A part of the model as TorchScript: its methods, which refer to its parameters as `self.NAME`, and its constants.
#[derive(Debug, Default)]
pub struct Script {
    pub source: String,
    pub constants: Vec<(&'static str, Tensor)>,
    /// LSTM directions that the exporter quantizes to int8, in place of the part's parameters.
    pub quantized_cells: Vec<QuantizedCell>,
}

/// Data type of weights in matrix products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightDtype {
    Float,
    /// int8 for LSTM and linear layers, with dynamic quantization of activations; CPU only.
    Int8,
}

/// The trunk's output for a batch.
pub struct Shared {
    /// What each task reads from the trunk, by [`TaskId`]: its own view first, then the views of the heads that it
    /// reads. Each is a separate autograd node, so that one backward pass yields a gradient per task.
    pub taps: Vec<Vec<(TaskId, Encoded)>>,
    /// Tensors at which the backward pass is split below the last shared layer: the layer's input, and the states of
    /// lower layers that heads read.
    pub cuts: Vec<Tensor>,
}

pub struct Model {
    pub parameters: Parameters,
    pub embedding: Embedding,
    trunk: trunk::Trunk,
    views: Vec<View>,
    heads: Vec<Box<dyn Head>>,
    kinds: Vec<TaskKind>,
    /// Tasks in topological order: each after those whose heads it reads.
    order: Vec<TaskId>,
    /// An exported module that computes the logits instead of this model, and the names of its outputs.
    exported: Option<(ScriptModule, Vec<String>)>,
    /// Index, from 0, of the highest layer that all tasks read, directly or through higher layers.
    shared_layer: usize,
    /// Indices of that layer's parameters; smaller ones belong to parts below the layer, larger ones to parts above.
    pub last_layer: std::ops::Range<usize>,
}

impl Model {
    /// Builds a model with random initial weights from `seed`; `heads` and `tasks` by [`TaskId`]. Heads must not read
    /// each other in a cycle.
    pub fn new(
        config: &ModelConfig,
        heads: &[&HeadConfig],
        tasks: &[Task],
        vocabulary: &Vocabulary,
        (seed, device): (Seed, Device),
    ) -> Result<Model> {
        // libtorch's generator is global, so models are built one at a time.
        static DRAWING: Mutex<()> = Mutex::new(());
        let _drawing = DRAWING.lock();
        seed.seed_torch(Purpose::Initialization, 0);
        let mut parameters = Parameters::new(device);
        let mut root = parameters.root();
        let embedding = Embedding::new(root.sub("embedding"), &config.embedding, vocabulary);
        let (trunk, starts) = trunk::Trunk::new(root.sub("trunk"), &config.trunk, embedding.width());
        let mut scope = root.sub("heads");
        let (mut views, mut built): (Vec<View>, Vec<Box<dyn Head>>) = (Vec::new(), Vec::new());
        for (head, task) in heads.iter().zip(tasks) {
            let mut scope = scope.sub(&task.name);
            let view = View::new(&mut scope, head.reads(tasks), &config.trunk);
            let beside = view.heads.iter().map(|other| tasks[other.0].labels.len() as i64).sum();
            built.push(head.build(scope, task, HeadSize { width: view.width, hidden: view.hidden, beside }));
            views.push(view);
        }
        let shared_layer = views.iter().map(|view| view.layer).min().unwrap_or(0);
        let last_layer = starts[shared_layer]..starts[shared_layer + 1];
        let mut order: Vec<TaskId> = Vec::new();
        while order.len() < tasks.len() {
            let ready =
                |id: &TaskId| !order.contains(id) && views[id.0].heads.iter().all(|other| order.contains(other));
            let next = (0..tasks.len()).map(TaskId).find(ready);
            order.push(next.context("heads read each other in a cycle")?);
        }
        let kinds = tasks.iter().map(|task| task.kind).collect();
        let heads = built;
        Ok(Model { parameters, embedding, trunk, views, heads, kinds, order, exported: None, shared_layer, last_layer })
    }

    pub fn head(&self, task: TaskId) -> &dyn Head {
        &*self.heads[task.0]
    }

    /// All tasks, each after those whose heads it reads.
    pub fn order(&self) -> &[TaskId] {
        &self.order
    }

    /// The heads that `task` needs, each after those that it reads; `task` itself is last.
    pub fn needs(&self, task: TaskId) -> Vec<TaskId> {
        let mut needed = vec![task];
        for &id in self.order.iter().rev() {
            if needed.iter().any(|known| self.views[known.0].heads.contains(&id)) && !needed.contains(&id) {
                needed.push(id);
            }
        }
        needed.reverse();
        needed
    }

    /// The tasks whose heads `task` reads.
    pub fn seen_by(&self, task: TaskId) -> &[TaskId] {
        &self.views[task.0].heads
    }

    /// Whether batches must include the bytes of their words.
    pub fn reads_bytes(&self) -> bool {
        self.embedding.characters_script().is_some()
    }

    /// Sets the precision in which training computes the trunk.
    pub fn set_precision(&mut self, precision: Precision) {
        self.trunk.set_precision(precision);
    }

    /// Runs the trunk forward and backward over `rows` dummy sentences of `tokens` tokens, to be timed.
    pub fn exercise_trunk(&self, rows: i64, tokens: i64) {
        let embedded =
            Tensor::ones([rows, tokens, self.embedding.width()], (tch::Kind::Float, self.parameters.device()));
        let lengths = Lengths::new(vec![tokens; rows as usize], self.parameters.device());
        let mode = Mode::Train(Draws::new(0));
        let states = self.trunk.forward(&embedded, &lengths, mode, &mut |_, input| input.shallow_clone());
        let total = states.last().map_or_else(Tensor::new, |states| states.sum(tch::Kind::Float));
        let inputs = self.inputs(None);
        Tensor::run_backward(&[total], &inputs[self.last_layer.clone()], false, false);
    }

    /// Updates the 16-bit copies of the weights before a training step.
    pub fn refresh(&self) -> Result<()> {
        self.trunk.refresh_halves()
    }

    /// The 16-bit copies that training reads, with the index of their parameter.
    pub fn halves(&self) -> Vec<(usize, &Tensor)> {
        let halves = self.trunk.halves();
        halves.flat_map(|own| own.copies.iter().enumerate().map(|(i, copy)| (own.first + i, copy))).collect()
    }

    /// The tensors to differentiate by: the parameters, or what training reads instead: 16-bit copies and `rows` of
    /// tables.
    pub fn inputs<'a>(&'a self, rows: Option<&'a TableRows>) -> Vec<&'a Tensor> {
        let mut inputs = self.parameters.tensors();
        for (number, copy) in self.halves() {
            inputs[number] = copy;
        }
        if let Some(rows) = rows {
            for (&table, leaf) in rows.touched.tables.iter().zip(&rows.leaves) {
                inputs[table] = leaf;
            }
        }
        inputs
    }

    /// Runs embedding and trunk once over a batch. `token_ids` [B, T] replace the batch's own; with `rows`, these
    /// receive the gradients of the embedding tables.
    pub fn encode(&self, batch: &Batch, token_ids: &Tensor, rows: Option<&TableRows>, mode: Mode) -> Shared {
        let mode = mode.from_row(batch.first_row);
        let embedded = self.embedding.forward(token_ids, batch, rows, mode); // [B, T, E]
        let mut cuts = Vec::new();
        let mut cut = |number: usize, input: &Tensor| match number == self.shared_layer {
            false => input.shallow_clone(),
            true => {
                cuts.push(input.alias());
                cuts[0].shallow_clone()
            }
        };
        let states = self.trunk.forward(&embedded, &batch.lengths, mode, &mut cut);
        // Heads read lower layers through separate autograd nodes, so that each gradient path is counted once.
        let read = |number: &usize| self.views.iter().any(|view| view.layers().contains(number));
        let lower: Vec<(usize, Tensor)> =
            (0..self.shared_layer).filter(read).map(|number| (number, states[number].alias())).collect();
        cuts.extend(lower.iter().map(|(_, state)| state.shallow_clone()));
        let state = |number: usize| {
            let own = lower.iter().find(|(known, _)| *known == number);
            own.map_or(&states[number], |(_, state)| state)
        };
        let tap = |&id: &TaskId| {
            let view = &self.views[id.0];
            let read: Vec<&Tensor> = view.layers().map(state).collect();
            let encoded = Encoded {
                tokens: view.of(&read),
                lengths: batch.lengths.share(),
                first_tokens: batch.first_tokens.as_ref().map(Tensor::shallow_clone),
                word_lengths: batch.word_lengths.share(),
                hidden: view.hidden,
                beside: Vec::new(),
            };
            (id, encoded)
        };
        let taps = (0..self.heads.len()).map(|task| self.needs(TaskId(task)).iter().rev().map(tap).collect()).collect();
        Shared { taps, cuts }
    }

    /// The logits of a task's head; `taps` are its own view, then the views of the heads that it reads.
    pub fn head_logits(&self, taps: &[(TaskId, Encoded)], mode: Mode) -> Tensor {
        let find = |task: TaskId| taps.iter().find(|(id, _)| *id == task).map(|(_, encoded)| encoded);
        self.logits_of(taps[0].0, &find, mode)
    }

    fn logits_of<'a>(&self, task: TaskId, find: &dyn Fn(TaskId) -> Option<&'a Encoded>, mode: Mode) -> Tensor {
        let tap = find(task).expect("invariant: a tap for every head that is needed");
        let others = self.views[task.0].heads.iter().map(|&other| self.logits_of(other, find, mode)).collect();
        self.logits_beside(task, tap, others, mode)
    }

    /// The logits of a head that reads `others`, the logits of other heads.
    fn logits_beside(&self, task: TaskId, tap: &Encoded, others: Vec<Tensor>, mode: Mode) -> Tensor {
        let view = &self.views[task.0];
        let beside = view.heads.iter().zip(others).map(|(other, logits)| {
            view::distribution(&logits, (self.kinds[other.0], self.kinds[task.0]), &tap.word_lengths)
        });
        let encoded = Encoded {
            beside: beside.collect(),
            tokens: view.own(&tap.tokens, &tap.lengths, mode),
            lengths: tap.lengths.share(),
            first_tokens: tap.first_tokens.as_ref().map(Tensor::shallow_clone),
            word_lengths: tap.word_lengths.share(),
            hidden: tap.hidden,
        };
        self.heads[task.0].logits(&encoded, mode.of_head(task))
    }

    /// The logits of every task for all rows of a batch, by [`TaskId`], without dropout.
    pub fn logits(&self, batch: &Batch) -> Result<Vec<Tensor>> {
        if let Some((module, names)) = &self.exported {
            let mut found = module.forward(&batch.inputs().iter().collect::<Vec<_>>())?;
            let mut take = |name: &String| {
                let at = found.iter().position(|(found, _)| found == name)?;
                Some(found.swap_remove(at).1.to_kind(tch::Kind::Float))
            };
            return names.iter().map(|name| take(name).with_context(|| format!("no `{name}`"))).collect();
        }
        let shared = self.encode(batch, &batch.token_ids, None, Mode::Eval);
        let mut found: Vec<Option<Tensor>> = self.heads.iter().map(|_| None).collect();
        for &task in &self.order {
            let seen = self.views[task.0].heads.iter();
            let others = seen.filter_map(|other| found[other.0].as_ref().map(Tensor::shallow_clone)).collect();
            found[task.0] = Some(self.logits_beside(task, &shared.taps[task.0][0].1, others, Mode::Eval));
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// Makes an exported module compute the logits, its outputs `names` by [`TaskId`], instead of this model's weights.
    pub fn run_by(&mut self, module: ScriptModule, names: Vec<String>) {
        self.exported = Some((module, names));
    }

    /// The unweighted loss of every task that has labels in the batch, by [`TaskId`]: scalars with gradients.
    pub fn losses(&self, shared: &Shared, batch: &Batch, mode: Mode) -> Vec<Option<Tensor>> {
        let loss = |(task, taps): (usize, &Vec<(TaskId, Encoded)>)| {
            let targets = batch.targets[task].as_ref()?;
            let mode = mode.from_row(targets.first_row);
            let logits = match targets.rows.len() == batch.rows.len() {
                true => self.head_logits(taps, mode),
                false => {
                    let select = |(id, tap): &(TaskId, Encoded)| (*id, tap.select(targets));
                    self.head_logits(&taps.iter().map(select).collect::<Vec<_>>(), mode)
                }
            };
            Some(self.heads[task].loss(&logits, targets, mode))
        };
        shared.taps.iter().enumerate().map(loss).collect()
    }
}
