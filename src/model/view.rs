//! What a head reads: one trunk layer or a mix of all, optionally through a private LSTM, and other heads' outputs.
//!
//! layer: a head on a lower layer (Søgaard & Goldberg 2016, aclanthology P16-2038).
//! mix: gamma * sum_l softmax(s)_l h_l (Peters 2018, arXiv 1802.05365, eq. 1), with separate weights per head.
//! other heads: softmax(logits) of the other head is concatenated with the features, and gradients flow through it
//! (Zhang & Weiss 2016, arXiv 1603.06598; for slots that read the intent Qin 2019, arXiv 1909.02188). Differs from the
//! papers in: the distribution itself is used, in training and in prediction, without an embedding or a decoder state.
//!
//! B sentences, T tokens, W words, F features, C labels, L layers.

use tch::{Kind, Tensor};

use super::lstm::{Lstm, Reversal, SCRIPT_HELPERS, SCRIPT_REVERSAL};
use super::parameters::Scope;
use super::{Mode, Script, TrunkConfig, WeightDtype};
use crate::data::Lengths;
use crate::onnx::{Attribute, Element, Graph, Value};
use crate::task::{TaskId, TaskKind};

/// The configured inputs of a head.
pub struct Reads {
    /// Tasks whose heads it reads.
    pub heads: Vec<TaskId>,
    /// The trunk layer, counted from 1; 0 is the last.
    pub layer: usize,
    pub mix_layers: bool,
    /// Hidden size of a private LSTM layer; 0 for none.
    pub private_lstm: i64,
}

pub struct View {
    /// The highest trunk layer that it reads, counted from 0.
    pub layer: usize,
    /// Layer weights before the softmax `[L]`, and the factor gamma `[1]`.
    mix: Option<(Tensor, Tensor)>,
    lstm: Option<Lstm>,
    pub heads: Vec<TaskId>,
    /// H of the states that the head reads.
    pub hidden: i64,
    /// F
    pub width: i64,
}

impl View {
    pub fn new(scope: &mut Scope, reads: Reads, trunk: &TrunkConfig) -> Self {
        let layer = if reads.layer == 0 || reads.mix_layers { trunk.layers } else { reads.layer } - 1;
        let mix = reads.mix_layers.then(|| {
            let zeros = Tensor::zeros([trunk.layers as i64], (Kind::Float, tch::Device::Cpu));
            (scope.add("mix", zeros), scope.add("scale", Tensor::from_slice(&[1.0f32])))
        });
        let lstm = (reads.private_lstm > 0)
            .then(|| Lstm::new(&mut scope.sub("lstm"), 0, trunk.width(), reads.private_lstm, trunk.bidirectional));
        let (hidden, width) = match &lstm {
            Some(lstm) => (reads.private_lstm, lstm.width()),
            None => (trunk.hidden, trunk.width()),
        };
        View { layer, mix, lstm, heads: reads.heads, hidden, width }
    }

    /// Indices of the trunk layers that it reads, from 0.
    pub fn layers(&self) -> std::ops::RangeInclusive<usize> {
        if self.mix.is_some() { 0..=self.layer } else { self.layer..=self.layer }
    }

    /// The layer or the mix that it reads, given the states of [`Self::layers`], each [B, T, F].
    pub fn of(&self, states: &[&Tensor]) -> Tensor {
        let Some((mix, scale)) = &self.mix else { return states[0].alias() };
        let weights = mix.softmax(0, mix.kind()) * scale; // [L]
        let weighted = states.iter().enumerate().map(|(i, x)| *x * weights.get(i as i64));
        weighted.reduce(|a, b| a + b).expect("invariant: a trunk has a layer")
    }

    /// Applies the private LSTM, if any: [B, T, F].
    pub fn own(&self, tokens: &Tensor, lengths: &Lengths, mode: Mode) -> Tensor {
        match &self.lstm {
            Some(lstm) => lstm.forward(tokens, &Reversal::new(lengths), mode),
            None => tokens.shallow_clone(),
        }
    }

