//! One LSTM layer in one or both directions: in the trunk, in a head, or over the bytes of words.
//!
//! B rows, T positions, E inputs, H hidden, D directions.
//!
//! A layer is one call of libtorch's LSTM without packing, so that oneDNN and cuDNN can run both directions in
//! parallel. Where cuDNN has a kernel for whole sequences, each direction is a separate call and both run concurrently,
//! as a GPU has room for two such kernels. In a batch with padding, the reverse direction reads each row reversed
//! within its length, which gives the result of packing.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::parameters::Scope;
use super::precision::{HalfPrecisionCopies, Precision, pad_last};
use super::{Mode, QuantizedCell, WeightDtype};
use crate::data::Lengths;
use crate::libtorch::both_directions;
use crate::onnx::{Attribute, Element, Graph, Value};

/// Largest H for which cuDNN, as called by libtorch 2.11, uses kernels for whole sequences, forward and backward.
const LARGEST_IN_ONE_KERNEL: i64 = 128;

/// 16-bit matrix products on a GPU are fast for multiples of it: on an H200 the gradient of 1,920 inputs at H 256 takes
/// 36 us with E 300, and 10 us with E padded to 304.
const TENSOR_CORE_MULTIPLE: i64 = 8;

/// The weights of one direction: weight_ih, weight_hh, bias_ih, bias_hh.
type Direction = [Tensor; 4];

pub struct Lstm {
    forward: Direction,
    reverse: Option<Direction>,
    hidden: i64,
    /// `lN`, the suffix of its parameters' names.
    suffix: String,
    /// Parameter index of its first weight; the others follow.
    first: usize,
    /// On CUDA, the memory that holds its weights: one block per cuDNN call.
    memory: Vec<Tensor>,
    /// 16-bit copies that training reads instead of the weights, and the memory that holds them.
    halves: Option<(HalfPrecisionCopies, Vec<Tensor>)>,
}

/// Positions that reverse each row within its length, for the reverse direction; shared by the layers of a pass.
pub struct Reversal {
    positions: Option<Tensor>,
}

impl Reversal {
    pub fn new(lengths: &Lengths) -> Self {
        Reversal { positions: (!lengths.is_unpadded()).then(|| reversed_positions(&lengths.device, lengths.max)) }
    }

    /// For rows of `lengths` `[B]` in a batch of width `max`, padded or not.
    pub fn of(lengths: &Tensor, max: i64) -> Self {
        Reversal { positions: Some(reversed_positions(lengths, max)) }
    }
}

impl Lstm {
    /// Layer `number` of a stack. Names and initialization (uniform within 1 / sqrt(H)) are those of PyTorch's `nn.LSTM`.
    pub fn new(scope: &mut Scope, number: usize, inputs: i64, hidden: i64, bidirectional: bool) -> Self {
        let bound = 1.0 / (hidden as f64).sqrt();
        let first = scope.count();
        let mut direction = |suffix: &str| {
            let sizes: [(&str, &[i64]); 4] = [
                ("weight_ih", &[4 * hidden, inputs]),
                ("weight_hh", &[4 * hidden, hidden]),
                ("bias_ih", &[4 * hidden]),
                ("bias_hh", &[4 * hidden]),
            ];
            sizes.map(|(name, size)| scope.uniform(&format!("{name}_l{number}{suffix}"), size, bound))
        };
        let forward = direction("");
        let reverse = bidirectional.then(|| direction("_reverse"));
        let suffix = format!("l{number}");
        let mut lstm = Lstm { forward, reverse, hidden, suffix, first, memory: Vec::new(), halves: None };
        lstm.memory = lstm.flatten(&lstm.weights());
        lstm
    }

    /// In the order of the parameters.
    fn weights(&self) -> Vec<&Tensor> {
        self.forward.iter().chain(self.reverse.iter().flatten()).collect()
    }

    /// Whether the directions run concurrently as separate calls. For larger H one call is faster: on an H100 a step of
    /// 64 x 30 tokens at H 256 takes 1.34 ms, and 1.87 ms with separate calls.
    fn apart(&self, device: Device) -> bool {
        device != Device::Cpu && self.reverse.is_some() && self.hidden <= LARGEST_IN_ONE_KERNEL
    }

    /// Moves weights on CUDA into one block of memory per call, in cuDNN's order; cuDNN would otherwise copy them each
    /// time.
    fn flatten(&self, weights: &[&Tensor]) -> Vec<Tensor> {
        let device = weights[0].device();
        if device == Device::Cpu {
            return Vec::new();
        }
        let (inputs, n) = (weights[0].size()[1], if self.apart(device) { 4 } else { weights.len() });
        let flatten = |call: &[&Tensor]| {
            // 4 tensors per direction; 2 is LSTM in cudnnRNNMode_t. The weights become views of the result.
            tch::no_grad(|| {
                Tensor::internal_cudnn_rnn_flatten_weight(call, 4, inputs, 2, self.hidden, 0, 1, true, n == 8)
            })
        };
        weights.chunks(n).map(flatten).collect()
    }

