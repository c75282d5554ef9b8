// Linear layers on the CPU by oneDNN's matrix products. MKL's, which libtorch uses, take over twice as long on processors
// that MKL does not recognise.
#include "guarded.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <string_view>

namespace {

// Builds of libtorch without oneDNN lack it.
const std::optional<c10::OperatorHandle>& found() {
  static auto operation = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  return operation;
}

// x [N, K] times the transpose of w [C, K], plus bias [C].
at::Tensor product(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias) {
  using Product = at::Tensor(
      const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view, c10::List<std::optional<at::Scalar>>,
      std::optional<std::string_view>);
  static auto product = found()->typed<Product>();
  return product.call(x, w, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
    context->save_for_backward({x, weight});
    return product(x, weight, bias);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& gradients) {
    auto saved = context->get_saved_variables();
    auto& to_y = gradients[0];
    auto if_needed = [&](size_t i, auto f) { return context->needs_input_grad(i) ? f() : at::Tensor(); };
    return {
        if_needed(0, [&] { return product(to_y, saved[1].t(), {}); }), if_needed(1, [&] { return product(to_y.t(), saved[0].t(), {}); }),
        if_needed(2, [&] { return to_y.sum(0); })};
  }
};

}  // namespace

extern "C" {

// x [N, K] W^T + b, float32; `out` stays null without oneDNN.
char* pt_linear_cpu(Handle x, Handle weight, Handle bias, Handle* out) {
  auto grad_mode = c10::GradMode::is_enabled();
  return guarded([&] {
    c10::AutoGradMode as_before(grad_mode);
    if (at::globalContext().userEnabledMkldnn() && found()) *out = new at::Tensor(Linear::apply(*x, *weight, *bias));
  });
}

}  // extern "C"
