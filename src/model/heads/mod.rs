//! Task heads: from the trunk's states to logits, a loss, labels and a metric. One file per kind of head.

mod classification;
mod crf;
mod cross_entropy;
mod tagging;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::parameters::Scope;
use super::view::Reads;
use super::{Encoded, Mode, Script, TrunkConfig};
use crate::data::Targets;
use crate::metrics::{ClassMetric, Metric};
use crate::onnx::{Attribute, Graph, Value};
use crate::task::{Task, TaskId, TaskKind};

pub use classification::{ClassificationConfig, Pooling};
pub use tagging::{Decoder, TaggingConfig};

/// A task and its head.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HeadConfig {
    /// One class per sentence.
    Classification(ClassificationConfig),
    /// One tag per word.
    Tagging(TaggingConfig),
}

/// How the classes of a task are weighted in its training loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClassWeights {
    /// Every label counts the same.
    #[default]
    Equal,
    /// Every class counts the same: the more labels a class has, the less each of them counts (scikit-learn's
    /// `class_weight="balanced"`).
    Balanced,
}

/// A key that every kind of head has.
macro_rules! common {
    ($head:expr, $key:ident) => {
        match $head {
            HeadConfig::Classification(config) => &config.$key,
            HeadConfig::Tagging(config) => &config.$key,
        }
    };
}

impl HeadConfig {
    /// The labels that the experiment lists, if any.
    pub fn labels(&self) -> Option<&Vec<String>> {
        common!(self, labels).as_ref()
    }

    pub fn class_weights(&self) -> ClassWeights {
        *common!(self, class_weights)
    }

    pub fn sets(&self) -> &[String] {
        &common!(self, set).0
    }

    pub fn column(&self) -> &str {
        common!(self, column)
    }

    pub fn kind(&self) -> TaskKind {
        match self {
            HeadConfig::Classification(_) => TaskKind::Classification,
            HeadConfig::Tagging(config) => TaskKind::Tagging(config.scheme),
        }
    }

    pub fn priority(&self) -> f64 {
        *common!(self, priority)
    }

    /// The names of its scores, including `loss`.
    pub fn scores(&self) -> Vec<String> {
        let metric: Box<dyn Metric> = match self {
            HeadConfig::Classification(_) => Box::new(ClassMetric::new(Vec::new())),
            HeadConfig::Tagging(config) => tagging::metric(self.kind(), config.scoring, Vec::new()),
        };
        metric.scores().into_iter().map(|score| score.name).chain(["loss".to_owned()]).collect()
    }

    pub fn inputs(&self) -> &[String] {
        common!(self, inputs)
    }

    /// Removes references to other heads: its only input becomes the trunk, its priority 1.
    pub fn stand_alone(&mut self) {
        let (inputs, priority) = match self {
            HeadConfig::Classification(config) => (&mut config.inputs, &mut config.priority),
            HeadConfig::Tagging(config) => (&mut config.inputs, &mut config.priority),
        };
        (*inputs, *priority) = (trunk_alone(), one());
    }

    /// Fills in defaults that follow from other keys.
    pub fn resolve(&mut self) {
        if let HeadConfig::Tagging(config) = self {
            (config.decoder, config.constraints) = (Some(config.decoder()), Some(config.constrained()));
        }
    }

    pub fn reads_trunk(&self) -> bool {
        self.inputs().iter().any(|name| name == TRUNK)
    }

    /// Names of the other heads that it reads.
    pub fn other_inputs(&self) -> impl Iterator<Item = &str> {
        self.inputs().iter().map(String::as_str).filter(|&name| name != TRUNK)
    }

    /// Its inputs; `tasks` by [`TaskId`].
    pub fn reads(&self, tasks: &[Task]) -> Reads {
        let (HeadConfig::Classification(ClassificationConfig { layer, mix_layers, private_lstm, .. })
        | HeadConfig::Tagging(TaggingConfig { layer, mix_layers, private_lstm, .. })) = self;
        let id = |name: &str| tasks.iter().position(|task| task.name == name).map(TaskId);
        let heads = self.other_inputs().filter_map(id).collect();
        Reads { heads, layer: *layer, mix_layers: *mix_layers, private_lstm: *private_lstm }
    }

