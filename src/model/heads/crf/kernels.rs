//! The CRF loss on a GPU, in two kernel launches.

use anyhow::Result;
use tch::{Kind, Tensor};

use super::{Crf, Loss};
use crate::libtorch::{Kernel, LaunchConfig};

const SOURCE: &str = include_str!("../../../libtorch/crf.cu");
static SENTENCES: Kernel = Kernel::new(SOURCE, "crf_sentences");
static BATCH: Kernel = Kernel::new(SOURCE, "crf_batch");

/// Most threads per block, and so most tags.
const MOST: usize = 1024;

/// Whether the kernels can compute the loss of `x`.
pub fn serve(x: &Tensor) -> bool {
    let device = x.device();
    let fits = x.kind() == Kind::Float && x.size()[2] as usize <= MOST && x.numel() > 0;
    fits && SENTENCES.serves(device) && BATCH.serves(device)
}

impl Crf {
    pub(super) fn loss_by_kernels(&self, x: &Tensor, labels: &Tensor) -> Result<Loss> {
        let (transitions, start, end) = self.scores();
        let step = transitions.exp();
        let step_back = step.tr().contiguous();
        let (x, labels) = (x.contiguous(), labels.contiguous());
        let [rows, words, tags] = x.size()[..].try_into()?;
        let new = |size: &[i64], kind: Kind| Tensor::empty(size, (kind, x.device()));
        let each = || new(&[rows, words, tags], Kind::Double);
        let (alphas, left, right, losses) = (each(), each(), each(), new(&[rows], Kind::Double));
        let (pairs, lasts) = (new(&[rows, words], Kind::Int), new(&[rows], Kind::Int));
        let to_x = new(&[rows, words, tags], Kind::Float);
        let (to_transitions, to_start) = (new(&[tags, tags], Kind::Float), new(&[tags], Kind::Float));
        let (to_end, value) = (new(&[tags], Kind::Float), new(&[], Kind::Float));
        let (n_rows, n_tags) = (rows as usize, tags as usize);

        let across = n_tags.next_multiple_of(32);
        SENTENCES.launch(
            LaunchConfig { grid: [n_rows, 1], block: [across, 1], shared: 3 * across * size_of::<f64>() },
            &[
                &x,
                &labels,
                &transitions,
                &step,
                &step_back,
                &start,
                &end,
                &alphas,
                &left,
                &right,
                &to_x,
                &pairs,
                &lasts,
                &losses,
            ],
            &[words, tags],
        )?;
        let down = (MOST / across).min(16);
        BATCH.launch(
            LaunchConfig { grid: [n_tags + 3, 1], block: [across, down], shared: across * down * size_of::<f64>() },
            &[&left, &right, &step, &pairs, &to_x, &lasts, &losses, &to_transitions, &to_start, &to_end, &value],
            &[rows, words, tags],
        )?;
        Ok(Loss { value, to_x, to_transitions, to_start, to_end })
    }
}
