//! Sentence classification: pooling, an optional hidden layer, softmax.
//!
//! p = softmax(W2 relu(W1 pool(h) + b1) + b2); without a hidden layer p = softmax(W pool(h) + b).
//!
//! b sentences, T tokens, F = D*H features, C classes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::cross_entropy::cross_entropy;
use super::{ClassWeights, Decoded, Head, HeadSize, OnnxInputs};
use crate::data::{OneOrMany, Targets};
use crate::libtorch::max_pool;
use crate::metrics::{ClassMetric, Metric};
use crate::model::dropout::{Masks, dropout};
use crate::model::lstm::{last_states_onnx, last_states_script};
use crate::model::parameters::{Linear, Scope};
use crate::model::{Encoded, Mode, Script, Site};
use crate::onnx::{Attribute, Element, Graph, Value};
use crate::task::Task;

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClassificationConfig {
    /// The set or sets whose rows have this label.
    pub set: OneOrMany,
    /// The column or field with the label.
    pub column: String,
    /// All classes, in the model's order; for classes that may not occur in the training rows. Default: the classes of
    /// the training rows, sorted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Vec<String>>,
    /// How the states of the words are pooled: `last` (the last state of each direction), `mean`, `max`, `attention`.
    /// Default `max`.
    #[serde(default)]
    pub pooling: Pooling,
    /// Width of a hidden layer with ReLU; 0 for none. Default 0.
    #[serde(default)]
    #[schemars(range(min = 0, max = 100_000))]
    pub hidden: i64,
    /// Dropout before each layer of the head, in addition to the trunk's. Default 0.
    #[serde(default)]
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub dropout: f64,
    /// What the head reads: `trunk`, and other tasks, whose predicted distributions (with a CRF, the softmax of
    /// its scores of the word alone) are added to its input. Default
    /// `[trunk]`.
    #[serde(default = "super::trunk_alone")]
    pub inputs: Vec<String>,
    /// The trunk layer that the head reads, counted from 1; 0 is the last. Default 0.
    #[serde(default)]
    pub layer: usize,
    /// Read a learned weighted sum of all layers instead. Default false.
    #[serde(default)]
    pub mix_layers: bool,
    /// Hidden size of an additional LSTM layer between the trunk and this head only; 0 for none. Default 0.
    #[serde(default)]
    #[schemars(range(min = 0, max = 100_000))]
    pub private_lstm: i64,
    /// Label smoothing: share of the target probability that is spread evenly over all classes (Szegedy 2016, section
    /// 7). Default 0.
    #[serde(default)]
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub label_smoothing: f64,
    /// How classes are weighted in the training loss: `equal`, or `balanced`: N / (C n_c) for a class with n_c of the N
    /// training labels, C classes, so that rare classes count as much as frequent ones. Default `equal`.
    #[serde(default)]
    pub class_weights: ClassWeights,
    /// Multiplies the task's weight under every weighting strategy. Default 1.
    #[serde(default = "super::one")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub priority: f64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The last state of each direction.
    Last,
    /// The mean of the states.
    Mean,
    /// The maximum of every feature over the states.
    #[default]
    Max,
    /// sum_t softmax_t(v . tanh(A h_t + a)) h_t (Yang 2016, "Hierarchical Attention Networks", eq. 5-7).
    Attention,
}

pub struct Classification {
    pooling: Pooling,
    attention: Option<(Linear, Linear)>,
    hidden: Option<Linear>,
    output: Linear,
    dropout: f64,
    label_smoothing: f64,
    labels: Vec<String>,
    /// H of the pooled states.
    state_hidden: i64,
    /// Whether other heads' distributions are concatenated with the pooled sentence.
    beside: bool,
}

