//! The shared library that needs CUDA: C++ files of this folder, embedded in the program, opened when a GPU is used.

use std::ffi::{c_char, c_void};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};
use nix::sys::memfd::{MFdFlags, memfd_create};
use torch_sys::C_tensor;

/// `graph.cpp`, `kernels.cpp` and `functions.cpp` as a shared library; empty if the program was built without CUDA's headers.
static LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libpolytask_cuda.so"));

#[repr(C)]
pub struct Recording {
    _opaque: [u8; 0],
}

type Launch = unsafe extern "C" fn(
    *mut c_void,
    *const u32,
    *const u32,
    u32,
    usize,
    *const *mut C_tensor,
    usize,
    *const i32,
    *const c_void,
) -> *mut c_char;

type MaxPool =
    unsafe extern "C" fn(*mut c_void, *mut c_void, *mut C_tensor, *mut C_tensor, *mut *mut C_tensor) -> *mut c_char;

type NarrowLinear = unsafe extern "C" fn(
    *mut c_void,
    *mut c_void,
    *mut C_tensor,
    *mut C_tensor,
    *mut C_tensor,
    *mut *mut C_tensor,
) -> *mut c_char;

type Dropout = unsafe extern "C" fn(
    *mut c_void,
    *mut C_tensor,
    *mut C_tensor,
    usize,
    *const i64,
    *mut *mut C_tensor,
) -> *mut c_char;

type ByteConvolution = unsafe extern "C" fn(
    *const *mut c_void,
    *mut C_tensor,
    *mut C_tensor,
    *mut C_tensor,
    *mut *mut C_tensor,
) -> *mut c_char;

/// The library's functions, with the types of the C++ files.
pub struct Functions {
    pub graph_begin: Symbol<unsafe extern "C" fn(*mut u64, *mut *mut Recording) -> *mut c_char>,
    pub graph_end: Symbol<unsafe extern "C" fn(*mut Recording) -> *mut c_char>,
    pub graph_replay: Symbol<unsafe extern "C" fn(*mut Recording) -> *mut c_char>,
    pub graph_free: Symbol<unsafe extern "C" fn(*mut Recording)>,
    pub release_memory: Symbol<unsafe extern "C" fn() -> *mut c_char>,
    pub kernel_compile: Symbol<unsafe extern "C" fn(*const c_char, i32) -> *mut c_char>,
    pub kernel_find: Symbol<unsafe extern "C" fn(*const c_char, *const c_char, *mut *mut c_void) -> *mut c_char>,
    pub kernel_launch: Symbol<Launch>,
    pub max_pool: Symbol<MaxPool>,
    pub narrow_linear: Symbol<NarrowLinear>,
    pub dropout: Symbol<Dropout>,
    pub byte_convolution: Symbol<ByteConvolution>,
    pub peak_memory: Symbol<unsafe extern "C" fn(*mut i64) -> *mut c_char>,
}

static FUNCTIONS: OnceLock<Functions> = OnceLock::new();

/// Opens a shared library from memory. A file would need a folder that is not mounted `noexec`.
fn open(library: &[u8]) -> Result<Library> {
    let mut file = File::from(memfd_create(c"polytask", MFdFlags::MFD_CLOEXEC).context("no file in memory")?);
    file.write_all(library)?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    // SAFETY: the library is built from this project's sources, which have no initializers of their own.
    Ok(unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL)? })
}

/// Opens the library at the first call. libtorch's CUDA library must be open already.
pub fn functions() -> Result<&'static Functions> {
    if let Some(functions) = FUNCTIONS.get() {
        return Ok(functions);
    }
    ensure!(!LIBRARY.is_empty(), "this program was built without CUDA's headers; scripts/setup downloads them");
    let library = open(LIBRARY)?;
    // SAFETY: the functions have these types.
    let functions = unsafe {
        Functions {
            graph_begin: library.get(b"pt_graph_begin")?,
            graph_end: library.get(b"pt_graph_end")?,
            graph_replay: library.get(b"pt_graph_replay")?,
            graph_free: library.get(b"pt_graph_free")?,
            release_memory: library.get(b"pt_release_memory")?,
            kernel_compile: library.get(b"pt_kernel_compile")?,
            kernel_find: library.get(b"pt_kernel_find")?,
            kernel_launch: library.get(b"pt_kernel_launch")?,
            max_pool: library.get(b"pt_max_pool_cuda")?,
            narrow_linear: library.get(b"pt_narrow_linear")?,
            dropout: library.get(b"pt_dropout")?,
            byte_convolution: library.get(b"pt_byte_convolution_cuda")?,
            peak_memory: library.get(b"pt_peak_memory")?,
        }
    };
    // The functions are used for the life of the process.
    std::mem::forget(library);
    Ok(FUNCTIONS.get_or_init(|| functions))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_in_memory_can_be_opened() {
        let (library, _folder) = super::super::emulated::built("extern \"C\" int answer() { return 42; }").unwrap();
        let library = open(&std::fs::read(library).unwrap()).unwrap();
        // SAFETY: the function has this type.
        let answer: Symbol<unsafe extern "C" fn() -> i32> = unsafe { library.get(b"answer").unwrap() };
        // SAFETY: as above.
        assert_eq!(unsafe { answer() }, 42);
    }
}