    /// Sets the precision in which training computes the layer.
    pub fn set_precision(&mut self, precision: Precision) {
        let multiple = if self.forward[0].device() == Device::Cpu { 1 } else { TENSOR_CORE_MULTIPLE };
        self.halves = (precision != Precision::Float32).then(|| self.copies(precision.kind(), multiple));
    }

    /// 16-bit copies, for inputs that are padded to a multiple of `multiple`.
    fn copies(&self, kind: Kind, multiple: i64) -> (HalfPrecisionCopies, Vec<Tensor>) {
        let inputs = (self.forward[0].size()[1] as u64).next_multiple_of(multiple as u64) as i64;
        let copy = |direction: &Direction| {
            let [weight_ih, weight_hh, bias_ih, bias_hh] =
                direction.each_ref().map(|weight| weight.detach().to_kind(kind));
            [pad_last(&weight_ih, inputs), weight_hh, bias_ih, bias_hh].map(|copy| copy.set_requires_grad(true))
        };
        let copies: Vec<Tensor> = std::iter::once(&self.forward).chain(&self.reverse).flat_map(copy).collect();
        let memory = self.flatten(&copies.iter().collect::<Vec<_>>());
        (HalfPrecisionCopies { first: self.first, copies }, memory)
    }

    pub fn halves(&self) -> Option<&HalfPrecisionCopies> {
        self.halves.as_ref().map(|(halves, _)| halves)
    }

    pub fn refresh_halves(&self) -> Result<()> {
        self.halves().map_or(Ok(()), |halves| halves.refresh(&self.weights()))
    }

    /// Features per position of its output: D*H.
    pub fn width(&self) -> i64 {
        self.hidden * if self.reverse.is_some() { 2 } else { 1 }
    }

    /// [B, T, E] to [B, T, D*H]; undefined beyond a row's end.
    pub fn forward(&self, input: &Tensor, reversal: &Reversal, mode: Mode) -> Tensor {
        let (weights, memory) = match &self.halves {
            Some((halves, memory)) if mode.training() => (halves.copies.iter().collect(), memory),
            _ => (self.weights(), &self.memory),
        };
        let kind = if mode.training() { weights[0].kind() } else { input.kind() };
        let x = pad_last(&input.to_kind(kind), weights[0].size()[1]);
        let output = match (&reversal.positions, weights.split_at(4)) {
            (None, _) if !self.apart(x.device()) => self.run(&x, &weights, mode),
            (_, (_, [])) => self.run(&x, &weights, mode),
            (Some(turned), (forward, reverse)) if !self.apart(x.device()) => {
                let backward = self.run(&reorder(&x, turned), reverse, mode);
                Tensor::cat(&[self.run(&x, forward, mode), reorder(&backward, turned)], -1) // [B, T, 2*H]
            }
            (turned, _) => {
                let (memory, rows) = (memory.iter().collect::<Vec<_>>(), x.size()[0]);
                // Time-major, as cuDNN reads: [t, b] has index t * B + b.
                let flat = |turned: &Tensor| {
                    let row = Tensor::arange(rows, (Kind::Int64, turned.device()));
                    (turned.transpose(0, 1) * rows + row).flatten(0, 1)
                };
                let places = turned.as_ref().map(flat);
                both_directions(&x.transpose(0, 1), &weights, &memory, places.as_ref(), mode.training())
                    .expect("invariant: the shapes are those of the layer")
                    .transpose(0, 1) // [B, T, 2*H]
            }
        };
        output.to_kind(input.kind())
    }

    /// `weights` are those of one direction or of both.
    fn run(&self, input: &Tensor, weights: &[&Tensor], mode: Mode) -> Tensor {
        let both = weights.len() == 8;
        let zero = Tensor::zeros([1 + i64::from(both), input.size()[0], self.hidden], (input.kind(), input.device()));
        let (output, _, _) = input.lstm(&[&zero, &zero], weights, true, 1, 0.0, mode.training(), both, true);
        output
    }

