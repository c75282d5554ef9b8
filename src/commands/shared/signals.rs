//! Ctrl-C and other termination signals: a command stops where it can save, or ends without leaving partial files.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

use crate::libtorch;
use crate::run::atomic;

/// The flag that a signal sets, and the message it prints; if `None`, a signal ends the process.
static STOP: Mutex<Option<(Arc<AtomicBool>, &str)>> = Mutex::new(None);

/// A flag that the next signal sets, printing `message`; the signal after that ends the process.
pub fn stop_flag(message: &'static str) -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    *STOP.lock().unwrap_or_else(PoisonError::into_inner) = Some((stop.clone(), message));
    stop
}

/// Handles SIGINT, SIGTERM and SIGHUP, except those that the process was started to ignore, as by `nohup`.
///
/// Must be called before other threads are started. All threads block the signals, and one waits for them: during
/// oneDNN's matrix products the stack pointer is inside a buffer on the heap, and a signal handler would write its
/// frame below it.
/// Child processes inherit the mask: those of this program listen themselves.
pub fn listen() -> Result<()> {
    let ignored = ignored();
    let all = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
    let heeded: SigSet = all.into_iter().filter(|&signal| ignored >> (signal as i32 - 1) & 1 == 0).collect();
    heeded.thread_block().context("signals cannot be blocked")?;
    std::thread::spawn(move || {
        while heeded.wait().is_ok() {
            heed();
        }
    });
    Ok(())
}

fn heed() {
    match &*STOP.lock().unwrap_or_else(PoisonError::into_inner) {
        Some((stop, message)) if !stop.swap(true, Ordering::Relaxed) => {
            eprintln!("\n{message}; interrupt again to stop immediately");
        }
        _ => {
            atomic::clear();
            libtorch::exit_at_once(130)
        }
    }
}

/// Ignored signals as a bit mask, bit 0 for signal 1; 0 if `/proc` does not give it.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
