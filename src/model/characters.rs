//! Character features: a small CNN or LSTM over a word's UTF-8 bytes, which distinguishes unknown words.
//!
//! cnn: max_t relu(conv(c)_t) over the word's bytes (Ma & Hovy 2016, arXiv 1603.01354, section 2.1).
//! lstm: the last state of each direction over the word's bytes (Lample 2016, arXiv 1603.01360, section 4.1).
//! Differs from the papers in: bytes instead of characters (Gillick 2016, arXiv 1512.00103), so that no character is
//! unknown; a ReLU, so that positions beyond a word's end can be masked with 0.
//!
//! B sentences, T tokens, L bytes of the longest word, N = B*T, E embedding size, F filters, H hidden size. A byte is
//! stored as its value + 1; 0 is padding.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::lstm::{Lstm, Reversal, SCRIPT_HELPERS, SCRIPT_REVERSAL, last_states, last_states_onnx, last_states_script};
use super::parameters::Scope;
use super::{Mode, Script, WeightDtype};
use crate::libtorch::byte_convolution;
use crate::onnx::{Attribute, Element, Graph, Value};

/// 256 byte values and padding.
const N_BYTES: i64 = 257;

/// The `characters:` of an embedding; `kind:` names the variant.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CharactersConfig {
    /// No character features.
    None(NoCharacters),
    /// Convolution filters over the bytes of a word, followed by max pooling.
    Cnn(CnnConfig),
    /// The last states of a bidirectional LSTM over the bytes of a word.
    Lstm(LstmConfig),
}

