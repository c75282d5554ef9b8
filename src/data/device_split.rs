//! An encoded split on the training device, from which batches are gathered.
//!
//! B sentences, T tokens of the longest, W words of the longest, b sentences with a label for a task.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::batch::{Batch, BatchPlan, Lengths, PlannedTargets, Targets};
use super::encoded::{EncodedSplit, TargetValues};
use super::labels::NO_LABEL;
use crate::libtorch::{Kernel, LaunchConfig, sources, upload};
use crate::task::TaskId;

/// An [`EncodedSplit`] with its arrays on a device.
pub struct DeviceSplit {
    pub set: EncodedSplit,
    device: Device,
    padding: i64,
    max_id: i64,
    token_ids: Tensor,
    first_tokens: Option<Tensor>,
    /// Bytes of each distinct word, [n_forms, max_bytes] of 16-bit integers, and the word index of each token.
    spelling: Option<(Tensor, Tensor)>,
    targets: Vec<Tensor>,
    /// By task; `None` if all classes have equal weight.
    class_weights: Vec<Option<Tensor>>,
}

impl DeviceSplit {
    pub fn new(set: EncodedSplit, padding: u32, device: Device) -> Self {
        let resident = |values: &[i32]| Tensor::from_slice(values).to_device(device);
        let targets = set.targets.iter().map(|target| match target {
            TargetValues::Classes(values) | TargetValues::Tags(values) => resident(values),
        });
        let spelling = set.spelling.as_ref().map(|spelling| {
            let forms = Tensor::from_slice(&spelling.bytes).view([-1, spelling.max_bytes as i64]);
            (forms.to_device(device), resident(&spelling.token_forms))
        });
        DeviceSplit {
            spelling,
            max_id: set.token_ids.iter().max().map_or(0, |&id| id.into()).max(padding.into()),
            token_ids: resident(&set.token_ids),
            first_tokens: set.first_tokens.as_deref().map(resident),
            targets: targets.collect(),
            class_weights: set.targets.iter().map(|_| None).collect(),
            padding: padding.into(),
            device,
            set,
        }
    }

    /// Weights each class of a task by N / (C n_c) in the training loss: N labels in this split, n_c of them of the
    /// class, C classes with labels.
    pub fn balance(&mut self, task: TaskId, n_labels: usize) {
        let (TargetValues::Classes(values) | TargetValues::Tags(values)) = &self.set.targets[task.0];
        let mut counts = vec![0u32; n_labels];
        for &label in values.iter().filter(|&&label| label != NO_LABEL) {
            counts[label as usize] += 1;
        }
        let n_classes = counts.iter().filter(|&&n| n > 0).count();
        let each = f64::from(counts.iter().sum::<u32>()) / n_classes.max(1) as f64;
        let weights: Vec<f32> = counts.iter().map(|&n| (each / f64::from(n.max(1))) as f32).collect();
        self.class_weights[task.0] = Some(Tensor::from_slice(&weights).to_device(self.device));
    }

    /// Gathers `rows` (at least one) on the device.
    pub fn batch(&self, rows: &[usize]) -> Batch {
        self.gathered(&self.plan(rows, 0..rows.len()))
    }

    /// Plans the rows `range` of the batch `whole`.
    pub fn plan(&self, whole: &[usize], range: Range<usize>) -> BatchPlan {
        let (first_row, rows) = (range.start, &whole[range]);
        let words: Vec<i64> = rows.iter().map(|&row| self.set.n_words(row)).collect();
        let targets = |task: usize| {
            let labelled = |rows: &[usize]| -> Vec<usize> {
                (0..rows.len()).filter(|&at| self.set.labels(TaskId(task), rows[at]).is_some()).collect()
            };
            let own = labelled(rows);
            let n_decisions = match &self.set.targets[task] {
                TargetValues::Classes(_) => own.len() as i64,
                TargetValues::Tags(_) => own.iter().map(|&at| words[at]).sum(),
            };
            let first_row = labelled(&whole[..first_row]).len();
            (!own.is_empty()).then_some(PlannedTargets { rows: own, first_row, n_decisions })
        };
        BatchPlan {
            lengths: rows.iter().map(|&row| self.set.n_tokens(row)).collect(),
            n_bytes: self.n_bytes(rows),
            targets: (0..self.targets.len()).map(targets).collect(),
            rows: rows.to_vec(),
            first_row,
            words,
        }
    }

