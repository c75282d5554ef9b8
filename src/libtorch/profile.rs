//! What a device works on, and for how long, by libtorch's profiler.

use std::ffi::{CString, c_char};
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result};
use tch::Device;

use super::checked;

unsafe extern "C" {
    fn pt_profile_start(gpu: bool) -> *mut c_char;
    fn pt_profile_stop(gpu: bool, trace: *const c_char, nanoseconds: *mut u64) -> *mut c_char;
}

/// Runs `work` and returns for how long of it at least one kernel or copy ran on the GPU; on the CPU, one of this
/// thread's operators. All kernels must have ended when `work` does. Each of them is written to
/// `trace`, in Chrome's trace format.
///
/// # Errors
/// Those of `work`; a profiler that cannot be started, for example because another one is at work; a trace that cannot be
/// written.
pub fn busy_time(device: Device, trace: Option<&mut dyn Write>, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    // libtorch writes files alone.
    let folder = trace.is_some().then(tempfile::tempdir).transpose().context("a temporary folder for the trace")?;
    let file = folder.as_ref().map(|folder| folder.path().join("trace.json"));
    let path = file.as_ref().map(|file| CString::new(file.as_os_str().as_encoded_bytes())).transpose()?;
    let path_or_null = path.as_ref().map_or(std::ptr::null(), |path| path.as_ptr());
    let gpu = device != Device::Cpu;
    let mut nanoseconds = 0;
    // SAFETY: takes a plain value.
    checked(unsafe { pt_profile_start(gpu) })?;
    let done = work();
    // SAFETY: the path lives for the call, which fills one number.
    let stopped = checked(unsafe { pt_profile_stop(gpu, path_or_null, &mut nanoseconds) });
    done.and(stopped)?;
    if let (Some(trace), Some(file)) = (trace, file) {
        trace.write_all(&std::fs::read(file).context("libtorch wrote no trace")?)?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tch::{Kind, Tensor};

    use super::*;

    #[test]
    fn operators_are_timed_and_pauses_are_not() {
        let (started, pause) = (Instant::now(), Duration::from_millis(200));
        let x = Tensor::randn([300, 300], (Kind::Float, Device::Cpu));
        let mut trace = Vec::new();
        let busy = busy_time(Device::Cpu, Some(&mut trace), || {
            for _ in 0..3 {
                let _ = x.matmul(&x);
                std::thread::sleep(pause);
            }
            Ok(())
        });
        let busy = busy.unwrap();
        assert!(!busy.is_zero() && busy <= started.elapsed() - 3 * pause, "{busy:?}");
        let trace: serde_json::Value = serde_json::from_slice(&trace).unwrap();
        let products = trace["traceEvents"].as_array().unwrap().iter().filter(|event| event["name"] == "aten::matmul");
        assert_eq!(products.count(), 3);
    }
}
