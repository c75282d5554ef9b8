//! The norm of a step's gradients, their divisor, and whether the step is skipped: by operators, or on a GPU by the
//! kernel of `src/libtorch/clip.cu`.
//!
//! norm = |(g_1, ..., g_n)|, divisor = max(1, (norm + 1e-6) / limit) (Pascanu 2013, algorithm 1)

use anyhow::Result;
use tch::{Kind, Tensor};

use crate::libtorch::{GradScale, Kernel, LISTED, LaunchConfig, Listed, clip_gradients, sources};
use crate::optim::{LossScale, is_not_finite};

/// The gradients of a step, and its losses in float32; a `limit` of 0 is none.
pub struct Clip<'a> {
    pub gradients: &'a [&'a Tensor],
    /// Partial sums of their squares `[n]`, if kernels computed them; otherwise gradients are float32.
    pub squares: Option<&'a Tensor>,
    pub losses: &'a [&'a Tensor],
    pub limit: f64,
    /// 1 once a loss or a gradient was not finite; updated in place.
    pub halted: &'a Tensor,
}

pub struct Clipped {
    /// The losses, then the norm before clipping, which is -1 if float16 skips the step.
    pub values: Tensor,
    pub divisor: Option<Tensor>,
    /// 1 to skip the step.
    skip: Tensor,
    /// 1 - skip, if known.
    taken: Option<Tensor>,
    /// 1 / loss scale; NaN if float16 skips the step.
    unscale: Option<Tensor>,
}

static KERNEL: Kernel = Kernel::new(sources::CLIP, "clip");

impl Clipped {
    pub fn grad_scale(&self) -> GradScale<'_> {
        GradScale { divisor: self.divisor.as_ref(), skip: &self.skip, taken: self.taken.as_ref() }
    }

    /// Norms of the tasks' gradients without the loss scale; NaN if float16 skips the step.
    pub fn unscaled(&self, norms: &Tensor) -> Tensor {
        self.unscale.as_ref().map_or(norms.shallow_clone(), |unscale| norms * unscale)
    }
}

