//! The exponential moving average of the weights, which is evaluated and kept in their place.
//!
//! a_t = d_t a_(t-1) + (1 - d_t) w_t with d_t = min(d, (1 + t) / (10 + t)), t steps from 1 (Polyak & Juditsky 1992; the rising
//! rate is that of TensorFlow's ExponentialMovingAverage). Once the run is halted the weights stay, and the average goes to
//! them.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::libtorch::{Kernel, LaunchConfig, Number, side_by_side, upload, workers};

static KERNEL: Kernel = Kernel::new(include_str!("../libtorch/average.cu"), "average");

/// Weights that a block of the kernel's threads works through.
const BLOCK: usize = 4096;

pub struct Average {
    decay: f64,
    /// The weights, and their averages.
    pairs: Vec<(String, Tensor, Tensor)>,
    /// Where they lie, for the kernel, [blocks, 3]; uploaded before anything is recorded.
    table: Option<Tensor>,
}

impl Average {
    pub fn new<'a>(decay: f64, parameters: impl Iterator<Item = (&'a str, &'a Tensor)>) -> Self {
        let pair = |(name, tensor): (&str, &Tensor)| (name.to_owned(), tensor.detach(), tensor.detach().copy());
        let pairs: Vec<_> = parameters.map(pair).collect();
        let device = pairs.first().map_or(Device::Cpu, |(_, weight, _)| weight.device());
        let table = (fits(&pairs) && KERNEL.serves(device)).then(|| table(&pairs, device));
        Average { decay, pairs, table }
    }

    /// What the weights after step `number` (from 0) count: 1 - decay.
    pub fn share(&self, number: usize) -> f64 {
        let t = number as f64 + 1.0;
        1.0 - self.decay.min((1.0 + t) / (10.0 + t))
    }

    /// Takes in the weights, which count `share`; but not those of `tables`, whose rows take part by themselves.
    pub(super) fn update(&mut self, share: Number, tables: &[usize]) -> Result<()> {
        if let (Some(table), []) = (&self.table, tables) {
            return by_kernel(table, share);
        }
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

    pub(super) fn of(&mut self, number: usize) -> &mut Tensor {
        &mut self.pairs[number].2
    }

    /// Exchanges the weights and their averages.
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

    /// Takes its part of a checkpoint's tensors.
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

/// Whether the kernel can take them.
fn fits(pairs: &[(String, Tensor, Tensor)]) -> bool {
    let fits = |tensor: &Tensor| tensor.kind() == Kind::Float && tensor.is_contiguous();
    pairs.iter().all(|(_, weight, average)| fits(weight) && fits(average))
}

/// The kernel's blocks: addresses of weights and of their averages, which never move, and how many there are.
fn table(pairs: &[(String, Tensor, Tensor)], device: Device) -> Tensor {
    let mut table = Vec::new();
    for (_, weight, average) in pairs {
        for start in (0..weight.numel()).step_by(BLOCK) {
            let address = |tensor: &Tensor| (tensor.data_ptr() as usize + start * size_of::<f32>()) as i64;
            table.extend([address(weight), address(average), BLOCK.min(weight.numel() - start) as i64]);
        }
    }
    upload(&table, device).view([-1, 3])
}

fn by_kernel(table: &Tensor, share: Number) -> Result<()> {
    let share = match share {
        Number::Host(share) => Tensor::full([], share, (Kind::Float, table.device())),
        Number::Device(share) => share.shallow_clone(),
    };
    let shape = LaunchConfig { grid: [table.size()[0] as usize, 1], block: [256, 1], shared: 0 };
    KERNEL.launch(shape, &[table, &share], &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_computes_what_operators_do() {
        tch::manual_seed(4);
        let random = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu));
        // One number, a block and more, several; one number more than a block.
        let sizes: [&[i64]; 4] = [&[], &[3, 1500], &[130, 100], &[BLOCK as i64 + 1]];
        let weights: Vec<Tensor> = sizes.iter().map(|size| random(size)).collect();
        let both = [0, 1].map(|_| Average::new(0.9, weights.iter().map(|weight| ("w", weight))));
        let [ours, mut theirs] = both;
        assert!(fits(&ours.pairs));
        let table = table(&ours.pairs, Device::Cpu);
        let on_device = Tensor::from(0.8f32);
        for share in [Number::Host(0.2), Number::Host(0.5), Number::Device(&on_device)] {
            for weight in &weights {
                weight.shallow_clone().copy_(&random(&weight.size()));
            }
            by_kernel(&table, share).unwrap();
            theirs.update(share, &[]).unwrap();
            for ((_, _, a), (_, _, b)) in ours.pairs.iter().zip(&theirs.pairs) {
                // The CPU's lerp rounds once where the product is added.
                assert!(a.allclose(b, 1e-6, 1e-6, false), "{:?} at {share:?}", a.size());
            }
        }
    }

    #[test]
    fn averages_follow_the_formula_swap_and_come_back() {
        let mut weight = Tensor::from_slice(&[1.0f32]);
        let named = [("w", weight.shallow_clone())];
        let mut average = Average::new(0.5, named.iter().map(|(name, tensor)| (*name, tensor)));
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
        let mut other = Average::new(0.5, named.iter().map(|(name, tensor)| (*name, tensor)));
        other.load(&mut state).unwrap();
        other.swap().unwrap();
        assert!((weight.double_value(&[0]) - (0.5 * expected + 2.0)).abs() < 1e-6);
    }
}
