//! What libtorch offers and tch does not: fused optimizers, gradient clipping without host synchronization, global
//! switches, CUDA graphs, and CUDA libraries opened at run time. The only `unsafe` code of the project.

mod device;
mod graph;
mod script;

use std::any::Any;
use std::collections::BTreeSet;
use std::ffi::{CStr, c_char};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, anyhow, ensure};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

pub use device::{device, upload};
pub use graph::{CudaGraph, GraphPool};
pub use script::ScriptModule;

#[repr(C)]
struct AdamOptions {
    learning_rate: f64,
    beta1: f64,
    beta2: f64,
    weight_decay: f64,
    epsilon: f64,
}

type List = *const *mut C_tensor;

unsafe extern "C" {
    fn pt_free(text: *mut c_char);
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
        first_step: bool,
        rate_on_device: *mut C_tensor,
        skip: *mut C_tensor,
    ) -> *mut c_char;
    fn pt_clip(n: usize, gradients: List, limit: f64, norm: *mut *mut C_tensor) -> *mut c_char;
    fn pt_add(n: usize, into: List, from: List) -> *mut c_char;
    fn pt_count(n: usize, counters: List, skip: *mut C_tensor) -> *mut c_char;
    fn pt_bernoulli(out: *mut C_tensor, seed: u64, first_row: u64, p: f64) -> *mut c_char;
    fn pt_use_onednn(on: bool) -> *mut c_char;
    fn _exit(code: i32) -> !;
    fn pt_configure(deterministic: bool, tf32: bool, warn: extern "C" fn(*const c_char)) -> *mut c_char;
}

fn checked(text: *mut c_char) -> Result<()> {
    if text.is_null() {
        return Ok(());
    }
    // SAFETY: the shim returns null or a NUL-terminated string that it allocated and that nobody else frees.
    let message = unsafe {
        let message = CStr::from_ptr(text).to_string_lossy().into_owned();
        pt_free(text);
        message
    };
    let first = message.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    log::debug!("{message}");
    Err(anyhow!("libtorch: {first}"))
}

/// The handles of a list. tch hands out `*const`, yet its in-place operators write through the same pointer.
fn handles(tensors: &[&Tensor]) -> Vec<*mut C_tensor> {
    tensors.iter().map(|tensor| tensor.as_ptr().cast_mut()).collect()
}

/// The tensors of one fused Adam step, in one order; all of one device and kind (float32).
pub struct AdamLists<'a> {
    pub parameters: &'a [&'a Tensor],
    pub gradients: &'a [&'a Tensor],
    pub first_moments: &'a [&'a Tensor],
    pub second_moments: &'a [&'a Tensor],
    /// One scalar tensor each: how many steps the parameter has had, with this one.
    pub steps: &'a [&'a Tensor],
}

/// A number that the host knows, or one on the device (a scalar of float32), which recorded work reads anew each time.
#[derive(Clone, Copy, Debug)]
pub enum Number<'a> {
    Host(f64),
    Device(&'a Tensor),
}

impl From<f64> for Number<'_> {
    fn from(value: f64) -> Self {
        Number::Host(value)
    }
}

impl Number<'_> {
    pub fn on_host(self) -> Option<f64> {
        match self {
            Number::Host(value) => Some(value),
            Number::Device(_) => None,
        }
    }

    /// The host's number, or 0, and the handle of the device's, or null.
    fn split(self) -> (f64, *mut C_tensor) {
        match self {
            Number::Host(value) => (value, std::ptr::null_mut()),
            Number::Device(tensor) => (0.0, tensor.as_ptr().cast_mut()),
        }
    }
}

/// Hyperparameters of Adam and AdamW, in PyTorch's meaning.
#[derive(Clone, Copy, Debug)]
pub struct Adam<'a> {
    pub learning_rate: Number<'a>,
    pub betas: (f64, f64),
    pub epsilon: f64,
    pub weight_decay: f64,
    /// True for AdamW (decay apart from the gradient), false for Adam with an L2 term.
    pub decoupled: bool,
}

