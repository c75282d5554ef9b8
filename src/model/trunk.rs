//! The shared trunk: a stack of LSTM layers.
//!
//! B sentences, T tokens, E embedding, H hidden, D directions.
//!
//! Each layer is one call of libtorch's LSTM without packing, so that oneDNN and cuDNN can run it. Where a batch has
//! padding, the reverse direction reads each row turned round within its own length, which equals what packing computes.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::parameters::Scope;
use super::{Mode, Script, Weights};
use crate::data::Lengths;
use crate::onnx::{Attribute, Graph, Value};

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrunkConfig {
    /// Hidden size of each direction. Default 256, at least 1.
    pub hidden: i64,
    /// Number of LSTM layers. Default 1, at least 1.
    pub layers: usize,
    /// Read both ways. Default true.
    pub bidirectional: bool,
    /// Dropout on the output of every layer, the last included. Default 0.3, from 0 to below 1.
    pub dropout: f64,
}

impl Default for TrunkConfig {
    fn default() -> Self {
        TrunkConfig { hidden: 256, layers: 1, bidirectional: true, dropout: 0.3 }
    }
}

impl TrunkConfig {
    /// Numbers a token in the trunk's output: D*H.
    pub fn width(&self) -> i64 {
        self.hidden * if self.bidirectional { 2 } else { 1 }
    }
}

/// The weights of one direction of one layer: weight_ih, weight_hh, bias_ih, bias_hh.
type Direction = [Tensor; 4];

struct Layer {
    forward: Direction,
    reverse: Option<Direction>,
}

pub struct Trunk {
    layers: Vec<Layer>,
    hidden: i64,
    dropout: f64,
}

/// What the trunk makes of a batch.
pub struct States {
    /// [B, T, D*H]; what stands beyond a row's end has no meaning.
    pub tokens: Tensor,
    /// What the last layer read: [B, T, E], or [B, T, D*H] above other layers.
    pub last_layer_input: Tensor,
}

impl Trunk {
    /// Names and initialization (uniform within 1 / sqrt(H)) are those of PyTorch's `nn.LSTM`.
    pub fn new(mut scope: Scope, config: &TrunkConfig, inputs: i64) -> Self {
        let (hidden, bound) = (config.hidden, 1.0 / (config.hidden as f64).sqrt());
        let mut direction = |layer: usize, suffix: &str| {
            let inputs = if layer == 0 { inputs } else { config.width() };
            let sizes: [(&str, &[i64]); 4] = [
                ("weight_ih", &[4 * hidden, inputs]),
                ("weight_hh", &[4 * hidden, hidden]),
                ("bias_ih", &[4 * hidden]),
                ("bias_hh", &[4 * hidden]),
            ];
            sizes.map(|(name, size)| scope.uniform(&format!("{name}_l{layer}{suffix}"), size, bound))
        };
        let layers = (0..config.layers)
            .map(|layer| Layer {
                forward: direction(layer, ""),
                reverse: config.bidirectional.then(|| direction(layer, "_reverse")),
            })
            .collect();
        Trunk { layers, hidden, dropout: config.dropout }
    }

    /// Parameters of the last layer.
    pub fn n_last_layer(&self) -> usize {
        self.layers.last().map_or(0, |layer| 4 * (1 + usize::from(layer.reverse.is_some())))
    }

    /// [B, T, E] to the states of the last layer.
    pub fn forward(&self, embedded: &Tensor, lengths: &Lengths, mode: Mode) -> States {
        let turned = (!lengths.even()).then(|| turned_positions(lengths));
        let (mut input, mut tokens) = (embedded.shallow_clone(), embedded.shallow_clone());
        for layer in &self.layers {
            input = tokens;
            tokens = self.layer(layer, &input, turned.as_ref(), mode).dropout(self.dropout, mode.training());
        }
        States { tokens, last_layer_input: input }
    }

