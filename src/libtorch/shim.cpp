// Operators of libtorch that the tch crate lacks. Functions that can fail return null, or the text of the exception,
// which the caller frees with pt_free.
#include "guarded.h"

#include <ATen/Context.h>
#include <ATen/core/PhiloxRNGEngine.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/stack.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <malloc.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <vector>

namespace {

std::optional<at::Tensor> optional(Handle tensor) {
  return tensor ? std::optional<at::Tensor>(*tensor) : std::nullopt;
}

// The 2-norm of each tensor: [n].
at::Tensor norms(const Handle* tensors, size_t n) { return at::stack(at::_foreach_norm(list(tensors, n), 2)); }

// The fused operators take all tensors of a parameter to lie in memory alike, and check nothing.
void check_alike(const std::vector<at::Tensor>& parameters, std::initializer_list<const std::vector<at::Tensor>*> lists) {
  for (auto* others : lists) {
    for (size_t i = 0; i < others->size(); i++) {
      auto &one = parameters[i], &other = (*others)[i];
      TORCH_CHECK(
          one.is_contiguous() && other.is_contiguous() && one.sizes() == other.sizes() && one.device() == other.device(),
          "parameter ", i, " and its gradient or moments differ in shape, device or order in memory");
    }
  }
}

class Listener : public c10::WarningHandler {
 public:
  explicit Listener(void (*hear)(const char*)) : hear_(hear) {}

  void process(const c10::Warning& warning) override { hear_(warning.msg().c_str()); }

 private:
  void (*hear_)(const char*);
};

// A value with given gradients for up to four inputs. (libtorch tracks inputs that are arguments of their own, not
// those in a list.)
struct Known : torch::autograd::Function<Known> {
  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& value, const at::Tensor& a, const at::Tensor& b,
      const at::Tensor& c, const at::Tensor& d, const std::vector<at::Tensor>& gradients) {
    context->save_for_backward(gradients);
    // The same memory; returning the argument itself would make the result a view.
    return value.detach();
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& of_value) {
    auto gradients = context->get_saved_variables();
    torch::autograd::variable_list all{at::Tensor()};
    for (auto& gradient : gradients) all.push_back(gradient.mul(of_value[0]));
    all.resize(6);
    return all;
  }
};

}  // namespace