    /// A method `view(layers, lengths)` for the head's module, and its submodule `lstm`, if any.
    pub fn script(&self, dtype: WeightDtype) -> (String, Option<Script>) {
        let mut source = "
def view(self, layers: List[Tensor], lengths: Tensor) -> Tensor:
"
        .to_owned();
        source += &match &self.mix {
            None => format!("    x = layers[{}]\n", self.layer),
            Some(_) => "    weights = torch.softmax(self.mix, 0) * self.scale
    x = layers[0] * weights[0]
    for i in range(1, len(layers)):
        x = x + layers[i] * weights[i]
"
            .to_owned(),
        };
        if self.lstm.is_some() {
            source += "    x = self.lstm.forward(x, lengths)\n";
        }
        let lstm = self.lstm.as_ref().map(|lstm| Script {
            source: format!(
                "{SCRIPT_HELPERS}
def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
{SCRIPT_REVERSAL}{}    return x
",
                lstm.script(dtype)
            ),
            quantized_cells: if dtype == WeightDtype::Int8 { lstm.quantized_cells() } else { Vec::new() },
            ..Script::default()
        });
        (source + "    return x\n", lstm)
    }

    pub fn onnx(&self, graph: &mut Graph, layers: &[Value], lengths: &Value) -> Value {
        let mut x = layers[self.layer].clone();
        if let Some((mix, scale)) = &self.mix {
            let weights = mix.detach().softmax(0, Kind::Float) * scale.detach();
            let weighted: Vec<Value> = layers
                .iter()
                .enumerate()
                .map(|(i, layer)| {
                    let weight = graph.constant(&weights.get(i as i64));
                    graph.op("Mul", &[layer, &weight], vec![])
                })
                .collect();
            x = graph.op("Sum", &weighted.iter().collect::<Vec<_>>(), vec![]);
        }
        match &self.lstm {
            Some(lstm) => lstm.onnx(graph, &x, lengths),
            None => x,
        }
    }
}

/// A head's label distribution, from its logits, in the shape that a head of kind `reader` reads: [B, C] per sentence
/// or [B, W, C] per word. A sentence head reads the mean over words.
pub fn distribution(logits: &Tensor, (source, reader): (TaskKind, TaskKind), words: &Lengths) -> Tensor {
    let p = logits.softmax(-1, logits.kind());
    match (source, reader) {
        (TaskKind::Classification, TaskKind::Tagging(_)) => p.unsqueeze(1).expand([-1, words.max, -1], false),
        (TaskKind::Tagging(_), TaskKind::Classification) => {
            let p = p * words.mask().unsqueeze(-1);
            p.sum_dim_intlist([1].as_slice(), false, logits.kind()) / words.device.unsqueeze(1)
        }
        _ => p,
    }
}

/// `distribution` as TorchScript, from `{source}_logits`, `words_{reader}` and the numbers of words `n`.
pub fn distribution_script((source, kind): (&str, TaskKind), (reader, reader_kind): (&str, TaskKind)) -> String {
    let p = format!("torch.softmax({source}_logits, -1)");
    match (kind, reader_kind) {
        (TaskKind::Classification, TaskKind::Tagging(_)) => {
            format!("{p}.unsqueeze(1).expand(-1, words_{reader}.size(1), -1)")
        }
        (TaskKind::Tagging(_), TaskKind::Classification) => format!("self.average({p}, n)"),
        _ => p,
    }
}

/// [`distribution`] in ONNX; `words` [B, W, F] are the reading head's.
pub fn distribution_onnx(
    graph: &mut Graph,
    logits: &Value,
    (source, reader): (TaskKind, TaskKind),
    (words, n_words): (&Value, &Value),
) -> Value {
    let p = graph.op("Softmax", &[logits], vec![Attribute::Int("axis", -1)]);
    match (source, reader) {
        (TaskKind::Classification, TaskKind::Tagging(_)) => {
            let p = graph.unsqueeze(&p, 1); // [B, 1, C]
            let shape = graph.op("Shape", &[words], vec![]);
            let shape = graph.slice(&shape, 0, 0, 2);
            let one = graph.ints(&[1]);
            let shape = graph.op("Concat", &[&shape, &one], vec![Attribute::Int("axis", 0)]);
            graph.op("Expand", &[&p, &shape], vec![])
        }
        (TaskKind::Tagging(_), TaskKind::Classification) => {
            let here = graph.mask(&p, n_words);
            let here = graph.cast(&here, Element::Float);
            let here = graph.unsqueeze(&here, 2);
            let p = graph.op("Mul", &[&p, &here], vec![]);
            let sum = graph.sum(&p, 1);
            let n = graph.unsqueeze(n_words, 1);
            let n = graph.cast(&n, Element::Float);
            graph.op("Div", &[&sum, &n], vec![])
        }
        _ => p,
    }
}
