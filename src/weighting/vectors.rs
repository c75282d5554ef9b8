//! Vectors with one value per task, and their form in checkpoints.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::libtorch::upload;

/// `[T]` of float64.
pub fn vector(values: &[f64], device: Device) -> Tensor {
    upload(values, device)
}

/// Which tasks have labels in a step.
pub struct Present {
    pub flags: Vec<bool>,
    /// 1 for present tasks, 0 for absent ones, `[T]`.
    pub mask: Tensor,
}

impl Present {
    pub fn new(flags: &[bool], device: Device) -> Self {
        let mask = vector(&flags.iter().map(|&present| f64::from(present)).collect::<Vec<_>>(), device);
        Present { flags: flags.to_vec(), mask }
    }

    /// How many tasks are present.
    pub fn count(&self) -> usize {
        self.flags.iter().filter(|&&present| present).count()
    }
}

/// The values of a vector, copied from the device.
pub fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double)).expect("invariant: a flat list of numbers")
}

/// JSON for a checkpoint: finite float64 values are preserved exactly, others become null.
pub fn to_json(tensor: &Tensor) -> Value {
    json!(numbers(tensor))
}

/// Writes the values that [`to_json`] saved into the memory of `vector`.
pub fn load_into(vector: &mut Tensor, state: &Value, name: &str) -> Result<()> {
    let n = vector.numel();
    let values: Vec<Option<f64>> =
        serde_json::from_value(state[name].clone()).with_context(|| format!("`{name}` is missing or damaged"))?;
    ensure!(values.len() == n, "`{name}` has {} values for {n} tasks", values.len());
    let values: Vec<f64> = values.into_iter().map(|value| value.unwrap_or(f64::NAN)).collect();
    Ok(vector.f_copy_(&upload(&values, vector.device()))?)
}
