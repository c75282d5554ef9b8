//! ONNX files: the messages of onnx.proto (github.com/onnx/onnx, IR version 8) that exports need, and a graph builder.
//!
//! Field numbers are those of onnx.proto; operators are those of opset 17.

use prost::Message;
use tch::{Device, Kind, Tensor};

#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(int64, tag = "1")]
    ir_version: i64,
    #[prost(string, tag = "2")]
    producer_name: String,
    #[prost(string, tag = "3")]
    producer_version: String,
    #[prost(message, optional, tag = "7")]
    graph: Option<GraphProto>,
    #[prost(message, repeated, tag = "8")]
    opset_import: Vec<OperatorSet>,
    #[prost(message, repeated, tag = "14")]
    metadata: Vec<Entry>,
}

#[derive(Clone, PartialEq, Message)]
struct OperatorSet {
    #[prost(string, tag = "1")]
    domain: String,
    #[prost(int64, tag = "2")]
    version: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Entry {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

#[derive(Clone, PartialEq, Message)]
struct GraphProto {
    #[prost(message, repeated, tag = "1")]
    node: Vec<NodeProto>,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(message, repeated, tag = "5")]
    initializer: Vec<TensorProto>,
    #[prost(message, repeated, tag = "11")]
    input: Vec<ValueInfo>,
    #[prost(message, repeated, tag = "12")]
    output: Vec<ValueInfo>,
}

#[derive(Clone, PartialEq, Message)]
struct NodeProto {
    #[prost(string, repeated, tag = "1")]
    input: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    output: Vec<String>,
    #[prost(string, tag = "4")]
    op_type: String,
    #[prost(message, repeated, tag = "5")]
    attribute: Vec<AttributeProto>,
}

#[derive(Clone, PartialEq, Message)]
struct AttributeProto {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(int64, optional, tag = "3")]
    i: Option<i64>,
    #[prost(bytes = "vec", optional, tag = "4")]
    s: Option<Vec<u8>>,
    #[prost(message, optional, tag = "6")]
    g: Option<GraphProto>,
    #[prost(int64, repeated, packed = "false", tag = "8")]
    ints: Vec<i64>,
    /// INT 2, STRING 3, GRAPH 5, INTS 7.
    #[prost(int32, tag = "20")]
    kind: i32,
}

#[derive(Clone, PartialEq, Message)]
struct TensorProto {
    #[prost(int64, repeated, packed = "false", tag = "1")]
    dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    data_type: i32,
    #[prost(string, tag = "8")]
    name: String,
    #[prost(bytes = "vec", tag = "9")]
    raw_data: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct ValueInfo {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    kind: Option<TypeProto>,
}

#[derive(Clone, PartialEq, Message)]
struct TypeProto {
    #[prost(message, optional, tag = "1")]
    tensor: Option<TensorType>,
}

#[derive(Clone, PartialEq, Message)]
struct TensorType {
    #[prost(int32, tag = "1")]
    element: i32,
    #[prost(message, optional, tag = "2")]
    shape: Option<Shape>,
}

#[derive(Clone, PartialEq, Message)]
struct Shape {
    #[prost(message, repeated, tag = "1")]
    dim: Vec<Dimension>,
}

#[derive(Clone, PartialEq, Message)]
struct Dimension {
    #[prost(int64, optional, tag = "1")]
    value: Option<i64>,
    #[prost(string, optional, tag = "2")]
    parameter: Option<String>,
}

/// Element types, with their values in TensorProto.DataType.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    Float = 1,
    Int32 = 6,
    Int64 = 7,
    Bool = 9,
}

