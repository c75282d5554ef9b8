//! Fused optimizers and gradient clipping.

use std::ffi::c_char;

use anyhow::{Result, ensure};
use tch::Tensor;
use torch_sys::C_tensor;

use super::{List, Number, checked, handles};

#[repr(C)]
struct AdamOptions {
    learning_rate: f64,
    beta1: f64,
    beta2: f64,
    weight_decay: f64,
    epsilon: f64,
}

unsafe extern "C" {
    fn pt_fused_adam(
        decoupled: bool,
        n: usize,
        parameters: List,
        gradients: List,
        first: List,
        second: List,
        steps: List,
        options: *const AdamOptions,
        learning_rate: *mut C_tensor,
        divisor: *mut C_tensor,
        skip: *mut C_tensor,
    ) -> *mut c_char;
    fn pt_fused_sgd(
        n: usize,
        parameters: List,
        gradients: List,
        momenta: List,
        learning_rate: f64,
        momentum: f64,
        weight_decay: f64,
        rate_on_device: *mut C_tensor,
        divisor: *mut C_tensor,
        skip: *mut C_tensor,
    ) -> *mut c_char;
    fn pt_clip(
        n: usize,
        gradients: List,
        squares: *mut C_tensor,
        limit: f64,
        loss_scale: *mut C_tensor,
        norm: *mut *mut C_tensor,
        divisor: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn pt_norms(n: usize, gradients: List, out: *mut *mut C_tensor) -> *mut c_char;
    fn pt_divide(n: usize, gradients: List, divisor: *mut C_tensor) -> *mut c_char;
    fn pt_count(n: usize, counters: List, skip: *mut C_tensor, taken: *mut C_tensor) -> *mut c_char;
}

/// The tensors of one fused Adam step, in the same order; all on one device and of one kind (float32).
pub struct AdamLists<'a> {
    pub parameters: &'a [&'a Tensor],
    pub gradients: &'a [&'a Tensor],
    pub first_moments: &'a [&'a Tensor],
    pub second_moments: &'a [&'a Tensor],
    /// One scalar tensor each: the parameter's number of steps, including this one.
    pub steps: &'a [&'a Tensor],
}

/// Hyperparameters of Adam and AdamW, in PyTorch's meaning.
#[derive(Clone, Copy, Debug)]
pub struct Adam<'a> {
    pub learning_rate: Number<'a>,
    pub betas: (f64, f64),
    pub epsilon: f64,
    pub weight_decay: f64,
    /// True for AdamW (decay separate from the gradient), false for Adam with an L2 term.
    pub decoupled: bool,
}

/// How an optimizer treats the gradients of a step; one float each, on the device.
#[derive(Clone, Copy, Debug)]
pub struct GradScale<'a> {
    /// Divisor of the gradients, applied within the update.
    pub divisor: Option<&'a Tensor>,
    /// 1 to skip the step: no parameter and no moment changes.
    pub skip: &'a Tensor,
    /// 1 - skip, if known.
    pub taken: Option<&'a Tensor>,
}

impl<'a> From<&'a Tensor> for GradScale<'a> {
    fn from(skip: &'a Tensor) -> Self {
        GradScale { divisor: None, skip, taken: None }
    }
}

impl GradScale<'_> {
    fn handles(self) -> [*mut C_tensor; 2] {
        [or_null(self.divisor), self.skip.as_ptr().cast_mut()]
    }
}

fn or_null(tensor: Option<&Tensor>) -> *mut C_tensor {
    tensor.map_or(std::ptr::null_mut(), |tensor| tensor.as_ptr().cast_mut())
}

/// One step of `torch._fused_adamw_` or `torch._fused_adam_`, in place.
pub fn fused_adam(lists: &AdamLists, adam: Adam, grad_scale: GradScale) -> Result<()> {
    let n = lists.parameters.len();
    for list in [lists.gradients, lists.first_moments, lists.second_moments, lists.steps] {
        ensure!(list.len() == n, "lists of {n} and {} tensors in one optimizer step", list.len());
    }
    let (parameters, gradients) = (handles(lists.parameters), handles(lists.gradients));
    let (first, second) = (handles(lists.first_moments), handles(lists.second_moments));
    let steps = handles(lists.steps);
    let (learning_rate, on_device) = adam.learning_rate.split();
    let options = AdamOptions {
        learning_rate,
        beta1: adam.betas.0,
        beta2: adam.betas.1,
        weight_decay: adam.weight_decay,
        epsilon: adam.epsilon,
    };
    let [divisor, skip] = grad_scale.handles();
    // SAFETY: every list holds `n` live tensors, borrowed for the length of the call.
    checked(unsafe {
        pt_fused_adam(
            adam.decoupled,
            n,
            parameters.as_ptr(),
            gradients.as_ptr(),
            first.as_ptr(),
            second.as_ptr(),
            steps.as_ptr(),
            &options,
            on_device,
            divisor,
            skip,
        )
    })
}

