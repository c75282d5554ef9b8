//! The norm of each task's gradient at what its heads read of the trunk: by operators, or by the kernels of
//! `src/libtorch/weighting.cu`.
//!
//! T tasks, K tensors, one or more per task.

use anyhow::Result;
use tch::{Kind, Tensor};

use crate::libtorch::{Kernel, LISTED, LaunchConfig, Listed, norms_of, sources};

static SQUARES: Kernel = Kernel::new(sources::WEIGHTING, "squares_of");
static BY_TASK: Kernel = Kernel::new(sources::WEIGHTING, "squares_by_task");

/// Blocks per tensor, and threads per block.
const PARTS: usize = 32;
const BLOCK: usize = 256;

/// Squared 2-norms of the tasks' gradients, `[T]` float64, 0 for tasks without a tensor. `gradients` are those of
/// w_i L_i, `tasks` the task of each, and `weights` `[T]` float32 the w_i.
pub fn squared_norms(gradients: &[Tensor], tasks: &[usize], weights: &Tensor) -> Result<Tensor> {
    let fits = gradients.len() <= LISTED / 2 && gradients.iter().all(|x| x.kind() == Kind::Float);
    let serve = |kernel: &Kernel| kernel.serves(weights.device());
    match fits && weights.numel() <= BLOCK && serve(&SQUARES) && serve(&BY_TASK) {
        true => by_kernels(gradients, tasks, weights),
        false => by_operators(gradients, tasks, weights),
    }
}

fn by_operators(gradients: &[Tensor], tasks: &[usize], weights: &Tensor) -> Result<Tensor> {
    let squares = norms_of(&gradients.iter().collect::<Vec<_>>())?.to_kind(Kind::Double).square(); // [K]
    let of_task = |task: usize| {
        let own = tasks.iter().enumerate().filter(|(_, own)| **own == task).map(|(k, _)| squares.get(k as i64));
        own.reduce(|a, b| a + b).unwrap_or_else(|| Tensor::zeros([], (Kind::Double, weights.device())))
    };
    Ok(Tensor::stack(&(0..weights.numel()).map(of_task).collect::<Vec<_>>(), 0)
        / weights.to_kind(Kind::Double).square())
}

fn by_kernels(gradients: &[Tensor], tasks: &[usize], weights: &Tensor) -> Result<Tensor> {
    // Any order of memory will do, but each element must lie there once: the gradient of a mean is an expanded tensor.
    let lies = |x: &Tensor| x.is_contiguous() || (x.dim() == 3 && x.transpose(0, 1).is_contiguous());
    let dense = |x: &Tensor| if lies(x) { x.shallow_clone() } else { x.contiguous() };
    let gradients: Vec<Tensor> = gradients.iter().map(dense).collect();
    let pairs = gradients.iter().flat_map(|x| [x.data_ptr() as i64, x.numel() as i64]).collect::<Vec<_>>();
    let tasks = tasks.iter().map(|&task| task as i64).collect::<Vec<_>>();
    let (n, double) = (gradients.len(), (Kind::Double, weights.device()));
    let (parts, squares) = (Tensor::empty([n as i64, PARTS as i64], double), Tensor::empty(weights.size(), double));
    let shape = LaunchConfig { grid: [PARTS, n], block: [BLOCK, 1], shared: BLOCK * size_of::<f64>() };
    SQUARES.launch_with(shape, &[&parts], &[], Some(&Listed::new(&pairs)?))?;
    let shape = LaunchConfig { grid: [1, 1], block: [weights.numel().next_multiple_of(32), 1], shared: 0 };
    let numbers = [weights.numel() as i64, n as i64, PARTS as i64];
    BY_TASK.launch_with(shape, &[&parts, weights, &squares], &numbers, Some(&Listed::new(&tasks)?))?;
    Ok(squares)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn kernels_compute_what_operators_do() {
        tch::manual_seed(6);
        let random = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu));
        let of_mean = random(&[3, 1, 4]).expand([3, 6, 4], false);
        let gradients = [random(&[3, 5, 40]), random(&[7, 2, 3]).transpose(0, 1), of_mean];
        let weights = Tensor::from_slice(&[0.5f32, 2.0, 1.0]);
        for tasks in [[0, 1, 2], [0, 0, 2]] {
            let (ours, theirs) = (by_kernels(&gradients, &tasks, &weights), by_operators(&gradients, &tasks, &weights));
            let (ours, theirs) = (ours.unwrap(), theirs.unwrap());
            assert_eq!([ours.kind(), theirs.kind()], [Kind::Double; 2]);
            assert!(ours.allclose(&theirs, 1e-5, 1e-6, false), "{tasks:?}");
        }
    }
}
