// The operators of libtorch that the tch crate does not reach. Every function returns null, or the text of the
// exception that was thrown, which the caller frees with pt_free.
#include "guarded.h"

#include <ATen/Context.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace {

std::vector<at::Tensor> list(const Handle* handles, size_t n) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(n);
  for (size_t i = 0; i < n; i++) tensors.push_back(*handles[i]);
  return tensors;
}

}  // namespace

extern "C" {

void pt_free(char* text) { free(text); }

struct pt_adam {
  double learning_rate, beta1, beta2, weight_decay, epsilon;
};

char* pt_fused_adam(
    bool decoupled, size_t n, const Handle* parameters, const Handle* gradients, const Handle* first,
    const Handle* second, const Handle* steps, const pt_adam* options, Handle skip) {
  return guarded([&] {
    auto p = list(parameters, n), g = list(gradients, n), m = list(first, n), v = list(second, n), s = list(steps, n);
    auto operation = decoupled
        ? static_cast<void (*)(at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
              at::TensorList, double, double, double, double, double, bool, bool, const std::optional<at::Tensor>&,
              const std::optional<at::Tensor>&)>(at::_fused_adamw_)
        : static_cast<void (*)(at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
              at::TensorList, double, double, double, double, double, bool, bool, const std::optional<at::Tensor>&,
              const std::optional<at::Tensor>&)>(at::_fused_adam_);
    at::_foreach_add_(s, 1);
    operation(p, g, m, v, {}, s, options->learning_rate, options->beta1, options->beta2, options->weight_decay,
        options->epsilon, false, false, std::nullopt, *skip);
  });
}

char* pt_fused_sgd(
    size_t n, const Handle* parameters, const Handle* gradients, const Handle* momenta, double learning_rate,
    double momentum, double weight_decay, bool first_step, Handle skip) {
  return guarded([&] {
    auto p = list(parameters, n), g = list(gradients, n), m = list(momenta, n);
    at::_fused_sgd_(
        p, g, m, weight_decay, momentum, learning_rate, 0.0, false, false, first_step, std::nullopt, *skip);
  });
}

// Scales the gradients in place so that their common norm is at most `limit`; the norm before that goes to `norm`.
char* pt_clip(size_t n, const Handle* gradients, double limit, Handle* norm) {
  return guarded([&] {
    auto g = list(gradients, n);
    auto total = at::linalg_vector_norm(at::stack(at::_foreach_norm(g, 2)), 2);
    *norm = new at::Tensor(total);
    if (limit > 0) at::_foreach_mul_(g, total.add(1e-6).reciprocal().mul(limit).clamp_max(1.0));
  });
}

// into += from * scale, element by element of the lists.
char* pt_add(size_t n, const Handle* into, const Handle* from) {
  return guarded([&] { at::_foreach_add_(list(into, n), list(from, n), 1); });
}

char* pt_configure(bool deterministic, bool tf32) {
  return guarded([&] {
    auto& context = at::globalContext();
    context.setDeterministicCuDNN(deterministic);
    context.setBenchmarkCuDNN(false);
    context.setDeterministicAlgorithms(deterministic, true);
    context.setAllowTF32CuBLAS(tf32);
    context.setAllowTF32CuDNN(tf32);
  });
}

}  // extern "C"