/// Hyperparameters of SGD with momentum, in PyTorch's meaning.
#[derive(Clone, Copy, Debug)]
pub struct Sgd<'a> {
    pub learning_rate: Number<'a>,
    pub momentum: f64,
    pub weight_decay: f64,
}

/// One step of `torch._fused_sgd_`, in place. Momenta start at 0: with those, the usual update gives what PyTorch
/// stores in its first step, the gradient.
pub fn fused_sgd(
    (parameters, gradients, momenta): (&[&Tensor], &[&Tensor], &[&Tensor]),
    sgd: Sgd,
    grad_scale: GradScale,
) -> Result<()> {
    let n = parameters.len();
    ensure!(gradients.len() == n && momenta.len() == n, "lists of different lengths in one optimizer step");
    let (parameters, gradients, momenta) = (handles(parameters), handles(gradients), handles(momenta));
    let (learning_rate, on_device) = sgd.learning_rate.split();
    let [divisor, skip] = grad_scale.handles();
    // SAFETY: as in `fused_adam`.
    checked(unsafe {
        pt_fused_sgd(
            n,
            parameters.as_ptr(),
            gradients.as_ptr(),
            momenta.as_ptr(),
            learning_rate,
            sgd.momentum,
            sgd.weight_decay,
            on_device,
            divisor,
            skip,
        )
    })
}

/// The 2-norm of all `gradients` together, or from `squares`, partial sums of their squares; and the divisor, if any,
/// that limits the norm to `limit` (0: no limit). Both are scalars on the device; the host does not wait. With
/// `loss_scale` the gradients are that many times too large: the norm is without it, and the divisor includes it.
pub fn clip_gradients(
    gradients: &[&Tensor],
    squares: Option<&Tensor>,
    limit: f64,
    loss_scale: Option<&Tensor>,
) -> Result<(Tensor, Option<Tensor>)> {
    let list = handles(gradients);
    let (mut norm, mut divisor) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the list is live; on success the shim hands over new tensors, the second of which may be none.
    unsafe {
        checked(pt_clip(
            list.len(),
            list.as_ptr(),
            or_null(squares),
            limit,
            or_null(loss_scale),
            &mut norm,
            &mut divisor,
        ))?;
        let divisor = (!divisor.is_null()).then(|| Tensor::from_ptr(divisor));
        Ok((Tensor::from_ptr(norm), divisor))
    }
}

/// The 2-norm of each of `gradients`: `[n]`.
pub fn norms_of(gradients: &[&Tensor]) -> Result<Tensor> {
    let list = handles(gradients);
    let mut norms = std::ptr::null_mut();
    // SAFETY: the list is live; on success the shim hands over one new tensor.
    unsafe {
        checked(pt_norms(list.len(), list.as_ptr(), &mut norms))?;
        Ok(Tensor::from_ptr(norms))
    }
}

/// `gradients[i] /= divisor`, in place.
pub fn divide_list(gradients: &[&Tensor], divisor: &Tensor) -> Result<()> {
    let list = handles(gradients);
    // SAFETY: the list and `divisor` are live.
    checked(unsafe { pt_divide(list.len(), list.as_ptr(), divisor.as_ptr().cast_mut()) })
}

/// Adds 1 to each of `counters`, or 0 if `grad_scale` skips the step.
pub fn count_up(counters: &[&Tensor], grad_scale: GradScale) -> Result<()> {
    let list = handles(counters);
    let (skip, taken) = (grad_scale.skip.as_ptr().cast_mut(), or_null(grad_scale.taken));
    // SAFETY: the list and both numbers are live, or null.
    checked(unsafe { pt_count(list.len(), list.as_ptr(), skip, taken) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_scales_to_the_limit_and_reports_the_norm() {
        let (a, b) = (Tensor::from_slice(&[3.0f32, 0.0]), Tensor::from_slice(&[4.0f32]));
        let (norm, divisor) = clip_gradients(&[&a, &b], None, 1.0, None).unwrap();
        assert_eq!(norm.double_value(&[]), 5.0);
        divide_list(&[&a, &b], &divisor.unwrap()).unwrap();
        assert!((a.double_value(&[0]) - 0.6).abs() < 1e-6 && (b.double_value(&[0]) - 0.8).abs() < 1e-6);
        let (_, none) = clip_gradients(&[&a, &b], None, 0.0, None).unwrap();
        assert!(none.is_none(), "a limit of 0 leaves gradients alone");
        let (norm, divisor) = clip_gradients(&[&a, &b], None, 0.1, Some(&Tensor::from(4f32))).unwrap();
        assert!(
            (norm.double_value(&[]) - 0.25).abs() < 1e-6 && (divisor.unwrap().double_value(&[]) - 10.0).abs() < 1e-4
        );
    }
}