impl Clip<'_> {
    /// With `loss_scale` the gradients are that many times too large.
    pub fn apply(&self, loss_scale: Option<&mut LossScale>) -> Result<Clipped> {
        let fits = self.losses.len() <= LISTED && self.losses.iter().all(|loss| loss.kind() == Kind::Float);
        match self.squares.filter(|_| fits && KERNEL.serves(self.halted.device())) {
            Some(squares) => self.by_kernel(squares, loss_scale),
            None => self.by_operators(loss_scale),
        }
    }

    fn by_kernel(&self, squares: &Tensor, loss_scale: Option<&mut LossScale>) -> Result<Clipped> {
        let (n, n_losses) = (squares.numel() as i64, self.losses.len() as i64);
        let new = |size: i64| Tensor::empty([size], (Kind::Float, squares.device()));
        let (values, grad_scale, threads) =
            (new(n_losses + 1), new(4), squares.numel().next_power_of_two().clamp(32, 1024));
        let scaled = loss_scale.is_some();
        // Placeholders that the kernel does not read without a scale.
        let (scale, sound, to_grow) = loss_scale.map_or((squares, squares, 0), |scale| scale.parts());
        KERNEL.launch_with(
            LaunchConfig { grid: [1, 1], block: [threads, 1], shared: threads * size_of::<f64>() },
            &[squares, self.halted, &values, &grad_scale, scale, sound],
            &[n, n_losses, i64::from((self.limit as f32).to_bits() as i32), to_grow],
            Some(&Listed::of(self.losses)?),
        )?;
        Ok(Clipped {
            values,
            divisor: Some(grad_scale.get(0)),
            skip: grad_scale.get(1),
            taken: Some(grad_scale.get(2)),
            unscale: scaled.then(|| grad_scale.get(3)),
        })
    }

    fn by_operators(&self, loss_scale: Option<&mut LossScale>) -> Result<Clipped> {
        let (mut norm, divisor) = match self.gradients.is_empty() {
            // Everything that the step has labels for is frozen.
            true => (Tensor::zeros([], (Kind::Float, self.halted.device())), None),
            false => {
                clip_gradients(self.gradients, self.squares, self.limit, loss_scale.as_deref().map(LossScale::value))?
            }
        };
        let mut unscale = loss_scale.as_ref().map(|scale| scale.value().reciprocal());
        let overflow = match loss_scale {
            Some(scale) => {
                let overflow = scale.adapt(&norm)?;
                // The step is skipped, and no weighting strategy learns from its gradients.
                norm = norm.masked_fill(&overflow, -1.0);
                unscale = unscale.map(|unscale| unscale.masked_fill(&overflow, f64::NAN));
                Some(overflow)
            }
            None => None,
        };
        let values = Tensor::stack(&self.losses.iter().copied().chain([&norm]).collect::<Vec<_>>(), 0);
        let halted = self.halted.maximum(&is_not_finite(&values.sum(Kind::Float)));
        self.halted.shallow_clone().f_copy_(&halted)?;
        let skip = overflow.map_or(halted.shallow_clone(), |overflow| halted.maximum(&overflow));
        Ok(Clipped { values, divisor, skip, taken: None, unscale })
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn check(gradients: &[f32], losses: &[f32], limit: f64, halted: f32) {
        for scale in [None, Some(65536.0), Some(1.0)] {
            check_scaled(gradients, losses, limit, halted, scale);
        }
    }

    fn check_scaled(gradients: &[f32], losses: &[f32], limit: f64, halted: f32, scale: Option<f32>) {
        let scalars = |values: &[f32]| values.iter().map(|&value| Tensor::from(value)).collect::<Vec<_>>();
        let gradients: Vec<Tensor> = scalars(gradients).iter().map(|g| g.expand([9], false).contiguous()).collect();
        let (gradients, losses) = (gradients.iter().collect::<Vec<_>>(), scalars(losses));
        let losses: Vec<&Tensor> = losses.iter().collect();
        let [ours, theirs] = [true, false].map(|by_kernel| {
            let halted = Tensor::from(halted);
            let squares = Tensor::stack(&gradients.iter().map(|g| g.square().sum(Kind::Float)).collect::<Vec<_>>(), 0);
            let clip = Clip { gradients: &gradients, squares: None, losses: &losses, limit, halted: &halted };
            let mut scale = scale.map(|scale| {
                let mut new = LossScale::new(Device::Cpu);
                let _ = new.parts().0.shallow_clone().fill_(f64::from(scale));
                new
            });
            let by = scale.as_mut();
            let clipped = if by_kernel { clip.by_kernel(&squares, by) } else { clip.by_operators(by) }.unwrap();
            let norms = clipped.unscaled(&Tensor::from_slice(&[2.0f64, f64::NAN]));
            assert!(clipped.taken.as_ref().is_none_or(|taken| *taken == 1.0 - &clipped.skip));
            // The divisor of a skipped step is not used.
            let divisor = clipped.divisor.as_ref().filter(|_| clipped.skip == Tensor::from(0f32));
            let divisor = divisor.map_or(1.0, |divisor| divisor.double_value(&[]));
            let mut all = Vec::<f64>::try_from(clipped.values.to_kind(Kind::Double)).unwrap();
            all.extend([divisor, clipped.skip.double_value(&[]), halted.double_value(&[])]);
            all.extend(Vec::<f64>::try_from(norms).unwrap());
            let state = scale.iter().flat_map(LossScale::state).map(|(_, number)| number.double_value(&[]));
            all.extend(state.collect::<Vec<_>>());
            all
        });
        let near =
            |(a, b): (&f64, &f64)| a.total_cmp(b).is_eq() || (a.is_nan() && b.is_nan()) || (a - b).abs() < 1e-6 * b;
        assert!(ours.iter().zip(&theirs).all(near), "{ours:?} {theirs:?}");
    }

    #[test]
    fn the_kernel_computes_what_operators_do() {
        // More gradients than the block has threads, and one.
        let many: Vec<f32> = (1..300).map(|i| i as f32 / 7.0).collect();
        for gradients in [&many[..], &[0.25]] {
            for limit in [5.0, 0.0, 1e6] {
                check(gradients, &[1.5, 0.5], limit, 0.0);
                check(gradients, &[1.5], limit, 1.0);
                check(gradients, &[f32::NAN, 1.0], limit, 0.0);
                check(gradients, &[1.0, f32::INFINITY], limit, 0.0);
            }
        }
        check(&[1.0, f32::NAN], &[1.0], 5.0, 0.0);
        check(&[1.0, f32::INFINITY], &[1.0], 5.0, 0.0);
        check(&[0.0], &[0.0], 5.0, 0.0);
    }
}
