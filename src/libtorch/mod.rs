//! What libtorch offers and tch does not: fused optimizers, gradient clipping without host synchronization, weighted backward
//! passes, global switches, CUDA graphs, kernels of our own, and CUDA libraries opened at run time. The only `unsafe` code of the
//! project.

mod autograd;
mod cuda;
mod device;
#[cfg(test)]
mod emulated;
mod graph;
mod kernels;
mod lstm;
mod optimizers;
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

pub use autograd::{backward, with_gradients};
pub use device::{device, upload, upload_into};
pub use graph::{CudaGraph, GraphPool};
pub use kernels::{Kernel, LaunchConfig, max_pool, peak_device_memory};
pub(crate) use kernels::{LISTED, Listed};
pub use lstm::both_directions;
pub use optimizers::{
    Adam, AdamLists, GradScale, Sgd, clip_gradients, count_up, divide_list, fused_adam, fused_sgd, norms_of,
};
pub use script::ScriptModule;

type List = *const *mut C_tensor;

unsafe extern "C" {
    fn pt_free(text: *mut c_char);
    fn pt_copy(n: usize, into: List, from: List) -> *mut c_char;
    fn pt_add(n: usize, into: List, from: List) -> *mut c_char;
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

    /// As a scalar of float32.
    pub fn on(self, device: Device) -> Tensor {
        match self {
            Number::Host(value) => Tensor::full([], value, (Kind::Float, device)),
            Number::Device(tensor) => tensor.shallow_clone(),
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

/// `into[i] = from[i]`, in place, of whatever kind.
pub fn copy_lists(into: &[&Tensor], from: &[&Tensor]) -> Result<()> {
    ensure!(into.len() == from.len(), "lists of different lengths");
    let (into, from) = (handles(into), handles(from));
    // SAFETY: both lists are live and of one length.
    checked(unsafe { pt_copy(into.len(), into.as_ptr(), from.as_ptr()) })
}

/// `into[i] += from[i]`, in place.
pub fn add_lists(into: &[&Tensor], from: &[&Tensor]) -> Result<()> {
    ensure!(into.len() == from.len(), "lists of different lengths");
    let (into, from) = (handles(into), handles(from));
    // SAFETY: both lists are live and of one length.
    checked(unsafe { pt_add(into.len(), into.as_ptr(), from.as_ptr()) })
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

/// 1 at probability `p`, else 0, float32 `[rows, ...]`. On the CPU each row has a stream of its own (Philox), so that the rows
/// of a batch draw the same however it is cut; on CUDA libtorch's generator draws.
pub fn bernoulli(size: &[i64], p: f64, draws: Draws, device: Device) -> Tensor {
    if device != Device::Cpu {
        return Tensor::empty(size, (Kind::Float, device)).bernoulli_float_(p);
    }
    let out = Tensor::empty(size, (Kind::Float, device));
    // SAFETY: `out` is a live, contiguous float tensor on the CPU.
    checked(unsafe { pt_bernoulli(out.as_ptr().cast_mut(), draws.seed, draws.first_row, p) })
        .expect("invariant: a new tensor can be filled");
    out
}

/// Runs `work`, and gives what its panic says as an error: tch's operators panic where libtorch throws, for want of memory above
/// all.
pub fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    done.unwrap_or_else(|panic| Err(anyhow!(panic_text(panic.as_ref()))))
}

/// What a panic says in a line; those of tch's operators hold the text of libtorch's exception.
fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    let text = text.unwrap_or("libtorch gave up");
    let text = text.split_once("Torch(\"").map_or(text, |(_, thrown)| thrown);
    // Those of this folder's operators, which expect none, end in it.
    let text = text.split_once(": libtorch: ").map_or(text, |(_, thrown)| thrown);
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

/// Whether the processor multiplies matrices of bfloat16 numbers (AVX-512 BF16).
pub fn has_bfloat16() -> bool {
    std::is_x86_feature_detected!("avx512bf16")
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
    fn a_panic_is_told_by_libtorch_s_text() {
        for text in ["invariant: it fits: libtorch: CUDA out of memory", "Err: Torch(\"CUDA out of memory\\nmore\")"] {
            assert_eq!(panic_text(&text.to_owned()), "CUDA out of memory");
        }
    }

    #[test]
    fn an_exception_of_libtorch_becomes_an_error() {
        let error = add_lists(&[&Tensor::from_slice(&[1.0f32, 2.0])], &[&Tensor::from_slice(&[1.0f32, 2.0, 3.0])]);
        assert!(error.unwrap_err().to_string().starts_with("libtorch:"));
    }
}