impl Classification {
    pub fn new(mut scope: Scope, config: &ClassificationConfig, task: &Task, size: HeadSize) -> Self {
        let inputs = size.width;
        let attention = (config.pooling == Pooling::Attention).then(|| {
            let mut scope = scope.sub("attention");
            (scope.linear("projection", inputs, inputs), scope.linear("score", inputs, 1))
        });
        let pooled = inputs + size.beside;
        let hidden = (config.hidden > 0).then(|| scope.linear("hidden", pooled, config.hidden));
        let width = if config.hidden > 0 { config.hidden } else { pooled };
        Classification {
            pooling: config.pooling,
            attention,
            hidden,
            output: scope.linear("output", width, task.labels.len() as i64),
            dropout: config.dropout,
            label_smoothing: config.label_smoothing,
            labels: task.labels.clone(),
            state_hidden: size.hidden,
            beside: size.beside > 0,
        }
    }

    /// [b, T, F] to [b, F]; padding is ignored.
    fn pool(&self, encoded: &Encoded) -> Tensor {
        let tokens = &encoded.tokens;
        let mask = (!encoded.lengths.is_unpadded()).then(|| encoded.lengths.mask().unsqueeze(-1)); // [b, T, 1]
        let filled = |x: &Tensor, value: f64| match &mask {
            Some(mask) => x.masked_fill(&mask.logical_not(), value),
            None => x.shallow_clone(),
        };
        match self.pooling {
            Pooling::Last => encoded.last(),
            Pooling::Max => max_pool(tokens, &encoded.lengths.device)
                .unwrap_or_else(|| filled(tokens, f64::NEG_INFINITY).amax([1], false)),
            Pooling::Mean => {
                let lengths = encoded.lengths.device.to_kind(tokens.kind()).unsqueeze(-1); // [b, 1]
                filled(tokens, 0.0).sum_dim_intlist([1].as_slice(), false, tokens.kind()) / lengths
            }
            Pooling::Attention => {
                let (projection, score) = self.attention.as_ref().expect("invariant: made with the pooling");
                let scores = score.forward(&projection.forward(tokens).tanh()); // [b, T, 1]
                let weights = filled(&scores, f64::NEG_INFINITY).softmax(1, tokens.kind());
                // A weight of 0 is not enough: states beyond the end are undefined and may be NaN.
                (weights * filled(tokens, 0.0)).sum_dim_intlist([1].as_slice(), false, tokens.kind())
            }
        }
    }
}

impl Head for Classification {
    fn logits(&self, encoded: &Encoded, mode: Mode) -> Tensor {
        let dropped = |x: Tensor, layer: u16| dropout(&x, self.dropout, Masks::PerElement, mode, Site::Head(layer));
        let mut x = dropped(encoded.with_beside(self.pool(encoded)), 0);
        if let Some(hidden) = &self.hidden {
            x = dropped(hidden.forward(&x).relu(), 1);
        }
        self.output.forward(&x) // [b, C]
    }

    fn loss(&self, logits: &Tensor, targets: &Targets, mode: Mode) -> Tensor {
        cross_entropy(logits, &targets.labels, targets, (self.label_smoothing, mode))
    }

    fn decode(&self, logits: &Tensor, _: &[i64]) -> Vec<Decoded> {
        let distributions = logits.softmax(-1, Kind::Float);
        let labels: Vec<i64> = Vec::try_from(distributions.argmax(-1, false)).expect("invariant: one label a row");
        let all: Vec<f32> = Vec::try_from(distributions.flatten(0, -1)).expect("invariant: C floats a row");
        let one = |(label, distribution): (i64, &[f32])| {
            let label = label as usize;
            Decoded { labels: vec![label], scores: vec![distribution[label]], distribution: distribution.to_vec() }
        };
        labels.into_iter().zip(all.chunks(self.labels.len())).map(one).collect()
    }

    fn metric(&self, more: &[String]) -> Box<dyn Metric> {
        Box::new(ClassMetric::new([&self.labels, more].concat()))
    }

