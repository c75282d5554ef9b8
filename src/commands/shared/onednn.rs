//! Which LSTM kernels a run takes on the CPU: oneDNN's, or libtorch's own that go step by step. Measured when a run starts.

use std::time::{Duration, Instant};

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

/// Each way is timed so many times at least, and for so long, of which the fastest counts: a moment in which other work has the
/// machine is not to decide for a whole run.
const ROUNDS: usize = 5;
const MEASURED: Duration = Duration::from_millis(150);

/// Chooses, and returns whether oneDNN's are taken. Says so where 16-bit numbers are no gain on this processor.
pub fn choose(model: &mut Model, config: &TrainingConfig) -> bool {
    if model.parameters.device() != Device::Cpu {
        return true;
    }
    if let Some(onednn) = config.onednn {
        use_onednn(onednn);
        return onednn;
    }
    let rows = (config.batch_size.min(MOST_ROWS) / workers()).max(1) as i64;
    let once = |model: &Model| {
        let started = Instant::now();
        model.exercise_trunk(rows, N_TOKENS);
        started.elapsed().as_secs_f64()
    };
    // In turn, so that what else the machine does weighs on both.
    let in_turn = |model: &mut Model, one: &dyn Fn(&mut Model), other: &dyn Fn(&mut Model)| {
        let (mut least, mut n, began) = ([f64::INFINITY; 2], 0, Instant::now());
        while n < ROUNDS || began.elapsed() < MEASURED {
            for (way, least) in [one, other].into_iter().zip(&mut least) {
                way(model);
                *least = least.min(once(model));
            }
            n += 1;
        }
        least
    };
    let onednn = match config.precision {
        Precision::Float32 => {
            let [with, without] = in_turn(model, &|_| use_onednn(true), &|_| use_onednn(false));
            log::debug!("trunk, forward and backward: oneDNN {with:.4} s, step by step {without:.4} s");
            let onednn = with < MARGIN * without;
            if !onednn {
                let times = with / without;
                log::info!("LSTM layers are computed step by step, measured as {times:.1} times as fast as oneDNN's");
            }
            onednn
        }
        // libtorch's own would take many times as long.
        precision => {
            let [half, float] = in_turn(model, &|model| model.set_precision(precision), &|model| {
                model.set_precision(Precision::Float32)
            });
            model.set_precision(precision);
            if half > float {
                let times = half / float;
                log::warn!("on this processor a bfloat16 trunk takes {times:.1} times as long as a float32 one");
            }
            true
        }
    };
    use_onednn(onednn);
    onednn
}
