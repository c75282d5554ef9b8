//! Batches: as the host plans them, and on the device.
//!
//! B sentences, T tokens of the longest, W words of the longest, b sentences with a label for a task.

use tch::{Device, Kind, Tensor};

use crate::libtorch::upload;
use crate::task::TaskId;

/// Lengths of the rows of a batch, known to the host and on the device.
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

    /// The same lengths, the tensor shared.
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
    /// The rows of the batch that carry a label, and the same on the device.
    pub rows: Vec<usize>,
    /// How many labelled rows the whole batch has before these.
    pub first_row: usize,
    pub index: Tensor,
    /// `[b]` for classes, `[b, W]` for tags with -1 beyond a sentence's end.
    pub labels: Tensor,
    /// How many decisions are labelled: sentences, or words.
    pub n_decisions: i64,
    /// What each class counts in training, `[C]`, where not all count the same.
    pub class_weights: Option<Tensor>,
}

/// Sentences to run through the model at once.
#[derive(Debug)]
pub struct Batch {
    /// Row numbers in the set.
    pub rows: Vec<usize>,
    /// How many rows the whole batch has before these, where this is a part of one.
    pub first_row: usize,
    /// [B, T]
    pub token_ids: Tensor,
    /// The largest id of the whole set.
    pub max_id: i64,
    pub lengths: Lengths,
    /// The bytes of each token's word, each plus 1, with 0 beyond its end, [B, T, L]; where the set keeps them.
    pub bytes: Option<Tensor>,
    /// Position of each word's first token, [B, W]; `None` where every word is one token.
    pub first_tokens: Option<Tensor>,
    pub word_lengths: Lengths,
    /// By [`TaskId`]; `None` for a task without a label in this batch.
    pub targets: Vec<Option<Targets>>,
}

impl Batch {
    /// What an exported model reads: token ids [B, T], lengths `[B]`, for words with characters their bytes [B, T, L] and, for
    /// pieces of words, the position of each word's
    /// first token [B, W] and the number of words `[B]`.
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

/// A batch as the host knows it, before the device gathers it.
pub struct BatchPlan {
    pub(super) rows: Vec<usize>,
    pub(super) first_row: usize,
    pub(super) lengths: Vec<i64>,
    pub(super) words: Vec<i64>,
    /// Bytes of a token's word in the batch; where the set keeps them.
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

    /// Labels of a task.
    pub fn n_decisions(&self, task: TaskId) -> i64 {
        self.targets[task.0].as_ref().map_or(0, |targets| targets.n_decisions)
    }

    /// What two batches have in common for which the device does the same work.
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
                // Heads treat padded rows otherwise, and look at their own rows alone.
                let [even_tokens, even_words] =
                    [&self.lengths, &self.words].map(|lengths| even(lengths, &targets.rows));
                [targets.rows.len() as i64, targets.n_decisions, even_tokens, even_words]
            }));
        }
        shape
    }
}
