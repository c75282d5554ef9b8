//! Functions with gradients that C++ of this project computes on the CPU, or custom kernels, all or part, on a GPU.

use std::ffi::c_char;

use tch::{Device, Kind, Tensor};

use torch_sys::C_tensor;

use super::autograd::grad_enabled;
use super::cuda::functions;
use super::{Kernel, checked, sources};

unsafe extern "C" {
    fn pt_max_pool(x: *mut C_tensor, lengths: *mut C_tensor, out: *mut *mut C_tensor) -> *mut c_char;
}

static MAX_POOL: Kernel = Kernel::new(sources::MAX_POOL, "max_pool");
static MAX_POOL_GRADIENT: Kernel = Kernel::new(sources::MAX_POOL, "max_pool_gradient");

/// Max pooling over the positions of each sentence of `x` [B, T, F] within `lengths` `[B]`, int64, none of them 0: [B, F].
/// The gradient of tied states is shared evenly. `None` if `x` is not float32, or on a GPU without kernels for it.
pub fn max_pool(x: &Tensor, lengths: &Tensor) -> Option<Tensor> {
    let device = x.device();
    if x.kind() != Kind::Float || x.numel() == 0 || (device != Device::Cpu && x.numel() > i32::MAX as usize) {
        return None;
    }
    let (x, lengths, mut out) = (x.as_ptr().cast_mut(), lengths.as_ptr().cast_mut(), std::ptr::null_mut());
    let done = match device {
        // SAFETY: the tensors are live; on success `out` is one new tensor.
        Device::Cpu => checked(unsafe { pt_max_pool(x, lengths, &mut out) }),
        _ => {
            let (kernel, gradient, functions) = (MAX_POOL.handle()?, MAX_POOL_GRADIENT.handle()?, functions().ok()?);
            // SAFETY: likewise, and so are the kernels.
            checked(unsafe { (functions.max_pool)(kernel, gradient, x, lengths, &mut out) })
        }
    };
    done.expect("invariant: lengths are those of the states");
    // SAFETY: the function has made it.
    Some(unsafe { Tensor::from_ptr(out) })
}

static LINEAR_GRADIENTS: Kernel = Kernel::new(sources::LINEAR, "linear_gradients");
static LINEAR_SUM: Kernel = Kernel::new(sources::LINEAR, "linear_sum");

/// The most outputs that `linear.cu` has room for.
const NARROW: i64 = 128;

