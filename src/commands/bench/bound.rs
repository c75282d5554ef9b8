//! A lower bound on the time of a training step on this device: the trunk's matrix products and, on CUDA, the latency
//! of its sequential time steps.
//!
//! CUDA: L T (t_f + t_b) + (F_rec + 3 F_in) / P, where t_f and t_b are the latencies of a time step forward and
//! backward, which hide the recurrent products of both passes. CPU: 3 (F_rec + F_in) / P. P is the throughput (FLOP/s)
//! of a product of square matrices in the trunk's data type, measured on all threads with the faster of libtorch's
//! libraries. Updates of embedding rows that a step does not read can be deferred and are not counted, nor are heads,
//! the character encoder and dropout.
//!
//! B sentences, T tokens, L layers, D directions, E input size of a layer, H hidden size;
//! F_in = sum over layers of 2 B T E 4 H D, F_rec = L 2 B T H 4 H D.

use std::time::Instant;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::libtorch::{side_by_side, workers};
use crate::model::TrunkConfig;

/// Seconds per time step, forward + backward, of cuDNN's LSTM on an H100, with its persistent and its standard kernels.
const PERSISTENT: f64 = 2.0e-6 + 3.1e-6;
const STANDARD: f64 = 9e-6 + 14e-6;

#[derive(Serialize)]
pub struct Bound {
    /// Floating-point operations per second of this device.
    pub flops_per_sec: f64,
    pub ms_per_step: f64,
}

/// The work that the bound is computed for.
pub struct Work<'a> {
    /// [B, T] of each batch.
    pub shapes: &'a [(i64, i64)],
    /// The steps that these batches make up.
    pub n_steps: usize,
    /// E of the first layer.
    pub inputs: i64,
    pub trunk: &'a TrunkConfig,
    pub kind: Kind,
}

impl Bound {
    pub fn new(work: &Work, device: Device) -> Bound {
        let flops_per_sec = rate(device, work.kind);
        let trunk = work.trunk;
        let (hidden, directions) = (trunk.hidden as f64, trunk.width() as f64 / trunk.hidden as f64);
        let inputs = (0..trunk.layers).map(|layer| if layer == 0 { work.inputs } else { trunk.width() } as f64);
        let inputs: f64 = inputs.sum();
        let chain = if trunk.hidden <= 128 { PERSISTENT } else { STANDARD };
        let seconds = |&(rows, tokens): &(i64, i64)| {
            let gates = 2.0 * (rows * tokens) as f64 * 4.0 * hidden * directions;
            let (f_in, f_rec) = (gates * inputs, gates * hidden * trunk.layers as f64);
            match device {
                Device::Cpu => 3.0 * (f_in + f_rec) / flops_per_sec,
                _ => (3.0 * f_in + f_rec) / flops_per_sec + (trunk.layers as f64) * tokens as f64 * chain,
            }
        };
        let ms_per_step = 1000.0 * work.shapes.iter().map(seconds).sum::<f64>() / work.n_steps as f64;
        Bound { flops_per_sec, ms_per_step }
    }
}

/// Floating-point operations per second, the best of a few tries.
fn rate(device: Device, kind: Kind) -> f64 {
    let n = if device == Device::Cpu { 1024 } else { 8192 };
    let square = Tensor::ones([n, n], (kind, device));
    let mut product = best(device, &|| drop(square.matmul(&square)));
    if (device, kind) == (Device::Cpu, Kind::Float) {
        // On processors that MKL does not recognise, oneDNN, which also runs the LSTM there, is over twice as fast.
        let square = square.to_mkldnn();
        product = product.min(best(device, &|| drop(square.mkldnn_linear(&square, None::<&Tensor>))));
    }
    2.0 * (n as f64).powi(3) * workers() as f64 / product
}

/// Seconds in which all workers do `work`, the best of a few tries.
fn best(device: Device, work: &dyn Fn()) -> f64 {
    let tries = (0..4).map(|_| {
        super::wait(device);
        let started = Instant::now();
        side_by_side(workers(), &|_| work());
        super::wait(device);
        started.elapsed().as_secs_f64()
    });
    tries.fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_grows_with_the_work() {
        let trunk = TrunkConfig { hidden: 64, ..TrunkConfig::default() };
        let of = |shapes: &[(i64, i64)]| {
            Bound::new(
                &Work { shapes, n_steps: shapes.len(), inputs: 32, trunk: &trunk, kind: Kind::Float },
                Device::Cpu,
            )
        };
        let (small, large) = (of(&[(4, 5)]), of(&[(40, 50)]));
        // Both directions: 3 * 2 * 20 * 4 * 64 * 2 * (32 + 64) operations.
        let expected = 3.0 * 2.0 * 20.0 * 4.0 * 64.0 * 2.0 * 96.0 / small.flops_per_sec * 1000.0;
        assert!((small.ms_per_step / expected - 1.0).abs() < 1e-9);
        assert!(large.ms_per_step > 2.0 * small.ms_per_step);
    }
}
