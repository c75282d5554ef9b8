//! Updates of whole parameters on a GPU by the kernels of `src/libtorch/optimizer.cu`: one launch for up to [`LISTED`]
//! parameters, including their averages and 16-bit copies.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::libtorch::{Kernel, LISTED, LaunchConfig, Listed, sources, upload};

/// Elements per block of threads, and threads per block.
const PIECE: usize = 1024;
const BLOCK: usize = 256;
/// Fields of the kernel's `Piece`.
const FIELDS: i64 = 11;

static SQUARES: Kernel = Kernel::new(sources::OPTIMIZER, "squares");
static UPDATE: Kernel = Kernel::new(sources::OPTIMIZER, "update");

/// A parameter to update. Its tensors are contiguous, never moved, and float32 except for `half`.
pub struct Parameter<'a> {
    pub number: usize,
    pub weights: &'a Tensor,
    pub first: &'a Tensor,
    /// Empty for SGD.
    pub second: &'a Tensor,
    pub average: Option<&'a Tensor>,
    /// A copy of the weights in 16 bits, by which gradients are taken; its rows may be longer than those of the weights.
    pub half: Option<&'a Tensor>,
    /// Its number of steps.
    pub step: &'a Tensor,
    pub decays: bool,
}

pub struct Dense {
    groups: Vec<Group>,
    rule: Tensor,
}

/// The parameters of one launch.
struct Group {
    numbers: Vec<usize>,
    /// The kernel's `Piece`s, [n, FIELDS].
    pieces: Tensor,
}

impl Dense {
    /// Whether the kernels are available.
    pub fn serves(device: Device) -> bool {
        SQUARES.serves(device) && UPDATE.serves(device)
    }

    /// `rule` is the kernel's `Rule`.
    pub fn new(parameters: &[Parameter], rule: &[f64], device: Device) -> Self {
        let group = |parameters: &[Parameter]| {
            let pieces: Vec<i64> =
                parameters.iter().enumerate().flat_map(|(i, parameter)| parameter.pieces(i as i64)).collect();
            let pieces = upload(&pieces, device).view([-1, FIELDS]);
            Group { numbers: parameters.iter().map(|parameter| parameter.number).collect(), pieces }
        };
        Dense { groups: parameters.chunks(LISTED).map(group).collect(), rule: upload(rule, device) }
    }

    pub fn n_pieces(&self) -> i64 {
        self.groups.iter().map(|group| group.pieces.size()[0]).sum()
    }

    /// The numbers of the parameters that it updates.
    pub fn numbers(&self) -> impl Iterator<Item = usize> {
        self.groups.iter().flat_map(|group| group.numbers.iter().copied())
    }

    /// Writes partial sums of the squares of the parameters' `gradients` into `sums` `[n_pieces]`.
    pub fn squares(&self, gradients: &[Tensor], sums: &Tensor) -> Result<()> {
        let (shape, mut start) = (launch_config(BLOCK * size_of::<f32>()), 0);
        for group in &self.groups {
            let (n, (_own, list, halves)) = (group.pieces.size()[0], group.of(gradients)?);
            let sums = sums.narrow(0, start, n);
            SQUARES.launch_with(shape(n), &[&group.pieces, &sums], &[halves], Some(&list))?;
            start += n;
        }
        Ok(())
    }

    /// One step of all parameters that have a gradient, `divisor` times too large, unless `skip` is 1; their step
    /// counts include it already. The averages take in the weights in any case.
    pub fn update(&self, gradients: &[Tensor], [rate, share, skip, divisor]: [&Tensor; 4]) -> Result<()> {
        let shape = launch_config(8 * size_of::<f32>());
        for group in &self.groups {
            let (_own, list, halves) = group.of(gradients)?;
            let tensors = [&group.pieces, &self.rule, rate, share, skip, divisor];
            UPDATE.launch_with(shape(group.pieces.size()[0]), &tensors, &[halves], Some(&list))?;
        }
        Ok(())
    }
}

fn launch_config(shared: usize) -> impl Fn(i64) -> LaunchConfig {
    move |n_pieces| LaunchConfig { grid: [n_pieces as usize, 1], block: [BLOCK, 1], shared }
}

impl Group {
    /// This group's gradients, which must live until they are read, their addresses, and whether some are in 16 bits.
    fn of(&self, gradients: &[Tensor]) -> Result<(Vec<Tensor>, Listed, i64)> {
        let own = |&number: &usize| match gradients.get(number).filter(|gradient| gradient.defined()) {
            Some(gradient) => gradient.contiguous(),
            None => Tensor::new(),
        };
        let own: Vec<Tensor> = self.numbers.iter().map(own).collect();
        let halves = own.iter().any(|gradient| gradient.defined() && gradient.kind() != Kind::Float);
        let list = Listed::of(&own.iter().collect::<Vec<_>>())?;
        Ok((own, list, halves.into()))
    }
}

impl Parameter<'_> {
    /// The parameter's pieces; its gradient is at `place` of the list.
    fn pieces(&self, place: i64) -> Vec<i64> {
        let n = self.weights.numel();
        let at = |tensor: &Tensor, i: usize| tensor.data_ptr() as i64 + (i * tensor.kind().elt_size_in_bytes()) as i64;
        // Lengths of the runs that are contiguous in the weights and in the copy: all of it, or a row.
        let (run, copied) = match self.half.filter(|half| half.numel() != n) {
            Some(half) => (self.weights.size()[1] as usize, half.size()[1] as usize),
            None => (n, n),
        };
        let piece = |row: usize, column: usize| {
            let (start, in_copy) = (row * run + column, row * copied + column);
            let address = |tensor: &Tensor| if tensor.numel() == n { at(tensor, start) } else { 0 };
            [
                place,
                in_copy as i64,
                PIECE.min(run - column) as i64,
                address(self.weights),
                address(self.first),
                address(self.second),
                self.average.map_or(0, address),
                self.half.map_or(0, |half| at(half, in_copy)),
                self.step.data_ptr() as i64,
                self.decays.into(),
                self.half.is_some_and(|half| half.kind() == Kind::BFloat16).into(),
            ]
        };
        let row = |row: usize| (0..run).step_by(PIECE).flat_map(move |column| piece(row, column));
        (0..n.checked_div(run).unwrap_or(0)).flat_map(row).collect()
    }
}
