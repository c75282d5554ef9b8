//! What a step's gradients come to: their norm, what divides them, and whether they are taken. By operators, or on a GPU by the
//! kernel of `src/libtorch/clip.cu`.
//!
//! norm = |(g_1, ..., g_n)|, divisor = max(1, (norm + 1e-6) / limit) (Pascanu 2013, algorithm 1)

use anyhow::Result;
use tch::{Kind, Tensor};

use crate::libtorch::{GradScale, Kernel, LaunchConfig, clip_gradients, norms_of};
use crate::optim::{LossScale, is_unsound};

/// The gradients and the losses of a step, float32; `limit` 0 is none.
pub struct Clip<'a> {
    pub gradients: &'a [&'a Tensor],
    pub losses: &'a [&'a Tensor],
    pub limit: f64,
    /// 1 since a loss or a gradient was not finite: it is brought up to date.
    pub halted: &'a Tensor,
}

pub struct Clipped {
    /// The losses, then the norm before clipping.
    pub values: Tensor,
    pub divisor: Option<Tensor>,
    /// 1 where the step is left out.
    skip: Tensor,
    /// 1 - skip, where it is known.
    taken: Option<Tensor>,
}

static KERNEL: Kernel = Kernel::new(include_str!("../libtorch/clip.cu"), "clip");

impl Clipped {
    pub fn grad_scale(&self) -> GradScale<'_> {
        GradScale { divisor: self.divisor.as_ref(), skip: &self.skip, taken: self.taken.as_ref() }
    }
}

impl Clip<'_> {
    /// With `loss_scale` the gradients are that much too large, and so are `norms`, which are put right with them.
    pub fn apply(&self, loss_scale: Option<&mut LossScale>, norms: &mut Option<Tensor>) -> Result<Clipped> {
        let floats = || self.gradients.iter().chain(self.losses).all(|x| x.kind() == Kind::Float);
        let fits = loss_scale.is_none() && !self.gradients.is_empty() && floats();
        match fits && KERNEL.serves(self.halted.device()) {
            true => self.by_kernel(),
            false => self.by_operators(loss_scale, norms),
        }
    }

    fn by_kernel(&self) -> Result<Clipped> {
        let given = norms_of(self.gradients, self.losses)?;
        let (n, n_losses) = (self.gradients.len() as i64, self.losses.len() as i64);
        let new = |size: i64| Tensor::empty([size], (Kind::Float, given.device()));
        let (values, grad_scale, threads) = (new(n_losses + 1), new(3), 32);
        KERNEL.launch(
            LaunchConfig { grid: [1, 1], block: [threads, 1], shared: threads * size_of::<f64>() },
            &[&given, self.halted, &values, &grad_scale],
            &[n, n_losses, i64::from((self.limit as f32).to_bits() as i32)],
        )?;
        let divisor = (self.limit > 0.0).then(|| grad_scale.get(0));
        Ok(Clipped { values, divisor, skip: grad_scale.get(1), taken: Some(grad_scale.get(2)) })
    }

    fn by_operators(&self, loss_scale: Option<&mut LossScale>, norms: &mut Option<Tensor>) -> Result<Clipped> {
        let (mut norm, divisor) = match self.gradients.is_empty() {
            // All that the step has labels for is frozen.
            true => (Tensor::zeros([], (Kind::Float, self.halted.device())), None),
            false => clip_gradients(self.gradients, self.limit, loss_scale.as_deref().map(LossScale::value))?,
        };
        let overflow = match loss_scale {
            Some(scale) => {
                *norms = norms.take().map(|norms| norms / scale.value());
                let overflow = scale.adapt(&norm)?;
                // The step is left out, and nobody learns from its gradients.
                norm = norm.masked_fill(&overflow, 0.0);
                *norms = norms.take().map(|norms| norms.masked_fill(&overflow, f64::NAN));
                Some(overflow)
            }
            None => None,
        };
        let values = Tensor::stack(&self.losses.iter().copied().chain([&norm]).collect::<Vec<_>>(), 0);
        let halted = self.halted.maximum(&is_unsound(&values.sum(Kind::Float)));
        self.halted.shallow_clone().f_copy_(&halted)?;
        let skip = overflow.map_or(halted.shallow_clone(), |overflow| halted.maximum(&overflow));
        Ok(Clipped { values, divisor, skip, taken: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(gradients: &[f32], losses: &[f32], limit: f64, halted: f32) {
        let scalars = |values: &[f32]| values.iter().map(|&value| Tensor::from(value)).collect::<Vec<_>>();
        let gradients: Vec<Tensor> = scalars(gradients).iter().map(|g| g.expand([9], false).contiguous()).collect();
        let (gradients, losses) = (gradients.iter().collect::<Vec<_>>(), scalars(losses));
        let losses: Vec<&Tensor> = losses.iter().collect();
        let [ours, theirs] = [true, false].map(|by_kernel| {
            let halted = Tensor::from(halted);
            let clip = Clip { gradients: &gradients, losses: &losses, limit, halted: &halted };
            let clipped = if by_kernel { clip.by_kernel() } else { clip.by_operators(None, &mut None) }.unwrap();
            assert!(clipped.taken.as_ref().is_none_or(|taken| *taken == 1.0 - &clipped.skip));
            let divisor = clipped.divisor.as_ref().map_or(f64::NAN, |divisor| divisor.double_value(&[]));
            let mut all = Vec::<f64>::try_from(clipped.values.to_kind(Kind::Double)).unwrap();
            all.extend([divisor, clipped.skip.double_value(&[]), halted.double_value(&[])]);
            all
        });
        let near =
            |(a, b): (&f64, &f64)| a.total_cmp(b).is_eq() || (a.is_nan() && b.is_nan()) || (a - b).abs() < 1e-6 * b;
        assert!(ours.iter().zip(&theirs).all(near), "{ours:?} {theirs:?}");
    }

    #[test]
    fn the_kernel_computes_what_operators_do() {
        // More gradients than the block has threads, and one.
        let many: Vec<f32> = (1..50).map(|i| i as f32 / 7.0).collect();
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
