//! A trained model as one TorchScript file: weights, code, and everything needed to encode text and decode labels.
//!
//! The module is compiled from TorchScript source that each part of the model provides next to its forward pass, so
//! that batch size and length are dynamic and control flow is kept. Parameters keep their names, such as
//! `embedding.weight`.
//!
//! `forward(token_ids [B, T], lengths [B], first_tokens [B, W] = None, n_words [B] = None)` returns for each task
//! `TASK.logits` and `TASK.labels`. The last two inputs are for tokenizers that split words: the position of each
//! word's first token, and the number of words. A model that reads characters takes `bytes [B, T, L]` after `lengths`:
//! the UTF-8 bytes of each token's word, each plus 1, truncated at `max_bytes` and padded with 0.

pub mod card;
pub mod triton;
mod verify;

use anyhow::{Result, ensure};
use indexmap::IndexMap;
use tch::{Kind, Tensor};

pub use verify::{Cases, Mismatch, scores};

use crate::libtorch::ScriptModule;
use crate::model::{Model, Script, WeightDtype, distribution_script};
use crate::task::{Task, TaskId};

/// The data type of an exported model's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Dtype {
    Float32,
    Float16,
    Bfloat16,
    /// float32 with LSTM and affine weights in int8, for the CPU.
    Int8,
}

impl Dtype {
    pub fn kind(self) -> Kind {
        match self {
            Dtype::Float32 | Dtype::Int8 => Kind::Float,
            Dtype::Float16 => Kind::Half,
            Dtype::Bfloat16 => Kind::BFloat16,
        }
    }

    pub fn name(self) -> &'static str {
        ["float32", "float16", "bfloat16", "int8"][self as usize]
    }

    /// Maximum difference of logits from the original model's, relative to the largest logit: float32 sums in another
    /// order, or rounding in the data type over many recurrent steps. It detects faults; dev scores show the quality.
    pub fn tolerance(self) -> f64 {
        [1e-5, 2e-2, 1e-1, 2e-1][self as usize]
    }
}

/// What a module's `forward` returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// `Dict[str, Tensor]`.
    Dictionary,
    /// A tuple in the order of [`output_names`], for servers that identify outputs by position.
    Tuple,
}

/// `TASK.logits` and `TASK.labels` of every task.
pub fn output_names(tasks: &[Task]) -> Vec<String> {
    tasks.iter().flat_map(|task| ["logits", "labels"].map(|part| format!("{}.{part}", task.name))).collect()
}

/// A module to be built: parameters and children by name.
#[derive(Default)]
struct Node {
    parameters: Vec<(String, Tensor)>,
    children: IndexMap<String, Node>,
    script: Script,
}

impl Node {
    fn at(&mut self, path: &str) -> &mut Node {
        path.split('.').fold(self, |node, name| node.children.entry(name.to_owned()).or_default())
    }

    fn build(&self, name: &str, dtype: WeightDtype) -> Result<ScriptModule> {
        let mut module = ScriptModule::new(name)?;
        for (name, child) in &self.children {
            module.add_child(name, &child.build(name, dtype)?)?;
        }
        if let Some((weight, bias)) = self.affine() {
            return affine(module, weight, bias, dtype);
        }
        for (name, cell) in &self.script.quantized_cells {
            module.add_quantized_cell(name, cell)?;
        }
        for (name, tensor) in self.parameters.iter().filter(|_| self.script.quantized_cells.is_empty()) {
            module.add_parameter(name, tensor)?;
        }
        for (name, tensor) in &self.script.constants {
            module.add_buffer(name, tensor)?;
        }
        if !self.script.source.is_empty() {
            module.define(&self.script.source)?;
        }
        Ok(module)
    }

    /// Weight and bias, if the part is only an affine map.
    fn affine(&self) -> Option<(&Tensor, &Tensor)> {
        match self.parameters.as_slice() {
            [(weight, w), (bias, b)] if weight == "weight" && bias == "bias" => Some((w, b)),
            _ => None,
        }
    }
}

fn affine(mut module: ScriptModule, weight: &Tensor, bias: &Tensor, dtype: WeightDtype) -> Result<ScriptModule> {
    let map = match dtype {
        WeightDtype::Float => {
            module.add_parameter("weight", weight)?;
            module.add_parameter("bias", bias)?;
            "torch.linear(x, self.weight, self.bias)"
        }
        WeightDtype::Int8 => {
            module.add_quantized_linear(weight, bias)?;
            "quantized.linear_dynamic(x, self.packed, True)"
        }
    };
    module.define(&format!("def forward(self, x: Tensor) -> Tensor:\n    return {map}\n"))?;
    Ok(module)
}

