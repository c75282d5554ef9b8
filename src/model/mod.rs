//! The model: embedding, shared trunk, and a head a task.
//!
//! B sentences, T tokens, W words, E embedding, H hidden, D directions.

mod embedding;
pub mod heads;
mod parameters;
mod trunk;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

pub use embedding::EmbeddingConfig;
pub use heads::{Decoded, Head, HeadConfig};
pub use parameters::{Linear, Parameters, Scope};
pub use trunk::TrunkConfig;

use crate::data::{Batch, Lengths, Targets};
use crate::rng::{Purpose, Seed};
use crate::task::{Task, TaskId};

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
    /// The state at each word's first token, [B, W, D*H].
    pub words: Tensor,
    /// The last state of each direction, [B, D*H].
    pub last: Tensor,
}

impl Encoded {
    /// The rows that carry a label.
    fn select(&self, targets: &Targets) -> Encoded {
        let rows = |x: &Tensor| x.index_select(0, &targets.index);
        Encoded {
            tokens: rows(&self.tokens),
            lengths: self.lengths.select(&targets.rows, &targets.index),
            words: rows(&self.words),
            last: rows(&self.last),
        }
    }
}

pub struct Model {
    pub parameters: Parameters,
    embedding: embedding::Embedding,
    trunk: trunk::Trunk,
    heads: Vec<Box<dyn Head>>,
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
        let mut scope = root.sub("heads");
        let build = |(head, task): (&&HeadConfig, &Task)| head.build(scope.sub(&task.name), task, config.trunk.width());
        let heads = heads.iter().zip(tasks).map(build).collect();
        Ok(Model { parameters, embedding, trunk, heads })
    }

    pub fn head(&self, task: TaskId) -> &dyn Head {
        &*self.heads[task.0]
    }

    /// Runs embedding and trunk once over a batch. `token_ids` [B, T] stand in for the batch's own.
    pub fn encode(&self, batch: &Batch, token_ids: &Tensor, mode: Mode) -> Encoded {
        let embedded = self.embedding.forward(token_ids, mode); // [B, T, E]
        let states = self.trunk.forward(&embedded, &batch.lengths, mode);
        let words = match &batch.first_tokens {
            Some(positions) => trunk::reorder(&states.tokens, positions),
            None => states.tokens.shallow_clone(),
        };
        let lengths = Lengths::new(batch.lengths.host.clone(), token_ids.device());
        Encoded { tokens: states.tokens, lengths, words, last: states.last }
    }

    /// The unweighted loss of every task that has labels in the batch, by [`TaskId`]: scalars with gradients.
    pub fn losses(&self, encoded: &Encoded, batch: &Batch, mode: Mode) -> Vec<Option<Tensor>> {
        let loss = |task: usize| {
            let (head, targets) = (self.head(TaskId(task)), batch.targets[task].as_ref()?);
            let all = targets.rows.len() == batch.rows.len();
            let logits = if all { head.logits(encoded, mode) } else { head.logits(&encoded.select(targets), mode) };
            Some(head.loss(&logits, targets))
        };
        (0..self.heads.len()).map(loss).collect()
    }
}
