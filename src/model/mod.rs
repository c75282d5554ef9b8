//! The model: embedding, shared trunk, and a head a task.
//!
//! B sentences, T tokens, W words, E embedding, H hidden, D directions.

mod embedding;
pub mod heads;
mod parameters;
mod trunk;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

pub use embedding::EmbeddingConfig;
use heads::OnnxInputs;
pub use heads::{Decoded, Head, HeadConfig};
pub use parameters::{Linear, Parameters, Scope};
pub use trunk::TrunkConfig;

use crate::data::{Batch, Lengths, Targets};
use crate::libtorch::ScriptModule;
use crate::onnx::{Element, Graph, Size};
use crate::rng::{Purpose, Seed};
use crate::task::{Task, TaskId, TaskKind};

/// Whether dropout is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Train,
    Eval,
}

impl Mode {
    pub fn training(self) -> bool {
        self == Mode::Train
    }
}

/// The `model:` of an experiment.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    pub embedding: EmbeddingConfig,
    pub trunk: TrunkConfig,
}

/// What the trunk gives to a head.
pub struct Encoded {
    /// [B, T, D*H]; what stands beyond a row's end has no meaning.
    pub tokens: Tensor,
    pub lengths: Lengths,
    /// Position of each word's first token, [B, W]; `None` where every word is one token.
    first_tokens: Option<Tensor>,
    hidden: i64,
}

impl Encoded {
    /// The state at each word's first token, [B, W, D*H].
    pub fn words(&self) -> Tensor {
        match &self.first_tokens {
            Some(positions) => trunk::reorder(&self.tokens, positions),
            None => self.tokens.shallow_clone(),
        }
    }

    /// The last state of each direction, [B, D*H].
    pub fn last(&self) -> Tensor {
        trunk::last_states(&self.tokens, &self.lengths, self.hidden)
    }

    /// The rows that carry a label.
    fn select(&self, targets: &Targets) -> Encoded {
        let rows = |x: &Tensor| x.index_select(0, &targets.index);
        Encoded {
            tokens: rows(&self.tokens),
            lengths: self.lengths.select(&targets.rows, &targets.index),
            first_tokens: self.first_tokens.as_ref().map(rows),
            hidden: self.hidden,
        }
    }
}

/// A part of the model as TorchScript: its methods, which name its parameters as `self.NAME`, and constants.
#[derive(Debug, Default)]
pub struct Script {
    pub source: String,
    pub constants: Vec<(&'static str, Tensor)>,
    /// Directions of LSTM layers that take the place of the part's parameters, with int8 weights, by name.
    pub quantized_cells: Vec<(String, [Tensor; 4])>,
}

/// The numbers that weights are multiplied in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    Float,
    /// int8 for LSTM layers and affine maps, with activations quantized as they come; the CPU alone.
    Int8,
}

/// A batch after the trunk.
pub struct Shared {
    /// The trunk's output once for each task, by [`TaskId`]: each a node of its own, so that one backward pass tells the
    /// tasks' gradients apart.
    pub taps: Vec<Encoded>,
    /// What the last LSTM layer read: [B, T, E], or [B, T, D*H] above other layers.
    pub last_layer_input: Tensor,
}

pub struct Model {
    pub parameters: Parameters,
    embedding: embedding::Embedding,
    trunk: trunk::Trunk,
    heads: Vec<Box<dyn Head>>,
    hidden: i64,
    /// D*H
    width: i64,
    /// A module that computes logits in this model's place, with the names of its outputs.
    exported: Option<(ScriptModule, Vec<String>)>,
    /// The parameters of the last LSTM layer; those before are below it, those after belong to heads.
    pub last_layer: std::ops::Range<usize>,
}

impl Model {
    /// Builds a model with fresh weights drawn from `seed`; `heads` and `tasks` by [`TaskId`].
    pub fn new(
        config: &ModelConfig,
        heads: &[&HeadConfig],
        tasks: &[Task],
        vocabulary: (usize, u32),
        (seed, device): (Seed, Device),
    ) -> Result<Model> {
        seed.seed_torch(Purpose::Initialization, 0);
        let (n_tokens, padding) = (vocabulary.0 as i64, vocabulary.1.into());
        let mut parameters = Parameters::new(device);
        let mut root = parameters.root();
        let embedding = embedding::Embedding::new(root.sub("embedding"), &config.embedding, n_tokens, padding);
        let trunk = trunk::Trunk::new(root.sub("trunk"), &config.trunk, config.embedding.dim);
        let end = root.count();
        let last_layer = end - trunk.n_last_layer()..end;
        let mut scope = root.sub("heads");
        let build = |(head, task): (&&HeadConfig, &Task)| head.build(scope.sub(&task.name), task, &config.trunk);
        let heads = heads.iter().zip(tasks).map(build).collect();
        let (hidden, width) = (config.trunk.hidden, config.trunk.width());
        Ok(Model { parameters, embedding, trunk, heads, hidden, width, exported: None, last_layer })
    }