/// x W^T + b for `x` [..., F] and `weight` [C, F] with few outputs C, whose gradients by weights and bias a kernel computes.
/// `None` if there is no kernel for it, or without gradients.
pub fn narrow_linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Option<Tensor> {
    let (outputs, width) = weight.size2().ok()?;
    let fits = x.kind() == Kind::Float && weight.kind() == Kind::Float && x.is_contiguous() && x.numel() > 0;
    if !fits || !grad_enabled() || outputs > NARROW || x.device() == Device::Cpu || x.numel() > i32::MAX as usize {
        return None;
    }
    let (gradients, sum, functions) = (LINEAR_GRADIENTS.handle()?, LINEAR_SUM.handle()?, functions().ok()?);
    let (mut size, flat) = (x.size(), x.view([-1, width]));
    let [flat, weight, bias] = [&flat, weight, bias].map(|tensor| tensor.as_ptr().cast_mut());
    let mut out = std::ptr::null_mut();
    // SAFETY: kernels and tensors are live; on success `out` is one new tensor.
    let y = unsafe {
        checked((functions.narrow_linear)(gradients, sum, flat, weight, bias, &mut out))
            .expect("invariant: the layer's sizes fit its input");
        Tensor::from_ptr(out)
    };
    *size.last_mut()? = outputs;
    Some(y.view(size.as_slice()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libtorch::LaunchConfig;

    #[test]
    fn gradients_of_a_narrow_layer_are_libtorch_s() {
        tch::manual_seed(4);
        let random = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu));
        // One block of rows and three, the last one not full; more inputs than a block has columns, and few.
        for (n, width, outputs) in [(5, 70, 7), (70, 64, 3), (70, 3, 41)] {
            let (x, to_y) = (random(&[n, width]), random(&[n, outputs]));
            let n_parts = (n as usize).div_ceil(32);
            let nan = |size: &[i64]| Tensor::full(size, f64::NAN, (Kind::Float, Device::Cpu));
            let (parts, to_weight) = (nan(&[n_parts as i64, outputs, width + 1]), nan(&[outputs, width]));
            let to_bias = nan(&[outputs]);
            let shape = LaunchConfig {
                grid: [n_parts, (width as usize + 64) / 64],
                block: [256, 1],
                shared: 32 * (64 + outputs as usize) * size_of::<f32>(),
            };
            let sizes = [n, width, outputs, 32];
            LINEAR_GRADIENTS.launch(shape, &[&x, &to_y, &parts, &to_weight, &to_bias], &sizes).unwrap();
            if n_parts > 1 {
                let grid = (outputs * (width + 1)).unsigned_abs().div_ceil(128) as usize;
                let shape = LaunchConfig { grid: [grid, 1], block: [128, 1], shared: 0 };
                LINEAR_SUM.launch(shape, &[&parts, &to_weight, &to_bias], &[n_parts as i64, width, outputs]).unwrap();
            }
            assert!(to_weight.allclose(&to_y.tr().matmul(&x), 1e-5, 1e-5, false), "{n} {width} {outputs}");
            let sums = to_y.sum_dim_intlist([0].as_slice(), false, Kind::Float);
            assert!(to_bias.allclose(&sums, 1e-5, 1e-5, false), "{n} {width} {outputs}");
        }
    }

    #[test]
    fn the_largest_states_and_their_gradients_are_libtorch_s() {
        tch::manual_seed(3);
        let device = Device::Cpu;
        // Rows of different lengths, ties, more features than a block has threads, and both memory layouts.
        let (rows, width, features) = (3i64, 5i64, 40i64);
        let lengths = Tensor::from_slice(&[5i64, 2, 1]);
        let x = Tensor::randint(3, [rows, width, features], (Kind::Float, device)).set_requires_grad(true);
        let beyond = Tensor::arange(width, (Kind::Int64, device)).ge_tensor(&lengths.unsqueeze(1)).unsqueeze(-1);
        let theirs = x.masked_fill(&beyond, f64::NEG_INFINITY).amax([1], false);
        let gradient = Tensor::randn([rows, features], (Kind::Float, device));
        let to_theirs =
            Tensor::run_backward(&[(&theirs * &gradient).sum(Kind::Float)], &[&x], false, false).swap_remove(0);
        let shape = LaunchConfig { grid: [rows as usize, 2], block: [32, 1], shared: 0 };
        for positions_first in [false, true] {
            let lies = |x: &Tensor| if positions_first { x.transpose(0, 1).contiguous() } else { x.contiguous() };
            let strides = if positions_first { [features, rows * features] } else { [width * features, features] };
            let own = lies(&x.detach());
            let own = if positions_first { own.transpose(0, 1) } else { own }.set_requires_grad(true);
            let ours = max_pool(&own, &lengths).unwrap();
            let to_ours = Tensor::run_backward(&[(&ours * &gradient).sum(Kind::Float)], &[&own], false, false);
            assert!(ours == theirs && to_ours[0].allclose(&to_theirs, 1e-6, 1e-6, false));
            let spread = Tensor::stack(&[&own, &own], -1).select(-1, 1);
            assert_eq!(max_pool(&spread, &lengths).unwrap(), theirs, "features apart in memory");
            let (x, to_x) = (lies(&x.detach()), lies(&x.detach()).zeros_like());
            let (most, counts) = (gradient.zeros_like(), gradient.zeros_like());
            MAX_POOL.launch(shape, &[&x, &lengths, &most, &counts], &[features, strides[0], strides[1]]).unwrap();
            assert_eq!(most, theirs);
            let tensors = [&x, &lengths, &most, &counts, &gradient, &to_x];
            MAX_POOL_GRADIENT.launch(shape, &tensors, &[width, features, strides[0], strides[1]]).unwrap();
            let to_x = if positions_first { to_x.transpose(0, 1) } else { to_x };
            assert!(to_x.allclose(&to_theirs, 1e-6, 1e-6, false));
        }
    }
}
