//! Both directions of an LSTM layer at the same time on a GPU.

use std::ffi::c_char;

use anyhow::{Result, ensure};
use tch::Tensor;
use torch_sys::C_tensor;

use super::{List, checked, handles};

unsafe extern "C" {
    fn pt_both_directions(
        x: *mut C_tensor,
        weights: List,
        buffers: List,
        places: *mut C_tensor,
        train: bool,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
}

/// `x` [T, B, E] on CUDA to [T, B, 2*H], as `torch.lstm` with these eight `weights`. `buffers`: the memory of each
/// direction's weights, in cuDNN's layout. `places` [T * B]: the position of the flat `x` that the reverse direction
/// reads at each position, a permutation that is its own inverse. Without it, the last position is read first.
pub fn both_directions(
    x: &Tensor,
    weights: &[&Tensor],
    buffers: &[&Tensor],
    places: Option<&Tensor>,
    train: bool,
) -> Result<Tensor> {
    ensure!(weights.len() == 8 && buffers.len() == 2, "two directions have eight weights and two buffers");
    let (x, weights, buffers) = (x.contiguous(), handles(weights), handles(buffers));
    let places = places.map_or(std::ptr::null_mut(), |places| places.as_ptr().cast_mut());
    let mut out = std::ptr::null_mut();
    // SAFETY: all tensors and lists, of eight weights and two buffers, are live; on success `out` is one new tensor.
    unsafe {
        let x = x.as_ptr().cast_mut();
        checked(pt_both_directions(x, weights.as_ptr(), buffers.as_ptr(), places, train, &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}
