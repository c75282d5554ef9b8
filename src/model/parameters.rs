//! The trainable tensors of a model under unique names, in the order of their creation.

use anyhow::{Result, bail, ensure};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

use crate::libtorch::narrow_linear;
use crate::onnx::{Graph, Value};

/// All parameters of a model. Order is creation order, so that it is the same in every run.
pub struct Parameters {
    entries: Vec<(String, Tensor)>,
    /// Tensors that are never trained.
    constants: Vec<(String, Tensor)>,
    device: Device,
}

impl Parameters {
    pub fn new(device: Device) -> Self {
        Parameters { entries: Vec::new(), constants: Vec::new(), device }
    }

    pub fn root(&mut self) -> Scope<'_> {
        Scope { parameters: self, prefix: String::new() }
    }

    pub fn device(&self) -> Device {
        self.device
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.entries.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Handles of the trainable tensors by name.
    pub fn named(&self) -> Vec<(String, Tensor)> {
        self.iter().map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone())).collect()
    }

    /// The trainable tensors, then those that are never trained.
    pub fn with_constants(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.entries.iter().chain(&self.constants).map(|(name, tensor)| (name.as_str(), tensor))
    }

    pub fn tensors(&self) -> Vec<&Tensor> {
        self.entries.iter().map(|(_, tensor)| tensor).collect()
    }

    /// Number of trainable scalars.
    pub fn count(&self) -> usize {
        self.entries.iter().map(|(_, tensor)| tensor.numel()).sum()
    }

    /// Copies `values` in. Names, shapes and kinds must be exactly those of the model.
    pub fn load(&self, values: BTreeMap<String, Tensor>) -> Result<()> {
        if let Some((name, _)) = self.entries.iter().find(|(name, _)| !values.contains_key(name)) {
            bail!("no weights named `{name}`");
        }
        self.load_some(values)
    }

    /// Copies `values` in, which may be incomplete and may include constants.
    pub fn load_some(&self, mut values: BTreeMap<String, Tensor>) -> Result<()> {
        for (name, tensor) in self.entries.iter().chain(&self.constants) {
            let Some(value) = values.remove(name) else { continue };
            ensure!(
                value.size() == tensor.size() && value.kind() == tensor.kind(),
                "weights `{name}` are {:?} {:?}, the model needs {:?} {:?}",
                value.kind(),
                value.size(),
                tensor.kind(),
                tensor.size()
            );
            ensure!(!bool::try_from(value.isnan().any())?, "weights `{name}` contain NaN: the file is damaged");
            tch::no_grad(|| tensor.shallow_clone().f_copy_(&value))?;
        }
        if let Some(name) = values.keys().next() {
            bail!("weights `{name}` belong to no part of the model");
        }
        Ok(())
    }
}

/// A name prefix under which a part of the model creates its parameters.
pub struct Scope<'a> {
    parameters: &'a mut Parameters,
    prefix: String,
}

