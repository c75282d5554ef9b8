// Max pooling over the positions of each sentence on the CPU, forward and backward, as max_pool.cu does it on a GPU.
#include "guarded.h"
#include "vectorized.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

namespace {

// The largest states so far and the number of positions that have them, with one position more.
VECTORIZED void keep_largest(float* most, float* counts, const float* x, int64_t n) {
  for (int64_t f = 0; f < n; f++) {
    // NaN wins over all numbers.
    bool more = x[f] > most[f] || x[f] != x[f];
    counts[f] = more ? 1.0f : counts[f] + (x[f] == most[f] ? 1.0f : 0.0f);
    most[f] = more ? x[f] : most[f];
  }
}

VECTORIZED void give(float* to_x, const float* x, const float* most, const float* shares, int64_t n) {
  for (int64_t f = 0; f < n; f++) to_x[f] = x[f] == most[f] ? shares[f] : 0.0f;
}

// Numbers for which a thread of its own is worth its while.
constexpr int64_t GRAIN = 1 << 17;

// Calls f(row, t) for the positions of all rows of x [B, T, F]: parts of the rows in parallel, each in the order of memory.
template <typename F>
void each_position(const at::Tensor& x, F f) {
  bool rows_first = x.stride(0) >= x.stride(1);
  at::parallel_for(0, x.size(0), 1 + GRAIN / (x.size(1) * x.size(2)), [&](int64_t begin, int64_t end) {
    auto outer = rows_first ? end - begin : x.size(1), inner = rows_first ? x.size(1) : end - begin;
    for (int64_t i = 0; i < outer; i++) {
      for (int64_t j = 0; j < inner; j++) rows_first ? f(begin + i, j) : f(begin + j, i);
    }
  });
}

float* at_position(const at::Tensor& x, int64_t row, int64_t t) { return x.data_ptr<float>() + row * x.stride(0) + t * x.stride(1); }

struct MaxPool : torch::autograd::Function<MaxPool> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& given, const at::Tensor& lengths) {
    auto x = given.stride(2) == 1 ? given : given.contiguous();
    auto n = x.size(2);
    auto most = at::empty({x.size(0), n}, x.options()), counts = at::empty_like(most);
    TORCH_CHECK(lengths.numel() == x.size(0), "each sentence has a length");
    auto* ends = lengths.data_ptr<int64_t>();
    for (int64_t row = 0; row < x.size(0); row++) {
      TORCH_CHECK(ends[row] > 0 && ends[row] <= x.size(1), "a sentence of no or too many positions");
    }
    each_position(x, [&, largest = most.data_ptr<float>(), tied = counts.data_ptr<float>()](int64_t row, int64_t t) {
      auto* states = at_position(x, row, t);
      if (t == 0) {
        std::copy(states, states + n, largest + row * n);
        std::fill(tied + row * n, tied + (row + 1) * n, 1.0f);
      } else if (t < ends[row]) {
        keep_largest(largest + row * n, tied + row * n, states, n);
      }
    });
    context->save_for_backward({x, lengths, most, counts});
    return most;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& gradients) {
    auto saved = context->get_saved_variables();
    auto& x = saved[0];
    auto shares = gradients[0].div(saved[3]).contiguous(), to_x = at::empty_like(x);
    auto n = x.size(2);
    auto* ends = saved[1].data_ptr<int64_t>();
    each_position(x, [&, largest = saved[2].data_ptr<float>(), share = shares.data_ptr<float>()](int64_t row, int64_t t) {
      auto* own = at_position(to_x, row, t);
      if (t < ends[row]) give(own, at_position(x, row, t), largest + row * n, share + row * n, n);
      else std::fill(own, own + n, 0.0f);
    });
    return {to_x, at::Tensor()};
  }
};

}  // namespace

extern "C" {

// The largest states of each sentence of x [B, T, F], float32, within lengths [B], int64, none of them 0: [B, F]. The gradient
// of tied states is shared evenly.
char* pt_max_pool(Handle x, Handle lengths, Handle* out) {
  auto grad_mode = c10::GradMode::is_enabled();
  return guarded([&] {
    c10::AutoGradMode as_before(grad_mode);
    *out = new at::Tensor(MaxPool::apply(*x, lengths->contiguous()));
  });
}

}  // extern "C"
