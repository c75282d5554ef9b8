//! Token embedding with dropout.
//!
//! B sentences, T tokens, E embedding.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::parameters::Scope;
use super::{Mode, Script};
use crate::onnx::{Graph, Value};

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EmbeddingConfig {
    /// Numbers a token. Default 128, at least 1.
    pub dim: i64,
    /// Dropout on the embedded tokens. Default 0.3, from 0 to below 1.
    pub dropout: f64,
}

impl Default for EmbeddingConfig {
    fn default() -> Self {
        EmbeddingConfig { dim: 128, dropout: 0.3 }
    }
}

pub struct Embedding {
    weight: Tensor,
    padding: i64,
    dropout: f64,
}

impl Embedding {
    pub fn new(mut scope: Scope, config: &EmbeddingConfig, n_tokens: i64, padding: i64) -> Self {
        let weight = scope.normal_rows("weight", &[n_tokens, config.dim], padding);
        Embedding { weight, padding, dropout: config.dropout }
    }

    pub fn script(&self) -> Script {
        let source = "
def forward(self, token_ids: Tensor) -> Tensor:
    return torch.embedding(self.weight, token_ids)
";
        Script { source: source.to_owned(), ..Script::default() }
    }

    pub fn onnx(&self, graph: &mut Graph, token_ids: &Value) -> Value {
        let weight = graph.constant(&self.weight);
        graph.op("Gather", &[&weight, token_ids], vec![])
    }

    /// [B, T] ids to [B, T, E].
    pub fn forward(&self, token_ids: &Tensor, mode: Mode) -> Tensor {
        Tensor::embedding(&self.weight, token_ids, self.padding, false, false).dropout(self.dropout, mode.training())
    }
}