/// One step of `torch._fused_adamw_` or `torch._fused_adam_`, in place. Where `skip` (one float) is 1, on the device,
/// no parameter and no moment changes.
pub fn fused_adam(lists: &AdamLists, adam: Adam, skip: &Tensor) -> Result<()> {
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
            skip.as_ptr().cast_mut(),
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

/// One step of `torch._fused_sgd_`, in place. `first` fills the momentum buffers instead of reading them.
pub fn fused_sgd(
    (parameters, gradients, momenta): (&[&Tensor], &[&Tensor], &[&Tensor]),
    sgd: Sgd,
    first: bool,
    skip: &Tensor,
) -> Result<()> {
    let n = parameters.len();
    ensure!(gradients.len() == n && momenta.len() == n, "lists of different lengths in one optimizer step");
    let (parameters, gradients, momenta) = (handles(parameters), handles(gradients), handles(momenta));
    let (learning_rate, on_device) = sgd.learning_rate.split();
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
            first,
            on_device,
            skip.as_ptr().cast_mut(),
        )
    })
}

/// Scales `gradients` in place so that their common 2-norm is at most `limit` (0: no limit), without a host
/// synchronization. Returns the norm before scaling, a scalar on the device.
pub fn clip_gradients(gradients: &[&Tensor], limit: f64) -> Result<Tensor> {
    let list = handles(gradients);
    let mut norm = std::ptr::null_mut();
    // SAFETY: the list is live; on success the shim hands over one new tensor in `norm`.
    unsafe {
        checked(pt_clip(list.len(), list.as_ptr(), limit, &mut norm))?;
        Ok(Tensor::from_ptr(norm))
    }
}

/// `into[i] += from[i]`, in place.
pub fn add_lists(into: &[&Tensor], from: &[&Tensor]) -> Result<()> {
    ensure!(into.len() == from.len(), "lists of different lengths");
    let (into, from) = (handles(into), handles(from));
    // SAFETY: both lists are live and of one length.
    checked(unsafe { pt_add(into.len(), into.as_ptr(), from.as_ptr()) })
}

/// Adds 1 to each of `counters`, or 0 where `skip` (one float) is 1.
pub fn count_up(counters: &[&Tensor], skip: &Tensor) -> Result<()> {
    let list = handles(counters);
    // SAFETY: the list and `skip` are live.
    checked(unsafe { pt_count(list.len(), list.as_ptr(), skip.as_ptr().cast_mut()) })
}

/// The numbers of a float32 tensor on the CPU, in place.
pub(crate) fn floats(tensor: &mut Tensor) -> Result<&mut [f32]> {
    let fits = tensor.device() == Device::Cpu && tensor.kind() == Kind::Float && tensor.is_contiguous();
    ensure!(fits, "a contiguous float32 tensor on the CPU is needed");
    if tensor.numel() == 0 {
        return Ok(&mut []);
    }
    // SAFETY: the tensor owns that many floats for as long as it is borrowed. Handles that share them are not used meanwhile.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), tensor.numel()) })
}

/// Draws for training: a seed, and which row of the whole batch the first one at hand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draws {
    pub seed: u64,
    pub first_row: u64,
}

/// 1 at probability `p`, else 0, float32 `[rows, ...]`. On the CPU each row has a stream of its own (Philox), so that the rows of a
/// batch draw the same however it is cut; on CUDA libtorch's generator draws.
pub fn bernoulli(size: &[i64], p: f64, draws: Draws, device: Device) -> Tensor {
    if device != Device::Cpu {
        return Tensor::rand(size, (Kind::Float, device)).lt(p).to_kind(Kind::Float);
    }
    let out = Tensor::empty(size, (Kind::Float, device));
    // SAFETY: `out` is a live, contiguous float tensor on the CPU.
    checked(unsafe { pt_bernoulli(out.as_ptr().cast_mut(), draws.seed, draws.first_row, p) })
        .expect("invariant: a new tensor can be filled");
    out
}

/// What a panic says in a line; those of tch's operators hold the text of libtorch's exception.
pub fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    let text = text.unwrap_or("libtorch gave up");
    let text = text.split_once("Torch(\"").map_or(text, |(_, thrown)| thrown);
    let text = text.split("\\n").flat_map(str::lines).next().unwrap_or_default();
    match text.split_once("DefaultCPUAllocator: ") {
        Some((_, wanted)) => wanted.split(". Error code").next().unwrap_or(wanted).to_owned(),
        None => text.to_owned(),
    }
}

