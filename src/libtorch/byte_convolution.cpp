// Convolution over the bytes of words with ReLU and max pooling, on the CPU, forward and backward. There are few
// different bytes, so that what a filter's weights at an offset make of a byte is looked up in a table.
#include "guarded.h"
#include "vectorized.h"

#include <ATen/ops/aminmax.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

// Additions alone, in the same order whatever the width of the registers: the results are the same on all machines.
namespace {

struct Words {
  const int64_t* bytes;
  int64_t longest, offsets, filters;

  const int64_t* word(int64_t n) const { return bytes + n * longest; }

  int64_t length(const int64_t* word) const { return std::find(word, word + longest, 0) - word; }

  // Calls `f` with where in a table [values, offsets, filters] the rows lie that filters at position t read.
  template <typename F>
  void rows(const int64_t* word, int64_t length, int64_t t, F f) const {
    auto first = t - offsets / 2;
    for (int64_t k = std::max<int64_t>(0, -first); k < std::min(offsets, length - first); k++) {
      f((word[first + k] * offsets + k) * filters);
    }
  }
};

VECTORIZED void add(float* sum, const float* row, int64_t n) {
  for (int64_t f = 0; f < n; f++) sum[f] += row[f];
}

VECTORIZED void keep_largest(float* largest, int32_t* at, const float* sum, int32_t t, int64_t n) {
  for (int64_t f = 0; f < n; f++) {
    // NaN wins over all numbers.
    bool more = !(sum[f] <= largest[f]) && largest[f] == largest[f];
    largest[f] = more ? sum[f] : largest[f];
    at[f] = more ? t : at[f];
  }
}

VECTORIZED void add_where(float* sum, const float* gradient, const int32_t* at, int32_t t, int64_t n) {
  for (int64_t f = 0; f < n; f++) sum[f] += at[f] == t ? gradient[f] : 0.0f;
}

Words words_of(const at::Tensor& table, const at::Tensor& bytes) {
  return {bytes.data_ptr<int64_t>(), bytes.size(1), table.size(1), table.size(2)};
}

struct ByteConvolution : torch::autograd::Function<ByteConvolution> {
  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& table, const at::Tensor& bias, const at::Tensor& bytes) {
    auto words = words_of(table, bytes);
    auto n = words.filters;
    auto largest = at::zeros({bytes.size(0), n}, table.options());
    // The position of the largest value, the first of equal ones; -1 where none is above 0.
    auto at = at::full(largest.sizes(), -1, table.options().dtype(at::kInt));
    std::vector<float> sum(n);
    auto *values = table.data_ptr<float>(), *start = bias.data_ptr<float>();
    for (int64_t i = 0; i < bytes.size(0); i++) {
      auto* word = words.word(i);
      auto length = words.length(word);
      for (int64_t t = 0; t < length; t++) {
        std::copy(start, start + n, sum.begin());
        words.rows(word, length, t, [&](int64_t row) { add(sum.data(), values + row, n); });
        keep_largest(largest.data_ptr<float>() + i * n, at.data_ptr<int32_t>() + i * n, sum.data(), t, n);
      }
    }
    context->save_for_backward({table, bytes, at});
    return largest;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& gradients) {
    auto saved = context->get_saved_variables();
    auto words = words_of(saved[0], saved[1]);
    auto n = words.filters;
    auto to_table = at::zeros_like(saved[0]), to_bias = at::zeros({n}, saved[0].options());
    auto gradient = gradients[0].contiguous();
    for (int64_t i = 0; i < saved[1].size(0); i++) {
      auto* word = words.word(i);
      auto length = words.length(word);
      auto* own = gradient.data_ptr<float>() + i * n;
      auto* at = saved[2].data_ptr<int32_t>() + i * n;
      for (int64_t t = 0; t < length; t++) {
        words.rows(word, length, t, [&](int64_t row) { add_where(to_table.data_ptr<float>() + row, own, at, t, n); });
        add_where(to_bias.data_ptr<float>(), own, at, t, n);
      }
    }
    return {to_table, to_bias, at::Tensor()};
  }
};

}  // namespace

extern "C" {

// max over t of relu(bias + sum over k of table[word[t + k - K / 2], k]), of each word: [N, F]. table [values, K, F] and
// bias [F], float32; bytes [N, L], 0 beyond a word's end.
char* pt_byte_convolution(Handle table, Handle bias, Handle bytes, Handle* out) {
  auto grad_mode = c10::GradMode::is_enabled();
  return guarded([&] {
    c10::AutoGradMode as_before(grad_mode);
    if (bytes->numel() > 0) {
      auto [least, most] = at::aminmax(*bytes);
      TORCH_CHECK(least.item<int64_t>() >= 0 && most.item<int64_t>() < table->size(0), "a byte is not in the table");
    }
    *out = new at::Tensor(ByteConvolution::apply(table->contiguous(), bias->contiguous(), bytes->contiguous()));
  });
}

}  // extern "C"
