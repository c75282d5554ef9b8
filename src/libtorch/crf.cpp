// The CRF's forward-backward pass on the CPU, sentence by sentence: src/model/heads/crf.rs does the same with operators, word
// by word, in the domain of logarithms. Here probabilities are scaled to sum to 1 at each word instead (Rabiner 1989, section
// V.A), which takes an exp per word and tag, and no logarithm.
#include "guarded.h"
#include "vectorized.h"

#include <ATen/ops/amax.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <numeric>
#include <vector>

namespace {

// out = row vector x [n] times matrix [n, n]; four rows at a time, so that `out` is read less often.
VECTORIZED void times(double* out, const double* x, const double* matrix, int64_t n) {
  int64_t i = 0;
  for (int64_t c = 0; c < n; c++) out[c] = 0;
  for (; i + 4 <= n; i += 4) {
    const double *m = matrix + i * n, a = x[i], b = x[i + 1], d = x[i + 2], e = x[i + 3];
    for (int64_t c = 0; c < n; c++) out[c] += (a * m[c] + b * m[n + c]) + (d * m[2 * n + c] + e * m[3 * n + c]);
  }
  for (; i < n; i++) {
    for (int64_t c = 0; c < n; c++) out[c] += x[i] * matrix[i * n + c];
  }
}

// out = x * y * factor, element by element.
VECTORIZED void multiply(double* out, const double* x, const double* y, double factor, int64_t n) {
  for (int64_t c = 0; c < n; c++) out[c] = x[c] * y[c] * factor;
}

double dot(const double* x, const double* y, int64_t n) { return std::inner_product(x, x + n, y, 0.0); }

// Beyond these the scaled numbers may have lost a path: the caller computes with logarithms instead.
constexpr double LEAST = 1e-200, MOST = 1e200;

}  // namespace

extern "C" {

// x [b, W, C] float32 and labels [b, W] int64, -1 beyond a sentence's end, contiguous; transitions [C, C], start [C] and end [C]
// float64. Outputs: to_x like x, to_transitions, to_start and to_end like theirs: the gradients of `value`, the summed negative
// log-likelihood, a float64. `sound` is false where probabilities are too small for this way; the outputs are undefined then.
char* pt_crf(
    Handle x, Handle labels, Handle transitions, Handle start, Handle end, Handle to_x, Handle to_transitions, Handle to_start,
    Handle to_end, double* value, bool* sound) {
  return guarded([&] {
    c10::NoGradGuard no_grad;
    auto n_rows = x->size(0), n_words = x->size(1), C = x->size(2);
    auto numbers = x->to(at::kDouble);
    auto largest = at::amax(numbers, -1, true);
    auto weights = numbers.sub_(largest).exp_();  // [b, W, C]
    auto step = transitions->exp(), step_back = step.t().contiguous(), first = start->exp(), last = end->exp();
    // Of each word, by tag: the probability of the words so far; and the factors by which transitions into it are expected, by the
    // tag before and its own.
    std::vector<double> alpha(n_words * C), beta(C), scales(n_words);
    auto left = at::zeros({n_rows * n_words, C}, weights.options()), right = at::zeros_like(left);
    auto *log_step = transitions->data_ptr<double>(), *log_first = start->data_ptr<double>(), *log_last = end->data_ptr<double>();
    auto *ways = step.data_ptr<double>(), *ways_back = step_back.data_ptr<double>();
    auto *begins = first.data_ptr<double>(), *ends = last.data_ptr<double>();
    auto* of_x = to_x->data_ptr<float>();
    auto* of_transitions = to_transitions->data_ptr<double>();
    auto *of_start = to_start->data_ptr<double>(), *of_end = to_end->data_ptr<double>();
    to_x->zero_(), to_transitions->zero_(), to_start->zero_(), to_end->zero_();
    *value = 0, *sound = true;
    for (int64_t row = 0; row < n_rows; row++) {
      auto* gold = labels->data_ptr<int64_t>() + row * n_words;
      auto* word = weights.data_ptr<double>() + row * n_words * C;
      auto* most = largest.data_ptr<double>() + row * n_words;
      auto *own_left = left.data_ptr<double>() + row * n_words * C, *own_right = right.data_ptr<double>() + row * n_words * C;
      auto* logits = x->data_ptr<float>() + row * n_words * C;
      auto* gradient = of_x + row * n_words * C;
      int64_t n = 0;
      while (n < n_words && gold[n] >= 0) n++;
      if (n == 0) continue;

      double log_z = 0, score = log_first[gold[0]] + log_last[gold[n - 1]];
      for (int64_t t = 0; t < n; t++) {
        auto* here = alpha.data() + t * C;
        score += logits[t * C + gold[t]];
        if (t > 0) {
          score += log_step[gold[t - 1] * C + gold[t]];
          of_transitions[gold[t - 1] * C + gold[t]] -= 1;
          std::copy(here - C, here, own_left + t * C);
          times(beta.data(), here - C, ways, C);
        }
        auto* before = t > 0 ? beta.data() : begins;
        scales[t] = dot(before, word + t * C, C);
        // Also where it is NaN.
        if (!(scales[t] > LEAST)) return void(*sound = false);
        multiply(here, before, word + t * C, 1 / scales[t], C);
        log_z += most[t] + std::log(scales[t]);
      }
      auto all = dot(alpha.data() + (n - 1) * C, ends, C);
      if (!(all > LEAST)) return void(*sound = false);
      *value += log_z + std::log(all) - score;

      for (int64_t c = 0; c < C; c++) beta[c] = ends[c] / all;
      for (int64_t t = n - 1; t >= 0; t--) {
        bool small = true;
        for (int64_t c = 0; c < C; c++) {
          auto probability = alpha[t * C + c] * beta[c];
          auto off = probability - (gold[t] == c);
          gradient[t * C + c] = static_cast<float>(off);
          if (t == 0) of_start[c] += off;
          if (t == n - 1) of_end[c] += off;
          // Not where it is NaN.
          small &= beta[c] / scales[t] < MOST;
        }
        if (!small) return void(*sound = false);
        if (t == 0) break;
        multiply(own_right + t * C, word + t * C, beta.data(), 1 / scales[t], C);
        times(beta.data(), own_right + t * C, ways_back, C);
      }
    }
    to_transitions->add_(at::mm(left.t(), right).mul_(step));
  });
}

}  // extern "C"
