//! Random draws in training, which are the same on the CPU and on a GPU with the kernels of `random.cu`.

use std::cell::RefCell;

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use super::cuda::functions;
use super::{Kernel, LaunchConfig, checked, sources, upload};
use crate::rng::mix;

unsafe extern "C" {
    fn pt_bernoulli(out: *mut C_tensor, seed: u64, first_row: u64, p: f64) -> *mut std::ffi::c_char;
}

/// Where random draws come from in training: each row has a random stream (Philox), so that draws do not depend on how a
/// batch is split, given by a seed and the index of the row within the whole batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draws {
    /// That of the step.
    seed: u64,
    /// Distinguish places in a model: 0 and `None` are of no head, and of no place.
    head: u64,
    site: Option<u16>,
    /// The index of the first row.
    first_row: u32,
}

impl Draws {
    pub const fn new(seed: u64) -> Draws {
        Draws { seed, head: 0, site: None, first_row: 0 }
    }

    /// Those of a head; further draws from here are of its places.
    pub fn of_head(self, head: u64) -> Draws {
        Draws { head: mix(head + 1), ..self }
    }

    pub fn of_site(self, site: u16) -> Draws {
        Draws { site: Some(site), ..self }
    }

    pub fn from_row(self, first_row: usize) -> Draws {
        Draws { first_row: first_row as u32, ..self }
    }

    /// The seed of this place.
    fn derived(self) -> u64 {
        let own = if self.head == 0 { self.seed } else { mix(self.seed ^ self.head) };
        self.site.map_or(own, |site| mix(own.wrapping_add(site.into())))
    }

    /// For kernels, which derive it themselves: first row, head in two parts, site.
    fn numbers(self) -> [i64; 4] {
        let half = |bits: u64| i64::from(bits as u32 as i32);
        [self.first_row.into(), half(self.head), half(self.head >> 32), self.site.map_or(-1, i64::from)]
    }
}

thread_local! {
    /// The last seed that this thread's kernels read, and where it lies.
    static SEED: RefCell<Option<(u64, Tensor)>> = const { RefCell::new(None) };
}

/// Runs `work`, whose draws on a GPU from `seed` read it from `place` `[1]` int64.
pub fn with_seed_at<T>(seed: u64, place: &Tensor, work: impl FnOnce() -> T) -> T {
    SEED.set(Some((seed, place.shallow_clone())));
    let done = work();
    SEED.set(None);
    done
}

fn seed_on(device: Device, seed: u64) -> Tensor {
    SEED.with_borrow_mut(|known| match known {
        Some((known, place)) if *known == seed && place.device() == device => place.shallow_clone(),
        _ => {
            let place = upload(&[seed as i64], device);
            *known = Some((seed, place.shallow_clone()));
            place
        }
    })
}

static BERNOULLI: Kernel = Kernel::new(sources::RANDOM, "bernoulli");
static DROPOUT: Kernel = Kernel::new(sources::RANDOM, "dropout");

/// Threads per block.
const BLOCK: usize = 128;

fn bits(value: f64) -> i64 {
    i64::from((value as f32).to_bits() as i32)
}

/// 1 with probability `p`, else 0, float32 `[rows, ...]`; on a GPU without kernels, libtorch's generator draws.
pub fn bernoulli(size: &[i64], p: f64, draws: Draws, device: Device) -> Tensor {
    let mut out = Tensor::empty(size, (Kind::Float, device));
    if out.numel() == 0 {
        return out;
    }
    let filled = match device {
        // SAFETY: the tensor is live, contiguous, of floats and on the CPU.
        Device::Cpu => checked(unsafe { pt_bernoulli(out.as_mut_ptr(), draws.derived(), draws.first_row.into(), p) }),
        _ if draws_alike(device) => fill(&out, p, draws, &seed_on(device, draws.seed)),
        _ => return out.bernoulli_float_(p),
    };
    filled.expect("invariant: a new tensor can be filled");
    out
}

/// Whether a device draws what the CPU does; otherwise libtorch's generator draws, from [`seed_generator`].
pub fn draws_alike(device: Device) -> bool {
    device == Device::Cpu || (BERNOULLI.serves(device) && DROPOUT.serves(device))
}

/// Seeds libtorch's generator, if it draws on `device`.
pub fn seed_generator(seed: u64, device: Device) {
    if !draws_alike(device) {
        tch::manual_seed(seed as i64);
    }
}

