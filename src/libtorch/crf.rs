//! The CRF's forward-backward pass on the CPU.

use std::ffi::c_char;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use super::checked;

unsafe extern "C" {
    fn pt_crf(
        x: *const C_tensor,
        labels: *const C_tensor,
        transitions: *const C_tensor,
        start: *const C_tensor,
        end: *const C_tensor,
        to_x: *mut C_tensor,
        to_transitions: *mut C_tensor,
        to_start: *mut C_tensor,
        to_end: *mut C_tensor,
        value: *mut f64,
        sound: *mut bool,
    ) -> *mut c_char;
}

/// The summed negative log-likelihood of a batch, and its gradients.
pub struct CrfLoss {
    pub value: f64,
    /// [b, W, C], float32; the others are float64.
    pub to_x: Tensor,
    pub to_transitions: Tensor,
    pub to_start: Tensor,
    pub to_end: Tensor,
}

/// The loss of `labels` [b, W], -1 beyond a sentence's end, under the logits `x` [b, W, C], float32, and the scores of
/// transitions [C, C], start `[C]` and end `[C]`, float64. `None` if probabilities are too far apart for its arithmetic.
///
/// # Errors
/// Tensors of other kinds or sizes, or not on the CPU.
pub fn crf_loss(x: &Tensor, labels: &Tensor, scores: [&Tensor; 3]) -> Result<Option<CrfLoss>> {
    let [rows, words, tags] = x.size()[..].try_into()?;
    let fits = |x: &Tensor, kind, size: &[i64]| x.device() == Device::Cpu && x.kind() == kind && x.size() == size;
    let sizes: [&[i64]; 3] = [&[tags, tags], &[tags], &[tags]];
    ensure!(
        fits(x, Kind::Float, &[rows, words, tags])
            && fits(labels, Kind::Int64, &[rows, words])
            && scores.iter().zip(sizes).all(|(scores, size)| fits(scores, Kind::Double, size)),
        "logits of float32, labels of int64 and scores of float64 are needed, on the CPU"
    );
    let [x, labels] = [x, labels].map(Tensor::contiguous);
    let [transitions, start, end] = scores.map(Tensor::contiguous);
    let [to_x, to_transitions, to_start, to_end] = [&x, &transitions, &start, &end].map(Tensor::empty_like);
    let (mut value, mut sound) = (0.0, false);
    // SAFETY: all tensors are live, contiguous and of the kinds and sizes that the function reads and writes.
    checked(unsafe {
        pt_crf(
            x.as_ptr(),
            labels.as_ptr(),
            transitions.as_ptr(),
            start.as_ptr(),
            end.as_ptr(),
            to_x.as_ptr().cast_mut(),
            to_transitions.as_ptr().cast_mut(),
            to_start.as_ptr().cast_mut(),
            to_end.as_ptr().cast_mut(),
            &mut value,
            &mut sound,
        )
    })?;
    Ok(sound.then_some(CrfLoss { value, to_x, to_transitions, to_start, to_end }))
}