impl Scope<'_> {
    pub fn sub(&mut self, name: &str) -> Scope<'_> {
        Scope { prefix: format!("{}{name}.", self.prefix), parameters: self.parameters }
    }

    pub fn device(&self) -> Device {
        self.parameters.device
    }

    /// Number of parameters so far, in all scopes.
    pub fn count(&self) -> usize {
        self.parameters.entries.len()
    }

    /// Creates a parameter with values drawn on the CPU, so that every device starts from the same weights.
    pub fn add(&mut self, name: &str, values: Tensor) -> Tensor {
        let name = format!("{}{name}", self.prefix);
        assert!(self.parameters.with_constants().all(|(known, _)| *known != name), "invariant: {name} is unique");
        let tensor = values.to_device(self.parameters.device).contiguous().set_requires_grad(true);
        self.parameters.entries.push((name, tensor.shallow_clone()));
        tensor
    }

    /// Adds a tensor that is never trained.
    pub fn constant(&mut self, name: &str, values: Tensor) -> Tensor {
        let tensor = values.to_device(self.parameters.device);
        self.parameters.constants.push((format!("{}{name}", self.prefix), tensor.shallow_clone()));
        tensor
    }

    /// Uniform in (-bound, bound).
    pub fn uniform(&mut self, name: &str, size: &[i64], bound: f64) -> Tensor {
        let mut values = Tensor::zeros(size, (Kind::Float, Device::Cpu));
        let _ = values.uniform_(-bound, bound);
        self.add(name, values)
    }

    /// Uniform in (-bound, bound), with row `zero` (padding) set to zero.
    pub fn uniform_rows(&mut self, name: &str, size: &[i64], bound: f64, zero: i64) -> Tensor {
        let mut values = Tensor::zeros(size, (Kind::Float, Device::Cpu));
        let _ = values.uniform_(-bound, bound);
        let _ = values.get(zero).zero_();
        self.add(name, values)
    }

    /// Standard normal, with row `zero`, if any (padding), set to zero.
    pub fn normal_rows(&mut self, name: &str, size: &[i64], zero: Option<i64>) -> Tensor {
        let mut values = Tensor::zeros(size, (Kind::Float, Device::Cpu));
        let _ = values.normal_(0.0, 1.0);
        zero.iter().for_each(|&row| drop(values.get(row).zero_()));
        self.add(name, values)
    }

    /// A linear layer with PyTorch's initialization of `nn.Linear`: weight and bias uniform within 1 / sqrt(inputs).
    pub fn linear(&mut self, name: &str, inputs: i64, outputs: i64) -> Linear {
        let bound = 1.0 / (inputs as f64).sqrt();
        let mut scope = self.sub(name);
        Linear {
            weight: scope.uniform("weight", &[outputs, inputs], bound),
            bias: scope.uniform("bias", &[outputs], bound),
        }
    }

    /// A linear layer for a gate of `width` features, initially open: its bias is 1.
    pub fn gate(&mut self, name: &str, width: i64) -> Linear {
        let bound = 1.0 / (width as f64).sqrt();
        let mut scope = self.sub(name);
        let weight = scope.uniform("weight", &[width, width], bound);
        Linear { weight, bias: scope.add("bias", Tensor::ones([width], (Kind::Float, Device::Cpu))) }
    }
}

/// y = x W^T + b
#[derive(Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// [..., inputs] to [..., outputs]; for time-major [B, T, inputs] the output is time-major too.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let affine = |x: &Tensor| {
            narrow_linear(x, &self.weight, &self.bias).unwrap_or_else(|| x.linear(&self.weight, Some(&self.bias)))
        };
        match x.dim() == 3 && !x.is_contiguous() {
            true => affine(&x.transpose(0, 1)).transpose(0, 1),
            false => affine(x),
        }
    }

    pub fn onnx(&self, graph: &mut Graph, x: &Value) -> Value {
        graph.linear(x, &self.weight, &self.bias)
    }
}
/// Whether parameter `name` belongs to `part`: `trunk.weight_ih_l0` belongs to `trunk` and to `trunk.l0`, its layer;
/// `trunks.x` does not belong to `trunk`.
pub fn is_part(name: &str, part: &str) -> bool {
    if let Some(layer) = part.strip_prefix("trunk.l").filter(|number| number.parse::<usize>().is_ok()) {
        let of = |name: &str| name.strip_suffix("_reverse").unwrap_or(name).ends_with(&format!("_l{layer}"));
        return name.strip_prefix("trunk.").and_then(|rest| rest.split('.').next()).is_some_and(of);
    }
    name.strip_prefix(part).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::is_part;

    #[test]
    fn parts_are_known_by_name_and_layers_by_number() {
        let check = |name: &str, part: &str, expected: bool| assert_eq!(is_part(name, part), expected, "{name} {part}");
        check("trunk.weight_ih_l1_reverse", "trunk.l1", true);
        check("trunk.gate_l1.weight", "trunk.l1", true);
        check("trunk.weight_ih_l11", "trunk.l1", false);
        check("heads.topic.output.bias", "heads.topic", true);
        check("heads.topics.output.bias", "heads.topic", false);
        check("embedding.vectors_0", "embedding.vectors_0", true);
    }
}
