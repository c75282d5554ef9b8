//! Ctrl-C and its kin: a command stops where it can save, or ends and leaves nothing half written.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::libtorch;
use crate::run::atomic;

/// Ends the process, and nothing half written stays.
fn end() -> ! {
    atomic::clear();
    libtorch::exit_at_once(130)
}

/// Has signals end a command that has nothing to save.
pub fn end_on_signals() -> Result<()> {
    on_signals(|| end())
}

/// Set by the first signal, which says `message`; the second ends the process.
pub fn stop_flag(message: &'static str) -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    on_signals(move || {
        if flag.swap(true, Ordering::Relaxed) {
            end();
        }
        eprintln!("\n{message}; once more to stop at once");
    })?;
    Ok(stop)
}

/// Calls `handler` for SIGINT, SIGTERM and SIGHUP, but for those that whoever started the process has it ignore, as `nohup` does.
fn on_signals(handler: impl Fn() + Send + 'static) -> Result<()> {
    let heeded = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| ignored() >> (signal - 1) & 1 == 0);
    let mut signals = Signals::new(heeded).context("signals cannot be handled")?;
    std::thread::spawn(move || signals.forever().for_each(|_| handler()));
    Ok(())
}

/// A bit a signal, from the lowest; none where the system does not tell.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
