//! Training or evaluation, and the places in a model that draw random numbers.

use crate::libtorch::Draws;
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
    Head(u16),
    /// The output of a layer of the trunk, from 0.
    Layer(u16),
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
            Mode::Train(draws) => Some(draws.of_site(number)),
        }
    }

    /// With random streams for the head of `task`.
    pub fn of_head(self, task: TaskId) -> Mode {
        match self {
            Mode::Eval => Mode::Eval,
            Mode::Train(draws) => Mode::Train(draws.of_head(task.0 as u64)),
        }
    }

    /// For a part of a batch that starts at its row `first_row`.
    pub fn from_row(self, first_row: usize) -> Mode {
        match self {
            Mode::Eval => Mode::Eval,
            Mode::Train(draws) => Mode::Train(draws.from_row(first_row)),
        }
    }
}
