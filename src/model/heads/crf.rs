//! A linear-chain conditional random field (Lafferty 2001) over word tags.
//!
//! score(y | x) = start[y_1] + sum_t x[t, y_t] + sum_t transitions[y_t-1, y_t] + end[y_n]
//! loss = sum over sentences of log Z(x) - score(y | x), log Z by the forward algorithm.
//!
//! The gradient is computed analytically, without autograd: d loss / d x[t, c] = p(y_t = c) - [y_t = c], and likewise
//! for transitions, from one forward-backward pass in float64: on the CPU `src/libtorch/crf.cpp`, on a GPU the kernels of
//! `src/libtorch/crf.cu`. Where neither serves, tensor operators do the same, word by word, with a running maximum so that
//! exp never overflows.
//!
//! b sentences, W words, C tags.

mod decode;
mod export;
mod kernels;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::data::labels::NO_LABEL;
use crate::libtorch::{crf_loss, with_gradients};
use crate::model::parameters::Scope;

/// Score of a forbidden tag or transition; its exp is 0.
const FORBIDDEN: f64 = -1e4;

pub struct Crf {
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    /// [C, C] and [C]: 0 or [`FORBIDDEN`], added to transitions and start.
    constraints: Option<(Tensor, Tensor)>,
}

/// log Z of each sentence `[b]`, and for the gradient p(y_t = c) [b, W, C] and the expected count of each transition
/// over the batch [C, C]. All float64.
struct Inference {
    log_z: Tensor,
    marginals: Tensor,
    pairs: Tensor,
}

/// The summed negative log-likelihood of a batch and its gradients, each with the data type of its tensor.
struct Loss {
    value: Tensor,
    to_x: Tensor,
    to_transitions: Tensor,
    to_start: Tensor,
    to_end: Tensor,
}

/// alpha'_j = log sum_i exp(alpha_i + log step_ij): [b, C].
fn advance(alpha: &Tensor, step: &Tensor) -> Tensor {
    let max = alpha.amax([-1], true);
    (alpha - &max).exp().matmul(step).log() + max
}

impl Crf {
    /// `labels` are BIO tags when `constrained`.
    pub fn new(mut scope: Scope, labels: &[String], constrained: bool) -> Self {
        let n = labels.len() as i64;
        let constraints = constrained.then(|| {
            let device = scope.device();
            let follows = |previous: &str, tag: &str| match tag.strip_prefix("I-") {
                Some(kind) => previous.split_once('-').is_some_and(|(_, before)| before == kind),
                None => true,
            };
            let scores = |allowed: Vec<bool>| {
                let scores: Vec<f32> = allowed.iter().map(|ok| if *ok { 0.0 } else { FORBIDDEN as f32 }).collect();
                Tensor::from_slice(&scores).to_device(device)
            };
            let pairs = labels.iter().flat_map(|previous| labels.iter().map(move |tag| follows(previous, tag)));
            (scores(pairs.collect()).view([n, n]), scores(labels.iter().map(|tag| follows("O", tag)).collect()))
        });
        Crf {
            transitions: scope.uniform("transitions", &[n, n], 0.1),
            start: scope.uniform("start", &[n], 0.1),
            end: scope.uniform("end", &[n], 0.1),
            constraints,
        }
    }

    /// Transitions [C, C], start [C] and end [C], constraints included, float64, without gradient.
    fn scores(&self) -> (Tensor, Tensor, Tensor) {
        let double = |x: &Tensor| x.detach().to_kind(Kind::Double);
        let (transitions, start) = (double(&self.transitions), double(&self.start));
        let (transitions, start) = match &self.constraints {
            Some((pairs, first)) => (transitions + double(pairs), start + double(first)),
            None => (transitions, start),
        };
        (transitions, start, double(&self.end))
    }

