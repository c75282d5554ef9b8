// TorchScript modules: built from source text, saved, loaded and run. Functions that can fail return null, or the text
// of the exception, which the caller frees with pt_free.
#include "guarded.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/quantize_per_channel.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/frontend/resolver.h>
#include <torch/csrc/jit/frontend/sugared_value.h>
#include <torch/csrc/jit/serialization/import.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using torch::jit::Module;

c10::IValue call(const char* name, std::vector<c10::IValue> stack) {
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(&stack);
  return stack.back();
}

// Resolves names in source text: `torch` to aten's operators, as usual, and `quantized` to the quantized operators.
struct Names : torch::jit::Resolver {
  std::shared_ptr<torch::jit::SugaredValue> resolveValue(
      const std::string& name, torch::jit::GraphFunction&, const torch::jit::SourceRange&) override {
    if (name == "torch") return std::make_shared<torch::jit::BuiltinModule>("aten");
    if (name == "quantized") return std::make_shared<torch::jit::BuiltinModule>("quantized");
    return nullptr;
  }

  c10::TypePtr resolveType(const std::string&, const torch::jit::SourceRange&) override { return nullptr; }
};

// An affine map with int8 weights: symmetric, one scale per output.
c10::IValue packed_linear(const at::Tensor& weight, const at::Tensor& bias) {
  auto rows = weight.detach().contiguous();
  auto scales = rows.abs().amax({1}).clamp_min(1e-8).div(127).to(at::kDouble);
  auto quantized = at::quantize_per_channel(rows, scales, at::zeros_like(scales, at::kLong), 0, at::kQInt8);
  return call("quantized::linear_prepack", {quantized, bias.detach()});
}

}  // namespace

extern "C" {

char* pt_module_new(const char* name, Module** out) {
  return guarded([&] { *out = new Module(name); });
}

void pt_module_free(Module* module) { delete module; }

char* pt_module_tensor(Module* module, const char* name, Handle value, bool is_parameter) {
  return guarded([&] {
    if (is_parameter) module->register_parameter(name, value->detach(), false);
    else module->register_buffer(name, value->detach());
  });
}

char* pt_module_child(Module* module, const char* name, Module* child) {
  return guarded([&] { module->register_module(name, *child); });
}

char* pt_module_define(Module* module, const char* source) {
  return guarded([&] { module->define(source, std::make_shared<Names>()); });
}

// Adds an attribute `packed` for quantized::linear_dynamic: an affine map, its weights [outputs, inputs] as int8.
char* pt_module_quantized_linear(Module* module, Handle weight, Handle bias) {
  return guarded([&] {
    auto packed = packed_linear(*weight, *bias);
    module->register_attribute("packed", packed.type(), packed);
  });
}

// Adds an attribute for aten::quantized_lstm: one direction of one layer with int8 weights.
char* pt_module_quantized_cell(Module* module, const char* name, const Handle* weights) {
  return guarded([&] {
    auto input = packed_linear(*weights[0], *weights[2]), hidden = packed_linear(*weights[1], *weights[3]);
    // `true` limits activations to 7 bits: with 8, the 16-bit sums of older processors overflow.
    auto cell = call("quantized::make_quantized_cell_params_dynamic",
        {input, hidden, weights[2]->detach(), weights[3]->detach(), true});
    module->register_attribute(name, cell.type(), cell);
  });
}

char* pt_module_convert(Module* module, int kind) {
  return guarded([&] { module->to(static_cast<at::ScalarType>(kind)); });
}

char* pt_module_save(Module* module, const char* path, size_t n, const char** names, const char** contents,
    const size_t* lengths) {
  return guarded([&] {
    torch::jit::ExtraFilesMap extra;
    for (size_t i = 0; i < n; i++) extra[names[i]] = std::string(contents[i], lengths[i]);
    module->eval();
    // Saved to memory first: on a full disk libtorch's own file writer ends the process.
    std::ostringstream buffer;
    module->save(buffer, extra);
    std::ofstream file(path, std::ios::binary);
    file << buffer.str();
    file.close();
    if (!file) throw std::runtime_error(std::string(path) + " cannot be written: " + std::strerror(errno));
  });
}

// Sets `contents[i]` to the file `names[i]` stored with the module; empty if there is none.
char* pt_module_load(const char* path, size_t n, const char** names, char** contents, Module** out) {
  return guarded([&] {
    torch::jit::ExtraFilesMap extra;
    for (size_t i = 0; i < n; i++) extra[names[i]] = "";
    *out = new Module(torch::jit::load(path, at::Device(at::kCPU), extra));
    (*out)->eval();
    for (size_t i = 0; i < n; i++) contents[i] = strdup(extra[names[i]].c_str());
  });
}

// Returns up to `capacity` entries; `n` is how many there are.
char* pt_module_parameters(Module* module, size_t capacity, char** names, Handle* tensors, size_t* n) {
  return guarded([&] {
    *n = 0;
    for (const auto& parameter : module->named_parameters()) {
      if (*n < capacity) {
        names[*n] = strdup(parameter.name.c_str());
        tensors[*n] = new at::Tensor(parameter.value);
      }
      ++*n;
    }
  });
}

// forward(inputs...) -> Dict[str, Tensor], in the dictionary's order, or a tuple of tensors, with empty names.
char* pt_module_forward(Module* module, size_t n_inputs, const Handle* inputs, size_t capacity, char** names,
    Handle* tensors, size_t* n) {
  return guarded([&] {
    std::vector<c10::IValue> values;
    for (size_t i = 0; i < n_inputs; i++) values.emplace_back(*inputs[i]);
    auto result = module->forward(values);
    *n = 0;
    auto add = [&](const std::string& name, const at::Tensor& tensor) {
      if (*n < capacity) {
        names[*n] = strdup(name.c_str());
        tensors[*n] = new at::Tensor(tensor);
      }
      ++*n;
    };
    if (result.isTuple()) {
      for (const auto& element : result.toTupleRef().elements()) add("", element.toTensor());
    } else {
      for (const auto& entry : result.toGenericDict()) add(entry.key().toStringRef(), entry.value().toTensor());
    }
  });
}

}  // extern "C"