extern "C" {

void pt_free(char* text) { free(text); }

struct pt_adam {
  double learning_rate, beta1, beta2, weight_decay, epsilon;
};

char* pt_fused_adam(
    bool decoupled, size_t n, const Handle* parameters, const Handle* gradients, const Handle* first,
    const Handle* second, const Handle* steps, const pt_adam* options, Handle rate, Handle divisor, Handle skip) {
  return guarded([&] {
    auto p = list(parameters, n), g = list(gradients, n), m = list(first, n), v = list(second, n), s = list(steps, n);
    check_alike(p, {&g, &m, &v});
    auto with = [&](auto learning_rate) {
      auto update = [&](auto... rest) {
        decoupled ? at::_fused_adamw_(p, g, m, v, {}, s, rest...) : at::_fused_adam_(p, g, m, v, {}, s, rest...);
      };
      update(learning_rate, options->beta1, options->beta2, options->weight_decay, options->epsilon, false, false,
          optional(divisor), optional(skip));
    };
    rate ? with(*rate) : with(options->learning_rate);
  });
}

char* pt_fused_sgd(
    size_t n, const Handle* parameters, const Handle* gradients, const Handle* momenta, double learning_rate,
    double momentum, double weight_decay, Handle rate, Handle divisor, Handle skip) {
  return guarded([&] {
    // CUDA's kernel takes no momentum buffers if the momentum is 0.
    auto p = list(parameters, n), g = list(gradients, n), m = list(momenta, momentum > 0 ? n : 0);
    check_alike(p, {&g, &m});
    auto with = [&](auto rate) {
      at::_fused_sgd_(p, g, m, weight_decay, momentum, rate, 0.0, false, false, false, optional(divisor), *skip);
    };
    rate ? with(*rate) : with(learning_rate);
  });
}

// norm: the 2-norm of all gradients together, or from `squares`, partial sums of their squares, unless null. The
// gradients are `loss_scale` times too large unless that is null. divisor: what an optimizer must divide them by to
// limit their norm to `limit` (0: no limit); null for nothing.
char* pt_clip(
    size_t n, const Handle* gradients, Handle squares, double limit, Handle loss_scale, Handle* norm, Handle* divisor) {
  return guarded([&] {
    auto total = squares ? squares->sum(at::kDouble).sqrt().to(at::kFloat) : at::linalg_vector_norm(norms(gradients, n), 2);
    if (loss_scale) total = total.div(*loss_scale);
    *norm = new at::Tensor(total);
    *divisor = nullptr;
    if (limit > 0) {
      auto by = total.add(1e-6).div(limit).clamp_min(1.0);
      *divisor = new at::Tensor(loss_scale ? by.mul(*loss_scale) : by);
    } else if (loss_scale) {
      *divisor = new at::Tensor(loss_scale->clone());
    }
  });
}

char* pt_norms(size_t n, const Handle* gradients, Handle* out) {
  return guarded([&] { *out = new at::Tensor(norms(gradients, n)); });
}

// gradients[i] /= divisor
char* pt_divide(size_t n, const Handle* gradients, Handle divisor) {
  return guarded([&] { at::_foreach_mul_(list(gradients, n), divisor->reciprocal()); });
}

// The gradients of sum over i of weights[i] . outputs[i] with respect to `inputs`; null where there is none.
char* pt_backward(
    size_t n, const Handle* outputs, const Handle* weights, size_t m, const Handle* inputs, bool keep_graph, Handle* out) {
  return guarded([&] {
    auto gradients = torch::autograd::grad(
        list(outputs, n), list(inputs, m), list(weights, n), keep_graph, false, true);
    for (size_t i = 0; i < m; i++) out[i] = gradients[i].defined() ? new at::Tensor(gradients[i]) : nullptr;
  });
}

// `value` as a graph node with these gradients with respect to `inputs`, n of each, at most four.
char* pt_with_gradients(Handle value, size_t n, const Handle* inputs, const Handle* gradients, Handle* out) {
  auto grad_mode = c10::GradMode::is_enabled();
  return guarded([&] {
    c10::AutoGradMode as_before(grad_mode);
    // Unused inputs must be tensors too: `value`, which takes no gradient.
    at::Tensor to[] = {*value, *value, *value, *value};
    for (size_t i = 0; i < n; i++) to[i] = *inputs[i];
    *out = new at::Tensor(Known::apply(*value, to[0], to[1], to[2], to[3], list(gradients, n)));
  });
}

// into[i] = from[i]; dtypes may differ.
char* pt_copy(size_t n, const Handle* into, const Handle* from) {
  return guarded([&] { at::_foreach_copy_(list(into, n), list(from, n)); });
}

// into[i] += from[i]
char* pt_add(size_t n, const Handle* into, const Handle* from) {
  return guarded([&] { at::_foreach_add_(list(into, n), list(from, n), 1); });
}

// Adds 1 - skip to every tensor of the list; `taken` is 1 - skip, or null.
char* pt_count(size_t n, const Handle* counters, Handle skip, Handle taken) {
  return guarded([&] { at::_foreach_add_(list(counters, n), taken ? *taken : at::rsub(*skip, 1)); });
}

// Fills `out` [rows, ...] (float, on the CPU) with 1 with probability p, else 0. Each row has its own random stream,
// given by seed and `first_row` + row, so that a batch in parts draws the same as the whole one.
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

// Copies `host` to a CUDA device through pinned memory, so that neither side waits for the copy.
char* pt_upload(Handle host, int8_t device, Handle* out) {
  return guarded([&] {
    auto pinned = host->pin_memory();
    *out = new at::Tensor(pinned.to(at::Device(at::kCUDA, device), pinned.scalar_type(), true));
  });
}

// Copies `host` into the memory of `out`, as pt_upload does.
char* pt_upload_into(Handle host, Handle out) {
  return guarded([&] {
    TORCH_CHECK(host->sizes() == out->sizes() && host->dtype() == out->dtype(), "other numbers than those that were there");
    out->copy_(host->pin_memory(), true);
  });
}

// Makes a CUDA device this thread's current one, whose graphs and generator are used. All of the thread's work on it
// goes to one stream other than the default one, which cannot be recorded; backward passes follow it. cuBLAS has one
// workspace per stream.
char* pt_use_cuda(int8_t index) {
  return guarded([&] {
    auto* guard = c10::impl::getDeviceGuardImpl(at::kCUDA);
    at::Device device(at::kCUDA, index);
    guard->setDevice(device);
    if (guard->getStream(device) == guard->getDefaultStream(device)) {
      guard->exchangeStream(guard->getStreamFromGlobalPool(device));
    }
  });
}

bool pt_grad_enabled() { return c10::GradMode::is_enabled(); }

char* pt_use_onednn(bool on) {
  return guarded([&] { at::globalContext().setUserEnabledMkldnn(on); });
}

// `warn`, not null, receives this thread's warnings, which libtorch would print.
char* pt_configure(bool deterministic, bool tf32, void (*warn)(const char*)) {
  return guarded([&] {
    static Listener listener(warn);
    c10::WarningUtils::set_warning_handler(&listener);
#ifdef __GLIBC__
    // Keeps the memory of a step for the next one: if it were returned and requested again, the operating system would
    // clear it, page by page, on one thread. 32 MB is the largest threshold that glibc accepts.
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 2147483647);
    mallopt(M_TOP_PAD, 64 << 20);
#endif
    auto& context = at::globalContext();
    context.setDeterministicCuDNN(deterministic);
    context.setBenchmarkCuDNN(false);
    context.setDeterministicAlgorithms(deterministic, true);
    // Off: it fills every new tensor with NaN, and no code here reads memory before writing it.
    context.setDeterministicFillUninitializedMemory(false);
    context.setAllowTF32CuBLAS(tf32);
    context.setAllowTF32CuDNN(tf32);
  });
}

}  // extern "C"
