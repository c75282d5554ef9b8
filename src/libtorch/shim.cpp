// The operators of libtorch that the tch crate does not reach. Every function returns null, or the text of the
// exception that was thrown, which the caller frees with pt_free.
#include "guarded.h"

#include <ATen/Context.h>
#include <ATen/core/PhiloxRNGEngine.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <malloc.h>

#include <cstdint>
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

class Listener : public c10::WarningHandler {
 public:
  explicit Listener(void (*hear)(const char*)) : hear_(hear) {}

  void process(const c10::Warning& warning) override { hear_(warning.msg().c_str()); }

 private:
  void (*hear_)(const char*);
};

}  // namespace

extern "C" {

void pt_free(char* text) { free(text); }

struct pt_adam {
  double learning_rate, beta1, beta2, weight_decay, epsilon;
};

char* pt_fused_adam(
    bool decoupled, size_t n, const Handle* parameters, const Handle* gradients, const Handle* first,
    const Handle* second, const Handle* steps, const pt_adam* options, Handle rate, Handle skip) {
  return guarded([&] {
    auto p = list(parameters, n), g = list(gradients, n), m = list(first, n), v = list(second, n), s = list(steps, n);
    auto with = [&](auto learning_rate) {
      auto update = [&](auto... rest) {
        decoupled ? at::_fused_adamw_(p, g, m, v, {}, s, rest...) : at::_fused_adam_(p, g, m, v, {}, s, rest...);
      };
      update(learning_rate, options->beta1, options->beta2, options->weight_decay, options->epsilon, false, false,
          std::optional<at::Tensor>(), std::optional<at::Tensor>(*skip));
    };
    rate ? with(*rate) : with(options->learning_rate);
  });
}

char* pt_fused_sgd(
    size_t n, const Handle* parameters, const Handle* gradients, const Handle* momenta, double learning_rate,
    double momentum, double weight_decay, bool first_step, Handle rate, Handle skip) {
  return guarded([&] {
    // CUDA's kernel takes no momenta where the momentum is 0.
    auto p = list(parameters, n), g = list(gradients, n), m = list(momenta, momentum > 0 ? n : 0);
    auto with = [&](auto rate) {
      at::_fused_sgd_(p, g, m, weight_decay, momentum, rate, 0.0, false, false, first_step, std::nullopt, *skip);
    };
    rate ? with(*rate) : with(learning_rate);
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

// into += from, element by element of the lists.
char* pt_add(size_t n, const Handle* into, const Handle* from) {
  return guarded([&] { at::_foreach_add_(list(into, n), list(from, n), 1); });
}

// Adds 1 - skip to every tensor of the list.
char* pt_count(size_t n, const Handle* counters, Handle skip) {
  return guarded([&] { at::_foreach_add_(list(counters, n), skip->neg().add(1)); });
}

// Fills `out` [rows, ...] (float, on the CPU) with 1 at probability p and else 0. Each row has a stream of its own, by seed and
// `first_row` + row, so that a batch cut in pieces draws what the whole one would.
char* pt_bernoulli(Handle out, uint64_t seed, uint64_t first_row, double p) {
  return guarded([&] {
    auto rows = out->size(0), width = rows == 0 ? 0 : out->numel() / rows;
    auto* values = out->data_ptr<float>();
    auto limit = static_cast<float>(p);
    for (int64_t row = 0; row < rows; row++) {
      at::Philox4_32 draw(seed, first_row + row);
      for (int64_t i = 0; i < width; i++) {
        *values++ = static_cast<float>(draw() >> 8) * 0x1p-24f < limit ? 1.0f : 0.0f;
      }
    }
  });
}

// `host` on a CUDA device, from pinned memory, so that neither side waits for the copy.
char* pt_upload(Handle host, int8_t device, Handle* out) {
  return guarded([&] {
    auto pinned = host->pin_memory();
    *out = new at::Tensor(pinned.to(at::Device(at::kCUDA, device), pinned.scalar_type(), true));
  });
}

// Makes a CUDA device this thread's own: streams, recordings and generators are those of the current one.
char* pt_use_cuda(int8_t device) {
  return guarded([&] { c10::impl::getDeviceGuardImpl(at::kCUDA)->setDevice(at::Device(at::kCUDA, device)); });
}

char* pt_use_onednn(bool on) {
  return guarded([&] { at::globalContext().setUserEnabledMkldnn(on); });
}

// `warn` hears the warnings of this thread, which libtorch would print; not null.
char* pt_configure(bool deterministic, bool tf32, void (*warn)(const char*)) {
  return guarded([&] {
    static Listener listener(warn);
    c10::WarningUtils::set_warning_handler(&listener);
#ifdef __GLIBC__
    // Memory of a step is kept for the next one: given back and asked for again it would be cleared by the kernel, page by page,
    // one thread at a time. 32 MB is the largest threshold that glibc takes.
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 2147483647);
    mallopt(M_TOP_PAD, 64 << 20);
#endif
    auto& context = at::globalContext();
    context.setDeterministicCuDNN(deterministic);
    context.setBenchmarkCuDNN(false);
    context.setDeterministicAlgorithms(deterministic, true);
    // Every new tensor would be filled with NaN first: nothing here reads what was not written.
    context.setDeterministicFillUninitializedMemory(false);
    context.setAllowTF32CuBLAS(tf32);
    context.setAllowTF32CuDNN(tf32);
  });
}

}  // extern "C"
