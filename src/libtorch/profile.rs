//! How long a device works, by libtorch's profiler.

use std::ffi::c_char;
use std::time::Duration;

use anyhow::Result;
use tch::Device;

use super::checked;

unsafe extern "C" {
    fn pt_profile_start(gpu: bool) -> *mut c_char;
    fn pt_profile_stop(gpu: bool, nanoseconds: *mut u64) -> *mut c_char;
}

/// Runs `work` and returns for how long of it at least one kernel or copy ran on the GPU; on the CPU, one of this
/// thread's operators. All kernels must have ended when `work` does.
///
/// # Errors
/// Those of `work`; a profiler that cannot be started, for example because another one is at work.
pub fn busy_time(device: Device, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let gpu = device != Device::Cpu;
    let mut nanoseconds = 0;
    // SAFETY: takes a plain value.
    checked(unsafe { pt_profile_start(gpu) })?;
    let done = work();
    // SAFETY: fills one number.
    let stopped = checked(unsafe { pt_profile_stop(gpu, &mut nanoseconds) });
    done.and(stopped)?;
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
        let busy = busy_time(Device::Cpu, || {
            for _ in 0..3 {
                let _ = x.matmul(&x);
                std::thread::sleep(pause);
            }
            Ok(())
        });
        let busy = busy.unwrap();
        assert!(!busy.is_zero() && busy <= started.elapsed() - 3 * pause, "{busy:?}");
    }
}
