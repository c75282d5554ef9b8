//! Ctrl-C and its kin: a command stops where it can save, or ends and leaves nothing half written.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

use crate::libtorch;
use crate::run::atomic;

/// What a signal sets, and says then; without it the process ends.
static STOP: Mutex<Option<(Arc<AtomicBool>, &str)>> = Mutex::new(None);

/// Set by the next signal, which says `message`; the one after it ends the process.
pub fn stop_flag(message: &'static str) -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    *STOP.lock().unwrap_or_else(PoisonError::into_inner) = Some((stop.clone(), message));
    stop
}

/// Heeds SIGINT, SIGTERM and SIGHUP, but for those that whoever started the process has it ignore, as `nohup` does.
///
/// To be called before there are other threads. All have signals blocked, and one thread waits for them: while oneDNN's matrix
/// products run, the stack pointer is inside a buffer on the heap, below which a signal handler would write its frame.
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

/// A bit a signal, from the lowest; none where the system does not tell.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