/// The model as TorchScript, with copies of its weights.
pub fn build(model: &Model, tasks: &[Task], dtype: Dtype, output: Output) -> Result<ScriptModule> {
    let mut root = Node::default();
    for (name, tensor) in model.parameters.with_constants() {
        let (path, leaf) = name.rsplit_once('.').unwrap_or(("", name));
        ensure!(!path.is_empty(), "parameter `{name}` belongs to no part of the model");
        root.at(path).parameters.push((leaf.to_owned(), tensor.detach().copy()));
    }
    let weights = if dtype == Dtype::Int8 { WeightDtype::Int8 } else { WeightDtype::Float };
    for (path, script) in model.scripts(tasks, weights) {
        root.at(&path).script = script;
    }
    root.script.source = source(model, tasks, output);
    let mut module = root.build("Polytask", weights)?;
    if dtype.kind() != Kind::Float {
        module.convert(dtype.kind())?;
    }
    Ok(module)
}

/// Source of the root module's methods: `encode` and other helpers, `task_NAME` per task, and `forward`.
fn source(model: &Model, tasks: &[Task], output: Output) -> String {
    let bytes = model.reads_bytes();
    let (spelled, embedded) = if bytes { (", bytes: Tensor", "token_ids, bytes") } else { ("", "token_ids") };
    let mut source = format!(
        "
def encode(self, token_ids: Tensor, lengths: Tensor{spelled}) -> List[Tensor]:
    return self.trunk.forward(self.embedding.forward({embedded}), lengths)

def at_words(self, tokens: Tensor, first_tokens: Optional[Tensor]) -> Tensor:
    if first_tokens is None:
        return tokens
    return tokens.gather(1, first_tokens.unsqueeze(-1).expand(-1, -1, tokens.size(2)))

def average(self, x: Tensor, n: Tensor) -> Tensor:
    positions = torch.arange(x.size(1), device=x.device).unsqueeze(0)
    here = (positions < n.unsqueeze(1)).unsqueeze(-1).to(x.dtype)
    return (x * here).sum([1]) / n.unsqueeze(1).to(x.dtype)
"
    );
    let inputs = format!(
        "token_ids: Tensor, lengths: Tensor{spelled}, first_tokens: Optional[Tensor] = None, n_words: Optional[Tensor] = None"
    );
    let encode = format!("    layers = self.encode({}{})\n", "token_ids, lengths", if bytes { ", bytes" } else { "" });
    // The heads in order, each with the distributions of the heads that it reads.
    let logits = |needed: &[TaskId]| -> String {
        let one = |&id: &TaskId| {
            let Task { name, kind, .. } = &tasks[id.0];
            let seen = model.seen_by(id).iter().map(|other| &tasks[other.0]);
            let beside: Vec<String> =
                seen.map(|other| distribution_script((&other.name, other.kind), (name, *kind))).collect();
            format!(
                "    tokens_{name} = self.heads.{name}.view(layers, lengths)
    words_{name} = self.at_words(tokens_{name}, first_tokens)
    {name}_logits = self.heads.{name}.forward(tokens_{name}, lengths, words_{name}, [{}])
",
                beside.join(", ")
            )
        };
        needed.iter().map(one).collect()
    };
    let labels = |task: &str| format!("    {task}_labels = self.heads.{task}.decode({task}_logits, n)\n");
    let counted = "    n = lengths
    if n_words is not None:
        n = n_words
";
    for (i, Task { name, .. }) in tasks.iter().enumerate() {
        source += &format!(
            "
def task_{name}(self, {inputs}) -> Tuple[Tensor, Tensor]:
{encode}{counted}{}{}    return {name}_logits, {name}_labels
",
            logits(&model.needs(TaskId(i))),
            labels(name)
        );
    }
    let all = logits(model.order()) + &tasks.iter().map(|task| labels(&task.name)).collect::<String>();
    let names = output_names(tasks);
    source
        + &match output {
            Output::Dictionary => {
                let entries: Vec<String> =
                    names.iter().map(|name| format!("'{name}': {}", name.replace('.', "_"))).collect();
                format!(
                    "
def forward(self, {inputs}) -> Dict[str, Tensor]:
{encode}{counted}{all}    return {{{}}}
",
                    entries.join(", ")
                )
            }
            Output::Tuple => {
                let entries: Vec<String> = names.iter().map(|name| name.replace('.', "_")).collect();
                let types = vec!["Tensor"; entries.len()].join(", ");
                // Servers send lengths as [B, 1].
                format!(
                    "
def forward(self, token_ids: Tensor, lengths: Tensor{spelled}) -> Tuple[{types}]:
    lengths = lengths.view(-1)
    first_tokens: Optional[Tensor] = None
{encode}    n = lengths
{all}    return {}
",
                    entries.join(", ")
                )
            }
        }
}
