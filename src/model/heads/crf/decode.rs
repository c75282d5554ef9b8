//! The best sequence (Viterbi) and the marginal probability of each of its tags (forward-backward), on the host.
//! Sentences are distributed over all threads, which is faster than tensor operators in a loop over words.

use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::Crf;
use crate::model::heads::Decoded;

/// Transitions [C, C] row by row, start [C] and end [C].
struct Scores {
    transitions: Vec<f32>,
    start: Vec<f32>,
    end: Vec<f32>,
    /// exp of the transitions minus their maximum, and its transpose.
    steps: Vec<f64>,
    steps_back: Vec<f64>,
}

fn floats(x: &Tensor) -> Vec<f32> {
    Vec::try_from(x.to_kind(Kind::Float).flatten(0, -1)).expect("invariant: dense floats")
}

impl Crf {
    /// The best sequence of each row of `x` [b, W, C] (Viterbi), with each tag's marginal probability; `lengths` in words.
    pub fn decode(&self, x: &Tensor, lengths: &[i64]) -> Vec<Decoded> {
        let (transitions, start, end) = tch::no_grad(|| self.scores());
        let steps = |x: &Tensor| -> Vec<f64> {
            // Subtracting the maximum scales all paths of one length alike and changes no probability.
            Vec::try_from((x - x.max()).exp().flatten(0, -1)).expect("invariant: dense numbers")
        };
        let scores = Scores {
            steps: steps(&transitions),
            steps_back: steps(&transitions.tr().contiguous()),
            transitions: floats(&transitions),
            start: floats(&start),
            end: floats(&end),
        };
        let (width, n_tags) = (x.size()[1] as usize, scores.start.len());
        let x = floats(&x.detach());
        let row = |(b, &n): (usize, &i64)| {
            let x = &x[b * width * n_tags..][..n as usize * n_tags];
            let labels = viterbi(x, &scores);
            let scores = marginals(x, &labels, &scores);
            Decoded { labels, scores, distribution: Vec::new() }
        };
        lengths.par_iter().enumerate().map(row).collect()
    }
}

/// The best path through one sentence, `x` [n, C]. Ties go to the lower tag.
fn viterbi(x: &[f32], scores: &Scores) -> Vec<usize> {
    let n_tags = scores.start.len();
    let mut best: Vec<f32> = scores.start.iter().zip(x).map(|(a, b)| a + b).collect();
    let mut back: Vec<u32> = Vec::with_capacity(x.len());
    let mut next = vec![0.0; n_tags];
    let mut from = vec![0u32; n_tags];
    for here in x.chunks_exact(n_tags).skip(1) {
        next.fill(f32::NEG_INFINITY);
        from.fill(0);
        for (i, (&score, steps)) in best.iter().zip(scores.transitions.chunks_exact(n_tags)).enumerate() {
            // Selects instead of branches: this is the hot loop.
            for ((next, from), step) in next.iter_mut().zip(&mut from).zip(steps) {
                let better = score + step > *next;
                *next = if better { score + step } else { *next };
                *from = if better { i as u32 } else { *from };
            }
        }
        for ((best, next), here) in best.iter_mut().zip(&next).zip(here) {
            *best = next + here;
        }
        back.extend(&from);
    }
    let total = best.iter().zip(&scores.end).map(|(a, b)| a + b);
    let (mut tag, _) = total.enumerate().fold(
        (0, f32::NEG_INFINITY),
        |(at, top), (i, score)| {
            if score > top { (i, score) } else { (at, top) }
        },
    );
    let mut path = vec![tag];
    for from in back.chunks_exact(n_tags).rev() {
        tag = from[tag] as usize;
        path.push(tag);
    }
    path.reverse();
    path
}

/// exp(v - max v) for v_i = x_i + `of`(i), at least 1e-280 so that a path remains however far apart scores are.
fn weights(x: &[f32], of: impl Fn(usize) -> f32) -> Vec<f64> {
    let values: Vec<f64> = x.iter().enumerate().map(|(i, x)| f64::from(x + of(i))).collect();
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    values.into_iter().map(|value| (value - max).exp().max(1e-280)).collect()
}

/// vector' = (vector steps) * weights, scaled to sum 1.
fn advance(vector: &[f64], steps: &[f64], weights: &[f64]) -> Vec<f64> {
    let n = vector.len();
    let mut out = vec![0.0; n];
    for (&from, steps) in vector.iter().zip(steps.chunks_exact(n)) {
        for (out, step) in out.iter_mut().zip(steps) {
            *out += from * step;
        }
    }
    for (out, weight) in out.iter_mut().zip(weights) {
        *out *= weight;
    }
    let sum: f64 = out.iter().sum();
    out.iter_mut().for_each(|value| *value /= sum);
    out
}

/// The marginal probability of each of `labels`.
fn marginals(x: &[f32], labels: &[usize], scores: &Scores) -> Vec<f32> {
    let n_tags = scores.start.len();
    let words: Vec<&[f32]> = x.chunks_exact(n_tags).collect();
    let mut alphas = vec![weights(words[0], |i| scores.start[i])];
    let here: Vec<Vec<f64>> = words.iter().map(|x| weights(x, |_| 0.0)).collect();
    for t in 1..words.len() {
        alphas.push(advance(&alphas[t - 1], &scores.steps, &here[t]));
    }
    // beta_t(c): the weight of all continuations from tag c at word t.
    let ones = vec![1.0; n_tags];
    let mut beta = weights(&scores.end, |_| 0.0);
    let mut out = vec![0.0; words.len()];
    for t in (0..words.len()).rev() {
        let total: f64 = alphas[t].iter().zip(&beta).map(|(a, b)| a * b).sum();
        out[t] = (alphas[t][labels[t]] * beta[labels[t]] / total) as f32;
        let ahead: Vec<f64> = beta.iter().zip(&here[t]).map(|(b, w)| b * w).collect();
        beta = advance(&ahead, &scores.steps_back, &ones);
    }
    out
}