    /// Lines of a TorchScript method that map `x` [B, T, E] to [B, T, D*H]. They use the methods of [`SCRIPT_HELPERS`]
    /// and the variables of [`SCRIPT_REVERSAL`].
    pub fn script(&self, dtype: WeightDtype) -> String {
        let weights = |end: &str| match dtype {
            WeightDtype::Float => {
                let names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"];
                names.map(|name| format!("self.{name}_{}{end}", self.suffix)).join(", ")
            }
            WeightDtype::Int8 => format!("self.cell_{}{end}", self.suffix),
        };
        let lstm = |input: &str, weights: &str, n: usize| {
            let (hidden, both) = (self.hidden, if n == 2 { "True" } else { "False" });
            let call = format!("({input}, self.zero(x, {n}, {hidden}), [{weights}], True, 1, 0.0, False, {both}, True");
            match dtype {
                WeightDtype::Float => format!("torch.lstm{call})[0]"),
                // 12 is qint8 in c10::ScalarType.
                WeightDtype::Int8 => format!("torch.quantized_lstm{call}, dtype=12, use_dynamic=True)[0]"),
            }
        };
        let (forward, reverse) = (weights(""), weights("_reverse"));
        match self.reverse {
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
        }
    }

    /// Its directions for a module with int8 weights, with the names that [`Self::script`] uses.
    pub fn quantized_cells(&self) -> Vec<QuantizedCell> {
        let copies = |direction: &Direction| direction.each_ref().map(|weight| weight.detach().copy());
        let cell = |end: &str, direction| (format!("cell_{}{end}", self.suffix), copies(direction));
        let reverse = self.reverse.as_ref().map(|direction| cell("_reverse", direction));
        std::iter::once(cell("", &self.forward)).chain(reverse).collect()
    }

    /// The layer as an ONNX LSTM operator; `lengths` `[B]` are int64.
    pub fn onnx(&self, graph: &mut Graph, x: &Value, lengths: &Value) -> Value {
        let lengths = graph.cast(lengths, Element::Int32);
        let x = graph.transpose(x, &[1, 0, 2]); // [T, B, E]
        let directions: Vec<&Direction> = std::iter::once(&self.forward).chain(&self.reverse).collect();
        let stacked = |part: &dyn Fn(&Direction) -> Tensor| {
            Tensor::stack(&directions.iter().map(|direction| part(direction)).collect::<Vec<_>>(), 0)
        };
        let weights = [
            stacked(&|d| onnx_gates(&d[0])),
            stacked(&|d| onnx_gates(&d[1])),
            stacked(&|d| Tensor::cat(&[onnx_gates(&d[2]), onnx_gates(&d[3])], 0)),
        ];
        let [w, r, b] = weights.map(|weights| graph.constant(&weights)); // [D, 4*H, ...], [D, 8*H]
        let direction = if self.reverse.is_some() { "bidirectional" } else { "forward" };
        let attributes = vec![Attribute::Int("hidden_size", self.hidden), Attribute::Text("direction", direction)];
        let states = graph.op("LSTM", &[&x, &w, &r, &b, &lengths], attributes); // [T, D, B, H]
        let states = graph.transpose(&states, &[0, 2, 1, 3]);
        let shape = graph.ints(&[0, 0, -1]);
        let x = graph.op("Reshape", &[&states, &shape], vec![]); // [T, B, D*H]
        graph.transpose(&x, &[1, 0, 2])
    }
}

/// Methods that [`Lstm::script`] calls.
pub const SCRIPT_HELPERS: &str = "
def zero(self, x: Tensor, directions: int, hidden: int) -> List[Tensor]:
    zero = torch.zeros([directions, x.size(0), hidden], dtype=x.dtype, device=x.device)
    return [zero, zero]

def reorder(self, x: Tensor, positions: Tensor) -> Tensor:
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.size(2)))
";

/// Lines that define `even` and `turned` from `x` [B, T, ...] and `lengths` `[B]`.
pub const SCRIPT_REVERSAL: &str = "    positions = torch.arange(x.size(1), device=x.device).unsqueeze(0)
    turned = lengths.unsqueeze(1) - 1 - positions
    turned = torch.where(turned >= 0, turned, positions.expand_as(turned))
    even = bool((lengths == x.size(1)).all())
";

/// Reorders gates from PyTorch's input, forget, cell, output to ONNX's input, output, forget, cell.
fn onnx_gates(weight: &Tensor) -> Tensor {
    let gates = weight.detach().chunk(4, 0);
    Tensor::cat(&[&gates[0], &gates[3], &gates[1], &gates[2]], 0)
}

/// The forward state at each row's last position and the reverse state, if any, at its first: [B, D*H].
pub fn last_states(states: &Tensor, lengths: &Tensor, hidden: i64) -> Tensor {
    let last = (lengths - 1).unsqueeze(1); // [B, 1]
    let forward = reorder(states, &last).squeeze_dim(1).narrow(1, 0, hidden); // [B, H]
    match states.size()[2] == hidden {
        true => forward,
        false => Tensor::cat(&[forward, states.select(1, 0).narrow(1, hidden, hidden)], -1),
    }
}

