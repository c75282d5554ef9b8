//! CUDA graphs: device work that is recorded once and replayed as one call.

use anyhow::Result;

use super::cuda::{Functions, Recording, functions};
use super::{caught, checked};

/// The memory pool that the graphs of a training run share.
#[derive(Default)]
pub struct GraphPool {
    id: [u64; 2],
    /// Set when a recording fails: libtorch cannot replay earlier recordings then. The caller resets it.
    pub broken: bool,
}

pub struct CudaGraph {
    functions: &'static Functions,
    recording: *mut Recording,
}

impl CudaGraph {
    /// Records the device work of `work` without running it; its tensors hold their results after [`Self::replay`]. A
    /// failed recording is tried once more.
    ///
    /// # Errors
    /// Whatever cannot be recorded: a wait for the device, memory from the host. Nothing has been computed then.
    pub fn record<T>(pool: &mut GraphPool, mut work: impl FnMut() -> Result<T>) -> Result<(CudaGraph, T)> {
        let functions = functions()?;
        // Recordings cannot use what earlier steps left in the allocator's cache. Releasing it waits for the device.
        // SAFETY: takes nothing.
        let make_room = || checked(unsafe { (functions.release_memory)() });
        if pool.id == [0, 0] {
            make_room()?;
        }
        match Self::try_to_record(functions, pool, &mut work) {
            Ok(done) => Ok(done),
            Err(error) => {
                log::debug!("recorded anew: {error:#}");
                make_room()?;
                Self::try_to_record(functions, pool, &mut work)
            }
        }
    }

    fn try_to_record<T>(
        functions: &'static Functions,
        pool: &mut GraphPool,
        work: &mut impl FnMut() -> Result<T>,
    ) -> Result<(CudaGraph, T)> {
        let mut recording = std::ptr::null_mut();
        // SAFETY: `begin` fills `recording` if it succeeds, and reads and writes the two numbers of `pool`.
        let begun = checked(unsafe { (functions.graph_begin)(pool.id.as_mut_ptr(), &mut recording) });
        pool.broken |= begun.is_err();
        begun?;
        let graph = CudaGraph { functions, recording };
        // The recording must be ended, whether `work` fails or not.
        let done = caught(work);
        // SAFETY: the recording is live and has begun.
        let ended = checked(unsafe { (functions.graph_end)(recording) });
        pool.broken |= ended.is_err();
        let result = done?;
        ended?;
        Ok((graph, result))
    }

    pub fn replay(&self) -> Result<()> {
        // SAFETY: the recording is live and has ended.
        checked(unsafe { (self.functions.graph_replay)(self.recording) })
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // SAFETY: the recording is live, and is not used after this.
        unsafe { (self.functions.graph_free)(self.recording) }
    }
}