/// Runs `work(0)`, ..., `work(n - 1)` on rayon's threads and returns what they return, in order; on this thread where n is 1.
///
/// Tensors are handles without locks. Calls may read the same ones and build graphs on them; none may write to memory that
/// another one touches, and what they share besides tensors must be `Sync`.
pub(crate) fn side_by_side<T: Send>(n: usize, work: &(dyn Fn(usize) -> T + '_)) -> Vec<T> {
    struct Reading<'a, T>(&'a (dyn Fn(usize) -> T + 'a));
    // SAFETY: the crate's callers share tensors that they read (which is thread-safe in libtorch) or of which each call writes
    // a block of its own, and plain data; no cells, no counted references of this thread alone.
    unsafe impl<T> Sync for Reading<'_, T> {}
    impl<T> Reading<'_, T> {
        fn call(&self, i: usize) -> T {
            (self.0)(i)
        }
    }
    if n == 1 {
        return vec![work(0)];
    }
    let reading = Reading(work);
    (0..n).into_par_iter().map(|i| reading.call(i)).collect()
}

/// Parts that a batch is cut in on the CPU.
static WORKERS: AtomicUsize = AtomicUsize::new(1);

pub fn workers() -> usize {
    WORKERS.load(Ordering::Relaxed)
}

/// Process-wide switches of libtorch: deterministic kernels (a warning where an operator has none), TF32 products on
/// CUDA, threads and workers. With several workers each has its share of the threads within an operator, and so has the main
/// thread: libgomp's threads spin while they wait, and would take the processor from the workers.
pub fn configure(threads: usize, workers: usize, tf32: bool) -> Result<()> {
    let share = i32::try_from((threads / workers).max(1)).context("too many threads")?;
    WORKERS.store(workers, Ordering::Relaxed);
    // Fails only where a pool exists already.
    let start = move |_| tch::set_num_threads(share);
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).start_handler(start).build_global();
    if tch::get_num_threads() != share {
        tch::set_num_threads(share);
    }
    // SAFETY: `warned` takes what the shim gives it, a NUL-terminated text that lives for the call.
    checked(unsafe { pt_configure(true, tf32, warned) })
}

/// Hears libtorch's warnings, which are for its own users and come at every call: each is told once, to who asks for more.
extern "C" fn warned(text: *const c_char) {
    static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    // SAFETY: the shim passes a NUL-terminated text that lives for the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    if TOLD.lock().is_ok_and(|mut told| told.insert(text.clone())) {
        log::debug!("libtorch: {text}");
    }
}

/// Whether operators on the CPU may be oneDNN's.
pub(crate) fn use_onednn(on: bool) {
    // SAFETY: takes a plain value.
    checked(unsafe { pt_use_onednn(on) }).expect("invariant: a switch can be set");
}

/// Ends the process at once, from any thread: what runs at an ordinary exit would take libtorch's memory away from threads that
/// are at work in it.
pub(crate) fn exit_at_once(code: i32) -> ! {
    // SAFETY: takes a plain value and does not return.
    unsafe { _exit(code) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_scales_to_the_limit_and_reports_the_norm() {
        let (a, b) = (Tensor::from_slice(&[3.0f32, 0.0]), Tensor::from_slice(&[4.0f32]));
        let norm = clip_gradients(&[&a, &b], 1.0).unwrap();
        assert_eq!(norm.double_value(&[]), 5.0);
        assert!((a.double_value(&[0]) - 0.6).abs() < 1e-6 && (b.double_value(&[0]) - 0.8).abs() < 1e-6);
        let _ = clip_gradients(&[&a, &b], 0.0).unwrap();
        assert!((b.double_value(&[0]) - 0.8).abs() < 1e-6, "a limit of 0 leaves gradients alone");
    }

    #[test]
    fn an_exception_of_libtorch_becomes_an_error() {
        let error = add_lists(&[&Tensor::from_slice(&[1.0f32, 2.0])], &[&Tensor::from_slice(&[1.0f32, 2.0, 3.0])]);
        assert!(error.unwrap_err().to_string().starts_with("libtorch:"));
    }
}
