//! Deferred updates of embedding rows on a GPU: as in `deferred.rs`, except that the device itself finds the rows that
//! a step reads, so that steps can be recorded. All rows catch up at least every [`MOST`] steps.
//!
//! V rows, E numbers per row, N tokens per step.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::config::OptimizerConfig;
use crate::libtorch::{Kernel, LaunchConfig, sources, upload};

/// The most steps that rows wait. More would save little: all rows are updated once in so many steps.
const MOST: i64 = 64;
/// Fields of the kernels' `Step`.
const STEP: i64 = 8;

static MARK: Kernel = Kernel::new(sources::OPTIMIZER, "mark_rows");
static SUM: Kernel = Kernel::new(sources::OPTIMIZER, "sum_rows");
static NOTE: Kernel = Kernel::new(sources::OPTIMIZER, "note_step");
static STEP_ROWS: Kernel = Kernel::new(sources::OPTIMIZER, "step_rows");
static SETTLE: Kernel = Kernel::new(sources::OPTIMIZER, "settle_rows");

/// The tables of an embedding, which have the same row ids.
pub struct DeviceDeferredRows {
    /// The first place of each id in the current step, and its number of places: `[V]`.
    first: Tensor,
    count: Tensor,
    tables: Vec<DeferredTable>,
    /// Steps since all rows were up to date.
    n_waiting: i64,
}

/// The steps that rows of one table have not taken yet.
struct DeferredTable {
    /// Its number among the parameters.
    number: usize,
    /// The kernel's `Rule`, and its `Step`s [MOST, STEP], of which the first `now` are in use.
    rule: Tensor,
    steps: Tensor,
    now: Tensor,
    /// How many of them each row has taken, `[V]`.
    taken: Tensor,
}

/// A table's weights and optimizer state, [V, E] each; `second` is empty for SGD.
#[derive(Clone, Copy)]
pub struct TableState<'a> {
    pub weights: &'a Tensor,
    pub first: &'a Tensor,
    pub second: &'a Tensor,
    pub average: Option<&'a Tensor>,
}

impl TableState<'_> {
    fn width(&self) -> i64 {
        self.weights.size()[1]
    }

    /// In the order of the kernels' arguments, and whether there is an average.
    fn arguments(&self) -> ([&Tensor; 4], i64) {
        ([self.weights, self.first, self.second, self.average.unwrap_or(self.weights)], self.average.is_some().into())
    }
}

impl DeviceDeferredRows {
    /// Whether the kernels are available.
    pub fn serves(device: Device) -> bool {
        [&MARK, &SUM, &NOTE, &STEP_ROWS, &SETTLE].iter().all(|kernel| kernel.serves(device))
    }

    /// For tables of `n_rows` rows: their numbers among the parameters, and whether each decays.
    pub fn new(config: &OptimizerConfig, n_rows: i64, tables: &[(usize, bool)], device: Device) -> Self {
        let ints = |size: &[i64], value: i64| Tensor::full(size, value, (Kind::Int, device));
        let waiting = |&(number, decays): &(usize, bool)| DeferredTable {
            number,
            rule: upload(&config.rule(decays), device),
            steps: Tensor::zeros([MOST, STEP], (Kind::Float, device)),
            now: ints(&[], 0),
            taken: ints(&[n_rows], 0),
        };
        DeviceDeferredRows {
            first: ints(&[n_rows], i32::MAX.into()),
            count: ints(&[n_rows], 0),
            tables: tables.iter().map(waiting).collect(),
            n_waiting: 0,
        }
    }

    /// The tables' numbers among the parameters.
    pub fn tables(&self) -> impl Iterator<Item = usize> {
        self.tables.iter().map(|own| own.number)
    }

    /// Must be called once before each step, computed or replayed.
    pub fn begin(&mut self, tables: &[TableState]) -> Result<()> {
        if self.n_waiting == MOST {
            self.settle(tables)?;
        }
        self.n_waiting += 1;
        Ok(())
    }

    /// Marks the rows `ids` `[N]`, which may repeat, as read by the step, and brings them up to date.
    pub fn read(&self, ids: &Tensor, tables: &[TableState]) -> Result<()> {
        let n = ids.numel();
        let block = n.next_multiple_of(32).min(256);
        let shape = LaunchConfig { grid: [n.div_ceil(block), 1], block: [block, 1], shared: 0 };
        MARK.launch(shape, &[ids, &self.first, &self.count], &[n as i64])?;
        for (own, numbers) in self.tables.iter().zip(tables) {
            self.step_rows(own, ids, numbers, None, false)?;
        }
        Ok(())
    }

