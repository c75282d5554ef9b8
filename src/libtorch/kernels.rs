//! Kernels of our own: what libtorch does in many small steps on a GPU, in one.

use std::ffi::{CString, c_void};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use super::cuda::functions;
use super::{checked, handles};

unsafe extern "C" {
    fn pt_grad_mode() -> bool;
}

/// The environment's word on them: 0 leaves their work to operators.
const SWITCH: &str = "POLYTASK_KERNELS";

struct Found(*mut c_void);

// SAFETY: a kernel that was found is read alone, from any thread.
unsafe impl Send for Found {}
// SAFETY: likewise.
unsafe impl Sync for Found {}

/// A kernel of a CUDA source, compiled when it is first asked for.
pub struct Kernel {
    source: &'static str,
    name: &'static str,
    found: OnceLock<Option<Found>>,
}

/// Blocks across and down, threads of a block across and down, and the bytes that these share.
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

    /// Whether it can be had on `device`; where it cannot, operators do its work, and a warning says why.
    pub fn serves(&self, device: Device) -> bool {
        device != Device::Cpu && self.get().is_some()
    }

    fn get(&self) -> Option<&Found> {
        let find = || -> Result<Found> {
            ensure!(std::env::var(SWITCH).as_deref() != Ok("0"), "{SWITCH} is 0");
            let (source, name) = (CString::new(self.source)?, CString::new(self.name)?);
            let mut kernel = std::ptr::null_mut();
            // SAFETY: both texts live for the call, which fills `kernel` where it returns null.
            checked(unsafe { (functions()?.kernel_find)(source.as_ptr(), name.as_ptr(), &mut kernel) })?;
            Ok(Found(kernel))
        };
        let told = |error: anyhow::Error| log::warn!("operators do the work of kernel {}: {error:#}", self.name);
        self.found.get_or_init(|| find().map_err(told).ok()).as_ref()
    }

    /// Its arguments are the tensors' memory, then the numbers as `int`; kinds and sizes have to be those that its source names.
    ///
    /// # Errors
    /// Tensors that are not contiguous on the GPU; a shape that the GPU refuses.
    pub(crate) fn launch(&self, shape: LaunchConfig, tensors: &[&Tensor], numbers: &[i64]) -> Result<()> {
        #[cfg(test)]
        if tensors.iter().all(|tensor| tensor.device() == Device::Cpu) {
            return super::emulated::launch((self.source, self.name), shape, tensors, numbers);
        }
        let kernel = self.get().context("the kernel is not to be had")?;
        let narrow = |pair: [usize; 2]| -> Result<[u32; 2]> { Ok([pair[0].try_into()?, pair[1].try_into()?]) };
        let (grid, block) = (narrow(shape.grid)?, narrow(shape.block)?);
        let numbers = numbers.iter().map(|&number| Ok(number.try_into()?)).collect::<Result<Vec<i32>>>()?;
        let (tensors, shared) = (handles(tensors), shape.shared.try_into()?);
        // SAFETY: tensors and numbers live for the call; the kernel is one of this project's, called with what it declares.
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
            )
        })
    }
}

static EMBEDDING: Kernel = Kernel::new(include_str!("embedding.cu"), "embedding_gradient");

/// Places that the kernel is for: it compares each with those before it. libtorch sorts where there are more.
const MOST_PLACES: usize = 4096;

/// Rows `ids` [...] of `table` [V, E]: [..., E]. What is read of row `padding` has no gradient; -1 is none.
pub fn embedding(table: &Tensor, ids: &Tensor, padding: i64) -> Tensor {
    // SAFETY: reads a switch of this thread.
    let grad_mode = table.requires_grad() && unsafe { pt_grad_mode() };
    let fits = grad_mode && table.kind() == Kind::Float && ids.numel() <= MOST_PLACES;
    let kernel = (fits && table.device() != Device::Cpu).then(|| EMBEDDING.get()).flatten();
    let (Some(kernel), Ok(functions)) = (kernel, functions()) else {
        return Tensor::embedding(table, ids, padding, false, false);
    };
    let mut out = std::ptr::null_mut();
    // SAFETY: kernel and tensors are live; on success `out` is one new tensor.
    unsafe {
        let done =
            (functions.embedding)(kernel.0, table.as_ptr().cast_mut(), ids.as_ptr().cast_mut(), padding, &mut out);
        checked(done).expect("invariant: ids are those of rows");
        Tensor::from_ptr(out)
    }
}

/// The most bytes that libtorch has taken of the GPU at once.
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
    fn the_embedding_kernel_adds_up_what_the_places_of_an_id_have() {
        let device = Device::Cpu;
        // More places than a block has threads, in blocks of several warps; ids that stand often, once and not at all.
        for (n, width, rows, padding) in [(300i64, 70i64, 9i64, 0i64), (40, 3, 500, -1)] {
            let ids = Tensor::randint(rows, [n], (Kind::Int64, device));
            let gradient = Tensor::randn([n, width], (Kind::Float, device));
            let table = Tensor::zeros([rows, width], (Kind::Float, device));
            // As kernels.cpp launches it.
            let block = 256.min((width as usize).next_multiple_of(32));
            let shape = LaunchConfig {
                grid: [n as usize, (width as usize).div_ceil(block)],
                block: [block, 1],
                shared: (block + block / 32) * size_of::<i32>(),
            };
            EMBEDDING.launch(shape, &[&gradient, &ids, &table], &[n, width, padding]).unwrap();
            let expected = Tensor::embedding_dense_backward(&gradient, &ids, rows, padding, false);
            assert!(table.allclose(&expected, 1e-5, 1e-5, false), "{n} places");
        }
    }
}