    fn onnx(&self, graph: &mut Graph, inputs: &OnnxInputs) -> (Value, Value) {
        let tokens = &inputs.tokens;
        let mask = graph.mask(tokens, &inputs.lengths);
        let mask = graph.unsqueeze(&mask, 2); // [B, T, 1]
        let filled = |graph: &mut Graph, x: &Value, value: f32| {
            let value = graph.number(value);
            graph.op("Where", &[&mask, x, &value], vec![])
        };
        let mut x = match self.pooling {
            Pooling::Last => last_states_onnx(graph, tokens, &inputs.lengths, (self.state_hidden, inputs.width)),
            Pooling::Max => {
                let tokens = filled(graph, tokens, f32::NEG_INFINITY);
                let attributes = vec![Attribute::Ints("axes", vec![1]), Attribute::Int("keepdims", 0)];
                graph.op("ReduceMax", &[&tokens], attributes)
            }
            Pooling::Mean => {
                let tokens = filled(graph, tokens, 0.0);
                let total = graph.sum(&tokens, 1);
                let lengths = graph.unsqueeze(&inputs.lengths, 1);
                let lengths = graph.cast(&lengths, Element::Float);
                graph.op("Div", &[&total, &lengths], vec![])
            }
            Pooling::Attention => {
                let (projection, score) = self.attention.as_ref().expect("invariant: made with the pooling");
                let projected = projection.onnx(graph, tokens);
                let projected = graph.op("Tanh", &[&projected], vec![]);
                let scores = score.onnx(graph, &projected);
                let scores = filled(graph, &scores, f32::NEG_INFINITY);
                let weights = graph.op("Softmax", &[&scores], vec![Attribute::Int("axis", 1)]);
                let tokens = filled(graph, tokens, 0.0);
                let weighted = graph.op("Mul", &[&weights, &tokens], vec![]);
                graph.sum(&weighted, 1)
            }
        };
        x = inputs.with_beside(graph, x);
        if let Some(hidden) = &self.hidden {
            x = hidden.onnx(graph, &x);
            x = graph.op("Relu", &[&x], vec![]);
        }
        let logits = self.output.onnx(graph, &x);
        let attributes = vec![Attribute::Int("axis", -1), Attribute::Int("keepdims", 0)];
        let labels = graph.op("ArgMax", &[&logits], attributes);
        (logits, labels)
    }

    fn script(&self) -> Script {
        let pooled = match self.pooling {
            Pooling::Last => last_states_script("tokens", self.state_hidden),
            Pooling::Max => "    x = tokens.masked_fill(torch.logical_not(mask), float('-inf')).amax([1])\n".to_owned(),
            Pooling::Mean => "    x = tokens.masked_fill(torch.logical_not(mask), 0.0).sum([1])
    x = x / lengths.unsqueeze(1).to(x.dtype)
"
            .to_owned(),
            Pooling::Attention => "    x = torch.tanh(self.attention.projection.forward(tokens))
    scores = self.attention.score.forward(x)
    weights = torch.softmax(scores.masked_fill(torch.logical_not(mask), float('-inf')), 1)
    x = (weights * tokens.masked_fill(torch.logical_not(mask), 0.0)).sum([1])
"
            .to_owned(),
        };
        let hidden = match self.hidden {
            Some(_) => "    x = torch.relu(self.hidden.forward(x))\n",
            None => "",
        };
        let beside = if self.beside { "    x = torch.cat([x] + beside, -1)\n" } else { "" };
        let source = format!(
            "
def forward(self, tokens: Tensor, lengths: Tensor, words: Tensor, beside: List[Tensor]) -> Tensor:
    positions = torch.arange(tokens.size(1), device=tokens.device).unsqueeze(0)
    mask = (positions < lengths.unsqueeze(1)).unsqueeze(-1)
{pooled}{beside}{hidden}    return self.output.forward(x)

def decode(self, logits: Tensor, n_words: Tensor) -> Tensor:
    return logits.argmax(-1)
"
        );
        Script { source, ..Script::default() }
    }
}
