//! The CRF loss on a GPU, in three kernel launches.

use anyhow::Result;
use tch::{Kind, Tensor};

use super::{Crf, Loss};
use crate::libtorch::{Kernel, LaunchConfig, sources};

static SCORES: Kernel = Kernel::new(sources::CRF, "crf_scores");
static SENTENCES: Kernel = Kernel::new(sources::CRF, "crf_sentences");
static BATCH: Kernel = Kernel::new(sources::CRF, "crf_batch");

/// Most threads per block. Two per tag go through a sentence.
const MOST: usize = 1024;

/// Whether the kernels can compute the loss of `x`.
pub fn serve(x: &Tensor) -> bool {
    let device = x.device();
    let fits = x.kind() == Kind::Float && x.size()[2] as usize <= MOST / 2 && x.numel() > 0;
    fits && [&SCORES, &SENTENCES, &BATCH].iter().all(|kernel| kernel.serves(device))
}

impl Crf {
    pub(super) fn loss_by_kernels(&self, x: &Tensor, labels: &Tensor) -> Result<Loss> {
        let [rows, words, tags] = x.size()[..].try_into()?;
        let new = |size: &[i64], kind: Kind| Tensor::empty(size, (kind, x.device()));
        let (double, float) = (|size: &[i64]| new(size, Kind::Double), |size: &[i64]| new(size, Kind::Float));
        let (n_rows, n_tags) = (rows as usize, tags as usize);

        let [scores, step, step_back] = [0; 3].map(|_| double(&[tags, tags]));
        let (starts, ends) = (double(&[tags]), double(&[tags]));
        let (pairs, first) = self.constraints.as_ref().map_or((&self.transitions, &self.start), |own| (&own.0, &own.1));
        SCORES.launch(
            LaunchConfig { grid: [(n_tags * n_tags).div_ceil(128), 1], block: [128, 1], shared: 0 },
            &[&self.transitions, &self.start, &self.end, pairs, first, &scores, &step, &step_back, &starts, &ends],
            &[tags, self.constraints.is_some().into()],
        )?;

        // In the order of x in memory: sentences first, or words.
        let words_first = !x.is_contiguous() && x.transpose(0, 1).is_contiguous();
        let memory = if words_first { x.transpose(0, 1) } else { x.contiguous() };
        let (to_memory, labels) = (float(&memory.size()), labels.contiguous());
        let strides = if words_first { [tags, rows * tags] } else { [words * tags, tags] };
        let [alphas, betas, left, right] = [0; 4].map(|_| double(&[rows, words, tags]));
        let (scales, losses) = (double(&[rows, words, 2]), double(&[rows]));
        let (pairs, lasts) = (new(&[rows, words], Kind::Int), new(&[rows], Kind::Int));
        let across = n_tags.next_multiple_of(32);
        SENTENCES.launch(
            LaunchConfig { grid: [n_rows, 1], block: [2 * across, 1], shared: 6 * across * size_of::<f64>() },
            &[
                &memory, &labels, &scores, &step, &step_back, &starts, &ends, &alphas, &betas, &left, &right, &scales,
                &to_memory, &pairs, &lasts, &losses,
            ],
            &[words, tags, strides[0], strides[1]],
        )?;

        let (to_transitions, to_start, to_end, value) =
            (float(&[tags, tags]), float(&[tags]), float(&[tags]), float(&[]));
        let down = (MOST / across).min(16);
        BATCH.launch(
            LaunchConfig { grid: [n_tags + 3, 1], block: [across, down], shared: across * down * size_of::<f64>() },
            &[&left, &right, &step, &pairs, &to_memory, &lasts, &losses, &to_transitions, &to_start, &to_end, &value],
            &[rows, words, tags, strides[0], strides[1]],
        )?;
        let to_x = if words_first { to_memory.transpose(0, 1) } else { to_memory };
        Ok(Loss { value, to_x, to_transitions, to_start, to_end })
    }
}
