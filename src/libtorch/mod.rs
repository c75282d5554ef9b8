//! Functions of libtorch that tch lacks: fused optimizers, gradient clipping without host synchronization, weighted
//! backward passes, global switches, CUDA graphs, custom kernels, and CUDA libraries opened at run time. The only
//! `unsafe` code of the project.

mod autograd;
mod beside;
mod byte_convolution;
mod crf;
mod cuda;
mod device;
#[cfg(test)]
mod emulated;
mod functions;
mod graph;
mod kernels;
mod lstm;
mod optimizers;
mod profile;
mod random;
mod script;
pub mod sources;

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
pub use beside::Beside;
pub use byte_convolution::byte_convolution;
pub use crf::crf_loss;
pub use device::{device, upload, upload_into};
pub use functions::{max_pool, narrow_linear};
pub use graph::{CudaGraph, GraphPool};
pub use kernels::{Compiling, Kernel, LaunchConfig, compile_ahead, peak_device_memory};
pub(crate) use kernels::{LISTED, Listed};
pub use lstm::both_directions;
pub use optimizers::{
    Adam, AdamLists, GradScale, Sgd, clip_gradients, count_up, divide_list, fused_adam, fused_sgd, norms_of,
};
pub use profile::busy_time;
pub use random::{Draws, bernoulli, draws_alike, dropout, seed_generator, with_seed_at};
pub use script::ScriptModule;

type List = *const *mut C_tensor;

unsafe extern "C" {
    fn pt_free(text: *mut c_char);
    fn pt_copy(n: usize, into: List, from: List) -> *mut c_char;
    fn pt_add(n: usize, into: List, from: List) -> *mut c_char;
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

/// The handles of a list. tch returns `*const`, but its own in-place operators write through the same pointer.
fn handles(tensors: &[&Tensor]) -> Vec<*mut C_tensor> {
    tensors.iter().map(|tensor| tensor.as_ptr().cast_mut()).collect()
}

/// A number on the host, or a float32 scalar on the device, which a recorded step reads anew at each replay.
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

    /// The number as a float32 scalar.
    pub fn on(self, device: Device) -> Tensor {
        match self {
            Number::Host(value) => Tensor::full([], value, (Kind::Float, device)),
            Number::Device(tensor) => tensor.shallow_clone(),
        }
    }

    /// The host's number, or 0, and the handle of the device's number, or null.
    fn split(self) -> (f64, *mut C_tensor) {
        match self {
            Number::Host(value) => (value, std::ptr::null_mut()),
            Number::Device(tensor) => (0.0, tensor.as_ptr().cast_mut()),
        }
    }
}

/// `into[i] = from[i]`, in place; kinds may differ.
pub fn copy_lists(into: &[&Tensor], from: &[&Tensor]) -> Result<()> {
    ensure!(into.len() == from.len(), "lists of different lengths");
    let (into, from) = (handles(into), handles(from));
    // SAFETY: both lists are live and of the same length.
    checked(unsafe { pt_copy(into.len(), into.as_ptr(), from.as_ptr()) })
}

/// `into[i] += from[i]`, in place.
pub fn add_lists(into: &[&Tensor], from: &[&Tensor]) -> Result<()> {
    ensure!(into.len() == from.len(), "lists of different lengths");
    let (into, from) = (handles(into), handles(from));
    // SAFETY: both lists are live and of the same length.
    checked(unsafe { pt_add(into.len(), into.as_ptr(), from.as_ptr()) })
}

/// The elements of a float32 tensor on the CPU, as a view of its memory.
pub(crate) fn floats(tensor: &mut Tensor) -> Result<&mut [f32]> {
    let fits = tensor.device() == Device::Cpu && tensor.kind() == Kind::Float && tensor.is_contiguous();
    ensure!(fits, "a contiguous float32 tensor on the CPU is needed");
    if tensor.numel() == 0 {
        return Ok(&mut []);
    }
    // SAFETY: the tensor owns this many floats while borrowed. Other handles to the same memory are not used meanwhile.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), tensor.numel()) })
}

/// Runs `work` and returns a panic as an error: tch's operators panic where libtorch throws, mostly for lack of memory.
pub fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    done.unwrap_or_else(|panic| Err(anyhow!(panic_text(panic.as_ref()))))
}

/// A panic's message in one line; those of tch's operators contain the text of libtorch's exception.
fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    let text = text.unwrap_or("libtorch gave up");
    let text = text.split_once("Torch(\"").map_or(text, |(_, thrown)| thrown);
    // A failed `expect` of this folder ends with the exception's text.
    let text = text.split_once(": libtorch: ").map_or(text, |(_, thrown)| thrown);
    let text = text.split("\\n").flat_map(str::lines).next().unwrap_or_default();
    match text.split_once("DefaultCPUAllocator: ") {
        Some((_, wanted)) => wanted.split(". Error code").next().unwrap_or(wanted).to_owned(),
        None => text.to_owned(),
    }
}

/// Runs `work(0)`, ..., `work(n - 1)` on rayon's threads and returns the results in order; if n is 1, on this thread.
///
/// Tensors are handles without locks. Calls may read the same tensors and build graphs on them, but must not write to
/// memory that another call touches; everything else that they share must be `Sync`.
pub(crate) fn side_by_side<T: Send>(n: usize, work: &(dyn Fn(usize) -> T + '_)) -> Vec<T> {
    struct Reading<'a, T>(&'a (dyn Fn(usize) -> T + 'a));
    // SAFETY: the crate's callers share plain data and tensors, which they either read (thread-safe in libtorch) or
    // write each in a block of its own. They share no cells and no `Rc`.
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

/// The number of parts that a batch is split into on the CPU.
static WORKERS: AtomicUsize = AtomicUsize::new(1);

pub fn workers() -> usize {
    WORKERS.load(Ordering::Relaxed)
}

/// Sets libtorch's process-wide switches: deterministic kernels (a warning if an operator has none), TF32 products on
/// CUDA, threads and workers. With several workers, each of them and the main thread has an equal share of the threads
/// within an operator: libgomp's threads spin while they wait, and would take the processor from the workers.
pub fn configure(threads: usize, workers: usize, tf32: bool) -> Result<()> {
    let share = i32::try_from((threads / workers).max(1)).context("too many threads")?;
    WORKERS.store(workers, Ordering::Relaxed);
    // Fails only if a pool exists already.
    let start = move |_| tch::set_num_threads(share);
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).start_handler(start).build_global();
    if tch::get_num_threads() != share {
        tch::set_num_threads(share);
    }
    // SAFETY: `warned` accepts what the shim passes, a NUL-terminated text that lives for the call.
    checked(unsafe { pt_configure(true, tf32, warned) })
}

/// Logs libtorch's warnings, each once, at debug level: they address programmers and repeat at every call.
extern "C" fn warned(text: *const c_char) {
    static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    // SAFETY: the shim passes a NUL-terminated text that lives for the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    if TOLD.lock().is_ok_and(|mut told| told.insert(text.clone())) {
        log::debug!("libtorch: {text}");
    }
}

/// Whether the processor has instructions for products of bfloat16 matrices (AVX-512 BF16).
pub fn has_bfloat16() -> bool {
    std::is_x86_feature_detected!("avx512bf16")
}

/// Sets whether operators on the CPU may use oneDNN.
pub(crate) fn use_onednn(on: bool) {
    // SAFETY: takes a plain value.
    checked(unsafe { pt_use_onednn(on) }).expect("invariant: a switch can be set");
}

/// Ends the process at once, from any thread. An ordinary exit would free libtorch's memory while other threads use it.
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
