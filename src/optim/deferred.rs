//! Deferred updates of embedding rows: sparse updates with the results of dense ones.
//!
//! When a step reads some rows of a table, all others have a gradient of 0. Their update depends only on the row and
//! the step's rates, so it can wait until a step reads the row or all rows are needed. Several steps together, while
//! the row is in the processor's cache, cost only arithmetic; each on its own would move the whole table through
//! memory. The results are the same, bit for bit, however long steps wait.
//!
//! V rows, E numbers per row.

use anyhow::Result;
use multiversion::multiversion;
use rayon::prelude::*;
use tch::Tensor;

use crate::libtorch::floats;

/// Elements that are computed together.
const LANES: usize = 16;
/// The fewest rows that are worth a task of their own.
const LEAST: usize = 8;
/// Updates below this fraction of the learning rate are negligible. Their first moment is set to 0, which makes most
/// steps of rare words cheaper.
const NOTHING: f32 = 1e-7;
/// Steps between two checks for such updates.
const LOOK_EVERY: u64 = 16;

/// One step of a whole table.
#[derive(Clone, Copy, Debug)]
pub struct PastStep {
    /// The table's number of steps, including this one if the table moves.
    pub count: u64,
    /// `None` if the table does not move.
    pub rates: Option<Rates>,
    /// Factor of the new weights in their average, if there is one.
    pub share: Option<f32>,
}

/// The numbers that a step's update of a row needs.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Factor of the weights, for decoupled decay.
    pub keep: f32,
    /// Factor of the weights in the gradient, for an L2 term.
    pub l2: f32,
    pub rule: Rule,
}

#[derive(Clone, Copy, Debug)]
pub enum Rule {
    /// m = beta_1 m + (1 - beta_1) g, v = beta_2 v + (1 - beta_2) g^2, w = w - size m / (spread sqrt(v) + epsilon);
    /// size is rate / (1 - beta_1^t) and spread 1 / sqrt(1 - beta_2^t). `rests` are 1 - beta, rounded after the
    /// subtraction.
    Adam { betas: (f32, f32), rests: (f32, f32), size: f32, spread: f32, epsilon: f32 },
    /// m = momentum m + g, w = w - rate m.
    Sgd { momentum: f32, rate: f32 },
}

/// The steps of one table that some of its rows have not taken yet.
pub struct DeferredRows {
    past: Vec<PastStep>,
    /// How many of them each row has taken, `[V]`.
    taken: Vec<usize>,
}

/// A table's weights and optimizer state, [V, E] each.
pub struct TableState<'a> {
    width: usize,
    weights: &'a mut [f32],
    first: &'a mut [f32],
    /// Empty for SGD.
    second: &'a mut [f32],
    /// The weights' moving average, or empty.
    average: &'a mut [f32],
}

/// One row of a table.
struct Row<'a> {
    weights: &'a mut [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
    average: &'a mut [f32],
    /// Its position in the list of ids, and the number of steps that it has taken.
    place: usize,
    taken: usize,
}

impl<'a> TableState<'a> {
    /// # Errors
    /// Tensors that are not contiguous float32 tensors on the CPU.
    pub fn of(
        weights: &'a mut Tensor,
        first: &'a mut Tensor,
        second: &'a mut Tensor,
        average: Option<&'a mut Tensor>,
    ) -> Result<Self> {
        Ok(TableState {
            width: weights.size()[1] as usize,
            weights: floats(weights)?,
            first: floats(first)?,
            second: floats(second)?,
            average: average.map_or(Ok(&mut [][..]), floats)?,
        })
    }

    /// The rows `ids`, which are distinct, in the table's order.
    fn rows(mut self, ids: &[i64], taken: &[usize]) -> Vec<Row<'a>> {
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_unstable_by_key(|&place| ids[place]);
        let mut next = 0;
        let row = |place: usize| {
            let id = ids[place] as usize;
            let skip = (id - next) * self.width;
            next = id + 1;
            Row {
                weights: cut(&mut self.weights, skip, self.width),
                first: cut(&mut self.first, skip, self.width),
                second: cut(&mut self.second, skip, self.width),
                average: cut(&mut self.average, skip, self.width),
                place,
                taken: taken[id],
            }
        };
        order.into_iter().map(row).collect()
    }
}

