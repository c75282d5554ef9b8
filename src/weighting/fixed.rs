//! w_i = 1 (equal), or w_i = T g_i / sum g for weights g given in the experiment file (fixed).

use tch::{Device, Kind, Tensor};

use super::{FixedConfig, LossWeighting, Present, WeightedTask, vector};

pub struct Fixed(Tensor);

impl Fixed {
    pub fn equal(n: usize, device: Device) -> Self {
        Fixed(Tensor::ones([n as i64], (Kind::Double, device)))
    }

    /// A task that the file omits has weight 1 before scaling; the caller checks the file.
    pub fn new(config: &FixedConfig, tasks: &[WeightedTask], device: Device) -> Self {
        let given = tasks.iter().map(|task| config.weights.get(&task.name).copied().unwrap_or(1.0));
        let given: Vec<f64> = given.collect();
        let scale = tasks.len() as f64 / given.iter().sum::<f64>();
        Fixed(vector(&given, device) * scale)
    }
}

impl LossWeighting for Fixed {
    fn learns(&self) -> bool {
        false
    }

    fn constant(&self) -> bool {
        true
    }

    fn weights(&self, _: &Present, _: Option<&Tensor>) -> Tensor {
        self.0.shallow_clone()
    }
}
