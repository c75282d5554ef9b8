//! Mixed precision for the trunk: weights stay float32, and each step computes with 16-bit copies of them.
//!
//! Source: Micikevicius 2018 (arXiv 1710.03740), section 3.1. Differs from the paper in: only the trunk's LSTM layers
//! use 16 bits; their inputs and outputs, heads, losses and embedding are float32.

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::libtorch::copy_lists;

/// Precision in which training computes the trunk's LSTM layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits, with TF32 matrix products on CUDA.
    #[default]
    Float32,
    /// 8 significant bits, with the range of `float32`.
    Bfloat16,
    /// 11 significant bits, with loss scaling; CUDA only.
    Float16,
}

impl Precision {
    pub fn kind(self) -> Kind {
        match self {
            Precision::Float32 => Kind::Float,
            Precision::Bfloat16 => Kind::BFloat16,
            Precision::Float16 => Kind::Half,
        }
    }
}

/// 16-bit copies of float32 weights; the gradient is taken with respect to the copies. Their last dimension may be longer
/// than that of the weights: the rest of them is 0.
pub struct HalfPrecisionCopies {
    /// Parameter index of the first weight; the others follow.
    pub first: usize,
    /// Autograd leaves, in the order of the weights.
    pub copies: Vec<Tensor>,
}

impl HalfPrecisionCopies {
    /// Updates the copies from `weights`.
    pub fn refresh(&self, weights: &[&Tensor]) -> Result<()> {
        let pairs = || self.copies.iter().zip(weights.iter().copied());
        let (whole, from): (Vec<&Tensor>, Vec<&Tensor>) =
            pairs().filter(|(copy, weight)| copy.size() == weight.size()).unzip();
        copy_lists(&whole, &from)?;
        // One by one: lists are copied at once only if all of their tensors lie in memory alike.
        for (copy, weight) in pairs().filter(|(copy, weight)| copy.size() != weight.size()) {
            copy.detach().narrow(-1, 0, weight.size()[weight.dim() - 1]).f_copy_(weight)?;
        }
        Ok(())
    }
}

/// `x` with zeros appended to its last dimension, to `size`.
pub fn pad_last(x: &Tensor, size: i64) -> Tensor {
    match size - x.size()[x.dim() - 1] {
        0 => x.shallow_clone(),
        missing => x.constant_pad_nd([0, missing]),
    }
}
