//! Times the trunk's LSTM layers on the CPU, with oneDNN and with libtorch's own code, which loops over time steps.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::libtorch::{use_onednn, workers};
use crate::model::Model;
use crate::train::TrainingConfig;

/// Maximum rows, and tokens per row, of the timed batch; `batch_size` may exceed the number of rows in the data.
const MOST_ROWS: usize = 1024;
const N_TOKENS: i64 = 8;

/// Minimum number of alternating rounds, and minimum total time; the fastest round counts.
const ROUNDS: usize = 5;
const MEASURED: Duration = Duration::from_millis(150);

/// Milliseconds of a forward and backward pass over one worker's part of a batch.
#[derive(Serialize)]
pub struct LstmTimes {
    pub onednn_ms: f64,
    pub step_by_step_ms: f64,
}

pub fn measure(model: &Model, config: &TrainingConfig) -> LstmTimes {
    let rows = (config.batch_size.min(MOST_ROWS) / workers()).max(1) as i64;
    let (mut least, mut n, began) = ([f64::INFINITY; 2], 0, Instant::now());
    while n < ROUNDS || began.elapsed() < MEASURED {
        for (onednn, least) in [true, false].into_iter().zip(&mut least) {
            use_onednn(onednn);
            let started = Instant::now();
            model.exercise_trunk(rows, N_TOKENS);
            *least = least.min(1000.0 * started.elapsed().as_secs_f64());
        }
        n += 1;
    }
    use_onednn(config.onednn);
    LstmTimes { onednn_ms: least[0], step_by_step_ms: least[1] }
}
