//! Training or evaluation, and the places in a model that draw random numbers.

use crate::libtorch::Draws;
use crate::rng::mix;
use crate::task::TaskId;

/// Whether dropout is on, and its source of random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Train(Draws),
    Eval,
}

/// A place in the model that draws random numbers; each has its own stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    UnknownWords,
    WordDropout,
    RowDropout,
    Embedding,
    /// The input of a head's layer, from 0.
    Head(u64),
    /// The output of a layer of the trunk, from 0.
    Layer(u64),
}

impl Mode {
    pub fn training(self) -> bool {
        self != Mode::Eval
    }

    /// The random stream of one site; `None` in evaluation.
    pub fn draws(self, site: Site) -> Option<Draws> {
        let number = match site {
            Site::UnknownWords => 0,
            Site::WordDropout => 1,
            Site::RowDropout => 2,
            Site::Embedding => 3,
            Site::Head(layer) => 4 + layer,
            Site::Layer(number) => 16 + number,
        };
        match self {
            Mode::Eval => None,
            Mode::Train(draws) => Some(Draws { seed: mix(draws.seed.wrapping_add(number)), ..draws }),
        }
    }

    /// With random streams for the head of `task`.
    pub fn of_head(self, task: TaskId) -> Mode {
        match self {
            Mode::Eval => Mode::Eval,
            Mode::Train(draws) => Mode::Train(Draws { seed: mix(draws.seed ^ mix(task.0 as u64 + 1)), ..draws }),
        }
    }

    /// For a part of a batch that starts at its row `first_row`.
    pub fn from_row(self, first_row: usize) -> Mode {
        match self {
            Mode::Eval => Mode::Eval,
            Mode::Train(draws) => Mode::Train(Draws { first_row: first_row as u64, ..draws }),
        }
    }
}
