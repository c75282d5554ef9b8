//! The shared trunk: a stack of LSTM layers.
//!
//! residual: h_l = LSTM_l(h_(l-1)) + h_(l-1) (He 2016; between recurrent layers Prakash 2016, arXiv 1610.03098).
//! highway: g = sigmoid(W h_(l-1) + b), h_l = g * LSTM_l(h_(l-1)) + (1 - g) * h_(l-1) (Srivastava 2015, arXiv 1505.00387,
//! eq. 3). Differs from the paper in: the gate reads only the layer's input at each position, and its bias starts at 1.
//! Both apply from the second layer on, since the first layer's input has another width.
//!
//! B sentences, T tokens, E embedding, H hidden, D directions.

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::dropout::{Masks, dropout};
use super::lstm::{Lstm, Reversal, SCRIPT_HELPERS, SCRIPT_REVERSAL};
use super::parameters::{Linear, Scope};
use super::precision::{HalfPrecisionCopies, Precision};
use super::{Mode, Script, Site, WeightDtype};
use crate::data::Lengths;
use crate::onnx::{Graph, Value};

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrunkConfig {
    /// Hidden size of each direction. Default 256.
    #[schemars(range(min = 1, max = 100_000))]
    pub hidden: i64,
    /// Number of LSTM layers. Default 1.
    #[schemars(range(min = 1, max = 100))]
    pub layers: usize,
    /// Read sentences in both directions. Default true.
    pub bidirectional: bool,
    /// Dropout on the output of every layer, including the last. Default 0.5.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub dropout: f64,
    /// Use one dropout mask for all tokens of a sentence (Gal & Ghahramani 2016; "locked" in Merity 2018). Default
    /// true.
    pub locked_dropout: bool,
    /// Connection around every LSTM layer but the first: `none`, `residual`, `highway`. Default `none`.
    pub connection: Connection,
}

impl Default for TrunkConfig {
    fn default() -> Self {
        TrunkConfig {
            hidden: 256,
            layers: 1,
            bidirectional: true,
            dropout: 0.5,
            locked_dropout: true,
            connection: Connection::None,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Connection {
    /// No connection.
    #[default]
    None,
    /// The layer's input is added to its output (He 2016).
    Residual,
    /// A learned gate mixes the layer's input and its output (Srivastava 2015).
    Highway,
}

impl TrunkConfig {
    /// Features of a token in the trunk's output: D*H.
    pub fn width(&self) -> i64 {
        self.hidden * if self.bidirectional { 2 } else { 1 }
    }
}

pub struct Trunk {
    layers: Vec<Lstm>,
    connection: Connection,
    /// With `highway`, one per layer from the second on.
    gates: Vec<Linear>,
    dropout: f64,
    masks: Masks,
}

impl Trunk {
    /// The trunk, and the index of each layer's first parameter; the last entry is the end of the last layer.
    pub fn new(mut scope: Scope, config: &TrunkConfig, inputs: i64) -> (Self, Vec<usize>) {
        let (mut layers, mut gates, mut starts) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..config.layers {
            starts.push(scope.count());
            let inputs = if number == 0 { inputs } else { config.width() };
            layers.push(Lstm::new(&mut scope, number, inputs, config.hidden, config.bidirectional));
            if number > 0 && config.connection == Connection::Highway {
                gates.push(scope.gate(&format!("gate_l{number}"), config.width()));
            }
        }
        starts.push(scope.count());
        let masks = if config.locked_dropout { Masks::Locked } else { Masks::PerElement };
        (Trunk { layers, connection: config.connection, gates, dropout: config.dropout, masks }, starts)
    }

    /// [B, T, E] to the states of every layer, each [B, T, D*H]; undefined beyond a row's end. `cut` maps each layer's
    /// index and input to the tensor that the layer reads instead.
    pub fn forward(
        &self,
        embedded: &Tensor,
        lengths: &Lengths,
        mode: Mode,
        cut: &mut dyn FnMut(usize, &Tensor) -> Tensor,
    ) -> Vec<Tensor> {
        let reversal = Reversal::new(lengths);
        let mut states: Vec<Tensor> = Vec::new();
        for (number, layer) in self.layers.iter().enumerate() {
            let input = cut(number, states.last().unwrap_or(embedded));
            let output = self.past(number, &input, layer.forward(&input, &reversal, mode));
            states.push(dropout(&output, self.dropout, self.masks, mode, Site::Layer(number as u16)));
        }
        states
    }

    /// Sets the precision in which training computes the layers.
    pub fn set_precision(&mut self, precision: Precision) {
        self.layers.iter_mut().for_each(|layer| layer.set_precision(precision));
    }

    pub fn halves(&self) -> impl Iterator<Item = &HalfPrecisionCopies> {
        self.layers.iter().filter_map(Lstm::halves)
    }

    pub fn refresh_halves(&self) -> Result<()> {
        self.layers.iter().try_for_each(Lstm::refresh_halves)
    }

    /// A layer's output with its residual or highway connection.
    fn past(&self, number: usize, input: &Tensor, output: Tensor) -> Tensor {
        match self.connection {
            Connection::Residual if number > 0 => output + input,
            Connection::Highway if number > 0 => {
                let gate = self.gates[number - 1].forward(input).sigmoid();
                input + gate * (output - input)
            }
            _ => output,
        }
    }

    /// `forward(x, lengths)`: the states of every layer, with the device and data type of the weights; no dropout.
    pub fn script(&self, dtype: WeightDtype) -> Script {
        let mut source = format!(
            "{SCRIPT_HELPERS}
def forward(self, x: Tensor, lengths: Tensor) -> List[Tensor]:
{SCRIPT_REVERSAL}    states: List[Tensor] = []
"
        );
        for (number, layer) in self.layers.iter().enumerate() {
            source += &format!("    before = x\n{}", layer.script(dtype));
            source += &match self.connection {
                Connection::Residual if number > 0 => "    x = x + before\n".to_owned(),
                Connection::Highway if number > 0 => format!(
                    "    gate = torch.sigmoid(self.gate_l{number}.forward(before))\n    x = before + gate * (x - before)\n"
                ),
                _ => String::new(),
            };
            source += "    states.append(x)\n";
        }
        let quantized_cells = match dtype {
            WeightDtype::Int8 => self.layers.iter().flat_map(Lstm::quantized_cells).collect(),
            WeightDtype::Float => Vec::new(),
        };
        Script { source: source + "    return states\n", quantized_cells, ..Script::default() }
    }

    /// [`Self::script`] as ONNX operators.
    pub fn onnx(&self, graph: &mut Graph, embedded: &Value, lengths: &Value) -> Vec<Value> {
        let mut states: Vec<Value> = Vec::new();
        for (number, layer) in self.layers.iter().enumerate() {
            let input = states.last().unwrap_or(embedded).clone();
            let output = layer.onnx(graph, &input, lengths);
            states.push(match self.connection {
                Connection::Residual if number > 0 => graph.op("Add", &[&output, &input], vec![]),
                Connection::Highway if number > 0 => {
                    let gate = self.gates[number - 1].onnx(graph, &input);
                    let gate = graph.op("Sigmoid", &[&gate], vec![]);
                    let change = graph.op("Sub", &[&output, &input], vec![]);
                    let change = graph.op("Mul", &[&gate, &change], vec![]);
                    graph.op("Add", &[&input, &change], vec![])
                }
                _ => output,
            });
        }
        states
    }
}