    fn n_bytes(&self, rows: &[usize]) -> Option<i64> {
        let spelling = self.set.spelling.as_ref()?;
        let tokens = rows.iter().flat_map(|&row| self.set.token_offsets[row]..self.set.token_offsets[row + 1]);
        let longest = tokens.map(|token| spelling.n_bytes(token as usize)).max().unwrap_or(0).max(1);
        // Few distinct widths on CUDA, so that batches can share CUDA graphs.
        Some(match self.device {
            Device::Cpu => longest,
            _ => longest.next_multiple_of(8).min(spelling.max_bytes),
        } as i64)
    }

    /// All numbers that the device needs to gather a batch, in the order in which [`Self::gather`] reads them.
    pub fn numbers(&self, plan: &BatchPlan) -> Vec<i64> {
        let starts = |offsets: &[i64]| -> Vec<i64> { plan.rows.iter().map(|&row| offsets[row]).collect() };
        let word_starts = starts(&self.set.word_offsets);
        let mut numbers = starts(&self.set.token_offsets);
        numbers.extend_from_slice(&plan.lengths);
        numbers.extend_from_slice(&word_starts);
        numbers.extend_from_slice(&plan.words);
        for (targets, values) in plan.targets.iter().zip(&self.set.targets) {
            let Some(targets) = targets else { continue };
            let mut of = |value: &dyn Fn(usize) -> i64| numbers.extend(targets.rows.iter().map(|&at| value(at)));
            of(&|at| at as i64);
            match values {
                TargetValues::Classes(_) => {
                    of(&|at| plan.rows[at] as i64);
                    of(&|_| 1);
                }
                TargetValues::Tags(_) => {
                    of(&|at| word_starts[at]);
                    of(&|at| plan.words[at]);
                }
            }
        }
        numbers
    }

    pub fn gathered(&self, plan: &BatchPlan) -> Batch {
        self.gather(plan, &upload(&self.numbers(plan), self.device))
    }

    /// Gathers a batch on the device. Only shapes come from `plan`: every value that the device uses comes from
    /// `numbers`, so that a recorded CUDA graph can be replayed with those of another batch.
    pub fn gather(&self, plan: &BatchPlan, numbers: &Tensor) -> Batch {
        let mut at = 0;
        let mut next = |n: usize| {
            at += n as i64;
            numbers.narrow(0, at - n as i64, n as i64)
        };
        let n = plan.rows.len();
        let token_starts = next(n);
        let lengths = Lengths::of(&plan.lengths, next(n));
        let word_starts = next(n);
        let word_lengths = Lengths::of(&plan.words, next(n));
        let targets = plan.targets.iter().enumerate().map(|(task, targets)| {
            let PlannedTargets { rows, first_row, n_decisions } = targets.as_ref()?;
            let (index, starts) = (next(rows.len()), next(rows.len()));
            // A class is a row of width 1; tags are as wide as the batch.
            let tags = matches!(self.set.targets[task], TargetValues::Tags(_));
            let host = rows.iter().map(|&row| if tags { plan.words[row] } else { 1 }).collect();
            let own = Lengths { host, device: next(rows.len()), max: if tags { word_lengths.max } else { 1 } };
            let labels = gather(&self.targets[task], &starts, &own, NO_LABEL.into()); // [b, W]
            let labels = if tags { labels } else { labels.squeeze_dim(1) };
            let (rows, first_row, n_decisions) = (rows.clone(), *first_row, *n_decisions);
            let class_weights = self.class_weights[task].as_ref().map(Tensor::shallow_clone);
            Some(Targets { rows, first_row, index, labels, n_decisions, class_weights })
        });
        Batch {
            targets: targets.collect(),
            max_id: self.max_id,
            token_ids: gather(&self.token_ids, &token_starts, &lengths, self.padding),
            bytes: self.bytes(plan, &token_starts, &lengths),
            first_tokens: self.first_tokens.as_ref().map(|first| gather(first, &word_starts, &word_lengths, 0)),
            rows: plan.rows.clone(),
            first_row: plan.first_row,
            lengths,
            word_lengths,
        }
    }

    fn bytes(&self, plan: &BatchPlan, token_starts: &Tensor, lengths: &Lengths) -> Option<Tensor> {
        let ((forms, token_forms), n_bytes) = (self.spelling.as_ref()?, plan.n_bytes?);
        let which = gather(token_forms, token_starts, lengths, 0); // [B, T]
        let bytes = forms.narrow(1, 0, n_bytes).index_select(0, &which.flatten(0, 1)).to_kind(Kind::Int64);
        let bytes = bytes.view([plan.rows.len() as i64, lengths.max, n_bytes]);
        Some(match lengths.is_unpadded() {
            true => bytes,
            false => bytes.masked_fill(&lengths.mask().logical_not().unsqueeze(-1), 0),
        })
    }
}

