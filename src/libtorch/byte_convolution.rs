//! Convolution over the bytes of words, as a sum of table rows.

use std::ffi::{c_char, c_void};

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use super::cuda::functions;
use super::{Kernel, checked, sources};

unsafe extern "C" {
    fn pt_byte_convolution(
        table: *mut C_tensor,
        bias: *mut C_tensor,
        bytes: *mut C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
}

static CONVOLUTION: Kernel = Kernel::new(sources::BYTE_CONVOLUTION, "byte_convolution");
static GRADIENTS: Kernel = Kernel::new(sources::BYTE_CONVOLUTION, "byte_gradients");
static SUM: Kernel = Kernel::new(sources::BYTE_CONVOLUTION, "byte_sum");

/// The most values of a byte, and bytes of a word, that a block's memory on a GPU has room for.
const MOST_VALUES: i64 = 384;
const MOST_BYTES: i64 = 12_000;
/// The most blocks along a grid's second axis.
const MOST_BLOCKS: i64 = 65_535;

/// The kernels, if `device` is a GPU that has them.
fn kernels(device: Device) -> Option<[*mut c_void; 3]> {
    let serve = device != Device::Cpu;
    serve.then(|| Some([CONVOLUTION.handle()?, GRADIENTS.handle()?, SUM.handle()?])).flatten()
}

/// max_t relu(bias_f + sum_k table[word_(t + k - K/2), k, f]) over the positions t of each word: [N, F], with gradients.
/// `table` [V, K, F] and `bias` `[F]` are float32; words are rows of `bytes` [N, L], int64 below V, 0 beyond their end.
/// The gradient of tied positions goes to the first. `None` on a GPU without kernels for it.
pub fn byte_convolution(table: &Tensor, bias: &Tensor, bytes: &Tensor) -> Result<Option<Tensor>> {
    let device = bytes.device();
    let fits = |x: &Tensor, kind, dim| x.device() == device && x.kind() == kind && x.dim() == dim;
    ensure!(
        fits(table, Kind::Float, 3) && fits(bias, Kind::Float, 1) && fits(bytes, Kind::Int64, 2),
        "a table and a bias of float32 and bytes of int64 are needed, on one device"
    );
    ensure!(table.size()[2] == bias.size()[0], "table and bias differ in the number of filters");
    let (values, offsets, filters) = table.size3()?;
    let small = values <= MOST_VALUES
        && bytes.size()[1] <= MOST_BYTES
        && offsets * ((filters + 31) / 32) <= MOST_BLOCKS
        && table.numel() < i32::MAX as usize;
    let kernels = kernels(device).filter(|_| small && bytes.numel() > 0);
    if device != Device::Cpu && kernels.is_none() {
        return Ok(None);
    }
    let [table, bias, bytes] = [table, bias, bytes].map(Tensor::contiguous);
    let [table, bias, bytes] = [&table, &bias, &bytes].map(|x| x.as_ptr().cast_mut());
    let mut out = std::ptr::null_mut();
    // SAFETY: all tensors and kernels are live; on success `out` is one new tensor.
    unsafe {
        checked(match kernels {
            Some(kernels) => (functions()?.byte_convolution)(kernels.as_ptr(), table, bias, bytes, &mut out),
            None => pt_byte_convolution(table, bias, bytes, &mut out),
        })?;
        Ok(Some(Tensor::from_ptr(out)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libtorch::LaunchConfig;

    #[test]
    fn kernels_compute_what_the_cpu_does() {
        tch::manual_seed(6);
        let (n, longest, values, filters) = (70i64, 5i64, 9i64, 40i64);
        for offsets in [1i64, 2, 3] {
            let float = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu));
            let table = float(&[values, offsets, filters]).set_requires_grad(true);
            let bias = float(&[filters]).set_requires_grad(true);
            let lengths = Tensor::randint(longest + 1, [n, 1], (Kind::Int64, Device::Cpu));
            let bytes = Tensor::randint_low(1, values, [n, longest], (Kind::Int64, Device::Cpu))
                * Tensor::arange(longest, (Kind::Int64, Device::Cpu)).less_tensor(&lengths);
            let expected = byte_convolution(&table, &bias, &bytes).unwrap().unwrap();
            let to_y = float(&[n, filters]);
            let gradients =
                Tensor::run_backward(&[(&expected * &to_y).sum(Kind::Float)], &[&table, &bias], false, false);

            let nan = |size: &[i64]| Tensor::full(size, f64::NAN, (Kind::Float, Device::Cpu));
            let (y, seen) = (nan(&[n, filters]), Tensor::zeros([offsets, n, filters], (Kind::Int16, Device::Cpu)));
            let shape = LaunchConfig { grid: [n as usize, 2], block: [32, 1], shared: longest as usize * 4 };
            let tensors = [&table.detach(), &bias.detach(), &bytes, &y, &seen];
            CONVOLUTION.launch(shape, &tensors, &[n, longest, offsets, filters]).unwrap();
            assert_eq!(y, expected, "bit for bit, {offsets}");
            let (parts, to_table) = (nan(&[2, values, offsets, filters]), nan(&[values, offsets, filters]));
            let shape = LaunchConfig {
                grid: [2, 2 * offsets as usize],
                block: [32, 1],
                shared: values as usize * 32 * size_of::<f32>(),
            };
            GRADIENTS.launch(shape, &[&to_y, &seen, &parts], &[n, 64, values, offsets, filters]).unwrap();
            let size = to_table.numel();
            let shape = LaunchConfig { grid: [size.div_ceil(128), 1], block: [128, 1], shared: 0 };
            SUM.launch(shape, &[&parts, &to_table], &[2, size as i64]).unwrap();
            assert!(to_table.allclose(&gradients[0], 1e-5, 1e-5, false), "{offsets}");
            let to_bias = to_table.select(1, offsets / 2).sum_dim_intlist([0].as_slice(), false, Kind::Float);
            assert!(to_bias.allclose(&gradients[1], 1e-5, 1e-5, false), "{offsets}");
        }
    }
}
