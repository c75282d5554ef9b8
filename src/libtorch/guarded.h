// Used by all functions of the shim: lists of tensor handles, and exceptions returned as text.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <cstring>
#include <exception>
#include <vector>

using Handle = at::Tensor*;

inline std::vector<at::Tensor> list(const Handle* handles, size_t n) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(n);
  for (size_t i = 0; i < n; i++) tensors.push_back(*handles[i]);
  return tensors;
}

// Runs `f` without autograd. Returns null, or the text of the exception, which the caller frees with pt_free.
template <typename F>
char* guarded(F f) {
  try {
    c10::NoGradGuard no_grad;
    f();
    return nullptr;
  } catch (const c10::Error& error) {
    return strdup(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return strdup(error.what());
  } catch (...) {
    return strdup("an exception without a text");
  }
}