/// A dimension of an input or output: a fixed size, or the name of a dynamic one.
#[derive(Clone, Copy, Debug)]
pub enum Size {
    Is(i64),
    Free(&'static str),
}

/// An attribute of an operator.
pub enum Attribute {
    Int(&'static str, i64),
    Ints(&'static str, Vec<i64>),
    Text(&'static str, &'static str),
    Body(&'static str, Graph),
}

/// A value in a graph, by name.
pub type Value = String;

/// A graph under construction. Loop bodies may use values of the enclosing graph.
#[derive(Default)]
pub struct Graph {
    proto: GraphProto,
    prefix: String,
    n_values: usize,
}

impl Graph {
    pub fn new(name: &str) -> Self {
        Graph { proto: GraphProto { name: name.to_owned(), ..Default::default() }, ..Default::default() }
    }

    /// A graph for a loop body in this one, with its own value names.
    pub fn body(&mut self, name: &str) -> Self {
        self.n_values += 1;
        Graph { prefix: format!("{}{name}{}.", self.prefix, self.n_values), ..Graph::new(name) }
    }

    fn fresh(&mut self) -> Value {
        self.n_values += 1;
        format!("{}v{}", self.prefix, self.n_values)
    }

    /// Adds an operator with one output.
    pub fn op(&mut self, kind: &str, inputs: &[&Value], attributes: Vec<Attribute>) -> Value {
        self.ops(kind, inputs, attributes, 1).swap_remove(0)
    }

    /// Adds an operator with `n` outputs. An input with an empty name is an omitted optional input.
    pub fn ops(&mut self, kind: &str, inputs: &[&Value], attributes: Vec<Attribute>, n: usize) -> Vec<Value> {
        let output: Vec<Value> = (0..n).map(|_| self.fresh()).collect();
        let attribute = attributes.into_iter().map(|attribute| match attribute {
            Attribute::Int(name, i) => AttributeProto { name: name.into(), i: Some(i), kind: 2, ..Default::default() },
            Attribute::Ints(name, ints) => AttributeProto { name: name.into(), ints, kind: 7, ..Default::default() },
            Attribute::Text(name, s) => {
                AttributeProto { name: name.into(), s: Some(s.into()), kind: 3, ..Default::default() }
            }
            Attribute::Body(name, body) => {
                AttributeProto { name: name.into(), g: Some(body.proto), kind: 5, ..Default::default() }
            }
        });
        self.proto.node.push(NodeProto {
            input: inputs.iter().map(|input| (*input).clone()).collect(),
            output: output.clone(),
            op_type: kind.to_owned(),
            attribute: attribute.collect(),
        });
        output
    }

    /// A constant: int64 for an int64 tensor, else float32.
    pub fn constant(&mut self, tensor: &Tensor) -> Value {
        let name = self.fresh();
        let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
        let (element, tensor) = match tensor.kind() {
            Kind::Int64 => (Element::Int64, tensor),
            _ => (Element::Float, tensor.to_kind(Kind::Float)),
        };
        let mut raw_data = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.copy_data_u8(&mut raw_data, tensor.numel());
        let (dims, data_type) = (tensor.size(), element as i32);
        self.proto.initializer.push(TensorProto { dims, data_type, name: name.clone(), raw_data });
        name
    }

    /// A constant list of integers, such as axes or a shape.
    pub fn ints(&mut self, values: &[i64]) -> Value {
        self.constant(&Tensor::from_slice(values))
    }

    /// A constant float32 scalar.
    pub fn number(&mut self, value: f32) -> Value {
        self.constant(&Tensor::from(value))
    }

    pub fn input(&mut self, name: &str, element: Element, sizes: &[Size]) -> Value {
        let name = format!("{}{name}", self.prefix);
        self.proto.input.push(info(&name, element, sizes));
        name
    }

    /// Makes `value` an output called `name`.
    pub fn output(&mut self, value: &Value, name: &str, element: Element, sizes: &[Size]) {
        let name = format!("{}{name}", self.prefix);
        let node = NodeProto {
            input: vec![value.clone()],
            output: vec![name.clone()],
            op_type: "Identity".into(),
            attribute: vec![],
        };
        self.proto.node.push(node);
        self.proto.output.push(info(&name, element, sizes));
    }

    /// The file's content, with `texts` as metadata by key.
    pub fn into_bytes(self, texts: &[(&str, String)]) -> Vec<u8> {
        let metadata = texts.iter().map(|(key, value)| Entry { key: (*key).to_owned(), value: value.clone() });
        ModelProto {
            ir_version: 8,
            producer_name: "polytask".into(),
            producer_version: env!("CARGO_PKG_VERSION").into(),
            graph: Some(self.proto),
            opset_import: vec![OperatorSet { domain: String::new(), version: 17 }],
            metadata: metadata.collect(),
        }
        .encode_to_vec()
    }
}

/// Operators that several parts of the model need.
impl Graph {
    /// x W^T + b for x of any rank.
    pub fn linear(&mut self, x: &Value, weight: &Tensor, bias: &Tensor) -> Value {
        let (weight, bias) = (self.constant(&weight.detach().tr()), self.constant(bias));
        let product = self.op("MatMul", &[x, &weight], vec![]);
        self.op("Add", &[&product, &bias], vec![])
    }

    pub fn unsqueeze(&mut self, x: &Value, axis: i64) -> Value {
        let axes = self.ints(&[axis]);
        self.op("Unsqueeze", &[x, &axes], vec![])
    }

    pub fn cast(&mut self, x: &Value, to: Element) -> Value {
        self.op("Cast", &[x], vec![Attribute::Int("to", to as i64)])
    }

    pub fn transpose(&mut self, x: &Value, order: &[i64]) -> Value {
        self.op("Transpose", &[x], vec![Attribute::Ints("perm", order.to_vec())])
    }

    /// The sum along an axis, which is removed.
    pub fn sum(&mut self, x: &Value, axis: i64) -> Value {
        let axis = self.ints(&[axis]);
        self.op("ReduceSum", &[x, &axis], vec![Attribute::Int("keepdims", 0)])
    }

    pub fn squeeze(&mut self, x: &Value, axis: i64) -> Value {
        let axes = self.ints(&[axis]);
        self.op("Squeeze", &[x, &axes], vec![])
    }

    pub fn slice(&mut self, x: &Value, axis: i64, from: i64, to: i64) -> Value {
        let [from, to, axis] = [from, to, axis].map(|value| self.ints(&[value]));
        self.op("Slice", &[x, &from, &to, &axis], vec![])
    }

    /// True within the lengths `[B]` along axis 1 of `like` [B, T, ...]: [B, T].
    pub fn mask(&mut self, like: &Value, lengths: &Value) -> Value {
        let shape = self.op("Shape", &[like], vec![]);
        let one = self.ints(&[1]);
        let width = self.op("Gather", &[&shape, &one], vec![]);
        let width = self.squeeze(&width, 0);
        let (zero, step) = (self.constant(&Tensor::from(0i64)), self.constant(&Tensor::from(1i64)));
        let positions = self.op("Range", &[&zero, &width, &step], vec![]); // [T]
        let lengths = self.unsqueeze(lengths, 1);
        self.op("Less", &[&positions, &lengths], vec![])
    }

    /// x[b, positions[b, w]] for x [B, T, F].
    pub fn at(&mut self, x: &Value, positions: &Value, features: i64) -> Value {
        let positions = self.unsqueeze(positions, 2);
        let shape = self.ints(&[1, 1, features]);
        let index = self.op("Expand", &[&positions, &shape], vec![]);
        self.op("GatherElements", &[x, &index], vec![Attribute::Int("axis", 1)])
    }
}

fn info(name: &str, element: Element, sizes: &[Size]) -> ValueInfo {
    let dim = sizes.iter().map(|size| match size {
        Size::Is(value) => Dimension { value: Some(*value), parameter: None },
        Size::Free(name) => Dimension { value: None, parameter: Some((*name).to_owned()) },
    });
    let shape = Some(Shape { dim: dim.collect() });
    let tensor = Some(TensorType { element: element as i32, shape });
    ValueInfo { name: name.to_owned(), kind: Some(TypeProto { tensor }) }
}
