//! A loss scale, so that small gradients do not underflow in float16.
//!
//! Losses are multiplied by S before the backward pass, and gradients divided by it in the update. A step whose
//! gradient norm is not finite is skipped and S halved; after 2,000 steps without one, S is doubled. If S is 1 the
//! gradients themselves are not finite, which is an error as in float32.
//!
//! Source: Micikevicius 2018 (arXiv 1710.03740), section 3.2; numbers as in PyTorch's GradScaler.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

const FIRST: f64 = 65536.0;
const STEPS_TO_GROW: i64 = 2000;

/// Whether a scalar is not finite, as a tensor on its device.
pub fn is_not_finite(value: &Tensor) -> Tensor {
    // x * 0 != 0 exactly if x is infinite or NaN.
    (value * 0.0).ne(0.0)
}

pub struct LossScale {
    /// S, and the steps without overflow since it changed: one number each on the device.
    scale: Tensor,
    steps: Tensor,
}

impl LossScale {
    pub fn new(device: Device) -> Self {
        LossScale {
            scale: Tensor::full([], FIRST, (Kind::Float, device)),
            steps: Tensor::zeros([], (Kind::Int, device)),
        }
    }

    pub fn value(&self) -> &Tensor {
        &self.scale
    }

    /// S, the steps without overflow since it changed, and after how many of them it doubles.
    pub fn parts(&mut self) -> (&Tensor, &Tensor, i64) {
        (&self.scale, &self.steps, STEPS_TO_GROW)
    }

    /// Adapts the scale. Returns whether to skip the step: its `norm` is not finite, perhaps because of the scale.
    pub fn adapt(&mut self, norm: &Tensor) -> Result<Tensor> {
        let found = is_not_finite(norm).logical_and(&self.scale.gt(1.0));
        let as_float = found.to_kind(Kind::Float);
        let _ = self.scale.f_internal_amp_update_scale_(&self.steps, &as_float, 2.0, 0.5, STEPS_TO_GROW)?;
        Ok(found)
    }

    /// State for a checkpoint; what [`Self::load`] takes.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let steps = self.steps.to_kind(Kind::Float);
        vec![("loss_scale".to_owned(), self.scale.shallow_clone()), ("loss_scale.steps".to_owned(), steps)]
    }

    /// Restores the state, removing it from a checkpoint's tensors.
    pub fn load(&mut self, state: &mut BTreeMap<String, Tensor>) -> Result<()> {
        for (name, tensor) in [("loss_scale", &mut self.scale), ("loss_scale.steps", &mut self.steps)] {
            tensor.f_copy_(&state.remove(name).with_context(|| format!("the checkpoint lacks `{name}`"))?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overflow_halves_the_scale_and_many_steps_without_one_double_it() {
        let mut scale = LossScale::new(Device::Cpu);
        let fine = Tensor::from(131072f32);
        assert_eq!(scale.adapt(&fine).unwrap().double_value(&[]), 0.0);
        assert_eq!(scale.value().double_value(&[]), 65536.0);
        for (overflow, left) in [(f32::INFINITY, 32768.0), (f32::NAN, 16384.0), (f32::NEG_INFINITY, 8192.0)] {
            assert_eq!(scale.adapt(&Tensor::from(overflow)).unwrap().double_value(&[]), 1.0);
            assert_eq!(scale.value().double_value(&[]), left);
        }
        for left in (0..13).rev() {
            assert_eq!(scale.adapt(&Tensor::from(f32::NAN)).unwrap().double_value(&[]), 1.0);
            assert_eq!(scale.value().double_value(&[]), 2f64.powi(left));
        }
        assert_eq!(scale.adapt(&Tensor::from(f32::NAN)).unwrap().double_value(&[]), 0.0);
        scale.scale = Tensor::from(8192f32);
        let mut other = LossScale::new(Device::Cpu);
        for _ in 0..STEPS_TO_GROW - 1 {
            let _ = other.adapt(&fine).unwrap();
        }
        other.load(&mut scale.state().into_iter().collect()).unwrap();
        assert_eq!(other.value().double_value(&[]), 8192.0);
        for _ in 0..STEPS_TO_GROW {
            let _ = other.adapt(&fine).unwrap();
        }
        assert_eq!(other.value().double_value(&[]), 16384.0);
    }
}
