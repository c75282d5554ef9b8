//! w_i = 1, times the task's priority. The baseline that every other strategy has to beat.

use super::fixed::Fixed;

pub fn equal(priorities: &[f64]) -> Fixed {
    Fixed { weights: priorities.to_vec() }
}