    /// Forward-backward over `x` [b, W, C]; `mask` [b, W] is true on words.
    fn infer(&self, x: &Tensor, mask: &Tensor) -> Inference {
        let (transitions, start, end) = self.scores();
        let x = x.detach().to_kind(Kind::Double);
        let n_words = x.size()[1];
        let (step, step_back) = (transitions.exp(), transitions.exp().tr());
        let word = |t: i64| (x.select(1, t), mask.select(1, t).unsqueeze(-1)); // [b, C], [b, 1]

        // alpha_t(c): log-sum of all paths that end in tag c at word t; a finished row keeps its last value.
        let mut alphas = vec![start + x.select(1, 0)];
        for t in 1..n_words {
            let ((x_t, on), before) = (word(t), &alphas[t as usize - 1]);
            alphas.push((advance(before, &step) + x_t).where_self(&on, before));
        }
        let log_z = (&alphas[n_words as usize - 1] + &end).logsumexp([-1], false); // [b]

        // beta_t(c): log-sum of all continuations from tag c at word t.
        let mut betas = vec![end.expand_as(&alphas[0])];
        for t in 1..n_words {
            let ((x_t, on), after) = (word(n_words - t), &betas[t as usize - 1]);
            betas.push(advance(&(x_t + after), &step_back).where_self(&on, after));
        }
        betas.reverse();

        let (alphas, betas) = (Tensor::stack(&alphas, 1), Tensor::stack(&betas, 1)); // [b, W, C]
        let on = mask.to_kind(Kind::Double).unsqueeze(-1);
        let log_z_of_word = log_z.view([-1, 1, 1]);
        let marginals = (&alphas + &betas - &log_z_of_word).exp() * &on;
        // E[i, j] = sum exp(alpha_i + transitions_ij + ahead_j - log Z), each factor scaled by its maximum.
        let (before, ahead) = (alphas.narrow(1, 0, n_words - 1), (x + betas).narrow(1, 1, n_words - 1));
        let (low, high) = (before.amax([-1], true), ahead.amax([-1], true));
        // Limited, so that exp stays finite where a forbidden transition joins the best tags of both sides.
        let scale = (&low + &high - log_z_of_word).clamp_max(700.0).exp() * on.narrow(1, 1, n_words - 1);
        let left = ((before - low).exp() * scale).flatten(0, 1); // [b * (W - 1), C]
        let pairs = left.tr().matmul(&(ahead - high).exp().flatten(0, 1)) * step;
        Inference { log_z, marginals, pairs }
    }

    /// The summed negative log-likelihood of `labels` [b, W] (-1 beyond a sentence's end) under `x` [b, W, C], in nats:
    /// a scalar with gradients to `x` and to the CRF's parameters.
    pub fn negative_log_likelihood(&self, x: &Tensor, labels: &Tensor) -> Tensor {
        let loss = tch::no_grad(|| {
            if kernels::serve(x) {
                return self.loss_by_kernels(x, labels);
            }
            Ok(self.loss_on_host(x, labels)?.unwrap_or_else(|| self.loss_by_operators(x, labels)))
        });
        let known = |loss: Loss| {
            let known = [
                (x, &loss.to_x),
                (&self.transitions, &loss.to_transitions),
                (&self.start, &loss.to_start),
                (&self.end, &loss.to_end),
            ];
            with_gradients(&loss.value, &known)
        };
        loss.and_then(known).expect("invariant: the shapes are those of the head")
    }

    /// `None` on a GPU, and if probabilities are too far apart.
    fn loss_on_host(&self, x: &Tensor, labels: &Tensor) -> Result<Option<Loss>> {
        if x.device() != Device::Cpu || x.kind() != Kind::Float {
            return Ok(None);
        }
        let (transitions, start, end) = self.scores();
        let found = crf_loss(&x.detach(), labels, [&transitions, &start, &end])?;
        let float = |x: Tensor| x.to_kind(Kind::Float);
        Ok(found.map(|found| Loss {
            value: Tensor::from(found.value as f32),
            to_x: found.to_x,
            to_transitions: float(found.to_transitions),
            to_start: float(found.to_start),
            to_end: float(found.to_end),
        }))
    }

