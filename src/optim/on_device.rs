//! The optimizer on a GPU, with custom kernels: whole parameters, and table rows that wait until a step reads them.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::dense::{Dense, Parameter};
use super::device_deferred::{DeviceDeferredRows, TableState};
use super::{Optimizer, Slot, StepRates, Touched};
use crate::libtorch::{GradScale, count_up};

pub(super) struct OnDevice {
    dense: Dense,
    /// For tables of which steps read only some rows, if there are any.
    deferred: Option<DeviceDeferredRows>,
}

impl Optimizer {
    /// Uses the custom kernels from now on, if the device has them. The rows of `tables` then wait until a step reads
    /// them; `halves` are 16-bit copies of parameters, by number, which are kept up to date.
    pub fn work_on_device(&mut self, tables: Vec<usize>, halves: &[(usize, &Tensor)]) {
        let device = self.slots.first().map_or(Device::Cpu, |slot| slot.parameter.device());
        // On the CPU there are kernels only for tests.
        let serves = (Dense::serves(device) && DeviceDeferredRows::serves(device)) || cfg!(test);
        if !serves || self.lazy_rows() {
            return;
        }
        let parameter = |number: usize| Parameter {
            number,
            weights: &self.slots[number].parameter,
            first: &self.slots[number].first,
            second: &self.slots[number].second,
            average: self.average.as_ref().map(|average| average.of(number)),
            half: halves.iter().find(|(own, _)| *own == number).map(|(_, half)| *half),
            step: &self.slots[number].step,
            decays: self.slots[number].decays,
        };
        let dense = (0..self.slots.len()).filter(|number| !tables.contains(number));
        let dense = Dense::new(&dense.map(parameter).collect::<Vec<_>>(), &self.config.rule(true), device);
        let decays: Vec<(usize, bool)> = tables.iter().map(|&number| (number, self.slots[number].decays)).collect();
        let deferred = tables.first().map(|&table| {
            let n_rows = self.slots[table].parameter.size()[0];
            DeviceDeferredRows::new(&self.config, n_rows, &decays, device)
        });
        self.on_device = Some(OnDevice { dense, deferred });
    }

    /// Whether 16-bit copies of parameters are kept up to date, and their gradients may stay in 16 bits. Other code
    /// that writes weights must refresh the copies, as every step does that is not recorded.
    pub fn keeps_halves(&self) -> bool {
        self.on_device.is_some()
    }

    /// Whether rows of tables wait on the device.
    pub fn waits_on_device(&self) -> bool {
        self.on_device.as_ref().is_some_and(|own| own.deferred.is_some())
    }

    /// Must be called once before each step, computed or replayed.
    pub fn begin(&mut self) -> Result<()> {
        self.with_backlog(DeviceDeferredRows::begin)
    }

    pub(super) fn settle_on_device(&mut self) -> Result<()> {
        self.with_backlog(DeviceDeferredRows::settle)
    }

    fn with_backlog(&mut self, work: fn(&mut DeviceDeferredRows, &[TableState]) -> Result<()>) -> Result<()> {
        let Some(mut own) = self.on_device.take() else { return Ok(()) };
        let done = own.deferred.as_mut().map_or(Ok(()), |deferred| work(deferred, &self.numbers(deferred)));
        self.on_device = Some(own);
        done
    }

    /// Brings the waiting rows that the current step reads up to date.
    pub fn read(&self, rows: &Touched) -> Result<()> {
        let Some(OnDevice { deferred: Some(deferred), .. }) = &self.on_device else { return Ok(()) };
        deferred.read(&rows.ids, &self.numbers(deferred))
    }

