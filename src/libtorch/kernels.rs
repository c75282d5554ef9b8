//! Custom GPU kernels: one launch for what takes libtorch many.

use std::ffi::{CString, c_void};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use tch::{Device, Tensor};

use super::cuda::functions;
use super::{checked, handles, sources};

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
    Compiling(sources::ALL.into_iter().filter(|_| !switched_off()).filter_map(begin).collect())
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

/// The peak number of bytes that libtorch has reserved on the GPU.
pub fn peak_device_memory() -> Result<usize> {
    let mut bytes = 0;
    // SAFETY: fills one number.
    checked(unsafe { (functions()?.peak_memory)(&mut bytes) })?;
    Ok(usize::try_from(bytes)?)
}
