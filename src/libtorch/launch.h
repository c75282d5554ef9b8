// Launches of kernels, for the library that needs CUDA.
#pragma once

#include "guarded.h"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

// The kernel's arguments: pointers to the memory of `tensors`, `numbers` as int, then the list unless it is null.
void launch(
    void* kernel, dim3 grid, dim3 block, uint32_t shared, const std::vector<at::Tensor>& tensors, const std::vector<int32_t>& numbers,
    const void* listed = nullptr);
