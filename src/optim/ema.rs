//! The exponential moving average of the weights, which is evaluated and kept in their place.
//!
//! a_t = d_t a_(t-1) + (1 - d_t) w_t with d_t = min(d, (1 + t) / (10 + t)), t steps from 1 (Polyak & Juditsky 1992; the
//! warm-up of d is that of TensorFlow's ExponentialMovingAverage). Once a run is halted the weights stay the same, and
//! the average converges to them.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use tch::Tensor;

use crate::libtorch::{Number, side_by_side, workers};

pub struct Ema {
    decay: f64,
    /// Name, weights and average of each parameter.
    pairs: Vec<(String, Tensor, Tensor)>,
}

impl Ema {
    pub fn new<'a>(decay: f64, parameters: impl Iterator<Item = (&'a str, &'a Tensor)>) -> Self {
        let pair = |(name, tensor): (&str, &Tensor)| (name.to_owned(), tensor.detach(), tensor.detach().copy());
        Ema { decay, pairs: parameters.map(pair).collect() }
    }

    /// The factor of the weights after step `number` (from 0) in the average: 1 - decay.
    pub fn share(&self, number: usize) -> f64 {
        let t = number as f64 + 1.0;
        1.0 - self.decay.min((1.0 + t) / (10.0 + t))
    }

    /// Moves the averages towards the weights by `share`, except those of `tables`, which are averaged row by row.
    pub(super) fn update(&mut self, share: Number, tables: &[usize]) -> Result<()> {
        let workers = workers();
        let lerp = |worker: usize| -> Result<()> {
            let own = self.pairs.iter().enumerate().filter(|(number, _)| !tables.contains(number));
            for (_, (_, weight, average)) in own {
                let length = weight.size().first().map_or(1, |&n| n as usize);
                let (start, end) = (length * worker / workers, length * (worker + 1) / workers);
                let block = |tensor: &Tensor| match tensor.dim() {
                    0 => tensor.shallow_clone(),
                    _ => tensor.narrow(0, start as i64, (end - start) as i64),
                };
                if end > start {
                    let _ = match share {
                        Number::Host(share) => block(average).f_lerp_(&block(weight), share)?,
                        Number::Device(share) => block(average).f_lerp_tensor_(&block(weight), share)?,
                    };
                }
            }
            Ok(())
        };
        side_by_side(workers, &lerp).into_iter().collect()
    }

    pub(super) fn of(&self, number: usize) -> &Tensor {
        &self.pairs[number].2
    }

    pub(super) fn of_mut(&mut self, number: usize) -> &mut Tensor {
        &mut self.pairs[number].2
    }

    /// Swaps the weights and their averages.
    pub fn swap(&mut self) -> Result<()> {
        for (_, weight, average) in &mut self.pairs {
            let kept = weight.copy();
            weight.f_copy_(average)?;
            average.f_copy_(&kept)?;
        }
        Ok(())
    }

    /// Averages by parameter name, for a checkpoint.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        self.pairs.iter().map(|(name, _, average)| (format!("{name}.average"), average.shallow_clone())).collect()
    }

    /// Restores the averages, removing them from a checkpoint's tensors.
    pub fn load(&mut self, state: &mut BTreeMap<String, Tensor>) -> Result<()> {
        for (name, _, average) in &mut self.pairs {
            let name = format!("{name}.average");
            let value = state.remove(&name).with_context(|| format!("the checkpoint lacks `{name}`"))?;
            ensure!(value.size() == average.size(), "`{name}` in the checkpoint has another shape");
            average.f_copy_(&value)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_follow_the_formula_swap_and_come_back() {
        let mut weight = Tensor::from_slice(&[1.0f32]);
        let named = [("w", weight.shallow_clone())];
        let mut average = Ema::new(0.5, named.iter().map(|(name, tensor)| (*name, tensor)));
        let _ = weight.fill_(2.0);
        average.update(Number::Host(average.share(0)), &[]).unwrap(); // 2/11 of 1 and 9/11 of 2
        let expected = 1.0 * 2.0 / 11.0 + 2.0 * 9.0 / 11.0;
        average.swap().unwrap();
        assert!((weight.double_value(&[0]) - expected).abs() < 1e-6);
        average.swap().unwrap();
        assert_eq!(weight.double_value(&[0]), 2.0);
        let _ = weight.fill_(4.0);
        average.update(Number::Host(average.share(99)), &[]).unwrap(); // the rate has reached 0.5
        let mut state: BTreeMap<_, _> = average.state().into_iter().collect();
        let mut other = Ema::new(0.5, named.iter().map(|(name, tensor)| (*name, tensor)));
        other.load(&mut state).unwrap();
        other.swap().unwrap();
        assert!((weight.double_value(&[0]) - (0.5 * expected + 2.0)).abs() < 1e-6);
    }
}
