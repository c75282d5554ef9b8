//! The rows and batches of an epoch: a pure function of seed and epoch, so that training can resume at any position.
//!
//! Two decisions: how many rows of each set an epoch takes (proportion), and how they are batched (order). Rows of
//! equal length are batched together; those left over are batched with neighbouring lengths, so that padding is rare.

use std::collections::BTreeMap;

use rand::seq::SliceRandom;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::encoded::EncodedSplit;
use crate::rng::{Purpose, Seed};

/// How many rows an epoch takes from each set; n_s is the number of rows of set s. Default `proportional`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SamplingConfig {
    /// Every row of every set once per epoch; batches mix sets.
    Proportional(Empty),
    /// sum(n_s) rows per epoch, the same number from each set; batches mix sets.
    Uniform(Empty),
    /// sum(n_s) rows per epoch, from set s in proportion to n_s^(1/temperature); batches mix sets.
    Temperature(TemperatureConfig),
    /// Batches of one set each, the sets in turn. An epoch is one pass over the largest set, with as many rows from
    /// each other set.
    RoundRobin(Empty),
}

impl Default for SamplingConfig {
    fn default() -> Self {
        SamplingConfig::Proportional(Empty {})
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Empty {}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TemperatureConfig {
    /// 1 is the same as `proportional`; large values approach `uniform`. Default 2.
    #[serde(default = "default_temperature")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub temperature: f64,
}

fn default_temperature() -> f64 {
    2.0
}

/// Plans the batches of epochs.
pub struct Sampler {
    seed: Seed,
    batch_size: usize,
    /// Number of tokens of every row.
    lengths: Vec<i64>,
    /// Rows of each set, and how many an epoch takes.
    sets: Vec<(std::ops::Range<usize>, usize)>,
    in_turn: bool,
}

impl Sampler {
    pub fn new(set: &EncodedSplit, config: &SamplingConfig, batch_size: usize, seed: Seed) -> Self {
        let ranges: Vec<_> = set.set_starts.windows(2).map(|pair| pair[0]..pair[1]).collect();
        let sizes: Vec<usize> = ranges.iter().map(|range| range.len()).collect();
        let largest = sizes.iter().copied().max().unwrap_or(0);
        let counts = match config {
            SamplingConfig::Proportional(_) => sizes,
            SamplingConfig::Uniform(_) => shares(&sizes, 0.0),
            SamplingConfig::Temperature(config) => shares(&sizes, 1.0 / config.temperature),
            SamplingConfig::RoundRobin(_) => vec![largest; sizes.len()],
        };
        Sampler {
            seed,
            batch_size,
            lengths: (0..set.len()).map(|row| set.n_tokens(row)).collect(),
            sets: ranges.into_iter().zip(counts).collect(),
            in_turn: matches!(config, SamplingConfig::RoundRobin(_)),
        }
    }

    /// The number of batches of every epoch.
    pub fn n_batches(&self) -> usize {
        let rows = self.sets.iter().map(|(_, count)| *count);
        if self.in_turn {
            rows.map(|count| count.div_ceil(self.batch_size)).sum()
        } else {
            rows.sum::<usize>().div_ceil(self.batch_size)
        }
    }

    /// The batches of `epoch` (from 0) as row numbers.
    pub fn plan(&self, epoch: usize) -> Vec<Vec<usize>> {
        let chosen: Vec<Vec<usize>> = (0..self.sets.len()).map(|set| self.rows(set, epoch)).collect();
        let mut generator = self.seed.generator(Purpose::Sampling, epoch as u64);
        if !self.in_turn {
            let mut rows = chosen.concat();
            if self.sets.len() > 1 {
                // Batches take rows in this order and should mix the sets.
                rows.shuffle(&mut generator);
            }
            let mut batches = self.by_length(rows);
            batches.shuffle(&mut generator);
            return batches;
        }
        let mut queues: Vec<_> = chosen
            .into_iter()
            .map(|rows| {
                let mut batches = self.by_length(rows);
                batches.shuffle(&mut generator);
                batches.into_iter()
            })
            .collect();
        let mut batches = Vec::new();
        while let Some(round) = queues.iter_mut().map(Iterator::next).collect::<Option<Vec<_>>>() {
            batches.extend(round);
        }
        batches
    }

    /// The rows that `epoch` takes from a set: the next ones of an endless sequence of permutations, so that every row
    /// is used before any is repeated.
    fn rows(&self, set: usize, epoch: usize) -> Vec<usize> {
        let (range, count) = &self.sets[set];
        let n = range.len();
        let (start, end) = (epoch * count, (epoch + 1) * count);
        let mut rows = Vec::with_capacity(*count);
        let mut at = start;
        while at < end {
            let permutation = at / n;
            let mut all: Vec<usize> = range.clone().collect();
            let index = ((set as u64 + 1) << 40) | permutation as u64;
            all.shuffle(&mut self.seed.generator(Purpose::Sampling, index));
            let stop = end.min((permutation + 1) * n);
            rows.extend(&all[at % n..at % n + (stop - at)]);
            at = stop;
        }
        rows
    }

    fn by_length(&self, rows: Vec<usize>) -> Vec<Vec<usize>> {
        let mut groups: BTreeMap<i64, Vec<usize>> = BTreeMap::new();
        for row in rows {
            groups.entry(self.lengths[row]).or_default().push(row);
        }
        let mut batches = Vec::new();
        let mut rest = Vec::new();
        for group in groups.into_values() {
            let full = group.chunks_exact(self.batch_size);
            rest.extend(full.remainder());
            batches.extend(full.map(<[usize]>::to_vec));
        }
        batches.extend(rest.chunks(self.batch_size).map(<[usize]>::to_vec));
        batches
    }
}

/// Splits sum(sizes) into shares proportional to size^power, rounded by largest remainders so that the sum stays.
fn shares(sizes: &[usize], power: f64) -> Vec<usize> {
    let total: usize = sizes.iter().sum();
    // Relative to the largest size, so that powers cannot overflow at any temperature.
    let largest = sizes.iter().copied().max().unwrap_or(1) as f64;
    let weights: Vec<f64> = sizes.iter().map(|&size| (size as f64 / largest).powf(power)).collect();
    let sum: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|weight| total as f64 * weight / sum).collect();
    let mut counts: Vec<usize> = exact.iter().map(|share| *share as usize).collect();
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()).then(a.cmp(&b)));
    let left = total - counts.iter().sum::<usize>();
    for &set in order.iter().take(left) {
        counts[set] += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(sizes: &[usize], config: SamplingConfig) -> Sampler {
        let mut starts = vec![0];
        for size in sizes {
            starts.push(starts[starts.len() - 1] + size);
        }
        let n = starts[sizes.len()];
        let offsets: Vec<i64> = (0..=n as i64).map(|i| i * 3 + (i % 4)).collect();
        let set = EncodedSplit {
            token_ids: vec![0; offsets[n] as usize],
            word_offsets: offsets.clone(),
            token_offsets: offsets,
            first_tokens: None,
            spelling: None,
            targets: vec![],
            unseen: Default::default(),
            set_starts: starts,
            places: vec![],
        };
        Sampler::new(&set, &config, 8, Seed(1))
    }

    #[test]
    fn batches_mix_sets() {
        let sampler = sampler(&[80, 80], SamplingConfig::default());
        let batches = sampler.plan(0);
        let mixed = |batch: &&Vec<usize>| batch.iter().any(|&row| row < 80) && batch.iter().any(|&row| row >= 80);
        assert!(batches.iter().filter(mixed).count() * 10 >= batches.len() * 9, "{batches:?}");
    }

    #[test]
    fn extreme_temperatures_keep_the_number_of_rows() {
        assert_eq!(shares(&[13_000, 10], 1.0 / 0.01), [13_010, 0]);
        assert_eq!(shares(&[3, 1], 0.0), [2, 2]);
    }

    fn counts(sampler: &Sampler, epoch: usize, n: usize) -> Vec<usize> {
        let mut counts = vec![0; n];
        for row in sampler.plan(epoch).concat() {
            counts[row] += 1;
        }
        counts
    }

    #[test]
    fn a_proportional_epoch_has_every_row_once() {
        let sampler = sampler(&[100, 37], SamplingConfig::default());
        assert_eq!(counts(&sampler, 3, 137), vec![1; 137]);
        assert_eq!(sampler.plan(3).len(), sampler.n_batches());
        assert_eq!(sampler.plan(3), sampler.plan(3));
        assert_ne!(sampler.plan(3), sampler.plan(4));
    }

    #[test]
    fn shares_follow_the_temperature_and_visit_all_rows_evenly() {
        assert_eq!(shares(&[900, 100], 0.5), [750, 250]);
        assert_eq!(shares(&[900, 100], 1.0), [900, 100]);
        let tempered = sampler(&[900, 100], SamplingConfig::Temperature(TemperatureConfig { temperature: 2.0 }));
        assert_eq!(counts(&tempered, 0, 1000)[..900].iter().sum::<usize>(), 750);
        let sampler = sampler(&[90, 10], SamplingConfig::Uniform(Empty {}));
        let mut total = vec![0; 100];
        for epoch in 0..9 {
            for (sum, count) in total.iter_mut().zip(counts(&sampler, epoch, 100)) {
                *sum += count;
            }
        }
        assert_eq!(total[..90], vec![5; 90], "50 rows of 90 an epoch, 9 epochs");
        assert_eq!(total[90..], vec![45; 10]);
    }

    #[test]
    fn round_robin_takes_sets_in_turn() {
        let sampler = sampler(&[40, 16], SamplingConfig::RoundRobin(Empty {}));
        let plan = sampler.plan(0);
        assert_eq!(plan.len(), sampler.n_batches());
        for (i, batch) in plan.iter().enumerate() {
            assert!(batch.iter().all(|&row| (row >= 40) == (i % 2 == 1)), "batch {i} holds one set");
        }
        let counts = counts(&sampler, 0, 56);
        assert_eq!(counts[..40], vec![1; 40]);
        assert_eq!(counts[40..].iter().sum::<usize>(), 40);
    }

    #[test]
    fn most_batches_need_no_padding() {
        let sampler = sampler(&[400], SamplingConfig::default());
        let uneven = |batch: &&Vec<usize>| batch.iter().any(|&row| sampler.lengths[row] != sampler.lengths[batch[0]]);
        assert!(sampler.plan(0).iter().filter(uneven).count() <= 3);
    }
}
