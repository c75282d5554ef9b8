//! An encoded set on the training device, and the batches gathered from it.
//!
//! B sentences, T tokens of the longest, W words of the longest, b sentences with a label for a task.

use std::ops::Range;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::encoded::{EncodedSet, TargetValues};
use super::labels::NO_LABEL;
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
        let max = host.iter().copied().max().unwrap_or(0);
        let tensor = upload(&host, device);
        Lengths { host, device: tensor, max }
    }

    /// The same lengths, the tensor shared.
    pub fn share(&self) -> Lengths {
        Lengths { host: self.host.clone(), device: self.device.shallow_clone(), max: self.max }
    }

    /// Whether no row is padded.
    pub fn even(&self) -> bool {
        self.host.iter().all(|&length| length == self.max)
    }

    /// True where a row has content, [B, max].
    pub fn mask(&self) -> Tensor {
        let positions = Tensor::arange(self.max, (Kind::Int64, self.device.device()));
        positions.unsqueeze(0).lt_tensor(&self.device.unsqueeze(1)) // [B, max]
    }

    /// Whether none of these rows is padded.
    pub fn even_at(&self, rows: &[usize]) -> bool {
        rows.iter().all(|&row| self.host[row] == self.max)
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
    /// All of it that is on the device, in an order that batches of one shape share.
    fn tensors(&self) -> Vec<&Tensor> {
        let mut all = vec![&self.token_ids, &self.lengths.device, &self.word_lengths.device];
        all.extend(self.bytes.iter().chain(&self.first_tokens));
        all.extend(self.targets.iter().flatten().flat_map(|targets| [&targets.index, &targets.labels]));
        all
    }

    /// A batch with memory of its own.
    pub fn copy(&self) -> Batch {
        let lengths = |lengths: &Lengths| Lengths { device: lengths.device.copy(), ..lengths.share() };
        let targets = |targets: &Targets| Targets {
            rows: targets.rows.clone(),
            first_row: targets.first_row,
            index: targets.index.copy(),
            labels: targets.labels.copy(),
            n_decisions: targets.n_decisions,
        };
        Batch {
            rows: self.rows.clone(),
            first_row: self.first_row,
            token_ids: self.token_ids.copy(),
            lengths: lengths(&self.lengths),
            bytes: self.bytes.as_ref().map(Tensor::copy),
            first_tokens: self.first_tokens.as_ref().map(Tensor::copy),
            word_lengths: lengths(&self.word_lengths),
            targets: self.targets.iter().map(|task| task.as_ref().map(targets)).collect(),
        }
    }

    /// Puts the numbers of another batch of the same shape into this one's memory.
    pub fn take_from(&mut self, other: &Batch) -> Result<()> {
        for (own, new) in self.tensors().into_iter().zip(other.tensors()) {
            own.shallow_clone().f_copy_(new)?;
        }
        (self.rows, self.first_row) = (other.rows.clone(), other.first_row);
        (self.lengths.host, self.word_lengths.host) = (other.lengths.host.clone(), other.word_lengths.host.clone());
        Ok(())
    }

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

/// An [`EncodedSet`] with its arrays on a device.
pub struct DeviceSet {
    pub set: EncodedSet,
    device: Device,
    padding: i64,
    token_ids: Tensor,
    first_tokens: Option<Tensor>,
    /// Forms [n_forms, max_bytes] of 16-bit integers, and the form of each token.
    spelling: Option<(Tensor, Tensor)>,
    targets: Vec<Tensor>,
}

impl DeviceSet {
    pub fn new(set: EncodedSet, padding: u32, device: Device) -> Self {
        let resident = |values: &[i32]| Tensor::from_slice(values).to_device(device);
        let targets = set.targets.iter().map(|target| match target {
            TargetValues::Classes(values) | TargetValues::Tags(values) => resident(values),
        });
        let spelling = set.spelling.as_ref().map(|spelling| {
            let forms = Tensor::from_slice(&spelling.bytes).view([-1, spelling.max_bytes as i64]);
            (forms.to_device(device), resident(&spelling.token_forms))
        });
        DeviceSet {
            spelling,
            token_ids: resident(&set.token_ids),
            first_tokens: set.first_tokens.as_deref().map(resident),
            targets: targets.collect(),
            padding: padding.into(),
            device,
            set,
        }
    }

    /// Gathers `rows` (at least one) on the device.
    pub fn batch(&self, rows: &[usize]) -> Batch {
        self.part(rows, 0..rows.len())
    }

    /// Gathers some of a batch's rows on the device.
    pub fn part(&self, whole: &[usize], range: Range<usize>) -> Batch {
        let (first_row, rows) = (range.start, &whole[range]);
        let lengths = Lengths::new(rows.iter().map(|&row| self.set.n_tokens(row)).collect(), self.device);
        let words = Lengths::new(rows.iter().map(|&row| self.set.n_words(row)).collect(), self.device);
        let token_starts = self.starts(&self.set.token_offsets, rows);
        let word_starts = self.starts(&self.set.word_offsets, rows);
        let targets = (0..self.targets.len()).map(|task| {
            let task = TaskId(task);
            let before = whole[..first_row].iter().filter(|&&row| self.set.labels(task, row).is_some());
            self.targets(task, (rows, before.count()), &words, &word_starts)
        });
        Batch {
            token_ids: gather(&self.token_ids, &token_starts, &lengths, self.padding),
            bytes: self.bytes(rows, &token_starts, &lengths),
            first_tokens: self.first_tokens.as_ref().map(|first| gather(first, &word_starts, &words, 0)),
            targets: targets.collect(),
            rows: rows.to_vec(),
            first_row,
            lengths,
            word_lengths: words,
        }
    }

    fn bytes(&self, rows: &[usize], token_starts: &Tensor, lengths: &Lengths) -> Option<Tensor> {
        let ((forms, token_forms), spelling) = (self.spelling.as_ref()?, self.set.spelling.as_ref()?);
        let tokens = rows.iter().flat_map(|&row| self.set.token_offsets[row]..self.set.token_offsets[row + 1]);
        let longest = tokens.map(|token| spelling.n_bytes(token as usize)).max().unwrap_or(0).max(1);
        // Few widths on CUDA, so that batches share the graph of a step.
        let longest = match self.device {
            Device::Cpu => longest,
            _ => longest.next_multiple_of(8).min(spelling.max_bytes),
        };
        let which = gather(token_forms, token_starts, lengths, 0); // [B, T]
        let bytes = forms.narrow(1, 0, longest as i64).index_select(0, &which.flatten(0, 1)).to_kind(Kind::Int64);
        let bytes = bytes.view([rows.len() as i64, lengths.max, longest as i64]);
        Some(match lengths.even() {
            true => bytes,
            false => bytes.masked_fill(&lengths.mask().logical_not().unsqueeze(-1), 0),
        })
    }

    fn starts(&self, offsets: &[i64], rows: &[usize]) -> Tensor {
        let starts: Vec<i64> = rows.iter().map(|&row| offsets[row]).collect();
        upload(&starts, self.device)
    }

    fn targets(
        &self,
        task: TaskId,
        (rows, first_row): (&[usize], usize),
        words: &Lengths,
        word_starts: &Tensor,
    ) -> Option<Targets> {
        let labelled: Vec<usize> = (0..rows.len()).filter(|&at| self.set.labels(task, rows[at]).is_some()).collect();
        if labelled.is_empty() {
            return None;
        }
        let at: Vec<i64> = labelled.iter().map(|&at| at as i64).collect();
        let index = upload(&at, self.device);
        let values = &self.targets[task.0];
        let (labels, n_decisions) = match &self.set.targets[task.0] {
            TargetValues::Classes(_) => {
                let at: Vec<i64> = labelled.iter().map(|&at| rows[at] as i64).collect();
                let labels = values.index_select(0, &upload(&at, self.device));
                (labels.to_kind(Kind::Int64), labelled.len() as i64) // [b]
            }
            TargetValues::Tags(_) => {
                let lengths = words.select(&labelled, &index);
                let starts = word_starts.index_select(0, &index);
                let n_decisions = lengths.host.iter().sum();
                (gather(values, &starts, &lengths, NO_LABEL.into()), n_decisions) // [b, W]
            }
        };
        Some(Targets { rows: labelled, first_row, index, labels, n_decisions })
    }
}

/// `flat[starts[b] + t]` where `t` is within row `b`, else `fill`: [B, max] of 64-bit integers.
fn gather(flat: &Tensor, starts: &Tensor, lengths: &Lengths, fill: i64) -> Tensor {
    let positions = Tensor::arange(lengths.max, (Kind::Int64, flat.device()));
    let index = starts.unsqueeze(1) + positions.unsqueeze(0); // [B, max]
    if lengths.even() {
        return flat.take(&index).to_kind(Kind::Int64);
    }
    let last = flat.size()[0] - 1;
    let values = flat.take(&index.clamp_max(last)).to_kind(Kind::Int64);
    values.masked_fill(&lengths.mask().logical_not(), fill)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Tokenizer;
    use crate::task::{Scheme, Task, TaskKind};

    fn set() -> EncodedSet {
        EncodedSet {
            token_ids: vec![5, 6, 7, 8, 9, 4],
            token_offsets: vec![0, 2, 5, 6],
            word_offsets: vec![0, 2, 4, 5],
            first_tokens: Some(vec![0, 1, 0, 2, 0]),
            spelling: None,
            targets: vec![
                TargetValues::Classes(vec![1, NO_LABEL, 0]),
                TargetValues::Tags(vec![NO_LABEL, NO_LABEL, 2, 3, 1]),
            ],
            set_starts: vec![0, 3],
            places: vec![],
        }
    }

    fn numbers(tensor: &Tensor) -> Vec<i64> {
        Vec::try_from(tensor.flatten(0, -1)).unwrap()
    }

    #[test]
    fn batches_gather_pad_and_know_who_is_labelled() {
        let set = DeviceSet::new(set(), 0, Device::Cpu);
        let batch = set.batch(&[2, 1, 0]);
        assert_eq!(numbers(&batch.token_ids), [4, 0, 0, 7, 8, 9, 5, 6, 0]);
        assert_eq!(numbers(batch.first_tokens.as_ref().unwrap()), [0, 0, 0, 2, 0, 1]);
        let class = batch.targets[0].as_ref().unwrap();
        assert_eq!((class.rows.clone(), numbers(&class.labels), class.n_decisions), (vec![0, 2], vec![0, 1], 2));
        let tags = batch.targets[1].as_ref().unwrap();
        assert_eq!((tags.rows.clone(), numbers(&tags.labels), tags.n_decisions), (vec![0, 1], vec![1, -1, 2, 3], 3));
        assert!(set.batch(&[0]).targets[1].is_none());
        assert_eq!(numbers(&set.batch(&[1]).token_ids), [7, 8, 9]);
    }

    #[test]
    fn words_without_labels_encode() {
        let tokenizer = Tokenizer::of_words(&["hi"]);
        let task = Task { name: "t".into(), kind: TaskKind::Tagging(Scheme::Bio), labels: vec!["O".into()] };
        let set = EncodedSet::of_words(&[vec!["hi", "you"], vec!["hi"]], &tokenizer, &[task]).unwrap();
        assert_eq!((set.token_ids.clone(), set.token_offsets.clone()), (vec![2, 1, 2], vec![0, 2, 3]));
        assert_eq!(set.labels(TaskId(0), 0), None);
    }
}
