//! Kernels on the CPU, for tests without a GPU: their source, compiled as C++ with a header that stands in for CUDA.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::c_void;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW, Symbol};
use tch::Tensor;
use tempfile::TempDir;

use super::LaunchConfig;

/// Grid, block and the addresses of the arguments.
type Run = unsafe extern "C" fn(*const u32, *const u32, *const *mut c_void);

/// The compiled kernels, by source and name.
static KERNELS: Mutex<BTreeMap<(&str, &str), Symbol<Run>>> = Mutex::new(BTreeMap::new());

/// Compiles C++ into a shared library, in a folder that is deleted when its handle is dropped.
pub fn built(code: &str) -> Result<(PathBuf, TempDir)> {
    let folder = tempfile::tempdir()?;
    let (file, library) = (folder.path().join("code.cpp"), folder.path().join("code.so"));
    std::fs::write(&file, code)?;
    let compiler = std::env::var("CXX").unwrap_or("c++".to_owned());
    let mut command = Command::new(&compiler);
    command.args(["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-o"]).arg(&library).arg(&file);
    ensure!(command.status().context(compiler)?.success(), "the code does not compile");
    Ok((library, folder))
}

fn compile(source: &str, name: &str) -> Result<Symbol<Run>> {
    let header = include_str!("emulated.h");
    let run = "extern \"C\" void run(const uint32_t* grid, const uint32_t* block, void* const* arguments)";
    let code = format!("{header}\n{source}\n{run} {{ emulate({name}, grid, block, arguments); }}\n");
    let (library, _folder) = built(&code).with_context(|| format!("kernel {name}"))?;
    // SAFETY: the library was compiled here, and its function has this type.
    unsafe {
        let library = Library::open(Some(&library), RTLD_NOW | RTLD_LOCAL)?;
        let run = library.get(b"run")?;
        std::mem::forget(library);
        Ok(run)
    }
}

/// As [`super::Kernel::launch`], with tensors on the CPU. One launch at a time, since all share one block memory.
pub fn launch<const N: usize>(
    (source, name): (&'static str, &'static str),
    shape: LaunchConfig,
    tensors: &[&Tensor],
    numbers: &[i64],
    listed: Option<&super::kernels::List<N>>,
) -> Result<()> {
    ensure!(tensors.iter().all(|tensor| tensor.is_contiguous()), "a kernel needs contiguous tensors");
    ensure!(shape.shared <= 1 << 16, "a block has no {} bytes here", shape.shared);
    let mut kernels = KERNELS.lock().unwrap_or_else(PoisonError::into_inner);
    let run = match kernels.entry((source, name)) {
        Entry::Occupied(known) => known.into_mut(),
        Entry::Vacant(place) => place.insert(compile(source, name)?),
    };
    let [grid, block] = [shape.grid, shape.block].map(|pair| pair.map(|n| n as u32));
    let mut pointers: Vec<*mut c_void> = tensors.iter().map(|tensor| tensor.data_ptr()).collect();
    let mut numbers: Vec<i32> = numbers.iter().map(|&number| number as i32).collect();
    let of_tensors = pointers.iter_mut().map(|pointer| std::ptr::from_mut(pointer).cast());
    let of_numbers = numbers.iter_mut().map(|number| std::ptr::from_mut(number).cast());
    let list = listed.map(|list| std::ptr::from_ref(list).cast_mut().cast());
    let arguments: Vec<*mut c_void> = of_tensors.chain(of_numbers).chain(list).collect();
    // SAFETY: everything lives for the call; this project's kernels are called with the arguments that they declare.
    unsafe { run(grid.as_ptr(), block.as_ptr(), arguments.as_ptr()) };
    Ok(())
}
