//! Word tagging: a linear layer per word, decoded word by word (softmax) or as a sequence (CRF).
//!
//! softmax: loss = -log softmax(W h_t + b)[y_t], mean over words.
//! crf: see `crf.rs`; loss = -log p(y | h) per sentence, summed and divided by the number of words.
//!
//! b sentences, W words, F = D*H features, C tags.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::crf::Crf;
use super::cross_entropy::cross_entropy;
use super::{ClassWeights, Decoded, Head, HeadSize, OnnxInputs};
use crate::data::{OneOrMany, Targets};
use crate::metrics::{ClassMetric, Metric, SpanMetric, SpanRule};
use crate::model::dropout::{Masks, dropout};
use crate::model::parameters::{Linear, Scope};
use crate::model::{Encoded, Mode, Script, Site};
use crate::onnx::{Attribute, Graph, Value};
use crate::task::{Scheme, Task, TaskKind};

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TaggingConfig {
    /// The set or sets whose rows have these tags.
    pub set: OneOrMany,
    /// The column or field with the tags.
    pub column: String,
    /// All span types or plain tags, in the model's order; for labels that may not occur in the training rows. Default:
    /// the labels of the training rows, sorted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Vec<String>>,
    /// How the data writes spans: `bio`, `iob1`, `bioes`, `bmes`, `bilou`, or `plain` for tags that are not spans. The
    /// model itself always uses BIO. Default `bio`.
    #[serde(default = "default_scheme")]
    pub scheme: Scheme,
    /// `softmax` (each word on its own) or `crf` (the best sequence of tags). Default: `crf` for spans, `softmax` for
    /// plain tags.
    #[serde(default)]
    pub decoder: Option<Decoder>,
    /// Forbid an I- tag that does not continue a span of its type, in training and in decoding. Needs a CRF over spans,
    /// with which it is on by default.
    #[serde(default)]
    pub constraints: Option<bool>,
    /// How spans are counted for F1: `conlleval` (broken sequences are read leniently) or `strict` (seqeval's strict
    /// mode: a span must start with B-; broken gold labels are repaired first). Default `conlleval`. Both scores are
    /// reported.
    #[serde(default)]
    pub scoring: SpanRule,
    /// Dropout before the head, in addition to the trunk's. Default 0.
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
    /// With softmax: label smoothing, the share of the target probability that is spread evenly over all tags (Szegedy
    /// 2016, section 7). Default 0.
    #[serde(default)]
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub label_smoothing: f64,
    /// With spans: extra cost in nats, in training, of tagging a word inside a span as outside (softmax-margin, Gimpel
    /// & Smith 2010). Raises recall and lowers precision. Default 0.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub missed_cost: f64,
    /// With softmax: how tags are weighted in the training loss: `equal`, or `balanced`: N / (C n_c) for a tag with n_c
    /// of the N training labels, C tags, so that rare tags count as much as frequent ones. Default `equal`.
    #[serde(default)]
    pub class_weights: ClassWeights,
    /// Multiplies the task's weight under every weighting strategy. Default 1.
    #[serde(default = "super::one")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub priority: f64,
}

impl TaggingConfig {
    pub fn decoder(&self) -> Decoder {
        self.decoder.unwrap_or(if self.scheme == Scheme::Plain { Decoder::Softmax } else { Decoder::Crf })
    }

    /// Whether constraints are possible: the decoder is a CRF over span tags.
    pub fn can_constrain(&self) -> bool {
        self.decoder() == Decoder::Crf && self.scheme != Scheme::Plain
    }

    /// Whether the CRF forbids tag sequences that break the span scheme.
    pub fn constrained(&self) -> bool {
        self.constraints.unwrap_or(self.can_constrain())
    }
}

