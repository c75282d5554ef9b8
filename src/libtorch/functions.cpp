// Functions with gradients of which custom kernels compute all or part.
#include "launch.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>

namespace {

// States [B, T, F] as they lie in memory: positions first, [T, B, F], or sentences first, [B, T, F].
struct States {
  at::Tensor memory;
  bool positions_first;
  int64_t rows, width, features;

  explicit States(const at::Tensor& x) : rows(x.size(0)), width(x.size(1)), features(x.size(2)) {
    memory = x.transpose(0, 1);
    positions_first = memory.is_contiguous();
    if (!positions_first) memory = x.contiguous();
  }

  at::Tensor of(const at::Tensor& other) const { return positions_first ? other.transpose(0, 1) : other; }
  int32_t by_row() const { return static_cast<int32_t>(positions_first ? features : width * features); }
  int32_t by_position() const { return static_cast<int32_t>(positions_first ? rows * features : features); }
};

// Max pooling over the positions of each sentence, by the kernels of max_pool.cu.
struct MaxPool : torch::autograd::Function<MaxPool> {
  static constexpr uint32_t BLOCK = 128;

  static dim3 grid(const States& states) { return {static_cast<uint32_t>(states.rows), static_cast<uint32_t>((states.features + BLOCK - 1) / BLOCK)}; }

  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& lengths, int64_t kernel, int64_t gradient_kernel) {
    States states(x);
    auto most = at::empty({states.rows, states.features}, x.options()), counts = at::empty_like(most);
    auto features = static_cast<int32_t>(states.features);
    launch(
        reinterpret_cast<void*>(kernel), grid(states), BLOCK, 0, {states.memory, lengths, most, counts},
        {features, states.by_row(), states.by_position()});
    context->save_for_backward({x, lengths, most, counts});
    context->saved_data["kernel"] = gradient_kernel;
    return most;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& gradients) {
    auto saved = context->get_saved_variables();
    States states(saved[0]);
    auto to_x = at::empty_like(states.memory);
    auto features = static_cast<int32_t>(states.features), width = static_cast<int32_t>(states.width);
    launch(
        reinterpret_cast<void*>(context->saved_data["kernel"].toInt()), grid(states), BLOCK, 0,
        {states.memory, saved[1], saved[2], saved[3], gradients[0].contiguous(), to_x},
        {width, features, states.by_row(), states.by_position()});
    return {states.of(to_x), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

int32_t number(int64_t value) { return static_cast<int32_t>(value); }

// The convolution of byte_convolution.cu.
struct ByteConvolution : torch::autograd::Function<ByteConvolution> {
  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& table, const at::Tensor& bias, const at::Tensor& bytes,
      const std::vector<int64_t>& kernels) {
    auto n = bytes.size(0), longest = bytes.size(1), offsets = table.size(1), filters = table.size(2);
    auto y = at::empty({n, filters}, table.options());
    auto seen = at::empty({offsets, n, filters}, table.options().dtype(at::kShort));
    constexpr uint32_t BLOCK = 128;
    launch(
        reinterpret_cast<void*>(kernels[0]), {static_cast<uint32_t>(n), static_cast<uint32_t>((filters + BLOCK - 1) / BLOCK)}, BLOCK,
        static_cast<uint32_t>(longest * sizeof(int32_t)), {table, bias, bytes, y, seen},
        {number(n), number(longest), number(offsets), number(filters)});
    context->save_for_backward({seen});
    context->saved_data["kernels"] = kernels, context->saved_data["values"] = table.size(0);
    return y;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& given) {
    auto seen = context->get_saved_variables()[0];
    auto kernels = context->saved_data["kernels"].toIntVector();
    auto to_y = given[0].contiguous();
    auto offsets = seen.size(0), n = seen.size(1), filters = seen.size(2), values = context->saved_data["values"].toInt();
    auto n_rows = std::max<int64_t>(64, (n + 63) / 64), n_parts = (n + n_rows - 1) / n_rows;
    auto parts = at::empty({n_parts, values, offsets, filters}, to_y.options());
    launch(
        reinterpret_cast<void*>(kernels[1]), {static_cast<uint32_t>(n_parts), static_cast<uint32_t>(offsets * ((filters + 31) / 32))}, 32,
        static_cast<uint32_t>(values * 32 * sizeof(float)), {to_y, seen, parts},
        {number(n), number(n_rows), number(values), number(offsets), number(filters)});
    auto to_table = parts[0];
    if (n_parts > 1) {
      to_table = at::empty_like(to_table);
      auto size = to_table.numel();
      launch(
          reinterpret_cast<void*>(kernels[2]), static_cast<uint32_t>((size + 127) / 128), 128, 0, {parts, to_table},
          {number(n_parts), number(size)});
    }
    // Whatever a filter reads, it reads a byte at the offset in the middle.
    return {to_table, to_table.select(1, offsets / 2).sum(0), at::Tensor(), at::Tensor()};
  }
};

// Dropout by the kernel of random.cu, which draws the same mask for the gradients.
struct Dropout : torch::autograd::Function<Dropout> {
  // `numbers` are the kernel's last ones, from first_row on; the last tells whether positions share their draws.
  static at::Tensor applied(const at::Tensor& x, const at::Tensor& seed, int64_t kernel, const std::vector<int64_t>& numbers) {
    States states(x);
    auto y = at::empty_like(states.memory);
    std::vector<int32_t> all{number(states.rows), number(states.width), number(states.features), states.by_row(), states.by_position()};
    for (auto value : numbers) all.push_back(number(value));
    auto draws = numbers.back() ? states.width * ((states.features + 3) / 4) : (states.width * states.features + 3) / 4;
    constexpr uint32_t BLOCK = 128;
    launch(
        reinterpret_cast<void*>(kernel), static_cast<uint32_t>((states.rows * draws + BLOCK - 1) / BLOCK), BLOCK, 0,
        {states.memory, seed, y}, all);
    return states.of(y);
  }

  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& seed, int64_t kernel,
      const std::vector<int64_t>& numbers) {
    context->save_for_backward({seed});
    context->saved_data["kernel"] = kernel, context->saved_data["numbers"] = numbers;
    return applied(x, seed, kernel, numbers);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& gradients) {
    auto to_x = applied(
        gradients[0], context->get_saved_variables()[0], context->saved_data["kernel"].toInt(),
        context->saved_data["numbers"].toIntVector());
    return {to_x, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// A linear layer whose gradients come from the kernels of linear.cu.
struct NarrowLinear : torch::autograd::Function<NarrowLinear> {
  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, int64_t gradients,
      int64_t sum) {
    context->save_for_backward({x, weight});
    context->saved_data["gradients"] = gradients, context->saved_data["sum"] = sum;
    return at::linear(x, weight, bias);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& given) {
    auto saved = context->get_saved_variables();
    auto &x = saved[0], &weight = saved[1];
    auto to_y = given[0].contiguous();
    torch::autograd::variable_list all(5);
    if (context->needs_input_grad(0)) all[0] = at::mm(to_y, weight);
    if (!context->needs_input_grad(1) && !context->needs_input_grad(2)) return all;
    auto kernel = [&](const char* name) { return reinterpret_cast<void*>(context->saved_data[name].toInt()); };
    auto n = x.size(0), width = x.size(1), n_outputs = weight.size(0);
    // At most 64 blocks of rows, each a multiple of 32.
    auto n_rows = std::max<int64_t>(32, (n + 64 * 32 - 1) / (64 * 32) * 32), n_parts = (n + n_rows - 1) / n_rows;
    auto parts = at::empty({n_parts > 1 ? n_parts : 0, n_outputs, width + 1}, x.options());
    all[1] = at::empty({n_outputs, width}, x.options()), all[2] = at::empty({n_outputs}, x.options());
    dim3 grid(static_cast<uint32_t>(n_parts), static_cast<uint32_t>((width + 64) / 64));
    launch(
        kernel("gradients"), grid, 256, static_cast<uint32_t>(32 * (64 + n_outputs) * sizeof(float)),
        {x, to_y, parts, all[1], all[2]}, {number(n), number(width), number(n_outputs), number(n_rows)});
    if (n_parts > 1) {
      dim3 threads(static_cast<uint32_t>((n_outputs * (width + 1) + 127) / 128));
      launch(kernel("sum"), threads, 128, 0, {parts, all[1], all[2]}, {number(n_parts), number(width), number(n_outputs)});
    }
    return all;
  }
};

}  // namespace

extern "C" {

// Max pooling over the positions of each sentence of x [B, T, F], float32, within lengths [B], none of them 0, by the
// kernels of max_pool.cu.
char* pt_max_pool_cuda(void* kernel, void* gradient_kernel, Handle x, Handle lengths, Handle* out) {
  auto grad_mode = c10::GradMode::is_enabled();
  return guarded([&] {
    c10::AutoGradMode as_before(grad_mode);
    *out = new at::Tensor(
        MaxPool::apply(*x, *lengths, reinterpret_cast<int64_t>(kernel), reinterpret_cast<int64_t>(gradient_kernel)));
  });
}

// The convolution of byte_convolution.cu, by its three kernels in their order: table [V, K, F], bias [F], bytes [N, L] to
// [N, F].
char* pt_byte_convolution_cuda(void* const kernels[3], Handle table, Handle bias, Handle bytes, Handle* out) {
  auto grad_mode = c10::GradMode::is_enabled();
  return guarded([&] {
    c10::AutoGradMode as_before(grad_mode);
    std::vector<int64_t> all;
    for (int i = 0; i < 3; i++) all.push_back(reinterpret_cast<int64_t>(kernels[i]));
    *out = new at::Tensor(ByteConvolution::apply(*table, *bias, *bytes, all));
  });
}

// Dropout of x [B, T, F], float32, by the kernel of random.cu; `numbers` are its arguments from first_row on.
char* pt_dropout(void* kernel, Handle x, Handle seed, size_t n, const int64_t* numbers, Handle* out) {
  auto grad_mode = c10::GradMode::is_enabled();
  return guarded([&] {
    c10::AutoGradMode as_before(grad_mode);
    *out = new at::Tensor(
        Dropout::apply(*x, *seed, reinterpret_cast<int64_t>(kernel), std::vector<int64_t>(numbers, numbers + n)));
  });
}

// x [N, F] W^T + b for at most 128 outputs, float32, contiguous; its gradients by the kernels of linear.cu.
char* pt_narrow_linear(void* gradients, void* sum, Handle x, Handle weight, Handle bias, Handle* out) {
  auto grad_mode = c10::GradMode::is_enabled();
  return guarded([&] {
    c10::AutoGradMode as_before(grad_mode);
    *out = new at::Tensor(
        NarrowLinear::apply(*x, *weight, *bias, reinterpret_cast<int64_t>(gradients), reinterpret_cast<int64_t>(sum)));
  });
}

}  // extern "C"
