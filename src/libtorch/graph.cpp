// CUDA graphs of the stream that pt_use_cuda makes current. With kernels.cpp a library of its own, which the program opens after
// libtorch_cuda.so: it finds there what it needs, and a program on the CPU does without it.
#include "guarded.h"

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

struct Recording {
  at::cuda::CUDAGraph graph;
  c10::DeviceIndex device = c10::cuda::current_device();
  at::cuda::MempoolId_t pool;
};

namespace {

// What a recording that failed leaves behind: libtorch 2.11 still takes this device's allocators and generator to be recording,
// and refuses to draw or to free until they are told otherwise.
void clear_away(const Recording& recording) {
  auto quietly = [](auto f) {
    try {
      f();
    } catch (...) {
    }
  };
  quietly([&] { c10::cuda::CUDACachingAllocator::endAllocateToPool(recording.device, recording.pool); });
  quietly([&] { at::getHostAllocator(at::kCUDA)->end_allocate_to_pool(recording.pool); });
  quietly([&] {
    at::Generator generator = at::cuda::detail::getDefaultCUDAGenerator(recording.device);
    generator.graphsafe_set_state(generator.clone());
  });
}

}  // namespace

extern "C" {

// Gives memory that nothing uses back to the device: while it records, the allocator does not do so where it lacks some.
char* pt_release_memory() {
  return guarded([] { c10::cuda::CUDACachingAllocator::emptyCache(); });
}

// Starts to record what this thread does on CUDA. `pool` is the id of the memory that recordings share; zeros at first.
char* pt_graph_begin(uint64_t pool[2], Recording** out) {
  return guarded([&] {
    c10::cuda::device_synchronize();
    if (pool[0] == 0 && pool[1] == 0) {
      auto id = at::cuda::graph_pool_handle();
      pool[0] = id.first, pool[1] = id.second;
    }
    auto recording = std::make_unique<Recording>();
    recording->pool = {pool[0], pool[1]};
    try {
      recording->graph.capture_begin(recording->pool);
    } catch (...) {
      clear_away(*recording);
      throw;
    }
    *out = recording.release();
  });
}

// Ends the recording; after an error it can only be freed.
char* pt_graph_end(Recording* recording) {
  return guarded([&] {
    try {
      recording->graph.capture_end();
    } catch (...) {
      clear_away(*recording);
      throw;
    }
  });
}

char* pt_graph_replay(Recording* recording) {
  return guarded([&] { recording->graph.replay(); });
}

void pt_graph_free(Recording* recording) { delete recording; }

}  // extern "C"
