//! Which LSTM kernels a run takes on the CPU: oneDNN's, or libtorch's own that go step by step. Measured when a run starts.

use std::time::Instant;

use tch::Device;

use crate::libtorch::{use_onednn, workers};
use crate::model::{Model, Precision};
use crate::train::TrainingConfig;

/// oneDNN's are taken unless the others are so many times faster, so that a run started again chooses the same.
const MARGIN: f64 = 1.25;

/// Tokens of the sentences that are timed.
const N_TOKENS: i64 = 8;

/// Sentences that are timed at most; a batch may be asked to hold more than there are.
const MOST_ROWS: usize = 1024;

/// Chooses, and returns whether oneDNN's are taken. Says so where 16-bit numbers are no gain on this processor.
pub fn choose(model: &mut Model, config: &TrainingConfig) -> bool {
    if model.parameters.device() != Device::Cpu {
        return true;
    }
    let rows = (config.batch_size.min(MOST_ROWS) / workers()).max(1) as i64;
    let once = |model: &Model| {
        let started = Instant::now();
        model.exercise_trunk(rows, N_TOKENS);
        started.elapsed().as_secs_f64()
    };
    let seconds = |model: &Model| (0..4).map(|_| once(model)).fold(f64::INFINITY, f64::min);
    let with_onednn = seconds(model);
    let onednn = match config.precision {
        Precision::Float32 => {
            use_onednn(false);
            let native = seconds(model);
            log::debug!("trunk, forward and backward: oneDNN {with_onednn:.4} s, step by step {native:.4} s");
            with_onednn < MARGIN * native
        }
        // libtorch's own would take many times as long.
        _ => {
            model.set_precision(Precision::Float32);
            let float32 = seconds(model);
            model.set_precision(config.precision);
            if with_onednn > float32 {
                let times = with_onednn / float32;
                log::warn!("on this processor a bfloat16 trunk takes {times:.1} times as long as a float32 one");
            }
            true
        }
    };
    use_onednn(onednn);
    onednn
}
