//! Devices: CUDA's libraries opened at run time, and numbers copied to the device.

use std::ffi::c_char;

use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use super::checked;
use super::kernels::{Kernel, LaunchConfig, List};
use super::sources;

unsafe extern "C" {
    fn pt_upload(host: *mut C_tensor, device: i8, out: *mut *mut C_tensor) -> *mut c_char;
    fn pt_upload_into(host: *mut C_tensor, out: *mut C_tensor) -> *mut c_char;
    fn pt_use_cuda(device: i8) -> *mut c_char;
}

/// Opens libtorch's CUDA library, which registers its kernels. Call it before anything else uses CUDA.
fn open_cuda() -> Result<()> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    if std::env::var_os("CUBLAS_WORKSPACE_CONFIG").is_none() {
        // cuBLAS is deterministic with this or `:4096:8`, which made no step faster and took 64 MiB more.
        // SAFETY: no thread that reads the environment has been started yet.
        unsafe { std::env::set_var("CUBLAS_WORKSPACE_CONFIG", ":16:8") };
    }
    // SAFETY: the library's initializers are those of libtorch, made for being loaded into a running process.
    let library = unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) };
    // Its kernels are registered for the life of the process: it must never be closed.
    std::mem::forget(library.context("libtorch_cuda.so cannot be opened; scripts/setup --cuda downloads it")?);
    // NVRTC compiles the custom kernels; their library cannot find it by itself. Without it, operators are used.
    // SAFETY: as above.
    if let Ok(library) = unsafe { Library::open(Some("libcaffe2_nvrtc.so"), RTLD_NOW | RTLD_GLOBAL) } {
        std::mem::forget(library);
    }
    Ok(())
}

/// The device named by `wish`: `auto`, `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// An unknown name, or CUDA if its libraries, its driver or the device are missing. `auto` falls back to the CPU.
pub fn device(wish: &str) -> Result<Device> {
    let index = match wish {
        "cpu" => return Ok(Device::Cpu),
        "auto" if !std::path::Path::new("/dev/nvidiactl").exists() => return Ok(Device::Cpu),
        "auto" | "cuda" => 0,
        _ => match wish.strip_prefix("cuda:").map(str::parse) {
            Some(Ok(index)) => index,
            _ => bail!("unknown device `{wish}`: use auto, cpu, cuda or cuda:N"),
        },
    };
    let found = open_cuda().and_then(|()| {
        let count = tch::Cuda::device_count();
        ensure!(count > 0, "libtorch finds no NVIDIA GPU; is a driver installed that is new enough for CUDA 13?");
        ensure!((index as i64) < count, "there are {count} CUDA devices, numbered from 0");
        // SAFETY: takes a plain value.
        checked(unsafe { pt_use_cuda(index as i8) })?;
        Ok(Device::Cuda(index))
    });
    match found {
        Err(error) if wish == "auto" => {
            log::warn!("running on the CPU: {error:#}");
            Ok(Device::Cpu)
        }
        other => other.with_context(|| format!("device `{wish}` cannot be used")),
    }
}

/// Copies `values` to a device, `[n]`. Neither the host nor a CUDA device waits for the copy.
pub fn upload<T: tch::kind::Element>(values: &[T], device: Device) -> Tensor {
    let host = Tensor::from_slice(values);
    let Device::Cuda(index) = device else { return host };
    let mut out = std::ptr::null_mut();
    // SAFETY: `host` is live; on success the shim hands over one new tensor in `out`.
    unsafe {
        checked(pt_upload(host.as_ptr().cast_mut(), index as i8, &mut out))
            .expect("invariant: the device was found when the program started");
        Tensor::from_ptr(out)
    }
}

static PUT: Kernel = Kernel::new(sources::PUT, "put");

/// The most numbers in one launch: its arguments take 4 KiB at most.
const ROOM: usize = 480;
/// The most launches that take less time than a copy.
const FEW: usize = 4;

/// Writes `values` into the memory of `out` `[n]`, which has the same length. Nothing waits for the write.
///
/// # Errors
/// A different number of values, or an `out` that is not int64.
pub fn upload_into(values: &[i64], out: &Tensor) -> Result<()> {
    ensure!(values.len() == out.numel() && out.kind() == Kind::Int64, "other numbers than those that were there");
    if values.len() <= FEW * ROOM && PUT.serves(out.device()) {
        return put(values, out);
    }
    let host = Tensor::from_slice(values);
    if out.device() == Device::Cpu {
        return Ok(out.shallow_clone().f_copy_(&host)?);
    }
    // SAFETY: both tensors are live.
    checked(unsafe { pt_upload_into(host.as_ptr().cast_mut(), out.as_ptr().cast_mut()) })
}

fn put(values: &[i64], out: &Tensor) -> Result<()> {
    let shape = LaunchConfig { grid: [1, 1], block: [ROOM, 1], shared: 0 };
    for (i, values) in values.chunks(ROOM).enumerate() {
        let n = values.len() as i64;
        let own = out.narrow(0, (i * ROOM) as i64, n);
        PUT.launch_with(shape, &[&own], &[n], Some(&List::<ROOM>::new(values)?))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_put_where_they_belong() {
        let values: Vec<i64> = (0..ROOM as i64 * 2 + 3).map(|i| i << 33).collect();
        let out = Tensor::zeros([values.len() as i64], (Kind::Int64, Device::Cpu));
        put(&values, &out).unwrap();
        assert_eq!(out, Tensor::from_slice(&values));
        assert!(upload_into(&values[1..], &out).is_err());
    }

    #[test]
    fn unknown_devices_are_named() {
        assert!(device("gpu").unwrap_err().to_string().contains("unknown device `gpu`"));
    }
}
