//! Vectors with one value per task, and their form in checkpoints.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tch::{Device, Tensor};

use crate::libtorch::upload;

/// `[T]` of float64.
pub fn vector(values: &[f64], device: Device) -> Tensor {
    upload(values, device)
}

/// 1 for present tasks, 0 for absent ones, `[T]`.
pub fn mask(present: &[bool], device: Device) -> Tensor {
    vector(&present.iter().map(|&present| f64::from(present)).collect::<Vec<_>>(), device)
}

/// How many tasks are present.
pub fn count(present: &[bool]) -> usize {
    present.iter().filter(|&&present| present).count()
}

/// The values of a vector, copied from the device.
pub fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor).expect("invariant: a flat list of float64")
}

/// JSON for a checkpoint: finite float64 values are preserved exactly, others become null.
pub fn to_json(tensor: &Tensor) -> Value {
    json!(numbers(tensor))
}

pub fn from_json(state: &Value, name: &str, n: usize, device: Device) -> Result<Tensor> {
    let values: Vec<Option<f64>> =
        serde_json::from_value(state[name].clone()).with_context(|| format!("`{name}` is missing or damaged"))?;
    ensure!(values.len() == n, "`{name}` has {} values for {n} tasks", values.len());
    Ok(vector(&values.into_iter().map(|value| value.unwrap_or(f64::NAN)).collect::<Vec<_>>(), device))
}
