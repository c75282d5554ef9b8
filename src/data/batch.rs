//! Batches: their plan on the host, and their tensors on the device.
//!
//! B sentences, T tokens of the longest, W words of the longest, L bytes per word, b sentences with a label for a task.

use tch::{Device, Kind, Tensor};

use crate::libtorch::upload;
use crate::task::TaskId;

/// Lengths of the rows of a batch, on the host and on the device.
#[derive(Debug)]
pub struct Lengths {
    pub host: Vec<i64>,
    /// `[B]`
    pub device: Tensor,
    pub max: i64,
}

impl Lengths {
    pub fn new(host: Vec<i64>, device: Device) -> Self {
        let tensor = upload(&host, device);
        Lengths::of(&host, tensor)
    }

    /// `device` `[B]` holds the same numbers.
    pub(super) fn of(host: &[i64], device: Tensor) -> Self {
        Lengths { host: host.to_vec(), device, max: host.iter().copied().max().unwrap_or(0) }
    }

    /// A copy that shares the device tensor.
    pub fn share(&self) -> Lengths {
        Lengths { host: self.host.clone(), device: self.device.shallow_clone(), max: self.max }
    }

    /// Whether no row is padded.
    pub fn is_unpadded(&self) -> bool {
        self.host.iter().all(|&length| length == self.max)
    }

    /// True where a row has content, [B, max].
    pub fn mask(&self) -> Tensor {
        let positions = Tensor::arange(self.max, (Kind::Int64, self.device.device()));
        positions.unsqueeze(0).lt_tensor(&self.device.unsqueeze(1)) // [B, max]
    }

    pub fn select(&self, rows: &[usize], index: &Tensor) -> Lengths {
        // The width stays that of the batch, so that tensors of selected rows keep their shape.
        let host = rows.iter().map(|&row| self.host[row]).collect();
        Lengths { host, device: self.device.index_select(0, index), max: self.max }
    }
}

/// The labels of one task in a batch.
#[derive(Debug)]
pub struct Targets {
    /// Positions in the batch of the rows with a label; `index` is the same on the device.
    pub rows: Vec<usize>,
    /// Number of labelled rows before these in the whole batch.
    pub first_row: usize,
    pub index: Tensor,
    /// `[b]` for classes; `[b, W]` for tags, with -1 beyond a sentence's end.
    pub labels: Tensor,
    /// Number of labelled sentences (classes) or words (tags).
    pub n_decisions: i64,
    /// Weight of each class in the training loss, `[C]`; `None` if all are equal.
    pub class_weights: Option<Tensor>,
}

/// Sentences to run through the model at once.
#[derive(Debug)]
pub struct Batch {
    /// Row numbers in the set.
    pub rows: Vec<usize>,
    /// Number of rows before these in the whole batch, of which this may be a part.
    pub first_row: usize,
    /// [B, T]
    pub token_ids: Tensor,
    /// Largest token id in the whole split.
    pub max_id: i64,
    pub lengths: Lengths,
    /// Bytes of each token's word, each plus 1, padded with 0, [B, T, L]; `None` if the split does not keep them.
    pub bytes: Option<Tensor>,
    /// Position of each word's first token, [B, W]; `None` where every word is one token.
    pub first_tokens: Option<Tensor>,
    pub word_lengths: Lengths,
    /// By [`TaskId`]; `None` for a task without a label in this batch.
    pub targets: Vec<Option<Targets>>,
}

impl Batch {
    /// The inputs of an exported model: token ids [B, T]; lengths `[B]`; for models that read characters, the bytes of
    /// words [B, T, L]; for subword tokens, the position of each word's first token [B, W] and word counts `[B]`.
    pub fn inputs(&self) -> Vec<Tensor> {
        let mut inputs = vec![self.token_ids.shallow_clone(), self.lengths.device.shallow_clone()];
        inputs.extend(self.bytes.as_ref().map(Tensor::shallow_clone));
        if let Some(first) = &self.first_tokens {
            inputs.extend([first.shallow_clone(), self.word_lengths.device.shallow_clone()]);
        }
        inputs
    }

    pub fn n_tokens(&self) -> i64 {
        self.lengths.host.iter().sum()
    }
}

/// The host's plan of a batch, by which the device gathers it.
pub struct BatchPlan {
    pub(super) rows: Vec<usize>,
    pub(super) first_row: usize,
    pub(super) lengths: Vec<i64>,
    pub(super) words: Vec<i64>,
    /// Bytes per word (L), padding included; `None` if the split does not keep them.
    pub(super) n_bytes: Option<i64>,
    pub(super) targets: Vec<Option<PlannedTargets>>,
}

/// [`Targets`] before they are gathered.
pub(super) struct PlannedTargets {
    pub(super) rows: Vec<usize>,
    pub(super) first_row: usize,
    pub(super) n_decisions: i64,
}

impl BatchPlan {
    pub fn n_tokens(&self) -> i64 {
        self.lengths.iter().sum()
    }

    /// Number of labelled sentences or words of a task.
    pub fn n_decisions(&self, task: TaskId) -> i64 {
        self.targets[task.0].as_ref().map_or(0, |targets| targets.n_decisions)
    }

    /// Equal for batches for which the device executes the same operations, so that they can share a CUDA graph.
    pub fn shape(&self) -> Vec<i64> {
        let mut shape = vec![self.rows.len() as i64, self.n_bytes.unwrap_or(0)];
        let even = |lengths: &[i64], rows: &[usize]| {
            let max = lengths.iter().max();
            i64::from(rows.iter().all(|&row| lengths.get(row) == max))
        };
        let all: Vec<usize> = (0..self.rows.len()).collect();
        for lengths in [&self.lengths, &self.words] {
            shape.extend([lengths.iter().copied().max().unwrap_or(0), even(lengths, &all)]);
        }
        for targets in &self.targets {
            shape.extend(targets.as_ref().map_or([0; 4], |targets| {
                // Heads treat padded and unpadded rows differently, and look only at their labelled rows.
                let [even_tokens, even_words] =
                    [&self.lengths, &self.words].map(|lengths| even(lengths, &targets.rows));
                [targets.rows.len() as i64, targets.n_decisions, even_tokens, even_words]
            }));
        }
        shape
    }
}
