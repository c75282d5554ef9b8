//! Autograd functions that tch lacks: weighted backward passes, and values with given gradients.

use std::ffi::c_char;

use anyhow::{Result, ensure};
use tch::Tensor;
use torch_sys::C_tensor;

use super::{List, checked, handles};

unsafe extern "C" {
    fn pt_grad_enabled() -> bool;
    fn pt_backward(
        n: usize,
        outputs: List,
        weights: List,
        m: usize,
        inputs: List,
        keep_graph: bool,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn pt_with_gradients(
        value: *mut C_tensor,
        n: usize,
        inputs: List,
        gradients: List,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
}

/// Whether this thread records what gradients need.
pub(super) fn grad_enabled() -> bool {
    // SAFETY: takes nothing.
    unsafe { pt_grad_enabled() }
}

/// The gradients of sum_i weights_i . outputs_i with respect to `inputs`, each weight of its output's shape. A gradient
/// is undefined where no output depends on the input, and in 16 bits where the input is.
pub fn backward(outputs: &[&Tensor], weights: &[&Tensor], inputs: &[&Tensor], keep_graph: bool) -> Result<Vec<Tensor>> {
    ensure!(outputs.len() == weights.len(), "every output needs a weight");
    let (outputs, weights, inputs) = (handles(outputs), handles(weights), handles(inputs));
    let mut out = vec![std::ptr::null_mut(); inputs.len()];
    // SAFETY: all lists are live; on success the shim fills `out` with new tensors and nulls.
    unsafe {
        checked(pt_backward(
            outputs.len(),
            outputs.as_ptr(),
            weights.as_ptr(),
            inputs.len(),
            inputs.as_ptr(),
            keep_graph,
            out.as_mut_ptr(),
        ))?;
        let tensor = |handle: *mut C_tensor| if handle.is_null() { Tensor::new() } else { Tensor::from_ptr(handle) };
        Ok(out.into_iter().map(tensor).collect())
    }
}

/// `value` (a scalar without gradient), in the same memory, as a graph node with given gradients: `known` pairs each
/// input, at most four, with the gradient with respect to it.
pub fn with_gradients(value: &Tensor, known: &[(&Tensor, &Tensor)]) -> Result<Tensor> {
    ensure!(known.len() <= 4, "gradients to {} inputs are known, not 4 at most", known.len());
    let (inputs, gradients): (Vec<&Tensor>, Vec<&Tensor>) = known.iter().copied().unzip();
    let (n, inputs, gradients) = (known.len(), handles(&inputs), handles(&gradients));
    let mut out = std::ptr::null_mut();
    // SAFETY: `value` and both lists, of `n` tensors each, are live; on success `out` is one new tensor.
    unsafe {
        checked(pt_with_gradients(value.as_ptr().cast_mut(), n, inputs.as_ptr(), gradients.as_ptr(), &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_gradients_are_those_of_the_value_and_weights_count() {
        let x = Tensor::from_slice(&[1.0f32, 2.0]).set_requires_grad(true);
        let y = Tensor::from_slice(&[5.0f32]).set_requires_grad(true);
        let value = Tensor::from(7f32);
        let constant = Tensor::from(0f32);
        let of_x = Tensor::from_slice(&[0.5f32, -1.0]);
        let known = with_gradients(&value, &[(&x, &of_x), (&constant, &constant)]).unwrap();
        assert_eq!((known.double_value(&[]), known.data_ptr()), (7.0, value.data_ptr()));
        let other = x.sum(tch::Kind::Float);
        let (two, three) = (Tensor::from(2f32), Tensor::from(3f32));
        let gradients = backward(&[&known, &other], &[&two, &three], &[&x, &y], true).unwrap();
        assert_eq!(gradients[0], Tensor::from_slice(&[4.0f32, 1.0]));
        assert!(!gradients[1].defined());
        // Again, with other inputs first; `value` itself has no gradient.
        let known = with_gradients(&value, &[(&y, &y.detach()), (&x, &of_x)]).unwrap();
        let gradients = backward(&[&(known * 2.0)], &[&three], &[&x, &y], false).unwrap();
        assert_eq!(gradients, [Tensor::from_slice(&[3.0f32, -6.0]), Tensor::from_slice(&[30.0f32])]);
        assert!(
            !value.requires_grad() && !tch::no_grad(|| with_gradients(&value, &[(&x, &of_x)])).unwrap().requires_grad()
        );
    }
}