    fn numbers(&self, deferred: &DeviceDeferredRows) -> Vec<TableState<'_>> {
        let numbers = |number: usize| {
            let Slot { parameter, first, second, .. } = &self.slots[number];
            TableState {
                weights: parameter,
                first,
                second,
                average: self.average.as_ref().map(|average| average.of(number)),
            }
        };
        deferred.tables().map(numbers).collect()
    }

    /// Partial sums of the squares of all `gradients`, `[n]`, if kernels do the work. Gradients of tables whose rows
    /// wait come by place of the step, and are replaced by their sums by row.
    pub fn squares(&self, rows: Option<&Touched>, gradients: &mut [Tensor]) -> Result<Option<Tensor>> {
        let Some(OnDevice { dense, deferred }) = &self.on_device else { return Ok(None) };
        let waiting = deferred.as_ref().zip(rows);
        let n = dense.n_pieces();
        let n_of_tables = waiting.map_or(0, |(deferred, rows)| deferred.tables().count() * rows.ids.numel()) as i64;
        let device = self.slots[0].parameter.device();
        let squares = Tensor::empty([n + n_of_tables], (Kind::Float, device));
        for number in dense.numbers() {
            if let Some(gradient) = gradients.get_mut(number).filter(|gradient| gradient.defined()) {
                *gradient = gradient.contiguous();
            }
        }
        dense.squares(gradients, &squares.narrow(0, 0, n))?;
        let Some((deferred, rows)) = waiting else { return Ok(Some(squares)) };
        let each = rows.ids.numel() as i64;
        for (i, table) in deferred.tables().enumerate() {
            let mut own = squares.narrow(0, n + each * i as i64, each);
            match gradients.get_mut(table).filter(|gradient| gradient.defined()) {
                Some(gradient) => *gradient = deferred.sum(gradient, &rows.ids, rows.padding, &own)?,
                None => drop(own.f_zero_()?),
            }
        }
        Ok(Some(squares))
    }

    pub(super) fn step_on_device(
        &self,
        OnDevice { dense, deferred }: &OnDevice,
        gradients: &[Tensor],
        rows: Option<&Touched>,
        rates: StepRates,
        grad_scale: GradScale,
    ) -> Result<()> {
        let device = self.slots[0].parameter.device();
        let (rate, share) = (rates.learning_rate.on(device), rates.share.on(device));
        let gradient = |number: usize| gradients.get(number).filter(|gradient| gradient.defined());
        let moving = dense.numbers().filter(|&number| gradient(number).is_some());
        let steps: Vec<&Tensor> = moving.map(|number| &self.slots[number].step).collect();
        if !steps.is_empty() {
            count_up(&steps, grad_scale)?;
        }
        let one = || Tensor::ones([], (Kind::Float, device));
        let divisor = grad_scale.divisor.map_or_else(one, Tensor::shallow_clone);
        let scalars = [&rate, &share, grad_scale.skip, &divisor];
        dense.update(gradients, scalars)?;
        let (Some(deferred), Some(rows)) = (deferred, rows) else { return Ok(()) };
        let numbers = self.numbers(deferred).into_iter().zip(deferred.tables());
        let tables: Vec<_> =
            numbers.map(|(numbers, number)| (numbers, gradient(number), &self.slots[number].step)).collect();
        deferred.step(&rows.ids, &tables, scalars)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::optim::OptimizerConfig;

    const ROWS: i64 = 7;
    const WIDTH: i64 = 20;

    /// A table of which each step reads some rows, and a bias that every step moves; `skips` selects steps to skip.
    fn run(config: &OptimizerConfig, waits: bool, settle_every: usize, skips: fn(usize) -> bool) -> Vec<Tensor> {
        let random = |size: &[i64], seed: i64| {
            tch::manual_seed(seed);
            Tensor::randn(size, (Kind::Float, Device::Cpu))
        };
        let parameters = [("embedding.weight", random(&[ROWS, WIDTH], 1)), ("bias", random(&[3], 2))];
        let named = || parameters.iter().map(|(name, tensor)| (*name, tensor));
        let mut optimizer = Optimizer::new(config, named()).with_average(0.9);
        if waits {
            optimizer.work_on_device(vec![0], &[]);
        }
        for step in 0..70 {
            // Row 2 occurs twice, row 0 is padding, row 6 is read only in the first step.
            let ids: &[i64] = if step == 0 { &[6, 2, 0, 2] } else { [&[2, 1, 2][..], &[4, 0, 3]][step % 2] };
            let ids = Tensor::from_slice(ids);
            let at_places = random(&[ids.size()[0], WIDTH], 10 + step as i64);
            let bias = random(&[3], 1000 + step as i64);
            optimizer.begin().unwrap();
            let touched = Touched { ids: ids.shallow_clone(), host: Vec::new(), padding: 0, tables: vec![0] };
            optimizer.read(&touched).unwrap();
            let whole = Tensor::embedding_dense_backward(&at_places, &ids, ROWS, 0, false);
            let mut gradients = [if waits { at_places } else { whole.shallow_clone() }, bias];
            if waits {
                let whole =
                    (whole.square().sum(Kind::Double) + gradients[1].square().sum(Kind::Double)).double_value(&[]);
                let squares = optimizer.squares(Some(&touched), &mut gradients).unwrap().unwrap();
                assert!((squares.sum(Kind::Double).double_value(&[]) - whole).abs() < 1e-5 * whole);
            }
            let frozen = step % 10 == 9;
            if frozen {
                gradients[0] = Tensor::new();
            }
            let skip = Tensor::from(f32::from(u8::from(skips(step))));
            let rows = waits.then_some(&touched);
            let learning_rate = (0.01 / (1.0 + step as f64)).into();
            let rates = StepRates { learning_rate, share: optimizer.share(step).into() };
            optimizer.step(&gradients, rows, rates, &skip).unwrap();
            if step % settle_every == 0 {
                optimizer.catch_up(None).unwrap();
            }
        }
        optimizer.catch_up(None).unwrap();
        let state = optimizer.state().into_iter().map(|(_, tensor)| tensor);
        parameters.into_iter().map(|(_, tensor)| tensor).chain(state).collect()
    }

    #[test]
    fn rows_that_wait_come_to_the_same() {
        let options = [
            json!({"adamw": {"weight_decay": 0.1, "decay_all": true}}),
            json!({"adam": {"weight_decay": 0.1, "decay_all": true}}),
            json!({"sgd": {"momentum": 0.9, "weight_decay": 0.1, "decay_all": true}}),
        ];
        let skips = |step: usize| step % 17 == 5;
        for (i, options) in options.iter().enumerate() {
            let config: OptimizerConfig = serde_json::from_value(options.clone()).unwrap();
            let whole = run(&config, false, 1000, skips);
            let together = run(&config, true, 1000, skips);
            if i == 0 {
                assert_eq!(together, run(&config, true, 1, skips), "how long steps wait changes no bit");
            }
            for (i, (a, b)) in whole.iter().zip(&together).enumerate() {
                assert!(a.allclose(b, 1e-5, 1e-6, false), "{options}, {i}: {}", (a - b).abs().max());
            }
        }
    }

    #[test]
    fn copies_in_16_bits_follow_the_weights_and_give_their_gradients() {
        // With rows of more than a piece too, and copies with further columns.
        for (kind, width, copied) in [(Kind::Half, 70, 70), (Kind::BFloat16, 70, 70), (Kind::Half, 1100, 1104)] {
            tch::manual_seed(5);
            let random = || Tensor::randn([70, width], (Kind::Float, Device::Cpu));
            let weights = random();
            let padded = |x: Tensor| x.constant_pad_nd([0, copied - width]);
            let half = padded(weights.to_kind(kind));
            let other_half = half.copy();
            let config: OptimizerConfig = serde_json::from_value(json!({"adamw": {}})).unwrap();
            let build = |weights| Optimizer::new(&config, [("weights", weights)].into_iter()).with_average(0.9);
            let (before, floats) = (weights.copy(), weights.copy());
            let (mut optimizer, mut other, mut plain) = (build(&weights), build(&floats), build(&before));
            optimizer.work_on_device(Vec::new(), &[(0, &half)]);
            other.work_on_device(Vec::new(), &[(0, &other_half)]);
            // From magnitudes that underflow in float16 to nearly its largest.
            let scales = Tensor::logspace(-9.0, 4.0, width, 10.0, (Kind::Float, Device::Cpu));
            let gradient = padded((random() * scales).to_kind(kind));
            let squares = optimizer.squares(None, &mut [gradient.shallow_clone()]).unwrap().unwrap();
            let expected = gradient.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]);
            assert!((squares.sum(Kind::Double).double_value(&[]) - expected).abs() < 1e-5 * expected);
            let rates = StepRates { learning_rate: 0.1.into(), share: 0.1.into() };
            let wide = gradient.to_kind(Kind::Float);
            for (optimizer, gradient) in [(&mut optimizer, &gradient), (&mut other, &wide), (&mut plain, &wide)] {
                optimizer.step(&[gradient.shallow_clone()], None, rates, &Tensor::from(0f32)).unwrap();
            }
            assert_eq!(half, padded(weights.to_kind(kind)), "{kind:?}");
            for averaged in [false, true] {
                for optimizer in [&mut optimizer, &mut other, &mut plain].into_iter().filter(|_| averaged) {
                    optimizer.swap_average().unwrap();
                }
                assert!(weights == floats && weights.allclose(&before, 1e-5, 1e-6, false), "{kind:?} {averaged}");
            }
        }
    }
}
