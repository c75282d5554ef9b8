//! Custom GPU kernels: one launch for what takes libtorch many.

use std::ffi::{CString, c_void};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use super::cuda::functions;
use super::{checked, handles};

/// Environment variable; 0 disables the custom kernels, and operators are used instead.
const SWITCH: &str = "POLYTASK_KERNELS";

struct Found(*mut c_void);

// SAFETY: a kernel handle is only read, by any thread.
unsafe impl Send for Found {}
// SAFETY: likewise.
unsafe impl Sync for Found {}

/// The largest number of entries in a kernel's list.
pub(crate) const LISTED: usize = 256;

/// Values that change from launch to launch: numbers or addresses of tensors, 0 for none. Kernels take it by value.
#[derive(Clone, Copy)]
pub(crate) struct List<const N: usize>([i64; N]);

/// The list of most kernels.
pub(crate) type Listed = List<LISTED>;

impl<const N: usize> List<N> {
    /// # Errors
    /// More than `N` values.
    pub fn new(values: &[i64]) -> Result<Self> {
        ensure!(values.len() <= N, "a kernel's list has {N} entries at most");
        let mut list = [0; N];
        list[..values.len()].copy_from_slice(values);
        Ok(List(list))
    }
}

impl Listed {
    /// The addresses of tensors; 0 for undefined ones.
    ///
    /// # Errors
    /// Tensors that are not contiguous, or more than [`LISTED`] of them.
    pub fn of(tensors: &[&Tensor]) -> Result<Listed> {
        let defined = |tensor: &&&Tensor| tensor.defined();
        ensure!(
            tensors.iter().filter(defined).all(|tensor| tensor.is_contiguous()),
            "a kernel needs contiguous tensors"
        );
        let address = |tensor: &&Tensor| if tensor.defined() { tensor.data_ptr() as i64 } else { 0 };
        Listed::new(&tensors.iter().map(address).collect::<Vec<_>>())
    }
}

/// The sources of all kernels.
const SOURCES: [&str; 11] = [
    // The longest to compile first.
    include_str!("optimizer.cu"),
    include_str!("crf.cu"),
    include_str!("weighting.cu"),
    LINEAR_SOURCE,
    include_str!("byte_convolution.cu"),
    include_str!("cross_entropy.cu"),
    include_str!("random.cu"),
    MAX_POOL_SOURCE,
    include_str!("clip.cu"),
    include_str!("gather.cu"),
    include_str!("put.cu"),
];

/// Kernels being compiled by other threads, which are waited for when this is dropped: a process cannot end before.
#[must_use]
pub struct Compiling(Vec<JoinHandle<()>>);

impl Drop for Compiling {
    fn drop(&mut self) {
        self.0.drain(..).for_each(|thread| drop(thread.join()));
    }
}

fn switched_off() -> bool {
    std::env::var(SWITCH).is_ok_and(|value| value == "0")
}

/// Compiles all kernels for a GPU beside what this thread does; nothing on the CPU.
pub fn compile_ahead(device: Device) -> Compiling {
    let Device::Cuda(index) = device else { return Compiling(Vec::new()) };
    // Opened here, so that it is opened once.
    let Ok(functions) = functions() else { return Compiling(Vec::new()) };
    let compile = move |source: &str| -> Result<()> {
        let source = CString::new(source)?;
        // SAFETY: the text lives for the call.
        checked(unsafe { (functions.kernel_compile)(source.as_ptr(), index as i32) })
    };
    let begin = |source: &'static str| {
        // Errors are reported where a kernel is needed.
        std::thread::Builder::new().spawn(move || drop(compile(source))).ok()
    };
    Compiling(SOURCES.into_iter().filter(|_| !switched_off()).filter_map(begin).collect())
}

/// A kernel of a CUDA source, compiled at its first use.
pub struct Kernel {
    source: &'static str,
    name: &'static str,
    found: OnceLock<Option<Found>>,
}

/// The grid in blocks, the block in threads (x and y each), and the bytes of shared memory per block.
#[derive(Clone, Copy, Debug)]
pub struct LaunchConfig {
    pub grid: [usize; 2],
    pub block: [usize; 2],
    pub shared: usize,
}

impl Kernel {
    pub const fn new(source: &'static str, name: &'static str) -> Kernel {
        Kernel { source, name, found: OnceLock::new() }
    }

    /// Whether the kernel is available on `device`; if not, operators are used, and on CUDA a warning says why.
    pub fn serves(&self, device: Device) -> bool {
        device != Device::Cpu && self.get().is_some()
    }

    /// The kernel, for functions of the shared library.
    pub(super) fn handle(&self) -> Option<*mut c_void> {
        self.get().map(|found| found.0)
    }

    fn get(&self) -> Option<&Found> {
        let find = || -> Result<Found> {
            ensure!(!switched_off(), "{SWITCH} is 0");
            let (source, name) = (CString::new(self.source)?, CString::new(self.name)?);
            let (mut kernel, started) = (std::ptr::null_mut(), Instant::now());
            // SAFETY: both texts live for the call, which fills `kernel` if it succeeds.
            checked(unsafe { (functions()?.kernel_find)(source.as_ptr(), name.as_ptr(), &mut kernel) })?;
            log::debug!("kernel {} is there after {:.0?}", self.name, started.elapsed());
            Ok(Found(kernel))
        };
        let told = |error: anyhow::Error| {
            log::warn!("kernel {} is not available; operators are used instead: {error:#}", self.name)
        };
        self.found.get_or_init(|| find().map_err(told).ok()).as_ref()
    }

