//! Words that occur once in training are randomly read as the unknown token, so that its embedding is trained.
//!
//! Source: Lample 2016 ("Neural Architectures for Named Entity Recognition"), section 4.1, with probability 0.5.

use tch::{Device, Tensor};

use crate::data::EncodedSplit;
use crate::libtorch::{Draws, bernoulli};

pub struct UnknownWords {
    /// True for tokens that occur once in the training set, [vocabulary].
    singletons: Tensor,
    rate: f64,
    unknown: i64,
}

impl UnknownWords {
    /// `None` if nothing would be replaced.
    pub fn new(train: &EncodedSplit, n_tokens: usize, unknown: u32, rate: f64, device: Device) -> Option<Self> {
        let mut counts = vec![0u32; n_tokens];
        for &id in &train.token_ids {
            counts[id as usize] += 1;
        }
        let singletons: Vec<bool> = counts.iter().map(|&count| count == 1).collect();
        let any = rate > 0.0 && singletons.contains(&true);
        any.then(|| UnknownWords {
            singletons: Tensor::from_slice(&singletons).to_device(device),
            rate,
            unknown: unknown.into(),
        })
    }

    /// [B, T] ids with some replaced.
    pub fn replace(&self, token_ids: &Tensor, draws: Draws) -> Tensor {
        let drawn = bernoulli(&token_ids.size(), self.rate, draws, token_ids.device()).gt(0.5);
        token_ids.masked_fill(&self.singletons.take(token_ids).logical_and(&drawn), self.unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Tokenizer;

    #[test]
    fn words_seen_once_are_read_as_unknown_at_the_rate() {
        let tokenizer = Tokenizer::of_words(&["once", "often", "too"]);
        let set = EncodedSplit::of_words(&[vec!["once", "often"], vec!["often", "too"]], &tokenizer, &[]).unwrap();
        let unknown = UnknownWords::new(&set, 5, 1, 0.4, Device::Cpu).unwrap();
        let ids = Tensor::from_slice(&[2i64, 3]).expand([2000, 2], false);
        let read = unknown.replace(&ids, Draws::new(3));
        assert_eq!(read.select(1, 1), ids.select(1, 1), "a word seen twice stays");
        let share = read.select(1, 0).eq(1).to_kind(tch::Kind::Double).mean(tch::Kind::Double).double_value(&[]);
        assert!((share - 0.4).abs() < 0.05, "{share}");
        assert!(UnknownWords::new(&set, 5, 1, 0.0, Device::Cpu).is_none());
    }
}