static GATHER: Kernel = Kernel::new(sources::GATHER, "gather_rows");

/// `flat[starts[b] + t]` where `t` is within row `b`, else `fill`: [B, max] of 64-bit integers.
fn gather(flat: &Tensor, starts: &Tensor, lengths: &Lengths, fill: i64) -> Tensor {
    if lengths.max > 0 && GATHER.serves(flat.device()) {
        return gather_by_kernel(flat, starts, lengths, fill);
    }
    let positions = Tensor::arange(lengths.max, (Kind::Int64, flat.device()));
    let index = starts.unsqueeze(1) + positions.unsqueeze(0); // [B, max]
    if lengths.is_unpadded() {
        return flat.take(&index).to_kind(Kind::Int64);
    }
    let last = flat.size()[0] - 1;
    let values = flat.take(&index.clamp_max(last)).to_kind(Kind::Int64);
    values.masked_fill(&lengths.mask().logical_not(), fill)
}

fn gather_by_kernel(flat: &Tensor, starts: &Tensor, lengths: &Lengths, fill: i64) -> Tensor {
    let out = Tensor::empty([starts.size()[0], lengths.max], (Kind::Int64, flat.device()));
    let shape = LaunchConfig { grid: [out.numel().div_ceil(256), 1], block: [256, 1], shared: 0 };
    let numbers = [out.numel() as i64, lengths.max, fill];
    let done = GATHER.launch(shape, &[flat, starts, &lengths.device, &out], &numbers);
    done.expect("invariant: there is a row, and a kernel takes any number of them");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Tokenizer;
    use crate::task::{Scheme, Task, TaskKind};

    #[test]
    fn balanced_classes_count_the_same() {
        let mut set = DeviceSplit::new(set(), 0, Device::Cpu);
        // Rows 0 and 2 have classes 1 and 0; three words have tags 2, 3 and 1 of four.
        set.balance(TaskId(0), 2);
        set.balance(TaskId(1), 4);
        let batch = set.batch(&[1, 2]);
        let weights =
            |task: usize| batch.targets[task].as_ref().unwrap().class_weights.as_ref().unwrap().shallow_clone();
        assert_eq!(weights(0), Tensor::from_slice(&[1.0f32, 1.0]));
        assert_eq!(weights(1), Tensor::from_slice(&[1.0f32; 4]), "a tag that never comes is not missed");
    }

    #[test]
    fn the_kernel_gathers_what_operators_do() {
        let flat = Tensor::from_slice(&(0..500).collect::<Vec<i32>>());
        for lengths in [vec![3i64, 130, 1, 0], vec![1, 1, 1, 1]] {
            let starts = Tensor::from_slice(&[490i64, 7, 499, 0]);
            let lengths = Lengths::new(lengths, Device::Cpu);
            let ours = gather_by_kernel(&flat, &starts, &lengths, -1);
            assert_eq!(ours, gather(&flat, &starts, &lengths, -1));
        }
    }

    fn set() -> EncodedSplit {
        EncodedSplit {
            token_ids: vec![5, 6, 7, 8, 9, 4],
            token_offsets: vec![0, 2, 5, 6],
            word_offsets: vec![0, 2, 4, 5],
            first_tokens: Some(vec![0, 1, 0, 2, 0]),
            spelling: None,
            targets: vec![
                TargetValues::Classes(vec![1, NO_LABEL, 0]),
                TargetValues::Tags(vec![NO_LABEL, NO_LABEL, 2, 3, 1]),
            ],
            unseen: Default::default(),
            set_starts: vec![0, 3],
            places: vec![],
        }
    }

    fn numbers(tensor: &Tensor) -> Vec<i64> {
        Vec::try_from(tensor.flatten(0, -1)).unwrap()
    }

    #[test]
    fn batches_gather_pad_and_know_who_is_labelled() {
        let set = DeviceSplit::new(set(), 0, Device::Cpu);
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
        let set = EncodedSplit::of_words(&[vec!["hi", "you"], vec!["hi"]], &tokenizer, &[task]).unwrap();
        assert_eq!((set.token_ids.clone(), set.token_offsets.clone()), (vec![2, 1, 2], vec![0, 2, 3]));
        assert_eq!(set.labels(TaskId(0), 0), None);
    }
}