    /// The arguments are the tensors' memory, then the numbers as `int`; kinds and sizes must be as its source expects.
    ///
    /// # Errors
    /// Tensors that are not contiguous on the GPU; a launch configuration that the GPU rejects.
    pub(crate) fn launch(&self, shape: LaunchConfig, tensors: &[&Tensor], numbers: &[i64]) -> Result<()> {
        self.launch_with::<LISTED>(shape, tensors, numbers, None)
    }

    /// As [`Self::launch`], with a list as the last argument.
    pub(crate) fn launch_with<const N: usize>(
        &self,
        shape: LaunchConfig,
        tensors: &[&Tensor],
        numbers: &[i64],
        listed: Option<&List<N>>,
    ) -> Result<()> {
        #[cfg(test)]
        if tensors.iter().all(|tensor| tensor.device() == Device::Cpu) {
            return super::emulated::launch((self.source, self.name), shape, tensors, numbers, listed);
        }
        let kernel = self.get().context("the kernel is not to be had")?;
        let narrow = |pair: [usize; 2]| -> Result<[u32; 2]> { Ok([pair[0].try_into()?, pair[1].try_into()?]) };
        let (grid, block) = (narrow(shape.grid)?, narrow(shape.block)?);
        let numbers = numbers.iter().map(|&number| Ok(number.try_into()?)).collect::<Result<Vec<i32>>>()?;
        let (tensors, shared) = (handles(tensors), shape.shared.try_into()?);
        // SAFETY: tensors and numbers live for the call; this project's kernels get the arguments that they declare.
        checked(unsafe {
            (functions()?.kernel_launch)(
                kernel.0,
                grid.as_ptr(),
                block.as_ptr(),
                shared,
                tensors.len(),
                tensors.as_ptr(),
                numbers.len(),
                numbers.as_ptr(),
                listed.map_or(std::ptr::null(), |listed| listed.0.as_ptr().cast()),
            )
        })
    }
}

const MAX_POOL_SOURCE: &str = include_str!("max_pool.cu");
static MAX_POOL: Kernel = Kernel::new(MAX_POOL_SOURCE, "max_pool");
static MAX_POOL_GRADIENT: Kernel = Kernel::new(MAX_POOL_SOURCE, "max_pool_gradient");

/// Max pooling over the positions of each sentence of `x` [B, T, F] within `lengths` `[B]`, none of them 0: [B, F].
/// `None` if there is no kernel for it.
pub fn max_pool(x: &Tensor, lengths: &Tensor) -> Option<Tensor> {
    let fits = x.kind() == Kind::Float && x.numel() > 0 && x.numel() < i32::MAX as usize && x.device() != Device::Cpu;
    let (kernel, gradient) = (fits.then(|| MAX_POOL.get()).flatten()?, MAX_POOL_GRADIENT.get()?);
    let functions = functions().ok()?;
    let (x, lengths, mut out) = (x.as_ptr().cast_mut(), lengths.as_ptr().cast_mut(), std::ptr::null_mut());
    // SAFETY: kernels and tensors are live; on success `out` is one new tensor.
    unsafe {
        checked((functions.max_pool)(kernel.0, gradient.0, x, lengths, &mut out))
            .expect("invariant: lengths are those of the states");
        Some(Tensor::from_ptr(out))
    }
}

const LINEAR_SOURCE: &str = include_str!("linear.cu");
static LINEAR_GRADIENTS: Kernel = Kernel::new(LINEAR_SOURCE, "linear_gradients");
static LINEAR_SUM: Kernel = Kernel::new(LINEAR_SOURCE, "linear_sum");

/// The most outputs that `linear.cu` has room for.
const NARROW: i64 = 128;

unsafe extern "C" {
    fn pt_grad_enabled() -> bool;
}

/// x W^T + b for `x` [..., F] and `weight` [C, F] with few outputs C, whose gradients by weights and bias a kernel computes.
/// `None` if there is no kernel for it, or without gradients.
pub fn narrow_linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Option<Tensor> {
    let (outputs, width) = weight.size2().ok()?;
    let fits = x.kind() == Kind::Float && weight.kind() == Kind::Float && x.is_contiguous() && x.numel() > 0;
    // SAFETY: takes nothing.
    if !fits
        || !unsafe { pt_grad_enabled() }
        || outputs > NARROW
        || x.device() == Device::Cpu
        || x.numel() > i32::MAX as usize
    {
        return None;
    }
    let (gradients, sum, functions) = (LINEAR_GRADIENTS.get()?, LINEAR_SUM.get()?, functions().ok()?);
    let (mut size, flat) = (x.size(), x.view([-1, width]));
    let [flat, weight, bias] = [&flat, weight, bias].map(|tensor| tensor.as_ptr().cast_mut());
    let mut out = std::ptr::null_mut();
    // SAFETY: kernels and tensors are live; on success `out` is one new tensor.
    let y = unsafe {
        checked((functions.narrow_linear)(gradients.0, sum.0, flat, weight, bias, &mut out))
            .expect("invariant: the layer's sizes fit its input");
        Tensor::from_ptr(out)
    };
    *size.last_mut()? = outputs;
    Some(y.view(size.as_slice()))
}

/// The peak number of bytes that libtorch has reserved on the GPU.
pub fn peak_device_memory() -> Result<usize> {
    let mut bytes = 0;
    // SAFETY: fills one number.
    checked(unsafe { (functions()?.peak_memory)(&mut bytes) })?;
    Ok(usize::try_from(bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_sources_are_compiled_ahead() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/libtorch");
        let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let mut sources: Vec<String> = files
            .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
            .map(|path| std::fs::read_to_string(path).unwrap())
            .collect();
        let mut known = SOURCES;
        sources.sort();
        known.sort();
        assert!(sources == known, "SOURCES does not list every .cu file");
    }

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