fn default_scheme() -> Scheme {
    Scheme::Bio
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Decoder {
    Softmax,
    Crf,
}

pub struct Tagging {
    output: Linear,
    crf: Option<Crf>,
    dropout: f64,
    label_smoothing: f64,
    missed_cost: f64,
    /// Whether other heads' distributions are concatenated with the words' states.
    beside: bool,
    task: Task,
    scoring: SpanRule,
}

impl Tagging {
    pub fn new(mut scope: Scope, config: &TaggingConfig, task: &Task, size: HeadSize) -> Self {
        let output = scope.linear("output", size.width + size.beside, task.labels.len() as i64);
        let crf = match config.decoder() {
            Decoder::Softmax => None,
            Decoder::Crf => Some(Crf::new(scope.sub("crf"), &task.labels, config.constrained())),
        };
        Tagging {
            output,
            crf,
            dropout: config.dropout,
            label_smoothing: config.label_smoothing,
            missed_cost: config.missed_cost,
            beside: size.beside > 0,
            task: task.clone(),
            scoring: config.scoring,
        }
    }

    /// Logits for training: on words inside a gold span the score of `O` is raised by the cost, so that the gold tag
    /// must win by that margin. With score'(y) = score(y) + cost(y, gold), log Z' - score(gold) is the softmax-margin
    /// loss (Gimpel & Smith 2010); the gold tags have no cost.
    fn margin(&self, logits: &Tensor, labels: &Tensor) -> Tensor {
        let Some(outside) = self.task.labels.iter().position(|tag| tag == "O") else { return logits.shallow_clone() };
        // [b, W, 1]; the loss ignores words without a label.
        let cost = (labels.ne(outside as i64).to_kind(logits.kind()) * self.missed_cost).unsqueeze(-1);
        let after = self.task.labels.len() - 1 - outside;
        logits + cost.constant_pad_nd([outside as i64, after as i64])
    }
}

/// A metric over `labels` by label id.
pub(super) fn metric(kind: TaskKind, rule: SpanRule, labels: Vec<String>) -> Box<dyn Metric> {
    match kind.has_spans() {
        true => Box::new(SpanMetric::new(labels, rule)),
        false => Box::new(ClassMetric::new(labels)),
    }
}

impl Head for Tagging {
    fn logits(&self, encoded: &Encoded, mode: Mode) -> Tensor {
        let words = encoded.with_beside(encoded.words()); // [b, W, F]
        self.output.forward(&dropout(&words, self.dropout, Masks::PerElement, mode, Site::Head(0))) // [b, W, C]
    }

    fn loss(&self, logits: &Tensor, targets: &Targets, mode: Mode) -> Tensor {
        let costly = self.missed_cost > 0.0 && mode.training();
        let logits = &if costly { self.margin(logits, &targets.labels) } else { logits.shallow_clone() };
        match &self.crf {
            Some(crf) => crf.negative_log_likelihood(logits, &targets.labels) / targets.n_decisions as f64,
            None => {
                // [b*W, C] and [b*W], in memory order.
                let flat = |x: &Tensor| match logits.is_contiguous() {
                    true => x.flatten(0, 1),
                    false => x.transpose(0, 1).flatten(0, 1),
                };
                cross_entropy(&flat(logits), &flat(&targets.labels), targets, (self.label_smoothing, mode))
            }
        }
    }

    fn decode(&self, logits: &Tensor, n_words: &[i64]) -> Vec<Decoded> {
        if let Some(crf) = &self.crf {
            return crf.decode(logits, n_words);
        }
        let (scores, labels) = logits.softmax(-1, Kind::Float).max_dim(-1, false); // [b, W]
        let width = logits.size()[1] as usize;
        let scores: Vec<f32> = Vec::try_from(scores.flatten(0, 1)).expect("invariant: a float a word");
        let labels: Vec<i64> = Vec::try_from(labels.flatten(0, 1)).expect("invariant: a label a word");
        let row = |(b, &n): (usize, &i64)| {
            let range = b * width..b * width + n as usize;
            let labels = labels[range.clone()].iter().map(|&label| label as usize).collect();
            Decoded { labels, scores: scores[range].to_vec(), distribution: Vec::new() }
        };
        n_words.iter().enumerate().map(row).collect()
    }

    fn onnx(&self, graph: &mut Graph, inputs: &OnnxInputs) -> (Value, Value) {
        let words = inputs.with_beside(graph, inputs.words.clone());
        let logits = self.output.onnx(graph, &words);
        let here = graph.mask(&logits, &inputs.n_words); // [B, W]
        let labels = match &self.crf {
            Some(crf) => crf.onnx(graph, &logits, &here),
            None => {
                let attributes = vec![Attribute::Int("axis", -1), Attribute::Int("keepdims", 0)];
                graph.op("ArgMax", &[&logits], attributes)
            }
        };
        let none = graph.constant(&Tensor::from(-1i64));
        let labels = graph.op("Where", &[&here, &labels, &none], vec![]);
        (logits, labels)
    }

    fn script(&self) -> Script {
        let mut script = match &self.crf {
            Some(crf) => crf.script(),
            None => Script { source: "    labels = logits.argmax(-1)\n".to_owned(), ..Script::default() },
        };
        let words = if self.beside { "torch.cat([words] + beside, -1)" } else { "words" };
        script.source = format!(
            "
def forward(self, tokens: Tensor, lengths: Tensor, words: Tensor, beside: List[Tensor]) -> Tensor:
    return self.output.forward({words})

def decode(self, logits: Tensor, n_words: Tensor) -> Tensor:
{}    positions = torch.arange(logits.size(1), device=logits.device).unsqueeze(0)
    return labels.masked_fill(positions >= n_words.unsqueeze(1), -1)
",
            script.source
        );
        script
    }

    fn metric(&self, more: &[String]) -> Box<dyn Metric> {
        metric(self.task.kind, self.scoring, [&self.task.labels, more].concat())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tch::Device;

    use super::*;
    use crate::libtorch::Draws;
    use crate::model::Parameters;
    use crate::task::TaskKind;

    #[test]
    fn a_missed_word_costs_in_training_and_nowhere_else() {
        let labels: Vec<String> = ["B-a", "O", "I-a"].map(str::to_owned).to_vec();
        let task = Task { name: "t".into(), kind: TaskKind::Tagging(Scheme::Bio), labels };
        let x = Tensor::from_slice(&[0.5f32, 1.0, -1.0, 0.2, 0.1, 0.3, 2.0, 0.0, 1.0]).view([1, 3, 3]);
        let targets = Targets {
            rows: vec![0],
            first_row: 0,
            index: Tensor::from_slice(&[0i64]),
            labels: Tensor::from_slice(&[0i64, 1, -1]).view([1, 3]),
            n_decisions: 2,
            class_weights: None,
        };
        // The first word is in a span and the second is not, so only the first's score of `O`, 1.0, rises.
        let raised = Tensor::from_slice(&[0.5f32, 2.5, -1.0, 0.2, 0.1, 0.3, 2.0, 0.0, 1.0]).view([1, 3, 3]);
        let train = Mode::Train(Draws::new(1));
        for decoder in ["softmax", "crf"] {
            let config = json!({"set": "s", "column": "c", "decoder": decoder, "missed_cost": 1.5});
            let config: TaggingConfig = serde_json::from_value(config).unwrap();
            let mut parameters = Parameters::new(Device::Cpu);
            let head = Tagging::new(parameters.root(), &config, &task, HeadSize { width: 2, hidden: 1, beside: 0 });
            let loss = |x: &Tensor, mode| head.loss(x, &targets, mode).double_value(&[]);
            let (costly, free) = (loss(&x, train), loss(&x, Mode::Eval));
            assert!((costly - loss(&raised, Mode::Eval)).abs() < 1e-6, "{decoder}: {costly}");
            assert!(costly > free + 0.1, "{decoder}: {costly} is not above {free}");
        }
    }
}