/// Splits `skip` numbers and the next `width` off `numbers`, and returns the latter; nothing if `numbers` is empty.
fn cut<'a>(numbers: &mut &'a mut [f32], skip: usize, width: usize) -> &'a mut [f32] {
    let all = std::mem::take(numbers);
    if all.is_empty() {
        return all;
    }
    let (row, rest) = all[skip..].split_at_mut(width);
    *numbers = rest;
    row
}

impl DeferredRows {
    pub fn new(n_rows: usize) -> Self {
        DeferredRows { past: Vec::new(), taken: vec![0; n_rows] }
    }

    /// A step that the rows `ids`, which must be up to date, take now, with their gradients [ids, E] if the table
    /// moves, and all other rows later.
    pub fn step(&mut self, now: PastStep, ids: &[i64], gradients: Option<&[f32]>, numbers: TableState) {
        let width = numbers.width;
        let mut rows = numbers.rows(ids, &self.taken);
        assert!(rows.iter().all(|row| row.taken == self.past.len()), "invariant: rows catch up before a step");
        rows.par_iter_mut().with_min_len(LEAST).for_each(|row| {
            let gradient = gradients.map(|gradients| &gradients[row.place * width..][..width]);
            row.take(&[now], gradient);
        });
        self.past.push(now);
        self.mark(ids);
    }

    fn mark(&mut self, ids: &[i64]) {
        ids.iter().for_each(|&id| self.taken[id as usize] = self.past.len());
    }

    /// Applies the steps that the rows `ids` have not taken.
    pub fn catch_up(&mut self, ids: &[i64], numbers: TableState) {
        let mut rows = numbers.rows(ids, &self.taken);
        let past = &self.past;
        rows.par_iter_mut().with_min_len(LEAST).for_each(|row| row.take(&past[row.taken..], None));
        self.mark(ids);
    }

    /// Applies the steps that any row has not taken, and clears the list of steps.
    pub fn settle(&mut self, numbers: TableState) {
        if self.past.is_empty() {
            return;
        }
        let all: Vec<i64> = (0..self.taken.len() as i64).collect();
        self.catch_up(&all, numbers);
        self.past.clear();
        self.taken.fill(0);
    }
}

impl Row<'_> {
    fn take(&mut self, steps: &[PastStep], gradient: Option<&[f32]>) {
        if steps.is_empty() {
            return;
        }
        let width = self.weights.len();
        for start in (0..width).step_by(LANES) {
            // Whole lanes are copied by a few instructions, others by a call.
            let load = |from: &[f32]| match from.get(start..).and_then(|rest| rest.first_chunk()) {
                Some(lanes) => *lanes,
                None => {
                    let mut lanes = [0.0; LANES];
                    let rest = from.get(start..).unwrap_or_default();
                    lanes[..rest.len()].copy_from_slice(rest);
                    lanes
                }
            };
            let mut lanes = Lanes {
                weights: load(self.weights),
                first: load(self.first),
                second: load(self.second),
                average: load(self.average),
            };
            advance(&mut lanes, steps, gradient.map(load).as_ref());
            let store = |into: &mut [f32], lanes: &[f32; LANES]| match into.get_mut(start..) {
                Some(rest) if rest.len() >= LANES => rest[..LANES].copy_from_slice(lanes),
                Some(rest) => rest.copy_from_slice(&lanes[..rest.len()]),
                None => {}
            };
            store(self.weights, &lanes.weights);
            store(self.first, &lanes.first);
            store(self.second, &lanes.second);
            store(self.average, &lanes.average);
        }
    }
}