    fn loss_by_operators(&self, x: &Tensor, labels: &Tensor) -> Loss {
        let mask = labels.not_equal(NO_LABEL as i64);
        let inference = self.infer(x, &mask);
        let n_tags = x.size()[2];
        let on = mask.to_kind(Kind::Double);
        let gold = labels.clamp_min(0).one_hot(n_tags).to_kind(Kind::Double) * on.unsqueeze(-1); // [b, W, C]
        let after = |x: &Tensor| x.narrow(1, 1, x.size()[1] - 1).flatten(0, 1); // [b*(W-1), C]
        let before = |x: &Tensor| x.narrow(1, 0, x.size()[1] - 1).flatten(0, 1);
        let gold_pairs = before(&gold).tr().matmul(&after(&gold)); // [C, C]

        // Marks the last word of each row: on here, off at the next position.
        let next = Tensor::cat(&[on.narrow(1, 1, on.size()[1] - 1), on.narrow(1, 0, 1).zeros_like()], 1);
        let last = (&on - next).unsqueeze(-1); // [b, W, 1]
        let sum = |x: &Tensor| x.sum_dim_intlist([0, 1].as_slice(), false, Kind::Double); // [C]
        let first_of = |x: &Tensor| x.select(1, 0).sum_dim_intlist([0].as_slice(), false, Kind::Double);
        let (gold_first, gold_last) = (first_of(&gold), sum(&(&gold * &last)));

        let (transitions, start, end) = self.scores();
        let score = (x.detach().to_kind(Kind::Double) * &gold).sum(Kind::Double)
            + (&transitions * &gold_pairs).sum(Kind::Double)
            + (start * &gold_first).sum(Kind::Double)
            + (end * &gold_last).sum(Kind::Double);
        let value = inference.log_z.sum(Kind::Double) - score;
        let float = |x: Tensor| x.to_kind(self.transitions.kind());
        Loss {
            value: float(value),
            to_x: (&inference.marginals - gold).to_kind(x.kind()),
            to_transitions: float(inference.pairs - gold_pairs),
            to_start: float(first_of(&inference.marginals) - gold_first),
            to_end: float(sum(&(&inference.marginals * last)) - gold_last),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Parameters;

    fn crf(labels: &[&str], constrained: bool) -> (Crf, Parameters) {
        let mut parameters = Parameters::new(Device::Cpu);
        tch::manual_seed(3);
        let labels: Vec<String> = labels.iter().map(|label| label.to_string()).collect();
        let crf = Crf::new(parameters.root(), &labels, constrained);
        for tensor in parameters.tensors() {
            let _ = tch::no_grad(|| tensor.shallow_clone().normal_(0.0, 1.0));
        }
        (crf, parameters)
    }

    /// Every path of one sentence with its score, in plain float64 loops.
    fn paths(crf: &Crf, x: &Tensor) -> Vec<(Vec<usize>, f64)> {
        let (transitions, start, end) = crf.scores();
        let (n, c) = (x.size()[0] as usize, x.size()[1] as usize);
        let mut all = Vec::new();
        for code in 0..c.pow(n as u32) {
            let path: Vec<usize> = (0..n).map(|t| code / c.pow(t as u32) % c).collect();
            let mut score = start.double_value(&[path[0] as i64]) + end.double_value(&[path[n - 1] as i64]);
            for t in 0..n {
                score += x.double_value(&[t as i64, path[t] as i64]);
                if t > 0 {
                    score += transitions.double_value(&[path[t - 1] as i64, path[t] as i64]);
                }
            }
            all.push((path, score));
        }
        all
    }

    fn check_against_enumeration(constrained: bool, scale: f64) {
        let (crf, _) = crf(&["O", "B-a", "I-a", "B-b", "I-b"], constrained);
        let lengths = [4i64, 1, 3];
        let x = Tensor::randn([3, 4, 5], (Kind::Float, Device::Cpu)) * scale;
        let labels = Tensor::from_slice(&[1i64, 2, 0, 3, 0, -1, -1, -1, 3, 4, 0, -1]).view([3, 4]);
        let mut expected = 0.0;
        let decoded = crf.decode(&x, &lengths);
        for (b, &n) in lengths.iter().enumerate() {
            let all = paths(&crf, &x.get(b as i64).narrow(0, 0, n));
            let top = all.iter().map(|(_, score)| *score).fold(f64::MIN, f64::max);
            let log_z = top + all.iter().map(|(_, score)| (score - top).exp()).sum::<f64>().ln();
            let gold: Vec<usize> = (0..n).map(|t| labels.int64_value(&[b as i64, t]) as usize).collect();
            expected += log_z - all.iter().find(|(path, _)| *path == gold).unwrap().1;
            let best = all.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
            assert_eq!(decoded[b].labels, best.0, "Viterbi finds the best of all paths");
            for (t, &score) in decoded[b].scores.iter().enumerate() {
                let through = all.iter().filter(|(path, _)| path[t] == best.0[t]);
                let marginal: f64 = through.map(|(_, score)| (score - log_z).exp()).sum();
                assert!((marginal - score as f64).abs() < 1e-5);
            }
        }
        let loss = crf.negative_log_likelihood(&x, &labels).double_value(&[]);
        assert!((loss - expected).abs() < 1e-5 * expected.abs().max(1.0), "{loss} is not {expected}");
    }

    #[test]
    fn loss_marginals_and_best_path_agree_with_enumeration() {
        check_against_enumeration(false, 1.0);
        check_against_enumeration(true, 1.0);
        check_against_enumeration(false, 30.0);
    }

    #[test]
    fn written_gradients_are_those_of_the_loss() {
        let (crf, parameters) = crf(&["O", "B-a", "I-a"], true);
        let labels = Tensor::from_slice(&[1i64, 2, 0, 0, 1, -1]).view([2, 3]);
        let x = Tensor::randn([2, 3, 3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let mut inputs = parameters.tensors();
        inputs.push(&x);
        let gradients = Tensor::run_backward(&[crf.negative_log_likelihood(&x, &labels)], &inputs, false, false);
        // Central differences of a float32 loss: an error of about 1e-7 / 1e-2 each way.
        let step = 1e-2;
        for (input, gradient) in inputs.iter().zip(&gradients) {
            for i in 0..input.numel() as i64 {
                let value = |by: f64| {
                    tch::no_grad(|| {
                        let _ = input.view([-1]).get(i).g_add_scalar_(by);
                        let loss = crf.negative_log_likelihood(&x, &labels).double_value(&[]);
                        let _ = input.view([-1]).get(i).g_add_scalar_(-by);
                        loss
                    })
                };
                let numeric = (value(step) - value(-step)) / (2.0 * step);
                let analytic = gradient.view([-1]).double_value(&[i]);
                assert!((numeric - analytic).abs() < 2e-3, "{numeric} is not {analytic}");
            }
        }
    }

    #[test]
    fn kernels_and_the_cpu_compute_what_operators_do() {
        for (labels, constrained) in [(vec!["O", "B-a", "I-a", "B-b", "I-b"], true), (vec!["a"; 35], false)] {
            let (crf, _) = crf(&labels, constrained);
            let n_tags = labels.len() as i64;
            let lengths = Tensor::from_slice(&[6i64, 1, 0, 4]).unsqueeze(1);
            let on = Tensor::arange(6, (Kind::Int64, Device::Cpu)).unsqueeze(0).less_tensor(&lengths);
            let gold = Tensor::randint(n_tags, [4, 6], (Kind::Int64, Device::Cpu));
            let gold = gold.where_self(&on, &gold.full_like(i64::from(NO_LABEL)));
            for scale in [1.0, 30.0] {
                // Sentences first in memory, or words.
                let x = match scale {
                    1.0 => Tensor::randn([4, 6, n_tags], (Kind::Float, Device::Cpu)),
                    _ => Tensor::randn([6, 4, n_tags], (Kind::Float, Device::Cpu)).transpose(0, 1) * scale,
                };
                let (ours, theirs) = tch::no_grad(|| {
                    // The operators do not support rows without words.
                    let rows = Tensor::from_slice(&[0i64, 1, 3]);
                    let some = |x: &Tensor| x.index_select(0, &rows);
                    let on_host = crf.loss_on_host(&x, &gold).unwrap().unwrap();
                    ([crf.loss_by_kernels(&x, &gold).unwrap(), on_host], crf.loss_by_operators(&some(&x), &some(&gold)))
                });
                let check = |name: &str, a: &Tensor, b: &Tensor| {
                    assert!(a.allclose(b, 1e-5, 1e-5, false), "{name} of {n_tags} tags at {scale}");
                };
                for ours in ours {
                    check("loss", &ours.value, &theirs.value);
                    check("emissions", &ours.to_x.index_select(0, &Tensor::from_slice(&[0i64, 1, 3])), &theirs.to_x);
                    check("no word", &ours.to_x.get(2), &ours.to_x.get(2).zeros_like());
                    check("transitions", &ours.to_transitions, &theirs.to_transitions);
                    check("start", &ours.to_start, &theirs.to_start);
                    check("end", &ours.to_end, &theirs.to_end);
                }
            }
        }
    }

    #[test]
    fn constraints_hold_whatever_the_logits_say() {
        let (crf, _) = crf(&["O", "B-a", "I-a", "B-b", "I-b"], true);
        let x = Tensor::randn([20, 6, 5], (Kind::Float, Device::Cpu)) * 20.0;
        for decoded in crf.decode(&x, &[6; 20]) {
            let mut previous = 0;
            for tag in decoded.labels {
                assert!(tag != 2 || previous == 1 || previous == 2);
                assert!(tag != 4 || previous == 3 || previous == 4);
                previous = tag;
            }
        }
    }
}