fn fill(out: &Tensor, p: f64, draws: Draws, seed: &Tensor) -> Result<()> {
    let rows = out.size().first().copied().unwrap_or(1);
    let width = out.numel() as i64 / rows;
    let n = (rows * (width + 3) / 4 + rows).unsigned_abs() as usize;
    let shape = LaunchConfig { grid: [n.div_ceil(BLOCK), 1], block: [BLOCK, 1], shared: 0 };
    let [first_row, low, high, site] = draws.numbers();
    BERNOULLI.launch(shape, &[seed, out], &[rows, width, first_row, low, high, site, bits(p)])
}

/// `x` [B, T, F] with a fraction `rate` of its elements, or if `locked` of each row's features, set to 0 and the others
/// scaled up. `None` if there is no kernel for it.
pub fn dropout(x: &Tensor, rate: f64, locked: bool, draws: Draws) -> Option<Tensor> {
    let fits = x.kind() == Kind::Float && x.dim() == 3 && x.numel() > 0 && x.numel() < i32::MAX as usize;
    if !fits || x.device() == Device::Cpu || !draws_alike(x.device()) {
        return None;
    }
    let (kernel, functions, seed) = (DROPOUT.handle()?, functions().ok()?, seed_on(x.device(), draws.seed));
    let [first_row, low, high, site] = draws.numbers();
    let numbers = [first_row, low, high, site, bits(1.0 - rate), bits(1.0 / (1.0 - rate)), locked.into()];
    let (x, seed, mut out) = (x.as_ptr().cast_mut(), seed.as_ptr().cast_mut(), std::ptr::null_mut());
    // SAFETY: kernel, tensors and the numbers are live; on success `out` is one new tensor.
    unsafe {
        checked((functions.dropout)(kernel, x, seed, numbers.len(), numbers.as_ptr(), &mut out))
            .expect("invariant: the kernel has these arguments");
        Some(Tensor::from_ptr(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: Device = Device::Cpu;

    fn places() -> [Draws; 3] {
        let draws = Draws::new(0x1234_5678_9abc_def0);
        [draws, draws.of_site(3).from_row(5), draws.of_head(1).of_site(17)]
    }

    #[test]
    fn a_gpu_draws_what_the_cpu_does() {
        for draws in places() {
            let seed = Tensor::from_slice(&[draws.seed as i64]);
            for width in [1, 6, 8] {
                let expected = bernoulli(&[7, width], 0.3, draws, CPU);
                let out = Tensor::full([7, width], f64::NAN, (Kind::Float, CPU));
                fill(&out, 0.3, draws, &seed).unwrap();
                assert_eq!(out, expected, "{draws:?} {width}");
            }
        }
    }

    #[test]
    fn dropout_masks_are_those_draws() {
        let (rows, width, features) = (3i64, 5i64, 6i64);
        tch::manual_seed(1);
        for draws in places() {
            let seed = Tensor::from_slice(&[draws.seed as i64]);
            for (locked, positions_first) in [(false, false), (false, true), (true, false), (true, true)] {
                let size = if positions_first { [width, rows, features] } else { [rows, width, features] };
                let x = Tensor::randn(size, (Kind::Float, CPU));
                let y = x.full_like(f64::NAN);
                let strides = if positions_first { [features, rows * features] } else { [width * features, features] };
                let [first_row, low, high, site] = draws.numbers();
                let numbers = [rows, width, features, strides[0], strides[1], first_row, low, high, site];
                let numbers = [&numbers[..], &[bits(0.75), bits(4.0 / 3.0), locked.into()]].concat();
                let shape = LaunchConfig { grid: [1, 1], block: [96, 1], shared: 0 };
                DROPOUT.launch(shape, &[&x, &seed, &y], &numbers).unwrap();
                let shared = if locked { 1 } else { width };
                let mask = bernoulli(&[rows, shared, features], 0.75, draws, CPU);
                let mask = if positions_first { mask.transpose(0, 1) } else { mask };
                assert!(y.allclose(&(&x * mask * (4.0 / 3.0)), 1e-6, 0.0, false), "{draws:?} {locked}");
            }
        }
    }

    #[test]
    fn rows_heads_and_places_draw_by_themselves() {
        let drawn = |draws| bernoulli(&[2, 64], 0.5, draws, CPU);
        let [all, site, head] = places();
        assert_eq!(drawn(all.from_row(1)).get(0), drawn(all).get(1));
        for (a, b) in [(all, site), (all, head), (site, head), (all, Draws::new(1))] {
            assert_ne!(drawn(a), drawn(b));
        }
    }
}