struct Lanes {
    weights: [f32; LANES],
    first: [f32; LANES],
    second: [f32; LANES],
    average: [f32; LANES],
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn advance(lanes: &mut Lanes, steps: &[PastStep], gradient: Option<&[f32; LANES]>) {
    let Lanes { mut weights, mut first, mut second, mut average } = *lanes;
    let given = gradient.copied().unwrap_or_default();
    let touched = gradient.is_some();
    let mut still = !touched && first == [0.0; LANES];
    for PastStep { count, rates, share } in steps {
        match *rates {
            Some(Rates { keep, l2: 0.0, rule: Rule::Adam { betas, .. } }) if still => {
                for k in 0..LANES {
                    second[k] *= betas.1;
                    weights[k] *= keep;
                }
            }
            Some(Rates { keep, l2, rule: Rule::Adam { betas, rests, size, spread, epsilon } }) => {
                // Without a term of the weights, so that a step's square root need not wait for the step before.
                let gradient = if l2 == 0.0 { given } else { std::array::from_fn(|k| given[k] + l2 * weights[k]) };
                let mut updates = [0.0; LANES];
                for k in 0..LANES {
                    first[k] = betas.0 * first[k] + rests.0 * gradient[k];
                    second[k] = betas.1 * second[k] + rests.1 * gradient[k] * gradient[k];
                    updates[k] = first[k] / (spread * second[k].sqrt() + epsilon);
                    weights[k] = keep * weights[k] - size * updates[k];
                }
                if count.is_multiple_of(LOOK_EVERY) && l2 == 0.0 && !touched {
                    for k in 0..LANES {
                        first[k] = if updates[k].abs() < NOTHING { 0.0 } else { first[k] };
                    }
                    still = first == [0.0; LANES];
                }
            }
            Some(Rates { keep, l2, rule: Rule::Sgd { momentum, rate } }) => {
                for k in 0..LANES {
                    first[k] = momentum * first[k] + given[k] + l2 * weights[k];
                    weights[k] = keep * weights[k] - rate * first[k];
                }
            }
            None => {}
        }
        if let Some(share) = share {
            for k in 0..LANES {
                average[k] += share * (weights[k] - average[k]);
            }
        }
    }
    *lanes = Lanes { weights, first, second, average };
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDTH: usize = 19;
    const N_ROWS: usize = 3;

    /// Weights, first and second moments and average of a small table.
    fn table() -> [Vec<f32>; 4] {
        let numbers = |scale: f32| (0..N_ROWS * WIDTH).map(|i| scale * (1.0 + i as f32).sin()).collect::<Vec<f32>>();
        [numbers(0.3), numbers(1e-3), numbers(1e-3).iter().map(|x| x * x).collect(), numbers(0.2)]
    }

    fn numbers(table: &mut [Vec<f32>; 4]) -> TableState<'_> {
        let [weights, first, second, average] = table;
        TableState { width: WIDTH, weights, first, second, average }
    }

    fn adam(count: u64, l2: f32) -> PastStep {
        let n = count as i32;
        let (size, spread) = (1e-2 / (1.0 - 0.9f32.powi(n)), (1.0 - 0.99f32.powi(n)).sqrt().recip());
        let rule = Rule::Adam { betas: (0.9, 0.99), rests: (0.1, 0.01), size, spread, epsilon: 1e-8 };
        PastStep { count, rates: Some(Rates { keep: 0.999, l2, rule }), share: Some(0.01) }
    }

    fn sgd(count: u64) -> PastStep {
        let rule = Rule::Sgd { momentum: 0.9, rate: 0.1 };
        PastStep { count, rates: Some(Rates { keep: 1.0, l2: 0.1, rule }), share: Some(0.01) }
    }

    fn check(past: fn(u64) -> PastStep) {
        let run = |settled_every: u64| {
            let (mut table, mut deferred) = (table(), DeferredRows::new(N_ROWS));
            for count in 1..=600 {
                let touched: &[i64] = if count % 7 == 0 { &[2, 1] } else { &[] };
                deferred.catch_up(touched, numbers(&mut table));
                deferred.step(past(count), touched, Some(&[0.01; 2 * WIDTH]), numbers(&mut table));
                if count % settled_every == 0 {
                    deferred.settle(numbers(&mut table));
                }
            }
            table
        };
        let together = run(600);
        assert_eq!(together, run(1));
        assert_eq!(together, run(50));
        assert!(together[0].iter().chain(&together[3]).all(|number| number.is_finite()));
    }

    #[test]
    fn steps_are_the_same_however_long_they_wait() {
        check(|count| adam(count, 0.0));
        check(|count| adam(count, 0.01));
        check(sgd);
        check(|count| PastStep { rates: None, ..sgd(count) });
    }

    #[test]
    fn updates_that_are_nothing_end() {
        let (mut table, mut deferred) = (table(), DeferredRows::new(N_ROWS));
        for count in 1..=600 {
            deferred.step(adam(count, 0.0), &[0], Some(&[0.01; WIDTH]), numbers(&mut table));
        }
        deferred.settle(numbers(&mut table));
        assert!(table[1][WIDTH..].iter().all(|&moment| moment == 0.0) && table[1][0] != 0.0);
    }
}
