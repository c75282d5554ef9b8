//! Mean cross-entropy: by tensor operators, or together with its gradient by the kernels of
//! `src/libtorch/cross_entropy.cu`.
//!
//! loss = 1/n sum over labelled rows of w_y ((1 - e) (-log p_y) + e/C sum_c (-log p_c)), p = softmax(x)
//! d loss / d x_c = w_y (p_c - (1 - e) [c = y] - e/C) / n
//!
//! N rows, C classes, n labels, e the label smoothing (Szegedy 2016, section 7), w the class weights (1 in the
//! kernels).

use anyhow::Result;
use tch::{Kind, Reduction, Tensor};

use crate::data::Targets;
use crate::data::labels::NO_LABEL;
use crate::libtorch::{Kernel, LaunchConfig, sources, with_gradients};
use crate::model::Mode;

/// The loss of `logits` [N, C] with labels `[N]` (-1 is ignored), `targets.n_decisions` of which count: a scalar with a
/// gradient. Label smoothing and class weights apply only in training.
pub(super) fn cross_entropy(
    logits: &Tensor,
    labels: &Tensor,
    targets: &Targets,
    (smoothing, mode): (f64, Mode),
) -> Tensor {
    let n = targets.n_decisions;
    let (smoothing, weights) = match mode.training() {
        true => (smoothing, targets.class_weights.as_ref()),
        false => (0.0, None),
    };
    if weights.is_some() || !serve(logits) {
        return by_operators(logits, labels, n, smoothing, weights);
    }
    tch::no_grad(|| by_kernels(logits, labels, n, smoothing))
        .and_then(|(loss, to_logits)| with_gradients(&loss, &[(logits, &to_logits)]))
        .expect("invariant: the shapes are those of the head")
}

fn by_operators(
    logits: &Tensor,
    labels: &Tensor,
    n_decisions: i64,
    smoothing: f64,
    class_weights: Option<&Tensor>,
) -> Tensor {
    let (none, ignored) = (None::<&Tensor>, NO_LABEL.into());
    let mean = |losses: Tensor| {
        let losses = match class_weights {
            Some(weights) => losses * weights.index_select(0, &labels.clamp_min(0)),
            None => losses,
        };
        losses.sum(logits.kind()) / n_decisions as f64
    };
    // Per row, then summed: libtorch's mean reduction runs in a single thread block on CUDA.
    let plain = mean(logits.cross_entropy_loss(labels, none, Reduction::None, ignored, 0.0));
    if smoothing == 0.0 {
        return plain;
    }
    // libtorch's own label smoothing waits for the device.
    let spread = -logits.log_softmax(-1, logits.kind()).mean_dim([-1].as_slice(), false, logits.kind()); // [N]
    plain * (1.0 - smoothing) + mean(spread * labels.ne(ignored)) * smoothing
}

static ROWS: Kernel = Kernel::new(sources::CROSS_ENTROPY, "cross_entropy_rows");
static SUM: Kernel = Kernel::new(sources::CROSS_ENTROPY, "cross_entropy_sum");

fn serve(logits: &Tensor) -> bool {
    let fits = logits.kind() == Kind::Float && logits.numel() > 0;
    fits && ROWS.serves(logits.device()) && SUM.serves(logits.device())
}