    /// Whether it reads the same inputs in the same way as `other`, so that its weights have the same meaning.
    pub fn reads_as(&self, other: &HeadConfig, (own, others): (&[Task], &[Task]), trunk: &TrunkConfig) -> bool {
        let sources = |head: &HeadConfig, tasks: &[Task]| {
            let reads = head.reads(tasks);
            let layer = if reads.layer == 0 || reads.mix_layers { trunk.layers } else { reads.layer };
            let labels: Vec<Vec<String>> = reads.heads.iter().map(|seen| tasks[seen.0].labels.clone()).collect();
            let pooling = match head {
                HeadConfig::Classification(config) => Some(config.pooling),
                HeadConfig::Tagging(_) => None,
            };
            (layer, reads.mix_layers, reads.private_lstm, labels, pooling)
        };
        sources(self, own) == sources(other, others)
    }

    pub fn build(&self, scope: Scope, task: &Task, size: HeadSize) -> Box<dyn Head> {
        match self {
            HeadConfig::Classification(config) => {
                Box::new(classification::Classification::new(scope, config, task, size))
            }
            HeadConfig::Tagging(config) => Box::new(tagging::Tagging::new(scope, config, task, size)),
        }
    }
}

/// The name of the trunk among a head's inputs.
pub const TRUNK: &str = "trunk";

fn one() -> f64 {
    1.0
}

fn trunk_alone() -> Vec<String> {
    vec![TRUNK.to_owned()]
}

/// Sizes of a head's input.
#[derive(Clone, Copy, Debug)]
pub struct HeadSize {
    /// Features per token: F = D*H.
    pub width: i64,
    /// Features per direction: H.
    pub hidden: i64,
    /// Features that other heads add per sentence or word.
    pub beside: i64,
}

/// A head's prediction for one sentence: a label and its probability, for the sentence or for each word.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    pub labels: Vec<usize>,
    pub scores: Vec<f32>,
    /// The probability of every class; empty for tags.
    pub distribution: Vec<f32>,
}

/// A task's part of the model. Logits are [b, C] for classes and [b, W, C] for tags.
pub trait Head {
    fn logits(&self, encoded: &Encoded, mode: Mode) -> Tensor;

    /// The mean negative log-likelihood in nats per labelled decision (sentence or word): a scalar with a gradient.
    /// `logits` are those of the labelled rows.
    fn loss(&self, logits: &Tensor, targets: &Targets, mode: Mode) -> Tensor;

    /// The best labels of each row with their probabilities. `n_words` per row; unused for classes.
    fn decode(&self, logits: &Tensor, n_words: &[i64]) -> Vec<Decoded>;

    /// An empty metric over the task's labels followed by `more`, labels that the data has but the model does not.
    fn metric(&self, more: &[String]) -> Box<dyn Metric>;

    /// Methods `forward(tokens, lengths, words, beside)`, which gives logits, and `decode(logits, n_words)`, which gives the
    /// ids of the best labels: `[B]` for classes, [B, W] for tags with -1 beyond a sentence's end. Shapes are those of
    /// [`OnnxInputs`].
    fn script(&self) -> Script;

    /// [`Self::script`] as ONNX operators: logits and labels.
    fn onnx(&self, graph: &mut Graph, inputs: &OnnxInputs) -> (Value, Value);
}

/// Inputs of a head in an ONNX graph.
pub struct OnnxInputs {
    /// [B, T, F]
    pub tokens: Value,
    /// `[B]`
    pub lengths: Value,
    /// [B, W, F]
    pub words: Value,
    /// `[B]`
    pub n_words: Value,
    /// F
    pub width: i64,
    /// Distributions of other heads: [B, C] for classes, [B, W, C] for tags.
    pub beside: Vec<Value>,
}

impl OnnxInputs {
    /// `x` concatenated with the other heads' distributions.
    fn with_beside(&self, graph: &mut Graph, x: Value) -> Value {
        if self.beside.is_empty() {
            return x;
        }
        let parts: Vec<&Value> = std::iter::once(&x).chain(&self.beside).collect();
        graph.op("Concat", &parts, vec![Attribute::Int("axis", -1)])
    }
}
