//! One seed per experiment; every use of randomness derives its own seed from it, by purpose and index, so that uses
//! are independent and each can be repeated without replaying earlier ones.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// What randomness is used for.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    /// Initial weights.
    Initialization = 1,
    /// Order of rows and batches, by epoch.
    Sampling = 2,
    /// Dropout masks and unknown-word replacement, by micro-batch.
    Dropout = 3,
    /// Splitting off dev from train, and drawing `train_fraction`.
    Split = 4,
    /// Random loss weights, by step.
    Weighting = 5,
}

/// The experiment's seed.
#[derive(Clone, Copy, Debug)]
pub struct Seed(pub u64);

impl Seed {
    /// The seed for use `index` (such as an epoch or a step) of `purpose`.
    pub fn derive(self, purpose: Purpose, index: u64) -> u64 {
        mix(mix(mix(self.0).wrapping_add(purpose as u64)).wrapping_add(index))
    }

    pub fn generator(self, purpose: Purpose, index: u64) -> ChaCha8Rng {
        ChaCha8Rng::seed_from_u64(self.derive(purpose, index))
    }

    /// Seeds libtorch's generators on every device.
    pub fn seed_torch(self, purpose: Purpose, index: u64) {
        tch::manual_seed(self.derive(purpose, index) as i64);
    }
}

/// SplitMix64's output function (Steele, Lea, Flood 2014): a bijection that scatters neighbouring seeds.
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn purposes_and_indices_get_seeds_of_their_own() {
        use Purpose::*;
        const ALL: [Purpose; 5] = [Initialization, Sampling, Dropout, Split, Weighting];
        let seed = Seed(13);
        let mut all = std::collections::BTreeSet::new();
        for purpose in ALL {
            for index in 0..100 {
                all.insert(seed.derive(purpose, index));
                all.insert(Seed(14).derive(purpose, index));
            }
        }
        assert_eq!(all.len(), 1000);
    }
}