/// [`last_states`] as lines of a TorchScript method that set `x` [B, D*H] from `lengths` and the variable named by
/// `states`.
pub fn last_states_script(states: &str, hidden: i64) -> String {
    format!(
        "    index = (lengths - 1).view(-1, 1, 1).expand(-1, 1, {hidden})
    last = {states}[:, :, :{hidden}].gather(1, index).squeeze(1)
    if {states}.size(2) > {hidden}:
        last = torch.cat([last, {states}[:, 0, {hidden}:]], -1)
    x = last
"
    )
}

/// [`last_states`] in ONNX, for states of `width` = D*H.
pub fn last_states_onnx(graph: &mut Graph, states: &Value, lengths: &Value, (hidden, width): (i64, i64)) -> Value {
    let one = graph.constant(&Tensor::from(1i64));
    let last = graph.op("Sub", &[lengths, &one], vec![]);
    let last = graph.unsqueeze(&last, 1);
    let forward = graph.slice(states, 2, 0, hidden);
    let forward = graph.at(&forward, &last, hidden); // [B, 1, H]
    let both = match width > hidden {
        false => forward,
        true => {
            let first = graph.slice(states, 1, 0, 1);
            let reverse = graph.slice(&first, 2, hidden, width);
            graph.op("Concat", &[&forward, &reverse], vec![Attribute::Int("axis", -1)])
        }
    };
    graph.squeeze(&both, 1)
}

/// Positions in reverse order within each row's length, unchanged beyond it: [B, max].
fn reversed_positions(lengths: &Tensor, max: i64) -> Tensor {
    let positions = Tensor::arange(max, (Kind::Int64, lengths.device())).unsqueeze(0);
    let turned = lengths.unsqueeze(1) - 1 - &positions;
    turned.where_self(&turned.ge(0), &positions.expand_as(&turned))
}

/// x[b, positions[b, t]], for x of [B, T, F].
pub fn reorder(x: &Tensor, positions: &Tensor) -> Tensor {
    // An embedding look-up of whole rows: the deterministic gradient of a gather on CUDA sorts every element
    // separately.
    let (rows, each) = (x.size()[0], x.size()[1]);
    let starts = Tensor::arange(rows, (Kind::Int64, x.device())) * each;
    Tensor::embedding(&x.flatten(0, 1), &(positions + starts.unsqueeze(1)), -1, false, false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Draws;
    use crate::model::parameters::Parameters;

    #[test]
    fn padded_copies_give_what_copies_without_padding_give() {
        tch::manual_seed(3);
        let mut parameters = Parameters::new(Device::Cpu);
        let mut lstm = Lstm::new(&mut parameters.root(), 0, 5, 4, true);
        let input = Tensor::randn([3, 6, 5], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let reversal = Reversal::of(&Tensor::from_slice(&[6i64, 4, 1]), 6);
        let mut run = |multiple: i64| {
            lstm.halves = Some(lstm.copies(Kind::BFloat16, multiple));
            let width = lstm.halves().unwrap().copies[4].size()[1];
            let output = lstm.forward(&input, &reversal, Mode::Train(Draws::new(1)));
            let copies = &lstm.halves().unwrap().copies;
            let inputs: Vec<&Tensor> = copies.iter().chain([&input]).collect();
            let total = output.square().sum(Kind::Float);
            (width, output, Tensor::run_backward(&[total], &inputs, false, false))
        };
        let ((narrow, plain, expected), (wide, padded, gradients)) = (run(1), run(8));
        assert_eq!((narrow, wide), (5, 8));
        assert!(plain.allclose(&padded, 1e-2, 1e-2, false), "{}", (&plain - &padded).abs().max());
        for (a, b) in expected.iter().zip(&gradients) {
            let (width, padded) = (a.size()[a.dim() - 1], b.size()[b.dim() - 1]);
            let trimmed = b.narrow(-1, 0, width);
            assert!(trimmed.allclose(a, 2e-2, 2e-2, false), "{}", (a - &trimmed).abs().max());
            let beyond = b.narrow(-1, width, padded - width);
            assert_eq!(beyond.count_nonzero(None::<i64>).int64_value(&[]), 0, "padding has a gradient");
        }
        let weights: Vec<Tensor> = lstm.weights().iter().map(|weight| weight.detach()).collect();
        weights.iter().for_each(|weight| drop(weight.shallow_clone().fill_(0.5)));
        lstm.refresh_halves().unwrap();
        let copy = &lstm.halves().unwrap().copies[0];
        assert_eq!(copy.narrow(1, 0, 5), weights[0].to_kind(Kind::BFloat16));
        assert_eq!(copy.narrow(1, 5, 3).abs().max().double_value(&[]), 0.0);
    }
}