    /// Sums `gradients` [N, E] at the places `ids` `[N]` by id: [N, E], with the sum at the first place of an id and 0
    /// at all others and for the id `skipped`. Writes the sum of squares of each row into `squares` `[N]`.
    pub fn sum(&self, gradients: &Tensor, ids: &Tensor, skipped: i64, squares: &Tensor) -> Result<Tensor> {
        let (n, gradients) = (ids.numel(), gradients.contiguous());
        let width = gradients.numel() / n;
        let sums = Tensor::empty([n as i64, width as i64], (Kind::Float, ids.device()));
        let block = width.next_multiple_of(32).min(512);
        let shape =
            LaunchConfig { grid: [n, 1], block: [block, 1], shared: (2 * block + block / 32) * size_of::<i32>() };
        let numbers = [n as i64, width as i64, skipped];
        SUM.launch(shape, &[&gradients, ids, &self.first, &self.count, &sums, squares], &numbers)?;
        Ok(sums)
    }

    /// A step that the rows `ids` take now, with the summed gradients of each table that moves, and all other rows
    /// later. `moved` counts the steps in which a table moves.
    pub fn step(
        &self,
        ids: &Tensor,
        tables: &[(TableState, Option<&Tensor>, &Tensor)],
        [rate, share, skip, divisor]: [&Tensor; 4],
    ) -> Result<()> {
        for (i, (own, (numbers, sums, moved))) in self.tables.iter().zip(tables).enumerate() {
            let note = [&own.rule, rate, share, skip, moved, &own.steps, &own.now];
            NOTE.launch(LaunchConfig { grid: [1, 1], block: [1, 1], shared: 0 }, &note, &[sums.is_some().into()])?;
            let last = i + 1 == self.tables.len();
            self.step_rows(own, ids, numbers, Some((*sums, divisor)), last)?;
        }
        Ok(())
    }

    /// `now`: the summed gradients of the current step, and their divisor; without it rows only catch up.
    fn step_rows(
        &self,
        own: &DeferredTable,
        ids: &Tensor,
        numbers: &TableState,
        now: Option<(Option<&Tensor>, &Tensor)>,
        last: bool,
    ) -> Result<()> {
        let (touched, (sums, divisor)) = match now {
            Some((Some(sums), divisor)) => (1, (sums, divisor)),
            // Placeholders that the kernel does not read.
            _ => (0, (numbers.weights, numbers.weights)),
        };
        let ([weights, first, second, average], averaged) = numbers.arguments();
        let tensors = [
            ids,
            &self.first,
            &self.count,
            weights,
            first,
            second,
            average,
            &own.taken,
            &own.rule,
            &own.steps,
            &own.now,
            sums,
            divisor,
        ];
        let shape = launch_config(ids.numel(), numbers.width());
        STEP_ROWS.launch(shape, &tensors, &[numbers.width(), averaged, touched, last.into()])
    }

    /// Applies the steps that any row of any table has not taken, and clears the lists of steps.
    pub fn settle(&mut self, tables: &[TableState]) -> Result<()> {
        if self.n_waiting == 0 {
            return Ok(());
        }
        for (own, numbers) in self.tables.iter_mut().zip(tables) {
            let ([weights, first, second, average], averaged) = numbers.arguments();
            let tensors = [weights, first, second, average, &own.taken, &own.rule, &own.steps, &own.now];
            let shape = launch_config(numbers.weights.size()[0] as usize, numbers.width());
            SETTLE.launch(shape, &tensors, &[numbers.width(), averaged])?;
            let _ = own.now.f_zero_()?;
        }
        self.n_waiting = 0;
        Ok(())
    }
}

/// One block per row, with the steps in its shared memory.
fn launch_config(n_rows: usize, width: i64) -> LaunchConfig {
    let block = (width as usize).next_multiple_of(32).min(512);
    LaunchConfig { grid: [n_rows, 1], block: [block, 1], shared: (MOST * STEP) as usize * size_of::<f32>() }
}