    /// The same, on the device and in the kind of its weights; no dropout.
    pub fn script(&self, numbers: Weights) -> Script {
        let hidden = self.hidden;
        let mut source = format!(
            "
def zero(self, x: Tensor, directions: int) -> List[Tensor]:
    zero = torch.zeros([directions, x.size(0), {hidden}], dtype=x.dtype, device=x.device)
    return [zero, zero]

def reorder(self, x: Tensor, positions: Tensor) -> Tensor:
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.size(2)))

def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
    positions = torch.arange(x.size(1), device=x.device).unsqueeze(0)
    turned = lengths.unsqueeze(1) - 1 - positions
    turned = torch.where(turned >= 0, turned, positions.expand_as(turned))
    even = bool((lengths == x.size(1)).all())
"
        );
        let weights = |layer: usize, suffix: &str| match numbers {
            Weights::Float => {
                let names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"];
                names.map(|name| format!("self.{name}_l{layer}{suffix}")).join(", ")
            }
            Weights::Int8 => format!("self.cell_l{layer}{suffix}"),
        };
        let lstm = |input: &str, weights: &str, n: usize| {
            let both = if n == 2 { "True" } else { "False" };
            let call = format!("({input}, self.zero(x, {n}), [{weights}], True, 1, 0.0, False, {both}, True");
            match numbers {
                Weights::Float => format!("torch.lstm{call})[0]"),
                // 12 is qint8 in c10::ScalarType.
                Weights::Int8 => format!("torch.quantized_lstm{call}, dtype=12, use_dynamic=True)[0]"),
            }
        };
        let mut quantized_cells = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            let (forward, reverse) = (weights(i, ""), weights(i, "_reverse"));
            source += &match layer.reverse {
                None => format!("    x = {}\n", lstm("x", &forward, 1)),
                Some(_) => format!(
                    "    if even:
        x = {both}
    else:
        backward = {backward}
        x = torch.cat([{forward}, self.reorder(backward, turned)], -1)
",
                    both = lstm("x", &format!("{forward}, {reverse}"), 2),
                    backward = lstm("self.reorder(x, turned)", &reverse, 1),
                    forward = lstm("x", &forward, 1)
                ),
            };
            if numbers == Weights::Int8 {
                let copies = |direction: &Direction| direction.each_ref().map(|weight| weight.detach().copy());
                quantized_cells.push((format!("cell_l{i}"), copies(&layer.forward)));
                quantized_cells.extend(layer.reverse.as_ref().map(|d| (format!("cell_l{i}_reverse"), copies(d))));
            }
        }
        Script { source: source + "    return x\n", quantized_cells, ..Script::default() }
    }

    /// The same as ONNX LSTM operators: [B, T, E] to [B, T, D*H].
    pub fn onnx(&self, graph: &mut Graph, x: &Value, lengths: &Value) -> Value {
        // 6 is INT32 in TensorProto.DataType.
        let lengths = graph.op("Cast", &[lengths], vec![Attribute::Int("to", 6)]);
        let swap =
            |graph: &mut Graph, x: &Value| graph.op("Transpose", &[x], vec![Attribute::Ints("perm", vec![1, 0, 2])]);
        let mut x = swap(graph, x); // [T, B, E]
        for layer in &self.layers {
            let directions: Vec<&Direction> = std::iter::once(&layer.forward).chain(&layer.reverse).collect();
            let stacked = |part: &dyn Fn(&Direction) -> Tensor| {
                Tensor::stack(&directions.iter().map(|direction| part(direction)).collect::<Vec<_>>(), 0)
            };
            let weights = [
                stacked(&|d| self.onnx_gates(&d[0])),
                stacked(&|d| self.onnx_gates(&d[1])),
                stacked(&|d| Tensor::cat(&[self.onnx_gates(&d[2]), self.onnx_gates(&d[3])], 0)),
            ];
            let [w, r, b] = weights.map(|weights| graph.constant(&weights)); // [D, 4*H, ...], [D, 8*H]
            let direction = if layer.reverse.is_some() { "bidirectional" } else { "forward" };
            let attributes = vec![Attribute::Int("hidden_size", self.hidden), Attribute::Text("direction", direction)];
            let states = graph.op("LSTM", &[&x, &w, &r, &b, &lengths], attributes); // [T, D, B, H]
            let states = graph.op("Transpose", &[&states], vec![Attribute::Ints("perm", vec![0, 2, 1, 3])]);
            let shape = graph.ints(&[0, 0, -1]);
            x = graph.op("Reshape", &[&states, &shape], vec![]); // [T, B, D*H]
        }
        swap(graph, &x)
    }

    /// PyTorch's gates are input, forget, cell, output; those of ONNX input, output, forget, cell.
    fn onnx_gates(&self, weight: &Tensor) -> Tensor {
        let gates = weight.detach().chunk(4, 0);
        Tensor::cat(&[&gates[0], &gates[3], &gates[1], &gates[2]], 0)
    }

    fn layer(&self, layer: &Layer, input: &Tensor, turned: Option<&Tensor>, mode: Mode) -> Tensor {
        match (&layer.reverse, turned) {
            (None, _) => self.lstm(input, &[&layer.forward], mode),
            (Some(reverse), None) => self.lstm(input, &[&layer.forward, reverse], mode),
            (Some(reverse), Some(turned)) => {
                let forward = self.lstm(input, &[&layer.forward], mode);
                let backward = self.lstm(&reorder(input, turned), &[reverse], mode);
                Tensor::cat(&[forward, reorder(&backward, turned)], -1) // [B, T, 2*H]
            }
        }
    }

    fn lstm(&self, input: &Tensor, directions: &[&Direction], mode: Mode) -> Tensor {
        let (batch, _, _) = input.size3().expect("invariant: [B, T, E]");
        let n = directions.len() as i64;
        let zero = Tensor::zeros([n, batch, self.hidden], (input.kind(), input.device()));
        let weights: Vec<&Tensor> = directions.iter().copied().flatten().collect();
        let (output, _, _) = input.lstm(&[&zero, &zero], &weights, true, 1, 0.0, mode.training(), n == 2, true);
        output
    }
}

/// The forward direction at each row's last token and the reverse direction, if there is one, at its first: [B, D*H].
pub fn last_states(tokens: &Tensor, lengths: &Lengths, hidden: i64) -> Tensor {
    let index = (&lengths.device - 1).view([-1, 1, 1]).expand([-1, 1, hidden], false);
    let forward = tokens.narrow(2, 0, hidden).gather(1, &index, false).squeeze_dim(1); // [B, H]
    match tokens.size()[2] == hidden {
        true => forward,
        false => Tensor::cat(&[forward, tokens.select(1, 0).narrow(1, hidden, hidden)], -1),
    }
}

/// For each position the one it trades places with when a row is turned round within its length: [B, T].
fn turned_positions(lengths: &Lengths) -> Tensor {
    let positions = Tensor::arange(lengths.max, (Kind::Int64, lengths.device.device())).unsqueeze(0);
    let turned = lengths.device.unsqueeze(1) - 1 - &positions;
    turned.where_self(&turned.ge(0), &positions.expand_as(&turned))
}

/// x[b, positions[b, t]], for x of [B, T, F].
pub fn reorder(x: &Tensor, positions: &Tensor) -> Tensor {
    let index = positions.unsqueeze(-1).expand([-1, -1, x.size()[2]], false);
    x.gather(1, &index, false)
}