/// The loss, and its gradient with respect to `logits` [N, C].
fn by_kernels(logits: &Tensor, labels: &Tensor, n_decisions: i64, smoothing: f64) -> Result<(Tensor, Tensor)> {
    let (logits, labels) = (logits.contiguous(), labels.contiguous());
    let (rows, classes) = logits.size2()?;
    let float = |size: &[i64]| Tensor::empty(size, (Kind::Float, logits.device()));
    let (to_logits, losses, loss) = (float(&[rows, classes]), float(&[rows]), float(&[]));
    let across = (classes as usize).next_power_of_two().clamp(32, 128);
    ROWS.launch(
        LaunchConfig { grid: [rows as usize, 1], block: [across, 1], shared: 2 * across * size_of::<f64>() },
        &[&logits, &labels, &to_logits, &losses],
        &[classes, n_decisions, i64::from((smoothing as f32).to_bits() as i32)],
    )?;
    let across = (rows as usize).next_power_of_two().clamp(32, 1024);
    SUM.launch(
        LaunchConfig { grid: [1, 1], block: [across, 1], shared: across * size_of::<f64>() },
        &[&losses, &loss],
        &[rows, n_decisions],
    )?;
    Ok((loss, to_logits))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::libtorch::Draws;

    const TRAIN: Mode = Mode::Train(Draws::new(1));

    #[test]
    fn smoothed_losses_are_libtorch_s() {
        tch::manual_seed(1);
        let logits = Tensor::randn([5, 4], (Kind::Float, Device::Cpu));
        let labels = Tensor::from_slice(&[0i64, 3, -1, 2, 2]);
        let near = |a: &Tensor, b: &Tensor| (a - b).abs().double_value(&[]) < 1e-6;
        for (smoothing, mode, expected) in [(0.1, TRAIN, 0.1), (0.0, TRAIN, 0.0), (0.1, Mode::Eval, 0.0)] {
            let ours = cross_entropy(&logits, &labels, &targets(4, None), (smoothing, mode));
            let theirs = logits.cross_entropy_loss(&labels, None::<&Tensor>, Reduction::Mean, -1, expected);
            assert!(near(&ours, &theirs), "{smoothing} {mode:?}");
        }
        let weights = Tensor::from_slice(&[0.5f32, 1.0, 2.0, 4.0]);
        let weighted = |mode| cross_entropy(&logits, &labels, &targets(4, Some(&weights)), (0.0, mode));
        let theirs = logits.cross_entropy_loss(&labels, Some(&weights), Reduction::Sum, -1, 0.0) / 4.0;
        assert!(near(&weighted(TRAIN), &theirs));
        let plain = logits.cross_entropy_loss(&labels, None::<&Tensor>, Reduction::Mean, -1, 0.0);
        assert!(near(&weighted(Mode::Eval), &plain), "a loss that is told is of the labels as they are");
    }

    fn targets(n_decisions: i64, class_weights: Option<&Tensor>) -> Targets {
        let (index, labels) = (Tensor::new(), Tensor::new());
        let class_weights = class_weights.map(Tensor::shallow_clone);
        Targets { rows: Vec::new(), first_row: 0, index, labels, n_decisions, class_weights }
    }

    #[test]
    fn kernels_compute_what_operators_do() {
        tch::manual_seed(2);
        // One row; more rows than a block has threads; more classes than that; one class; no label at all.
        let settings = [(1i64, 3i64, 1i64), (300, 5, 70), (7, 150, 5), (4, 1, 4), (5, 6, 0)];
        for ((rows, classes, labelled), smoothing) in settings.into_iter().flat_map(|s| [(s, 0.0), (s, 0.1)]) {
            for scale in [1.0, 80.0] {
                let logits = Tensor::randn([rows, classes], (Kind::Float, Device::Cpu)) * scale;
                let logits = logits.set_requires_grad(true);
                let labels = Tensor::randint(classes, [rows], (Kind::Int64, Device::Cpu));
                let on = Tensor::randperm(rows, (Kind::Int64, Device::Cpu)).lt(labelled);
                let labels = labels.where_self(&on, &labels.full_like(i64::from(NO_LABEL)));
                let n = labelled.max(1);
                let theirs = by_operators(&logits, &labels, n, smoothing, None);
                let gradient = Tensor::run_backward(&[&theirs], &[&logits], false, false).swap_remove(0);
                let (ours, to_logits) = tch::no_grad(|| by_kernels(&logits, &labels, n, smoothing)).unwrap();
                // float32 has 24 significant bits, for logits up to 300.
                let what = format!("{rows} x {classes}, {labelled} labels, {smoothing}, {scale}");
                assert!(ours.allclose(&theirs, 1e-6, 1e-6, false), "loss of {what}");
                assert!(to_logits.allclose(&gradient, 1e-5, 1e-6 / n as f64, false), "gradient of {what}");
            }
        }
    }
}