    pub fn head(&self, task: TaskId) -> &dyn Head {
        &*self.heads[task.0]
    }

    /// The model's parts as TorchScript, by the prefix of their parameters. Heads stand below `heads`.
    ///
    /// Affine maps are called as `self.NAME.forward(x)`: what stands behind that is the exporter's part.
    pub fn scripts(&self, tasks: &[Task], weights: Weights) -> Vec<(String, Script)> {
        let mut parts =
            vec![("embedding".to_owned(), self.embedding.script()), ("trunk".to_owned(), self.trunk.script(weights))];
        let heads = tasks.iter().zip(&self.heads);
        parts.extend(heads.map(|(task, head)| (format!("heads.{}", task.name), head.script())));
        parts
    }

    /// The whole model as an ONNX graph; `pieces` where tokens are pieces of words. Inputs and outputs are those of the
    /// TorchScript form.
    pub fn onnx(&self, tasks: &[Task], pieces: bool) -> Graph {
        let mut graph = Graph::new("polytask");
        let (rows, tokens, words) = (Size::Free("B"), Size::Free("T"), Size::Free(if pieces { "W" } else { "T" }));
        let token_ids = graph.input("token_ids", Element::Int64, &[rows, tokens]);
        let lengths = graph.input("lengths", Element::Int64, &[rows]);
        let embedded = self.embedding.onnx(&mut graph, &token_ids);
        let states = self.trunk.onnx(&mut graph, &embedded, &lengths);
        let width = self.width;
        let (at_words, n_words) = match pieces {
            false => (states.clone(), lengths.clone()),
            true => {
                let first = graph.input("first_tokens", Element::Int64, &[rows, words]);
                let n_words = graph.input("n_words", Element::Int64, &[rows]);
                (graph.at(&states, &first, width), n_words)
            }
        };
        let inputs = OnnxInputs { tokens: states, lengths, words: at_words, n_words, width };
        for (task, head) in tasks.iter().zip(&self.heads) {
            let (logits, labels) = head.onnx(&mut graph, &inputs);
            let mut sizes = match task.kind {
                TaskKind::Classification => vec![rows],
                TaskKind::Tagging(_) => vec![rows, words],
            };
            graph.output(&labels, &format!("{}.labels", task.name), Element::Int64, &sizes);
            sizes.push(Size::Is(task.labels.len() as i64));
            graph.output(&logits, &format!("{}.logits", task.name), Element::Float, &sizes);
        }
        graph
    }

    /// Runs embedding and trunk once over a batch. `token_ids` [B, T] stand in for the batch's own.
    pub fn encode(&self, batch: &Batch, token_ids: &Tensor, mode: Mode) -> Shared {
        let embedded = self.embedding.forward(token_ids, mode); // [B, T, E]
        let states = self.trunk.forward(&embedded, &batch.lengths, mode);
        let tap = |_| Encoded {
            tokens: states.tokens.alias(),
            lengths: batch.lengths.share(),
            first_tokens: batch.first_tokens.as_ref().map(Tensor::shallow_clone),
            hidden: self.hidden,
        };
        Shared { taps: (0..self.heads.len()).map(tap).collect(), last_layer_input: states.last_layer_input }
    }

    /// The logits of every task for all rows of a batch, by [`TaskId`], every dropout off.
    pub fn logits(&self, batch: &Batch) -> Result<Vec<Tensor>> {
        if let Some((module, names)) = &self.exported {
            let mut found = module.forward(&batch.inputs().iter().collect::<Vec<_>>())?;
            let mut take = |name: &String| {
                let at = found.iter().position(|(found, _)| found == name)?;
                Some(found.swap_remove(at).1.to_kind(tch::Kind::Float))
            };
            return names.iter().map(|name| take(name).with_context(|| format!("no `{name}`"))).collect();
        }
        let shared = self.encode(batch, &batch.token_ids, Mode::Eval);
        Ok(self.heads.iter().zip(&shared.taps).map(|(head, encoded)| head.logits(encoded, Mode::Eval)).collect())
    }

    /// Lets an exported module compute the logits `names`, instead of this model's own weights.
    pub fn run_by(&mut self, module: ScriptModule, names: Vec<String>) {
        self.exported = Some((module, names));
    }

    /// The unweighted loss of every task that has labels in the batch, by [`TaskId`]: scalars with gradients.
    pub fn losses(&self, shared: &Shared, batch: &Batch, mode: Mode) -> Vec<Option<Tensor>> {
        let loss = |task: usize| {
            let (head, targets) = (self.head(TaskId(task)), batch.targets[task].as_ref()?);
            let encoded = &shared.taps[task];
            let all = targets.rows.len() == batch.rows.len();
            let logits = if all { head.logits(encoded, mode) } else { head.logits(&encoded.select(targets), mode) };
            Some(head.loss(&logits, targets))
        };
        (0..self.heads.len()).map(loss).collect()
    }
}
