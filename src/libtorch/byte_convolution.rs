//! Convolution over the bytes of words on the CPU, as a sum of table rows.

use std::ffi::c_char;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use super::checked;

unsafe extern "C" {
    fn pt_byte_convolution(
        table: *mut C_tensor,
        bias: *mut C_tensor,
        bytes: *mut C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
}

/// max_t relu(bias_f + sum_k table[k, word_(t + k - K/2), f]) over the positions t of each word: [N, F], with gradients.
/// `table` [K, V, F] and `bias` `[F]` are float32; words are rows of `bytes` [N, L], int64 below V, 0 beyond their end.
/// The gradient of tied positions goes to the first.
pub fn byte_convolution(table: &Tensor, bias: &Tensor, bytes: &Tensor) -> Result<Tensor> {
    let fits = |x: &Tensor, kind, dim| x.device() == Device::Cpu && x.kind() == kind && x.dim() == dim;
    ensure!(
        fits(table, Kind::Float, 3) && fits(bias, Kind::Float, 1) && fits(bytes, Kind::Int64, 2),
        "a table and a bias of float32 and bytes of int64 are needed, on the CPU"
    );
    ensure!(table.size()[2] == bias.size()[0], "table and bias differ in the number of filters");
    let [table, bias, bytes] = [table, bias, bytes].map(|x| x.as_ptr().cast_mut());
    let mut out = std::ptr::null_mut();
    // SAFETY: all tensors are live; on success `out` is one new tensor.
    unsafe {
        checked(pt_byte_convolution(table, bias, bytes, &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}
