//! CUDA graphs: what a stretch of code asks of the device, recorded once and replayed as one call.

use std::ffi::c_char;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, ensure};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};

use super::{checked, panic_text};

/// `graph.cpp` as a shared library; empty where the program was built without CUDA's headers.
static LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libpolytask_graph.so"));

#[repr(C)]
struct Recording {
    _opaque: [u8; 0],
}

struct Functions {
    begin: Symbol<unsafe extern "C" fn(*mut u64, *mut *mut Recording) -> *mut c_char>,
    end: Symbol<unsafe extern "C" fn(*mut Recording) -> *mut c_char>,
    replay: Symbol<unsafe extern "C" fn(*mut Recording) -> *mut c_char>,
    free: Symbol<unsafe extern "C" fn(*mut Recording)>,
}

static FUNCTIONS: OnceLock<Functions> = OnceLock::new();

/// Opens the library; libtorch's CUDA library has to be open already.
fn functions() -> Result<&'static Functions> {
    if let Some(functions) = FUNCTIONS.get() {
        return Ok(functions);
    }
    ensure!(!LIBRARY.is_empty(), "this program was built without CUDA's headers; scripts/setup fetches them");
    let mut file = tempfile::NamedTempFile::new().context("no temporary file")?;
    file.write_all(LIBRARY)?;
    // SAFETY: the library is ours; it has no initializers of its own. The functions have the types that graph.cpp gives them.
    let functions = unsafe {
        let library = Library::open(Some(file.path()), RTLD_NOW | RTLD_GLOBAL)?;
        let functions = Functions {
            begin: library.get(b"pt_graph_begin")?,
            end: library.get(b"pt_graph_end")?,
            replay: library.get(b"pt_graph_replay")?,
            free: library.get(b"pt_graph_free")?,
        };
        // The functions are used for the life of the process.
        std::mem::forget(library);
        functions
    };
    Ok(FUNCTIONS.get_or_init(|| functions))
}

/// The memory that the graphs of a training run share.
#[derive(Default)]
pub struct GraphPool([u64; 2]);

pub struct CudaGraph {
    functions: &'static Functions,
    recording: *mut Recording,
}

impl CudaGraph {
    /// Records what `work` asks of the device, without doing it; its tensors hold their results after [`Self::replay`].
    ///
    /// # Errors
    /// Whatever cannot be recorded: a wait for the device, memory from the host. Then nothing has happened.
    pub fn record<T>(pool: &mut GraphPool, work: impl FnOnce() -> Result<T>) -> Result<(CudaGraph, T)> {
        let functions = functions()?;
        let mut recording = std::ptr::null_mut();
        // SAFETY: `begin` fills `recording` where it returns null, and reads and writes two numbers of `pool`.
        checked(unsafe { (functions.begin)(pool.0.as_mut_ptr(), &mut recording) })?;
        let graph = CudaGraph { functions, recording };
        // tch's operators panic where libtorch throws, and a recording that has begun must end.
        let done = catch_unwind(AssertUnwindSafe(work));
        // SAFETY: the recording is live and has begun.
        let ended = checked(unsafe { (functions.end)(recording) });
        let result = done.map_err(|panic| anyhow!(panic_text(panic.as_ref())))??;
        ended?;
        Ok((graph, result))
    }

    pub fn replay(&self) -> Result<()> {
        // SAFETY: the recording is live and has ended.
        checked(unsafe { (self.functions.replay)(self.recording) })
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // SAFETY: the recording is live, and nobody uses it after this.
        unsafe { (self.functions.free)(self.recording) }
    }
}
