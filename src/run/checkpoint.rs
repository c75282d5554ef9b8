//! Checkpoints: one safetensors file each, so that one rename replaces all of it atomically.
//!
//! Tensors are `model/NAME` and, for resuming training, `optimizer/NAME`; everything else is JSON in the file's
//! metadata. Python reads it with `safetensors.torch.load_file`.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use safetensors::tensor::{Dtype, SafeTensors, View};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::atomic;

/// Tensors by name, and all other state.
pub struct Checkpoint {
    pub model: BTreeMap<String, Tensor>,
    pub optimizer: BTreeMap<String, Tensor>,
    pub state: Value,
}

const STATE: &str = "polytask";

/// A tensor's bytes in the form that safetensors expects.
struct Bytes {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl View for &Bytes {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.data).into()
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

fn bytes(tensor: &Tensor) -> Result<Bytes> {
    let (dtype, width) = match tensor.kind() {
        Kind::Float => (Dtype::F32, 4),
        Kind::Half => (Dtype::F16, 2),
        Kind::BFloat16 => (Dtype::BF16, 2),
        Kind::Int64 => (Dtype::I64, 8),
        other => bail!("tensors of {other:?} are not written"),
    };
    let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
    let mut data = vec![0u8; tensor.numel() * width];
    tensor.f_copy_data_u8(&mut data, tensor.numel())?;
    Ok(Bytes { dtype, shape: tensor.size().iter().map(|&n| n as usize).collect(), data })
}

/// Writes a checkpoint atomically.
pub fn save(path: &Path, model: &[(String, Tensor)], optimizer: &[(String, Tensor)], state: &Value) -> Result<()> {
    let mut tensors = BTreeMap::new();
    for (part, list) in [("model", model), ("optimizer", optimizer)] {
        for (name, tensor) in list {
            tensors.insert(format!("{part}/{name}"), bytes(tensor)?);
        }
    }
    let metadata = HashMap::from([(STATE.to_owned(), state.to_string())]);
    let content = safetensors::serialize(&tensors, Some(metadata))?;
    atomic::write(path, &content)
}

/// Writes tensors under their own names, for other programs.
pub fn write_plain(path: &Path, tensors: &[(&str, Tensor)]) -> Result<()> {
    let tensors = tensors.iter().map(|(name, tensor)| Ok((name, bytes(tensor)?)));
    atomic::write(path, &safetensors::serialize(&tensors.collect::<Result<BTreeMap<_, _>>>()?, None)?)
}

/// Reads a checkpoint onto the CPU.
///
/// # Errors
/// A file that is missing, damaged or not a checkpoint; the message contains the path.
pub fn load(path: &Path) -> Result<Checkpoint> {
    let content = std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
    read(&content).with_context(|| format!("{} is damaged or not a checkpoint of polytask", path.display()))
}

fn read(content: &[u8]) -> Result<Checkpoint> {
    let (_, header) = SafeTensors::read_metadata(content)?;
    let state = header.metadata().as_ref().and_then(|metadata| metadata.get(STATE));
    let state = serde_json::from_str(state.ok_or_else(|| anyhow!("its header has no `{STATE}`"))?)?;
    let (mut model, mut optimizer) = (BTreeMap::new(), BTreeMap::new());
    for (name, view) in SafeTensors::deserialize(content)?.tensors() {
        ensure!(view.dtype() == Dtype::F32, "`{name}` is not float32");
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        let tensor = Tensor::f_from_data_size(view.data(), &shape, Kind::Float)?;
        match name.split_once('/') {
            Some(("model", name)) => model.insert(name.to_owned(), tensor),
            Some(("optimizer", name)) => optimizer.insert(name.to_owned(), tensor),
            _ => bail!("it holds an unknown tensor `{name}`"),
        };
    }
    Ok(Checkpoint { model, optimizer, state })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_come_back_and_damage_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let tensors = [("a".to_owned(), Tensor::from_slice(&[1.5f32, -2.0]).view([2, 1]))];
        let scalar =
            [("s".to_owned(), Tensor::from(3.0f32)), ("e".to_owned(), Tensor::zeros([0], (Kind::Float, Device::Cpu)))];
        save(&path, &tensors, &scalar, &serde_json::json!({"step": 7})).unwrap();
        let back = load(&path).unwrap();
        assert_eq!((&back.model["a"], back.state["step"].as_u64()), (&tensors[0].1, Some(7)));
        assert_eq!((back.optimizer["s"].size(), back.optimizer["e"].size()), (vec![], vec![0]));
        let content = std::fs::read(&path).unwrap();
        std::fs::write(&path, &content[..content.len() - 3]).unwrap();
        assert!(load(&path).err().unwrap().to_string().contains("is damaged"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no partial file is left");
    }
}