impl Default for CharactersConfig {
    fn default() -> Self {
        CharactersConfig::Cnn(CnnConfig::default())
    }
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoCharacters {}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CnnConfig {
    /// Dimension of the byte embeddings. Default 30.
    #[schemars(range(min = 1, max = 100_000))]
    pub dim: i64,
    /// Number of filters, and so of features per word. Default 128.
    #[schemars(range(min = 1, max = 100_000))]
    pub filters: i64,
    /// Number of bytes that a filter spans, an odd number. Default 3.
    #[schemars(range(min = 1, max = 99))]
    pub width: i64,
    /// Number of bytes of a word that are read; the rest is ignored. Default 24.
    #[schemars(range(min = 1, max = 10_000))]
    pub max_bytes: usize,
}

impl Default for CnnConfig {
    fn default() -> Self {
        CnnConfig { dim: 30, filters: 128, width: 3, max_bytes: 24 }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LstmConfig {
    /// Dimension of the byte embeddings. Default 25.
    #[schemars(range(min = 1, max = 100_000))]
    pub dim: i64,
    /// Hidden size of each of the two directions. Default 25.
    #[schemars(range(min = 1, max = 100_000))]
    pub hidden: i64,
    /// Number of bytes of a word that are read; the rest is ignored. Default 24.
    #[schemars(range(min = 1, max = 10_000))]
    pub max_bytes: usize,
}

impl Default for LstmConfig {
    fn default() -> Self {
        LstmConfig { dim: 25, hidden: 25, max_bytes: 24 }
    }
}

impl CharactersConfig {
    /// Number of bytes of a word that are read; `None` without character features.
    pub fn max_bytes(&self) -> Option<usize> {
        match self {
            CharactersConfig::None(_) => None,
            CharactersConfig::Cnn(config) => Some(config.max_bytes),
            CharactersConfig::Lstm(config) => Some(config.max_bytes),
        }
    }
}

pub struct Characters {
    /// [257, E]
    weight: Tensor,
    reader: Reader,
}

enum Reader {
    /// Filters [F, E, width] and their bias `[F]`.
    Cnn(Tensor, Tensor),
    Lstm(Lstm, i64),
}

impl Characters {
    pub fn new(mut scope: Scope, config: &CharactersConfig) -> Option<Self> {
        let dim = match config {
            CharactersConfig::None(_) => return None,
            CharactersConfig::Cnn(config) => config.dim,
            CharactersConfig::Lstm(config) => config.dim,
        };
        // Uniform within sqrt(3 / E), as in both papers.
        let weight = scope.uniform_rows("weight", &[N_BYTES, dim], (3.0 / dim as f64).sqrt(), 0);
        let reader = match config {
            CharactersConfig::Lstm(config) => {
                Reader::Lstm(Lstm::new(&mut scope, 0, dim, config.hidden, true), config.hidden)
            }
            CharactersConfig::Cnn(CnnConfig { filters, width, .. }) => {
                let bound = 1.0 / ((dim * width) as f64).sqrt();
                let size = [*filters, dim, *width];
                Reader::Cnn(scope.uniform("filters", &size, bound), scope.uniform("bias", &[*filters], bound))
            }
            CharactersConfig::None(_) => return None,
        };
        Some(Characters { weight, reader })
    }

    /// Features per word.
    pub fn width(&self) -> i64 {
        match &self.reader {
            Reader::Cnn(filters, _) => filters.size()[0],
            Reader::Lstm(lstm, _) => lstm.width(),
        }
    }

    /// Bytes [B, T, L] to [B, T, F] or [B, T, 2*H].
    pub fn forward(&self, bytes: &Tensor, mode: Mode) -> Tensor {
        let flat = bytes.flatten(0, 1); // [N, L]
        let words = match &self.reader {
            Reader::Cnn(filters, bias) => {
                let by_offset = filters.permute([1, 2, 0]).flatten(1, 2); // [E, width * F]
                let table = self.weight.matmul(&by_offset).view([N_BYTES, filters.size()[2], filters.size()[0]]);
                byte_convolution(&table, bias, &flat)
                    .expect("invariant: all bytes are in the table")
                    .unwrap_or_else(|| convolution_by_operators(&self.embedded(&flat), filters, bias, &flat))
            }
            Reader::Lstm(lstm, hidden) => {
                let (x, lengths) = (self.embedded(&flat), lengths(&flat));
                let states = lstm.forward(&x, &Reversal::of(&lengths, flat.size()[1]), mode);
                last_states(&states, &lengths, *hidden)
            }
        };
        words.view([bytes.size()[0], bytes.size()[1], -1])
    }

    /// Bytes [N, L] to [N, L, E].
    fn embedded(&self, flat: &Tensor) -> Tensor {
        Tensor::embedding(&self.weight, flat, 0, false, false)
    }

    /// `forward(bytes)`. An LSTM's weights stay float32: they are few.
    pub fn script(&self) -> Script {
        let start = "
def forward(self, bytes: Tensor) -> Tensor:
    flat = bytes.flatten(0, 1)
    x = torch.embedding(self.weight, flat)
";
        let end = "    return x.view(bytes.size(0), bytes.size(1), -1)\n";
        match &self.reader {
            Reader::Cnn(filters, _) => {
                let padding = filters.size()[2] / 2;
                let source = format!(
                    "{start}    x = torch.relu(torch.conv1d(x.transpose(1, 2), self.filters, self.bias, [1], [{padding}]))
    x = (x * (flat > 0).unsqueeze(1).to(x.dtype)).amax([2])
{end}"
                );
                Script { source, ..Script::default() }
            }
            Reader::Lstm(lstm, hidden) => {
                let source = format!(
                    "{SCRIPT_HELPERS}{start}    lengths = (flat > 0).sum([1]).clamp(min=1)
{SCRIPT_REVERSAL}{}{}{end}",
                    lstm.script(WeightDtype::Float),
                    last_states_script("x", *hidden)
                );
                Script { source, ..Script::default() }
            }
        }
    }

    pub fn onnx(&self, graph: &mut Graph, bytes: &Value) -> Value {
        let flat = graph.op("Flatten", &[bytes], vec![Attribute::Int("axis", 2)]); // [N, L]
        let weight = graph.constant(&self.weight);
        let x = graph.op("Gather", &[&weight, &flat], vec![]);
        let zero = graph.constant(&Tensor::from(0i64));
        let real = graph.op("Greater", &[&flat, &zero], vec![]);
        let words = match &self.reader {
            Reader::Cnn(filters, bias) => {
                let x = graph.transpose(&x, &[0, 2, 1]);
                let padding = filters.size()[2] / 2;
                let (filters, bias) = (graph.constant(filters), graph.constant(bias));
                let x = graph.op("Conv", &[&x, &filters, &bias], vec![Attribute::Ints("pads", vec![padding; 2])]);
                let x = graph.op("Relu", &[&x], vec![]);
                let real = graph.cast(&real, Element::Float);
                let real = graph.unsqueeze(&real, 1);
                let x = graph.op("Mul", &[&x, &real], vec![]);
                graph.op("ReduceMax", &[&x], vec![Attribute::Ints("axes", vec![2]), Attribute::Int("keepdims", 0)])
            }
            Reader::Lstm(lstm, hidden) => {
                let real = graph.cast(&real, Element::Int64);
                let lengths = graph.sum(&real, 1);
                let one = graph.constant(&Tensor::from(1i64));
                let lengths = graph.op("Max", &[&lengths, &one], vec![]);
                let states = lstm.onnx(graph, &x, &lengths);
                last_states_onnx(graph, &states, &lengths, (*hidden, lstm.width()))
            }
        };
        let shape = graph.op("Shape", &[bytes], vec![]);
        let shape = graph.slice(&shape, 0, 0, 2);
        let width = graph.ints(&[-1]);
        let shape = graph.op("Concat", &[&shape, &width], vec![Attribute::Int("axis", 0)]);
        graph.op("Reshape", &[&words, &shape], vec![])
    }
}

/// As [`byte_convolution`], from the embedded bytes `x` [N, L, E]: [N, F].
fn convolution_by_operators(x: &Tensor, filters: &Tensor, bias: &Tensor, flat: &Tensor) -> Tensor {
    let padding = filters.size()[2] / 2;
    let x = x.transpose(1, 2).conv1d(filters, Some(bias), 1, padding, 1, 1).relu(); // [N, F, L]
    (x * flat.gt(0).unsqueeze(1)).amax([2], false)
}

/// The number of bytes of each word, at least 1: `[N]`.
fn lengths(flat: &Tensor) -> Tensor {
    flat.gt(0).sum_dim_intlist([1].as_slice(), false, tch::Kind::Int64).clamp_min(1)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::model::parameters::Parameters;

    #[test]
    fn the_convolution_and_its_gradients_are_those_of_libtorch_s_operators() {
        tch::manual_seed(5);
        for width in [1, 3, 5] {
            let mut parameters = Parameters::new(Device::Cpu);
            let config = CnnConfig { dim: 7, filters: 37, width, max_bytes: 24 };
            let characters = Characters::new(parameters.root(), &CharactersConfig::Cnn(config)).unwrap();
            let Reader::Cnn(filters, bias) = &characters.reader else { unreachable!("a CNN was asked for") };
            // Words of every length from none, among them repetitions of one byte: ties.
            let bytes = Tensor::randint_low(1, 257, [2, 9, 8], (tch::Kind::Int64, Device::Cpu));
            let repeated = Tensor::from(98i64).expand([2, 1, 8], false);
            let bytes = Tensor::cat(&[bytes, repeated], 1);
            let lengths = Tensor::from_slice(&[8i64, 7, 6, 5, 4, 3, 2, 1, 0, 6]).view([1, 10, 1]);
            let bytes = bytes * Tensor::arange(8, (tch::Kind::Int64, Device::Cpu)).less_tensor(&lengths);
            let flat = bytes.flatten(0, 1);
            let ours = characters.forward(&bytes, Mode::Eval);
            let theirs = convolution_by_operators(&characters.embedded(&flat), filters, bias, &flat).view_as(&ours);
            assert!(ours.allclose(&theirs, 1e-5, 1e-6, false), "width {width}");
            let weights = Tensor::randn_like(&ours);
            let gradients = |x: &Tensor| {
                let inputs = parameters.tensors();
                Tensor::run_backward(&[(x * &weights).sum(tch::Kind::Float)], &inputs, false, false)
            };
            for ((name, _), (a, b)) in parameters.iter().zip(gradients(&ours).iter().zip(&gradients(&theirs))) {
                assert!(a.allclose(b, 1e-4, 1e-5, false), "{name}, width {width}");
            }
        }
    }
}
