//! Device work on a stream of its own, beside the work that the thread's stream does meanwhile.

use std::ffi::c_char;

use anyhow::Result;
use tch::Device;

use super::checked;

#[repr(C)]
struct Stream {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    fn pt_beside_new(device: i8, out: *mut *mut Stream) -> *mut c_char;
    fn pt_beside_begin(stream: *mut Stream) -> *mut c_char;
    fn pt_beside_end(stream: *mut Stream) -> *mut c_char;
    fn pt_beside_join(stream: *mut Stream) -> *mut c_char;
}

/// Work beside the thread's stream, which waits for it at the latest when this is dropped. Until then nothing may be
/// dropped or changed that the work reads; null on the CPU, where it is done.
#[must_use]
pub struct Beside(*mut Stream);

impl Beside {
    /// Beside the thread's current stream, without work so far.
    pub fn new(device: Device) -> Result<Beside> {
        let mut beside = Beside(std::ptr::null_mut());
        if let Device::Cuda(index) = device {
            // SAFETY: fills one pointer.
            checked(unsafe { pt_beside_new(index as i8, &mut beside.0) })?;
        }
        Ok(beside)
    }

    /// Queues `work` after the work before and what the thread's stream has been given, and beside what it is given from
    /// now on.
    pub fn run<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.0.is_null() {
            return work();
        }
        // SAFETY: the stream is live.
        checked(unsafe { pt_beside_begin(self.0) })?;
        let done = work();
        // SAFETY: the stream is live.
        checked(unsafe { pt_beside_end(self.0) })?;
        done
    }

    /// From here on the thread's stream waits for the work.
    pub fn join(mut self) -> Result<()> {
        self.wait()
    }

    fn wait(&mut self) -> Result<()> {
        let stream = std::mem::replace(&mut self.0, std::ptr::null_mut());
        if stream.is_null() {
            return Ok(());
        }
        // SAFETY: the stream is live, and not used after this.
        checked(unsafe { pt_beside_join(stream) })
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if let Err(error) = self.wait() {
            log::debug!("{error:#}");
        }
    }
}
